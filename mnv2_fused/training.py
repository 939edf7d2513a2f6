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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import _verify_batch_size
from torch.nn.modules import module as _module

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
    _walk,
)

_OPS = torch.ops.mnv2_fused


class ConvNorm(NamedTuple):
    """A convolution and its BatchNorm, as the ops take them."""

    weight: Tensor | None  # None: there is no expansion
    bias: Tensor | None
    scale: Tensor | None  # the BatchNorm's weight and bias; None: it is not affine
    shift: Tensor | None
    mean: Tensor | None  # its running statistics where it is frozen; None: those of the batch are taken
    var: Tensor | None
    eps: float


_FIELDS = len(ConvNorm._fields)
_NAMES = ("expand", "depthwise", "project")
_STAGES = ", ".join(
    ", ".join(f"Tensor? {name}_{field}" for field in ConvNorm._fields[:-1]) + f", float {name}_eps" for name in _NAMES
)
_OPTIONS = "int stride, int dilation, int[] padding, bool residual, str group"
# float64; empty where a norm is frozen. Counts of pixels of e and of z; what x is less by in the kernels; the mean of x
# and its products of deviations from that mean (with a group: those of this process from the mean of all); means and
# biased variances of the batch.
_STATISTICS = ("counts", "x_center", "x_mean", "x_products", "e_mean", "e_var", "d_mean", "d_var", "z_mean", "z_var")
_INPUTS = 3 * _FIELDS  # of the stages; the options follow


def _split(values: tuple) -> tuple[ConvNorm, ConvNorm, ConvNorm]:
    return tuple(ConvNorm(*values[i : i + _FIELDS]) for i in range(0, _INPUTS, _FIELDS))


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Values per channel, to be broadcast over NCHW."""
    return values.to(like.dtype).view(1, -1, 1, 1)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _sum_over(group: str, tensor: Tensor) -> Tensor:
    """The sum over the processes of a torch.distributed group, by its name; the tensor itself where there is none."""
    if group:
        tensor = tensor.clone()
        torch.distributed.all_reduce(tensor, group=torch.distributed.distributed_c10d._resolve_process_group(group))
    return tensor


def _join(group: str, count: float, total: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all processes, from the mean and the squared deviations that this one found in `count`."""
    joint = _sum_over(group, mean * count) / total if group else mean
    return joint, _sum_over(group, squares + count * (mean - joint).square()) / total


