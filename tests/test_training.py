"""Training of the blocks, module against module: values, gradients, statistics, memory, and what PyTorch asks for.

The truth is the composition of a block's modules (`fused = False`) in float64; what precision is to be expected is what
the composition gets in float32. The ops by themselves, at inference, are in test_ops.py.
"""

from __future__ import annotations

import copy
import ctypes
import io
import itertools
import pickle
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from blocks import Block
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2, ops, training

pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-9  # what two float64 computations of one thing may differ by, relative to its norm
EPS = torch.finfo(torch.float32).eps
X, EXPAND, DEPTHWISE, PROJECT = ops.WANT_X, ops.WANT_EXPAND, ops.WANT_DEPTHWISE, ops.WANT_PROJECT
VARIED_LAYOUTS = ("channels_last", "contiguous", "transposed", "channel_slice", "crop")  # no value is repeated
Results = dict[str, Tensor]


# ------------------------------------------------------------------------------------ blocks, and what a step gives


def module(case: Block) -> InvertedResidual:
    """The block as a module in float64, in training; both sides of both ReLU6 are reached, some scales are negative."""
    _, expand, _, depthwise, _, project, _ = case.tensors(torch.float64)
    # A ratio of exactly 1 means no expansion.
    ratio = case.hidden_channels / case.in_channels * (1 + 1e-9) if case.expand else 1
    block = InvertedResidual(case.in_channels, case.out_channels, case.stride, ratio).double()
    block.use_res_connect = case.residual
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    convs[-2].dilation = (case.dilation,) * 2
    convs[-2].padding = case.padding if isinstance(case.padding, tuple) else (case.padding,) * 2
    random = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    with torch.no_grad():
        for conv, weight in zip(convs, [w for w in (expand, depthwise, project) if w is not None], strict=True):
            conv.weight.copy_(weight)
        for bn in norms(block):
            bn.weight.uniform_(0.5, 2.5, generator=random).mul_(bn.weight.sub(0.75).sign())
            bn.bias.normal_(1, 1, generator=random)
    return block.train()


def norms(root: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in root.modules() if isinstance(m, nn.BatchNorm2d)]


def step(root: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64, *, fused: bool, seed: int = 1) -> Results:
    """Output, all gradients and all buffers after one forward and backward of a copy."""
    root = copy.deepcopy(root).to(dtype)
    root.fused = fused
    return step_of(root, x.detach().to(dtype).requires_grad_(), seed)


def step_of(root: nn.Module, x: Tensor, seed: int = 1) -> Results:
    """As `step`, of the module itself, for x as it is."""
    if isinstance(root, InvertedResidual) and root.fused:
        assert training.why_not(root.conv, x, root.use_res_connect) == ""
    return results_of(root, x, seed)


def results_of(root: nn.Module, x: Tensor, seed: int = 1) -> Results:
    """The loss weighs each output by another number."""
    y = root(x)
    random = torch.Generator().manual_seed(seed)
    y.backward(torch.randn(y.shape, generator=random, dtype=torch.float64).to(y.dtype))
    gradients = {name: p.grad for name, p in [("x", x), *root.named_parameters()] if p.grad is not None}
    buffers = {name: t.clone() for name, t in root.named_buffers()}
    return {"y": y.detach(), **gradients, **buffers}


