"""Training on CUDA: the passes and their gradients, emulated wherever there is a C++ compiler, and on the device.

What each pass is checked for stands in passes.py.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from blocks import Block
from emulation import NETWORK, TOLERANCE, TYPES, Op, dtype_of
from passes import (
    BLOCKS,
    MODES,
    SHAPES,
    apart,
    check,
    check_gradients,
    check_maps_and_sums,
    check_matrix_add,
    check_moments,
    errors,
    module,
    randn,
    random_block,
    step,
)
from torch import Tensor

from mnv2_fused import MobileNetV2, network, ops


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(call: Op, shape: tuple[int, ...], kind: str) -> None:
    check_moments(call, shape, kind)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_moments_of_floats_lose_nothing_to_their_mean(call: Op, mean: float) -> None:
    x = randn(4, 24, 20, 20) + mean
    rows = x.double().movedim(1, -1).flatten(0, 2)
    centered = rows - rows.mean(0)
    check(call("moments", x)[1], centered.T @ centered, "float32")
    check(call("channel_moments", x)[1], (centered**2).sum(0), "float32")


@pytest.mark.parametrize("kind", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_and_sums_of_channels(call: Op, shape: tuple[int, ...], kind: str) -> None:
    check_maps_and_sums(call, shape, kind)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_add(call: Op, shape: tuple[int, ...], kind: str) -> None:
    check_matrix_add(call, shape, kind)


# ------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("block", "kind"),
    [  # the widest take seconds each: one in 16 bits, one in 32
        pytest.param(block, kind, id=f"{block.id}-{kind}", marks=[pytest.mark.exhaustive] if slow else [])
        for block in NETWORK
        for kind in TYPES
        for slow in [block.hidden_channels > 600 and kind != ("float32" if block.residual else "float16")]
    ],
)
def test_gradients_of_the_networks_blocks(call: Op, block: Block, kind: str) -> None:
    check_gradients(call, block, kind)


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_random_blocks(call: Op, seed: int) -> None:
    check_gradients(call, random_block(seed), TYPES[seed % 4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", TYPES)
def test_gradients_of_200_random_blocks(call: Op, kind: str) -> None:
    for seed in range(1000, 1200):
        check_gradients(call, random_block(seed), kind)


def everything(block: Block, kind: str) -> list[Tensor]:
    """What all passes make of a block, emulated."""
    run, tf32 = torch.ops.mnv2_emulated, kind == "tf32"
    x, we, be, wd, _, wp, _ = apart(block, dtype_of(kind))
    table, center = randn(6, block.hidden_channels), randn(block.in_channels)
    sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
    geometry = block.stride, block.dilation, sides
    shape = ops.inverted_residual_reference(*apart(block, torch.float32), **block.options).shape
    y = torch.zeros_like(x, memory_format=torch.channels_last)
    run.matrix_add_(y, x, center.outer(center), center, x, tf32)
    return [
        y,
        *run.moments(x, tf32),
        *run.channel_moments(x),
        run.channel_products(x, x, center, None),
        *run.filter_moments(x, we, be, wd, *geometry, tf32),
        *run.block_gradients(randn(*shape).to(x.dtype), x, we, be, wd, wp, table, *geometry, 31, tf32),
    ]


@pytest.mark.parametrize("order", ["backward", "random"])
@pytest.mark.parametrize("kind", TYPES)
def test_threads_in_another_order(emulated: None, order: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comes out however the threads run between two barriers, and whenever copies arrive."""
    for block in (random_block(3), Block(24, 96, 24, 9, 8, stride=2), Block(160, 40, 40, 5, 5, batch=3)):
        monkeypatch.delenv("MNV2_EMULATION_ORDER", raising=False)
        usual = everything(block, kind)
        monkeypatch.setenv("MNV2_EMULATION_ORDER", order)
        for a, b in zip(everything(block, kind), usual, strict=True):
            assert torch.equal(a, b), (block, kind)


@pytest.mark.parametrize("wanted", [1, 2, 4, 8, 16, 3, 6, 0])
def test_only_what_is_wanted(call: Op, wanted: int) -> None:
    block = Block(16, 48, 24, 9, 8)
    x, we, be, wd, _, wp, _ = apart(block, torch.float16)
    dz, table = randn(1, 24, 9, 8).half(), randn(6, 48)
    arguments = dz, x, we, be, wd, wp, table, 1, 1, (1, 1, 1, 1)
    everything = call("block_gradients", *arguments, 31)
    found = call("block_gradients", *arguments, wanted)
    for i in range(4):  # tiles, and with them the order of sums, may be others
        if wanted >> i & 1:
            assert float((found[i] - everything[i]).norm()) <= 1e-5 * float(everything[i].norm())
        else:
            assert found[i].numel() == 0
    for rows, bits in ((slice(0, 2), 24), (slice(2, 4), 6)):
        assert not wanted & bits or torch.allclose(found[4][rows], everything[4][rows], rtol=1e-4, atol=1e-4)