class _Norm:
    """A BatchNorm as the affine map that it is in this call, and back through it. `mean` and `var` are the batch's."""

    def __init__(self, stage: ConvNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
        self.batch = stage.mean is None
        self.count = count
        bias = 0.0 if stage.bias is None else stage.bias.double()  # of the convolution: the batch's mean takes it away
        self.mean = mean if self.batch else stage.mean.double() - bias
        self.rstd = ((var if self.batch else stage.var.double()) + stage.eps).rsqrt()
        self.scale = self.rstd if stage.scale is None else self.rstd * stage.scale.double()
        self.shift = -self.scale * self.mean
        if stage.shift is not None:
            self.shift = self.shift + stage.shift.double()

    def of(self, v: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of v, plus the residual."""
        return _OPS.affine(v, residual, torch.stack([self.scale, torch.ones_like(self.scale), self.shift]).to(v.dtype))

    def sums(self, sums: Tensor, dtype: torch.dtype) -> Tensor:
        """The sums of g and of g (v - mean) from a kernel's, which are about the mean as it was rounded for it."""
        return torch.stack([sums[0], sums[1] + sums[0] * (self.mean.to(dtype).double() - self.mean)])

    def backward(self, total: Tensor, product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, q, r of the gradient p g + q v + r of its input v, from the sums of g and of g (v - mean)."""
        if not self.batch:
            return self.scale, torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        q = -self.scale * self.rstd.square() * product / self.count
        return self.scale, q, -self.scale * total / self.count - q * self.mean


class _Block:
    """What forward and backward of a block both begin with: the weights as the kernels take them."""

    def __init__(self, x: Tensor, stages: tuple[ConvNorm, ConvNorm, ConvNorm], options: tuple) -> None:
        self.expand, self.depthwise, self.project = stages
        self.stride, self.dilation, self.padding, self.residual, self.group = options
        self.geometry = (self.stride, self.dilation, list(self.padding))
        self.x = self.centered = _dense(x)
        self.pixels = x.shape[0] * x.shape[2] * x.shape[3]
        self.hidden, self.out_channels = self.depthwise.weight.shape[0], self.project.weight.shape[0]
        self.pair: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)

    def output_shape(self) -> list[int]:
        e, d, p = self.expand, self.depthwise, self.project
        pair = (None, None) if e.weight is None else (e.weight, e.weight.new_empty(self.hidden))
        zeros = d.weight.new_empty(self.hidden), p.weight.new_empty(self.out_channels)
        return _output_shape(self.x, *pair, d.weight, zeros[0], p.weight, zeros[1], *self.geometry, self.residual)

    def fold_expand(self, count: Tensor, x_center: Tensor, e_mean: Tensor, e_var: Tensor) -> None:
        """The expansion with its BatchNorm in it."""
        if self.expand.weight is None:
            return
        weight, dtype = self.expand.weight, self.x.dtype
        self.expand_norm = norm = _Norm(self.expand, e_mean, e_var, count)
        shift = norm.shift
        if bool(x_center.any()):
            self.centered = self.x - _column(x_center, self.x)
            shift = shift + norm.scale * (weight.flatten(1).double() @ x_center)
        self.pair = norm.scale.to(dtype).view(-1, 1, 1, 1) * weight, shift.to(dtype)

    def expand_moments(self, total: Tensor) -> tuple[Tensor, ...]:
        """x_center, x_mean, x_products, e_mean, e_var.

        A large mean leaves x first, or e, and g summed over the pixels, would lose their last digits to it.
        """
        x, group, count = self.x, self.group, self.pixels
        empty = x.new_empty(0, dtype=torch.float64)
        if self.expand.mean is None:
            mean, products = _OPS.moments(x)
            squares = products.diagonal()
        else:
            mean, squares = _OPS.channel_moments(x)
        large = bool((mean.square() * count > 16 * squares).any())
        center = mean.to(x.dtype).to(mean.dtype, copy=True) if large else torch.zeros_like(mean)
        if self.expand.mean is not None:
            return center, *(empty.clone() for _ in range(4))
        weight = self.expand.weight.double().flatten(1)
        joint = _sum_over(group, mean * count) / total if group else mean
        products = products + count * torch.outer(mean - joint, mean - joint) if group else products
        var = (weight @ _sum_over(group, products)).mul_(weight).sum(1) / total
        return center, joint, products, weight @ joint, var.clamp(min=0)  # below 0 by rounding, where terms cancel


@torch.library.custom_op(
    "mnv2_fused::block_train",
    mutates_args=(),
    schema=f"(Tensor x, {_STAGES}, {_OPTIONS}) -> ({', '.join(['Tensor'] * (2 + len(_STATISTICS)))})",
)
def _block_train(x, *arguments):
    """y, z and the statistics."""
    block = _Block(x, _split(arguments), arguments[_INPUTS:])
    expand, depthwise, project, group = block.expand, block.depthwise, block.project, block.group
    shape = block.output_shape()
    count = shape[0] * shape[2] * shape[3]
    x = block.x
    counts = x.new_tensor([block.pixels, count], dtype=torch.float64)
    counts = _sum_over(group, counts)
    expand_statistics = tuple(x.new_empty(0, dtype=torch.float64) for _ in range(5))
    d_mean, d_var, z_mean, z_var = (x.new_empty(0, dtype=torch.float64) for _ in range(4))
    if expand.weight is not None:
        expand_statistics = block.expand_moments(counts[0])
    x_center, _, _, e_mean, e_var = expand_statistics
    block.fold_expand(counts[0], x_center, e_mean, e_var)
    if depthwise.mean is None:
        moments = _OPS.filter_moments(block.centered, *block.pair, depthwise.weight, *block.geometry)
        d_mean, d_var = _join(group, count, counts[1], *moments)
    norm = _Norm(depthwise, d_mean, d_var, counts[1])
    filters = (norm.scale.view(-1, 1, 1, 1) * depthwise.weight.double()).to(x.dtype)
    bias = x.new_zeros(block.out_channels) if project.bias is None else project.bias
    z = _OPS.inverted_residual(
        block.centered, *block.pair, filters, norm.shift.to(x.dtype), project.weight, bias,
        *block.geometry, False, False,
    )  # fmt: skip
    if project.mean is None:
        z_mean, z_var = _join(group, count, counts[1], *_OPS.channel_moments(z))
    norm = _Norm(project._replace(bias=None), z_mean, z_var, counts[1])
    y = norm.of(z, x if block.residual else None)
    return y, z, counts, *expand_statistics, d_mean, d_var, z_mean, z_var


@_block_train.register_fake
def _(x, *arguments):
    stages = expand, depthwise, project = _split(arguments)
    block = _Block(x, stages, arguments[_INPUTS:])
    shape = block.output_shape()

    def statistic(wanted: bool, *size: int) -> Tensor:
        return x.new_empty(size if wanted else (0,), dtype=torch.float64)

    batch = [stage.weight is not None and stage.mean is None for stage in stages]
    channels = x.shape[1]
    return (
        *(torch.empty_strided(shape, _channels_last_strides(shape), dtype=x.dtype, device=x.device) for _ in range(2)),
        statistic(True, 2),
        statistic(expand.weight is not None, channels),
        statistic(batch[0], channels),
        statistic(batch[0], channels, channels),
        *(statistic(batch[0], block.hidden) for _ in range(2)),
        *(statistic(batch[1], block.hidden) for _ in range(2)),
        *(statistic(batch[2], block.out_channels) for _ in range(2)),
    )


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
    counts, x_center, x_mean, x_products, e_mean, e_var, d_mean, d_var, z_mean, z_var, wanted, x, *rest = arguments
    block = _Block(x, _split(tuple(rest)), tuple(rest[_INPUTS:]))
    expand, depthwise, project, group = block.expand, block.depthwise, block.project, block.group
    x, dy = block.x, _dense(dy)
    (want_x,), want_e, want_d, want_p = wanted[:1], wanted[1:5], wanted[5:9], wanted[9:]
    result: dict[str, Tensor] = {}

    # z's BatchNorm, over narrow tensors.
    norm = _Norm(project._replace(bias=None), z_mean, z_var, counts[1])
    sums = norm.sums(_OPS.channel_products(dy, z, norm.mean.to(x.dtype)), x.dtype)
    result["project_scale"], result["project_shift"] = norm.rstd * sums[1], sums[0]
    result["project_bias"] = torch.zeros_like(sums[0]) if norm.batch else norm.scale * sums[0]
    coefficients = norm.backward(*_sum_over(group if norm.batch else "", sums))
    dz = _OPS.affine(dy, z if norm.batch else None, torch.stack(coefficients).to(x.dtype))

    # The recomputed part: with batch statistics once for d's sums, once more for what is below; else once for all.
    below = want_x or any(want_e) or want_d[0]
    if below or any(want_d) or want_p[0]:
        block.fold_expand(counts[0], x_center, e_mean, e_var)
        norm = _Norm(depthwise, d_mean, d_var, counts[1])
        products = any(want_e) or (want_x and expand.weight is not None and block.expand_norm.batch)
        bits = WANT_X * want_x + WANT_EXPAND * products + WANT_DEPTHWISE * want_d[0]

        def gradients(coefficients: tuple[Tensor, ...], bits: int) -> tuple[Tensor, ...]:
            table = torch.stack([norm.scale, norm.shift, norm.mean, *coefficients]).to(x.dtype)
            return _OPS.block_gradients(
                dz, block.centered, *block.pair, depthwise.weight, project.weight, table, *block.geometry, bits
            )

        zero = torch.zeros_like(norm.scale)
        once = not norm.batch
        first = gradients((norm.scale, zero, zero), (bits if once else 0) | WANT_PROJECT * want_p[0])
        *_, project_gradient, sums = first
        sums = norm.sums(sums, x.dtype)
        result["depthwise_scale"], result["depthwise_shift"] = norm.rstd * sums[1], sums[0]
        result["depthwise_bias"] = norm.scale * sums[0] if once else zero
        result["project_weight"] = project_gradient
    if below:
        dx, expand_gradient, depthwise_gradient, _, sums = (
            first if once else gradients(norm.backward(*_sum_over(group, sums)), bits)
        )
        result["x"], result["depthwise_weight"] = dx, depthwise_gradient.t()
        if products:
            _expand_backward(block, x_center, x_mean, x_products, dx, dy, expand_gradient, sums[2:], want_x, result)
        if want_x and block.residual and (expand.weight is None or not block.expand_norm.batch):
            result["x"] += dy

    names = ["x"] + [f"{stage}_{field}" for stage in _NAMES for field in ConvNorm._fields[:4]]
    like = [x] + [getattr(stage, field) for stage in (expand, depthwise, project) for field in ConvNorm._fields[:4]]
    return tuple(
        (result[name] if name == "x" else _like(result[name], t)) if asked else x.new_empty(0)
        for name, t, asked in zip(names, like, wanted, strict=True)
    )


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    """A copy, of the tensor's dtype and shape."""
    return gradient.to(tensor.dtype, copy=True, memory_format=torch.contiguous_format).view(tensor.shape)


def _expand_backward(
    block: _Block, x_center: Tensor, x_mean: Tensor, x_products: Tensor, dx: Tensor, dy: Tensor, gradient: Tensor,
    sums: Tensor, want_x: bool, result: dict[str, Tensor],
) -> None:  # fmt: skip
    """Through e's BatchNorm, from G (`gradient`, over x less its center, as the kernel had it) and sums of ge, ge h.

    Matrices are [in, hidden], as the kernel gives G.
    """
    norm, group = block.expand_norm, block.group
    weight = block.expand.weight.flatten(1).t().to(torch.float64, memory_format=torch.contiguous_format)
    total, with_h = sums
    # The sum of ge (e - mean of e), in two ways. Where ge is not 0, h is the affine map of e, so the sum of ge h gives
    # it, unless the map is flat. So does G, whose large terms cancel where channels are correlated: worse than those of
    # h, if it is not their mean that is large.
    mean = x_mean - x_center if norm.batch else -x_center
    gap = mean @ weight if norm.batch else norm.mean + mean @ weight  # the mean of e, as the kernels had x
    product = (gradient * weight).sum(0) - total * gap
    through_h = norm.scale.abs() > 1e-3 * norm.rstd
    if norm.batch:
        sizes = torch.stack([(x_products.diagonal() / block.pixels).sqrt(), mean.abs()]) @ weight.abs()
        through_h &= sizes[0] > sizes[1]
    product = torch.where(through_h, (with_h - total * (norm.shift + norm.scale * norm.mean)) / norm.scale, product)
    result["expand_scale"], result["expand_shift"] = norm.rstd * product, total
    if not norm.batch:
        result["expand_weight"] = (gradient * norm.scale).addr_(x_center, norm.scale * total).t()
        result["expand_bias"] = norm.scale * total
        return
    joint_total, joint_product = _sum_over(group, torch.stack([total, product]))
    q = norm.scale * norm.rstd.square() * joint_product / norm.count
    result["expand_bias"] = torch.zeros_like(total)
    found = (x_products @ weight).mul_(-q).addcmul_(gradient, norm.scale).addr_(mean, norm.scale * total, alpha=-1)
    if group:  # of one process alone, the deviations of x and those of the gradient do not add up to 0
        deviation = block.pixels * (_OPS.channel_moments(block.x)[0] - x_mean)
        constant = norm.scale * joint_total / norm.count
        found.addr_(x_mean, norm.scale * total - constant * block.pixels - q * (deviation @ weight))
        found.addr_(deviation, constant, alpha=-1)
    result["expand_weight"] = found.t()
    if want_x:
        slope = weight @ (q * weight).t()
        constant = weight @ (norm.scale * joint_total / norm.count) - slope @ mean
        residual = dy if block.residual else None
        _OPS.matrix_add_(dx, block.centered, -slope.to(dx.dtype), -constant.to(dx.dtype), residual)


@_block_train_backward.register_fake
def _(dy, z, *arguments):
    wanted, x, *rest = arguments[len(_STATISTICS) :]
    like = [x] + [getattr(stage, field) for stage in _split(tuple(rest)) for field in ConvNorm._fields[:4]]
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
    stages = _split(tuple(arguments))
    ctx.save_for_backward(x, *(t for stage in stages for t in stage[:-1]), *output[1:])
    ctx.eps, ctx.options = [stage.eps for stage in stages], arguments[_INPUTS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    tensors = _FIELDS - 1
    x, *saved = ctx.saved_tensors
    values = [(*saved[i * tensors : (i + 1) * tensors], ctx.eps[i]) for i in range(3)]
    needs = ctx.needs_input_grad
    positions = [0] + [1 + i * _FIELDS + field for i in range(3) for field in range(4)]
    wanted = [needs[i] for i in positions]
    gradients = [None] * (1 + _INPUTS + len(ctx.options))
    if dy is None or not any(wanted):
        return tuple(gradients)
    z, *statistics = saved[3 * tensors :]
    found = _OPS.block_train_backward(
        dy, z, *statistics, wanted, x, *(v for stage in values for v in stage), *ctx.options
    )
    for position, asked, gradient in zip(positions, wanted, found, strict=True):
        gradients[position] = gradient if asked else None
    return tuple(gradients)


_block_train.register_autograd(_backward, setup_context=_setup_context)
_block_train_backward.register_autograd(_no_second_derivative)


# ------------------------------------------------------------------------------------------------- stem and head

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? var, float eps"
_CONV_OPTIONS = "int[] stride, int[] padding, str group"


@torch.library.custom_op(
    "mnv2_fused::conv_bn_relu6",
    mutates_args=(),
    schema=f"({_CONV}, {_CONV_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _conv_bn_relu6(x, *arguments):
    """relu6 of the norm of a convolution; e, the convolution itself; the count, mean and variance of e."""
    stage, (stride, padding, group) = ConvNorm(*arguments[:_FIELDS]), arguments[_FIELDS:]
    e = _dense(torch.conv2d(_dense(x), stage.weight, stage.bias, stride, padding))
    local = e.numel() // e.shape[1]
    count = _sum_over(group, x.new_full((1,), local, dtype=torch.float64))
    e_mean, e_var = (x.new_empty(0, dtype=torch.float64) for _ in range(2))
    if stage.mean is None:
        e_mean, e_var = _join(group, local, count, *_OPS.channel_moments(e))
    norm = _Norm(stage._replace(bias=None), e_mean, e_var, count)
    return norm.of(e).clamp_(0, 6), e, count, e_mean, e_var


@_conv_bn_relu6.register_fake
def _(x, *arguments):
    stage, (stride, padding, _) = ConvNorm(*arguments[:_FIELDS]), arguments[_FIELDS:]
    shape = torch.conv2d(x, stage.weight, None, stride, padding).shape
    statistic = x.new_empty(shape[1] if stage.mean is None else 0, dtype=torch.float64)
    return (
        *(torch.empty_strided(shape, _channels_last_strides(shape), dtype=x.dtype, device=x.device) for _ in range(2)),
        x.new_empty(1, dtype=torch.float64), statistic, torch.empty_like(statistic),
    )  # fmt: skip


@torch.library.custom_op(
    "mnv2_fused::conv_bn_relu6_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor e, Tensor count, Tensor e_mean, Tensor e_var, bool[] wanted, {_CONV}, {_CONV_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _conv_bn_relu6_backward(dy, e, count, e_mean, e_var, wanted, x, *arguments):
    """The gradients of x, weight, bias, scale and shift that are wanted; the others are empty."""
    stage, (stride, padding, group) = ConvNorm(*arguments[:_FIELDS]), arguments[_FIELDS:]
    norm = _Norm(stage._replace(bias=None), e_mean, e_var, count)
    g = torch.ops.aten.hardtanh_backward(_dense(dy), norm.of(e), 0.0, 6.0)
    sums = norm.sums(_OPS.channel_products(g, e, norm.mean.to(x.dtype)), x.dtype)
    coefficients = norm.backward(*_sum_over(group if norm.batch else "", sums))
    de = _OPS.affine(g, e if norm.batch else None, torch.stack(coefficients).to(x.dtype))
    del g
    dx, weight, _ = torch.ops.aten.convolution_backward(
        de, _dense(x), stage.weight, None, stride, padding, [1, 1], False, [0, 0], 1, [*wanted[:2], False]
    )
    bias = torch.zeros_like(sums[0]) if norm.batch else norm.scale * sums[0]
    found = (dx, weight, bias, norm.rstd * sums[1], sums[0].clone())
    return tuple(
        (_dense(gradient) if gradient is dx else gradient.to(x.dtype).contiguous()) if asked else x.new_empty(0)
        for gradient, asked in zip(found, wanted, strict=True)
    )


@_conv_bn_relu6_backward.register_fake
def _(dy, e, count, e_mean, e_var, wanted, x, weight, bias, scale, shift, *_):
    return tuple(
        torch.empty_like(t, memory_format=torch.channels_last if t is x else torch.contiguous_format)
        if asked
        else x.new_empty(0)
        for asked, t in zip(wanted, (x, weight, bias, scale, shift), strict=True)
    )


def _conv_setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_FIELDS], *output[1:])  # x and the tensors of the stage; eps follows them
    ctx.options = inputs[_FIELDS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _conv_backward(ctx, dy, *_):
    saved = ctx.saved_tensors
    inputs, outputs = saved[:_FIELDS], saved[_FIELDS:]
    gradients = [None] * (len(inputs) + len(ctx.options))
    wanted = list(ctx.needs_input_grad[:5])
    if dy is not None and any(wanted):
        found = _OPS.conv_bn_relu6_backward(dy, *outputs, wanted, *inputs, *ctx.options)
        gradients[:5] = (gradient if asked else None for gradient, asked in zip(found, wanted, strict=True))
    return tuple(gradients)


_conv_bn_relu6.register_autograd(_conv_backward, setup_context=_conv_setup_context)
_conv_bn_relu6_backward.register_autograd(_no_second_derivative)


# ------------------------------------------------------------------------------------------------------- modules

_DTYPES = (torch.float32, torch.float64)
_NOT_ASKED = "neither gradients nor statistics of the batch are asked for"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _takes_batch(bn: nn.BatchNorm2d) -> bool:
    """Whether it takes the statistics of the batch."""
    return bn.training or bn.running_mean is None


def _stage(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> ConvNorm:
    # Copies of running statistics: a forward in training may move them before the backward of this one.
    statistics = (None, None) if _takes_batch(bn) else (bn.running_mean.clone(), bn.running_var.clone())
    return ConvNorm(conv.weight, conv.bias, bn.weight, bn.bias, *statistics, bn.eps)


_NO_STAGE = ConvNorm(None, None, None, None, None, None, 0.0)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module itself, its children aside, does more than its type says."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)


def _check(root: nn.Module, x: Tensor) -> None:
    """Unfusable where the modules inside do more, or other things, than their types say."""
    backward_hooks = _module._global_backward_hooks or _module._global_backward_pre_hooks
    expect(not network.global_hooks() and not backward_hooks, "there are global hooks")
    for module in root.modules():
        expect(not has_hooks(module), "a module inside has hooks or a forward of its own")
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                same = tensor.dtype == x.dtype and tensor.device == x.device
                expect(same, f"a tensor inside is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
    expect(x.dtype in _DTYPES and x.device.type == "cpu", f"no kernel for {x.dtype} on {x.device}")


def _update(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Running statistics as nn.BatchNorm2d.forward leaves them."""
    if not bn.training or not bn.track_running_stats or bn.running_mean is None:
        return
    with torch.no_grad():
        factor = bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if factor is None:
                factor = bn.num_batches_tracked.double().reciprocal()  # a tensor: no graph break under torch.compile
        factor = 0.0 if factor is None else factor
        bn.running_mean.mul_(1 - factor).add_(mean * factor)
        bn.running_var.mul_(1 - factor).add_(var * (count / (count - 1)) * factor)


def _group(norms: list[nn.Module]) -> str:
    """The name of the process group over which the SyncBatchNorms among them take their statistics; "" for none."""
    groups = set()
    for bn in norms:
        group = ""
        if bn.training and type(bn) is nn.SyncBatchNorm and torch.distributed.is_initialized():
            chosen = bn.process_group or torch.distributed.group.WORLD
            group = chosen.group_name if torch.distributed.get_world_size(chosen) > 1 else ""
        if _takes_batch(bn):
            groups.add(group)
    expect(len(groups) <= 1, "BatchNorms that take their statistics over different processes")
    return groups.pop() if groups else ""


def _expect_ops(x: Tensor) -> None:
    reason = network.why_no_op(x)
    expect(not reason, reason)


def _refusal(describe: Callable[..., object], *arguments: object) -> str:
    try:
        describe(*arguments)
    except network.Unfusable as refusal:
        return str(refusal)
    return ""


def why_not(layers: nn.Module, x: Tensor, residual: bool) -> str:
    """Why `run_block` would refuse this call; "" when it would not."""
    return _refusal(_describe, layers, x, residual)


def _describe(layers: nn.Module, x: Tensor, residual: bool) -> network.Stage:
    _expect_ops(x)
    stage = network.block(layers, residual)
    _check(layers, x)
    channels = stage.layer.in_channels
    expect(x.shape[1] == channels, f"the input is {list(x.shape)}, not [N, {channels}, H, W]")
    group = _group([bn for _, bn in stage.weights])
    expect(x.shape[0] > 0 or bool(group), "there is no image")
    batch = any(_takes_batch(bn) for _, bn in stage.weights)
    expect(batch or torch.is_grad_enabled(), _NOT_ASKED)
    return stage


def run_block(layers: nn.Module, x: Tensor, residual: bool) -> Tensor | None:
    """An inverted residual in training or with gradients, running statistics updated; None where it cannot run fused.

    Args:
        layers: [conv_bn_relu6 1x1], conv_bn_relu6 depthwise 3x3, 1x1 convolution, BatchNorm, as torchvision nests them.
        x: [N, C_in, H, W], float32 or float64; the gradients are those of the modules.
        residual: adds x.

    Raises:
        ValueError: a BatchNorm in training with one value per channel, as nn.BatchNorm2d raises it.
    """
    try:
        layer, weights = _describe(layers, x, residual)
    except network.Unfusable:
        return None
    norms = [None] * (3 - len(weights)) + [bn for _, bn in weights]
    stages = [_NO_STAGE] * (3 - len(weights)) + [_stage(*pair) for pair in weights]
    group = _group(norms[3 - len(weights) :])
    sides = [layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom]
    out_shape, _ = _walk(x, [0, *layer])
    for stage, shape in zip(stages, (x.shape, out_shape, out_shape), strict=True):
        if stage.weight is not None and stage.mean is None and not group:
            _verify_batch_size([shape[0], stage.weight.shape[0], *shape[2:]])
    y, _, counts, _, _, _, *statistics = _OPS.block_train(
        x, *(value for stage in stages for value in stage), layer.stride, layer.dilation, sides, residual, group
    )
    for i, bn in enumerate(norms):
        if bn is not None:
            mean, var = statistics[2 * i : 2 * i + 2]
            if i < 2 and stages[i].bias is not None and stages[i].mean is None:  # the ops leave it out of e and d
                mean = mean + stages[i].bias.detach()
            _update(bn, mean, var, counts[min(i, 1)])
    return y


def why_not_conv_bn_relu6(module: nn.Module, x: Tensor) -> str:
    """Why `run_conv_bn_relu6` would refuse this call; "" when it would not."""
    return _refusal(_describe_conv, module, x)


def _describe_conv(module: nn.Module, x: Tensor) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    _expect_ops(x)
    conv, bn = network.conv_bn_relu6(module)
    _check(module, x)
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    expect(plain and not isinstance(conv.padding, str), f"a convolution of another kind: {conv}")
    expect(x.shape[1] == conv.in_channels, f"the input is {list(x.shape)}, not [N, {conv.in_channels}, H, W]")
    expect(x.shape[0] > 0 or bool(_group([bn])), "there is no image")
    expect(_takes_batch(bn) or torch.is_grad_enabled(), _NOT_ASKED)
    return conv, bn


def run_conv_bn_relu6(module: nn.Module, x: Tensor) -> Tensor | None:
    """The stem or the head, [convolution, BatchNorm, ReLU6], as one op; None where it cannot run so.

    x is [N, C, H, W]. Of the three activations that the modules would keep for backward, one is kept beside the result.

    Raises:
        ValueError: a BatchNorm in training with one value per channel, as nn.BatchNorm2d raises it.
    """
    try:
        conv, bn = _describe_conv(module, x)
    except network.Unfusable:
        return None
    stage, group = _stage(conv, bn), _group([bn])
    if stage.mean is None and not group:
        height, width = (
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(x.shape[2:], conv.padding, conv.kernel_size, conv.stride, strict=True)
        )
        _verify_batch_size([x.shape[0], conv.out_channels, height, width])
    y, _, count, mean, var = _OPS.conv_bn_relu6(x, *stage, conv.stride, conv.padding, group)
    _update(bn, mean, var, count)
    return y
