"""Training on CUDA: the passes and their gradients, emulated wherever there is a C++ compiler, and on the device.

A gradient jumps where a ReLU6 switches, so that a value rounded from one side to the other changes it by all of it.
The data here (`apart`) keep what goes into every ReLU6 away from 0 and 6, on both sides of both: what is compared is
arithmetic, not luck.
"""

from __future__ import annotations

import contextlib
import copy
import random
import zlib

import pytest
import torch
from blocks import Block
from emulation import NETWORK, TOLERANCE, TYPES, Op, dtype_of
from torch import Tensor

from mnv2_fused import InvertedResidual, MobileNetV2, network, ops


def check(found: Tensor, truth: Tensor, kind: str, what: object = "") -> None:
    assert found.shape == truth.shape, what
    error = float((found.double() - truth).norm() / truth.norm()) if truth.norm() else float(found.double().norm())
    assert error <= TOLERANCE[kind], f"{what} in {kind}: off by {error:.1e}"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(2, 24, 9, 7), (1, 25, 1, 1), (3, 16, 16, 16), (1, 8, 257, 1), (5, 33, 4, 3), (1, 160, 7, 7), (2, 320, 3, 3)]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(call: Op, shape: tuple[int, ...], kind: str) -> None:
    """A mean of 3 standard deviations, as after a ReLU6; as it lies in a larger tensor, too."""
    x = (randn(*shape) + 3).to(dtype_of(kind))
    rows = x.double().movedim(1, -1).flatten(0, 2)
    mean, centered = rows.mean(0), rows - rows.mean(0)
    for image in (x, torch.cat([x, x], 1)[:, : shape[1]]):
        found_mean, squares = call("channel_moments", image)
        assert torch.allclose(found_mean, mean, rtol=1e-6) and torch.allclose(squares, (centered**2).sum(0), rtol=1e-5)
        found_mean, products = call("moments", image, kind == "tf32")
        assert torch.allclose(found_mean, mean, rtol=1e-6)
        check(products, centered.T @ centered, kind)


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
    a, b = randn(*shape).to(dtype_of(kind)), randn(*shape, seed=1).to(dtype_of(kind))
    table, gate, center = randn(3, shape[1], seed=2), randn(2, shape[1], seed=3), randn(shape[1], seed=4)

    def wide(t: Tensor) -> Tensor:
        return t.double().view(-1, 1, 1)

    open_ = (wide(gate[0]) * b + wide(gate[1])).double()
    # Only where rounding cannot switch the gate.
    sure = ((open_.abs() > 1e-3) & ((open_ - 6).abs() > 1e-3)).all(1, keepdim=True)
    a, b, open_ = a * sure, b * sure, torch.where(sure, open_, wide(gate[1]))
    passed = torch.where((open_ > 0) & (open_ < 6), a.double(), 0)
    for bounds, v in ((None, a.double()), (gate, passed)):
        y = call("affine", a, b, table, bounds, False)
        check(y, wide(table[0]) * v + wide(table[1]) * b.double() + wide(table[2]), kind, "affine")
        sums = call("channel_products", a, b, center, bounds)
        truth = torch.stack([v.sum((0, 2, 3)), (v * (b.double() - wide(center))).sum((0, 2, 3))])
        assert torch.allclose(sums, truth, rtol=1e-5, atol=1e-4)
    y = call("affine", a, None, table, None, True)
    check(y, (wide(table[0]) * a.double() + wide(table[2])).clamp(0, 6), kind, "relu6")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_add(call: Op, shape: tuple[int, ...], kind: str) -> None:
    x, y, residual = (randn(*shape, seed=seed).to(dtype_of(kind)) for seed in range(3))
    y = y.contiguous(memory_format=torch.channels_last)
    matrix, bias = randn(shape[1], shape[1], seed=3) / shape[1] ** 0.5, randn(shape[1], seed=4)
    for added in (None, residual):
        truth = y.double() + torch.einsum("nchw,dc->ndhw", x.double(), matrix.double()) + bias.double().view(-1, 1, 1)
        truth = truth if added is None else truth + added.double()
        result = y.clone(memory_format=torch.preserve_format)
        call("matrix_add_", result, x, matrix, bias, added, kind == "tf32")
        check(result, truth, kind)


