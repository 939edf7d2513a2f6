"""Training with batch statistics: gradients of the ops of csrc/training_ops.cpp, and the modules that they run for.

A block is one op that keeps its input and its projection, nothing in between; how it goes back without the rest stands
in csrc/training_ops.cpp. The stem and the head are one op each too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import _verify_batch_size

from . import network, ops
from .network import arithmetic, check_inside, expect
from .ops import _channels_last_strides, _doubles, _no_second_derivative, _output_shape, _walk

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
# float64; empty where a norm is frozen. Counts of pixels of e and of z; what x is less by in the kernels; the mean of x
# and its products of deviations from that mean (with a group: those of this process from the mean of all); means and
# biased variances of the batch.
_STATISTICS = ("counts", "x_center", "x_mean", "x_products", "e_mean", "e_var", "d_mean", "d_var", "z_mean", "z_var")
_INPUTS = 3 * _FIELDS  # of the stages; the options follow
# Places among the arguments of what has a gradient: x, then weight, bias, scale and shift of each stage.
_DIFFERENTIABLE = [0] + [1 + i * _FIELDS + field for i in range(3) for field in range(4)]


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("mnv2_fused::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum over the processes of a torch.distributed group, by its name; the C++ ops call it. "" is this process."""
    x = x.clone()
    if group:
        torch.distributed.all_reduce(x, group=torch.distributed.distributed_c10d._resolve_process_group(group))
    return x


_all_reduce.register_fake(lambda x, group: torch.empty_like(x))


# ------------------------------------------------------------------------------------------------------- the block


@torch.library.register_fake("mnv2_fused::block_train")
def _(x, *arguments):
    """y, z and the statistics."""
    stages = [ConvNorm(*arguments[i : i + _FIELDS]) for i in range(0, _INPUTS, _FIELDS)]
    expand, depthwise, project = stages
    *geometry, residual, _, _ = arguments[_INPUTS:]
    hidden, out_channels, channels = depthwise.weight.shape[0], project.weight.shape[0], x.shape[1]
    pair = (None, None) if expand.weight is None else (expand.weight, x.new_empty(hidden))
    biases = x.new_empty(hidden), x.new_empty(out_channels)
    shape = _output_shape(x, *pair, depthwise.weight, biases[0], project.weight, biases[1], *geometry, residual)

    def statistic(wanted: bool, *size: int) -> Tensor:
        return _doubles(x, *(size if wanted else (0,)))

    batch = [stage.weight is not None and stage.mean is None for stage in stages]
    return (
        *(torch.empty_strided(shape, _channels_last_strides(shape), dtype=x.dtype, device=x.device) for _ in range(2)),
        statistic(True, 2),
        statistic(expand.weight is not None, channels),
        statistic(batch[0], channels),
        statistic(batch[0], channels, channels),
        *(statistic(batch[0], hidden) for _ in range(2)),
        *(statistic(batch[1], hidden) for _ in range(2)),
        *(statistic(batch[2], out_channels) for _ in range(2)),
    )


@torch.library.register_fake("mnv2_fused::block_train_backward")
def _(dy, z, *arguments):
    """The gradients that are wanted; the others are empty."""
    wanted, *rest = arguments[len(_STATISTICS) :]
    x = rest[0]
    outputs = []
    for i, place in enumerate(_DIFFERENTIABLE):
        if not wanted >> i & 1 or rest[place] is None:
            outputs.append(x.new_empty(0))
        elif place == 0:
            shape = x.shape
            outputs.append(torch.empty_strided(shape, _channels_last_strides(shape), dtype=x.dtype, device=x.device))
        else:
            outputs.append(torch.empty_like(rest[place], memory_format=torch.contiguous_format))
    return tuple(outputs)


def _setup_context(ctx, inputs, output) -> None:
    stages = range(1, 1 + _INPUTS)
    ctx.eps = [inputs[i] for i in stages if i % _FIELDS == 0]  # the last field of each; the others are tensors
    ctx.save_for_backward(inputs[0], *(inputs[i] for i in stages if i % _FIELDS), *output[1:])
    ctx.options = inputs[1 + _INPUTS :]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *_):
    wanted = sum(ctx.needs_input_grad[place] << i for i, place in enumerate(_DIFFERENTIABLE))
    gradients = [None] * (1 + _INPUTS + len(ctx.options))
    if dy is None or not wanted:
        return tuple(gradients)
    tensors = _FIELDS - 1
    x, *saved = ctx.saved_tensors
    stages = [v for i, eps in enumerate(ctx.eps) for v in (*saved[i * tensors : (i + 1) * tensors], eps)]
    found = _OPS.block_train_backward(dy, *saved[3 * tensors :], wanted, x, *stages, *ctx.options)
    for i, (place, gradient) in enumerate(zip(_DIFFERENTIABLE, found, strict=True)):
        gradients[place] = gradient if wanted >> i & 1 else None
    return tuple(gradients)


