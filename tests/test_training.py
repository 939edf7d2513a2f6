"""Training of the blocks, module against module: values, gradients, statistics, memory, and what PyTorch asks for.

The truth is the composition of a block's modules (`fused = False`) in float64; what precision is to be expected is what
the composition gets in float32 (steps.py). The ops by themselves, at inference, are in test_ops.py; torch.compile,
checkpoints, threads and the like are in test_training_modes.py.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import pytest
import torch
from blocks import Block
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import (
    EPS,
    EXACT,
    NORMS,
    SMALL,
    USUAL,
    check,
    check_equal,
    check_exact,
    clear_kinks,
    errors,
    forward,
    module,
    norms,
    prepare,
    prepared,
    results_of,
    scales,
    step,
    step_of,
    tiny,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2, network, ops, training

X, EXPAND, DEPTHWISE, PROJECT = ops.WANT_X, ops.WANT_EXPAND, ops.WANT_DEPTHWISE, ops.WANT_PROJECT
VARIED_LAYOUTS = ("channels_last", "contiguous", "transposed", "channel_slice", "crop")  # no value is repeated


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


@pytest.mark.parametrize(
    ("examples", "limit"), [(60, 1_000_000), pytest.param(1000, 10_000_000, marks=pytest.mark.exhaustive)]
)
def test_random_blocks(
    training_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, examples: int, limit: int
) -> None:
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
        found = errors(step(block, x, training_kernel.dtype, fused=True), truth, scale)
        if training_kernel.dtype == torch.float64:
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
def test_tall_maps(training_kernel: mnv2_fused.ops.Kernel, case: Block) -> None:
    """Passes over which the rings wrap around many times: the buffers hold a few of these rows."""
    block, x, truth, scale, eager, condition = prepare(case)
    found = errors(step(block, x, training_kernel.dtype, fused=True), truth, scale)
    exact = training_kernel.dtype == torch.float64
    check(found, EXACT if exact else {name: max(10 * e, 32 * EPS * condition) for name, e in eager.items()}, case)


@pytest.mark.parametrize("shape", [(64, 4, 64, 64), (1, 4, 512, 512), (1, 8, 1, 100_000)], ids=str)
def test_sums_over_many_pixels(
    float32_kernel: mnv2_fused.ops.Kernel, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of values of one sign, in many images, in one and in one row: a float32 that adds them up is off by 1e-5."""
    random = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) + 0.5

    channels = shape[1]
    x, dz = uniform(*shape), uniform(shape[0], 4, *shape[2:])
    we, be, wd, wp = uniform(20, channels, 1, 1) / channels, uniform(20), uniform(20, 1, 3, 3) / 9, uniform(4, 20, 1, 1)
    table = torch.stack([torch.ones(20), torch.zeros(20), torch.ones(20), uniform(20), torch.zeros(20), uniform(20)])
    geometry, wanted = (1, 1, (1, 1, 1, 1)), EXPAND | DEPTHWISE | PROJECT
    center = torch.zeros(4)

    def sums(dtype: torch.dtype) -> dict[str, Tensor]:
        def op(name: str, *arguments: Any) -> tuple[Tensor, ...]:
            tensors = (t.to(dtype) if isinstance(t, Tensor) else t for t in arguments)
            return getattr(torch.ops.mnv2_fused, name)(*tensors)

        results = {
            "block_gradients": op("block_gradients", dz, x, we, be, wd, wp, table, *geometry, wanted)[1:],
            "filter_moments": op("filter_moments", x, we, be, wd, *geometry),
            "moments": op("moments", x),
            "channel_moments": op("channel_moments", x),
            "channel_products": op("channel_products", dz, dz, center, None).unbind(),
        }
        return {f"{name} {i}": t for name, tensors in results.items() for i, t in enumerate(tensors)}

    results = sums(torch.float32)
    monkeypatch.delenv("MNV2_FUSED_KERNEL")
    truth = sums(torch.float64)
    check(errors(results, truth, {name: float(t.norm()) for name, t in truth.items()}), 2e-6)


