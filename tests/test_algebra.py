"""What csrc/training_ops.cpp composes on a device, emulated, over passes in plain PyTorch.

The truth is the same composition in float64 on the CPU, which test_training.py compares with nn.BatchNorm2d.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from blocks import Block
from steps import SMALL, USUAL, norms, prepared
from torch import Tensor, nn
from torch.nn import functional as F

from mnv2_fused import training
from mnv2_fused.ops import WANT_DEPTHWISE, WANT_EXPAND, WANT_PROJECT, WANT_X

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # passes replaced on purpose

GRADIENTS = training._DIFFERENTIABLE
STATISTICS = training._STATISTICS
KINDS = {
    "float32": (torch.float32, torch.float32, torch.float32),  # of x, of weights, of norms
    "float16": (torch.float16, torch.float16, torch.float16),
    "float16, masters": (torch.float16, torch.float32, torch.float32),
    "bfloat16, norms": (torch.bfloat16, torch.bfloat16, torch.float32),
}


# ----------------------------------------------------------------------------------------------- passes, in float64


def _column(v: Tensor) -> Tensor:
    return v.double().view(1, -1, 1, 1)


def _channels_last(v: Tensor, like: Tensor) -> Tensor:
    return v.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _gated(a: Tensor, b: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return a.double()
    u = _column(gate[0]) * b.double() + _column(gate[1])
    return a.double() * ((u > 0) & (u < 6))


def _hidden(x: Tensor, we: Tensor | None, be: Tensor | None) -> Tensor:
    return x.double() if we is None else F.relu6(F.conv2d(x.double(), we.double(), be.double()))


def _filtered(h: Tensor, wd: Tensor, stride: int, dilation: int, padding: list[int]) -> Tensor:
    return F.conv2d(F.pad(h, padding), wd.double(), None, stride, 0, dilation, groups=h.shape[1])


class Passes:
    """Each method is a pass of csrc/training_passes.cpp. `calls` has the arguments of all."""

    def moments(self, x, tf32):
        values = x.double().transpose(0, 1).flatten(1)
        mean = values.mean(1)
        return mean, (values - mean[:, None]) @ (values - mean[:, None]).T

    def channel_moments(self, x):
        mean, products = self.moments(x, False)
        return mean, products.diagonal().contiguous()

    def channel_products(self, a, b, center, gate):
        g = _gated(a, b, gate)
        return torch.stack([g.sum((0, 2, 3)), (g * (b.double() - _column(center))).sum((0, 2, 3))])

    def affine(self, a, b, coefficients, gate, relu6):
        p, q, r = map(_column, coefficients)
        y = p * _gated(a, b, gate) + r + (0 if b is None else q * b.double())
        return _channels_last(F.relu6(y) if relu6 else y, a)

    def matrix_add_(self, y, x, matrix, bias, residual, tf32):
        added = F.conv2d(x.double(), matrix.double()[..., None, None], bias.double())
        y.copy_(y.double() + added + (0 if residual is None else residual.double()))

    def filter_moments(self, x, we, be, wd, stride, dilation, padding, tf32):
        return self.channel_moments(_filtered(_hidden(x, we, be), wd, stride, dilation, padding))

    def inverted_residual(self, x, we, be, wd, bd, wp, bp, stride, dilation, padding, residual, project_relu6, tf32):
        d = _filtered(_hidden(x, we, be), wd, stride, dilation, padding) + _column(bd)
        return _channels_last(F.conv2d(F.relu6(d), wp.double(), bp.double()), x)

    def block_gradients(self, dz, x, we, be, wd, wp, coefficients, stride, dilation, padding, wanted, tf32):
        scale, shift, center, p, q, r = map(_column, coefficients)
        h, taps = _hidden(x, we, be), wd.double()
        d, back = torch.func.vjp(lambda h, taps: _filtered(h, taps, stride, dilation, padding), h, taps)
        u = scale * d + shift
        g = F.conv_transpose2d(dz.double(), wp.double()) * ((u > 0) & (u < 6))
        gh, depthwise = back(p * g + q * d + r)
        ge = gh if we is None else gh * ((h > 0) & (h < 6))
        dx = ge if we is None else F.conv_transpose2d(ge, we.double())
        results = {
            WANT_EXPAND: torch.einsum("nihw,nohw->io", x.double(), ge),
            WANT_DEPTHWISE: depthwise.flatten(1).T.contiguous(),
            WANT_PROJECT: torch.einsum("nohw,nihw->oi", dz.double(), F.relu6(u)),
        }
        sums = torch.stack([v.sum((0, 2, 3)) for v in (g, g * (d - center), ge, ge * h)])
        missing = sums[:0].clone()
        return (
            _channels_last(dx, x) if wanted & WANT_X else x.new_empty(0),
            *(v if wanted & bit and v.numel() else missing.clone() for bit, v in results.items()),
            sums,
        )


class Emulated:
    """The ops of the emulated device, which call the passes above, and what these were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.mnv2_emulated, name)

    def arguments(self, name: str) -> dict[str, Any]:
        """Of the last call of a pass."""
        arguments = next(a for n, a in reversed(self.calls) if n == name)
        return dict(zip(list(inspect.signature(getattr(Passes, name)).parameters)[1:], arguments, strict=True))