torch.library.register_autograd("mnv2_fused::block_train", _backward, setup_context=_setup_context)
torch.library.register_autograd("mnv2_fused::block_train_backward", _no_second_derivative)


# ------------------------------------------------------------------------------------------------- stem and head

_CONV = "Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? mean, Tensor? var, float eps"
_CONV_OPTIONS = "int[] stride, int[] padding, str group"


def _as(t: Tensor | None, like: Tensor) -> Tensor | None:
    """In the dtype of another: 16-bit numbers beside float32 parameters, where autocast asks for them."""
    return t if t is None or t.dtype == like.dtype else t.to(like.dtype)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    """torch.conv2d, by the kernels of inference where the convolution is that of a stem or of a head."""
    kind, (out_channels, channels, *kernel), (rows, columns) = None, weight.shape, padding
    if kernel == [3, 3] and stride in ([1, 1], [2, 2]):
        kind = ops.CONV3X3
    elif [kernel, stride, padding] == [[1, 1], [1, 1], [0, 0]]:
        kind = ops.POINTWISE
    if kind is None:
        return _dense(torch.conv2d(_dense(x), weight, bias, stride, padding))
    layer = ops.Layer(kind, channels, 0, out_channels, stride[0], 1, columns, columns, rows, rows)
    plan = ops.make_plan([layer], x.dtype, ops.device_type(x), ops.uses_tf32(x))
    bias = weight.new_zeros(out_channels) if bias is None else bias
    return _OPS.network(x, _OPS.pack(torch.cat([weight.reshape(-1), bias]), plan), plan)


