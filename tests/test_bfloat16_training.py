"""Training in bfloat16 on the CPU: each pass, blocks and networks against float64, no further off than PyTorch's own.

What each pass is checked for stands in passes.py, with the data that keep away from the kinks of ReLU6.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from statistics import median

import pytest
import torch
from blocks import Block
from emulation import TOLERANCE, Op
from passes import (
    BLOCKS,
    MODES,
    SHAPES,
    apart,
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
from steps import Ran, check_equal, norms, results_of, tiny
from torch import Tensor, nn

from mnv2_fused import DeepLabV3, InvertedResidual, MobileNetV1, MobileNetV2, SSDLite, ops

# Rings that wrap around many times, dilated filters, borders without padding, widths and channels of any rest.
TALL = (
    Block(4, 20, 4, 75, 64, batch=2),
    Block(16, 33, 5, 90, 71, stride=2),
    Block(12, 40, 24, 64, 83, dilation=3, padding=3),
    Block(40, 40, 24, 50, 31, expand=False, stride=2, dilation=2, padding=(0, 3, 1, 2)),
    Block(25, 49, 33, 17, 1, batch=3),
    Block(64, 384, 96, 14, 14, batch=2),
)


@pytest.fixture
def call(bfloat16_kernel: str) -> Op:
    return lambda op, *arguments: getattr(torch.ops.mnv2_fused, op)(*arguments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_narrow_passes(call: Op, shape: tuple[int, ...]) -> None:
    check_moments(call, shape, "bfloat16")
    check_maps_and_sums(call, shape, "bfloat16")
    check_matrix_add(call, shape, "bfloat16")


@pytest.mark.parametrize("block", TALL, ids=lambda block: block.id)
def test_gradients(call: Op, poisoned_memory: None, block: Block) -> None:
    check_gradients(call, block, "bfloat16")


@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(1000, 1200), marks=pytest.mark.exhaustive)], ids=str)
def test_gradients_of_random_blocks(call: Op, poisoned_memory: None, seeds: range) -> None:
    for seed in seeds:
        check_gradients(call, random_block(seed), "bfloat16")


def test_moments_of_equal_pixels_are_exact(call: Op) -> None:
    """Their deviations are 0, and so is the variance of whatever an expansion makes of them."""
    x = randn(1, 24, 1, 1).bfloat16().expand(2, 24, 30, 31)
    mean, products = call("moments", x)
    assert torch.equal(mean, x[0, :, 0, 0].double()) and products.abs().max() < 1e-9 * x.double().square().sum()


def test_sums_over_many_pixels(call: Op) -> None:
    """Of values of one sign: a float32 that added up all of them would be off by 1e-5, a bfloat16 by 1."""
    x, dz = (randn(8, 16, 64, 64, seed=seed).abs().bfloat16() for seed in (0, 1))
    mean, products = call("moments", x)
    rows = x.double().movedim(1, -1).flatten(0, 2)
    assert torch.allclose(mean, rows.mean(0), rtol=1e-6)
    centered = rows - rows.mean(0)
    assert float((products - centered.T @ centered).norm()) < 1e-5 * float(products.norm())
    sums = call("channel_products", dz, x, torch.zeros(16), None)
    right = torch.stack([dz.double().sum((0, 2, 3)), (dz.double() * x.double()).sum((0, 2, 3))])
    assert torch.allclose(sums, right, rtol=1e-6)
    wd, wp, one, zero = torch.full((16, 1, 3, 3), 1 / 16), torch.ones(16, 16, 1, 1), torch.ones(16), torch.zeros(16)
    table = torch.stack([one, one, zero, one, zero, zero])  # nothing is cut off by the ReLU6
    (*_, found) = call("block_gradients", dz, x, None, None, wd, wp, table, 1, 1, (1, 1, 1, 1), ops.WANT_SUMS)
    assert torch.allclose(found[0], dz.double().sum().expand(16), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ modules


def cast(model: nn.Module, how: str) -> None:
    """To bfloat16 what is asked for; under autocast nothing."""
    if how == "bfloat16":
        model.bfloat16()
    for part in model.modules():
        if how == "float32 norms" and isinstance(part, nn.Conv2d):
            part.bfloat16()


def run(model: nn.Module, x: Tensor, dy: Tensor, how: str) -> dict[str, Tensor]:
    """A step, forward under autocast and backward outside of it."""

    def call(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            with Ran() as ran:
                y = model(x)
            ran.check(model)
            return y

    model, x = copy.deepcopy(model), x.clone().requires_grad_()
    y = call(model, x)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    return found | {name: b for name, b in model.named_buffers() if b.is_floating_point()}


@pytest.mark.parametrize("how", ["autocast", "float32 norms", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_modules(bfloat16_kernel: str, block: Block, mode: str, how: str) -> None:
    """Statistics of the batch, running ones and their mixtures; types of results and gradients as the modules' own.

    No further from float64 than the tolerance of two roundings to bfloat16 and their sums, or than the modules' own
    arithmetic where that is further.
    """
    model, x = module(block), apart(block, torch.bfloat16)[0]
    kinds = norms(model)
    for i in MODES[mode]:
        if i - 3 + len(kinds) >= 0:
            kinds[i - 3 + len(kinds)].eval()
    cast(model, how)
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact.fused = plain.fused = False
    dy = randn(*copy.deepcopy(exact)(x.double()).shape).to(x.dtype)
    truth = step(exact, x.double(), dy)
    found, eager = run(model, x, dy, how), run(plain, x, dy, how)
    assert all(found[name].dtype == eager[name].dtype for name in truth)
    own, usual = errors(found, truth), errors(eager, truth)
    worst = max(own, key=lambda name: own[name] / max(TOLERANCE["bfloat16"], usual[name]))
    limit = max(TOLERANCE["bfloat16"], usual[worst])
    assert own[worst] <= limit, f"{worst}: off by {own[worst]:.1e}, eager {usual[worst]:.1e}"


def test_statistics_are_not_rounded(bfloat16_kernel: str) -> None:
    """Those of e and d as of float32 numbers, where the modules have them of rounded ones."""
    block = BLOCKS[1]
    model, x = module(block), apart(block, torch.bfloat16)[0]
    exact = copy.deepcopy(model).double()
    exact.fused = False
    dy = randn(*x.shape)
    truth, found = step(exact, x.double(), dy), run(model, x, dy, "autocast")
    own = errors(found, truth)
    for stage in (0, 1):
        # x and the unrounded weights give e's; h and its taps are float32, of an expansion rounded to bfloat16.
        limit = (1e-6, 1e-3)[stage]
        for name in ("running_mean", "running_var"):
            assert own[f"conv.{stage}.1.{name}"] < limit, (stage, name)


def test_stem_and_head(bfloat16_kernel: str) -> None:
    """And a network's whole step: not further from float64 than the modules' own arithmetic, by the median."""
    own: list[float] = []
    usual: list[float] = []
    for seed in range(3):
        model, x, dy = tiny(seed), randn(4, 3, 45, 40, seed=seed), randn(4, 5, seed=seed + 10)
        exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
        exact.fused = plain.fused = False
        truth = step(exact, x.double(), dy)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.unfused(x) == {}
        found, eager = run(model, x, dy, "autocast"), run(plain, x, dy, "autocast")
        assert all(found[name].dtype == eager[name].dtype for name in truth)
        names = [name for name in truth if truth[name].norm() > 1e-6]
        own += [errors(found, truth)[name] for name in names]
        usual += [errors(eager, truth)[name] for name in names]
    assert median(own) <= median(usual), (median(own), median(usual))


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_images_of_either_dtype(how: str) -> None:
    model, x, dy = tiny(), randn(2, 3, 33, 30), randn(2, 5)
    cast(model, how)
    narrow = run(model, x.bfloat16(), dy, how)
    assert narrow["x"].dtype == torch.bfloat16
    if how == "autocast":
        wide = run(model, x.bfloat16().float(), dy, how)
        assert wide["x"].dtype == torch.float32
        check_equal({**wide, "x": wide["x"].bfloat16()}, narrow)


@pytest.mark.parametrize("threads", [2, 7, 16])
def test_same_bits_twice(bfloat16_kernel: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model, x, dy = tiny(), randn(threads + 2, 3, 65, 60), randn(threads + 2, 5)
    first = run(model, x, dy, "autocast")
    for _ in range(3):
        check_equal(run(model, x, dy, "autocast"), first)


def test_gradients_of_the_op(bfloat16_kernel: str) -> None:
    """`inverted_residual` in autograd, with weights of either dtype."""
    for weights in (torch.bfloat16, torch.float32):
        block = replace(BLOCKS[1], project_relu6=True)
        x, *rest = apart(block, torch.bfloat16)
        tensors = [x, *(t.to(weights) for t in rest)]
        exact = [t.double().requires_grad_() for t in tensors]
        right = ops.inverted_residual_reference(*exact, **block.options)
        tensors = [t.clone().requires_grad_() for t in tensors]
        y = ops.inverted_residual(*tensors, **block.options)
        # Where the last ReLU6 may switch by rounding nothing comes in.
        dy = randn(*y.shape) * ((right - 0).abs() > 0.1) * ((right - 6).abs() > 0.1)
        right.backward(dy.bfloat16().double()), y.backward(dy.bfloat16())
        for t, truth in zip(tensors, exact, strict=True):
            assert t.grad.dtype == t.dtype
            assert float((t.grad.double() - truth.grad).norm()) <= TOLERANCE["bfloat16"] * float(truth.grad.norm())


@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_other_networks(evaluated: bool) -> None:
    """All of MobileNetV1 and of the segmenter's backbone runs fused, with gradients of the parameters' dtype."""
    torch.manual_seed(0)
    x = randn(2, 3, 65, 65)
    for model in (MobileNetV1(num_classes=5, width_mult=0.25), DeepLabV3(4)):
        model.train(not evaluated)
        with torch.autocast("cpu", torch.bfloat16):
            assert getattr(model, "backbone", model).unfused(x) == {}
            y = model(x)
            y = y["out"] if isinstance(y, dict) else y
        y.float().square().mean().backward()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_detector() -> None:
    """Its blocks run fused, and all gradients are finite."""
    torch.manual_seed(0)
    target = {"boxes": torch.tensor([[4.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    detector = SSDLite(3, width_mult=0.35).train()
    with torch.autocast("cpu", torch.bfloat16), Ran() as ran:
        losses = detector([randn(3, 64, 64, seed=seed) for seed in (0, 1)], [target] * 2)
    assert ran.ops["block_train"] >= 17
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


def test_it_learns() -> None:
    """A few steps of SGD: the loss falls as it does in float32."""
    falls = []
    for enabled in (True, False):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, labels = randn(8, 3, 33, 33), torch.arange(8) % 5
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        falls.append(losses[-1] / losses[0])
    assert falls[0] < 0.5 and abs(falls[0] - falls[1]) < 0.2, falls


def test_what_autograd_keeps() -> None:
    """Half of what it keeps in float32: at most 5 MB per image over the whole network."""
    model, images = MobileNetV2().train(), randn(2, 3, 224, 224)
    own = {t.untyped_storage().data_ptr() for t in (images, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.dim() == 4:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        y = model(images)
    assert sum(kept.values()) / len(images) <= 5e6, f"{sum(kept.values()) / len(images) / 1e6:.1f} MB"
    assert y.requires_grad


def test_why_not() -> None:
    """Nothing of float16 runs fused on the CPU, nor a residual in float32 that autocast would add in float32."""
    block, x = InvertedResidual(16, 16, 1, 6).train(), randn(2, 16, 7, 7)
    with torch.autocast("cpu", torch.float16):
        assert "float16" in block.why_not_fused(x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert block.why_not_fused(x.bfloat16()) == ""
        assert "float32" in block.why_not_fused(x)
    assert "bfloat16" in block.why_not_fused(x.bfloat16())
    results = results_of(block.bfloat16(), x.bfloat16().requires_grad_())
    assert all(t.dtype == torch.bfloat16 for t in results.values() if t.is_floating_point())
