"""Inverted residuals to test with: their tensors in every layout, what they should give, and how exactly.

`expected` is written apart from `mnv2_fused.ops`, so that the op's own reference is tested as well.
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mnv2_fused import ops
from mnv2_fused.mobilenet_v2 import INVERTED_RESIDUAL_SETTING, STEM_CHANNELS

LAYOUTS = ("channels_last", "contiguous", "transposed", "channel_slice", "crop", "expanded_batch", "expanded_pixels")
DENSE = ("channels_last", "contiguous")

# One below, at and above the vector widths, the tiles (4 x 24, 14 x 32) and their halves, and small primes.
EDGES = (1, 2, 3, 5, 7, 8, 13, 14, 15, 16, 17, 23, 24, 25, 27, 28, 29, 31, 32, 33, 47, 48, 49)


@dataclass(frozen=True)
class Block:
    """The arguments of one call, as numbers: prints as what reproduces it."""

    in_channels: int
    hidden_channels: int
    out_channels: int
    height: int
    width: int
    batch: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int | tuple[int, int, int, int] = 1
    expand: bool = True
    residual: bool = False
    project_relu6: bool = False
    layout: str = "channels_last"
    integers: bool = False

    @property
    def options(self) -> dict[str, Any]:
        names = ("stride", "dilation", "padding", "residual", "project_relu6")
        return {name: getattr(self, name) for name in names}

    @property
    def id(self) -> str:
        """Short, for test ids."""
        channels = f"{self.in_channels}-{self.hidden_channels}-{self.out_channels}" + "-t1" * (not self.expand)
        flags = "+x" * self.residual + "-relu6" * self.project_relu6
        return f"{channels}-{self.height}x{self.width}-s{self.stride}-d{self.dilation}{flags}"

    @property
    def multiply_adds(self) -> int:
        return self.batch * self.height * self.width * self.hidden_channels * (self.in_channels + self.out_channels)

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, ...]:
        """x, expand, depthwise and project weight and bias; both sides of both ReLU6 are reached."""
        random = torch.Generator().manual_seed(zlib.crc32(repr(astuple(self)).encode()))
        hidden = self.hidden_channels

        def weight(*shape: int) -> Tensor:
            fan_in = shape[1] * shape[2] * shape[3]
            if self.integers:
                keep = torch.rand(shape, generator=random) < 6 / fan_in
                return torch.randint(-2, 3, shape, generator=random).to(dtype) * keep
            return torch.randn(shape, generator=random, dtype=dtype) * 3 / fan_in**0.5

        def bias(n: int) -> Tensor:
            if self.integers:
                return torch.randint(-1, 4, (n,), generator=random).to(dtype)
            return torch.randn(n, generator=random, dtype=dtype) + 1

        x = self._image(random, dtype)
        expand = (weight(hidden, self.in_channels, 1, 1), bias(hidden)) if self.expand else (None, None)
        depthwise = weight(hidden, 1, 3, 3), bias(hidden)
        return x, *expand, *depthwise, weight(self.out_channels, hidden, 1, 1), bias(self.out_channels)

    def _image(self, random: torch.Generator, dtype: torch.dtype) -> Tensor:
        n, c, h, w = self.batch, self.in_channels, self.height, self.width

        def fill(*shape: int) -> Tensor:
            if self.integers:
                return torch.randint(-3, 4, shape, generator=random).to(dtype)
            return torch.randn(shape, generator=random, dtype=dtype)

        nan = float("nan")  # around the view: reading there must not go unnoticed
        if self.layout == "contiguous":
            return fill(n, c, h, w)
        if self.layout == "transposed":
            return fill(n, c, w, h).transpose(2, 3)
        if self.layout == "channel_slice":
            around = torch.full((n, h, w, c + 5), nan, dtype=dtype)
            around[..., 3 : 3 + c] = fill(n, h, w, c)
            return around[..., 3 : 3 + c].permute(0, 3, 1, 2)
        if self.layout == "crop":
            around = torch.full((n, c, h + 3, w + 4), nan, dtype=dtype)
            around[:, :, 1 : 1 + h, 2 : 2 + w] = fill(n, c, h, w)
            return around[:, :, 1 : 1 + h, 2 : 2 + w]
        if self.layout == "expanded_batch":
            return fill(1, h, w, c).permute(0, 3, 1, 2).expand(n, c, h, w)
        if self.layout == "expanded_pixels":
            return fill(n, c, 1, 1).expand(n, c, h, w)
        return fill(n, h, w, c).permute(0, 3, 1, 2)


def network_blocks(resolution: int = 224) -> list[Block]:
    """The 17 blocks of MobileNetV2 1.0, at their true sizes."""
    blocks, channels, size = [], STEM_CHANNELS, -(-resolution // 2)
    for t, c, n, s in INVERTED_RESIDUAL_SETTING:
        for i in range(n):
            stride = s if i == 0 else 1
            residual = stride == 1 and channels == c
            blocks.append(Block(channels, channels * t, c, size, size, stride=stride, expand=t != 1, residual=residual))
            channels, size = c, -(-size // stride)
    return blocks


def expected(tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it a result computed in the tensors' dtype may be, element by element.

    A sum of K products, a bias and a residual in any order and any grouping passes each product through at most
    n = K + 2 roundings of relative size u, so that with S the same sum over absolute values

        |computed - exact| <= n u S           always (to first order in u),
                           <= 4 sqrt(n) u S   but for a chance of 2 n exp(-8) at most, roundings being as good as
                                              independent (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).

    The smaller of the two is taken; S is far above the partial sums of random data, so that the second does not fail
    either. ReLU6 never enlarges an error. An error e of an operand contributes |w| e; those of the hidden channels
    come from different weights and are as good as independent, so that in the projection sum |w| e may be replaced by
    4 sqrt(sum (w e)^2) where that is smaller. u is half the dtype's epsilon, plus float64's own for the reference.

    bfloat16 is added up in float32, whose epsilon counts then; d and y are rounded to bfloat16, once each, by at most
    half of bfloat16's epsilon of their size (h is not: it stays float32). Products of two of its numbers are exact.
    """
    x, we, be, wd, bd, wp, bp = (None if t is None else t.double() for t in tensors)
    dtype = tensors[0].dtype
    narrow = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 0.0
    u = (torch.finfo(torch.float32 if narrow else dtype).eps + torch.finfo(torch.float64).eps) / 2

    def rounding(terms: int) -> float:
        n = terms + 2
        return u * min(n, 4 * n**0.5)

    def finite(error: Tensor) -> Tensor:
        """No rounding where the exact value is infinite or NaN; ReLU6 makes 6 of infinity again."""
        return torch.where(error.isfinite(), error, 0.0)

    sides = options["padding"]
    sides = (sides,) * 4 if isinstance(sides, int) else tuple(sides)
    h, error = x, torch.zeros_like(x)
    if we is not None:
        h = F.conv2d(x, we, be)
        error = finite(rounding(we.shape[1]) * F.conv2d(x.abs(), we.abs(), be.abs()))
        h = h.clamp(0, 6)
    h, error = F.pad(h, sides), F.pad(error, sides)

    def depthwise(t: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(t, weight, bias, options["stride"], 0, options["dilation"], weight.shape[0])

    d = depthwise(h, wd, bd).clamp(0, 6)
    error = depthwise(error, wd.abs()) + rounding(9) * depthwise(h.abs() + error, wd.abs(), bd.abs())
    error = finite(error + narrow * (d.abs() + error))
    y = F.conv2d(d, wp, bp)
    magnitude = F.conv2d(d.abs() + error, wp.abs(), bp.abs())
    carried = torch.minimum(F.conv2d(error, wp.abs()), 4 * F.conv2d(error**2, wp**2).sqrt())
    if options["residual"]:
        y, magnitude = y + x, magnitude + x.abs()
    error = carried + rounding(wp.shape[1]) * magnitude
    error = finite(error + narrow * (y.abs() + error))
    return y.clamp(0, 6) if options["project_relu6"] else y, error


def check_close(actual: Tensor, value: Tensor, bound: Tensor | float, what: object = "") -> None:
    """|actual - value| <= bound everywhere, NaN and infinities where they should be; names the worst element."""
    assert actual.shape == value.shape, f"shape {list(actual.shape)}, expected {list(value.shape)}: {what}"
    if actual.numel() == 0:
        return
    actual, bound = actual.double(), torch.as_tensor(bound, dtype=torch.float64).expand_as(value)
    same = (actual == value) | (actual.isnan() & value.isnan())
    excess = torch.where(same, 0.0, (actual - value).abs() - bound)
    excess = torch.where(excess.isnan() | excess.isinf(), float("inf"), excess)
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), value.shape))
        wrong = int((excess > 0).sum())
        raise AssertionError(
            f"{wrong} of {value.numel()} elements are off, the worst at {at} of {list(value.shape)}: {actual[at]:.9g}, "
            f"expected {value[at]:.9g} +- {bound[at]:.3g}: {what}"
        )


