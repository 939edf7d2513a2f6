"""The 17 blocks of MobileNetV2 1.0/224, batch 1: each kernel row against PyTorch eager with BatchNorm folded in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mnv2_fused
from mnv2_fused import ops

BLOCKS = json.loads(Path(__file__).with_name("blocks.json").read_text())
KERNELS = {kernel.name: kernel for kernel in mnv2_fused.kernels()}
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
        assert error < 64 * torch.finfo(dtype).eps, f"{runner} is off by {error:.1e} (relative norm)"
        measure(describe(block), macs_of(block), lambda: run(x), dtype)
