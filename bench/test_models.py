"""MobileNetV2 1.0/224 at batch 1 and 32: every float32 kernel row against PyTorch and the other runtimes installed.

These run one after the other, all in this process; `mnv2-fused bench` compares in alternation, and memory too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import mnv2_fused
from mnv2_fused.peers import RUNNERS
from mnv2_fused.tasks import TOLERANCE, Inference
from mnv2_fused.weights import random_model

KERNELS = {kernel.name: kernel for kernel in mnv2_fused.kernels() if kernel.dtype == torch.float32}
PEERS = {runner.name: runner for runner in RUNNERS}
FUSED = PEERS.pop("fused")


@pytest.fixture(scope="module", params=[1, 32])
def case(request: pytest.FixtureRequest) -> tuple[mnv2_fused.MobileNetV2, torch.Tensor, torch.Tensor, int]:
    """The model, the images, the exact logits and the multiply-adds of one call."""
    generator = torch.Generator().manual_seed(0)
    model = random_model(torch.randn(8, 3, 64, 64, generator=generator))
    images = torch.randn(request.param, 3, 224, 224, generator=generator)
    logits, macs = Inference.exact(model, (images,))
    return model, images, logits, macs * len(images)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Runners set torch's number of threads: puts it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("runner", [*KERNELS, *PEERS])
def test_model(case: tuple, runner: str, force: Callable, measure: Callable) -> None:
    model, images, exact, macs = case
    if runner in KERNELS:
        force(KERNELS[runner])
        if len(images) > 1 and runner == "scalar_f32":
            pytest.skip("scalar_f32: minutes at this batch")
        way = FUSED
    else:
        way = PEERS[runner]
    if reason := way.missing(model):
        pytest.skip(f"{runner} {reason}")
    x = way.input(images)
    call = way.prepare(model, x, torch.get_num_threads())
    error = (torch.as_tensor(call(x)).double() - exact).norm() / exact.norm()
    assert error < TOLERANCE, f"{runner} is off by {error:.1e} (relative norm)"
    measure(f"MobileNetV2 1.0/224, batch {len(images)}", macs, lambda: call(x))
