"""What is tested of training in 16 bits, on CUDA and on the CPU: each pass against float64, and blocks to train.

A gradient jumps where a ReLU6 switches, so that a value rounded from one side to the other changes it by all of it.
The data here (`apart`) keep what goes into every ReLU6 away from 0 and 6, on both sides of both: what is compared is
arithmetic, not luck.
"""

from __future__ import annotations

import copy
import random
import zlib

import torch
from blocks import Block
from emulation import TOLERANCE, Op, dtype_of
from torch import Tensor

from mnv2_fused import InvertedResidual, ops


def check(found: Tensor, truth: Tensor, kind: str, what: object = "") -> None:
    assert found.shape == truth.shape, what
    error = float((found.double() - truth).norm() / truth.norm()) if truth.norm() else float(found.double().norm())
    assert error <= TOLERANCE[kind], f"{what} in {kind}: off by {error:.1e}"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SHAPES = [(2, 24, 9, 7), (1, 25, 1, 1), (3, 16, 16, 16), (1, 8, 257, 1), (5, 33, 4, 3), (1, 160, 7, 7), (2, 320, 3, 3)]


def check_moments(call: Op, shape: tuple[int, ...], kind: str) -> None:
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


def check_maps_and_sums(call: Op, shape: tuple[int, ...], kind: str) -> None:
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


def check_matrix_add(call: Op, shape: tuple[int, ...], kind: str) -> None:
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


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each, relative to its norm; of running means to their deviations, since they may be 0 themselves."""
    result = {}
    for name, exact in truth.items():
        size = truth[name.replace("mean", "var")].sqrt() if name.endswith("running_mean") else exact
        result[name] = float((found[name].double() - exact).norm() / size.norm())
    return result