CONVOLUTIONS = {  # layers of a plan, and the size of the image
    "3x3": ([ops.Layer(ops.CONV3X3, 3, 0, 20, 1, 1, 1, 1, 1, 1)], (9, 7)),
    "3x3, stride 2, uneven padding": ([ops.Layer(ops.CONV3X3, 5, 0, 33, 2, 1, 0, 1, 2, 1)], (8, 11)),
    "1x1": ([ops.Layer(ops.POINTWISE, 9, 0, 70)], (5, 6)),
    "1x1 and mean": ([ops.Layer(ops.POINTWISE, 9, 0, 70), ops.Layer(ops.POOL, 70, 0, 70)], (5, 6)),
    "3x3 and a block": (
        [ops.Layer(ops.CONV3X3, 3, 0, 16, 2, 1, 1, 1, 1, 1), ops.Layer(ops.BLOCK, 16, 16, 8, 1, 1, 1, 1, 1, 1)],
        (9, 7),
    ),
}


def convolutions(
    layers: list[ops.Layer], size: tuple[int, int], relu6: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Two images, the weights of the layers in one row, and what comes out, in float64; linear where relu6 is 0.

    Images and weights are numbers of `dtype`.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()

    x = y = normal(2, layers[0].in_channels, *size)
    weights: list[Tensor] = []
    for layer in layers:
        channels, hidden, out = layer[1:4]
        if layer.kind == ops.POOL:
            y = y.mean((2, 3))
            continue
        padded = F.pad(y, layer[6:10])
        if layer.kind == ops.BLOCK:
            found = [normal(hidden, 1, 3, 3) / 4, normal(hidden), normal(out, hidden, 1, 1), normal(out)]
            y = F.conv2d(F.conv2d(padded, *found[:2], layer.stride, groups=hidden).clamp(0, 6), *found[2:])
        else:
            taps = 3 if layer.kind == ops.CONV3X3 else 1
            found = [normal(out, channels, taps, taps), normal(out)]
            y = F.conv2d(padded, *found, layer.stride)
        weights += found
        y = y.clamp(0, 6) if relu6 else y
    return x, torch.cat([w.flatten() for w in weights]), y
