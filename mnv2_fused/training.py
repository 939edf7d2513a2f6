"""Training with batch statistics: a block as one op that keeps its input and its projection, nothing in between.

With W the expansion, m and C the mean and the covariance of x, the statistics of e = W x are W m and diag(W C W^T):
they need no pass over e, and e's BatchNorm goes into W. Those of d, the filtered h, take a pass of the kernel
(`filter_moments`); then the block runs as at inference, up to its projection z. Backward recomputes h and d twice:
once for the sums that the gradient of d's BatchNorm needs and the gradient of the projection, once for everything
below. The gradient through e's BatchNorm closes again: with G the sum of ge x^T over the pixels and g that of ge,
everything follows from G, g, m and C. (Ioffe and Szegedy 2015 for the BatchNorm; the kernels are in
csrc/cpu/training-inl.h.)

Everything per channel is computed in float64: it costs nothing beside the pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import _verify_batch_size

from . import network
from .network import expect
from .ops import (
    WANT_DEPTHWISE,
    WANT_EXPAND,
    WANT_PROJECT,
    WANT_X,
    _channels_last_strides,
    _no_second_derivative,
    _output_shape,
)  # fmt: skip

_OPS = torch.ops.mnv2_fused


class Stage(NamedTuple):
    """A convolution and its BatchNorm, as the ops take them."""

    weight: Tensor | None  # None: there is no expansion
    bias: Tensor | None
    scale: Tensor | None  # the BatchNorm's weight and bias; None: it is not affine
    shift: Tensor | None
    mean: Tensor | None  # its running statistics where it is frozen; None: those of the batch are taken
    var: Tensor | None
    eps: float


_FIELDS = len(Stage._fields)
_NAMES = ("expand", "depthwise", "project")
_STAGES = ", ".join(
    ", ".join(f"Tensor? {name}_{field}" for field in Stage._fields[:-1]) + f", float {name}_eps" for name in _NAMES
)
_OPTIONS = "int stride, int dilation, int[] padding, bool residual"
_STATISTICS = ("x_mean", "x_products", "e_mean", "e_var", "d_mean", "d_var", "z_mean", "z_var")


def _split(values: tuple) -> tuple[Stage, Stage, Stage]:
    return tuple(Stage(*values[i : i + _FIELDS]) for i in range(0, 3 * _FIELDS, _FIELDS))


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Values per channel, to be broadcast over NCHW."""
    return values.to(like.dtype).view(1, -1, 1, 1)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Norm:
    """A BatchNorm as the affine map that it is in this call, and back through it. `mean` and `var` are the batch's."""

    def __init__(self, stage: Stage, mean: Tensor, var: Tensor, count: int) -> None:
        self.batch = stage.mean is None
        self.count = count
        bias = 0.0 if stage.bias is None else stage.bias.double()  # of the convolution: the batch's mean takes it away
        self.mean = mean if self.batch else stage.mean.double() - bias
        self.rstd = ((var.clamp(min=0) if self.batch else stage.var.double()) + stage.eps).rsqrt()
        self.scale = self.rstd if stage.scale is None else self.rstd * stage.scale.double()
        self.shift = -self.scale * self.mean
        if stage.shift is not None:
            self.shift = self.shift + stage.shift.double()

    def sums(self, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The sums of g and of g (v - mean) from a kernel's, which are about the mean as it was rounded for it."""
        return sums[0], sums[1] + sums[0] * (self.mean.to(dtype).double() - self.mean)

    def backward(self, total: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, q, r of the gradient p g + q v + r of its input v, from the sums of g and of g (v - mean)."""
        if not self.batch:
            return self.scale, torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        q = -self.scale * self.rstd.square() * product / self.count
        return self.scale, q, -self.scale * total / self.count - q * self.mean


class _Block:
    """What forward and backward of a block both begin with: the weights as the kernels take them."""

    def __init__(self, x: Tensor, stages: tuple[Stage, Stage, Stage], options: tuple) -> None:
        self.expand, self.depthwise, self.project = stages
        self.stride, self.dilation, self.padding, self.residual = options
        self.geometry = (self.stride, self.dilation, list(self.padding))
        self.x = self.centered = _dense(x)
        self.hidden, self.out_channels = self.depthwise.weight.shape[0], self.project.weight.shape[0]
        self.pair: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)

    def output_shape(self) -> list[int]:
        e, d, p = self.expand, self.depthwise, self.project
        pair = (None, None) if e.weight is None else (e.weight, e.weight.new_empty(self.hidden))
        zeros = d.weight.new_empty(self.hidden), p.weight.new_empty(self.out_channels)
        return _output_shape(self.x, *pair, d.weight, zeros[0], p.weight, zeros[1], *self.geometry, self.residual)

    def fold_expand(self, x_mean: Tensor, x_products: Tensor, e_mean: Tensor, e_var: Tensor) -> None:
        """The expansion with its BatchNorm in it. A large mean leaves x first: e would lose its last digits to it."""
        if self.expand.weight is None:
            return
        weight = self.expand.weight.double().flatten(1)
        count = self.x.numel() // self.x.shape[1]
        batch = self.expand.mean is None
        self.expand_norm = norm = _Norm(self.expand, e_mean, e_var, count)
        shift, self.center = norm.shift, None
        if batch and bool((x_mean.square() * count > 16 * x_products.diagonal()).any()):
            self.center = x_mean.to(self.x.dtype).double()
            self.centered = self.x - _column(self.center, self.x)
            shift = shift + norm.scale * (weight @ self.center)
        self.folded = norm.scale.view(-1, 1) * weight
        self.pair = self.folded.to(self.x.dtype).view_as(self.expand.weight), shift.to(self.x.dtype)


@torch.library.custom_op(
    "mnv2_fused::block_train",
    mutates_args=(),
    schema=f"(Tensor x, {_STAGES}, {_OPTIONS}) -> ({', '.join(['Tensor'] * 10)})",
)
def _block_train(x, *arguments):
    """y, z; mean and centred products of x; mean and biased variance of e, d and z (empty where a norm is frozen)."""
    block = _Block(x, _split(arguments[:-4]), arguments[-4:])
    expand, depthwise, project = block.expand, block.depthwise, block.project
    shape = block.output_shape()
    count = shape[0] * shape[2] * shape[3]
    x = block.x
    x_mean, x_products, e_mean, e_var, d_mean, d_var, z_mean, z_var = (
        x.new_empty(0, dtype=torch.float64) for _ in _STATISTICS
    )
    if expand.weight is not None and expand.mean is None:
        x_mean, x_products = _OPS.moments(x)
        weight = expand.weight.double().flatten(1)
        e_mean, e_var = weight @ x_mean, ((weight @ x_products) * weight).sum(1) / (x.numel() // x.shape[1])
    block.fold_expand(x_mean, x_products, e_mean, e_var)
    if depthwise.mean is None:
        d_mean, squares = _OPS.filter_moments(block.centered, *block.pair, depthwise.weight, *block.geometry)
        d_var = squares / count
    norm = _Norm(depthwise, d_mean, d_var, count)
    filters = (norm.scale.view(-1, 1, 1, 1) * depthwise.weight.double()).to(x.dtype)
    bias = x.new_zeros(block.out_channels) if project.bias is None else project.bias
    z = _OPS.inverted_residual(
        block.centered, *block.pair, filters, norm.shift.to(x.dtype), project.weight, bias,
        *block.geometry, False, False,
    )  # fmt: skip
    if project.mean is None:
        z_mean, squares = _OPS.channel_moments(z)
        z_var = squares / count
    norm = _Norm(project._replace(bias=None), z_mean, z_var, count)
    table = torch.stack([norm.scale, torch.ones_like(norm.scale), norm.shift]).to(x.dtype)
    y = _OPS.affine(z, x if block.residual else None, table)
    return y, z, x_mean, x_products, e_mean, e_var, d_mean, d_var, z_mean, z_var


@_block_train.register_fake
def _(x, *arguments):
    block = _Block(x, _split(arguments[:-4]), arguments[-4:])
    shape = block.output_shape()
    outputs = [torch.empty_strided(shape, _channels_last_strides(shape), dtype=x.dtype, device=x.device)] * 2
    outputs = [t.clone() for t in outputs]

    def statistic(stage: Stage, *size: int) -> Tensor:
        wanted = stage.weight is not None and stage.mean is None
        return x.new_empty(size if wanted else (0,), dtype=torch.float64)

    channels = x.shape[1]
    outputs += [statistic(block.expand, channels), statistic(block.expand, channels, channels)]
    for stage, size in zip(_split(arguments[:-4]), (block.hidden, block.hidden, block.out_channels), strict=True):
        outputs += [statistic(stage, size), statistic(stage, size)]
    return tuple(outputs)


# Gradients in the order of the arguments that have one: x, then weight, bias, scale and shift of each stage.
_GRADIENTS = 1 + 3 * 4


@torch.library.custom_op(
    "mnv2_fused::block_train_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor z, {', '.join(f'Tensor {s}' for s in _STATISTICS)}, bool[] wanted, "
    f"Tensor x, {_STAGES}, {_OPTIONS}) -> ({', '.join(['Tensor'] * _GRADIENTS)})",
)
def _block_train_backward(dy, z, *arguments):
    """The gradients that are wanted; the others are empty."""
    x_mean, x_products, e_mean, e_var, d_mean, d_var, z_mean, z_var, wanted, x, *rest = arguments
    block = _Block(x, _split(tuple(rest[:-4])), tuple(rest[-4:]))
    expand, depthwise, project = block.expand, block.depthwise, block.project
    x, dy = block.x, _dense(dy)
    count = dy.numel() // block.out_channels
    (want_x,), want_e, want_d, want_p = wanted[:1], wanted[1:5], wanted[5:9], wanted[9:]
    result: dict[str, Tensor] = {}

    # z's BatchNorm, over narrow tensors.
    norm = _Norm(project._replace(bias=None), z_mean, z_var, count)
    total, product = norm.sums(_OPS.channel_products(dy, z, norm.mean.to(x.dtype)), x.dtype)
    result["project_scale"], result["project_shift"] = norm.rstd * product, total
    result["project_bias"] = torch.zeros_like(total) if norm.batch else norm.scale * total
    dz = _OPS.affine(dy, z if norm.batch else None, torch.stack(norm.backward(total, product)).to(x.dtype))

    # The recomputed part: with batch statistics once for d's sums, once more for what is below; else once for all.
    block.fold_expand(x_mean, x_products, e_mean, e_var)
    norm = _Norm(depthwise, d_mean, d_var, count)
    below = want_x or any(want_e) or want_d[0]
    bits = WANT_X * want_x + WANT_EXPAND * (want_x or any(want_e)) + WANT_DEPTHWISE * want_d[0]

    def gradients(coefficients: tuple[Tensor, ...], bits: int) -> tuple[Tensor, ...]:
        table = torch.stack([norm.scale, norm.shift, norm.mean, *coefficients]).to(x.dtype)
        return _OPS.block_gradients(
            dz, block.centered, *block.pair, depthwise.weight, project.weight, table, *block.geometry, bits
        )

    zero = torch.zeros_like(norm.scale)
    once = not norm.batch
    first = gradients((norm.scale, zero, zero), (bits if once else 0) | WANT_PROJECT * want_p[0])
    *_, project_gradient, sums = first
    total, product = norm.sums(sums, x.dtype)
    result["depthwise_scale"], result["depthwise_shift"] = norm.rstd * product, total
    result["depthwise_bias"] = norm.scale * total if once else zero
    if want_p[0]:
        result["project_weight"] = project_gradient.t()
    if below:
        dx, expand_gradient, depthwise_gradient, _, sums = (
            first if once else gradients(norm.backward(total, product), bits)
        )
        result["depthwise_weight"] = depthwise_gradient
        if expand.weight is None:
            result["x"] = dx
        elif bits & WANT_EXPAND:
            _expand_backward(block, x_mean, x_products, dx, dy, expand_gradient, sums[2], want_x, result)
        if want_x and block.residual and (expand.weight is None or not block.expand_norm.batch):
            result["x"] += dy

    names = ["x"] + [f"{stage}_{field}" for stage in _NAMES for field in Stage._fields[:4]]
    like = [x] + [getattr(stage, field) for stage in (expand, depthwise, project) for field in Stage._fields[:4]]
    return tuple(
        (result[name] if name == "x" else result[name].to(t.dtype, copy=True).reshape(t.shape).contiguous())
        if asked
        else x.new_empty(0)
        for name, t, asked in zip(names, like, wanted, strict=True)
    )


def _expand_backward(
    block: _Block, x_mean: Tensor, x_products: Tensor, dx: Tensor, dy: Tensor, gradient: Tensor, total: Tensor,
    want_x: bool, result: dict[str, Tensor],
) -> None:  # fmt: skip
    """Through e's BatchNorm, from G (`gradient`, over x as the kernel had it) and g (`total`)."""
    norm, weight = block.expand_norm, block.expand.weight.double().flatten(1)
    offset = torch.zeros_like(weight[0]) if block.center is None else block.center  # x = what the kernel had + offset
    if not norm.batch:
        gradient = gradient + total.view(-1, 1) * offset
        product = (gradient * weight).sum(1) - total * norm.mean
        result["expand_weight"] = norm.scale.view(-1, 1) * gradient
        result["expand_scale"], result["expand_shift"] = norm.rstd * product, total
        result["expand_bias"] = norm.scale * total
        if want_x:
            result["x"] = dx
        return
    mean = x_mean - offset  # of what the kernel had
    about_mean = gradient - total.view(-1, 1) * mean  # the sum of ge (x - mean)
    product = (about_mean * weight).sum(1)
    q = norm.scale * norm.rstd.square() * product / norm.count
    result["expand_scale"], result["expand_shift"] = norm.rstd * product, total
    result["expand_bias"] = torch.zeros_like(total)
    result["expand_weight"] = norm.scale.view(-1, 1) * about_mean - q.view(-1, 1) * (weight @ x_products)
    if want_x:
        slope = weight.t() @ (q.view(-1, 1) * weight)
        constant = (norm.scale * total / norm.count) @ weight - slope @ mean
        residual = dy if block.residual else None
        _OPS.matrix_add_(dx, block.centered, -slope.to(dx.dtype), -constant.to(dx.dtype), residual)
        result["x"] = dx


@_block_train_backward.register_fake
def _(dy, z, *arguments):
    wanted, x, *rest = arguments[len(_STATISTICS) :]
    like = [x] + [getattr(stage, field) for stage in _split(tuple(rest[:-4])) for field in Stage._fields[:4]]
    outputs = []
    for asked, t in zip(wanted, like, strict=True):
        if not asked:
            outputs.append(x.new_empty(0))
        elif t is x:
            outputs.append(torch.empty_like(x, memory_format=torch.channels_last))
        else:
            outputs.append(torch.empty_like(t, memory_format=torch.contiguous_format))
    return tuple(outputs)


def _setup_context(ctx, inputs, output) -> None:
    x, *arguments = inputs
    stages = _split(tuple(arguments[:-4]))
    ctx.save_for_backward(x, *(t for stage in stages for t in stage[:-1]), *output[1:])
    ctx.eps, ctx.options = [stage.eps for stage in stages], arguments[-4:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    tensors = _FIELDS - 1
    x, *saved = ctx.saved_tensors
    values = [(*saved[i * tensors : (i + 1) * tensors], ctx.eps[i]) for i in range(3)]
    needs = ctx.needs_input_grad
    positions = [0] + [1 + i * _FIELDS + field for i in range(3) for field in range(4)]
    wanted = [needs[i] for i in positions]
    none = [None] * (1 + 3 * _FIELDS + 4)
    if dy is None or not any(wanted):
        return tuple(none)
    z, *statistics = saved[3 * tensors :]
    found = _OPS.block_train_backward(
        dy, z, *statistics, wanted, x, *(v for stage in values for v in stage), *ctx.options
    )
    for position, asked, gradient in zip(positions, wanted, found, strict=True):
        none[position] = gradient if asked else None
    return tuple(none)


_block_train.register_autograd(_backward, setup_context=_setup_context)
_block_train_backward.register_autograd(_no_second_derivative)


# ------------------------------------------------------------------------------------------------------- modules

_DTYPES = (torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _stage(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Stage:
    frozen = not bn.training and bn.running_mean is not None
    statistics = (bn.running_mean, bn.running_var) if frozen else (None, None)
    return Stage(conv.weight, conv.bias, bn.weight, bn.bias, *statistics, bn.eps)


_NO_STAGE = Stage(None, None, None, None, None, None, 0.0)


def _check(root: nn.Module, x: Tensor) -> None:
    """Unfusable where the modules inside do more, or other things, than their types say."""
    expect(not network.global_hooks(), "there are global forward hooks")
    for module in root.modules():
        expect("forward" not in module.__dict__, "a module inside has a forward of its own")
        expect(not any(getattr(module, hooks) for hooks in _HOOKS), "a module inside has hooks")
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                same = tensor.dtype == x.dtype and tensor.device == x.device
                expect(same, f"a tensor inside is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
    expect(x.dtype in _DTYPES and x.device.type == "cpu", f"no kernel for {x.dtype} on {x.device}")


def _update(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Running statistics as nn.BatchNorm2d.forward leaves them."""
    if not bn.training or not bn.track_running_stats or bn.running_mean is None:
        return
    with torch.no_grad():
        factor = bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(bn.num_batches_tracked)
        factor = 0.0 if factor is None else factor
        bn.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
        bn.running_var.mul_(1 - factor).add_(var * (count / (count - 1)), alpha=factor)


def why_not(conv: nn.Module, x: Tensor, residual: bool) -> str:
    """Why `run_block` would refuse this call; "" when it would not."""
    try:
        _describe(conv, x, residual)
    except network.Unfusable as refusal:
        return str(refusal)
    return ""


def _describe(conv: nn.Module, x: Tensor, residual: bool) -> network.Stage:
    if not is_compiling() and (reason := network.why_no_op(x)):
        raise network.Unfusable(reason)
    stage = network.block(conv, residual)
    _check(conv, x)
    channels = stage.layer.in_channels
    expect(x.dim() == 4 and x.shape[1] == channels, f"the input is {list(x.shape)}, not [N, {channels}, H, W]")
    batch = any(stage_of.mean is None for stage_of in (_stage(*pair) for pair in stage.weights))
    expect(batch or torch.is_grad_enabled(), "neither gradients nor statistics of the batch are asked for")
    return stage


def run_block(conv: nn.Module, x: Tensor, residual: bool) -> Tensor | None:
    """An inverted residual in training or with gradients, running statistics updated; None where it cannot run fused.

    Args:
        conv: [conv_bn_relu6 1x1], conv_bn_relu6 depthwise 3x3, 1x1 convolution, BatchNorm, as torchvision nests them.
        x: [N, C_in, H, W], float32 or float64; the gradients are those of the modules.
        residual: adds x.

    Raises:
        ValueError: a BatchNorm in training with one value per channel, as nn.BatchNorm2d raises it.
    """
    try:
        layer, weights = _describe(conv, x, residual)
    except network.Unfusable:
        return None
    stages = [_NO_STAGE] * (3 - len(weights)) + [_stage(*pair) for pair in weights]
    sides = [layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom]
    batch, _, height, width = x.shape
    reach = 2 * layer.dilation + 1
    out_height = (height + layer.pad_top + layer.pad_bottom - reach) // layer.stride + 1
    out_width = (width + layer.pad_left + layer.pad_right - reach) // layer.stride + 1
    expect_input, expect_output = (batch, layer.hidden_channels, height, width), (batch, 1, out_height, out_width)
    for stage, size in zip(stages, (expect_input, expect_output, expect_output), strict=True):
        if stage.weight is not None and stage.mean is None:
            _verify_batch_size([size[0], stage.weight.shape[0], *size[2:]])
    y, _, _, _, *statistics = _OPS.block_train(
        x, *(value for stage in stages for value in stage), layer.stride, layer.dilation, sides, residual
    )
    norms = [None] * (3 - len(weights)) + [bn for _, bn in weights]
    counts = (batch * height * width, batch * out_height * out_width, batch * out_height * out_width)
    for i, (bn, count) in enumerate(zip(norms, counts, strict=True)):
        if bn is not None:
            _update(bn, statistics[2 * i], statistics[2 * i + 1], count)
    return y