def test_sums_over_no_images(training_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    """0: one of several processes may have no image."""
    x, we, be, wd, _, wp, _ = SMALL[0].tensors(training_kernel.dtype)
    none, table, geometry = x[:0], torch.ones(6, len(wd), dtype=x.dtype), (1, 1, (1, 1, 1, 1))
    results = {
        "block_gradients": torch.ops.mnv2_fused.block_gradients(none, none, we, be, wd, wp, table, *geometry, 15),
        "filter_moments": torch.ops.mnv2_fused.filter_moments(none, we, be, wd, *geometry),
        "moments": torch.ops.mnv2_fused.moments(none),
        "channel_moments": torch.ops.mnv2_fused.channel_moments(none),
        "channel_products": (torch.ops.mnv2_fused.channel_products(none, none, torch.zeros(3, dtype=x.dtype), None),),
    }
    for name, tensors in results.items():
        assert all((t == 0).all() for t in tensors), name


# --------------------------------------------------------------------------------------------- what PyTorch asks for


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


class OneOp(nn.Module):
    """The stem's or the head's layers, as the op that they are in training."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        y = training.run(partial(network.convolution, self.layers), [self.layers], x)
        assert "conv_bn_relu6" in type(y.grad_fn).__name__
        return y


@pytest.mark.parametrize("statistics", ["batch", "frozen", "none kept"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("conv", [(3, 5, 3, 2, 1), (4, 6, 1)], ids=["stem", "head"])
def test_gradcheck_of_conv_bn_relu6(conv: tuple[int, ...], bias: bool, affine: bool, statistics: str) -> None:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(conv[1], affine=affine, track_running_stats=statistics != "none kept")
    layers = nn.Sequential(nn.Conv2d(*conv, bias=bias), bn, nn.ReLU6()).double()
    nn.init.normal_(layers[0].weight, std=2)
    for t in (*bn.parameters(), *bn.buffers()):
        if t.is_floating_point():
            nn.init.uniform_(t, 1, 4)
    bn.train(statistics == "batch")
    op, x = OneOp(layers), torch.randn(2, conv[0], 4, 5, dtype=torch.float64)
    names = [name for name, _ in op.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(op, dict(zip(names, parameters, strict=True)), (x,))

    parameters = [p.detach().clone().requires_grad_() for p in op.parameters()]
    y = call(x, *parameters)
    assert (y == 0).any() and ((y > 0) & (y < 6)).any()
    assert (y == 6).any() or not affine, "both kinks, where a BatchNorm of few values gets as far"
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), *parameters), fast_mode=True)


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
    """The arguments of `block_train`, as `run` gives them; parameters detached."""
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
        coefficients, gate = torch.randn(3, out, dtype=dtype), torch.randn(2, out, dtype=dtype)
        for bounds in (None, gate):
            found["channel_products"].append((dz, z, torch.randn(out, dtype=dtype), bounds))
        for other, bounds, relu6 in ((None, None, False), (None, None, True), (z, None, False), (z, gate, False)):
            found["affine"].append((dz, other, coefficients, bounds, relu6))
        for other in (None, z):
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
        for some in (asked, [a and i % 3 == 0 for i, a in enumerate(asked)]):
            wanted = sum(a << i for i, a in enumerate(some))
            found["block_train_backward"].append((torch.randn_like(y), *saved, wanted, *arguments))
    found["all_reduce"].append((torch.randn(3, dtype=dtype), ""))
    norm = [torch.rand(8, dtype=dtype) + 0.5 for _ in range(4)]
    for statistics, bias in ((norm[2:], None), ((None, None), norm[1])):
        e = torch.randn(2, 8, 5, 4, dtype=dtype)
        arguments = *norm[:2], *statistics, 1e-5, ""
        found["batch_norm_relu6"].append((e, *arguments))
        _, *saved = torch.ops.mnv2_fused.batch_norm_relu6(e, *arguments)
        found["batch_norm_relu6_backward"].append((torch.randn_like(e), e, *saved, *arguments))
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
    packed = torch.ops.mnv2_fused.pack(weights, plan)
    found["network"].append((torch.randn(2, 3, 9, 8, dtype=dtype), packed, plan))
    found["network_seconds"].append(found["network"][0])
    return found


GRADIENTS = [0] + [1 + 7 * stage + field for stage in range(3) for field in range(4)]  # arguments that have one
OPS = (
    "inverted_residual pack network network_seconds moments filter_moments block_gradients channel_moments "
    "channel_products affine matrix_add_ all_reduce block_train block_train_backward batch_norm_relu6 "
    "batch_norm_relu6_backward conv_bn_relu6 conv_bn_relu6_backward"
).split()


def test_every_op_is_sampled() -> None:
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "mnv2_fused::" in name}
    assert registered == {*OPS, "chain"}  # which test_compiled.py checks


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.exhaustive)],
    ids=str,
)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = {}
    if name == "network_seconds":  # the others compare the results of two calls
        options = dict(test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    for arguments in samples(dtype)[name]:
        torch.library.opcheck(getattr(torch.ops.mnv2_fused, name).default, arguments, **options)


def wrong_arguments() -> dict[str, tuple[str, list[Any], str]]:
    """By what is wrong: an op, arguments that nobody should give it, and what the error says."""
    arguments = samples(torch.float32)
    train, back = list(arguments["block_train"][0]), list(arguments["block_train_backward"][0])
    norm, norm_back = list(arguments["batch_norm_relu6"][1]), list(arguments["batch_norm_relu6_backward"][1])

    def changed(values: list[Any], at: int, value: Any) -> list[Any]:
        return [*values[:at], value, *values[at + 1 :]]

    half = [t.half() if isinstance(t, Tensor) else t for t in train]
    none = changed(changed(train, 8, train[8][:0]), 15, train[15][:, :0])
    none = changed(none, 1, None if none[1] is None else none[1][:0])
    narrow = [t.bfloat16() if isinstance(t, Tensor) else t for t in train]
    return {
        "wide weight": (
            "block_train",
            changed(narrow, 8, train[8].double()),
            "depthwise_weight must have the dtype of x",
        ),
        "weights of two dtypes": (
            "block_train",
            changed(narrow, 15, train[15]),
            "project_weight must have the dtype of depthwise_weight",
        ),
        "mean alone": ("block_train", changed(train, 12, torch.zeros(7)), "running mean and var go together"),
        "residual": ("block_train", changed(train, 24, [0, 0, 0, 0]), "a residual needs an output of the shape of x"),
        "half": ("block_train", half, "x must be float32, float64 or bfloat16"),
        "half norm": ("batch_norm_relu6", [norm[0].half(), *norm[1:]], "e must be float32, float64 or bfloat16"),
        "no hidden channels": ("block_train", none, "channels must be 1 to 1048576, got 0"),
        "stride 0": ("block_train", changed(train, 22, 0), "stride must be 1 to 2, got 0"),
        "padding": ("block_train", changed(train, 24, [1 << 62, 1 << 62, 1, 1]), "padding must be 0 to 1048576"),
        "scalar weight": ("block_train", changed(train, 8, torch.tensor(1.0)), "must have 4 dimensions"),
        "x": ("block_train", changed(train, 0, train[0][0]), r"x must be \[N, C, H, W\]"),
        "dy": ("block_train_backward", changed(back, 0, back[0][0]), r"dy must be \[N, C, H, W\]"),
        "no counts": (
            "block_train_backward",
            changed(back, 2, back[2][:0]),
            r"counts must have shape \[2\], got \[0\]",
        ),
        "float counts": ("block_train_backward", changed(back, 2, back[2].float()), "counts must be float64"),
        "center": ("block_train_backward", changed(back, 3, torch.ones(10**6).double()), "x_center must have shape"),
        "d_mean": ("block_train_backward", changed(back, 8, back[8][:-1]), "d_mean must have shape"),
        "count": ("batch_norm_relu6_backward", changed(norm_back, 2, norm_back[2][:0]), "count must have shape"),
        "mean": ("batch_norm_relu6_backward", changed(norm_back, 3, norm_back[3][:-1]), "e_mean must have shape"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "wide weight",
        "weights of two dtypes",
        "mean alone",
        "residual",
        "half",
        "half norm",
        "no hidden channels",
        "stride 0",
        "padding",
        "scalar weight",
        "x",
        "dy",
        "no counts",
        "float counts",
        "center",
        "d_mean",
        "count",
        "mean",
    ],
)
def test_wrong_arguments_are_named(what: str) -> None:
    name, arguments, message = wrong_arguments()[what]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.mnv2_fused, name)(*arguments)


def test_statistics_of_any_strides() -> None:
    arguments = samples(torch.float32)["block_train_backward"][0]
    right = torch.ops.mnv2_fused.block_train_backward(*arguments)
    strided = [torch.stack([t, t], -1)[..., 0] if 2 <= i < 12 else t for i, t in enumerate(arguments)]
    for found, t in zip(torch.ops.mnv2_fused.block_train_backward(*strided), right, strict=True):
        assert torch.equal(found, t)


# ------------------------------------------------------------------------------------------------ as nn.BatchNorm2d's


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


@pytest.mark.parametrize("change", NORMS.values(), ids=NORMS)
def test_norms_of_a_network(change: Callable[[nn.Module], None]) -> None:
    """Stem and head among the blocks: two steps in training, then two with one norm of three in eval mode."""
    model = tiny().double()
    change(model)
    composition = copy.deepcopy(model)
    composition.fused = False
    for i in range(4):
        torch.manual_seed(i)
        x = torch.randn(3, 3, 21, 18).double() + i
        for one in (model, composition):
            one.zero_grad()
            for j, bn in enumerate(norms(one)):
                bn.train(i < 2 or j % 3 != i - 2)
        scale = scales(composition, x, step(composition, x, fused=False))
        truth = step_of(composition, x.clone().requires_grad_())
        check(errors(step_of(model, x.clone().requires_grad_()), truth, scale), EXACT, i)


def test_batches_are_counted_once() -> None:
    block, x = prepared()

    def counts() -> set[int]:
        return {int(bn.num_batches_tracked) for bn in norms(block)}

    y = forward(block, x)
    assert counts() == {1}
    y.sum().backward()
    assert counts() == {1}
    with torch.no_grad():
        forward(block, x)
    assert counts() == {2}
    with torch.inference_mode():
        forward(block, x)
    assert counts() == {3}
    with torch.no_grad():
        block.eval()(x)
    assert counts() == {3}


def test_running_variance_is_unbiased() -> None:
    block, x = prepared(SMALL[2])
    values = block.conv[0][0](x)
    forward(block, x)
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


def block_gradients(block: InvertedResidual, x: Tensor) -> list[int]:
    """What each pass of a step's backward was asked for."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step_of(block, x)
    calls = [event for event in profile.events() if event.name == "mnv2_fused::block_gradients"]
    return [event.concrete_inputs[-2] & ~ops.WANT_SUMS for event in calls]  # tf32 is the last


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
    assert block_gradients(block, x.requires_grad_(wanted in ("x", "all"))) == passes


@pytest.mark.parametrize(
    ("wanted", "passes"), [("x", [X]), ("conv.0.0.weight", [EXPAND]), ("conv.2.weight", [PROJECT])]
)
def test_frozen_norms_take_one_pass(wanted: str, passes: list[int]) -> None:
    block, x = prepared()
    block.eval()
    for name, p in block.named_parameters():
        p.requires_grad_(wanted == name)
    assert block_gradients(block, x.requires_grad_(wanted == "x")) == passes


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
            forward(one, x)
            messages.append("")
        except ValueError as error:
            messages.append(re.sub(r"torch\.Size\((.*)\)", r"\1", str(error)))
    assert messages[0] == messages[1]
    assert messages[0] == "" or "more than 1 value per channel" in messages[0]
    moved = dict(composition.named_buffers())
    for name, t in block.named_buffers():
        assert torch.allclose(t, before[name]) or torch.allclose(t, moved[name]), name


def test_an_infinite_pixel_of_a_frozen_stem() -> None:
    """relu6 passes it no gradient: 0, and not the NaN of 0 times infinity."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()).eval()
    x = torch.randn(2, 3, 9, 8)
    x[0, 1, 4, 4] = float("inf")
    results = []
    for call in (lambda stem, x: training.run(partial(network.convolution, stem), [stem], x), nn.Module.__call__):
        found = results_of(copy.deepcopy(stem), x.clone().requires_grad_(), call=call)
        results.append({name: t.double().nan_to_num(12345.0, 54321.0) for name, t in found.items()})
    check(errors(*results, {name: float(t.norm()) for name, t in results[1].items()}), 1e-5)


HARD = ("constant", "constant by channel", "far from 0", "far from 0, a channel constant", "correlated channels")


@pytest.mark.parametrize("input", HARD)
def test_hard_inputs(float32_kernel: mnv2_fused.ops.Kernel, input: str) -> None:
    """Variance 0, or a mean of 100 standard deviations: errors at most 3 times the composition's, or 64 eps.

    Where all is constant, every BatchNorm but the filtered borders' has variance 0 and enlarges what rounds by
    eps^-1/2; the composition's error tells by how much. Of correlated channels, the expansion takes away what they
    have in common: the variance of e is a small difference of products of x. There 10 times is allowed.
    """
    for case in (USUAL, SMALL[1], Block(16, 96, 24, 14, 14, batch=2), Block(32, 32, 16, 13, 9, batch=3, expand=False)):
        x, block = case.tensors()[0].double(), module(case)
        if input == "constant":
            x = torch.full_like(x, 3.7)
        elif input == "constant by channel":
            x = torch.randn(1, x.shape[1], 1, 1).double().expand_as(x).clone()
        elif input == "correlated channels":
            x = x + 30 * torch.randn(len(x), 1, *x.shape[2:], generator=torch.Generator().manual_seed(0)).double()
            if case.expand:
                weight = block.conv[0][0].weight.data
                weight -= weight.mean(1, keepdim=True)
        else:
            x = x + 100
        if "a channel" in input:
            x[:, 0] = 50
        x = x.float().double()
        block = block.float().double()
        clear_kinks(block, x)
        block = block.float().double()
        truth = step(block, x, fused=False)
        scale = scales(block, x, truth)
        found = errors(step(block, x, torch.float32, fused=True), truth, scale)
        eager = errors(step(block, x, torch.float32, fused=False), truth, scale)
        times = 10 if input == "correlated channels" else 3
        check(found, {name: max(times * e, 64 * EPS) for name, e in eager.items()}, (input, case))


@pytest.mark.parametrize("case", (USUAL, *SMALL), ids=lambda case: case.id)
def test_non_finite(training_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, case: Block) -> None:
    """A pixel, or one number, of x is NaN, the statistics are frozen: gradients are NaN where the composition's are."""
    block, x = prepared(case)
    block.eval()
    height, width = case.height // 2, case.width // 2
    for at in ((0, slice(None), height, width), (0, 1, height, width), (0, slice(None), 0, case.width - 1)):
        results = []
        for dtype, fused in ((torch.float64, False), (training_kernel.dtype, True)):
            one = copy.deepcopy(block).to(dtype)
            one.fused = fused
            given = x.to(dtype, copy=True)
            given[at] = float("nan")
            y = forward(one, given.requires_grad_())
            y.nansum().backward()
            results.append({"y": y.detach(), "x": given.grad, **{name: p.grad for name, p in one.named_parameters()}})
        truth, found = results
        assert truth["y"].isnan().any() and not truth["y"].isnan().all()
        for name, t in truth.items():
            assert torch.equal(found[name].isnan(), t.isnan()), (name, at)
        truth, found = ({name: t.nan_to_num(0) for name, t in r.items()} for r in (truth, found))
        scale = {name: max(float(t.norm()), 1.0) for name, t in truth.items()}
        check(errors(found, truth, scale), EXACT if training_kernel.dtype == torch.float64 else 1e-4, at)


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
    assert forward(block, x).isfinite().all()
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
    assert training.why_not(block._describe, [block.conv], x) == ""
    change(block)
    assert training.why_not(block._describe, [block.conv], x) != ""
    state, results = copy.deepcopy(block.state_dict()), []
    for block.fused in (True, False):  # no copies: a forward of its own would stay the original's
        block.load_state_dict(state)
        block.zero_grad()
        results.append(results_of(block, x.clone().requires_grad_()))
    check_equal(*results)


def not_inplace(block: InvertedResidual) -> InvertedResidual:
    """PyTorch's backward hooks do not go together with what works in place."""
    for child in block.modules():
        if isinstance(child, nn.ReLU6):
            child.inplace = False
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
        assert (training.why_not(block._describe, [block.conv], x) != "") == (find(block) is not block)
        block(x).sum().backward()
        assert fired == [1], (register.__name__, type(find(block)))
        handle.remove()
        assert training.why_not(block._describe, [block.conv], x) == ""


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


# Of each the hidden channels take 10 times what x and y do, or, without expansion, 25 MB like x.
LARGE = {
    "usual": Block(8, 256, 8, 224, 224, residual=True),
    "stride 2": Block(8, 256, 8, 160, 160, stride=2),
    "images": Block(8, 256, 8, 112, 112, batch=3),
    "no expansion": Block(128, 128, 8, 224, 224, expand=False),
}


def allocated(block: InvertedResidual, x: Tensor) -> int:
    """The largest tensor of a forward and backward, in bytes.

    A TorchDispatchMode is switched off inside the ops that it sees, `block_train` among them. The profiler's memory
    events come from PyTorch's allocator itself and hold every tensor, whoever makes it.
    """
    mnv2_fused.empty_cache()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        block(x).sum().backward()
    events = profiler.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def peak_growth(block: InvertedResidual, x: Tensor) -> int:
    """By how many bytes the process grows in a forward and backward, at its peak: tensors and working memory alike.

    Linux's high-water mark, put back to what is resident now; freed memory is given back to the system before, so that
    none can be used anew unseen.
    """
    mnv2_fused.empty_cache()
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
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_the_expanded_tensor_is_never_made(case: Block, evaluated: bool, measure: Callable[..., int]) -> None:
    """No tensor is larger than x, and in all there are y, z, their gradients and that of x, and 4 MB to work in."""
    block, x = module(case).float().train(not evaluated), case.tensors()[0].requires_grad_()
    expanded = 4 * case.batch * case.hidden_channels * case.height * case.width
    small = SMALL[0]
    step_of(module(small).float(), small.tensors()[0].requires_grad_())  # code and threads are there before
    with torch.no_grad():
        y = block(x)
    limit = 2 * x.nbytes if measure is allocated else x.nbytes + 4 * y.nbytes + 4e6
    del y
    assert measure(block, x) <= limit
    block.fused = False
    if case.expand or measure is not allocated:
        assert measure(block, x) >= max(expanded, 1.5 * limit), "the measure sees what the composition makes"


keeps_memory = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="torch < 2.11 cannot be told where a tensor lies",
)


