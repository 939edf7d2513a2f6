"""The ops on one page: the reference in plain PyTorch, the wrapper, shapes, gradients, FLOPs, the kernel table.

`inverted_residual` takes weights as PyTorch has them. `network` runs a chain of layers, described by a plan, over
weights that `pack` has laid out for one kernel; network.py writes the plans. The C++ side is csrc/ops.cpp.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from . import _C  # loading it registers the ops

_OPS = torch.ops.mnv2_fused


def inverted_residual_reference(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: int | tuple[int, int, int, int] = 1,
    residual: bool = False,
    project_relu6: bool = False,
) -> Tensor:
    """What `inverted_residual` computes, in plain PyTorch: its definition, and what the tests compare it with."""
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
    h = x if expand_weight is None else F.relu6(F.conv2d(x, expand_weight, expand_bias))
    d = F.conv2d(F.pad(h, sides), depthwise_weight, depthwise_bias, stride, 0, dilation, groups=h.shape[1])
    y = F.conv2d(F.relu6(d), project_weight, project_bias)
    y = x + y if residual else y
    return F.relu6(y) if project_relu6 else y


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: int | tuple[int, int, int, int] = 1,
    residual: bool = False,
    project_relu6: bool = False,
) -> Tensor:
    """MobileNetV2's block as one op: 1x1 expand + ReLU6, 3x3 depthwise + ReLU6, 1x1 project (BN folded in).

    The expanded activation lives in registers and cache only. Outside the image it is 0 (the padding comes after the
    first ReLU6). Gradients are those of `inverted_residual_reference`, from its inputs alone, and have none of their
    own; under forward-mode differentiation and the transforms of torch.func that reference runs. Source: Sandler et
    al., CVPR 2018, section 3 and Table 1.

    Args:
        x: [N, C_in, H, W], any strides; channels_last is read as it is, others are copied. On the CPU float32,
            float64 or bfloat16; on CUDA float16, bfloat16 or float32 (its products rounded to TF32 where
            torch.backends.cudnn.allow_tf32 is set, as it is by default). Weights are of its dtype, or float32 beside
            one of 16 bits, whose sums are float32.
        expand_weight, expand_bias: [C_hid, C_in, 1, 1] and [C_hid]; both None for expansion factor 1 (C_hid = C_in).
        depthwise_weight, depthwise_bias: [C_hid, 1, 3, 3] and [C_hid].
        project_weight, project_bias: [C_out, C_hid, 1, 1] and [C_out].
        stride: 1 or 2, of the depthwise convolution.
        dilation: >= 1, of the depthwise convolution.
        padding: pixels on every side, or (left, right, top, bottom).
        residual: adds x to the result, whose shape must be that of x.
        project_relu6: a ReLU6 at the end (MobileNetV1's block), after the residual.

    Returns:
        [N, C_out, H_out, W_out] in channels_last, H_out = (H + top + bottom - 2 * dilation - 1) // stride + 1.

    Raises:
        ValueError: a shape, option, dtype or device that does not fit; the message names the argument.
        RuntimeError: MNV2_FUSED_KERNEL names a kernel that cannot run here or computes in another dtype; or, in
            backward, the gradients' own gradients are asked for.
    """
    arguments = (x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    if isinstance(padding, int) and not isinstance(padding, bool):
        padding = (padding,) * 4
    _output_shape(*arguments, stride, dilation, padding, residual)
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        options = dict(stride=stride, dilation=dilation, padding=padding, residual=residual)
        return inverted_residual_reference(*arguments, **options, project_relu6=project_relu6)
    return _OPS.inverted_residual(*arguments, stride, dilation, padding, residual, project_relu6, uses_tf32(x))


HALVES = (torch.float16, torch.bfloat16)
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}


def device_type(x: Tensor) -> str:
    """The device for which there are kernels or not; tests that emulate one put it here."""
    return x.device.type


def _kernels_of(x: Tensor) -> str:
    return "cuda" if device_type(x) == "cuda" else "cpu"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(most)} or {last}"


def uses_tf32(x: Tensor) -> bool:
    """Whether products of x are rounded to TF32 on the way, as torch's convolutions do it."""
    return device_type(x) == "cuda" and x.dtype == torch.float32 and _convolutions_use_tf32()


@torch.compiler.assume_constant_result  # torch's own getter cannot be traced
def _convolutions_use_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # `allow_tf32` raises once this one was set


def _fits(shape: torch.Size, expected: tuple[object, ...]) -> bool:
    return all(isinstance(n, str) or m == n for m, n in zip(shape, expected, strict=True))


def _check_tensor(name: str, tensor: Tensor, shape: tuple[object, ...], like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {list(shape)}, got {tensor!r}")
    if tensor.dim() != len(shape) or not _fits(tensor.shape, shape):
        expected = ", ".join(str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(tensor.shape)}")
    if tensor.dtype != like.dtype and not (tensor.dtype == torch.float32 and like.dtype in HALVES):
        raise ValueError(f"{name} must be {like.dtype}, the dtype of x, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, the device of x, got {tensor.device}")


def _output_shape(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride, dilation, padding, residual,
) -> list[int]:  # fmt: skip
    """The shape of the result; ValueError where an argument does not fit the others."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        raise ValueError(f"x must be a tensor [N, C, H, W], got {list(x.shape) if isinstance(x, Tensor) else x!r}")
    if device_type(x) not in ("cpu", "cuda", "meta"):
        raise ValueError(f"x must be on the CPU or a CUDA device, which there are kernels for, got {x.device}")
    if x.is_cuda and (reason := no_cuda(x.device.index)):
        raise ValueError(f"x is on {x.device}: {reason}")
    if x.dtype not in DTYPES[_kernels_of(x)]:
        raise ValueError(f"x must be {_names(DTYPES[_kernels_of(x)])}, which there are kernels for, got {x.dtype}")
    batch, channels, height, width = x.shape
    _check_tensor("depthwise_weight", depthwise_weight, ("C_hid", 1, 3, 3), x)
    hidden = depthwise_weight.shape[0]
    if expand_weight is None:
        if expand_bias is not None:
            raise ValueError("expand_bias must be None where expand_weight is: there is no expansion to add it to")
        _check_tensor("depthwise_weight", depthwise_weight, (channels, 1, 3, 3), x)
    else:
        _check_tensor("expand_weight", expand_weight, (hidden, channels, 1, 1), x)
        _check_tensor("expand_bias", expand_bias, (hidden,), x)
    _check_tensor("depthwise_bias", depthwise_bias, (hidden,), x)
    _check_tensor("project_weight", project_weight, ("C_out", hidden, 1, 1), x)
    out_channels = project_weight.shape[0]
    _check_tensor("project_bias", project_bias, (out_channels,), x)
    if channels < 1 or hidden < 1 or out_channels < 1:
        raise ValueError(f"x must have channels, and so the weights, got {channels}, {hidden} and {out_channels}")
    if not _is_size(stride) or stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")
    if not _is_size(dilation) or dilation < 1:
        raise ValueError(f"dilation must be an integer from 1 to 2^20, got {dilation!r}")
    if not isinstance(padding, (tuple, list)) or len(padding) != 4 or not all(_is_size(p) for p in padding):
        raise ValueError(f"padding must be an integer or (left, right, top, bottom) from 0 to 2^20, got {padding!r}")
    left, right, top, bottom = padding
    reach = 2 * dilation + 1
    if height < 1 or width < 1 or height + top + bottom < reach or width + left + right < reach:
        image = f"x of {height}x{width} pixels with padding {padding}"
        raise ValueError(f"{image} is smaller than the {reach}x{reach} that the kernel covers")
    out_height, out_width = ((n - reach) // stride + 1 for n in (height + top + bottom, width + left + right))
    if residual and (stride != 1 or out_channels != channels or (out_height, out_width) != (height, width)):
        shape = [batch, out_channels, out_height, out_width]
        raise ValueError(f"residual needs a result of the shape of x, {list(x.shape)}, got {shape}")
    return [batch, out_channels, out_height, out_width]


def _is_size(n: object) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and 0 <= n <= 2**20


@torch.library.register_fake("mnv2_fused::inverted_residual")
def _(x, *arguments):
    shape = _output_shape(x, *arguments[:10])
    return torch.empty_strided(shape, _channels_last_strides(shape), dtype=x.dtype, device=x.device)


def _channels_last_strides(shape: list[int]) -> list[int]:
    _, channels, height, width = shape
    return [height * width * channels, 1, width * channels, channels]


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx, grad: Tensor):
    """Recomputes the block a few rows at a time and goes back through it; only what is asked for is computed."""
    x, we, be, wd, bd, wp, bp = ctx.saved_tensors
    *geometry, residual, project_relu6, tf32 = ctx.options
    need_x, need_we, need_be, need_wd, need_bd, need_wp, need_bp = need = ctx.needs_input_grad[:7]
    if project_relu6:
        y = _OPS.inverted_residual(x, we, be, wd, bd, wp, bp, *geometry, residual, False, tf32)
        grad = torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0)
    gradients = [None] * 7
    if any(need[:6]):
        shift = bd.float() if x.dtype in HALVES else bd
        one, zero = torch.ones_like(shift), torch.zeros_like(shift)
        table = torch.stack([one, shift, zero, one, zero, zero])  # no BatchNorm: u = d + bd, dd = g
        wanted = (
            WANT_X * need_x | WANT_EXPAND * (need_we or need_be) | WANT_DEPTHWISE * need_wd | WANT_PROJECT * need_wp
        ) | WANT_SUMS * need_bd
        dx, *sums = _OPS.block_gradients(grad, x, we, be, wd, wp, table, *geometry, wanted, tf32)
        expand, depthwise, project, (total_d, _, total_e, _) = sums
        gradients[:6] = (dx + grad if residual and need_x else dx), expand.t(), total_e, depthwise.t(), total_d, project
    gradients[6] = grad.sum((0, 2, 3)) if need_bp else None
    return *map(_like, gradients, (x, we, be, wd, bd, wp, bp), need), *[None] * 6


def _like(gradient: Tensor, tensor: Tensor, needed: bool) -> Tensor | None:
    return gradient.to(tensor.dtype).reshape(tensor.shape) if needed else None


torch.library.register_autograd("mnv2_fused::inverted_residual", _backward, setup_context=_setup_context)


def _no_second_derivative(*_) -> None:
    raise RuntimeError(
        "the gradient of a fused block has no derivative of its own (double backward); "
        "set `fused = False`, or use inverted_residual_reference"
    )


@register_flop_formula(_OPS.inverted_residual, get_raw=True)
def _(x, we, be, wd, bd, wp, bp, *options, out_val=None, **_) -> int:
    batch, channels, height, width = x.shape
    pixels, out_pixels = batch * height * width, batch * out_val.shape[2] * out_val.shape[3]
    hidden, out_channels = wd.shape[0], wp.shape[0]
    return 2 * ((0 if we is None else pixels * channels * hidden) + out_pixels * hidden * (9 + out_channels))


# ----------------------------------------------------------------------------------------------- kernels of training

# Bits of `block_gradients`' last argument, as in csrc/ops.cpp.
WANT_X, WANT_EXPAND, WANT_DEPTHWISE, WANT_PROJECT, WANT_SUMS = 1, 2, 4, 8, 16


def _doubles(x: Tensor, *size: int) -> Tensor:
    return x.new_empty(size, dtype=torch.float64)


@torch.library.register_fake("mnv2_fused::moments")
def _(x, tf32=False):
    return _doubles(x, x.shape[1]), _doubles(x, x.shape[1], x.shape[1])


@torch.library.register_fake("mnv2_fused::channel_moments")
def _(x):
    return _doubles(x, x.shape[1]), _doubles(x, x.shape[1])


@torch.library.register_fake("mnv2_fused::channel_products")
def _(a, b, center, gate):
    return _doubles(a, 2, a.shape[1])


@torch.library.register_fake("mnv2_fused::batch_norm_relu6")
def _(e, scale, shift, mean, var, eps, group):
    statistics = [_doubles(e, e.shape[1] if mean is None else 0) for _ in range(2)]
    return torch.empty_like(e, memory_format=torch.channels_last), _doubles(e, 1), *statistics


@torch.library.register_fake("mnv2_fused::batch_norm_relu6_backward")
def _(dy, e, count, e_mean, e_var, scale, shift, *_):
    channels = (e.new_empty(e.shape[1], dtype=(e if t is None else t).dtype) for t in (scale, shift, None))
    return torch.empty_like(e, memory_format=torch.channels_last), *channels


@torch.library.register_fake("mnv2_fused::affine")
def _(a, b, coefficients, gate, relu6):
    return torch.empty_strided(a.shape, _channels_last_strides(a.shape), dtype=a.dtype, device=a.device)


@torch.library.register_fake("mnv2_fused::matrix_add_")
def _(y, x, matrix, bias, residual, tf32=False):
    return None


@torch.library.register_fake("mnv2_fused::filter_moments")
def _(x, expand_weight, expand_bias, depthwise_weight, stride, dilation, padding, tf32=False):
    return _doubles(x, depthwise_weight.shape[0]), _doubles(x, depthwise_weight.shape[0])


@torch.library.register_fake("mnv2_fused::block_gradients")
def _(
    dz, x, expand_weight, expand_bias, depthwise_weight, project_weight, coefficients,
    stride, dilation, padding, wanted, tf32=False,
):  # fmt: skip
    hidden = depthwise_weight.shape[0]
    dx = x.new_empty(0)
    if wanted & WANT_X:
        dx = torch.empty_strided(x.shape, _channels_last_strides(x.shape), dtype=x.dtype, device=x.device)
    rows = ((WANT_EXPAND, x.shape[1]), (WANT_DEPTHWISE, 9), (WANT_PROJECT, project_weight.shape[0]))
    expand, depthwise, project = (_doubles(x, size if wanted & bit else 0, hidden) for bit, size in rows)
    if expand_weight is None:
        expand = _doubles(x, 0, hidden)
    return dx, expand, depthwise, project, _doubles(x, 4, hidden)


torch.library.register_autograd("mnv2_fused::block_gradients", _no_second_derivative)


@register_flop_formula(_OPS.block_gradients, get_raw=True)
def _(dz, x, we, be, wd, wp, coefficients, stride, dilation, padding, wanted, tf32=False, out_val=None, **_) -> int:
    """Of the gradients; what is computed anew on the way is not counted, as that of a checkpoint is not."""
    batch, channels, height, width = x.shape
    pixels, out_pixels = batch * height * width, batch * dz.shape[2] * dz.shape[3]
    hidden = wd.shape[0]
    expand = 0 if we is None else pixels * channels * hidden
    project, depthwise = out_pixels * hidden * wp.shape[0], out_pixels * hidden * 9
    below = bool(wanted & (WANT_X | WANT_EXPAND))
    macs = expand * (bool(wanted & WANT_X) + bool(wanted & WANT_EXPAND)) + project * bool(wanted & WANT_PROJECT)
    back = project * (wanted & ~WANT_SUMS != WANT_PROJECT)
    return 2 * (macs + back + depthwise * (below + bool(wanted & WANT_DEPTHWISE)))


# ------------------------------------------------------------------------------------------------- packed networks


class Layer(NamedTuple):
    """A layer of a plan; fields and kinds as in csrc/inverted_residual.h. A plan is a text: what runs it, and the
    integers of each layer, one after the other."""

    kind: int
    in_channels: int
    hidden_channels: int
    out_channels: int
    stride: int = 1
    dilation: int = 1
    pad_left: int = 0
    pad_right: int = 0
    pad_top: int = 0
    pad_bottom: int = 0
    expand: int = 0
    residual: int = 0
    relu6: int = 0


CONV3X3, BLOCK, POINTWISE, POOL, LINEAR = range(5)


def output_size(layer: Layer, height: int, width: int) -> tuple[int, int]:
    if layer.kind in (CONV3X3, BLOCK):
        reach = 2 * layer.dilation + 1
        height = (height + layer.pad_top + layer.pad_bottom - reach) // layer.stride + 1
        width = (width + layer.pad_left + layer.pad_right - reach) // layer.stride + 1
    return (1, 1) if layer.kind == POOL else (height, width)


# What a plan for CUDA begins with, or tf32: csrc/cuda/ops.cpp.
_CUDA_TYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def make_plan(layers: list[Layer], dtype: torch.dtype, device: str = "cpu", tf32: bool = False) -> str:
    """The plan that runs `layers` on the kernel selected for `dtype` now. ValueError where there is none."""
    if device == "cuda":
        if dtype not in _CUDA_TYPES:
            raise ValueError(f"there are CUDA kernels for float16, bfloat16 and float32, not for {dtype}")
        return join_plan("tf32" if tf32 else _CUDA_TYPES[dtype], layers)
    return join_plan(selected_kernel(dtype), layers)


def join_plan(runs: str, layers: list[Layer]) -> str:
    return " ".join([runs, *(str(int(n)) for layer in layers for n in layer)])


def layers_of(plan: str) -> list[Layer]:
    fields, integers = len(Layer._fields), [int(n) for n in plan.split()[1:]]
    return [Layer(*integers[at : at + fields]) for at in range(0, len(integers), fields)]


def multiply_adds(layer: Layer, height: int, width: int) -> int:
    """Of one image, from the size of the layer's input."""
    out_height, out_width = output_size(layer, height, width)
    if layer.kind == BLOCK:
        expand = height * width * layer.in_channels * layer.hidden_channels * layer.expand
        return expand + out_height * out_width * layer.hidden_channels * (9 + layer.out_channels)
    if layer.kind == POOL:
        return 0
    return out_height * out_width * layer.in_channels * layer.out_channels * (9 if layer.kind == CONV3X3 else 1)


def _walk(x: Tensor, layers: list[Layer]) -> tuple[list[int], int]:
    """The result's shape, and the multiply-adds on the way."""
    batch, _, height, width = x.shape
    macs, shape = 0, []
    for layer in layers:
        macs += multiply_adds(layer, height, width)
        height, width = output_size(layer, height, width)
        flat = layer.kind in (POOL, LINEAR)
        shape = [batch, layer.out_channels] if flat else [batch, layer.out_channels, height, width]
    return shape, batch * macs


@torch.library.register_fake("mnv2_fused::pack")
def _(weights, plan):
    size = torch.library.get_ctx().new_dynamic_size()  # the kernel's padding is known to C++ alone
    return weights.new_empty(size, dtype=torch.float64 if weights.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("mnv2_fused::network")
def _(x, packed, plan):
    shape, _ = _walk(x, layers_of(plan))
    strides = [shape[1], 1] if len(shape) == 2 else _channels_last_strides(shape)
    halves = plan.split(" ", 1)[0] in [row.name for row in kernels() if row.dtype == torch.bfloat16]
    return torch.empty_strided(shape, strides, dtype=torch.bfloat16 if halves else x.dtype, device=x.device)


@torch.library.register_fake("mnv2_fused::network_seconds")
def _(x, packed, plan):
    return _doubles(x, len(layers_of(plan)))


@register_flop_formula(_OPS.network, get_raw=True)
def _(x, packed, plan, out_val=None, **_) -> int:
    return 2 * _walk(x, layers_of(plan))[1]


# -------------------------------------------------------------------------------------------------- the kernel table


class Kernel(NamedTuple):
    """A row of the kernel table: one ISA and dtype."""

    name: str
    dtype: torch.dtype
    requires: tuple[str, ...]  # CPU features
    supported: bool  # by this CPU
    reason: str  # why not, "" when supported


def kernels() -> list[Kernel]:
    """All rows of the kernel table, best first. MNV2_FUSED_KERNEL=<name> forces one."""
    return [Kernel(name, getattr(torch, dtype), *rest) for name, dtype, *rest in _C.kernels()]


def selected_kernel(dtype: torch.dtype = torch.float32) -> str:
    """The row that would serve tensors of `dtype` now; ValueError when MNV2_FUSED_KERNEL is impossible."""
    return _C.select(str(dtype).removeprefix("torch."))


def empty_cache() -> int:
    """Gives back the memory that the ops keep on the CPU from call to call, as torch.cuda.empty_cache does on a GPU.

    Results of 1 MiB or more live in memory that is used again when they are gone, at most half as much again as was in
    use at once: after training, call this. The rest is a few MB that the kernels work in. Packed weights of the last
    few networks that ran compiled or exported go too. Returns the bytes given back, without those of the latter.
    """
    packed_chains.clear()
    return _C.empty_cache()


packed_chains: OrderedDict[tuple[object, ...], object] = OrderedDict()  # of network.chain


@functools.cache
def no_cuda(device: int | None = None) -> str:
    """Why our kernels do not run on a CUDA device, "" where they do; without one, why there are none in this build."""
    if reason := _C.build_report()["no_cuda"]:
        return f"mnv2_fused was built without CUDA: {reason}"
    if device is None or not (error := _C.cuda_error(device)):
        return ""
    return f"mnv2_fused was built for sm_{_C.build_report()['cuda'].replace(';', ', sm_')}, the device says: {error}"


def why_no_cuda() -> str:
    """Why CUDA tensors cannot be computed on here, "" where they can be."""
    if reason := no_cuda():
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without"
    return no_cuda(torch.cuda.current_device()) if torch.cuda.is_available() else "torch finds no usable GPU"