def test_no_image(call: Op) -> None:
    x, table = torch.zeros(0, 8, 5, 5, dtype=torch.half), torch.zeros(6, 16)
    we, be, wd, wp = torch.zeros(16, 8, 1, 1), torch.zeros(16), torch.zeros(16, 1, 3, 3), torch.zeros(4, 16, 1, 1)
    dx, *sums = call("block_gradients", torch.zeros(0, 4, 5, 5).half(), x, we, be, wd, wp, table, 1, 1, (1,) * 4, 31)
    assert dx.shape == x.shape and all(not t.any() for t in sums)
    for t in (*call("moments", x), *call("filter_moments", x, we, be, wd, 1, 1, (1,) * 4)):
        assert not t.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(table=torch.zeros(6, 16).half()), "coefficients must be float32"),
        (dict(table=torch.zeros(5, 16)), r"coefficients must have shape \[6, 16\]"),
        (dict(dz=torch.zeros(1, 4, 5, 4).half()), r"dz must have shape \[1, 4, 5, 5\]"),
        (dict(dz=torch.zeros(1, 4, 5, 5)), "dz must have the dtype of x"),
        (dict(x=torch.zeros(1, 8, 5, 5).double()), "x must be float16, bfloat16 or float32"),
        (dict(wd=torch.zeros(16, 1, 3, 3).bfloat16()), "depthwise_weight must have the dtype of x"),
        (dict(be=None), "expand_weight and expand_bias go together"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(emulated: None, change: dict[str, object], message: str) -> None:
    given = dict(
        dz=torch.zeros(1, 4, 5, 5).half(), x=torch.zeros(1, 8, 5, 5).half(), we=torch.zeros(16, 8, 1, 1),
        be=torch.zeros(16), wd=torch.zeros(16, 1, 3, 3), wp=torch.zeros(4, 16, 1, 1), table=torch.zeros(6, 16),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mnv2_emulated.block_gradients(*(given | change).values(), 1, 1, (1,) * 4, 31)


# ------------------------------------------------------------------------------------------------------ modules


def autocast_to(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> torch.autocast:
    """torch.autocast("cuda"); in the emulation what our modules ask it."""
    if device == "cpu":
        monkeypatch.setattr(network, "is_autocast_enabled", lambda device: device == "cuda")
        monkeypatch.setattr(network, "get_autocast_dtype", lambda device: dtype)
    return torch.autocast(device, dtype)


CASTS = [(kind, cast) for kind in TYPES for cast in ("plain", "autocast") if cast == "plain" or "float16" in kind]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
@pytest.mark.parametrize(("kind", "cast"), CASTS)
def test_training_of_modules(
    device: str, block: Block, kind: str, mode: str, cast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of the batch, running ones and their mixtures; float32 BatchNorms beside 16-bit convolutions, or all
    in float32 under autocast. No further from float64 than the tolerance, or than the modules' own arithmetic in the
    dtype where that is further: bfloat16's gradient of the first scale is small beside its parts.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", kind == "tf32")
    model, x = module(block).to(device), apart(block, dtype_of(kind))[0].to(device)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for i in MODES[mode]:
        if i - 3 + len(norms) >= 0:
            norms[i - 3 + len(norms)].eval()
    if cast == "plain":
        for part in model.modules():
            if isinstance(part, torch.nn.Conv2d):
                part.to(x.dtype)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact.fused = plain.fused = False
    dy = randn(*copy.deepcopy(exact)(x.double()).shape).to(device, x.dtype)
    truth = step(exact, x.double(), dy)
    if cast == "autocast":
        with autocast_to(x.dtype, device, monkeypatch):
            assert model.why_not_fused(x) == ""
            found, eager = step(model, x, dy), step(plain, x, dy)
    else:
        assert model.why_not_fused(x) == ""
        found, eager = step(model, x, dy), step(plain, x, dy)
    assert all(found[name].dtype == eager[name].dtype for name in truth)
    own, usual = errors(found, truth), errors(eager, truth)
    worst = max(own, key=lambda name: own[name] / max(TOLERANCE[kind], usual[name]))
    assert own[worst] <= max(TOLERANCE[kind], usual[worst]), (
        f"{worst}: off by {own[worst]:.1e}, eager {usual[worst]:.1e}"
    )


@pytest.mark.parametrize("kind", TYPES)
def test_training_of_a_network(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs fused, and no further from float64 than twice what eager is off in the same dtype."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", kind == "tf32")
    torch.manual_seed(0)
    setting = [(1, 8, 1, 1), (6, 16, 2, 2), (6, 24, 1, 2)]
    model = MobileNetV2(num_classes=5, inverted_residual_setting=setting, dropout=0.0).to(device)
    x, dy = randn(4, 3, 40, 40).to(device), randn(4, 5, seed=1).to(device)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact.fused = plain.fused = False
    truth = step(exact, x.double(), dy)
    dtype = dtype_of(kind)
    # On the CPU eager knows no TF32: float16 has as many digits.
    alike = torch.float16 if kind == "tf32" and device == "cpu" else dtype
    with torch.autocast(device, alike, enabled=alike != torch.float32):
        eager = step(plain, x, dy)
    with autocast_to(dtype, device, monkeypatch) if dtype != torch.float32 else contextlib.nullcontext():
        assert model.unfused(x) == {}
        found = step(model, x, dy)
    own, usual = errors(found, truth), errors(eager, truth)
    names = [name for name in truth if truth[name].norm() > 1e-6]
    middle = [sorted(e[name] for name in names)[len(names) // 2] for e in (own, usual)]
    assert middle[0] <= 2 * middle[1], middle


def test_a_step_of_gradscaler(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 with float32 parameters: gradients come scaled, in float32, and an overflow is seen as one."""
    block = BLOCKS[0]
    model, x = module(block).to(device), apart(block, torch.float16)[0].to(device)
    with autocast_to(torch.float16, device, monkeypatch):
        for scale, finite in ((2.0**10, True), (2.0**40, False)):
            loss = model(x).float().square().mean() * scale
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            assert all(g.dtype == torch.float32 for g in gradients)
            assert all(bool(g.isfinite().all()) for g in gradients) == finite
