"""From a chain of modules to one op call: what is recognised, folding the BatchNorms, noticing every change.

The modules stay what they are; a `FusedChain` beside them holds their folded, packed weights and repacks when
anything that the weights depend on has changed.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, get_autocast_dtype, is_autocast_enabled, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.nn.modules import module as _module
from torch.utils.hooks import RemovableHandle

from . import _C, ops
from .ops import Layer

_REQUIRES_GRAD = attrgetter("requires_grad")
_NETWORK = torch.ops.mnv2_fused.network.default
_NETWORK_SECONDS = torch.ops.mnv2_fused.network_seconds.default


class Unfusable(Exception):
    """Why a chain of modules cannot run as one op."""


class Conv2dSame(nn.Conv2d):
    """nn.Conv2d with TensorFlow's SAME padding: ceil(n / stride) outputs, where the padding is odd one more after.

    On sizes that the stride divides it pads less before than PyTorch's models do (0 and 1 around a 3x3 of stride 2).
    The argument `padding` is not used.
    """

    def pad(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = map(same_padding, x.shape[2:], self.kernel_size, self.stride, self.dilation)
        return nn.functional.pad(x, (left, right, top, bottom))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(self.pad(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """Before and after."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel_size - 1) + 1 - size, 0)
    return total // 2, total - total // 2


Weights = tuple[
    tuple[nn.Module, nn.BatchNorm2d | None], ...
]  # of each convolution, or linear layer, with its BatchNorm


class Stage(NamedTuple):
    """A layer of the network with the modules that it stands for.

    Where `same` the layer's padding depends on the image: see `Stage.at`.
    """

    layer: Layer
    weights: Weights
    same: bool = False

    def at(self, height: int, width: int) -> Layer:
        """The layer for an input of this size."""
        if not self.same:
            return self.layer
        stride, dilation = self.layer.stride, self.layer.dilation
        (top, bottom), (left, right) = (same_padding(size, 3, stride, dilation) for size in (height, width))
        return self.layer._replace(pad_left=left, pad_right=right, pad_top=top, pad_bottom=bottom)


def expect(condition: bool, reason: str, *about: object) -> None:
    """Unfusable with the reason, formatted with what it is about only then: a module's repr takes 10 us."""
    if not condition:
        raise Unfusable(reason.format(*about) if about else reason)


_ALIKE = {nn.SyncBatchNorm: nn.BatchNorm2d, Conv2dSame: nn.Conv2d}


def _children(module: nn.Module, *types: type) -> list[nn.Module]:
    """The children of a Sequential, which must be of exactly these types."""
    children = list(module._modules.values())
    found = [type(child) for child in children]
    alike = [_ALIKE.get(kind, kind) for kind in found]
    expect(type(module) is nn.Sequential and alike == list(types), f"{found} where {list(types)} was expected")
    return children


def _conv(module: nn.Module, kernel_size: int, *, depthwise: bool = False) -> nn.Conv2d:
    groups = module.in_channels if depthwise else 1
    fits = module.kernel_size == (kernel_size,) * 2 and module.groups == groups and module.padding_mode == "zeros"
    fits = fits and (not depthwise or module.out_channels == module.in_channels)
    expect(fits and not isinstance(module.padding, str), "a convolution of another kind: {}", module)
    if kernel_size == 1:
        expect(module.stride == (1, 1) and module.padding == (0, 0), "a 1x1 convolution of another kind: {}", module)
    return module


def _geometry(conv: nn.Conv2d) -> dict[str, int]:
    (stride, stride_x), (dilation, dilation_x) = conv.stride, conv.dilation
    expect(stride == stride_x and stride in (1, 2) and dilation == dilation_x, "stride or dilation of {}", conv)
    y, x = conv.dilation if type(conv) is Conv2dSame else conv.padding
    return dict(stride=stride, dilation=dilation, pad_left=x, pad_right=x, pad_top=y, pad_bottom=y)


