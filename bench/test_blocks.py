"""The 17 blocks of MobileNetV2 1.0/224 against PyTorch eager: folded, each kernel row, batch 1; and in training mode.

Training has batch 8, or MNV2_FUSED_BENCH_BATCH.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mnv2_fused
from mnv2_fused import ops

BLOCKS = json.loads(Path(__file__).with_name("blocks.json").read_text())
KERNELS = {kernel.name: kernel for kernel in mnv2_fused.kernels() if kernel.dtype.is_floating_point}
TRAINING_BATCH = int(os.environ.get("MNV2_FUSED_BENCH_BATCH", 8))
LAYOUTS = {"eager": torch.contiguous_format, "eager channels_last": torch.channels_last}


def describe(block: dict) -> str:
    b = block
    widths = f"{b['in_channels']}-{b['hidden_channels']}-{b['out_channels']}"
    return f"block {b['block']:2}: {b['size']}x{b['size']} {widths} /{b['stride']}"


def macs_of(block: dict) -> int:
    before, after = block["size"] ** 2, (block["size"] // block["stride"]) ** 2
    expand = 0 if block["hidden_channels"] == block["in_channels"] else before * block["in_channels"]
    return block["hidden_channels"] * (expand + after * (9 + block["out_channels"]))


def sample_inputs(block: dict) -> tuple[Tensor, list[Tensor | None]]:
    """x and the folded weights in PyTorch's shapes, float64, scaled so that ReLU6 is at work on both its sides."""
    generator = torch.Generator().manual_seed(block["block"])

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs, hidden, outputs = block["in_channels"], block["hidden_channels"], block["out_channels"]
    expand = [None, None]
    if hidden != inputs:
        expand = [normal(hidden, inputs, 1, 1, scale=3 * inputs**-0.5), normal(hidden)]
    depthwise = [normal(hidden, 1, 3, 3, scale=0.7), normal(hidden)]
    project = [normal(outputs, hidden, 1, 1, scale=hidden**-0.5), normal(outputs)]
    return normal(1, inputs, block["size"], block["size"]), [*expand, *depthwise, *project]


def eager(block: dict, x: Tensor, weights: list[Tensor | None]) -> Tensor:
    we, be, wd, bd, wp, bp = weights
    h = x if we is None else F.relu6(F.conv2d(x, we, be), inplace=True)
    d = F.relu6(F.conv2d(h, wd, bd, block["stride"], 1, groups=len(wd)), inplace=True)
    y = F.conv2d(d, wp, bp)
    return y.add_(x) if block["residual"] else y


def fused(block: dict, dtype: torch.dtype, weights: list[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """The block as the network runs it: weights packed beforehand."""
    layer = ops.Layer(
        ops.BLOCK,
        block["in_channels"],
        block["hidden_channels"],
        block["out_channels"],
        block["stride"],
        **dict.fromkeys(("pad_left", "pad_right", "pad_top", "pad_bottom"), 1),
        expand=int(weights[0] is not None),
        residual=int(block["residual"]),
    )
    plan = ops.make_plan([layer], dtype)
    flat = torch.cat([w.flatten() for w in weights if w is not None])
    packed = torch.ops.mnv2_fused.pack(flat.to(dtype), plan)
    return lambda x: torch.ops.mnv2_fused.network.default(x, packed, plan)


@pytest.mark.parametrize("runner", [*KERNELS, *LAYOUTS])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"block{block['block']:02}")
def test_block(block: dict, runner: str, force: Callable, measure: Callable) -> None:
    x, weights = sample_inputs(block)
    expected = eager(block, x, weights)
    if runner in KERNELS:
        force(KERNELS[runner])
        dtype = KERNELS[runner].dtype
        run, layout = fused(block, dtype, weights), torch.channels_last
    else:
        dtype, layout = torch.float32, LAYOUTS[runner]
        cast = [w if w is None else w.to(dtype) for w in weights]
        cast = [w if w is None else w.contiguous(memory_format=layout) if w.dim() == 4 else w for w in cast]

        def run(x: Tensor) -> Tensor:
            return eager(block, x, cast)

    x = x.to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        error = (run(x).double() - expected).norm() / expected.norm()
        # The longest sum has 960 terms: rounding errors add up to some sqrt(960) epsilons, with room for the ReLU6s.
        # Of bfloat16 what is rounded to it counts, weights, d and y once each; of the others the sums.
        roundings = 1 if dtype == torch.bfloat16 else 64
        assert error < roundings * torch.finfo(dtype).eps, f"{runner} is off by {error:.1e} (relative norm)"
        measure(describe(block), macs_of(block), lambda: run(x), dtype)


# ---- Training


class Training(NamedTuple):
    """A block in training mode, float64, with what goes in, the gradient that comes back, and the exact results."""

    shape: dict
    block: mnv2_fused.InvertedResidual
    x: Tensor
    y_gradient: Tensor
    exact: dict[str, Tensor]


def forward_and_backward(block: mnv2_fused.InvertedResidual, x: Tensor, y_gradient: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    parameters = dict(block.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], y_gradient)
    return {"y": y.detach()} | dict(zip(["x", *parameters], gradients, strict=True)) | dict(block.named_buffers())


@pytest.fixture(scope="module", params=BLOCKS, ids=lambda block: f"block{block['block']:02}")
def training(request: pytest.FixtureRequest) -> Training:
    shape = request.param
    generator = torch.Generator().manual_seed(shape["block"])

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs, outputs, stride = shape["in_channels"], shape["out_channels"], shape["stride"]
    block = mnv2_fused.InvertedResidual(inputs, outputs, stride, shape["hidden_channels"] // inputs)
    block = block.double()
    block.fused = False
    with torch.no_grad():
        for parameter in block.parameters():
            # Of a BatchNorm, the only ones with one dimension: both sides of ReLU6 are at work.
            parameter.copy_(normal(*parameter.shape) + (1 if parameter.dim() == 1 else 0))
    x = normal(TRAINING_BATCH, inputs, shape["size"], shape["size"])
    y_gradient = normal(TRAINING_BATCH, outputs, *[shape["size"] // stride] * 2)
    return Training(shape, block, x, y_gradient, forward_and_backward(copy.deepcopy(block), x, y_gradient))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("runner", ["fused", "eager channels_last"])
def test_training(training: Training, runner: str, direction: str, measure: Callable) -> None:
    block = copy.deepcopy(training.block).float()
    block.fused = runner == "fused"
    if not block.fused:
        block.to(memory_format=torch.channels_last)
    x, y_gradient = (t.float().contiguous(memory_format=torch.channels_last) for t in (training.x, training.y_gradient))
    smooth = ("y", *dict(block.named_buffers()))
    for name, values in forward_and_backward(block, x, y_gradient).items():
        exact = training.exact[name].double()  # one is a counter
        error = (values.double() - exact).norm() / exact.norm()
        # Eager channels_last adds a BatchNorm's 100,000 values up less exactly than the others: 4e-6 in y. Where that
        # carries an activation over the corner of a ReLU6 its gradient comes or goes whole: up to 6e-3 in a sum.
        limit = 1e-4 if name in smooth else 2e-2
        assert error < limit, f"{runner}: {name} is off by {error:.1e} (relative norm), more than {limit:g}"

    x.requires_grad_()
    inputs = [x, *block.parameters()]
    group = f"{describe(training.shape)}, batch {TRAINING_BATCH}, training, {direction}"
    if direction == "forward":
        measure(group, None, lambda: block(x))
    else:
        measure(group, None, lambda y: torch.autograd.grad(y, inputs, y_gradient), setup=lambda: block(x))
