"""Inference in 8-bit integers on the CPU: what is computed, to the bit; calibration, files, training for it.

A quantised tensor holds bytes q that stand for scale * (q - zero_point). Activations are unsigned: after a ReLU6 the
zero point is 0 and a scale of at most 6 / 255 makes saturation the upper end of the ReLU6; the image and the narrow
tensors between blocks have a zero point of their own. Weights are signed bytes from -127 to 127 without a zero point,
with a scale for each output channel or for each tensor. Each convolution is

    sum = bias + sum of w * q            exact, in 32 bits; outside the image q is the zero point
    t = float32(sum) * multiplier        rounded to float32, as every operation from here on

where the bias of a channel, round(b / (input scale * weight scale)) - zero_point * (sum of the channel's w), takes the
input's zero point out again, and the multiplier is input scale * weight scale / output scale. Then

    h, d, stem, head: y = byte(t)
    block:            y = byte((t + float32(x) * ratio) + offset)   with a shortcut, ratio = scale of x / scale of y and
                      y = byte(t + offset)                          offset = zero point of y - ratio * zero point of x
    mean:             y = byte(float32(sum of (q - zero_point)) * float32(multiplier / pixels) + offset)
    logits:           y = t                                         with the multiplier input scale * weight scale
    image:            q = byte(x * inverse_scale + zero_point)      NaN becomes 0

and byte() rounds to the nearest integer, ties to even, and saturates to 0 to 255. Without a classifier the mean is the
result and is not rounded to a byte. `QuantizedModel.reference` is this in PyTorch; every int8 row of the kernel table
gives the same bytes and the same logits, whatever the batch, the number of threads, and the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from . import _C, network, ops
from .mobilenet_v2 import MobileNet, _describe_network
from .network import Stage, Unfusable
from .ops import Layer
from .weights import WeightsError, read_state_dict

METHODS = ("mse", "percentile", "max")
_NETWORK = torch.ops.mnv2_fused.network.default
_LARGEST_WEIGHT = 127
_LARGEST_BIAS = 1 << 20
_SUM_LIMIT = 1 << 31
_CONVOLUTIONS = {  # of each kind of layer
    ops.CONV3X3: ("conv",),
    ops.BLOCK: ("expand", "depthwise", "project"),
    ops.POINTWISE: ("conv",),
    ops.POOL: (),
    ops.LINEAR: ("linear",),
}


def _names(layer: Layer) -> tuple[str, ...]:
    """Of its convolutions."""
    names = _CONVOLUTIONS[layer.kind]
    return names if layer.kind != ops.BLOCK or layer.expand else names[1:]


class Range(NamedTuple):
    """How a tensor of activations is quantised: its bytes q stand for scale * (q - zero_point)."""

    scale: float
    zero_point: int

    def dequantize(self, q: Tensor) -> Tensor:
        return (q.double() - self.zero_point) * self.scale


class Convolution(NamedTuple):
    """weight int8 as PyTorch has it, [out, in / groups, k, k] or [out, in]; bias int32 and multiplier float32 [out]."""

    weight: Tensor
    bias: Tensor
    multiplier: Tensor


class QuantizedLayer(NamedTuple):
    """A layer of the plan with its integers.

    Attributes:
        layer, same: as of network.Stage.
        convolutions: in order: of a block expand (where it has one), depthwise, project.
        constants: float32 [4], see csrc/inverted_residual.h.
        ranges: of what each convolution gives, of the mean; not of logits, which are no bytes.
    """

    layer: Layer
    same: bool
    convolutions: tuple[Convolution, ...]
    constants: Tensor
    ranges: tuple[Range, ...]

    def bytes(self) -> Tensor:
        """What the op `pack` takes of it: uint8."""
        parts = [t.contiguous().view(torch.uint8).flatten() for c in self.convolutions for t in c]
        return torch.cat([*parts, self.constants.view(torch.uint8)])


# ------------------------------------------------------------------------------------------------------ the integers


def _byte(t: Tensor) -> Tensor:
    return t.round().clamp(0, 255).to(torch.uint8)  # torch rounds ties to even


def _sums(x: Tensor, c: Convolution, **options: Any) -> Tensor:
    """float32(bias + sum of w * q), [N, out, H, W]: in float64 every sum is exact."""
    weight = c.weight.double().view(*c.weight.shape, *[1] * (4 - c.weight.dim()))
    return F.conv2d(x.double(), weight, c.bias.double(), **options).float()


def _scaled(sums: Tensor, multiplier: Tensor) -> Tensor:
    return sums * multiplier.view(1, -1, 1, 1)


def reference_layer(q: QuantizedLayer, x: Tensor, last: bool = True) -> tuple[Tensor, ...]:
    """What each convolution (or the mean) of a layer gives, the layer's result at the end: the definition.

    x is uint8 [N, C, H, W] or [N, C], the image float32. `last`: no layer follows.
    """
    layer, (first, second, third, _) = q.layer, q.constants
    pads = layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom
    if layer.kind == ops.CONV3X3:
        t = x * first + second
        image = _byte(torch.where(t > 0, t, 0.0))
        padded = F.pad(image, pads, value=int(second))
        sums = _sums(padded, q.convolutions[0], stride=layer.stride)
        return (_byte(_scaled(sums, q.convolutions[0].multiplier) + third),)
    if layer.kind == ops.POINTWISE:
        return (_byte(_scaled(_sums(x, q.convolutions[0]), q.convolutions[0].multiplier) + third),)
    if layer.kind == ops.POOL:
        pixels = x.shape[2] * x.shape[3]
        sums = (x.long().sum((2, 3)) - pixels * int(first)).float()
        mean = sums * (second / torch.tensor(float(pixels)))
        return (mean if last else _byte(mean + third),)
    if layer.kind == ops.LINEAR:
        return (_scaled(_sums(x[:, :, None, None], q.convolutions[0]), q.convolutions[0].multiplier).flatten(1),)
    results, h = [], x
    *expand, depthwise, project = q.convolutions
    outside = 0 if expand else int(first)
    if expand:
        h = _byte(_scaled(_sums(x, expand[0]), expand[0].multiplier))
        results.append(h)
    options = dict(stride=layer.stride, dilation=layer.dilation, groups=layer.hidden_channels)
    d = _byte(_scaled(_sums(F.pad(h, pads, value=outside), depthwise, **options), depthwise.multiplier))
    t = _scaled(_sums(d, project), project.multiplier)
    if layer.residual:
        t = t + x.float() * second
    return (*results, d, _byte(t + third))


# ------------------------------------------------------------------------------------------------------ float32 layers


class FloatLayer(NamedTuple):
    """A stage with its BatchNorms folded: (weight, bias) of each convolution, float64."""

    layer: Layer
    same: bool
    convolutions: tuple[tuple[Tensor, Tensor], ...]


def _stages(model: nn.Module) -> list[Stage]:
    if not isinstance(model, MobileNet):
        raise TypeError(f"a MobileNetV2 or MobileNetV1 of mnv2_fused can be quantised, not a {type(model).__name__}")
    if model._maps is not None:
        raise ValueError("a model with features_only=True gives maps: only one that ends in a mean can be quantised")
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise ValueError(
                f"this model cannot be quantised: a {type(module).__name__} in it has hooks or an own forward"
            )
    try:
        return _describe_network(model)
    except Unfusable as refusal:
        raise ValueError(f"this model cannot be quantised: {refusal}") from None


def _check_inference(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode: call eval() first")
    tensors = [*model.parameters(), *model.buffers()]
    if unlike := {(t.dtype, t.device.type) for t in tensors if t.is_floating_point()} - {(torch.float32, "cpu")}:
        raise ValueError(f"the model must be float32 on the CPU, it has tensors of {sorted(map(str, unlike))}")


def _fold(stages: list[Stage]) -> list[FloatLayer]:
    def folded(pair: tuple[nn.Module, nn.BatchNorm2d | None]) -> tuple[Tensor, Tensor]:
        weight, bias = network._fold(*pair)
        return weight.view(pair[0].weight.shape), bias

    return [FloatLayer(stage.layer, stage.same, tuple(map(folded, stage.weights))) for stage in stages]


def _float_layer(part: FloatLayer, x: Tensor) -> tuple[Tensor, ...]:
    """What each convolution (or the mean) of the layer gives in float32, as reference_layer does in integers."""
    layer = part.layer
    weights = [(w.float(), b.float()) for w, b in part.convolutions]
    if layer.kind == ops.POOL:
        return (x.mean((2, 3)),)
    if layer.kind == ops.LINEAR:
        return (F.linear(x, *weights[0]),)
    pads = layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom
    if layer.kind != ops.BLOCK:
        y = F.conv2d(F.pad(x, pads), *weights[0], layer.stride)
        return (y.clamp(0, 6) if layer.relu6 else y,)
    results, h = [], x
    if layer.expand:
        h = F.conv2d(x, *weights[0]).clamp(0, 6)
        results.append(h)
    d = F.conv2d(F.pad(h, pads), *weights[-2], layer.stride, 0, layer.dilation, layer.hidden_channels).clamp(0, 6)
    y = F.conv2d(d, *weights[-1])
    y = y + x if layer.residual else y
    return (*results, d, y.clamp(0, 6) if layer.relu6 else y)


def _sized(parts: Sequence[Any], height: int, width: int) -> Iterator[Any]:
    """The layers with the padding that an image of this size has where it depends on it."""
    for part in parts:
        layer = Stage(part.layer, (), part.same).at(height, width)
        yield part._replace(layer=layer)
        height, width = ops.output_size(layer, height, width)


def _float_tensors(parts: list[FloatLayer], x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "image", x
    for i, part in enumerate(_sized(parts, *x.shape[2:])):
        results = _float_layer(part, x)
        names = _names(part.layer) or ("mean",)
        for name, y in zip(names, results, strict=True):
            yield f"{i}.{name}", y
        x = results[-1]


# --------------------------------------------------------------------------------------------------------- calibration

_BINS = 4096
_CANDIDATES = 100


class _Histogram:
    """How often a tensor has which values, between its least and its largest, 0 always within."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def stretch(self, x: Tensor) -> None:
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))

    def count(self, x: Tensor) -> None:
        if self.high > self.low:
            self.counts += torch.histc(x.float(), _BINS, self.low, self.high).double()

    def range(self, method: str, percentile: float) -> Range:
        if not self.high > self.low:
            return Range(1.0, 0)
        if method == "max":
            return _range_of(self.low, self.high)
        step = (self.high - self.low) / _BINS
        if method == "percentile":
            share = self.counts.cumsum(0) / self.counts.sum()
            below = int((share < 1 - percentile / 100).sum()) * step
            above = (int((share < percentile / 100).sum()) + 1) * step
            return _range_of(min(self.low + below, 0.0), max(min(self.low + above, self.high), 0.0))
        # Values of a bin as if they stood at its middle.
        centers = self.low + step * (torch.arange(_BINS, dtype=torch.float64) + 0.5)
        candidates = [_range_of(self.low * i / _CANDIDATES, self.high * i / _CANDIDATES) for i in _shares()]
        errors = [float((self.counts * (_quantized(centers, c) - centers) ** 2).sum()) for c in candidates]
        return candidates[errors.index(min(errors))]