def conv_bn_relu6(module: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv, bn, _ = _children(module, nn.Conv2d, nn.BatchNorm2d, nn.ReLU6)
    return _pair(conv, bn)


def _pair(conv: nn.Module, bn: nn.Module) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    expect(bn.num_features == conv.out_channels, "a BatchNorm of another width than its convolution: {}", bn)
    return conv, bn


def stem(module: nn.Module) -> Stage:
    conv, bn = conv_bn_relu6(module)
    _conv(conv, 3)
    expect(conv.dilation == (1, 1), "a dilated stem: {}", conv)
    layer = Layer(ops.CONV3X3, conv.in_channels, 0, conv.out_channels, **_geometry(conv), relu6=1)
    return Stage(layer, ((conv, bn),), type(conv) is Conv2dSame)


def pointwise(module: nn.Module) -> Stage:
    conv, bn = conv_bn_relu6(module)
    _conv(conv, 1)
    return Stage(Layer(ops.POINTWISE, conv.in_channels, 0, conv.out_channels, relu6=1), ((conv, bn),))


def block(module: nn.Module, residual: bool) -> Stage:
    """An inverted residual: [conv_bn_relu6 1x1], conv_bn_relu6 depthwise 3x3, conv 1x1, [BatchNorm], [ReLU6]."""
    kinds = [_ALIKE.get(type(child), type(child)) for child in module._modules.values()]
    relu6 = kinds[-1:] == [nn.ReLU6]
    norm = nn.BatchNorm2d in kinds
    expand = len(kinds) > 2 and kinds[1] is nn.Sequential
    types = (nn.Sequential,) * (1 + expand) + (nn.Conv2d,) + (nn.BatchNorm2d,) * norm + (nn.ReLU6,) * relu6
    children = _children(module, *types)
    inner, (project, *project_bn) = children[: 1 + expand], children[1 + expand : len(children) - relu6]
    weights = [*map(conv_bn_relu6, inner), _pair(project, *project_bn) if norm else (project, None)]
    expect(not (relu6 and residual), "a ReLU6 before the shortcut")
    if expand:
        _conv(weights[0][0], 1)
    depthwise = _conv(weights[-2][0], 3, depthwise=True)
    _conv(project, 1)
    in_channels = weights[0][0].in_channels
    geometry = _geometry(depthwise)
    same = type(depthwise) is Conv2dSame
    kept = same or geometry["pad_left"] == geometry["pad_top"] == geometry["dilation"]
    kept = kept and geometry["stride"] == 1
    expect(not residual or (kept and in_channels == project.out_channels), "a residual of another shape than x")
    layer = Layer(
        ops.BLOCK, in_channels, depthwise.out_channels, project.out_channels, **geometry,
        expand=int(expand), residual=int(residual), relu6=int(relu6),
    )  # fmt: skip
    return Stage(layer, tuple(weights), same)


def convolution(module: nn.Module) -> list[Stage]:
    """A stem or a head."""
    conv, _ = conv_bn_relu6(module)
    return [stem(module) if conv.kernel_size == (3, 3) else pointwise(module)]


def pool(channels: int) -> Stage:
    return Stage(Layer(ops.POOL, channels, 0, channels), ())


def classifier(module: nn.Module) -> Stage:
    """Dropout and a linear layer, in any number of Sequentials, or the linear layer alone."""
    leaves = [m for m in module.modules() if type(m) is not nn.Sequential]
    kinds = [type(m) for m in leaves if type(m) not in (nn.Dropout, nn.Identity)]
    expect(kinds == [nn.Linear] and type(leaves[-1]) is nn.Linear, "a classifier of another kind: {}", module)
    module = leaves[-1]
    return Stage(Layer(ops.LINEAR, module.in_features, 0, module.out_features), ((module, None),))


def _parts_of(module: nn.Module, bn: nn.BatchNorm2d | None) -> tuple[list[Tensor | None], float]:
    """Weight and bias, then of the BatchNorm mean, variance, scale, shift and number of batches; and its eps."""
    if bn is None:
        return [module.weight, module.bias, None, None, None, None, None], 0.0
    expect(bn.running_mean is not None, "a BatchNorm without running statistics")
    statistics = [bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.num_batches_tracked]
    return [module.weight, module.bias, *statistics], bn.eps


_PARTS = 7


def _fold(module: nn.Module, bn: nn.BatchNorm2d | None) -> Iterator[Tensor]:
    """Weight and bias with the BatchNorm's running statistics folded in, computed in float64, flat."""
    tensors, eps = _parts_of(module, bn)
    return _folded(*(None if t is None else t.detach() for t in tensors), eps)


def _folded(
    weight: Tensor, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, _: Tensor | None, eps: float,
) -> Iterator[Tensor]:  # fmt: skip
    weight = weight.double()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.double()
    if mean is not None:
        factor = (var.double() + eps).rsqrt()
        factor = factor if scale is None else factor * scale.double()
        weight = weight * factor.view(-1, 1, 1, 1)
        bias = (bias - mean.double()) * factor
        bias = bias if shift is None else bias + shift.double()
    yield weight.flatten()
    yield bias


class Arithmetic(NamedTuple):
    """What a call computes in: the dtype of x, or where autocast is at work that which it asks for."""

    device: str
    dtype: torch.dtype
    autocast: bool
    tf32: bool


def arithmetic(x: Tensor) -> Arithmetic:
    device = ops.device_type(x)
    autocast = x.dtype in ops.DTYPES[device] and x.dtype != torch.float64 and is_autocast_enabled(device)
    dtype = get_autocast_dtype(device) if autocast else x.dtype
    return Arithmetic(device, dtype, autocast, ops.uses_tf32(x) and dtype == torch.float32)


class _Packing:
    """Packed weights (or the reason why there are none), and from what they were made."""

    def __init__(
        self,
        root: nn.Module,
        parts: tuple[str, ...],
        describe: Callable[[nn.Module], list[Stage]],
        steering: Callable[[nn.Module], list[dict]] | None,
        asked: Arithmetic,
    ) -> None:
        self.arithmetic = asked
        tops = [getattr(root, part) for part in parts] if parts else root.children()
        modules = [m for top in tops if top is not None for m in top.modules()]
        plain = (nn.Sequential, nn.ReLU6)  # no attribute of these matters but a forward of their own
        dicts = [root.__dict__, root._modules, *(steering(root) if steering else ())]
        dicts += [table for m in modules for table in (m._modules, m._parameters, m._buffers) if table]
        dicts += [m.__dict__ for m in modules if type(m) not in plain]  # stride, eps, training
        sized = [m.__dict__ for m in modules if type(m) in plain]
        self._hooks = [table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._handles = RemovableHandle.next_id
        self._hooked = any(self._hooks)
        parameters = [t for m in modules for t in m._parameters.values() if t is not None]
        # With num_batches_tracked: a BatchNorm in training mode changes its running statistics without counting a
        # version of them, but one of its counter.
        buffers = [t for m in modules for t in m._buffers.values() if t is not None]
        self._tensors = parameters + buffers
        self._kernel = os.environ.get("MNV2_FUSED_KERNEL")
        self._watch = _C.Watch(dicts, sized, parameters, buffers)
        self.call = self._watch.call
        # What is compared by identity or by address stays alive: no other object may come to stand in its place.
        values = [value for table in dicts for value in table.values()]
        self._held = (dicts, sized, values, [t.detach() for t in parameters])
        self.packed, self.plan, self.reason, self.adds_input = None, "", "", False
        self._plans: dict[tuple[int, int], str] = {}  # by the size of the image, where the padding depends on it
        try:
            switched = [m for m in modules if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.Dropout))]
            expect(not any(m.training for m in switched), "a BatchNorm or Dropout is in training mode")
            expect(not self._hooked, "a module inside has forward hooks")
            expect(not any("forward" in m.__dict__ for m in modules), "a module inside has a forward of its own")
            stages = describe(root)
            self._check_dtypes()
            self.adds_input, self.in_channels = bool(stages[0].layer.residual), stages[0].layer.in_channels
            device, dtype, _, tf32 = asked
            self.plan = ops.make_plan([stage.layer for stage in stages], dtype, device, tf32)
            self._stages, self._same = stages, any(stage.same for stage in stages)
            self._image = stages[0].layer.kind == ops.CONV3X3
            weights = torch.cat([t for stage in stages for pair in stage.weights for t in _fold(*pair)])
            packed_from = dtype if dtype == torch.float64 else torch.float32  # others are rounded while they are packed
            self.packed = torch.ops.mnv2_fused.pack(weights.to(packed_from), self.plan)
            if self.packed.is_cuda:  # whatever stream the next call is on
                self.stream = torch.cuda.current_stream(self.packed.device)
                self.stream.synchronize()
        except Unfusable as refusal:
            self.reason = str(refusal)

    def _check_dtypes(self) -> None:
        kinds = {(t.dtype, t.device) for t in self._tensors if t.is_floating_point()}
        expect(len(kinds) == 1, f"its tensors are of several dtypes or devices: {kinds}")
        ((dtype, device),) = kinds
        kind = ops.device_type(self._tensors[0])
        expect(kind == self.arithmetic.device, f"its tensors are on {device}, the input on {self.arithmetic.device}")
        asked = self.arithmetic
        for needed in (dtype, asked.dtype):
            expect(needed in ops.DTYPES[kind], f"no kernel for {needed} on {device}")
        same = asked.dtype == dtype or (asked.autocast and dtype != torch.float64)  # which autocast leaves alone
        expect(same, f"the input is {asked.dtype}, the weights are {dtype}")

    def plan_for(self, x: Tensor) -> str:
        if not self._same:
            return self.plan
        height, width = size = tuple(x.shape[2:])
        if size not in self._plans:
            layers = []
            for stage in self._stages:
                layers.append(stage.at(height, width))
                height, width = ops.output_size(layers[-1], height, width)
            while len(self._plans) >= 64:
                self._plans.pop(next(iter(self._plans)), None)  # another thread may have been here first
            self._plans[size] = ops.join_plan(self.plan.split()[0], layers)
        return self._plans[size]

    def takes(self, x: Tensor) -> bool:
        """Whether the op takes x as it is; else it is converted."""
        asked = self.arithmetic
        rounds = self._image and asked.device == "cpu" and asked.dtype == torch.bfloat16 and x.dtype == torch.float32
        return rounds or x.dtype == asked.dtype

    def remember(self, root: nn.Module, x: Tensor) -> None:
        """Of a call that can use the weights: `call(root, x)` answers others like it in one step."""
        if self.arithmetic.device == "cpu" and self.takes(x):
            self._watch.remember(
                root, x, self._handles, self._kernel, self.arithmetic.autocast, not self._same,
                _NETWORK, self.packed, self.plan_for(x), _len_torch_dispatch_stack() > 0,
            )  # fmt: skip

    def current(self, asked: Arithmetic) -> bool:
        """Whether nothing that the packed weights depend on has changed."""
        if asked != self.arithmetic:
            return False
        handles = RemovableHandle.next_id
        if self._hooked or self._handles != handles:  # else no hook was registered anywhere since
            if any(self._hooks) != self._hooked:
                return False
            self._handles = handles
        return self._kernel == os.environ.get("MNV2_FUSED_KERNEL") and self._watch.unchanged()