@keeps_memory
def test_a_steps_memory_is_used_again() -> None:
    """A second step finds all large tensors of the blocks in what the first one has left; the result is the same."""
    case = LARGE["images"]
    block, x = module(case).float(), case.tensors()[0].requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        y = block(x)
        return torch.autograd.grad(y, (x, *block.parameters()), y.detach())

    gc.collect()
    mnv2_fused.empty_cache()
    first = gradients()
    copies = [t.clone() for t in first]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        second = gradients()
    events = profiler.profiler.kineto_results.events()
    fresh = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() >= x.nbytes]
    assert fresh == [x.nbytes], "the gradient of x, whose first one is still there"
    for found, still, copy_ in zip(second, first, copies, strict=True):
        assert torch.equal(found, copy_) and torch.equal(still, copy_)
    assert mnv2_fused.empty_cache() >= x.nbytes and mnv2_fused.empty_cache() == 0


@keeps_memory
def test_memory_in_use_is_not_given_away() -> None:
    """Not while a view of it is there; what a thread of its own does with other tensors changes nothing."""
    tensors = Block(32, 64, 32, 96, 96).tensors()
    truth = ops.inverted_residual(*tensors, padding=1).clone()
    views = [ops.inverted_residual(*tensors, padding=1)[0, 3:] for _ in range(3)]
    negative = [None if t is None else -t for t in tensors]
    others = [Thread(target=lambda: [ops.inverted_residual(*negative, padding=1) for _ in range(20)]) for _ in range(3)]
    for thread in others:
        thread.start()
    for _ in range(20):
        assert torch.equal(ops.inverted_residual(*tensors, padding=1), truth)
    for thread in others:
        thread.join()
    for view in views:
        assert torch.equal(view, truth[0, 3:])