def _shares() -> range:
    return range(_CANDIDATES, _CANDIDATES // 10, -1)


def _range_of(low: float, high: float) -> Range:
    """Of 256 steps from low <= 0 to high >= 0, moved so that 0 is one of them."""
    scale = (high - low) / 255
    return Range(scale, round(-low / scale)) if scale > 0 else Range(1.0, 0)


def _quantized(x: Tensor, r: Range) -> Tensor:
    return r.scale * ((x / r.scale + r.zero_point).round().clamp(0, 255) - r.zero_point)


# ------------------------------------------------------------------------------------------------------- building


def _float32(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).float()


def _convolution(
    weight: Tensor, bias: Tensor, x: Range, scale: float | None, per_channel: bool, outside: bool = True
) -> Convolution:
    """The integers of a convolution of x whose output has this scale, None for logits.

    outside: the zero point of x is to be taken out of the sums.
    """
    rows = weight.flatten(1)
    largest = rows.abs().amax(1) if per_channel else rows.abs().max().expand(len(rows))
    # A bias that outweighs everything else must still fit: then the weights are but a few steps.
    weight_scale = torch.maximum(largest / _LARGEST_WEIGHT, bias.abs() / (x.scale * _LARGEST_BIAS))
    weight_scale = torch.where(weight_scale > 0, weight_scale, 1.0)
    q = (rows / weight_scale[:, None]).round().clamp(-_LARGEST_WEIGHT, _LARGEST_WEIGHT)
    integer = (bias / (x.scale * weight_scale)).round() - (x.zero_point * q.sum(1) if outside else 0)
    multiplier = x.scale * weight_scale / (1.0 if scale is None else scale)
    bound = 255 * q.abs().sum(1) + integer.abs()
    if scale is not None:  # so that what is rounded is below 2^31; only what saturates is changed
        multiplier = multiplier.minimum((1 << 30) / bound.clamp(min=1))
    found = Convolution(q.view_as(weight).to(torch.int8), integer.to(torch.int32), multiplier.float())
    if float(bound.max()) >= _SUM_LIMIT:
        raise ValueError(f"a sum of {rows.shape[1]} products does not fit into 32 bits")
    return found


def _build(parts: list[FloatLayer], ranges: dict[str, Range], per_channel: bool) -> QuantizedModel:
    layers, x = [], ranges["image"]
    for i, part in enumerate(parts):
        layer, last = part.layer, i + 1 == len(parts)
        convolutions: list[Convolution] = []
        given = x
        outputs: list[Range] = []
        for name, (weight, bias) in zip(_names(part.layer), part.convolutions, strict=True):
            y = None if layer.kind == ops.LINEAR else ranges[f"{i}.{name}"]
            convolutions.append(_convolution(weight, bias, x, y and y.scale, per_channel))
            if y is not None:
                outputs.append(y)
                x = y
        if layer.kind == ops.CONV3X3:
            constants = _float32(1 / given.scale, given.zero_point, x.zero_point, 0)
        elif layer.kind == ops.POOL:
            if not last:
                x = ranges[f"{i}.mean"]
                outputs.append(x)
            constants = _float32(given.zero_point, given.scale / (1 if last else x.scale), x.zero_point * (not last), 0)
        else:
            ratio = given.scale / x.scale if layer.residual else 0.0
            constants = _float32(given.zero_point, ratio, x.zero_point - ratio * given.zero_point, 0)
        layers.append(QuantizedLayer(layer, part.same, tuple(convolutions), constants, tuple(outputs)))
    return QuantizedModel(layers, ranges["image"])


def quantize(
    model: nn.Module,
    calibration_batches: Iterable[Tensor],
    *,
    per_channel: bool = True,
    method: str = "mse",
    percentile: float = 99.99,
) -> QuantizedModel:
    """The model in 8-bit integers, weights by rounding, activations by what they are on the calibration images.

    Args:
        model: a MobileNetV2 or MobileNetV1, float32 on the CPU, in eval mode; it is left as it is, and later changes
            of it do not reach the result.
        calibration_batches: images float32 [N, C, H, W] as the model is to see, some hundred of them; all are held at
            once, as they are gone through twice.
        per_channel: a weight scale for each output channel, else one for each weight tensor (which depthwise filters
            bear badly).
        method: the range of activations: "mse", that of the least mean squared error of rounding and saturation
            together; "percentile", what all but the outermost values lie in; "max", all.
        percentile: for "percentile", how many lie in it, of 100, on each side that has values.

    Raises:
        TypeError: the model is none of those.
        ValueError: it is in training mode, not float32 on the CPU, or no chain that runs fused (hooks, features_only);
            there are no batches, or one is no float32 [N, C, H, W] of the model's channels; an option is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
    stages = _stages(model)
    _check_inference(model)
    parts = _fold(stages)
    batches = list(calibration_batches)
    if not batches:
        raise ValueError("there are no calibration batches")
    for x in batches:
        _check_images(x, parts[0].layer.in_channels)
    histograms: dict[str, _Histogram] = {}
    with torch.no_grad():
        for name, x in (pair for batch in batches for pair in _float_tensors(parts, batch)):
            histograms.setdefault(name, _Histogram()).stretch(x)
        for name, x in (pair for batch in batches for pair in _float_tensors(parts, batch)):
            histograms[name].count(x)
    return _build(parts, {name: h.range(method, percentile) for name, h in histograms.items()}, per_channel)


def _check_images(x: Tensor, channels: int) -> None:
    fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == channels
    if not fits or x.dtype != torch.float32 or x.device.type != "cpu":
        found = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"images must be float32 [N, {channels}, H, W] on the CPU, got {found}")
    if x.numel() == 0 and 0 in x.shape[1:]:
        raise ValueError(f"images must have pixels, got {list(x.shape)}")


# ---------------------------------------------------------------------------------------------------------- the model


class QuantizedModel(nn.Module):
    """Images float32 [N, C, H, W] -> logits float32 [N, classes], in integers, one op call; made by `quantize`.

    For inference only: it has no parameters, and asking for gradients or for training mode is an error. An image's
    result is the same to the bit whatever the batch around it, the number of threads and the kernel (see the module).

    Attributes:
        layers: what it computes with; not to be changed.
        image: how images become bytes.
    """

    def __init__(self, layers: Sequence[QuantizedLayer], image: Range) -> None:
        super().__init__()
        self.layers, self.image = tuple(layers), image
        self.in_channels = self.layers[0].layer.in_channels
        self._packed: dict[str, Tensor] = {}  # by kernel
        self._plans: dict[tuple[object, ...], tuple[str, Tensor]] = {}  # and packed weights
        self._watch: _C.Watch | None = None
        super().train(False)

    def train(self, mode: bool = True) -> QuantizedModel:
        if mode:
            raise ValueError("an int8 model does not train: see prepare_qat")
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModel:
        moved = fn(torch.empty(0))
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            raise ValueError(
                f"an int8 model stays as it is on the CPU, it cannot be moved to {moved.dtype} on {moved.device}"
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}, "_plans": {}, "_watch": None}

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError where x is no float32 [N, C, H, W] on the CPU, or gradients to it are asked for."""
        if not is_dynamo_compiling() and (watch := self._watch) is not None:
            y = watch.call(self, x)
            if y is not None:
                return y
        _check_images(x, self.in_channels)
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError("gradients are asked for, which an int8 model does not give: call it in torch.no_grad()")
        key = os.environ.get("MNV2_FUSED_KERNEL"), *x.shape[2:]
        plan, packed = self._plans.get(key) or self._prepare(key)
        if not torch.is_grad_enabled() and not network.why_no_op(x):
            self._remember(x, key[0], plan, packed)
        return _NETWORK(x, packed, plan)

    def _remember(self, x: Tensor, kernel: str | None, plan: str, packed: Tensor) -> None:
        """`_watch` answers other calls like this one in one step, as long as they are in no_grad or inference mode."""
        watch = _C.Watch([], [], [], [])
        any_size = not any(q.same for q in self.layers)
        observed = _len_torch_dispatch_stack() > 0
        watch.remember(self, x, RemovableHandle.next_id, kernel, False, any_size, _NETWORK, packed, plan, observed)
        self._watch = watch

    def _prepare(self, key: tuple[object, ...]) -> tuple[str, Tensor]:
        layers = [q.layer for q in _sized(self.layers, *key[1:])]
        plan = ops.make_plan(layers, torch.int8)
        kernel = ops.selected_kernel(torch.int8)
        if kernel not in self._packed:
            self._packed[kernel] = torch.ops.mnv2_fused.pack(torch.cat([q.bytes() for q in self.layers]), plan)
        while len(self._plans) >= 64:
            self._plans.pop(next(iter(self._plans)), None)  # another thread may have been here first
        self._plans[key] = plan, self._packed[kernel]
        return self._plans[key]

    def reference(self, x: Tensor) -> Tensor:
        """The same in plain PyTorch operations: the definition, slow."""
        *_, (_, _, y) = self.reference_tensors(x)
        return y

    def reference_tensors(self, x: Tensor) -> Iterator[tuple[str, Range | None, Tensor]]:
        """Name, range (None where it is float32) and bytes of what each convolution gives, in order."""
        _check_images(x, self.in_channels)
        for i, q in enumerate(_sized(self.layers, *x.shape[2:])):
            results = reference_layer(q, x, i + 1 == len(self.layers))
            names = _names(q.layer) or ("mean",)
            ranges = q.ranges or (None,)
            for name, r, y in zip(names, ranges, results, strict=True):
                yield f"{i}.{name}", r, y
            x = results[-1]

    def save(self, path: str | os.PathLike) -> None:
        """A .safetensors file with weights, biases, multipliers, constants and scales; `load` reads it."""
        tensors = {"format": torch.tensor([_FORMAT]), "image": _range_tensor([self.image])}
        for i, q in enumerate(self.layers):
            tensors[f"{i}.layer"] = torch.tensor([*q.layer, int(q.same)])
            tensors[f"{i}.constants"] = q.constants
            tensors[f"{i}.ranges"] = _range_tensor(q.ranges)
            for name, c in zip(_names(q.layer), q.convolutions, strict=True):
                for part, tensor in c._asdict().items():
                    tensors[f"{i}.{name}.{part}"] = tensor.contiguous()
        safetensors.torch.save_file(tensors, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> QuantizedModel:
        """From a file of `save`. Raises weights.WeightsError for anything else; nothing in the file is executed."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path}: an int8 model is a .safetensors file")
        tensors = read_state_dict(path)
        try:
            return cls(*_read(tensors))
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from None

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, layers={len(self.layers)}, kernel={ops.selected_kernel(torch.int8)}"


_FORMAT = 1


def _range_tensor(ranges: Sequence[Range]) -> Tensor:
    return torch.tensor([[r.scale, r.zero_point] for r in ranges], dtype=torch.float64).view(-1, 2)


def _read(tensors: dict[str, Tensor]) -> tuple[list[QuantizedLayer], Range]:
    """Everything that the kernels and the reference rely on is checked here."""
    tensors = dict(tensors)

    def expect(ok: object, what: str) -> None:
        if not ok:
            raise WeightsError(what)

    def take(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        expect(name in tensors, f"{name} is missing")
        t = tensors.pop(name)
        expect(t.dtype == dtype and t.shape == shape, f"{name} is {t.dtype} {list(t.shape)}, not {dtype} {list(shape)}")
        expect(not dtype.is_floating_point or t.isfinite().all(), f"{name} holds values that are not finite")
        return t

    def ranges(name: str, count: int) -> tuple[Range, ...]:
        found = [Range(scale, int(zero)) for scale, zero in take(name, torch.float64, count, 2).tolist()]
        expect(all(r.scale > 0 and 0 <= r.zero_point <= 255 for r in found), f"{name} are no scales and zero points")
        return tuple(found)

    def convolution(name: str, shape: tuple[int, ...], logits: bool) -> Convolution:
        n = shape[0]
        c = Convolution(
            take(f"{name}.weight", torch.int8, *shape),
            take(f"{name}.bias", torch.int32, n),
            take(f"{name}.multiplier", torch.float32, n),
        )
        bound = 255.0 * c.weight.double().abs().flatten(1).sum(1) + c.bias.double().abs()
        expect((bound < _SUM_LIMIT).all(), f"{name}: sums that do not fit into 32 bits")
        fits = (c.multiplier >= 0) & (logits | (bound * c.multiplier.double() < _SUM_LIMIT / 2 + 1))
        expect(fits.all(), f"{name}.multiplier is too large or negative")
        return c

    expect(int(take("format", torch.int64, 1)) == _FORMAT, "a format of another version")
    (image,) = ranges("image", 1)
    count = sum(name.endswith(".layer") for name in tensors)
    expect(0 < count <= 4096, f"{count} layers")
    layers = []
    for i in range(count):
        *fields, same = take(f"{i}.layer", torch.int64, len(Layer._fields) + 1).tolist()
        layer = Layer(*fields)
        sizes = (layer.in_channels, layer.hidden_channels, layer.out_channels)
        expect(layer.kind in _CONVOLUTIONS and all(0 <= n <= 1 << 20 for n in sizes), f"{i}.layer is no layer")
        expect({layer.expand, layer.residual, layer.relu6, same} <= {0, 1}, f"{i}.layer has flags beside 0 and 1")
        expect(layer.kind != ops.BLOCK or layer.expand or layer.hidden_channels == layer.in_channels, f"{i}.layer")
        c, h, o = sizes
        shapes = {
            ops.CONV3X3: ((o, c, 3, 3),),
            ops.BLOCK: ((h, c, 1, 1), (h, 1, 3, 3), (o, h, 1, 1)),
            ops.POINTWISE: ((o, c, 1, 1),),
            ops.POOL: (),
            ops.LINEAR: ((o, c),),
        }[layer.kind]
        names = _names(layer)
        shapes = shapes[len(shapes) - len(names) :]  # a block's expansion is the first
        last = i + 1 == count
        given = 0 if layer.kind == ops.LINEAR or (layer.kind == ops.POOL and last) else max(len(names), 1)
        found = tuple(
            convolution(f"{i}.{name}", shape, layer.kind == ops.LINEAR)
            for name, shape in zip(names, shapes, strict=True)
        )
        constants = take(f"{i}.constants", torch.float32, 4)
        # In thousands of steps: the kernels round what they make of it to 32 bits. An image's scale may be any.
        steps = constants[1:] if layer.kind == ops.CONV3X3 else constants
        expect((steps.abs() < 1 << 20).all(), f"{i}.constants are too large")
        zero = float(constants[1 if layer.kind == ops.CONV3X3 else 0])
        expect(zero == int(zero) and 0 <= zero <= 255, f"{i}.constants have no zero point")
        layers.append(QuantizedLayer(layer, bool(same), found, constants, ranges(f"{i}.ranges", given)))
    expect(not tensors, f"unexpected: {', '.join(sorted(tensors)[:5])}")
    for before, q in zip(layers, layers[1:], strict=False):
        # The kernels take the 3x3 and such a block for one step, between which there is the 0 of a ReLU6.
        first = before.layer.kind == ops.CONV3X3 and q.layer.kind == ops.BLOCK and not q.layer.expand
        expect(not first or float(before.constants[2]) == float(q.constants[0]) == 0, "a zero point before ReLU6's")
    expect(layers[0].layer.kind == ops.CONV3X3, "the first layer is no 3x3 over an image")
    expect(layers[-1].layer.kind in (ops.POOL, ops.LINEAR), "the last layer is neither a mean nor a linear one")
    return layers, image


# ---------------------------------------------------------------------------------------------------------- the report


class LayerReport(NamedTuple):
    """How exact what a convolution (or the mean) gives is.

    Attributes:
        name: layer and convolution, "0.conv", "3.depthwise"; of a block's project with the shortcut added.
        scale, zero_point: of its bytes; None of logits and of a mean that is the result.
        saturated: the share of values at 255, or at 0 where that is not the value 0.
        snr_db: 10 log10 of the mean square of the float32 values over that of the differences from them. Of all before
            it together: its input is quantised too.
    """

    name: str
    scale: float | None
    zero_point: int | None
    saturated: float
    snr_db: float


class Report(NamedTuple):
    """`rows` in the order of the network; str() is a table."""

    rows: list[LayerReport]

    def __str__(self) -> str:
        lines = [f"{'layer':<16}{'scale':>12}{'zero':>6}{'saturated':>11}{'SNR, dB':>9}"]
        for row in self.rows:
            scale = "" if row.scale is None else f"{row.scale:.6f}"
            zero = "" if row.zero_point is None else row.zero_point
            lines.append(f"{row.name:<16}{scale:>12}{zero:>6}{row.saturated:>11.3%}{row.snr_db:>9.1f}")
        return "\n".join(lines)


def report(quantized: QuantizedModel, model: nn.Module, images: Tensor) -> Report:
    """The signal-to-noise ratio of every layer on these images against the float32 model that was quantised."""
    _check_images(images, quantized.in_channels)
    parts, rows = _fold(_stages(model)), []
    _check_inference(model)
    if [part.layer for part in parts] != [q.layer for q in quantized.layers]:
        raise ValueError("the float32 model has other layers than the quantised one")
    with torch.no_grad():
        exact = _float_tensors(parts, images)
        next(exact)  # the image
        for (name, r, y), (_, value) in zip(quantized.reference_tensors(images), exact, strict=True):
            found, value = y.double() if r is None else r.dequantize(y), value.double()
            noise, signal = float((found - value).square().mean()), float(value.square().mean())
            snr = 10 * torch.tensor(signal / noise).log10().item() if noise > 0 else float("inf")
            edge = 0.0
            if r is not None:
                edge = float(((y == 255) | ((y == 0) & (r.zero_point > 0))).double().mean())
            rows.append(LayerReport(name, r and r.scale, r and r.zero_point, edge, snr))
    return Report(rows)


# ------------------------------------------------------------------------------------------------------------ training


def prepare_qat(model: nn.Module, *, per_channel: bool = True, averaging: float = 0.01) -> QATModel:
    """The model as it trains for 8-bit integers: see QATModel. Its parameters are the model's own.

    Args:
        model: a MobileNetV2 or MobileNetV1, best a trained one; its modules are used, and trained, where they are.
        per_channel: as of `quantize`.
        averaging: how much of the least and the largest value of a batch goes into the moving averages.

    Raises:
        TypeError, ValueError: as `quantize`, but that the model may be in training mode and on any device.
    """
    if not 0 < averaging <= 1:
        raise ValueError(f"averaging must be above 0 and at most 1, got {averaging}")
    return QATModel(model, per_channel, averaging)


class QATModel(nn.Module):
    """Quantisation-aware training: in float, layer by layer, with weights and activations rounded as int8 rounds them.

    Rounding passes gradients on as if it were not there, saturation stops them. Weights are rounded with the running
    statistics of their BatchNorm folded in; the BatchNorm itself normalises by the batch in training mode, as ever.
    Activations are rounded in ranges that are moving averages of the batches' least and largest values, which follow
    in training mode and stay in eval mode. Biases are not rounded: int8 has them in 32 bits. In eval mode the result is
    that of the int8 model but for float32 rounding, which moves a value across the edge of a step now and then.

    Attributes:
        model: the model that is trained.
    """

    def __init__(self, model: nn.Module, per_channel: bool, averaging: float) -> None:
        super().__init__()
        self._stages = _stages(model)
        self.model, self.per_channel, self.averaging = model, per_channel, averaging
        names = ["image"]
        for i, stage in enumerate(self._stages):
            kind = stage.layer.kind
            names += [f"{i}.{name}" for name in _names(stage.layer) if kind != ops.LINEAR]
            names += [f"{i}.mean"] * (kind == ops.POOL)
        self._places = {name: i for i, name in enumerate(names)}
        self.register_buffer("lows", torch.zeros(len(names)))
        self.register_buffer("highs", torch.zeros(len(names)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def _weight(self, conv: nn.Module, norm: nn.BatchNorm2d | None) -> Tensor:
        weight, factor = conv.weight, torch.ones(len(conv.weight), device=conv.weight.device)
        if norm is not None:
            factor = (norm.running_var + norm.eps).rsqrt()
            factor = factor if norm.weight is None else factor * norm.weight.detach()
            factor = torch.where(factor == 0, 1.0, factor)
        factor = factor.view(-1, *[1] * (weight.dim() - 1))
        folded = weight * factor
        largest = folded.detach().flatten(1).abs().amax(1)
        largest = largest if self.per_channel else largest.max().expand(len(largest))
        scale = torch.where(largest > 0, largest / _LARGEST_WEIGHT, 1.0).contiguous()
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(folded, scale, zero, 0, -_LARGEST_WEIGHT, _LARGEST_WEIGHT)
        return rounded / factor

    def _round(self, name: str, x: Tensor) -> Tensor:
        place = self._places[name]
        low, high = self.lows[place], self.highs[place]
        if self.training:
            with torch.no_grad():
                share = 1.0 if self.batches == 0 else self.averaging
                low += share * (x.min().clamp(max=0) - low)
                high += share * (x.max().clamp(min=0) - high)
        r = self._range(name)
        return torch.fake_quantize_per_tensor_affine(x, r.scale, r.zero_point, 0, 255)

    def _range(self, name: str) -> Range:
        place = self._places[name]
        return _range_of(float(self.lows[place]), float(self.highs[place]))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]. ValueError in eval mode before a batch in training mode."""
        if not self.training and self.batches == 0:
            raise ValueError("no ranges yet: at least one batch must have gone through in training mode")
        x = self._round("image", x)
        for i, stage in enumerate(self._stages):
            layer = stage.layer
            if layer.kind == ops.POOL:
                x = x.mean((2, 3))
                x = x if i + 1 == len(self._stages) else self._round(f"{i}.mean", x)
                continue
            y = x
            for name, (conv, norm) in zip(_names(layer), stage.weights, strict=True):
                weight = self._weight(conv, norm)
                if layer.kind == ops.LINEAR:
                    y = F.linear(y, weight, conv.bias)
                    break
                padded = isinstance(conv, network.Conv2dSame)
                y = conv.pad(y) if padded else y
                padding = 0 if padded else conv.padding
                y = F.conv2d(y, weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
                y = y if norm is None else norm(y)
                if name == "project":
                    y = y + x if layer.residual else y
                    y = F.relu6(y) if layer.relu6 else y
                else:
                    y = F.relu6(y)
                y = self._round(f"{i}.{name}", y)
            x = y
        if self.training:
            self.batches += 1
        return x

    def convert(self) -> QuantizedModel:
        """The int8 model. ValueError in training mode, before any batch, or where the model is not on the CPU."""
        _check_inference(self)
        if self.batches == 0:
            raise ValueError("no ranges yet: at least one batch must have gone through in training mode")
        return _build(_fold(self._stages), {name: self._range(name) for name in self._places}, self.per_channel)