class FusedChain:
    """One op call for a chain of modules. Its packed weights follow every change of the modules.

    A write through `tensor.data` or a NumPy view is no change that PyTorch counts: call `forget()` after it. Copies and
    pickles come without the packed weights.

    Args:
        parts: the children of the root that the chain runs through, by name; () are all.
        describe: root -> stages; raises Unfusable. A function of a module, where the chain is to be pickled.
        steering: dictionaries beside those of the modules on which the stages depend.
    """

    def __init__(
        self,
        parts: tuple[str, ...],
        describe: Callable[[nn.Module], list[Stage]],
        steering: Callable[[nn.Module], list[dict]] | None = None,
    ) -> None:
        self._parts, self._describe, self._steering = parts, describe, steering
        self._lock = threading.Lock()
        self._packing: _Packing | None = None
        self._captured: list[Tensor] = []  # what CUDA graphs read

    def __reduce__(self) -> tuple[object, ...]:
        return FusedChain, (self._parts, self._describe, self._steering)

    def forget(self) -> None:
        """Packs anew at the next call."""
        self._packing = None
        ops.packed_chains.clear()

    def why_not(self, root: nn.Module, x: Tensor) -> str:
        """Why a call of `root` with x would not run fused now; "" when it would."""
        return self._prepare(root, x)[0]

    def __call__(self, root: nn.Module, x: Tensor) -> Tensor | None:
        """The result of the chain, or None where it cannot run fused."""
        if is_compiling():
            return self._compiled(root, x)
        if (packing := self._packing) is not None:
            y = packing.call(root, x)
            if y is not None:
                return y
        reason, packing = self._prepare(root, x)
        if reason:
            return None
        packing.remember(root, x)
        x = x if packing.takes(x) else x.to(packing.arithmetic.dtype)
        if x.is_cuda:
            self._hold(packing)
        return _NETWORK(x, packing.packed, packing.plan_for(x))

    def _compiled(self, root: nn.Module, x: Tensor) -> Tensor | None:
        """What torch.compile and torch.export see: one op of the weights as they are, which packs them where it runs.

        torch.export asks for gradients unless it is told otherwise; what it makes of a network in eval mode has none.
        """
        try:
            expect(not is_grad_enabled() or is_exporting(), "gradients are asked for")
            reason = why_no_op(x, exported=True)
            expect(not reason, reason)
            stages = self._describe(root)
            inside = [getattr(root, part) for part in self._parts] if self._parts else list(root.children())
            check_inside([module for module in inside if module is not None], x, trains=False)
            first = stages[0].layer
            expect(x.shape[1] == first.in_channels, "the input has other channels")
            dtype = arithmetic(x).dtype
            expect(not first.residual or dtype == x.dtype, "the sum that autocast makes")
            pairs = [_parts_of(*pair) for stage in stages for pair in stage.weights]
        except Unfusable:
            return None
        layers = " ".join([str(int(n)) for stage in stages for n in (*stage.layer, stage.same)])
        x = x if x.dtype == dtype else x.to(dtype)
        return chain(x, [t for tensors, _ in pairs for t in tensors], [eps for _, eps in pairs], layers)

    def seconds(self, root: nn.Module, x: Tensor) -> list[tuple[Layer, int, float]]:
        """One call of the chain: its layers, their multiply-adds for x and the seconds that the first thread takes.

        Where layers are computed as one, the seconds stand with the last of them, and the others have 0.

        Raises:
            RuntimeError: the chain cannot run fused, or not on the CPU.
        """
        reason, packing = self._prepare(root, x)
        reason = reason or ("" if x.device.type == "cpu" else "times by layer are of the CPU alone")
        if reason:
            raise RuntimeError(f"no times by layer: {reason}")
        x = x if packing.takes(x) else x.to(packing.arithmetic.dtype)
        plan = packing.plan_for(x)
        found = _NETWORK_SECONDS(x, packing.packed, plan).tolist()
        batch, _, height, width = x.shape
        result = []
        for layer, seconds in zip(ops.layers_of(plan), found, strict=True):
            result.append((layer, batch * ops.multiply_adds(layer, height, width), seconds))
            height, width = ops.output_size(layer, height, width)
        return result

    def _hold(self, packing: _Packing) -> None:
        """Packed weights are not freed under a call on another stream, nor under a graph that will read them."""
        stream = torch.cuda.current_stream(packing.packed.device)
        if stream != packing.stream:
            packing.packed.record_stream(stream)
        if torch.cuda.is_current_stream_capturing() and all(packing.packed is not held for held in self._captured):
            self._captured.append(packing.packed)

    def _prepare(self, root: nn.Module, x: Tensor) -> tuple[str, _Packing | None]:
        # Replicas share this object with their original, and their parameters are no Parameters.
        if "_is_replica" in root.__dict__:
            return "a replica of nn.DataParallel", None
        if reason := why_no_op(x):
            return reason, None
        if is_grad_enabled():
            if any(map(_REQUIRES_GRAD, root.parameters())):
                self.forget()  # what follows is training, and fused optimizers count no versions
                return "gradients are asked for", None
            if x.requires_grad:
                return "gradients are asked for", None
        packing, asked = self._packing, arithmetic(x)
        if packing is None or not packing.current(asked):
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "call the model once before a CUDA graph of it is captured: its weights are not packed"
                )
            with self._lock, torch.no_grad():
                packing = self._packing  # another thread may have been here first
                if packing is None or not packing.current(asked):
                    packing = self._packing = _Packing(root, self._parts, self._describe, self._steering, asked)
        if packing.reason:
            return packing.reason, None
        if asked.device == "cuda" and x.device != packing.packed.device:
            return f"the input is on {x.device}, the weights are on {packing.packed.device}", None
        if packing.adds_input and asked.dtype != x.dtype:
            return f"the input is {x.dtype}, and so is the sum that autocast makes", None
        if x.shape[1] != packing.in_channels:
            return f"the input has {x.shape[1]} channels, not {packing.in_channels}", None
        if global_hooks():
            return "there are global forward hooks", None
        return "", packing