# ------------------------------------------------------------------------------------------------------- blocks


def apart(block: Block, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """x and weights, of `dtype`'s numbers, whose ReLU6s have their inputs 0.2 or more from 0 and 6, on both sides.

    Every value of x is about -1, 1 or 2.5, and a hidden channel is mostly one channel of x: about -1.5, 1.5 or 3.75, or
    every fifth with a bias about 2, 5 or 7.25. The middle tap of a filter is 1, the others are small.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(repr(block).encode()))

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    n, c, hidden = block.batch, block.in_channels, block.hidden_channels
    x = torch.tensor([-1, 1, 2.5])[torch.randint(0, 3, (n, c, block.height, block.width), generator=generator)]
    x += 0.05 * rand(*x.shape)
    high = is_high(hidden)
    we = be = None
    bd = torch.zeros(hidden)
    if block.expand:
        one = torch.nn.functional.one_hot(torch.arange(hidden) % c, c) * 1.5
        we = (one + 0.1 / c * rand(hidden, c)).view(hidden, c, 1, 1)
        be, bd = 3.5 * high, 1.25 * high - 0.75
    wd = 0.005 * rand(hidden, 1, 3, 3)
    wd[:, :, 1, 1] = 1
    wp = rand(block.out_channels, hidden, 1, 1)
    for some in (high == 1, high == 0):  # z has no mean that its deviations would lose digits to
        wp[:, some] -= wp[:, some].mean(1, keepdim=True)
    wp, bp = (wp + 0.01 * rand(*wp.shape)) / hidden**0.5, rand(block.out_channels)
    return tuple(None if t is None else t.to(dtype) for t in (x, we, be, wd, bd, wp, bp))


def is_high(hidden_channels: int) -> Tensor:
    """1 for the channels about the ReLU6's upper kink."""
    return (torch.arange(hidden_channels) % 5 == 0).float()


def check_gradients(call: Op, block: Block, kind: str) -> None:
    x, we, be, wd, bd, wp, bp = tensors = apart(block, dtype_of(kind))
    exact = [None if t is None else t.double().requires_grad_() for t in tensors]
    options = block.options | {"residual": False, "project_relu6": False}
    y = ops.inverted_residual_reference(*exact, **options)
    dz = randn(*y.shape).to(x.dtype)
    y.backward(dz.double())
    dx, dwe, dbe, dwd, dbd, dwp, _ = (None if t is None else t.grad for t in exact)
    sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
    geometry = block.stride, block.dilation, sides
    one, zero = torch.ones(block.hidden_channels), torch.zeros(block.hidden_channels)
    table = torch.stack([one, bd.float(), zero, one, zero, zero])
    arguments = dz, x, we, be, wd, wp, table, *geometry, 31, kind == "tf32"
    found = call("block_gradients", *arguments)
    if block.hidden_channels < 200 or not ops.why_no_cuda():  # emulated, the wider ones take seconds
        assert all(torch.equal(a, b) for a, b in zip(call("block_gradients", *arguments), found, strict=True)), block
    check(found[0], dx, kind, (block, "dx"))
    if block.expand:
        check(found[1], dwe.flatten(1).T, kind, (block, "expand"))
        check(found[4][2], dbe, kind, (block, "expand bias"))
    check(found[2], dwd.flatten(1).T, kind, (block, "depthwise"))
    check(found[3], dwp.flatten(1), kind, (block, "project"))
    check(found[4][0], dbd, kind, (block, "depthwise bias"))
    d = ops.F.conv2d(
        ops.F.pad(x.double() if we is None else ops.F.relu6(ops.F.conv2d(x.double(), we.double(), be.double())), sides),
        wd.double(), None, block.stride, 0, block.dilation, wd.shape[0],
    )  # fmt: skip
    mean, square = call("filter_moments", x, we, be, wd, *geometry, kind == "tf32")
    check(mean, d.mean((0, 2, 3)), kind, (block, "mean of d"))
    check(square, d.var((0, 2, 3), correction=0) * d[:, 0].numel(), kind, (block, "deviations of d"))


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


def random_block(seed: int) -> Block:
    r = random.Random(seed)
    # Not fewer channels: the tolerance is for sums in which roundings average out.
    expand, dilation, stride = r.random() < 0.8, r.choice((1, 1, 1, 2)), r.choice((1, 2))
    in_channels = r.choice((3, 8, 12, 16, 24, 25, 40) if expand else (12, 16, 24, 25, 40))
    out_channels = r.choice((7, 8, 10, 16, 24, 33, 72))
    hidden = r.choice((7, 16, 32, 33, 48, 96, 100)) if expand else in_channels
    padding: int | tuple[int, int, int, int] = dilation
    if r.random() < 0.3:
        padding = tuple(r.randint(dilation - 1, dilation) for _ in range(4))
    height, width = (r.choice((5, 6, 7, 8, 9, 13, 19)) for _ in range(2))
    return Block(
        in_channels, hidden, out_channels, height, width, r.choice((1, 1, 2, 5)), stride, dilation, padding, expand
    )


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


def module(block: Block) -> InvertedResidual:
    """The block with the weights of `apart`, and BatchNorms whose scale and shift keep their results apart too."""
    ratio = block.hidden_channels / block.in_channels if block.expand else 1
    module = InvertedResidual(block.in_channels, block.out_channels, block.stride, ratio)
    module.use_res_connect = block.residual
    _, we, _, wd, _, wp, _ = apart(block, torch.float32)
    high = is_high(block.hidden_channels)
    *inner, project, last = module.conv
    with torch.no_grad():
        for (conv, bn, _), weight in zip(inner, [we, wd][-len(inner) :], strict=True):
            conv.weight.copy_(weight)
            bn.weight.copy_(1 + 0.5 * high)
            bn.bias.copy_(0.6 + 4.4 * high)
        running = [(1.25 + 0 * high, 4.8 + 0 * high), (0.8 + 4 * high, 0.5 + high)] if block.expand else [(0.8, 2)]
        for (_, bn, _), (mean, var) in zip(inner, running, strict=True):  # what a batch has, roughly
            bn.running_mean += mean
            bn.running_var.mul_(0).add_(var)
        project.weight.copy_(wp)
        last.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        last.running_mean.fill_(1)
    return module


def step(model: torch.nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """A forward and a backward: the result, every gradient, every running statistic."""
    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    y = model(x)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return found | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


MODES = {"batch": (), "frozen": (0, 1, 2), "expansion frozen": (0,), "filter frozen": (1,), "last frozen": (2,)}
BLOCKS = (
    Block(16, 96, 24, 12, 12, batch=2, stride=2),
    Block(24, 96, 24, 9, 10, batch=2, residual=True),
    Block(32, 32, 16, 9, 9, batch=2, expand=False),
    Block(25, 75, 17, 10, 9, batch=3),
)


def autocast_to(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> torch.autocast:
    """torch.autocast("cuda"); in the emulation what our modules ask it."""
    if device == "cpu":
        monkeypatch.setattr(network, "is_autocast_enabled", lambda device: device == "cuda")
        monkeypatch.setattr(network, "get_autocast_dtype", lambda device: dtype)
    return torch.autocast(device, dtype)


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each, relative to its norm; of running means to their deviations, since they may be 0 themselves."""
    result = {}
    for name, exact in truth.items():
        size = truth[name.replace("mean", "var")].sqrt() if name.endswith("running_mean") else exact
        result[name] = float((found[name].double() - exact).norm() / size.norm())
    return result


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
