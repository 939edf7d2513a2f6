"""Parameters and multiply-adds of the widths and sizes that the paper's authors published, counted to the last one."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused

GRID = json.loads(Path(__file__).with_name("data").joinpath("classification_grid.json").read_text())["rows"]


@cache
def model_of(width: float) -> mnv2_fused.MobileNetV2:
    return mnv2_fused.MobileNetV2(width_mult=width).eval()


@pytest.mark.parametrize(("width", "resolution", "parameters", "millions"), GRID)
def test_row(width: float, resolution: int, parameters: int, millions: float) -> None:
    model = model_of(width)
    assert sum(p.numel() for p in model.parameters()) == parameters
    counts = {}
    for fused in (True, False):
        model.fused = fused
        # A fused network runs on memory only; its count does not depend on the values.
        x = torch.zeros(2, 3, resolution, resolution)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            assert (model.why_not_fused(x) == "") == fused
            model(x)
        names = {str(op) for op in counter.get_flop_counts()["Global"]}
        assert names == ({"mnv2_fused.network"} if fused else {"aten.convolution", "aten.addmm"})
        counts[fused] = counter.get_total_flops() / 2 / len(x)  # torch counts a multiply-add as two
    assert counts[True] == counts[False]
    assert round(counts[True] / 1e6, 2) == millions


def test_the_grid_is_whole() -> None:
    assert len(GRID) == 22
    assert {(width, resolution) for width, resolution, *_ in GRID} == {
        (width, resolution) for width in (0.35, 0.5, 0.75, 1.0) for resolution in (96, 128, 160, 192, 224)
    } | {(1.3, 224), (1.4, 224)}
