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
    x = torch.zeros(2, 3, resolution, resolution)
    with torch.no_grad():
        assert model.why_not_fused(x) == ""
        packing = model._chain._packing
        calls = {
            "fused": lambda: torch.ops.mnv2_fused.network(x, packing.packed, packing.plan),
            "model": lambda: model(x),  # the counter's hooks may make it run layer by layer
            "plain": lambda: model.forward_head(model.features(x)),
        }
        counts = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            counts[name] = counter.get_total_flops() / 2 / len(x)  # torch counts a multiply-add as two
    assert counts["fused"] == counts["model"] == counts["plain"]
    assert round(counts["fused"] / 1e6, 2) == millions


def test_the_grid_is_whole() -> None:
    assert len(GRID) == 22
    assert {(width, resolution) for width, resolution, *_ in GRID} == {
        (width, resolution) for width in (0.35, 0.5, 0.75, 1.0) for resolution in (96, 128, 160, 192, 224)
    } | {(1.3, 224), (1.4, 224)}