def why_no_op(x: Tensor, exported: bool = False) -> str:
    """Why no call with x can run on our kernels now; "" when it can.

    The compiler traces this too, and calls the ops like any other. What torch.export makes has ops of ours where they
    are `exported`: not those of training, and none on the way to ONNX, where nobody knows them.
    """
    if is_exporting() and not (exported and not torch.onnx.is_in_onnx_export()):
        return "the model is being exported"
    if not is_compiling() and _is_tracing():
        return "the model is being traced"
    if _disabled():
        return "MNV2_FUSED_DISABLE is set"
    plain = is_compiling() or (type(x) in (Tensor, nn.Parameter) and 0 not in x.shape[1:])
    if not plain or x.dim() != 4 or ops.device_type(x) not in ops.DTYPES:
        return "the input is no plain tensor [N, C, H, W] with pixels on the CPU or a CUDA device"
    if x.is_cuda and (reason := ops.no_cuda(x.device.index)):
        return reason
    if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a function transform or forward-mode derivatives are at work"
    return ""


@torch.compiler.assume_constant_result
def _disabled() -> bool:
    return os.environ.get("MNV2_FUSED_DISABLE", "0") not in ("", "0")


def global_hooks() -> bool:
    return bool(_module._global_forward_hooks or _module._global_forward_pre_hooks)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module itself, its children aside, does more than its type says."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in HOOKS)


