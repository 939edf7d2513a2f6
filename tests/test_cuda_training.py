"""Training on CUDA: the passes and their gradients, emulated wherever there is a C++ compiler, and on the device.

A gradient jumps where a ReLU6 switches, so that a value rounded from one side to the other changes it by all of it.
The data here (`apart`) keep what goes into every ReLU6 away from 0 and 6, on both sides of both: what is compared is
arithmetic, not luck.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

import pytest
import torch
from blocks import Block, network_blocks
from emulation import TOLERANCE, TYPES, dtype_of
from torch import Tensor

from mnv2_fused import ops

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(params=["emulated", "device"])
def call(request: pytest.FixtureRequest) -> Op:
    """Runs an op by its name, in the emulation or on the device; results are on the CPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return lambda op, *arguments: getattr(torch.ops.mnv2_emulated, op)(*arguments)
    if reason := ops.why_no_cuda():
        pytest.skip(f"no GPU: {reason}")

    def run(op: str, *arguments: object) -> Tensor | tuple[Tensor, ...]:
        moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
        found = getattr(torch.ops.mnv2_fused, op)(*moved)
        if found is None:  # the first was changed
            arguments[0].copy_(moved[0])
            return None
        return found.cpu() if isinstance(found, Tensor) else tuple(t.cpu() for t in found)

    return run


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

    Every pixel of x is a vector or its opposite, and some noise; expansions of it are about 1.5 or -1.5, or with their
    bias 4.5 or 7.5. The middle tap of a filter is 1, the others are small.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(repr(block).encode()))

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    n, c, hidden = block.batch, block.in_channels, block.hidden_channels
    signs = torch.randint(0, 2, (n, 1, block.height, block.width), generator=generator) * 2.0 - 1
    vector = torch.sign(rand(c)) * (1 + 0.3 * rand(c))
    x = signs * vector.view(1, c, 1, 1) + 0.05 * rand(n, c, block.height, block.width)
    high = (torch.arange(hidden) % 3 == 0).float()  # the channels about the upper kink
    we = be = None
    if block.expand:
        aligned = torch.sign(rand(hidden)).view(-1, 1) * vector * 1.5 / (vector @ vector)
        we = (aligned + 0.1 * rand(hidden, c) * 1.5 / c).view(hidden, c, 1, 1)
        be = 6 * high
    wd = 0.01 * rand(hidden, 1, 3, 3)
    wd[:, :, 1, 1] = 1
    bd = 0.75 * (2 * high - 1) if block.expand else 0.1 * rand(hidden) + 6 * high * 0
    wp, bp = rand(block.out_channels, hidden, 1, 1) / hidden**0.5, rand(block.out_channels)
    return tuple(None if t is None else t.to(dtype) for t in (x, we, be, wd, bd, wp, bp))


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


def scaled(block: Block) -> Block:
    """The block with its channels, on a map of a few tiles."""
    size = {112: 20, 56: 18, 28: 9, 14: 6, 7: 5}[block.height]
    return Block(**vars(block) | {"height": size, "width": size - 1, "batch": 2 if size < 9 else 1})


NETWORK = [scaled(block) for block in dict.fromkeys(network_blocks(224))]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("block", NETWORK, ids=lambda block: block.id)
def test_gradients_of_the_networks_blocks(call: Op, block: Block, kind: str) -> None:
    check_gradients(call, block, kind)


def random_block(seed: int) -> Block:
    r = random.Random(seed)
    in_channels, out_channels = r.choice((3, 8, 12, 16, 24, 25, 40)), r.choice((2, 8, 10, 16, 24, 33, 72))
    expand, dilation, stride = r.random() < 0.8, r.choice((1, 1, 1, 2)), r.choice((1, 2))
    hidden = r.choice((7, 16, 32, 33, 48, 96, 100)) if expand else in_channels
    padding: int | tuple[int, int, int, int] = dilation
    if r.random() < 0.3:
        padding = tuple(r.randint(dilation - 1, dilation) for _ in range(4))
    height, width = (r.choice((5, 6, 7, 8, 9, 13, 19)) for _ in range(2))
    return Block(
        in_channels, hidden, out_channels, height, width, r.choice((1, 1, 2, 5)), stride, dilation, padding, expand
    )


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", range(10))
def test_gradients_of_random_blocks(call: Op, seed: int, kind: str) -> None:
    check_gradients(call, random_block(seed), kind)


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
        assert torch.allclose(found[i], everything[i]) if wanted >> i & 1 else found[i].numel() == 0
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
