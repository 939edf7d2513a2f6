"""The paper's three tasks at its sizes: the fused network against the composition of its modules."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import TOLERANCE, error, images, plain, settle
from steps import results_of
from torch import Tensor, nn

from mnv2_fused import DeepLabV3, MobileNetV2, SSDLite


class System(nn.Module):
    """A task's network from images to all its numbers in rows, before what is discrete."""

    in_channels = 3

    def __init__(self, task: str, size: int, output_stride: int, width_mult: float) -> None:
        super().__init__()
        if task == "classification":
            self.network = MobileNetV2(10, width_mult, dropout=0.0, output_stride=output_stride)
        elif task == "detection":
            self.network = SSDLite(5, size=(size, size), width_mult=width_mult)
        else:
            self.network = DeepLabV3(5, output_stride, width_mult=width_mult, dropout=0.0)

    @property
    def fused(self) -> bool:
        return self.network.fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self.network.fused = value

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.network, SSDLite):
            found = self.network.forward_head(self.network.forward_maps(x))
            return torch.cat([part.flatten(1) for part in found], 1)
        y = self.network(x)
        return (y["out"] if isinstance(y, dict) else y).flatten(1)


CASES = [
    ("classification", 8), ("classification", 16), ("detection", 32), ("segmentation", 8), ("segmentation", 16)
]  # fmt: skip
SIZES = [65, *(pytest.param(size, marks=pytest.mark.exhaustive) for size in (300, 320, 513))]


@pytest.mark.parametrize("width_mult", [0.35, pytest.param(1.0, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("task", "output_stride"), CASES)
def test_results(task: str, output_stride: int, size: int, width_mult: float) -> None:
    torch.manual_seed(0)
    model, x = settle(System(task, size, output_stride, width_mult), size), images(2, size, size)
    with torch.no_grad():
        assert not model.network.unfused(x)
        y = model(x)
    assert error(y, plain(model, x)) < TOLERANCE
    assert float((y[0] - y[1]).norm()) > 0.01 * float(y.norm()), "an image matters"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("task", "output_stride"), CASES)
def test_gradients(task: str, output_stride: int, size: int) -> None:
    """In float64, where rounding carries nothing over the corner of a ReLU6."""
    torch.manual_seed(0)
    model, x = settle(System(task, size, output_stride, 0.35)).train().double(), images(2, size, size).double()
    results = []
    for fused in (False, True):
        network = copy.deepcopy(model)
        network.fused = fused
        assert bool(network.network.unfused(x)) != fused
        results.append(results_of(network, x.clone().requires_grad_()))
    truth, found = results
    assert found.keys() == truth.keys() and len(truth) > 300
    for name, right in truth.items():
        if right.is_floating_point():
            largest = float(truth[name.replace("bias", "weight")].abs().max()) if name.endswith("bias") else 0.0
            scale = max(float(right.abs().max()), largest)
            assert float((found[name] - right).abs().max()) <= 1e-6 * scale, name
