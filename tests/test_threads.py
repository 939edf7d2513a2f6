"""How threads share one image: what each of them multiplies, counted on paper, and that nobody's share is missed.

That results are right, and their bits the same with any number of threads, is tested beside the ops and networks.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch

import mnv2_fused
from mnv2_fused import _C, MobileNetV2, ops
from mnv2_fused.ops import BLOCK, CONV3X3, POINTWISE, POOL, Layer

NETWORKS = ((1.0, 224), (0.35, 96), (1.4, 224))
THREADS = (2, 3, 4, 7, 8, 16)
PANEL = 32  # channels, of avx512_f32
REACH = 3  # rows of h under the filter; a network of these strides has no dilation

Piece = tuple[int, int, int, int]  # first channel, end, first row, end


class Step(NamedTuple):
    """What is computed as one: a block, maybe with the stem before it, or a 1x1."""

    layer: Layer
    stem: Layer | None
    height: int  # of h and of a 1x1
    width: int
    macs: int
    shares: list[list[Piece]]  # of each thread

    @property
    def out_rows(self) -> int:
        return ops.output_size(self.layer, self.height, self.width)[0]

    def h_row(self, channels: int) -> int:
        """Multiply-adds of a row of h."""
        inputs = 9 * self.stem.in_channels if self.stem else self.layer.in_channels * self.layer.expand
        return self.width * channels * inputs

    def out_row(self, channels: int) -> int:
        """Of a row of the filter and the projection, or of a 1x1 (whose channels are the output's)."""
        layer = self.layer
        if layer.kind == POINTWISE:
            return self.width * channels * layer.in_channels
        return ops.output_size(layer, self.height, self.width)[1] * channels * (9 + layer.out_channels)

    def work(self, piece: Piece) -> int:
        """All that a thread multiplies for a piece: of h every row that one of its output rows reads."""
        (c0, c1, row0, row1), layer = piece, self.layer
        h_rows = 0
        if layer.kind == BLOCK:
            top, bottom = row0 * layer.stride - layer.pad_top, (row1 - 1) * layer.stride - layer.pad_top + REACH
            h_rows = min(bottom, self.height) - max(top, 0)
        return h_rows * self.h_row(c1 - c0) + (row1 - row0) * self.out_row(c1 - c0)

    @property
    def busiest(self) -> int:
        return max(sum(map(self.work, pieces)) for pieces in self.shares)

    def bound(self) -> float:
        """What one thread may have to do. A 1x1 is shared by panels. A block is shared evenly, with as much for its
        last panel as for the others, but a slice begins and ends at a whole row of a group, half a row of it away at
        most; and of h it computes what its neighbours compute too, REACH - stride rows at both its ends together."""
        layer, threads = self.layer, len(self.shares)
        if layer.kind == POINTWISE:
            panels = -(-layer.out_channels // PANEL)
            return min(-(-panels // threads) * PANEL, layer.out_channels) * self.out_row(1) * self.height
        hidden = layer.hidden_channels
        group = max(c1 - c0 for pieces in self.shares for c0, c1, _, _ in pieces)
        even = self.macs / threads * (-(-hidden // PANEL) * PANEL / hidden)
        one_row = self.out_row(group) + layer.stride * self.h_row(group)
        return min(self.macs, even + one_row + (REACH - layer.stride) * self.h_row(group))


@cache
def layers_of(width: float, size: int) -> list[Layer]:
    with torch.no_grad():
        found = MobileNetV2(width_mult=width).eval().layer_seconds(torch.zeros(1, 3, size, size))
    return [layer for layer, _, _ in found]


def steps(width: float, size: int, threads: int, kernel: str = "avx512_f32") -> list[Step]:
    found, first, height = [], 0, size
    layers = layers_of(width, size)
    for last, shares in _C.slices(kernel, layers, size, size, threads):
        stem, macs = None, 0
        for layer in layers[first : last + 1]:
            if layer.kind == POOL:
                continue
            macs += ops.multiply_adds(layer, height, height)
            if layer.kind == CONV3X3:
                stem = layer
            else:
                found.append(Step(layer, stem, height, height, macs, shares))
            height, _ = ops.output_size(layer, height, height)
        first = last + 1
    assert [step.layer for step in found] == [layer for layer in layers if layer.kind in (BLOCK, POINTWISE)]
    return found


@pytest.fixture
def avx512() -> None:
    if not any(row.name == "avx512_f32" and row.supported for row in mnv2_fused.kernels()):
        pytest.skip("counts panels of avx512_f32")


@pytest.mark.parametrize("kernel", [row.name for row in mnv2_fused.kernels() if row.supported])
@pytest.mark.parametrize(("width", "size"), NETWORKS)
def test_every_output_is_one_threads(kernel: str, width: float, size: int) -> None:
    for threads in (1, *THREADS):
        for step in steps(width, size, threads, kernel):
            layer = step.layer
            channels = layer.hidden_channels if layer.kind == BLOCK else layer.out_channels
            times = torch.zeros(channels, step.out_rows)
            for pieces in step.shares:
                for c0, c1, row0, row1 in pieces:
                    times[c0:c1, row0:row1] += 1
            assert (times == 1).all(), (threads, step)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(("width", "size"), NETWORKS)
def test_balance(avx512: None, width: float, size: int, threads: int) -> None:
    for step in steps(width, size, threads):
        assert step.busiest <= step.bound(), (
            step.busiest * threads / step.macs,
            step.bound() * threads / step.macs,
            step,
        )


@pytest.mark.parametrize(("width", "size"), NETWORKS)
def test_one_thread_computes_nothing_twice(avx512: None, width: float, size: int) -> None:
    assert all(step.busiest == step.macs for step in steps(width, size, 1))


def test_two_threads_meet_between_groups(avx512: None) -> None:
    """Of MobileNetV2's small planes, whose hidden channels are all an even number of panels, each has exactly half."""
    small = [step for step in steps(1.0, 224, 2) if step.height <= 14]
    assert len(small) == 11 and all(2 * step.busiest == step.macs for step in small)