def check_inside(inside: Iterable[nn.Module], x: Tensor, trains: bool = True) -> None:
    """Unfusable where the modules inside do more, or other things, than their types say; or in training mode."""
    backward_hooks = _module._global_backward_hooks or _module._global_backward_pre_hooks
    expect(not global_hooks() and not backward_hooks, "there are global hooks")
    device, dtype, autocast, _ = arithmetic(x)
    expect(dtype in ops.DTYPES[device], f"no kernel for {dtype} on {x.device}")
    for module in itertools.chain.from_iterable(part.modules() for part in inside):
        expect(not has_hooks(module), "a module inside has hooks or a forward of its own")
        switched = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.Dropout))
        expect(trains or not switched or not module.training, "a BatchNorm or Dropout is in training mode")
        # As in torch: a BatchNorm may be float32 beside 16-bit numbers, and under autocast all may.
        single = dtype in ops.HALVES and (autocast or not isinstance(module, nn.Conv2d))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                same = tensor.dtype == dtype or (single and tensor.dtype == torch.float32)
                same = same and tensor.device == x.device
                expect(same, "a tensor inside is {0.dtype} on {0.device}, x is {1.dtype} on {1.device}", tensor, x)


# ------------------------------------------------------------------------------------------------- compiled, exported


@functools.cache
def _stages_of(layers: str) -> list[Stage]:
    fields, integers = 1 + len(Layer._fields), [int(n) for n in layers.split()]
    return [
        Stage(Layer(*integers[at : at + fields - 1]), (), bool(integers[at + fields - 1]))
        for at in range(0, len(integers), fields)
    ]


