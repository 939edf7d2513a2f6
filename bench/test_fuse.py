"""What `fuse` makes of the libraries' MobileNetV2 1.0/224, batch 1: as they are, compiled, and fused.

The real ones where they are installed (README.md says how), else stand-ins with their module trees.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import zoo  # noqa: E402

from mnv2_fused import fuse  # noqa: E402

NETS = {net.name: net for net in zoo.NETS if net.name in ("torchvision", "timm", "transformers", "tonylins")}


@pytest.fixture(scope="module", params=NETS)
def network(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    net = NETS[request.param]
    torch.manual_seed(0)
    try:
        kind, model = "", net.real(1.0) if net.real else net.stand_in(1.0)
    except pytest.skip.Exception:
        kind, model = " (stand-in)", net.stand_in(1.0)
    return net.name + kind, zoo.with_statistics(model, torch.randn(4, 3, 96, 96))


WAYS: dict[str, Callable[[nn.Module], Callable]] = {
    "as it is": lambda model: model,
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "torch.compile": lambda model: torch.compile(model),
    "fused": fuse,
    "fused, torch.compile": lambda model: torch.compile(fuse(model)),
}


@pytest.mark.parametrize("runner", WAYS)
@torch.no_grad()
def test_fused(network: tuple[str, nn.Module], runner: str, measure: Callable) -> None:
    name, model = network
    x = torch.randn(1, 3, 224, 224)
    with FlopCounterMode(display=False) as flops:
        expected = zoo.logits_of(model(x))
    torch._dynamo.reset()
    call = WAYS[runner](copy.deepcopy(model))
    x = x.contiguous(memory_format=torch.channels_last) if runner == "channels_last" else x
    error = (zoo.logits_of(call(x)) - expected).norm() / expected.norm()
    assert error < 2e-5, f"{runner} is off by {error:.1e} (relative norm)"
    measure(f"MobileNetV2 1.0/224 of {name}, batch 1", flops.get_total_flops() // 2, lambda: call(x))
