"""Networks to test with: weights as training leaves them, what a fused call gives and how far off it is."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mnv2_fused import MobileNetV2

# Largest relative error of a row of logits, in norm: float32 with room for 50 layers.
TOLERANCE = 2e-5
WIDTHS = (0.35, 0.5, 0.75, 1.0, 1.4)
SIZES = ((224, 224), (97, 131), (65, 33), (32, 32))
Model = TypeVar("Model", bound=nn.Module)


def settle(model: Model, size: int = 64) -> Model:
    """In eval mode as training on images of this size leaves one: no channel, no statistic is like its neighbour.

    Where a map is a single pixel the statistics are of eight values, and a channel may have next to no variance: of
    networks with many such maps float32's results are worth less.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.empty(len(module.weight), 1, 1, 1).uniform_(0.5, 2))
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.1)
                module.bias.normal_()
        for bn in norms:
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.5)
            bn.momentum = None  # the mean over all batches so far, here one
        model.train()(torch.randn(8, model.in_channels, size, size))
        for bn in norms:
            bn.momentum = 0.1
            bn.running_mean.add_(0.2 * bn.running_var.sqrt() * torch.randn(bn.num_features))
            bn.running_var.mul_(torch.empty(bn.num_features).uniform_(0.7, 1.4))
    return model.eval()


def settled(width_mult: float = 0.35, seed: int = 0, **options: Any) -> MobileNetV2:
    torch.manual_seed(seed)
    return settle(MobileNetV2(width_mult=width_mult, **options))


@cache
def images(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(height * width))


def plain(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The composition of a copy's modules, in float64."""
    model = copy.deepcopy(model).to(dtype)
    model.fused = False
    with torch.no_grad():
        return model(x.to(dtype))


def fused(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        assert model.why_not_fused(x) == ""
        return model(x)


def error(y: Tensor, value: Tensor) -> float:
    """The largest relative error of a row, in norm."""
    assert y.shape == value.shape, f"shape {list(y.shape)}, expected {list(value.shape)}"
    return float(((y.double() - value).flatten(1).norm(dim=1) / value.double().flatten(1).norm(dim=1)).max())


def check(model: nn.Module, x: Tensor) -> Tensor:
    y = fused(model, x)
    assert error(y, plain(model, x)) < TOLERANCE
    return y