@functools.lru_cache(256)
def _plan_of(layers: str, height: int, width: int, dtype: torch.dtype, device: str, tf32: bool, _: str | None) -> str:
    """The last argument is the kernel that the environment asks for."""
    sized = []
    for stage in _stages_of(layers):
        sized.append(stage.at(height, width))
        height, width = ops.output_size(sized[-1], height, width)
    return ops.make_plan(sized, dtype, device, tf32)


class _Packed(NamedTuple):
    tensors: list[Tensor | None]  # alive, so that no others come to stand in their place
    versions: list[int]
    packed: Tensor

    def is_of(self, tensors: list[Tensor | None]) -> bool:
        """Whether these are the tensors as they were, or small ones of the same numbers: AOTInductor copies those."""
        if self.versions != _versions(self.tensors):
            return False
        pairs = zip(self.tensors, tensors, strict=True)
        return all(
            a is b or (a is not None and b is not None and b.numel() < _SMALL and torch.equal(a, b)) for a, b in pairs
        )


_packed_lock = threading.Lock()
MAX_PACKED = 8  # networks, or parts of them, whose packed weights `chain` keeps
_SMALL = 64


def _versions(tensors: list[Tensor | None]) -> list[int]:
    try:
        return [0 if t is None else t._version for t in tensors]
    except RuntimeError:  # inference tensors, which count none: never the same
        return []