def clear_kinks(root: nn.Module, x: Tensor, margin: float = 256 * EPS) -> None:
    """Moves the BatchNorms' shifts until no element stands within rounding of a kink of ReLU6.

    An element that rounds to the other side of 0 or 6 changes the gradients by all that passes through it, which is
    no rounding error. The margin is relative to the kink and the channel's largest element. Shifts move by up to 20
    margins at a time; of a channel of a thousand values one move in two is enough.
    """
    random = torch.Generator().manual_seed(0)

    def move(bn: nn.BatchNorm2d, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        flat = y.transpose(0, 1).flatten(1)
        reach = margin * (6 + (flat - bn.bias[:, None]).abs().amax(1, keepdim=True))
        for _ in range(1000):
            near = torch.minimum(flat.abs(), (flat - 6).abs()) < reach
            moved = near.any(1) * (reach[:, 0] * 20 * torch.rand(len(flat), generator=random, dtype=flat.dtype))
            if not moved.any():
                return flat.view(y.transpose(0, 1).shape).transpose(0, 1)
            bn.bias += moved
            flat = flat + moved[:, None]
        raise AssertionError("no shift without an element near a kink")

    state = copy.deepcopy(dict(root.named_buffers()))
    chains = [list(m) for m in root.modules() if type(m) is nn.Sequential]
    before = [one for chain in chains for one, next in itertools.pairwise(chain) if isinstance(next, nn.ReLU6)]
    handles = [bn.register_forward_hook(move) for bn in before]  # hooks: the modules run one by one
    with torch.no_grad():
        root(x)
        for name, buffer in root.named_buffers():
            buffer.copy_(state[name])
    for handle in handles:
        handle.remove()


def still(root: nn.Module, x: Tensor) -> nn.Module:
    """A copy that takes the statistics of batch x, wherever it takes a batch's, as constants."""

    def fix(bn: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        if bn.training or bn.running_mean is None:
            values = inputs[0].transpose(0, 1).flatten(1)
            bn.running_mean, bn.running_var = values.mean(1), values.var(1, unbiased=False)
            bn.eval()

    root = copy.deepcopy(root)
    root.fused = False
    handles = [bn.register_forward_pre_hook(fix) for bn in norms(root)]
    with torch.no_grad():
        root(x)
    for handle in handles:
        handle.remove()
    return root


def scales(root: nn.Module, x: Tensor, truth: Results) -> dict[str, float]:
    """By name, what an error is measured by: the norm of the truth, or of the terms that cancel to it.

    A BatchNorm takes out of a gradient g its mean and its part along the values: what is left may be nothing (a bias
    before a BatchNorm, two values per channel), and its rounding error is still that of g. So g counts as well: the
    gradient with the statistics held constant. Sums over few channels may happen to be small: three losses are taken.
    What three BatchNorms of two values each leave of a gradient, 1e-17 of it, has no scale of its own: a millionth of
    the block's largest gradient is the least.
    """
    root = still(root, x)
    terms = [step(root, x, fused=False, seed=seed) for seed in (1, 2, 3)]
    result = {
        name: max(float(t[name].norm()) for t in (truth, *terms)) for name in truth if truth[name].is_floating_point()
    }
    least = 1e-6 * max((result[name] for name, _ in root.named_parameters() if name in result), default=0.0)
    result = {name: max(scale, least) for name, scale in result.items()}
    for name in result:
        if name.endswith("running_mean"):  # a mean of values of both signs: their size counts
            result[name] += float(truth[name.replace("mean", "var")].sqrt().norm())
    return result


def errors(found: Results, truth: Results, scale: dict[str, float]) -> dict[str, float]:
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    for name, t in truth.items():
        assert found[name].shape == t.shape, name
        if not t.is_floating_point():
            assert torch.equal(found[name], t), name
    return {name: float((found[name].double() - truth[name]).norm()) / max(s, 1e-300) for name, s in scale.items()}


def check(found: dict[str, float], allowed: dict[str, float] | float, what: object = "") -> None:
    """All errors are within what is allowed; names the tensor that is farthest out."""
    limits = allowed if isinstance(allowed, dict) else dict.fromkeys(found, allowed)
    excess = {name: e / limits[name] if e == e else float("inf") for name, e in found.items()}
    name = max(excess, key=excess.get)
    assert excess[name] <= 1, f"{name} is off by {found[name]:.3g}, allowed {limits[name]:.3g}: {what}"


def check_exact(root: nn.Module, x: Tensor, what: object = "") -> None:
    """In float64 a fused step and the composition's agree."""
    truth = step(root, x, fused=False)
    check(errors(step(root, x, fused=True), truth, scales(root, x, truth)), EXACT, what)


def condition(block: InvertedResidual, x: Tensor) -> float:
    """How much larger than a channel's standard deviation the terms are that sum up to its values, at most.

    By this factor the BatchNorms enlarge what rounds in the convolutions; it is large where a channel has few values.
    """
    found: list[float] = []

    def look(conv: nn.Conv2d, inputs: tuple[Tensor], v: Tensor) -> None:
        terms = conv._conv_forward(inputs[0].abs(), conv.weight.abs(), None)
        std = (v.var((0, 2, 3), unbiased=False) + 1e-5).sqrt()
        found.append(float((terms.amax((0, 2, 3)) / std).max()))

    block = copy.deepcopy(block)
    block.fused = False
    for conv in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
        conv.register_forward_hook(look)
    with torch.no_grad():
        block(x)
    return max(found)


# ------------------------------------------------------------------------------------------------------ random blocks


@st.composite
def random_blocks(draw: st.DrawFn, limit: int) -> Block:
    """Any block of at most about `limit` multiply-adds with at least two values per channel."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    dilation, expand, residual = number(1, 3), number(0, 3) > 0, draw(st.booleans())
    stride = 1 if residual else number(1, 2)
    in_channels = draw(st.one_of(st.integers(1, 200), st.integers(1, 20)))
    padding = dilation if residual or number(0, 2) else (number(0, 3), number(0, 3))
    y, x = (padding,) * 2 if isinstance(padding, int) else padding
    case = Block(
        in_channels=in_channels,
        hidden_channels=number(1, 6 * in_channels) if expand else in_channels,
        out_channels=in_channels if residual else number(1, 200),
        height=max(number(1, 30), 2 * dilation + 1 - 2 * y),
        width=max(number(1, 30), 2 * dilation + 1 - 2 * x),
        batch=number(1, 3),
        stride=stride,
        dilation=dilation,
        padding=padding,
        expand=expand,
        residual=residual,
        layout=draw(st.sampled_from(VARIED_LAYOUTS)),
    )
    while case.multiply_adds > limit and max(case.height, case.width) > 2 * dilation + 1:
        side = "height" if case.height > case.width else "width"
        case = replace(case, **{side: max(getattr(case, side) // 2, 2 * dilation + 1)})
    height = (case.height + 2 * y - 2 * dilation - 1) // stride + 1
    width = (case.width + 2 * x - 2 * dilation - 1) // stride + 1
    return case if case.batch * height * width > 1 else replace(case, batch=2)


class Prepared(NamedTuple):
    block: InvertedResidual
    x: Tensor
    truth: Results
    scale: dict[str, float]
    eager: dict[str, float]  # the composition's errors in float32
    condition: float


@lru_cache(100)
def prepare(case: Block) -> Prepared:
    """What all kernel rows are compared with."""
    block, x = module(case), case.tensors()[0].double()
    clear_kinks(block, x)
    truth = step(block, x, fused=False)
    scale = scales(block, x, truth)
    eager = errors(step(block, x, torch.float32, fused=False), truth, scale)
    return Prepared(block, x, truth, scale, eager, condition(block, x))


@pytest.mark.parametrize(
    ("examples", "limit"), [(60, 1_000_000), pytest.param(1000, 10_000_000, marks=pytest.mark.exhaustive)]
)
def test_random_blocks(kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, examples: int, limit: int) -> None:
    """Output, gradients and running statistics of any block.

    In float32 two ways of rounding the same sums differ by some eps times `condition`; where the composition's own
    error is larger, it tells what is to be expected. Neither says more than the order of magnitude: allowed is for each
    tensor the larger of 32 eps `condition` (the roundings of three stages and of their gradients add up) and ten times
    the composition's. Over all of them the median must be no more than twice the composition's.
    """
    ours: list[float] = []
    eagers: list[float] = []

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(random_blocks(limit))
    def check_one(case: Block) -> None:
        block, x, truth, scale, eager, condition = prepare(case)
        found = errors(step(block, x, kernel.dtype, fused=True), truth, scale)
        if kernel.dtype == torch.float64:
            check(found, EXACT, case)
            return
        check(found, {name: max(10 * e, 32 * EPS * condition) for name, e in eager.items()}, case)
        ours.extend(found.values())
        eagers.extend(eager.values())

    check_one()
    if ours:
        assert median(ours) <= 2 * median(eagers)


@pytest.mark.parametrize(
    "case",
    [
        Block(4, 20, 4, 75, 64, batch=2, residual=True),
        Block(3, 18, 5, 90, 71, stride=2),
        Block(4, 20, 4, 64, 83, dilation=3, padding=3),
        Block(18, 18, 5, 90, 71, expand=False, stride=2, dilation=2, padding=(0, 3)),
    ],
    ids=lambda case: case.id,
)
def test_tall_maps(kernel: mnv2_fused.ops.Kernel, case: Block) -> None:
    """Passes over which the rings wrap around many times: the buffers hold a few of these rows."""
    block, x, truth, scale, eager, condition = prepare(case)
    found = errors(step(block, x, kernel.dtype, fused=True), truth, scale)
    exact = kernel.dtype == torch.float64
    check(found, EXACT if exact else {name: max(10 * e, 32 * EPS * condition) for name, e in eager.items()}, case)


def test_sums_over_many_pixels(float32_kernel: mnv2_fused.ops.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a quarter of a million values of one sign: what a float32 would add up is off by 1e-5 and more."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) + 0.5

    x, dz = uniform(64, 4, 64, 64), uniform(64, 4, 64, 64)
    weights = uniform(20, 4, 1, 1) / 4, uniform(20), uniform(20, 1, 3, 3) / 9, uniform(4, 20, 1, 1)
    table = torch.stack([torch.ones(20), torch.zeros(20), torch.ones(20), uniform(20), torch.zeros(20), uniform(20)])

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        tensors = (t.to(dtype) for t in (dz, x, *weights, table))
        wanted = EXPAND | DEPTHWISE | PROJECT
        return torch.ops.mnv2_fused.block_gradients(*tensors, 1, 1, (1, 1, 1, 1), wanted)[1:]

    results = gradients(torch.float32)
    monkeypatch.delenv("MNV2_FUSED_KERNEL")
    for found, truth in zip(results, gradients(torch.float64), strict=True):
        assert float((found - truth).norm() / truth.norm()) < 2e-6


# --------------------------------------------------------------------------------------------- what PyTorch asks for

SMALL = (
    Block(3, 7, 3, 4, 5, batch=2, residual=True),
    Block(3, 7, 4, 5, 4, batch=2, stride=2),
    Block(4, 4, 4, 4, 4, batch=2, expand=False, residual=True),
    Block(4, 4, 3, 5, 7, expand=False, dilation=2, padding=2),
)
USUAL = Block(12, 44, 12, 9, 8, batch=2, residual=True)  # for what depends on no shape


def prepared(case: Block = USUAL) -> tuple[InvertedResidual, Tensor]:
    block, x = module(case), case.tensors()[0].double()
    clear_kinks(block, x)
    return block, x


@pytest.mark.parametrize("evaluated", [(), (0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradcheck(case: Block, evaluated: tuple[int, ...]) -> None:
    """Of `block_train` through the module, with respect to the input and every parameter."""
    block, x = prepared(case)
    for i in evaluated:
        norms(block)[i % len(norms(block))].eval()
    names = [name for name, _ in block.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        y = torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))
        assert "block_train" in type(y.grad_fn).__name__
        return y

    parameters = [p.detach().clone().requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters))


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_gradcheck_of_inverted_residual(case: Block) -> None:
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors(torch.float64)]
    assert torch.autograd.gradcheck(lambda *values: ops.inverted_residual(*values, **case.options), tensors)


@contextmanager
def recorded(name: str) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every call that training.py makes of an op."""
    calls: list[tuple[Any, ...]] = []

    class Spy:
        def __getattr__(self, asked: str) -> Any:
            op = getattr(torch.ops.mnv2_fused, asked)
            return op if asked != name else lambda *arguments: calls.append(arguments) or op(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_OPS", Spy())
        yield calls


def stage_arguments(block: InvertedResidual, x: Tensor) -> tuple[Any, ...]:
    """The arguments of `block_train`, as `run_block` gives them; parameters detached."""
    with recorded("block_train") as calls:
        block(x)
    return tuple(t.detach().clone() if isinstance(t, Tensor) else t for t in calls[0])


def samples(dtype: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op of ours."""
    found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in OPS}
    for case in SMALL:
        x, *weights = case.tensors(dtype)
        sides = (case.padding,) * 4
        geometry = case.stride, case.dilation, sides
        found["inverted_residual"].append((x, *weights, *geometry, case.residual, False))
        we, be, wd, _, wp, _ = weights
        found["filter_moments"].append((x, we, be, wd, *geometry))
        z = ops.inverted_residual(x, *weights, **case.options)
        hidden, out, channels = case.hidden_channels, case.out_channels, case.in_channels
        dz, table = torch.randn_like(z), torch.randn(6, hidden, dtype=dtype)
        for wanted in (0, 8, 15):
            found["block_gradients"].append((dz, x, we, be, wd, wp, table, *geometry, wanted))
        found["moments"].append((x,))
        found["channel_moments"].append((z,))
        found["channel_products"].append((dz, z, torch.randn(out, dtype=dtype)))
        for other in (None, z):
            found["affine"].append((dz, other, torch.randn(3, out, dtype=dtype)))
            y, residual = x.clone(), None if other is None else torch.randn_like(x)
            matrix, bias = torch.randn(channels, channels, dtype=dtype), torch.randn(channels, dtype=dtype)
            found["matrix_add_"].append((y, x, matrix, bias, residual))

        block = module(case).to(dtype)
        arguments = stage_arguments(block, x)
        wanting = tuple(
            t.clone().requires_grad_() if i in GRADIENTS and t is not None else t for i, t in enumerate(arguments)
        )
        found["block_train"] += [arguments, wanting]
        y, *saved = torch.ops.mnv2_fused.block_train(*arguments)
        asked = [arguments[i] is not None for i in GRADIENTS]
        for wanted in (asked, [a and i % 3 == 0 for i, a in enumerate(asked)]):
            found["block_train_backward"].append((torch.randn_like(y), *saved, wanted, *arguments))
    norm = [torch.rand(8, dtype=dtype) + 0.5 for _ in range(4)]
    for statistics, bias in ((norm[2:], None), ((None, None), norm[1])):
        weight = torch.randn(8, 3, 3, 3, dtype=dtype)
        arguments = (
            torch.randn(2, 3, 9, 8, dtype=dtype),
            weight,
            bias,
            *norm[:2],
            *statistics,
            1e-5,
            (2, 2),
            (1, 1),
            "",
        )
        found["conv_bn_relu6"].append(arguments)
        y, *saved = torch.ops.mnv2_fused.conv_bn_relu6(*arguments)
        wanted = [True, True, bias is not None, True, True]
        found["conv_bn_relu6_backward"].append((torch.randn_like(y), *saved, wanted, *arguments))
    layers = [ops.Layer(ops.CONV3X3, 3, 0, 8, 2, 1, 1, 1, 1, 1), ops.Layer(ops.POINTWISE, 8, 0, 40)]
    plan, weights = ops.make_plan(layers, dtype), torch.randn(3 * 9 * 8 + 8 + 8 * 40 + 40, dtype=dtype)
    found["pack"].append((weights, plan))
    found["network"].append((torch.randn(2, 3, 9, 8, dtype=dtype), torch.ops.mnv2_fused.pack(weights, plan), plan))
    return found


GRADIENTS = [0] + [1 + 7 * stage + field for stage in range(3) for field in range(4)]  # arguments that have one
OPS = (
    "inverted_residual pack network moments filter_moments block_gradients channel_moments channel_products affine "
    "matrix_add_ block_train block_train_backward conv_bn_relu6 conv_bn_relu6_backward"
).split()


def test_every_op_is_sampled() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "mnv2_fused::" in name}
    assert registered == set(OPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for arguments in samples(dtype)[name]:
        torch.library.opcheck(getattr(torch.ops.mnv2_fused, name).default, arguments)


# ------------------------------------------------------------------------------------------------ as nn.BatchNorm2d's


def renorm(**options: Any) -> Callable[[InvertedResidual], None]:
    """Replaces the BatchNorms by others with the same parameters and these options."""

    def change(block: InvertedResidual) -> None:
        for parent in block.conv.modules():
            for name, old in list(parent._modules.items()):
                if isinstance(old, nn.BatchNorm2d):
                    new = nn.BatchNorm2d(old.num_features, **options).double()
                    new.load_state_dict(
                        {**new.state_dict(), **{k: v for k, v in old.state_dict().items() if k in new.state_dict()}}
                    )
                    parent._modules[name] = new

    return change


def untracked(block: InvertedResidual) -> None:
    for bn in norms(block):
        bn.track_running_stats = False


def uncounted(block: InvertedResidual) -> None:
    for bn in norms(block):
        bn.num_batches_tracked = None


def biased(block: InvertedResidual) -> None:
    for conv in block.modules():
        if isinstance(conv, nn.Conv2d):
            random = torch.Generator().manual_seed(conv.out_channels)
            conv.bias = nn.Parameter(torch.randn(conv.out_channels, generator=random).double())


NORMS: dict[str, Callable[[InvertedResidual], None]] = {
    "as built": lambda block: None,
    "momentum None": renorm(momentum=None),
    "momentum 0.3": renorm(momentum=0.3),
    "momentum 0": renorm(momentum=0.0),
    "momentum 1": renorm(momentum=1.0),
    "no running statistics": renorm(track_running_stats=False),
    "not affine": renorm(affine=False),
    "eps 0.1": renorm(eps=0.1),
    "momentum None, not affine, eps 1": renorm(momentum=None, affine=False, eps=1.0),
    "track_running_stats switched off": untracked,
    "no num_batches_tracked": uncounted,
    "convolutions with biases": biased,
}


@pytest.mark.parametrize("change", NORMS.values(), ids=NORMS)
def test_norms(change: Callable[[InvertedResidual], None]) -> None:
    """Three steps in training and one in eval mode: values, gradients, running statistics, counts."""
    for case in (USUAL, SMALL[1], SMALL[3]):
        block, _ = prepared(case)
        change(block)
        composition = copy.deepcopy(block)
        composition.fused = False
        for i in range(4):
            x = torch.randn(2, *case.tensors()[0].shape[1:], dtype=torch.float64) + i
            block.train(i < 3), composition.train(i < 3)
            scale = scales(composition, x, step(composition, x, fused=False))
            truth = step_of(composition, x.clone().requires_grad_())
            found = step_of(block, x.clone().requires_grad_())
            check(errors(found, truth, scale), EXACT, (i, case))
            block.zero_grad(), composition.zero_grad()


def test_batches_are_counted_once() -> None:
    block, x = prepared()

    def counts() -> set[int]:
        return {int(bn.num_batches_tracked) for bn in norms(block)}

    y = block(x)
    assert counts() == {1}
    y.sum().backward()
    assert counts() == {1}
    with torch.no_grad():
        block(x)
    assert counts() == {2}
    with torch.inference_mode():
        block(x)
    assert counts() == {3}
    with torch.no_grad():
        block.eval()(x)
    assert counts() == {3}


def test_running_variance_is_unbiased() -> None:
    block, x = prepared(SMALL[2])
    values = block.conv[0][0](x)
    block(x)
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=True)
    assert torch.allclose(block.conv[0][1].running_mean, 0.1 * mean)
    assert torch.allclose(block.conv[0][1].running_var, 0.9 + 0.1 * var)


KINDS_OF_NORM = ("as built", "convolutions with biases", "no running statistics")


@pytest.mark.parametrize("evaluated", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("kind", KINDS_OF_NORM)
def test_norms_in_eval_mode_one_by_one(kind: str, evaluated: tuple[bool, ...]) -> None:
    for case in (USUAL, SMALL[1], SMALL[3]):
        block, x = prepared(case)
        NORMS[kind](block)
        for _ in range(3):
            step_of(block, x + 1)  # the running statistics are not the batch's
        block.zero_grad()
        for bn, off in zip(norms(block)[::-1], evaluated, strict=False):
            bn.train(not off)
        check_exact(block, x, (case, evaluated))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS_OF_NORM[:2])
def test_any_parameters_frozen(kind: str, seed: int) -> None:
    """What is asked for is right, what is not has no gradient."""
    random = torch.Generator().manual_seed(seed)

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=random) < p)

    for case in (USUAL, SMALL[1], SMALL[3]):
        block, x = prepared(case)
        NORMS[kind](block)
        for p in block.parameters():
            p.requires_grad_(chance(1 - seed % 4 / 4))
        for bn in norms(block):
            bn.train(chance(0.7))
        wanted = {name for name, p in block.named_parameters() if p.requires_grad}
        truth = step(block, x, fused=False)
        scale = scales(block, x, truth)
        for of_x in (True, False):
            one = copy.deepcopy(block)
            if not of_x and not wanted:
                assert not one(x).requires_grad
                continue
            found = step_of(one, x.clone().requires_grad_(of_x))
            assert ("x" in found) == of_x
            assert {name for name, p in one.named_parameters() if p.grad is not None} == wanted
            check(errors({"x": truth["x"], **found}, truth, scale), EXACT, (case, sorted(wanted), of_x))


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        ("conv.3.weight", []),
        ("conv.3.bias", []),
        ("conv.2.weight", [PROJECT]),
        ("conv.1.1.weight", [0]),
        ("conv.1.0.weight", [0, DEPTHWISE]),
        ("conv.0.1.bias", [0, EXPAND]),
        ("conv.0.0.weight", [0, EXPAND]),
        ("x", [0, X | EXPAND]),
        ("all", [PROJECT, X | EXPAND | DEPTHWISE]),
    ],
)
def test_only_what_is_asked_for_is_computed(wanted: str, passes: list[int]) -> None:
    """In how many passes of the kernel, and what each is asked for."""
    block, x = prepared()
    for name, p in block.named_parameters():
        p.requires_grad_(wanted in (name, "all"))
    with recorded("block_gradients") as calls:
        step_of(block, x.requires_grad_(wanted in ("x", "all")))
    assert [arguments[-1] for arguments in calls] == passes


@pytest.mark.parametrize(
    ("wanted", "passes"), [("x", [X]), ("conv.0.0.weight", [EXPAND]), ("conv.2.weight", [PROJECT])]
)
def test_frozen_norms_take_one_pass(wanted: str, passes: list[int]) -> None:
    block, x = prepared()
    block.eval()
    for name, p in block.named_parameters():
        p.requires_grad_(wanted == name)
    with recorded("block_gradients") as calls:
        step_of(block, x.requires_grad_(wanted == "x"))
    assert [arguments[-1] for arguments in calls] == passes


def test_all_parameters_frozen() -> None:
    block, x = prepared()
    block.requires_grad_(False)
    assert not block(x).requires_grad
    check_exact(block, x)


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 2, 2), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_one_value_per_channel(size: tuple[int, int, int], stride: int) -> None:
    """PyTorch's own error, word for word; no statistic moves that would not have moved without us."""
    block = InvertedResidual(8, 8, stride, 6).double().train()
    composition = copy.deepcopy(block)
    composition.fused = False
    before = {name: t.clone() for name, t in block.named_buffers()}
    x = torch.randn(size[0], 8, *size[1:]).double()
    messages = []
    for one in (block, composition):
        try:
            one(x)
            messages.append("")
        except ValueError as error:
            messages.append(re.sub(r"torch\.Size\((.*)\)", r"\1", str(error)))
    assert messages[0] == messages[1]
    assert messages[0] == "" or "more than 1 value per channel" in messages[0]
    moved = dict(composition.named_buffers())
    for name, t in block.named_buffers():
        assert torch.allclose(t, before[name]) or torch.allclose(t, moved[name]), name


@pytest.mark.parametrize("input", ["constant", "constant by channel", "far from 0", "far from 0, a channel constant"])
def test_hard_inputs(float32_kernel: mnv2_fused.ops.Kernel, input: str) -> None:
    """Variance 0, or a mean of 100 standard deviations: errors at most 3 times the composition's, or 64 eps.

    Where all is constant, every BatchNorm but the filtered borders' has variance 0 and enlarges what rounds by
    eps^-1/2; the composition's error tells by how much.
    """
    for case in (USUAL, SMALL[1], Block(16, 96, 24, 14, 14, batch=2), Block(32, 32, 16, 13, 9, batch=3, expand=False)):
        x = case.tensors()[0].double()
        if input == "constant":
            x = torch.full_like(x, 3.7)
        elif input == "constant by channel":
            x = torch.randn(1, x.shape[1], 1, 1).double().expand_as(x).clone()
        else:
            x = x + 100
        if "a channel" in input:
            x[:, 0] = 50
        x = x.float().double()
        block = module(case).float().double()
        clear_kinks(block, x)
        block = block.float().double()
        truth = step(block, x, fused=False)
        scale = scales(block, x, truth)
        found = errors(step(block, x, torch.float32, fused=True), truth, scale)
        eager = errors(step(block, x, torch.float32, fused=False), truth, scale)
        check(found, {name: max(3 * e, 64 * EPS) for name, e in eager.items()}, (input, case))


def test_gradients_of_one_sign(float32_kernel: mnv2_fused.ops.Kernel) -> None:
    """Where the gradients of a channel do not cancel, a mean that was rounded to float32 is seen: eager's are."""
    gains = []
    for seed in range(5):
        torch.manual_seed(seed)
        block = InvertedResidual(16, 16, 1, 1).train()
        block.conv[0][1].bias.data.fill_(3)
        x = 100 + torch.randn(4, 16, 12, 12)
        results = []
        for dtype, fused in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
            one = copy.deepcopy(block).to(dtype)
            one.fused = fused
            y = one(x.to(dtype))
            (y * torch.linspace(1, 2, y.numel(), dtype=dtype).view_as(y)).sum().backward()
            results.append(one.conv[2].weight.grad.double())
        truth, eager, found = results
        gains.append(float((eager - truth).norm() / (found - truth).norm()))
    assert median(gains) > 2


def test_no_variance_is_negative() -> None:
    """Where the terms of e cancel, its variance, a sum over the products of x, rounds to either side of 0."""
    random = torch.Generator().manual_seed(0)
    block = InvertedResidual(8, 8, 1, 6).double().train()
    direction = torch.randn(8, generator=random).double()
    weight = torch.randn(48, 8, generator=random).double()
    weight -= torch.outer(weight @ direction, direction) / direction.square().sum()
    block.conv[0][0].weight.data.copy_(weight.view(48, 8, 1, 1))
    block.conv[0][1].momentum = 1.0
    x = torch.randn(2, 1, 9, 9, generator=random).double() * direction.view(1, 8, 1, 1)
    found = block(x)
    assert training.why_not(block.conv, x, block.use_res_connect) == "" and found.isfinite().all()
    assert block.conv[0][1].running_var.min() >= 0


# -------------------------------------------------------------------------------------------------- unusual children


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def group_norm(block: InvertedResidual) -> None:
    block.conv[1][1] = nn.GroupNorm(4, block.conv[1][1].num_features)


def batch_norm_of_another_kind(block: InvertedResidual) -> None:
    class Own(nn.BatchNorm2d):
        pass

    block.conv[3] = Own(block.out_channels)


def parametrized(block: InvertedResidual) -> None:
    parametrize.register_parametrization(block.conv[0][0], "weight", Double())


def pruned(block: InvertedResidual) -> None:
    prune.l1_unstructured(block.conv[2], "weight", 0.5)


def own_forward(block: InvertedResidual) -> None:
    block.conv[1].forward = lambda x: 2 * nn.Sequential.forward(block.conv[1], x)


def silu(block: InvertedResidual) -> None:
    block.conv[0][2] = nn.SiLU()


def reflected(block: InvertedResidual) -> None:
    block.conv[1][0].padding_mode = "reflect"


CHILDREN = (group_norm, batch_norm_of_another_kind, parametrized, pruned, own_forward, silu, reflected)


@pytest.mark.parametrize("change", CHILDREN, ids=lambda change: change.__name__)
def test_unusual_children(change: Callable[[InvertedResidual], None]) -> None:
    """The block runs as its modules do, and says why."""
    x = torch.randn(2, 16, 7, 7)
    block = InvertedResidual(16, 16, 1, 6).train()
    assert training.why_not(block.conv, x, block.use_res_connect) == ""
    change(block)
    assert training.why_not(block.conv, x, block.use_res_connect) != ""
    state, results = copy.deepcopy(block.state_dict()), []
    for block.fused in (True, False):  # no copies: a forward of its own would stay the original's
        block.load_state_dict(state)
        block.zero_grad()
        results.append(results_of(block, x.clone().requires_grad_()))
    check_equal(*results)


def not_inplace(block: InvertedResidual) -> InvertedResidual:
    """PyTorch's backward hooks do not go together with what works in place."""
    for module in block.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = False
    return block


def test_hooks_fire() -> None:
    """Inside the block they keep it from running fused; of the block itself they fire beside it."""
    x = torch.randn(2, 16, 7, 7).requires_grad_()
    registers = (
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    )
    for register, find in itertools.product(
        registers,
        (
            lambda b: b.conv[0][0],
            lambda b: b.conv[3],
            lambda b: b.conv[1][2],
            lambda b: b.conv[1],
            lambda b: b.conv,
            lambda b: b,
        ),
    ):
        block = not_inplace(InvertedResidual(16, 16, 1, 6).train())
        fired: list[int] = []
        handle = register(find(block), lambda *_, fired=fired: fired.append(1))
        assert (training.why_not(block.conv, x, True) != "") == (find(block) is not block)
        block(x).sum().backward()
        assert fired == [1], (register.__name__, type(find(block)))
        handle.remove()
        assert training.why_not(block.conv, x, True) == ""


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def test_global_hooks_fire(kind: str) -> None:
    """As often as without us: for the block, its Sequentials and each of their modules."""
    x, counts = torch.randn(2, 16, 7, 7).requires_grad_(), []
    for fused in (True, False):
        block = not_inplace(InvertedResidual(16, 16, 1, 6).train())
        block.fused = fused
        fired: list[type] = []
        handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda m, *_, fired=fired: fired.append(type(m)))
        try:
            block(x).sum().backward()
        finally:
            handle.remove()
        counts.append(len(fired))
    assert counts[0] == counts[1]


def test_hooks_of_parameters_fire() -> None:
    block, x = prepared()
    truth = step(block, x, fused=False)
    fired = []
    block.conv[0][0].weight.register_hook(lambda grad: 2 * grad)
    block.conv[2].weight.register_post_accumulate_grad_hook(fired.append)
    found = step_of(block, x)
    assert len(fired) == 1
    assert torch.allclose(found["conv.0.0.weight"], 2 * truth["conv.0.0.weight"])


# ------------------------------------------------------------------------------------------------------------ memory


def test_what_autograd_keeps() -> None:
    """At most 10 MB per image over the whole network: x and z of each block, and what the stem and the head keep."""
    model, images = MobileNetV2().train(), torch.randn(2, 3, 224, 224)
    own = {t.untyped_storage().data_ptr() for t in (images, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(images)  # alive, as all that is kept: no address comes twice
    assert sum(kept.values()) / len(images) <= 10e6, f"{sum(kept.values()) / len(images) / 1e6:.1f} MB"
    assert y.requires_grad


LARGE = Block(8, 256, 8, 224, 224, residual=True)  # 51 MB of hidden channels, 1.6 MB of x


def allocated(block: InvertedResidual, x: Tensor) -> int:
    """The largest tensor of a forward and backward, in bytes.

    A TorchDispatchMode is switched off inside the ops that it sees, `block_train` among them. The profiler's memory
    events come from PyTorch's allocator itself and hold every tensor, whoever makes it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        block(x).sum().backward()
    events = profiler.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def peak_growth(block: InvertedResidual, x: Tensor) -> int:
    """By how many bytes the process grows in a forward and backward, at its peak: tensors and working memory alike.

    Linux's high-water mark, put back to what is resident now; freed memory is given back to the system before, so that
    none can be used anew unseen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the kernel's high-water mark cannot be put back: {error}")

    def read(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    before = read("VmRSS")
    block(x).sum().backward()
    return read("VmHWM") - before


@pytest.mark.parametrize("measure", [allocated, peak_growth], ids=lambda measure: measure.__name__)
@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_the_expanded_tensor_is_never_made(measure: Callable[..., int], evaluated: bool) -> None:
    block, x = module(LARGE).float().train(not evaluated), LARGE.tensors()[0].requires_grad_()
    expanded = 4 * LARGE.hidden_channels * LARGE.height * LARGE.width
    small = SMALL[0]
    step_of(module(small).float(), small.tensors()[0].requires_grad_())  # code and threads are there before
    assert measure(block, x) < expanded / 2
    block.fused = False
    assert measure(block, x) >= expanded, "the measure sees what the composition makes"


# ----------------------------------------------------------------------------------------------------- whole network


def compare_networks(width_mult: float, size: tuple[int, int, int], seeds: int) -> None:
    """Errors of one step's gradients and statistics, ours beside the composition's, in units of what is compared.

    With a million elements before a ReLU6, some round to the other side of a kink in every run, here other ones than
    there, and change what is below by orders of magnitude more than rounding. `clear_kinks` leaves few that can; those
    are the reason for medians over seeds. The projections' BatchNorm shifts have gradient 0, as the BatchNorm of the
    next convolution takes every constant away: their errors are measured by the gradient of the same BatchNorm's scale,
    a sum of the same terms, times values of size 1.
    """
    centers: dict[bool, list[float]] = {True: [], False: []}
    largest: dict[bool, list[float]] = {True: [], False: []}
    names: list[tuple[str, float]] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = MobileNetV2(width_mult=width_mult, dropout=0.0, num_classes=20).train()
        model, x = model.double(), torch.randn(size[0], 3, *size[1:]).double()
        clear_kinks(model, x, 16 * EPS)
        truth = step(model, x, fused=False)
        scale = {name: float(t.norm()) for name, t in truth.items() if t.is_floating_point()}
        for name in scale:
            if re.fullmatch(r"features\.\d+\.conv\.\d\.bias", name):
                scale[name] = scale[name.replace("bias", "weight")]
        for fused in (True, False):
            found = errors(step(model, x, torch.float32, fused=fused), truth, scale)
            centers[fused].append(median(found.values()))
            name = max(found, key=found.get)
            largest[fused].append(found[name])
            names.append((name, found[name]))
    text = f"medians {centers}, largest {names}"
    assert median(centers[True]) <= 2 * median(centers[False]), text
    assert median(largest[True]) <= 10 * median(largest[False]), text


@pytest.mark.parametrize("size", [(8, 96, 96), (2, 65, 33)], ids=str)
@pytest.mark.parametrize(
    ("width_mult", "seeds"), [(0.35, 5), pytest.param(1.0, 15, marks=pytest.mark.exhaustive)], ids=str
)
def test_whole_network(width_mult: float, seeds: int, size: tuple[int, int, int]) -> None:
    compare_networks(width_mult, size, seeds)


def test_whole_network_in_float64() -> None:
    torch.manual_seed(0)
    model = MobileNetV2(width_mult=0.35, dropout=0.0, num_classes=20).double().train()
    x = torch.randn(2, 3, 65, 33).double()
    truth = step(model, x, fused=False)
    check(errors(step(model, x, fused=True), truth, scales(model, x, truth)), 1e-6)


# ------------------------------------------------------------------------------------------------------------- modes

TINY = ((1, 16, 1, 1), (6, 24, 2, 2), (3, 24, 1, 1))


def tiny(seed: int = 0, **options: Any) -> MobileNetV2:
    torch.manual_seed(seed)
    return MobileNetV2(num_classes=5, width_mult=0.5, inverted_residual_setting=TINY, dropout=0.0, **options).train()


def check_equal(found: Results, right: Results) -> None:
    assert found.keys() == right.keys()
    for name in found:
        assert torch.equal(found[name], right[name]), name


@pytest.fixture
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("case", [USUAL, SMALL[1], SMALL[3]], ids=lambda case: case.id)
def test_compile_block(fresh_dynamo: None, case: Block) -> None:
    block, x = prepared(case)
    truth, scale = step(block, x, fused=False), None
    scale = scales(block, x, truth)
    block.compile(backend="aot_eager", fullgraph=True)
    check(errors(step_of(block, x.clone().requires_grad_()), truth, scale), EXACT)


def test_compile_network(fresh_dynamo: None) -> None:
    model, x = tiny().double(), torch.randn(4, 3, 33, 30).double()
    right = step(model, x, fused=True)
    model.compile(backend="aot_eager", fullgraph=True)
    check(errors(step_of(model, x.clone().requires_grad_()), right, scales(model, x, right)), EXACT)


@pytest.mark.exhaustive
def test_compile_whole_network(fresh_dynamo: None) -> None:
    model, x = MobileNetV2(width_mult=0.35, dropout=0.0).double().train(), torch.randn(4, 3, 64, 64).double()
    right = step(model, x, fused=True)
    model.compile(backend="aot_eager", fullgraph=True)
    check(errors(step_of(model, x.clone().requires_grad_()), right, scales(model, x, right)), 1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """The gradients of a run without; the statistics move twice, as they do without us.

    But for the last of them: without reentrance a recomputation ends with the last tensor that backward needs, which is
    before a fused head counts its batch again.
    """
    model, x = tiny().double(), torch.randn(4, 3, 33, 30).double().requires_grad_()
    right = step(model, x, fused=True)
    results = []
    for fused in (True, False):
        one = copy.deepcopy(model)
        one.fused = fused
        run = one.forward_features

        def twice(x: Tensor, one: MobileNetV2 = one, run: Callable[[Tensor], Tensor] = run) -> Tensor:
            return one.forward_head(checkpoint(run, x, use_reentrant=use_reentrant))

        one.forward = twice
        results.append(step_of(one, x.detach().clone().requires_grad_()))
    for name in ("x", *dict(model.named_parameters())):
        assert torch.equal(results[0][name], right[name]), name
    if not use_reentrant:
        last = f"features.{len(model.features) - 1}.1."
        statistics = [name for name, _ in model.named_buffers() if name.startswith(last)]
        results = [{name: t for name, t in r.items() if name not in statistics} for r in results]
    check(errors(*results, scales(model, x.detach(), results[1])), EXACT)


def test_same_bits_twice() -> None:
    torch.set_num_threads(2)
    model, x = tiny(), torch.randn(4, 3, 65, 60)
    first = step(model, x, torch.float32, fused=True)
    for _ in range(3):
        check_equal(step(model, x, torch.float32, fused=True), first)


def test_threads_agree(float32_kernel: mnv2_fused.ops.Kernel) -> None:
    for case in (replace(USUAL, batch=3), SMALL[3]):
        block, x = prepared(case)
        torch.set_num_threads(1)
        one = step(block, x, torch.float32, fused=True)
        scale = scales(block, x, step(block, x, fused=False))
        torch.set_num_threads(2)
        found = errors(step(block, x, torch.float32, fused=True), one, scale)
        check(found, 4 * EPS * condition(block, x), case)


def train(model: MobileNetV2, steps: int, seed: int = 0) -> Results:
    """Some steps of SGD; the gradients of the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 33, 30, generator=random, dtype=torch.float64)
        found = step_of(model, x.to(model.classifier[1].weight.dtype))
        optimizer.step()
    return found | {name: p.detach().clone() for name, p in model.state_dict().items()}


def test_two_models_in_two_threads() -> None:
    def work(seed: int) -> Results:
        torch.set_num_threads(1)
        return train(tiny_models[seed], 6, seed)

    tiny_models = [tiny(0), tiny(1)]
    right = [train(copy.deepcopy(model), 6, seed) for seed, model in enumerate(tiny_models)]
    barrier = threading.Barrier(2)

    def together(seed: int) -> Results:
        barrier.wait()
        return work(seed)

    with ThreadPoolExecutor(2) as pool:
        for found, expected in zip(pool.map(together, range(2)), right, strict=True):
            check_equal(found, expected)


def reloaded(model: MobileNetV2) -> MobileNetV2:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tiny(seed=7)
    other.load_state_dict(torch.load(file), strict=True)
    return other


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "state dict": reloaded}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_after_training(duplicate: Callable[[MobileNetV2], MobileNetV2]) -> None:
    model = tiny()
    train(model, 2)
    other = duplicate(model)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).eval()(x), copy.deepcopy(other).eval()(x))
    check_equal(train(other, 2), train(model, 2))


def test_train_eval_train() -> None:
    """Each mode sees what the other one did: the packed weights of eval mode follow the training."""
    model = tiny().double()
    composition = copy.deepcopy(model)
    composition.fused = False
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).double()
    for i in range(3):
        train(model.train(), 2, seed=i), train(composition.train(), 2, seed=i)
        results = []
        for one in (model.eval(), composition.eval()):
            with torch.no_grad():
                results.append(one(x))
            results.append(one(x).detach())
            one.zero_grad()
            one(x).square().sum().backward()
            results.append(one.features[2].conv[0][0].weight.grad.clone())
        assert model.why_not_fused(x) != "" and results[0].isfinite().all()
        for found, right in zip(results[:3], results[3:], strict=True):
            assert float((found - right).norm() / right.norm()) < 1e-7, i


def test_second_gradients_are_an_error() -> None:
    """One that says what cannot be done."""
    block, x = prepared()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|twice differentiable"):
        grad.square().sum().backward()


def test_two_backwards() -> None:
    """With retain_graph the gradients add up; without, PyTorch's error."""
    block, x = prepared()
    right = step(block, x, fused=True)
    y = block(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        y.backward(weights, retain_graph=True)
    assert torch.allclose(block.conv[2].weight.grad, 2 * right["conv.2.weight"], rtol=1e-12)
    y.backward(weights)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(weights)


def test_a_weight_changed_before_backward_is_an_error() -> None:
    block, x = prepared()
    y = block(x)
    with torch.no_grad():
        block.conv[0][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_two_forwards_before_backward() -> None:
    """As for a discriminator: the statistics move between forward and backward, the first's gradients stay right."""
    gradients = []
    for fused in (True, False):
        block, x = prepared()
        block.fused = fused
        (block(x).square().sum() + block(2 * x + 1).sum().square()).backward()
        gradients.append(block.conv[1][0].weight.grad)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < EXACT


@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_no_images(evaluated: bool) -> None:
    """As the composition does it: result and gradients, or the same error."""
    outcomes = []
    for fused in (True, False):
        torch.manual_seed(0)
        block = InvertedResidual(8, 8, 1, 6).train(not evaluated)
        block.fused = fused
        try:
            outcomes.append(results_of(block, torch.zeros(0, 8, 6, 5, requires_grad=True)))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[1], tuple):
        assert outcomes[0] == outcomes[1]
    else:
        assert isinstance(outcomes[0], dict), outcomes[0]
        assert outcomes[0].keys() == outcomes[1].keys()
        for name, right in outcomes[1].items():
            assert torch.allclose(outcomes[0][name], right, equal_nan=True), name
