"""The fused op on every kernel row: values, borders, tails, memory, threads, errors, and what torch.library wants."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from blocks import CONVOLUTIONS, EDGES, LAYOUTS, Block, check_close, convolutions, expected, network_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused
from mnv2_fused import ops
from mnv2_fused.ops import inverted_residual, inverted_residual_reference

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = "x expand_weight expand_bias depthwise_weight depthwise_bias project_weight project_bias".split()
NAN, INF = float("nan"), float("inf")

# Of every kind of schedule one: with and without expansion, one and several groups of hidden channels, stripes.
KINDS = (
    Block(5, 30, 7, 9, 11, batch=2),
    Block(24, 144, 24, 56, 30, residual=True),
    Block(16, 96, 24, 33, 40, stride=2),
    Block(32, 32, 16, 29, 31, expand=False),
    Block(17, 17, 17, 9, 8, batch=2, expand=False, residual=True, project_relu6=True),
    Block(96, 576, 96, 14, 14, residual=True),
    Block(40, 203, 35, 7, 5, batch=3, stride=2, padding=(0, 1, 0, 1)),
    Block(20, 390, 20, 15, 17, dilation=2, padding=2, residual=True, project_relu6=True),
    Block(8, 50, 9, 40, 20, dilation=4, stride=2, padding=(3, 1, 0, 2)),
    # One and a half vectors of output channels, for an even and an odd number of hidden ones.
    Block(5, 8, 24, 9, 9),
    Block(3, 33, 20, 12, 10, batch=2),
)


def run(block: Block, tensors: tuple[Tensor | None, ...]) -> Tensor:
    return inverted_residual(*tensors, **block.options)


def soil(block: Block, dtype: torch.dtype) -> None:
    """Leaves NaN in the working memory that is kept between calls, with other borders between its rows."""
    wider = replace(block, width=block.width + 3, padding=0, height=block.height + 2 * block.dilation, residual=False)
    wider = replace(wider, width=wider.width + 2 * block.dilation, layout="channels_last")
    for dirty in (wider, replace(block, layout="channels_last")):
        run(dirty, tuple(None if t is None else torch.full_like(t, NAN) for t in dirty.tensors(dtype)))


def check(block: Block, dtype: torch.dtype) -> None:
    tensors = block.tensors(dtype)
    before = [None if t is None else t.clone() for t in tensors]
    if block.batch:
        soil(block, dtype)
    y = run(block, tensors)
    value, bound = expected(tensors, block.options)
    # Small integers are exact in every order of summation, and rounded once: not one product may be missing.
    check_close(y, value.to(dtype).double() if block.integers else value, 0 if block.integers else bound, block)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last), block
    for name, old, new in zip(NAMES, before, tensors, strict=True):
        assert new is None or torch.equal(old, new), f"{name} was written to: {block}"


@st.composite
def random_blocks(draw: st.DrawFn, limit: int) -> Block:
    """Any block of at most about `limit` multiply-adds."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    dilation = draw(st.sampled_from((1, 2, 4)))
    residual = draw(st.booleans())
    stride = 1 if residual else number(1, 2)
    if residual:
        left, top = number(0, 2 * dilation), number(0, 2 * dilation)
        padding = (left, 2 * dilation - left, top, 2 * dilation - top)
    else:
        padding = draw(st.one_of(st.just(dilation), st.tuples(*[st.integers(0, 3)] * 4)))
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    in_channels, expand = number(1, 200), draw(st.integers(0, 3)) > 0
    block = Block(
        in_channels=in_channels,
        hidden_channels=number(1, 200) if expand else in_channels,
        out_channels=in_channels if residual else number(1, 200),
        height=max(number(1, 40), 2 * dilation + 1 - sides[2] - sides[3]),
        width=max(number(1, 40), 2 * dilation + 1 - sides[0] - sides[1]),
        batch=draw(st.sampled_from((1, 2, 3, 0))),
        stride=stride,
        dilation=dilation,
        padding=padding,
        expand=expand,
        residual=residual,
        project_relu6=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        integers=draw(st.booleans()),
    )
    while block.multiply_adds > limit and max(block.height, block.width) > 2 * dilation + 1:
        side = "height" if block.height > block.width else "width"
        block = replace(block, **{side: max(getattr(block, side) // 2, 2 * dilation + 1)})
    return block


# ------------------------------------------------------------------------------------------------------------ values


def test_reference_is_the_definition() -> None:
    """`expected` and the op's reference, against loops over one small block."""
    block = Block(2, 3, 2, 3, 4, stride=2, dilation=1, padding=(1, 2, 0, 1), project_relu6=True)
    x, we, be, wd, bd, wp, bp = tensors = block.tensors(torch.float64)
    y = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    for row in range(1):
        for column in range(3):
            d = bd.clone()
            for ky in range(3):
                for kx in range(3):
                    i, j = row * 2 + ky - 0, column * 2 + kx - 1
                    if 0 <= i < 3 and 0 <= j < 4:  # outside the image h is 0, and not relu6(be)
                        d += wd[:, 0, ky, kx] * (we[:, :, 0, 0] @ x[0, :, i, j] + be).clamp(0, 6)
            y[0, :, row, column] = (wp[:, :, 0, 0] @ d.clamp(0, 6) + bp).clamp(0, 6)
    value, bound = expected(tensors, block.options)
    check_close(value, y, bound)
    check_close(inverted_residual_reference(*tensors, **block.options), y, bound)


@pytest.mark.parametrize("block", KINDS, ids=attrgetter("id"))
def test_reference(block: Block) -> None:
    tensors = block.tensors()
    check_close(inverted_residual_reference(*tensors, **block.options), *expected(tensors, block.options))


@pytest.mark.parametrize(
    ("examples", "limit"), [(60, 2_000_000), pytest.param(2000, 20_000_000, marks=pytest.mark.exhaustive)]
)
def test_random_blocks(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, examples: int, limit: int) -> None:
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(random_blocks(limit))
    def check_one(block: Block) -> None:
        check(block, kernel.dtype)

    check_one()


def edge_blocks(every: int) -> list[Block]:
    blocks = []
    for i, width in enumerate(EDGES):
        for j in range(i % every, len(EDGES), every):
            channels = EDGES[j], EDGES[(2 * j + i) % len(EDGES)], EDGES[(3 * j + 5 * i) % len(EDGES)]
            stride = 1 + (i + j) % 2
            blocks.append(Block(*channels, 1 + (i + j) % 5, width, stride=stride, integers=(i + j) % 3 > 0))
    return blocks


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_tile_edges(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, every: int) -> None:
    for block in edge_blocks(every):
        check(block, kernel.dtype)


@pytest.mark.parametrize("integers", [False, True], ids=["normal", "integers"])
def test_blocks_of_the_network(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, integers: bool) -> None:
    for block in network_blocks(224):
        check(replace(block, integers=integers), kernel.dtype)


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_dilation(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, stride: int, dilation: int) -> None:
    for padding in (dilation, (0, 3, 1, 2), 0):
        for size in ((9, 9), (40, 21), (10, 65)):
            check(Block(6, 35, 10, *size, stride=stride, dilation=dilation, padding=padding), kernel.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, layout: str) -> None:
    for block in KINDS:
        check(replace(block, layout=layout, integers=True), kernel.dtype)


def test_strided_weights(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    """Weights as views into bigger tensors, as pruning and shared storages make them."""

    def strided(t: Tensor) -> Tensor:
        around = torch.full([2 * n + 1 for n in t.shape], NAN, dtype=t.dtype)
        view = around[tuple(slice(1, None, 2) for _ in t.shape)]
        return view.copy_(t)

    for block in KINDS:
        x, *weights = block.tensors(kernel.dtype)
        y = run(block, (x, *(None if w is None else strided(w) for w in weights)))
        assert torch.equal(y, run(block, (x, *weights))), block


def test_big_padding(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    """Windows wholly outside the image see nothing but the biases."""
    for padding in ((20, 0, 0, 20), (3, 17, 9, 40), 33):
        for block in (Block(3, 20, 5, 1, 1), Block(3, 20, 5, 4, 2, stride=2), Block(9, 9, 4, 2, 3, expand=False)):
            check(replace(block, padding=padding, integers=True), kernel.dtype)


def test_long_rows(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    for block in (Block(3, 18, 8, 2, 3001), Block(3, 18, 8, 3001, 2, stride=2), Block(1, 1, 1, 1, 20_000)):
        check(replace(block, integers=True), kernel.dtype)


def test_wide_channels(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    for block in (
        Block(1025, 33, 5, 3, 3),
        Block(5, 2051, 3, 3, 4),
        Block(3, 19, 1283, 2, 2),
        Block(1, 4096, 1, 17, 16),
    ):
        check(replace(block, integers=True), kernel.dtype)
        check(block, kernel.dtype)


@pytest.mark.parametrize("block", [*KINDS, *network_blocks(64)], ids=attrgetter("id"))
def test_rows_agree(monkeypatch: pytest.MonkeyPatch, block: Block) -> None:
    """All rows of a dtype, two by two: each may be off by the bound, so two by twice as much."""
    results: dict[torch.dtype, list[Tensor]] = {}
    for row in mnv2_fused.kernels():
        if row.supported and row.dtype.is_floating_point:
            monkeypatch.setenv("MNV2_FUSED_KERNEL", row.name)
            y = run(block, tuple(None if t is None else t.to(row.dtype) for t in block.tensors()))
            results.setdefault(row.dtype, []).append(y)
    for dtype, ys in results.items():
        _, bound = expected(tuple(None if t is None else t.to(dtype) for t in block.tensors()), block.options)
        for y in ys[1:]:
            check_close(y, ys[0].double(), 2 * bound, block)


# ------------------------------------------------------------------------------------------------- NaN and infinities


@pytest.mark.parametrize("block", KINDS, ids=attrgetter("id"))
@pytest.mark.parametrize("name", ["x", "expand_weight", "expand_bias", "depthwise_weight", "project_bias"])
def test_non_finite(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, block: Block, name: str) -> None:
    """relu6(nan) is nan, relu6(inf) is 6, in the places and only in the places where PyTorch has them."""
    tensors = block.tensors(kernel.dtype)
    tensor = tensors[NAMES.index(name)]
    if tensor is None:
        return
    for values in ((NAN,), (INF,), (-INF,), (NAN, INF, -INF)):
        changed = list(tensors)
        flat = tensor.flatten().clone()
        for i, value in enumerate(values):
            flat[flat.numel() * (2 * i + 1) // 7] = value
        changed[NAMES.index(name)] = flat.view(tensor.shape)
        value, bound = expected(tuple(changed), block.options)
        check_close(run(block, tuple(changed)), value, bound, (block, values))


def test_nan_stays_in_its_window(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    """A row of NaN changes the outputs whose windows hold it, and no bit of any other; nor do other images change."""
    for block in KINDS:
        if block.batch == 1:
            block = replace(block, batch=2)
        tensors = block.tensors(kernel.dtype)
        clean = run(block, tensors)
        for row in (0, block.height // 2, block.height - 1):
            x = tensors[0].clone()
            x[0, :, row] = NAN
            y = run(block, (x, *tensors[1:]))
            top = block.padding if isinstance(block.padding, int) else block.padding[2]
            reached = torch.zeros(y.shape[2], dtype=torch.bool)
            for out_row in range(y.shape[2]):
                first = out_row * block.stride - top
                reached[out_row] = row in (first, first + block.dilation, first + 2 * block.dilation)
            assert y[0, :, reached].isnan().all(dim=0).any() == reached.any(), (block, row)
            assert torch.equal(y[0, :, ~reached], clean[0, :, ~reached]), (block, row)
            assert torch.equal(y[1:], clean[1:]), (block, row)


def test_nan_stays_in_its_channel(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    for block in KINDS:
        tensors = list(block.tensors(kernel.dtype))
        clean = run(block, tuple(tensors))
        for channel in {0, block.out_channels // 2, block.out_channels - 1}:
            weight = tensors[5].clone()
            weight[channel] = NAN
            y = run(block, (*tensors[:5], weight, tensors[6]))
            assert y[:, channel].isnan().all(), block
            others = torch.arange(block.out_channels) != channel
            assert torch.equal(y[:, others], clean[:, others]), block


# ------------------------------------------------------------------------------------------------------------ memory


def test_fresh_memory(kernel: mnv2_fused.ops.Kernel) -> None:
    """Freed memory full of NaN, of every size that a call might ask for, changes nothing."""
    for block in KINDS:
        tensors = block.tensors(kernel.dtype)
        before = run(block, tensors)
        for shift in range(4, 22):
            held = [torch.full((1 << shift,), NAN, dtype=kernel.dtype) for _ in range(3)]
            del held
        assert torch.equal(run(block, tensors), before), block


def test_guarded_pages(kernel: mnv2_fused.ops.Kernel) -> None:
    """Tensors between unmapped pages, in a process of its own: a read outside them kills it."""
    script = Path(__file__).with_name("guarded_pages.py")
    command = [sys.executable, str(script), str(kernel.dtype).removeprefix("torch.")]
    package = str(Path(mnv2_fused.__file__).parents[1])  # the one that is under test here
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, *sys.path])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0, f"exit status {result.returncode} at {last}\n{result.stderr[-3000:]}"
    assert last == ["done"]


# --------------------------------------------------------------------------------------------------------- denormals


def denormal_tensors(block: Block, dtype: torch.dtype, where: str) -> tuple[Tensor | None, ...]:
    tensors = list(block.tensors(dtype))
    tiny = torch.finfo(dtype).tiny
    for i, name in enumerate(NAMES):
        if tensors[i] is not None and (where == "everything" or (where == "weights") == ("weight" in name)):
            tensors[i] = tensors[i].sign() * tiny * 0.37
            assert tensors[i][tensors[i] != 0].abs().max() < tiny
    return tuple(tensors)


@pytest.mark.parametrize("where", ["x and biases", "weights", "everything"])
def test_denormals_are_not_slow(kernel: mnv2_fused.ops.Kernel, where: str) -> None:
    for block in (
        Block(48, 288, 48, 14, 14),
        Block(16, 96, 24, 40, 40, stride=2),
        Block(64, 64, 64, 28, 28, expand=False),
    ):
        normal, denormal = block.tensors(kernel.dtype), denormal_tensors(block, kernel.dtype, where)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(9):
            for tensors, taken in zip((normal, denormal), times, strict=True):
                start = time.perf_counter()
                run(block, tensors)
                taken.append(time.perf_counter() - start)
        assert median(times[1]) < 3 * median(times[0]), (block, median(times[0]), median(times[1]))


def test_denormals_count_as_zero_at_most(kernel: mnv2_fused.ops.Kernel) -> None:
    for block in KINDS:
        for where in ("x and biases", "weights", "everything"):
            tensors = denormal_tensors(block, kernel.dtype, where)
            value, bound = expected(tensors, block.options)
            # Each of the sums loses at most its terms, and a term at most a denormal times a value of some ten.
            lost = 1e3 * sum(t.numel() for t in tensors if t is not None) * torch.finfo(kernel.dtype).tiny
            check_close(run(block, tensors), value, bound + lost, (block, where))


@pytest.mark.parametrize("flush", [False, True])
def test_leaves_denormal_mode_alone(kernel: mnv2_fused.ops.Kernel, flush: bool) -> None:
    """The caller's arithmetic, and that of torch's threads, is after a call what it was before."""
    denormal = torch.full((1_000_000,), 1e-39)  # long enough for all threads to take part
    torch.set_num_threads(3)
    assert (denormal * 0.5).count_nonzero() == denormal.numel()
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        mine = (denormal[:10] * 0.5).count_nonzero()
        run(KINDS[1], KINDS[1].tensors(kernel.dtype))
        assert (denormal[:10] * 0.5).count_nonzero() == mine == (0 if flush else 10)
    finally:
        torch.set_flush_denormal(False)
    assert (denormal * 0.5).count_nonzero() == denormal.numel()


# ----------------------------------------------------------------------------------------------------------- threads


def test_threads_change_no_bit(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    for block in KINDS:
        for batch in (1, 2, 5):
            block = replace(block, batch=batch)
            tensors = block.tensors(kernel.dtype)
            torch.set_num_threads(1)
            one = run(block, tensors)
            for n in (2, 3, 4, 7, 16):
                torch.set_num_threads(n)
                assert torch.equal(run(block, tensors), one), f"{n} threads: {block}"


def test_batch_changes_no_bit(kernel: mnv2_fused.ops.Kernel) -> None:
    for block in KINDS:
        tensors = replace(block, batch=5).tensors(kernel.dtype)
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            together = run(block, tensors)
            for i in range(5):
                assert torch.equal(run(block, (tensors[0][i : i + 1], *tensors[1:])), together[i : i + 1]), (
                    n,
                    i,
                    block,
                )


def test_python_threads(kernel: mnv2_fused.ops.Kernel) -> None:
    """Calls from several Python threads at once, of different shapes."""
    work = [(block, block.tensors(kernel.dtype)) for block in KINDS]
    alone = [run(*one) for one in work]
    barrier = threading.Barrier(4)

    def all_of_them(first: int) -> bool:
        barrier.wait()
        order = [(first + i) % len(work) for i in range(3 * len(work))]
        return all(torch.equal(run(*work[i]), alone[i]) for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(all_of_them, range(4)))


# ------------------------------------------------------------------------------------------------------------ errors


def arguments(**changes: Any) -> tuple[list[Any], dict[str, Any]]:
    """A right call (5 -> 8 -> 5 channels, 6 x 7 pixels) with some arguments replaced."""
    values = dict(zip(NAMES, Block(5, 8, 5, 6, 7).tensors(), strict=True)) | changes
    return [values.pop(name) for name in NAMES], values


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "x of 3 dimensions": (dict(x=torch.zeros(5, 6, 7)), r"x must .*\[N, C, H, W\].*\[5, 6, 7\]"),
    "x of 5 dimensions": (dict(x=torch.zeros(1, 1, 5, 6, 7)), r"x must .*\[N, C, H, W\]"),
    "x of other channels": (dict(x=torch.zeros(1, 4, 6, 7)), r"expand_weight must .*\[8, 4, 1, 1\].*\[8, 5, 1, 1\]"),
    "x without channels": (
        dict(x=torch.zeros(1, 0, 6, 7), expand_weight=torch.zeros(8, 0, 1, 1), project_weight=torch.zeros(5, 8, 1, 1)),
        "x must have channels",
    ),
    "x without rows": (dict(x=torch.zeros(1, 5, 0, 7)), r"x .*0x7"),
    "x without columns": (dict(x=torch.zeros(1, 5, 6, 0)), r"x .*6x0"),
    "x float16": (dict(x=torch.zeros(1, 5, 6, 7).half()), "x must be float32, float64 or bfloat16.*got .*float16"),
    "x integer": (dict(x=torch.zeros(1, 5, 6, 7).int()), "x must be float32, float64 or bfloat16.*int32"),
    "x complex": (dict(x=torch.zeros(1, 5, 6, 7).cfloat()), "x must be float32, float64 or bfloat16.*complex64"),
    "x float64": (dict(x=torch.zeros(1, 5, 6, 7).double()), "weight must be .*float64.*x.*got .*float32"),
    "x no tensor": (dict(x=[[1.0]]), "x must be a tensor"),
    "x on meta": (dict(x=torch.zeros(1, 5, 6, 7, device="meta")), "weight must be on meta.*x.*got cpu"),
    "expand_weight of 2 dimensions": (dict(expand_weight=torch.zeros(8, 5)), r"expand_weight must .*\[8, 5, 1, 1\]"),
    "expand_weight 3x3": (dict(expand_weight=torch.zeros(8, 5, 3, 3)), r"expand_weight must .*\[8, 5, 1, 1\]"),
    "expand_weight of other outputs": (dict(expand_weight=torch.zeros(9, 5, 1, 1)), r"expand_weight must .*\[8, 5"),
    "expand_weight missing": (dict(expand_weight=None), "expand_bias must be None where expand_weight is"),
    "expand_bias missing": (dict(expand_bias=None), r"expand_bias must be a tensor of shape \[8\]"),
    "expand_bias too short": (dict(expand_bias=torch.zeros(7)), r"expand_bias must .*\[8\].*\[7\]"),
    "expand_bias float64": (dict(expand_bias=torch.zeros(8).double()), "expand_bias must be .*float32.*float64"),
    "expansion missing": (
        dict(expand_weight=None, expand_bias=None),
        r"depthwise_weight must .*\[5, 1, 3, 3\].*\[8, 1, 3, 3\]",
    ),
    "depthwise_weight missing": (dict(depthwise_weight=None), "depthwise_weight must be a tensor"),
    "depthwise_weight 5x5": (dict(depthwise_weight=torch.zeros(8, 1, 5, 5)), r"depthwise_weight must .*1, 3, 3\]"),
    "depthwise_weight dense": (dict(depthwise_weight=torch.zeros(8, 8, 3, 3)), r"depthwise_weight must .*1, 3, 3\]"),
    "depthwise_weight half": (
        dict(depthwise_weight=torch.zeros(8, 1, 3, 3).half()),
        "depthwise_weight must be .*float32",
    ),
    "depthwise_weight on meta": (
        dict(depthwise_weight=torch.zeros(8, 1, 3, 3, device="meta")),
        "depthwise_weight must be on cpu.*meta",
    ),
    "depthwise_bias missing": (dict(depthwise_bias=None), r"depthwise_bias must be a tensor of shape \[8\]"),
    "depthwise_bias of 2 dimensions": (
        dict(depthwise_bias=torch.zeros(8, 1)),
        r"depthwise_bias must .*\[8\].*\[8, 1\]",
    ),
    "project_weight of other inputs": (
        dict(project_weight=torch.zeros(5, 9, 1, 1)),
        r"project_weight must .*8, 1, 1\]",
    ),
    "project_weight no tensor": (dict(project_weight=3.0), "project_weight must be a tensor"),
    "project_weight without outputs": (
        dict(project_weight=torch.zeros(0, 8, 1, 1), project_bias=torch.zeros(0)),
        "must have channels",
    ),
    "project_bias missing": (dict(project_bias=None), r"project_bias must be a tensor of shape \[5\]"),
    "project_bias too long": (dict(project_bias=torch.zeros(6)), r"project_bias must .*\[5\].*\[6\]"),
    "project_bias on meta": (dict(project_bias=torch.zeros(5, device="meta")), "project_bias must be on cpu.*meta"),
    "stride 0": (dict(stride=0), "stride must be 1 or 2, got 0"),
    "stride 3": (dict(stride=3), "stride must be 1 or 2, got 3"),
    "stride -1": (dict(stride=-1), "stride must be 1 or 2, got -1"),
    "stride of two": (dict(stride=(2, 2)), r"stride must be 1 or 2, got \(2, 2\)"),
    "stride 1.5": (dict(stride=1.5), "stride must be 1 or 2, got 1.5"),
    "dilation 0": (dict(dilation=0), "dilation must be .*1 to 2.20, got 0"),
    "dilation huge": (dict(dilation=2**21), "dilation must be .*1 to 2.20, got 2097152"),
    "stride float": (dict(stride=1.0), "stride must be 1 or 2, got 1.0"),
    "dilation -2": (dict(dilation=-2), "dilation must be .*1 to 2.20, got -2"),
    "dilation 1.5": (dict(dilation=1.5), "dilation must be .*1 to 2.20, got 1.5"),
    "dilation of two": (dict(dilation=(1, 1)), "dilation must be .*1 to 2.20"),
    "padding -1": (dict(padding=-1), r"padding must be .*\(left, right, top, bottom\).*-1"),
    "padding one negative": (dict(padding=(1, 1, 1, -1)), r"padding must be .*\(left, right, top, bottom\).*-1"),
    "padding of two": (dict(padding=(1, 1)), r"padding must be .*\(left, right, top, bottom\).*\(1, 1\)"),
    "padding by name": (dict(padding="same"), "padding must be .*same"),
    "padding 0.5": (dict(padding=0.5), "padding must be .*0.5"),
    "padding None": (dict(padding=None), "padding must be .*None"),
    "residual at stride 2": (dict(residual=True, stride=2), r"residual needs .*\[1, 5, 6, 7\].*\[1, 5, 3, 4\]"),
    "residual without padding": (dict(residual=True, padding=0), r"residual needs .*\[1, 5, 6, 7\].*\[1, 5, 4, 5\]"),
    "residual of other channels": (
        dict(residual=True, project_weight=torch.zeros(6, 8, 1, 1), project_bias=torch.zeros(6)),
        r"residual needs .*\[1, 5, 6, 7\].*\[1, 6, 6, 7\]",
    ),
    "output without rows": (dict(padding=0, dilation=3), "x of 6x7 .*smaller than the 7x7"),
    "output without columns": (
        dict(x=torch.zeros(1, 5, 9, 1), padding=(0, 1, 1, 1)),
        "x of 9x1 .*smaller than the 3x3",
    ),
}


@pytest.mark.parametrize(
    "layers",
    [
        [ops.Layer(ops.BLOCK, 4, 4, 4), ops.Layer(ops.POOL, 4, 0, 4)],
        [ops.Layer(ops.BLOCK, 4, 4, 4), ops.Layer(ops.BLOCK, 4, 4, 4, 1, 1, 2, 2, 2, 2)],
        [ops.Layer(ops.CONV3X3, 4, 0, 4), ops.Layer(ops.BLOCK, 4, 4, 4, 1, 1, 2, 2, 2, 2)],
    ],
    ids=["pool", "block", "stem"],
)
def test_no_pixels_on_the_way(layers: list[ops.Layer]) -> None:
    """A map that vanishes inside a network is an error, not a mean of nothing."""
    plan = ops.make_plan(layers, torch.float32)
    counts = {ops.BLOCK: 4 * 10 + 4 * 5, ops.CONV3X3: 4 * 4 * 9 + 4, ops.POOL: 0}
    packed = torch.ops.mnv2_fused.pack(torch.zeros(sum(counts[layer.kind] for layer in layers)), plan)
    with pytest.raises(RuntimeError, match="output would be empty"):
        torch.ops.mnv2_fused.network(torch.zeros(1, 4, 1, 1), packed, plan)


@pytest.mark.parametrize("relu6", [0, 1], ids=["linear", "relu6"])
@pytest.mark.parametrize(("layers", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_a_plan(kernel: mnv2_fused.ops.Kernel, layers: list[ops.Layer], size, relu6: int) -> None:
    """With and without the ReLU6 after a stem's or a head's convolution: in training its BatchNorm comes first."""
    x, weights, truth = convolutions(layers, size, relu6, kernel.dtype)
    plan = ops.make_plan([layer._replace(relu6=relu6) for layer in layers], kernel.dtype)
    packed = torch.ops.mnv2_fused.pack(weights.to(kernel.dtype), plan)
    y = torch.ops.mnv2_fused.network(x.to(kernel.dtype), packed, plan)
    assert y.dtype == kernel.dtype and y.shape == truth.shape
    # Of bfloat16, whose sums are exact beside it, half an epsilon is what the result is rounded by; d adds about four.
    terms = 3 if kernel.dtype == torch.bfloat16 else 64
    atol = terms * float(truth.abs().max()) * torch.finfo(kernel.dtype).eps
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize(("changes", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(changes: dict[str, Any], message: str) -> None:
    positional, options = arguments(**changes)
    with pytest.raises(ValueError, match=message):
        inverted_residual(*positional, **options)


RAW_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    name: ERRORS[name]
    for name in ERRORS
    # A call past the Python wrapper meets the schema's types and the checks of the C++ side.
    if not any(w in name for w in ("no tensor", "missing", "1.5", "0.5", "of two", "by name", "None"))
}


@pytest.mark.parametrize("changes", [changes for changes, _ in RAW_ERRORS.values()], ids=RAW_ERRORS)
def test_errors_without_the_wrapper(changes: dict[str, Any]) -> None:
    positional, options = arguments(**changes)
    options = dict(stride=1, dilation=1, padding=1, residual=False, project_relu6=False) | options
    if isinstance(options["padding"], int):
        options["padding"] = (options["padding"],) * 4
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.mnv2_fused.inverted_residual.default(*positional, **options)


def test_missing_argument_is_a_type_error() -> None:
    positional, _ = arguments()
    with pytest.raises(TypeError, match="project_bias"):
        inverted_residual(*positional[:-1])
    with pytest.raises(TypeError, match="positional"):
        inverted_residual(*positional, 2)


def test_impossible_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    positional, _ = arguments()
    for name, words in (
        ("sse_f32", "sse_f32.*avx512_f32.*scalar_f64.*scalar_bf16"),
        ("scalar_f64", "scalar_f64.*float64.*float32"),
        ("scalar_bf16", "scalar_bf16.*bfloat16.*float32"),
    ):
        monkeypatch.setenv("MNV2_FUSED_KERNEL", name)
        with pytest.raises(ValueError, match=words):
            mnv2_fused.selected_kernel(torch.float32)
        with pytest.raises((RuntimeError, ValueError), match=words):
            inverted_residual(*positional)
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_f32")
    with pytest.raises((RuntimeError, ValueError), match="scalar_f32 computes in float32.*bfloat16"):
        inverted_residual(positional[0].bfloat16(), *positional[1:])
    monkeypatch.delenv("MNV2_FUSED_KERNEL")
    with pytest.raises(ValueError, match="float16"):
        mnv2_fused.selected_kernel(torch.float16)


def test_kernel_table() -> None:
    rows = mnv2_fused.kernels()
    names = "avx512_f32 avx2_f32 scalar_f32 scalar_f64 avx512_bf16 avx2_bf16 scalar_bf16"
    assert [row.name for row in rows] == f"{names} avx512_vnni_s8 avx2_s8 scalar_s8".split()
    dtypes = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "s8": torch.int8}
    for row in rows:
        features = mnv2_fused._C.cpu_features()
        assert row.supported == all(features[name] for name in row.requires)
        assert row.supported == (row.reason == "")
        assert row.dtype == dtypes[row.name.rpartition("_")[2]]
    assert all(row.supported for row in rows if row.name.startswith("scalar"))
    for dtype in dtypes.values():
        best = next(row.name for row in rows if row.dtype == dtype and row.supported)
        assert mnv2_fused.selected_kernel(dtype) == best or os.environ.get("MNV2_FUSED_KERNEL")


def test_kernel_is_forced(kernel: mnv2_fused.ops.Kernel) -> None:
    assert mnv2_fused.selected_kernel(kernel.dtype) == kernel.name


# ----------------------------------------------------------------------------------------- what torch.library asks for

SAMPLES = tuple(
    replace(block, layout=layout, height=min(block.height, 9), width=min(block.width, 9))
    for block, layout in zip(KINDS, LAYOUTS + LAYOUTS, strict=False)
)
op = torch.ops.mnv2_fused.inverted_residual.default


def raw(block: Block) -> tuple[Any, ...]:
    sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
    return block.stride, block.dilation, sides, block.residual, block.project_relu6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", SAMPLES[::2], ids=attrgetter("id"))
def test_opcheck(block: Block, dtype: torch.dtype) -> None:
    tensors = block.tensors(dtype)
    torch.library.opcheck(op, (*tensors, *raw(block)))
    wanted = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    torch.library.opcheck(op, (*wanted, *raw(block)))


def test_fake_tensors() -> None:
    for block in (*SAMPLES, *edge_blocks(6)[::9], replace(KINDS[0], batch=0)):
        tensors = block.tensors()
        real = run(block, tensors)
        with FakeTensorMode() as mode:
            fake = run(block, tuple(None if t is None else mode.from_tensor(t) for t in tensors))
        meta = run(block, tuple(None if t is None else t.to("meta") for t in tensors))
        for y in (fake, meta):
            assert (y.shape, y.stride(), y.dtype) == (real.shape, real.stride(), real.dtype), block
        assert fake.device == real.device


class Call(torch.nn.Module):
    """A block as a module, for what takes one."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        _, *weights = block.tensors()
        self.block = block
        for name, weight in zip(NAMES[1:], weights, strict=True):
            self.register_buffer(name, weight)

    def forward(self, x: Tensor) -> Tensor:
        return inverted_residual(x, *(getattr(self, name) for name in NAMES[1:]), **self.block.options)


def test_export_with_dynamic_shapes() -> None:
    block = replace(KINDS[6], batch=4)
    module = Call(block)
    n, h, w = (torch.export.Dim(name, min=4, max=99) for name in ("n", "h", "w"))
    program = torch.export.export(module, (block.tensors()[0],), dynamic_shapes=({0: n, 2: h, 3: w},))
    for batch, height, width in ((4, 7, 5), (9, 16, 6)):
        x = replace(block, batch=batch, height=height, width=width).tensors()[0]
        assert torch.equal(program.module()(x), module(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    block = KINDS[4]
    module = Call(block)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch, height, width in ((2, 9, 8), (3, 12, 5)):
        x = replace(block, batch=batch, height=height, width=width).tensors()[0]
        y = compiled(x)
        assert torch.equal(y, module(x)) and y.stride() == module(x).stride()


GRADIENT_BLOCKS = (
    Block(3, 7, 3, 4, 5, batch=2, residual=True),
    Block(3, 7, 4, 5, 4, stride=2, padding=(0, 1, 0, 1), project_relu6=True),
    Block(4, 4, 4, 4, 4, expand=False, residual=True, project_relu6=True),
    Block(4, 4, 3, 5, 7, expand=False, dilation=2, padding=(2, 0, 1, 3)),
    Block(2, 5, 3, 6, 6, stride=2, dilation=2, padding=2, layout="contiguous"),
)


@pytest.mark.parametrize("block", GRADIENT_BLOCKS, ids=attrgetter("id"))
def test_gradients(block: Block) -> None:
    """Against finite differences in float64, all arguments; and one at a time against PyTorch's own, in float32."""
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in block.tensors(torch.float64)]
    present = [t for t in tensors if t is not None]

    def call(*given: Tensor) -> Tensor:
        values = iter(given)
        return run(block, tuple(None if t is None else next(values) for t in tensors))

    assert torch.autograd.gradcheck(call, present)
    for i, tensor in enumerate(block.tensors()):
        if tensor is None:
            continue
        grads = []
        for function in (inverted_residual, inverted_residual_reference):
            values = list(block.tensors())
            values[i] = tensor.clone().requires_grad_()
            y = function(*values, **block.options)
            assert y.requires_grad
            torch.manual_seed(0)
            y.backward(torch.randn(y.shape))
            grads.append(values[i].grad)
        # Both backwards are sums of some hundred products, of gradients and activations of some ten at most.
        check_close(grads[0], grads[1].double(), 1e3 * torch.finfo(torch.float32).eps * grads[1].abs().max(), NAMES[i])


def test_second_gradients_are_refused() -> None:
    block = GRADIENT_BLOCKS[0]
    tensors = [t.detach().clone().requires_grad_() for t in block.tensors(torch.float64)]
    first = torch.autograd.grad(run(block, tensors).square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first[0].sum(), tensors)


def test_forward_mode() -> None:
    """No forward derivative is silently zero: right, or an error."""
    block = GRADIENT_BLOCKS[0]
    x, *weights = block.tensors(torch.float64)
    tangent = torch.randn_like(x)

    def derivative(function: Callable[..., Tensor]) -> Tensor:
        return torch.func.jvp(lambda x: function(x, *weights, **block.options), (x,), (tangent,))[1]

    right = derivative(inverted_residual_reference)
    try:
        result = derivative(inverted_residual)
    except (RuntimeError, NotImplementedError):
        return
    check_close(result, right, 1e-12 * right.abs().max())


def test_no_gradient_is_recorded_where_none_is_asked_for() -> None:
    block = KINDS[0]
    assert not run(block, block.tensors()).requires_grad
    weights = [t.clone().requires_grad_() for t in block.tensors()]
    with torch.no_grad():
        assert not run(block, tuple(weights)).requires_grad
    with torch.inference_mode():
        assert torch.equal(run(block, tuple(weights)), run(block, block.tensors()))


@pytest.mark.parametrize("block", [*SAMPLES, *network_blocks(32)], ids=attrgetter("id"))
def test_flops(block: Block) -> None:
    """Those that torch counts for the three convolutions."""
    counts = []
    for function in (inverted_residual, inverted_residual_reference):
        with FlopCounterMode(display=False) as counter:
            function(*(None if t is None else t.to("meta") for t in block.tensors()), **block.options)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------------------ the network op, raw


def small_plan(dtype: torch.dtype = torch.float32) -> tuple[str, Tensor]:
    """Stem, a block, head, pooling, classifier; and weights of the right number, in float32."""
    layer, ops = mnv2_fused.ops.Layer, mnv2_fused.ops
    layers = [
        layer(ops.CONV3X3, 3, 0, 8, 2, 1, 1, 1, 1, 1),
        layer(ops.BLOCK, 8, 24, 8, 1, 1, 1, 1, 1, 1, 1, 1, 0),
        layer(ops.POINTWISE, 8, 0, 40),
        layer(ops.POOL, 40, 0, 40),
        layer(ops.LINEAR, 40, 0, 10),
    ]
    sizes = 3 * 9 * 8 + 8, 8 * 24 + 24, 24 * 9 + 24, 24 * 8 + 8, 8 * 40 + 40, 40 * 10 + 10
    return ops.make_plan(layers, dtype), torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_network_opcheck(dtype: torch.dtype) -> None:
    plan, weights = small_plan(dtype)
    packed = torch.ops.mnv2_fused.pack(weights, plan)
    for size in ((2, 3, 32, 20), (0, 3, 7, 7), (1, 3, 1, 1)):
        torch.library.opcheck(torch.ops.mnv2_fused.network.default, (torch.randn(size).to(dtype), packed, plan))


def test_bfloat16_weights_are_rounded_once() -> None:
    """Matrices given as float32 give what they give rounded; biases and taps keep all their bits."""
    plan, weights = small_plan(torch.bfloat16)
    x = torch.randn(1, 3, 9, 9).bfloat16()
    pack, network = torch.ops.mnv2_fused.pack, torch.ops.mnv2_fused.network
    rounded = weights.bfloat16()
    assert torch.equal(pack(rounded, plan), pack(rounded.float(), plan))
    assert pack(weights, plan).dtype == pack(rounded, plan).dtype == torch.float32
    assert not torch.equal(network(x, pack(weights, plan), plan), network(x, pack(rounded, plan), plan))
    block = KINDS[1]
    x, *wide = (None if t is None else t if i == 0 else t * 1.0037 for i, t in enumerate(block.tensors()))
    x = x.bfloat16()
    narrow = [t.bfloat16() if i in (0, 4) else t for i, t in enumerate(wide)]  # the matrices
    y = inverted_residual(x, *wide, **block.options)
    assert torch.equal(y, inverted_residual(x, *(t.float() for t in narrow), **block.options))
    assert torch.equal(y, inverted_residual(x, *narrow, **block.options))
    for i in (1, 2, 3, 5):  # every bias, and the taps
        rounded_too = [t.bfloat16() if j == i else t for j, t in enumerate(narrow)]
        assert not torch.equal(y, inverted_residual(x, *rounded_too, **block.options)), NAMES[1 + i]


FIELDS = len(mnv2_fused.ops.Layer._fields)
PLAN_ERRORS: dict[str, Callable[[list[str]], list[object]]] = {  # of its words
    "empty": lambda plan: [],
    "kernel only": lambda plan: plan[:1],
    "no such kernel": lambda plan: ["avx512", *plan[1:]],
    "no kernel": lambda plan: plan[1:],
    "kernel of another dtype": lambda plan: ["scalar_f64", *plan[1:]],
    "a word": lambda plan: [*plan[:7], "one", *plan[8:]],
    "a fraction": lambda plan: [*plan[:7], "1.5", *plan[8:]],
    "more than 64 bits": lambda plan: [*plan[:7], 1 << 70, *plan[8:]],
    "a word at the end": lambda plan: [*plan, "and"],
    "cut off": lambda plan: plan[:-1],
    "unknown layer": lambda plan: [*plan[:1], 7, *plan[2:]],
    "no channels": lambda plan: [*plan[:2], 0, *plan[3:]],
    "huge channels": lambda plan: [*plan[:2], 1 << 40, *plan[3:]],
    "channels that do not meet": lambda plan: [*plan[: 1 + FIELDS], 1, 9, *plan[3 + FIELDS :]],
    "stride 3": lambda plan: [*plan[:5], 3, *plan[6:]],
    "dilation 0": lambda plan: [*plan[: 6 + FIELDS], 0, *plan[7 + FIELDS :]],
    "negative padding": lambda plan: [*plan[:7], -1, *plan[8:]],
    "layers after the classifier": lambda plan: [*plan, *plan[-FIELDS:]],
    "stem in the middle": lambda plan: [*plan[: 1 + FIELDS], 0, 8, 0, 8, *plan[5 + FIELDS :]],
    "residual at stride 2": lambda plan: [*plan[: 5 + FIELDS], 2, *plan[6 + FIELDS :]],
}


@pytest.mark.parametrize("change", PLAN_ERRORS.values(), ids=PLAN_ERRORS)
def test_plan_errors(change: Callable[[list[str]], list[object]]) -> None:
    plan, weights = small_plan()
    packed = torch.ops.mnv2_fused.pack(weights, plan)
    wrong = " ".join(map(str, change(plan.split())))
    with pytest.raises(RuntimeError):
        torch.ops.mnv2_fused.pack(weights, wrong)
    with pytest.raises(RuntimeError):
        torch.ops.mnv2_fused.network(torch.randn(1, 3, 8, 8), packed, wrong)


def test_network_errors() -> None:
    plan, weights = small_plan()
    packed = torch.ops.mnv2_fused.pack(weights, plan)
    x = torch.randn(1, 3, 8, 8)
    for wrong in (packed[1:], packed.double(), packed[None], packed.new_zeros(2 * len(packed))[::2]):
        with pytest.raises(RuntimeError, match="packed must be"):
            torch.ops.mnv2_fused.network(x, wrong, plan)
    wrongs = (weights[1:], weights.double(), weights.bfloat16(), weights[None], torch.zeros(2 * len(weights))[::2])
    for wrong in wrongs:
        with pytest.raises(RuntimeError, match="weights must"):
            torch.ops.mnv2_fused.pack(wrong, plan)
    for wrong in (x[0], x[:, :2], x.double(), x.bfloat16(), x[:, :, :0], x[..., :0]):
        with pytest.raises(RuntimeError, match="x must"):
            torch.ops.mnv2_fused.network(wrong, packed, plan)