@torch.library.custom_op("mnv2_fused::chain", mutates_args=())
def chain(x: Tensor, tensors: list[Tensor | None], eps: list[float], layers: str) -> Tensor:
    """A chain of layers in eval mode: `network` of weights as the modules have them, packed at the first call.

    Args:
        x: [N, C, H, W] in what is to be computed in.
        tensors: of every convolution and linear layer weight, bias, and of its BatchNorm mean, variance, scale, shift
            and number of batches, which PyTorch counts where it counts no version of the statistics.
        eps: of every BatchNorm.
        layers: the integers of each Layer and whether its padding is SAME.
    """
    device, tf32 = ops.device_type(x), ops.uses_tf32(x)
    plan = _plan_of(layers, *x.shape[2:], x.dtype, device, tf32, os.environ.get("MNV2_FUSED_KERNEL"))
    large = tuple(id(t) for t in tensors if t is not None and t.numel() >= _SMALL)
    key = (plan.partition(" ")[0], x.device, layers, tuple(eps), large)
    with _packed_lock:
        found = ops.packed_chains.get(key)
        if found is None or not found.versions or not found.is_of(tensors):
            parts = [t for at, e in enumerate(eps) for t in _folded(*tensors[_PARTS * at : _PARTS * (at + 1)], e)]
            weights = torch.cat(parts).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
            found = _Packed(list(tensors), _versions(tensors), torch.ops.mnv2_fused.pack(weights, plan))
            ops.packed_chains[key] = found
            while len(ops.packed_chains) > MAX_PACKED:
                ops.packed_chains.popitem(last=False)
        ops.packed_chains.move_to_end(key)
    return _NETWORK(x, found.packed, plan)


@chain.register_fake
def _(x, tensors, eps, layers):
    batch, _, height, width = x.shape
    for layer, _, same in _stages_of(layers):
        # The padding itself would ask whether a symbolic size is even.
        ceil = -(-height // layer.stride), -(-width // layer.stride)
        height, width = ceil if same else ops.output_size(layer, height, width)
    flat = layer.kind in (ops.POOL, ops.LINEAR)
    shape = [batch, layer.out_channels] if flat else [batch, layer.out_channels, height, width]
    strides = [shape[1], 1] if flat else ops._channels_last_strides(shape)
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)


def _no_gradients(ctx: object, *_: Tensor) -> None:
    raise RuntimeError(
        "mnv2_fused::chain, as which a network in eval mode is exported, has no gradients: export it in training mode, "
        "or unfused"
    )


chain.register_autograd(_no_gradients)