@keeps_memory
def test_little_more_memory_is_kept_than_was_in_use(tmp_path: Path) -> None:
    """In a process of its own, where nothing else is in use."""
    code = """
import torch, mnv2_fused
weights = [torch.randn(s) for s in ((64, 32, 1, 1), (64,), (64, 1, 3, 3), (64,), (32, 64, 1, 1), (32,))]
largest = 0
for size in (60, 110, 160, 290, 75, 130, 310, 100, 250, 330):
    x = torch.randn(1, 32, size, size)
    largest = max(largest, mnv2_fused.inverted_residual(x, *weights, padding=1).nbytes)
print(largest, mnv2_fused.empty_cache())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    largest, kept = map(int, done.stdout.split())
    assert largest <= kept <= 1.5 * largest + 4e6, "and what the kernels work in"


@pytest.mark.parametrize("wanted", ["all", "x", "all but x"])
@pytest.mark.parametrize("case", (USUAL, *SMALL), ids=lambda case: case.id)
def test_flops_of_a_step(case: Block, wanted: str) -> None:
    """The gradients of x and of the weights count what forward does, each; what is computed anew does not count.

    The reference's backward is no measure: torch counts a depthwise convolution's weight gradient as a dense one's.
    """
    tensors = case.tensors()
    for i, t in enumerate(tensors):
        if t is not None:
            t.requires_grad_(wanted == "all" or (wanted == "x") == (i == 0))
    with FlopCounterMode(display=False) as step_counter:
        y = ops.inverted_residual(*tensors, **case.options)
        y.sum().backward()
    with FlopCounterMode(display=False) as counter:
        ops.inverted_residual_reference(*tensors, **case.options)
    once = counter.get_total_flops()
    first = case.height * case.width * case.in_channels if case.expand else y.shape[2] * y.shape[3] * 9
    first *= 2 * case.batch * case.hidden_channels
    right = {"all": 3 * once, "x": 2 * once, "all but x": 3 * once - first}
    assert step_counter.get_total_flops() == right[wanted]


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