@pytest.fixture(scope="module")
def library() -> Iterator[Emulated]:
    def registered() -> set[str]:
        return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mnv2_emulated::")}

    if not registered():
        torch.ops.load_library(emulation.build())
    there, ops, passes = registered(), Emulated(), Passes()
    fragment = torch.library.Library("mnv2_emulated", "FRAGMENT")
    for name in (name for name in vars(Passes) if not name.startswith("__")):

        def call(*arguments: Any, name: str = name) -> Any:
            full = *arguments, *[False] * (len(inspect.signature(getattr(passes, name)).parameters) - len(arguments))
            ops.calls.append((name, full))
            return getattr(passes, name)(*full)

        if f"mnv2_emulated::{name}" not in there:
            fragment.define(str(getattr(torch.ops.mnv2_fused, name).default._schema).removeprefix("mnv2_fused::"))
        fragment.impl(name, call, "CPU", allow_override=True)
    yield ops
    fragment._destroy()


@pytest.fixture
def emulated(library: Emulated) -> Emulated:
    library.calls.clear()
    return library


# ------------------------------------------------------------------------------------------------------------- a step


def arguments(case: Block, kind: str, frozen: tuple[int, ...] = (), tf32: bool = False, group: str = "") -> list[Any]:
    """Of block_train; numbers are those of the kind's types."""
    dtype, weights, others = KINDS[kind]
    block, x = prepared(case)
    for i in frozen:
        norms(block)[i % len(norms(block))].eval()
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    stages = [
        training._stage(*pair)._replace(bias=torch.linspace(-0.1, 0.2, len(pair[0].weight)))
        for pair in zip(convs, norms(block), strict=True)
    ]
    stages = [training._NO_STAGE] * (3 - len(stages)) + stages

    def typed(stage: training.ConvNorm) -> list[Any]:
        types = [weights, weights, others, others, others, others, None]
        values = zip(stage, types, strict=True)
        return [v.detach().to(t) if isinstance(v, Tensor) else v for v, t in values]

    sides = (case.padding,) * 4
    flat = [value for stage in stages for value in typed(stage)]
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    return [x, *flat, case.stride, case.dilation, sides, case.residual, tf32, group]


def doubled(values: list[Any]) -> list[Any]:
    return [v.double() if isinstance(v, Tensor) else v for v in values]


def step(ops: Any, values: list[Any], dy: Tensor | None = None, wanted: int = -1) -> dict[str, Tensor]:
    """y, z, statistics, and the gradients by their places."""
    y, z, *statistics = ops.block_train(*values)
    random = torch.Generator().manual_seed(0)
    dy = torch.randn(y.shape, generator=random, dtype=torch.float64).to(y.dtype) if dy is None else dy
    gradients = ops.block_train_backward(dy, z, *statistics, wanted, *values)
    return dict(zip(["y", "z", *STATISTICS, *GRADIENTS], [y, z, *statistics, *gradients], strict=True)) | {"dy": dy}