@torch.library.custom_op(
    "mnv2_fused::conv_bn_relu6",
    mutates_args=(),
    schema=f"({_CONV}, {_CONV_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _conv_bn_relu6(x, *arguments):
    """relu6 of the norm of a convolution; e, the convolution itself; the count, mean and variance of e."""
    stage, (stride, padding, group) = ConvNorm(*arguments[:_FIELDS]), arguments[_FIELDS:]
    e = _convolution(x, _as(stage.weight, x), _as(stage.bias, x), stride, padding)
    y, *statistics = _OPS.batch_norm_relu6(e, *stage[2:], group)
    return y, e, *statistics


@_conv_bn_relu6.register_fake
def _(x, *arguments):
    stage, (stride, padding, _) = ConvNorm(*arguments[:_FIELDS]), arguments[_FIELDS:]
    shape = torch.conv2d(x, _as(stage.weight, x), None, stride, padding).shape
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
    de, scale, shift, bias = _OPS.batch_norm_relu6_backward(dy, e, count, e_mean, e_var, *stage[2:], group)
    dx = weight = None
    if any(wanted[:2]):
        dx, weight, _ = torch.ops.aten.convolution_backward(
            de, _dense(x), _as(stage.weight, x), None, stride, padding, [1, 1], False, [0, 0], 1, [*wanted[:2], False]
        )
    weight = _as(weight, stage.weight).contiguous() if wanted[1] else None
    bias = bias if stage.bias is None else _as(bias, stage.bias)
    found = (_dense(dx) if wanted[0] else None, weight, bias, scale, shift)
    return tuple(gradient if asked else x.new_empty(0) for gradient, asked in zip(found, wanted, strict=True))


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

_NOT_ASKED = "neither gradients nor statistics of the batch are asked for"


def _takes_batch(bn: nn.BatchNorm2d) -> bool:
    """Whether it takes the statistics of the batch."""
    return bn.training or bn.running_mean is None


def _stage(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> ConvNorm:
    if bn is None:
        zeros = conv.weight.new_zeros(conv.out_channels)
        return ConvNorm(conv.weight, conv.bias, None, None, zeros, torch.ones_like(zeros), 0.0)
    # Copies of running statistics: a forward in training may move them before the backward of this one.
    statistics = (None, None) if _takes_batch(bn) else (bn.running_mean.clone(), bn.running_var.clone())
    return ConvNorm(conv.weight, conv.bias, bn.weight, bn.bias, *statistics, bn.eps)


_NO_STAGE = ConvNorm(None, None, None, None, None, None, 0.0)


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


Describe = Callable[[], list[network.Stage]]


def why_not(describe: Describe, inside: Iterable[nn.Module], x: Tensor) -> str:
    """Why `run` would refuse this call; "" when it would not."""
    try:
        _described(describe, inside, x)
    except network.Unfusable as refusal:
        return str(refusal)
    return ""


def _described(describe: Describe, inside: Iterable[nn.Module], x: Tensor) -> list[network.Stage]:
    reason = network.why_no_op(x)
    expect(not reason, reason)
    stages = describe()
    check_inside(inside, x)
    first = stages[0].layer
    expect(x.shape[1] == first.in_channels, f"the input is {list(x.shape)}, not [N, {first.in_channels}, H, W]")
    kept = not first.residual or x.dtype == arithmetic(x).dtype
    expect(kept, f"x is {x.dtype}, and so is the sum that autocast makes")
    for stage in stages:
        norms = [bn for _, bn in stage.weights if bn is not None]
        expect(x.shape[0] > 0 or bool(_group(norms)), "there is no image")
        expect(torch.is_grad_enabled() or any(map(_takes_batch, norms)), _NOT_ASKED)
    return stages


def run(describe: Describe, inside: Iterable[nn.Module], x: Tensor) -> Tensor | None:
    """Blocks, or a stem or head, in training or with gradients, an op each; None where they cannot run so.

    Running statistics are updated. Of the activations that the modules would keep for backward, a block keeps its input
    and its projection, stem and head one beside the result.

    Args:
        describe: makes the stages, of kind BLOCK or CONV3X3 or POINTWISE with its ReLU6; raises Unfusable.
        inside: the modules that a call runs, which may not do more than their types say.
        x: [N, C_in, H, W], float32, float64 or bfloat16; on CUDA float16, bfloat16 or float32; under autocast its
            dtype. The gradients are those of the modules.

    Raises:
        ValueError: a BatchNorm in training with one value per channel, as nn.BatchNorm2d raises it.
    """
    try:
        stages = _described(describe, inside, x)
    except network.Unfusable:
        return None
    if not is_compiling():
        ops.packed_chains.clear()  # of what fused optimizers, which count no versions, will change
    x = x.to(arithmetic(x).dtype)
    for stage in stages:
        layer, weights = stage.at(*x.shape[2:]), stage.weights
        x = _run_block(layer, weights, x) if layer.kind == ops.BLOCK else _run_convolution(layer, weights[0], x)
    return x


def _run_block(layer: ops.Layer, weights: network.Weights, x: Tensor) -> Tensor:
    norms = [None] * (3 - len(weights)) + [bn for _, bn in weights]
    stages = [_NO_STAGE] * (3 - len(weights)) + [_stage(*pair) for pair in weights]
    group = _group([bn for bn in norms if bn is not None])
    sides = [layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom]
    out_shape, _ = _walk(x, [layer])
    for stage, shape in zip(stages, (x.shape, out_shape, out_shape), strict=True):
        if stage.weight is not None and stage.mean is None and not group:
            _verify_batch_size([shape[0], stage.weight.shape[0], *shape[2:]])
    values = [value for stage in stages for value in stage]
    y, _, counts, _, _, _, *statistics = _OPS.block_train(
        x, *values, layer.stride, layer.dilation, sides, bool(layer.residual), ops.uses_tf32(x), group
    )
    for i, bn in enumerate(norms):
        if bn is not None:
            mean, var = statistics[2 * i : 2 * i + 2]
            if i < 2 and stages[i].bias is not None and stages[i].mean is None:  # the ops leave it out of e and d
                mean = mean + stages[i].bias.detach()
            _update(bn, mean, var, counts[min(i, 1)])
    return nn.functional.relu6(y) if layer.relu6 else y


def _run_convolution(layer: ops.Layer, pair: tuple[nn.Conv2d, nn.BatchNorm2d | None], x: Tensor) -> Tensor:
    conv, bn = pair
    stage, group = _stage(conv, bn), _group([bn] if bn is not None else [])
    if stage.mean is None and not group:
        _verify_batch_size([x.shape[0], layer.out_channels, *ops.output_size(layer, *x.shape[2:])])
    padding = [layer.pad_top, layer.pad_left]
    if padding != [layer.pad_bottom, layer.pad_right]:
        x = nn.functional.pad(x, (layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom))
        padding = [0, 0]
    y, _, count, mean, var = _OPS.conv_bn_relu6(x, *stage, [layer.stride] * 2, padding, group)
    if bn is not None:
        _update(bn, mean, var, count)
    return y
