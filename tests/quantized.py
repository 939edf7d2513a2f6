"""Layers in random integers to test the int8 kernels with: all of their bytes in use, on both sides of saturation."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from blocks import Block
from torch import Tensor

from mnv2_fused import ops
from mnv2_fused.ops import Layer
from mnv2_fused.quantization import Convolution, QuantizedLayer, reference_layer


def _random(seed: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def convolution(random: torch.Generator, *shape: int, zero: int) -> Convolution:
    """Of bytes around 128 whose zero point is `zero`; what comes out has a standard deviation of about 80 steps."""
    n, k = shape[0], shape[1] * shape[2] * shape[3]
    weight = torch.randint(-127, 128, shape, generator=random).to(torch.int8)
    spread = 73.0 * 74.0 * k**0.5  # of the sums of random bytes
    middle = (128 - zero) * weight.long().flatten(1).sum(1)
    bias = torch.randint(-int(spread), int(spread) + 1, (n,), generator=random) - 128 * weight.long().flatten(1).sum(1)
    bias = bias + middle * torch.randint(0, 2, (n,), generator=random)
    multiplier = (torch.rand(n, generator=random) + 0.5) * 80 / spread
    return Convolution(weight, bias.to(torch.int32), multiplier)


def _one_scale(random: torch.Generator, c: Convolution) -> Convolution:
    return c._replace(multiplier=c.multiplier.mean().repeat(len(c.multiplier)))


def _ties(random: torch.Generator, c: Convolution) -> Convolution:
    """Powers of two, and so many sums that lie in the middle between two bytes."""
    return c._replace(multiplier=torch.exp2(c.multiplier.log2().round()))


def _largest(random: torch.Generator, c: Convolution) -> Convolution:
    """Weights of -127 and 127, sums up to the last of 32 bits, and multipliers that a file may just have."""
    weight = torch.where(c.weight < 0, -127, 127).to(torch.int8)
    room = 2**31 - 1 - 255 * 127 * weight[0].numel()
    share = torch.rand(len(weight), generator=random, dtype=torch.float64) * 2 - 1
    share[torch.rand(len(weight), generator=random) < 0.3] = 1.0
    bias = (share * room).round()
    largest = ((1 << 30) / (bias.abs() + 2**31 - 1 - room)).float()
    multiplier = torch.where(torch.rand(len(weight), generator=random) < 0.5, largest, largest * 3e-7)
    return Convolution(weight, bias.to(torch.int32), multiplier)


def _least(random: torch.Generator, c: Convolution) -> Convolution:
    """Channels of weights 0, of multipliers 0 and of such as are far below a step."""
    dead = torch.rand(len(c.weight), generator=random) < 0.4
    weight = torch.where(dead.view(-1, 1, 1, 1), 0, c.weight)
    tiny = torch.tensor([0.0, 1e-30, 1e-9])[torch.randint(0, 3, (len(weight),), generator=random)]
    return c._replace(weight=weight, multiplier=torch.where(dead.roll(1), tiny, c.multiplier))


NUMBERS = {"usual": lambda random, c: c, "one scale": _one_scale, "ties": _ties, "largest": _largest, "least": _least}


def block_layer(block: Block, zero: int | None = None, numbers: str = "usual") -> QuantizedLayer:
    """`numbers` is one of NUMBERS; beside the usual ones zero points are often at an end."""
    random = _random(block)
    zero = int(torch.randint(0, 256, (), generator=random)) if zero is None else zero
    if numbers != "usual":
        zero = (0, 255, zero)[int(torch.randint(0, 3, (), generator=random))]
    c, h, o = block.in_channels, block.hidden_channels, block.out_channels
    expand = (convolution(random, h, c, 1, 1, zero=zero),) if block.expand else ()
    depthwise = convolution(random, h, 1, 3, 3, zero=0 if block.expand else zero)
    sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
    layer = Layer(
        ops.BLOCK, c, h, o, block.stride, block.dilation, *sides,
        int(block.expand), int(block.residual), int(block.project_relu6),
    )  # fmt: skip
    ratio = 0.3 + float(torch.rand((), generator=random)) if block.residual else 0.0
    values = torch.tensor([zero, ratio, 128 - ratio * zero, 0.0])
    if numbers == "ties":
        values = torch.tensor([zero, 0.5 * block.residual, 128.5, 0.0])
    if numbers == "largest":
        values = torch.tensor([zero, 1e6 * block.residual, -1e6, 0.0])
    convolutions = (*expand, depthwise, convolution(random, o, h, 1, 1, zero=0))
    return QuantizedLayer(layer, False, tuple(NUMBERS[numbers](random, c) for c in convolutions), values, ())


def block_input(block: Block) -> Tensor:
    """uint8 [N, C, H, W] in channels_last."""
    shape = block.batch, block.height, block.width, block.in_channels
    x = torch.randint(0, 256, shape, generator=_random((block, "x")), dtype=torch.uint8)
    return x.permute(0, 3, 1, 2)


def conv_layer(channels: int, out: int, stride: int, padding: tuple[int, int, int, int]) -> QuantizedLayer:
    """A 3x3 over an image of values from -1 to 1."""
    random = _random((channels, out, stride, padding))
    c = convolution(random, out, channels, 3, 3, zero=100)
    layer = Layer(ops.CONV3X3, channels, 0, out, stride, 1, *padding, relu6=1)
    return QuantizedLayer(layer, False, (c,), torch.tensor([90.0, 100.0, 0.0, 0.0]), ())


def pointwise_layer(channels: int, out: int, relu6: int = 1) -> QuantizedLayer:
    c = convolution(_random((channels, out)), out, channels, 1, 1, zero=7)
    values = torch.tensor([0.0, 0.0, 0.0 if relu6 else 120.0, 0.0])
    return QuantizedLayer(Layer(ops.POINTWISE, channels, 0, out, relu6=relu6), False, (c,), values, ())


def pool_layer(channels: int, zero: int = 0) -> QuantizedLayer:
    return QuantizedLayer(Layer(ops.POOL, channels, 0, channels), False, (), torch.tensor([zero, 1.3, 9.0, 0.0]), ())


def linear_layer(channels: int, out: int) -> QuantizedLayer:
    c = convolution(_random((channels, out, "linear")), out, channels, 1, 1, zero=9)
    return QuantizedLayer(
        Layer(ops.LINEAR, channels, 0, out), False, (c._replace(weight=c.weight.flatten(1)),), torch.zeros(4), ()
    )


def run(layers: list[QuantizedLayer], x: Tensor) -> Tensor:
    """On the selected int8 kernel."""
    plan = ops.make_plan([q.layer for q in layers], torch.int8)
    packed = torch.ops.mnv2_fused.pack(torch.cat([q.bytes() for q in layers]), plan)
    return torch.ops.mnv2_fused.network(x, packed, plan)


def reference(layers: list[QuantizedLayer], x: Tensor) -> Tensor:
    for i, q in enumerate(layers):
        x = reference_layer(q, x, i + 1 == len(layers))[-1]
    return x


def exact_block(q: QuantizedLayer, x: Tensor) -> Tensor:
    """What a block makes of uint8 [N, C, H, W], in NumPy: an own way to the definition in quantization.py."""
    layer, (zero, ratio, offset, _) = q.layer, q.constants.numpy()

    def byte(t: np.ndarray) -> np.ndarray:
        assert t.dtype == np.float32
        return np.clip(np.rint(t), 0, 255).astype(np.int64)

    def scaled(sums: np.ndarray, c: Convolution) -> np.ndarray:
        sums = sums.astype(np.int64) + c.bias.numpy().astype(np.int64)
        assert np.abs(sums).max(initial=0) < 1 << 31
        return sums.astype(np.float32) * c.multiplier.numpy()

    def matrix(x: np.ndarray, c: Convolution) -> np.ndarray:
        return x.astype(np.float64) @ c.weight.flatten(1).numpy().astype(np.float64).T  # exact far beyond 32 bits

    given = h = x.permute(0, 2, 3, 1).numpy().astype(np.int64)
    *expand, depthwise, project = q.convolutions
    if expand:
        h = byte(scaled(matrix(h, expand[0]), expand[0]))
    sides = (0, 0), (layer.pad_top, layer.pad_bottom), (layer.pad_left, layer.pad_right), (0, 0)
    h = np.pad(h, sides, constant_values=0 if expand else int(zero))
    height, width = ((n - 2 * layer.dilation - 1) // layer.stride + 1 for n in h.shape[1:3])
    sums = np.zeros((len(h), height, width, h.shape[3]), np.int64)
    for ky in range(3):
        for kx in range(3):
            top, left = ky * layer.dilation, kx * layer.dilation
            rows = slice(top, top + (height - 1) * layer.stride + 1, layer.stride)
            columns = slice(left, left + (width - 1) * layer.stride + 1, layer.stride)
            sums += h[:, rows, columns] * depthwise.weight[:, 0, ky, kx].numpy().astype(np.int64)
    d = byte(scaled(sums, depthwise))
    t = scaled(matrix(d, project), project)
    if layer.residual:
        t = t + given.astype(np.float32) * ratio
    return torch.from_numpy(byte(t + offset)).to(torch.uint8).permute(0, 3, 1, 2)


def check_equal(actual: Tensor, value: Tensor, what: object = "") -> None:
    assert actual.dtype == value.dtype and actual.shape == value.shape, what
    wrong = (actual != value) & ~((actual != actual) & (value != value))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        count = f"{int(wrong.sum())} of {value.numel()} elements differ"
        raise AssertionError(f"{count}, the first at {at}: {actual[at]}, expected {value[at]}: {what}")