def compare(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """All but the center, which only the CPU chooses."""
    errors = {
        name: float((found[name].double() - right).norm() / right.norm().clamp(min=1e-6))
        for name, right in truth.items()
        if right.numel() and name != "x_center"
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst} is off by {errors[worst]:.1e}"


@pytest.mark.parametrize("frozen", [(), (0, 1, 2), (0,), (1,), (2,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_a_step(case: Block, kind: str, frozen: tuple[int, ...], emulated: Emulated) -> None:
    values = arguments(case, kind, frozen)
    found = step(emulated, values)
    truth = step(torch.ops.mnv2_fused, doubled(values), found["dy"].double())
    # 16-bit activations move a few across the corners of ReLU6, each a term of its sums.
    eps = torch.finfo(KINDS[kind][0]).eps
    compare(found, truth, 100 * eps if eps > 1e-6 else 20 * eps)
    assert all(found[name].dtype == torch.float64 for name in STATISTICS)
    for place in GRADIENTS:
        if values[place] is not None:
            assert (found[place].dtype, found[place].shape) == (values[place].dtype, values[place].shape), place
    for name, given in emulated.calls:
        names = list(inspect.signature(getattr(Passes, name)).parameters)[1:]
        for argument, value in zip(names, given, strict=True):
            if isinstance(value, Tensor):
                activation = argument in ("x", "y", "a", "b", "dz", "residual")
                assert value.dtype == (values[0].dtype if activation else torch.float32), (name, argument)


@pytest.mark.parametrize("wanted", [1 << i for i in range(13)])
def test_a_gradient_alone(wanted: int, emulated: Emulated) -> None:
    values = arguments(USUAL, "float32")
    found = step(emulated, values, wanted=wanted)
    truth = step(torch.ops.mnv2_fused, doubled(values), found["dy"].double(), wanted)
    compare(found, truth, 1e-5)
    assert all((found[place].numel() > 0) == bool(wanted >> i & 1) for i, place in enumerate(GRADIENTS))


def test_over_processes(emulated: Emulated, tmp_path: Path) -> None:
    """One that is alone in its group: every sum goes the long way, and nothing changes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD.group_name
        for case in SMALL:
            found = step(emulated, arguments(case, "float32", group=group))
            compare(found, step(emulated, arguments(case, "float32"), found["dy"]), 1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["float16", "bfloat16, norms", "tf32"])
def test_the_mean_is_exact(kind: str, emulated: Emulated) -> None:
    """The folded expansion is rounded as the passes round it; its bias takes back what that does to the mean of e."""
    values = arguments(USUAL, "float32" if kind == "tf32" else kind, tf32=kind == "tf32")
    values[0] = values[0] / 64 + 16
    found = step(emulated, values)
    x, given = found["x_mean"], emulated.arguments("filter_moments")
    weight, bias = given["we"].double().flatten(1), given["be"].double()
    assert torch.equal(weight, rounded(weight, kind))
    shift = values[4].double()
    assert ((weight @ x + bias - shift).abs() <= 1e-6 * (weight.abs() @ x.abs())).all()
    matrix = emulated.arguments("matrix_add_")["matrix"].double()
    assert torch.equal(matrix, rounded(matrix, kind))


def rounded(v: Tensor, kind: str) -> Tensor:
    if kind != "tf32":
        return v.to(KINDS[kind][0]).double()
    mantissa, exponent = torch.frexp(v)
    return torch.ldexp(torch.round(mantissa * 2**11) / 2**11, exponent)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_relu6(kind: str, frozen: bool, emulated: Emulated) -> None:
    dtype, _, others = KINDS[kind]
    random = torch.Generator().manual_seed(0)
    e, dy = (torch.randn(3, 8, 5, 4, generator=random).to(dtype) for _ in range(2))
    scale, shift, mean, var = (torch.rand(8, generator=random).to(others) + 0.5 for _ in range(4))
    rest = [scale, shift, *((mean, var) if frozen else (None, None)), 1e-5, ""]

    def both(ops: Any, e: Tensor, dy: Tensor, rest: list[Any]) -> tuple[Tensor, ...]:
        y, *saved = ops.batch_norm_relu6(e, *rest)
        return y, *saved, *ops.batch_norm_relu6_backward(dy, e, *saved, *rest)

    found = both(emulated, e, dy, rest)
    truth = both(torch.ops.mnv2_fused, e.double(), dy.double(), doubled(rest))
    compare(dict(enumerate(found)), dict(enumerate(truth)), 20 * torch.finfo(dtype).eps)
    assert [t.dtype for t in found[4:]] == [dtype, others, others, dtype]


def test_every_half(emulated: Emulated) -> None:
    """Numbers of 16 bits as the steps read and write them: all of them, through a norm that changes nothing."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        v = every.view(dtype)
        v = v[v.isfinite()]
        e = torch.zeros(1, len(v), 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
        zero, one = torch.zeros_like(v), torch.ones_like(v)
        emulated.batch_norm_relu6(e, one, v, zero, one, 0.0, "")
        read = emulated.arguments("affine")["coefficients"][2]
        assert torch.equal(read, v.float())
        dy = v.view(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)
        count, nothing = torch.ones(1, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
        _, _, written, _ = emulated.batch_norm_relu6_backward(
            dy, e, count, nothing, nothing.clone(), one, one, zero, one, 0.0, ""
        )
        assert torch.equal(written, v)


def test_rounding_is_to_even(emulated: Emulated) -> None:
    """Of what lies between two numbers, at the edges of the range too."""
    for dtype, most in ((torch.float16, 65504.0), (torch.bfloat16, torch.finfo(torch.bfloat16).max)):
        tiny, half = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).eps / 2
        steps = torch.arange(0, 4, 0.25, dtype=torch.float64)
        near = torch.cat([1 + half * steps, tiny * (1 + half * steps), tiny * half * steps])
        wide = torch.cat([near, -near, most * (1 + half * torch.tensor([0.4, 0.6], dtype=torch.float64))])
        rates = torch.stack([wide, torch.zeros_like(wide)])  # sums over pixels, as a pass would have them
        passes = vars(Passes)["channel_products"]
        try:
            Passes.channel_products = lambda *_, rates=rates: rates
            one = torch.ones(len(wide), dtype=dtype)
            e = torch.zeros(1, len(wide), 1, 1, dtype=dtype).contiguous(memory_format=torch.channels_last)
            count, nothing = torch.ones(1, dtype=torch.float64), torch.empty(0, dtype=torch.float64)
            _, _, shift, _ = emulated.batch_norm_relu6_backward(
                e, e, count, nothing, nothing.clone(), one, one, one, one, 0.0, ""
            )
        finally:
            Passes.channel_products = passes
        assert torch.equal(shift, wide.to(dtype)), dtype
        assert shift[-1] == math.inf
