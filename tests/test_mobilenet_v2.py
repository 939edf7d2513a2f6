"""MobileNetV2: torchvision's keys and rules, the fused network's values, and where it must not run fused."""

from __future__ import annotations

import copy
import gc
import json
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SIZES, TOLERANCE, WIDTHS, check, error, fused, images, plain, settled
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2, mobilenet_v2
from mnv2_fused.mobilenet_v2 import make_divisible

pytestmark = pytest.mark.usefixtures("one_thread")

STATE_DICT = json.loads(Path(__file__).with_name("data").joinpath("torchvision_state_dict.json").read_text())


# --------------------------------------------------------------------------------------- torchvision's rules and keys


def test_state_dict_is_torchvisions() -> None:
    state = MobileNetV2().state_dict()
    assert len(state) == 314
    assert [[key, list(value.shape)] for key, value in state.items()] == STATE_DICT


def test_no_other_state() -> None:
    model = settled()
    before = list(model.state_dict()), [name for name, _ in model.named_modules()]
    fused(model, images(1, 32, 32))
    model.forward_features(images(1, 32, 32))
    assert (list(model.state_dict()), [name for name, _ in model.named_modules()]) == before
    assert not list(model.buffers(recurse=False)) and not list(model.parameters(recurse=False))


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1.4, [48, 24, 32, 48, 88, 136, 224, 448, 1792]),
        (1.3, [40, 24, 32, 40, 80, 128, 208, 416, 1664]),
        (1.0, [32, 16, 24, 32, 64, 96, 160, 320, 1280]),
        (0.75, [24, 16, 24, 24, 48, 72, 120, 240, 1280]),
        (0.5, [16, 8, 16, 16, 32, 48, 80, 160, 1280]),
        (0.35, [16, 8, 8, 16, 24, 32, 56, 112, 1280]),
        (0.25, [8, 8, 8, 8, 16, 24, 40, 80, 1280]),
    ],
)
def test_widths(width: float, expected: list[int]) -> None:
    model = MobileNetV2(width_mult=width)
    rows = [model.features[i].out_channels for i in (1, 2, 4, 7, 11, 14, 17)]
    assert [model.features[0][0].out_channels, *rows, model.num_features] == expected
    assert model.features[18][0].out_channels == model.classifier[1].in_features == model.num_features


def test_make_divisible() -> None:
    cases = {(32, 8): 32, (11.2, 8): 16, (12, 8): 16, (8.8, 8): 8, (33.6, 8): 32, (44.8, 8): 48, (1, 8): 8, (20, 1): 20}
    assert {case: make_divisible(*case) for case in cases} == cases
    assert make_divisible(11.9, 8) == 16  # 8 would be less than 90%
    assert make_divisible(3, 8, 16) == 16 and make_divisible(3, 8, 3) == 3


def test_blocks_tell_detection_what_they_are() -> None:
    blocks = [m for m in MobileNetV2().features if isinstance(m, InvertedResidual)]
    assert [i for i, b in enumerate(blocks, 1) if b.use_res_connect] == [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]
    assert [i for i, b in enumerate(blocks, 1) if b._is_cn] == [2, 4, 7, 14]
    assert [b.stride for b in blocks] == [2 if b._is_cn else 1 for b in blocks]
    assert all(type(m) is not nn.ReLU for m in MobileNetV2().modules())


def test_initialisation() -> None:
    """Kaiming normal by fan_out, N(0, 0.01), ones and zeros: standard deviations within 5 of their standard errors."""
    torch.manual_seed(0)
    for name, module in MobileNetV2().named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert (module.running_mean == 0).all() and (module.running_var == 1).all() and module.eps == 1e-5
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            conv = isinstance(module, nn.Conv2d)
            std = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5 if conv else 0.01
            n = module.weight.numel()
            assert abs(module.weight.std() / std - 1) < 5 / (2 * n) ** 0.5, name
            assert abs(module.weight.mean()) < 5 * std / n**0.5, name
            assert module.bias is None if conv else (module.bias == 0).all()
    torch.manual_seed(3)
    one = MobileNetV2(width_mult=0.35).state_dict()
    torch.manual_seed(3)
    two = mobilenet_v2(width_mult=0.35).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("setting", [[], [[6, 24, 2]], [[6, 24, 2, 2], [6, 24, 2, 2, 1]], [6, 24, 2, 2], ["abcd"]])
def test_wrong_setting(setting: list[Any]) -> None:
    with pytest.raises(ValueError, match="inverted_residual_setting should be"):
        MobileNetV2(inverted_residual_setting=setting)


@pytest.mark.parametrize("stride", [0, 3, -1])
def test_wrong_stride(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride should be 1 or 2, got {stride}"):
        InvertedResidual(8, 8, stride, 6)
    with pytest.raises(ValueError, match=f"stride should be 1 or 2, got {stride}"):
        MobileNetV2(inverted_residual_setting=[[6, 24, 2, stride]])


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchvision, imported without the fake kernels of its own C++ ops, which a CPU build of torch lacks."""
    register_fake = torch.library.register_fake

    def skipping(op: Any, *arguments: Any, **options: Any) -> Any:
        ours = not (isinstance(op, str) and op.startswith("torchvision::"))
        return register_fake(op, *arguments, **options) if ours else lambda function: function

    monkeypatch.setattr(torch.library, "register_fake", skipping)
    return pytest.importorskip("torchvision", reason="pip install --no-deps torchvision==0.28.0 compares with it")


@pytest.mark.parametrize("width", [*WIDTHS, 0.25, 1.3])
@pytest.mark.parametrize("options", [{}, dict(num_classes=10, round_nearest=4, dropout=0.5)], ids=["default", "other"])
def test_against_torchvision(torchvision: Any, width: float, options: dict[str, Any]) -> None:
    """The same keys, the same weights from the same seed, the same results to the bit, the attributes of its blocks."""
    torch.manual_seed(0)
    theirs = torchvision.models.MobileNetV2(width_mult=width, **options)
    torch.manual_seed(0)
    ours = MobileNetV2(width_mult=width, **options)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
    theirs.load_state_dict(settled(width, **options).state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(2, 65, 33)
    assert torch.equal(plain(ours.eval(), x, torch.float32), theirs.eval()(x))
    for one, other in zip(ours.features, theirs.features, strict=True):
        if isinstance(one, InvertedResidual):
            for name in ("use_res_connect", "out_channels", "_is_cn", "stride"):
                assert getattr(one, name) == getattr(other, name), name


def test_strict_load_both_ways() -> None:
    one, two = settled(1.0, seed=1), settled(1.0, seed=2)
    x = images(1, 32, 32)
    assert not torch.equal(fused(one, x), fused(two, x))
    two.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(fused(one, x), fused(two, x))
    state = one.state_dict()
    del state["features.3.conv.1.1.running_var"]
    with pytest.raises(RuntimeError, match="features.3.conv.1.1.running_var"):
        two.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------ values


@cache
def settled_with_logits(width: float, size: tuple[int, int]) -> tuple[MobileNetV2, Tensor]:
    model = settled(width)
    return model, plain(model, images(2, *size))


def sweep() -> list[Any]:
    quick = {(0.35, (97, 131)), (0.5, (65, 33)), (0.75, (32, 32)), (1.0, (224, 224)), (1.4, (65, 33)), (1.4, (32, 32))}
    return [
        pytest.param(width, size, marks=() if (width, size) in quick else pytest.mark.exhaustive)
        for width in WIDTHS
        for size in SIZES
    ]


@pytest.mark.parametrize(("width", "size"), sweep(), ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else v)
def test_logits(
    float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, width: float, size: tuple[int, int]
) -> None:
    model, logits = settled_with_logits(width, size)
    assert error(fused(model, images(2, *size)), logits) < TOLERANCE


def test_float64() -> None:
    x = images(2, 65, 33).double()
    model = settled(0.5).double()
    assert error(fused(model, x), plain(model, x)) < TOLERANCE * 2**-29  # what float64 has more of precision


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 3), (4, 5), (7, 40), (31, 31), (33, 1), (1, 300)])
def test_small_images(float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, size: tuple[int, int]) -> None:
    check(settled(), images(3, *size))


SETTINGS: dict[str, list[list[int]]] = {
    "t=1 not first": [[6, 16, 1, 2], [1, 16, 2, 1], [1, 24, 1, 2], [3, 24, 2, 1]],
    "t=6 first": [[6, 24, 2, 2], [6, 32, 1, 1]],
    "t=1 with a residual behind the stem": [[1, 32, 2, 1], [6, 40, 1, 2]],
    "t=1 with stride 2 behind the stem": [[1, 24, 1, 2], [2, 24, 1, 1]],
    "a row of no blocks": [[1, 16, 1, 1], [6, 24, 0, 2], [6, 24, 1, 2]],
    "no block at all": [[6, 24, 0, 2]],
    "one block": [[6, 320, 1, 1]],
    "t=2.5": [[2.5, 24, 2, 2]],
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings(float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, setting: list[list[int]]) -> None:
    for round_nearest in (8, 1):
        model = settled(0.7, inverted_residual_setting=setting, round_nearest=round_nearest)
        check(model, images(2, 33, 20))


@pytest.mark.parametrize("in_channels", [1, 2, 4, 13])
def test_in_channels(float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, in_channels: int) -> None:
    check(settled(in_channels=in_channels), images(2, 40, 33, in_channels))


@pytest.mark.parametrize("num_classes", [1, 2, 10, 33, 1001])
def test_num_classes(float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, num_classes: int) -> None:
    model = settled(num_classes=num_classes)
    for batch in (1, 5):
        assert check(model, images(batch, 32, 32)).shape == (batch, num_classes)


def test_no_classes() -> None:
    model = settled(num_classes=0)
    assert type(model.classifier) is nn.Identity
    x = images(3, 40, 33)
    assert check(model, x).shape == (3, model.num_features)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert error(fused(model, x), pooled) < TOLERANCE


def test_parts() -> None:
    """forward is forward_head of forward_features; both, and each block alone, are right fused and plain."""
    model, x = settled(), images(2, 65, 70)
    for is_fused in (True, False):
        model.fused = is_fused
        assert all(block.fused == is_fused for block in model.features if isinstance(block, InvertedResidual))
        with torch.no_grad():
            features = model.forward_features(x)
            assert features.shape == (2, 1280, 3, 3)
            pooled = model.forward_head(features, pre_logits=True)
            assert torch.equal(model.forward_head(features), model.classifier(pooled))
            assert error(model.forward_head(features), plain(model, x)) < TOLERANCE
            z = x
            for layer in model.features:
                z = layer(z)
            assert error(z, features) < TOLERANCE
    model.fused = False
    with torch.no_grad():
        assert model.why_not_fused(x) != "" and torch.equal(model(x), plain(model, x, torch.float32))


def test_layouts_of_the_image(float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None) -> None:
    model, x = settled(), images(3, 47, 50)
    y = check(model, x)
    around = torch.full((6, 5, 50, 60), float("nan"))
    around[::2, 1:4, 2:49, 4:54] = x
    every_second = torch.full((3, 3, 94, 100), float("nan"))
    every_second[..., ::2, 1::2] = x
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        around[::2, 1:4, 2:49, 4:54],
        every_second[..., ::2, 1::2],
    ):
        assert torch.equal(fused(model, view), y), view.stride()
    one = x[:1].expand(4, 3, 47, 50)
    assert torch.equal(fused(model, one), y[:1].expand(4, -1))
    grey = x[:, :1].expand(3, 3, 47, 50)
    assert torch.equal(fused(model, grey), fused(model, grey.contiguous()))


def test_empty_batch() -> None:
    model = settled()
    for dtype in (torch.float32, torch.float64):
        y = fused(model.to(dtype), torch.zeros(0, 3, 32, 32, dtype=dtype))
        assert y.shape == (0, 1000) and y.dtype == dtype


def test_non_finite_images(float32_kernel: mnv2_fused.ops.Kernel) -> None:
    """An image with NaN or infinity gives what PyTorch gives, the others of its batch not a bit else."""
    model, x = settled(), images(3, 65, 33)
    clean = fused(model, x)
    for value in (float("nan"), float("inf"), -float("inf")):
        dirty = x.clone()
        dirty[1, 2, 30, 16] = value
        y, right = fused(model, dirty), plain(model, dirty)
        assert torch.equal(y.isnan(), right.isnan())
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        if not right[1].isnan().any():
            assert error(y, right) < TOLERANCE


@pytest.mark.parametrize("size", [(64, 40), (97, 131)])
def test_an_image_is_the_same_alone_and_in_any_batch(
    float32_kernel: mnv2_fused.ops.Kernel, size: tuple[int, int]
) -> None:
    model, x = settled(), images(5, *size)
    torch.set_num_threads(1)
    alone = torch.cat([fused(model, x[i : i + 1]) for i in range(5)])
    for n in (1, 2, 3, 4, 7, 16):
        torch.set_num_threads(n)
        for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 3, 1], [2, 0], [1]):
            assert torch.equal(fused(model, x[order]), alone[order]), (n, order)


def test_width_one_is_the_same_with_any_threads() -> None:
    model, x = settled(1.0), images(3, 224, 224)
    torch.set_num_threads(1)
    one = fused(model, x)
    for n in (2, 3, 4, 7, 16):
        torch.set_num_threads(n)
        assert torch.equal(fused(model, x), one)
        assert torch.equal(fused(model, x[1:2]), one[1:2])


# --------------------------------------------------------------------------------------- where it must not run fused


INNER = {
    "features": lambda model: model.features,
    "stem": lambda model: model.features[0],
    "block": lambda model: model.features[4],
    "sequential in a block": lambda model: model.features[4].conv[0],
    "convolution": lambda model: model.features[4].conv[0][0],
    "norm": lambda model: model.features[4].conv[3],
    "relu6": lambda model: model.features[18][2],
    "dropout": lambda model: model.classifier[0],
    "linear": lambda model: model.classifier[1],
}


@pytest.mark.parametrize("find", INNER.values(), ids=INNER)
def test_hooks_fire(find: Callable[[MobileNetV2], nn.Module]) -> None:
    model, x = settled(), images(2, 32, 32)
    before = check(model, x)
    fired: list[str] = []
    with torch.no_grad():
        for register, kind in (
            (nn.Module.register_forward_hook, "after"),
            (nn.Module.register_forward_pre_hook, "before"),
        ):
            handle = register(find(model), lambda *_, kind=kind: fired.append(kind))
            assert error(model(x), before) < TOLERANCE
            assert fired == [kind]
            handle.remove()
            fired.clear()
            assert torch.equal(fused(model, x), before) and not fired


def test_vanishing_map_is_an_error() -> None:
    model = settled()
    model.features[-2].conv[1][0].padding = (0, 0)
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 32, 32))


def test_fused_again_after_training_and_a_new_classifier() -> None:
    model, x = settled(), images(1, 32, 32)
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 32, 32))
        model.reset_classifier(10)
    check(model.eval(), x)


def test_a_model_with_a_hook_that_refers_to_it_is_freed() -> None:
    model, x = settled(), images(1, 32, 32)
    model.features[3].register_forward_hook(lambda module, inputs, y, model=model: None)
    with torch.no_grad():
        model(x)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_repack_after_uncounted_writes() -> None:
    model, x = settled(), images(1, 32, 32)
    fused(model, x)
    model.features[3].conv[0][0].weight.data.mul_(2)
    model.repack()
    check(model, x)


def test_hook_that_changes_the_output() -> None:
    model, x = settled(), images(2, 32, 32)
    before = fused(model, x)
    model.features[4].register_forward_hook(lambda module, inputs, y: y * 2)
    with torch.no_grad():
        assert error(model(x), before) > 1e-3
        assert error(model(x), plain(model, x)) < TOLERANCE


def test_global_hooks_fire() -> None:
    model, x = settled(), images(1, 32, 32)
    fired = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.append(type(module)))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert fired.count(nn.Conv2d) == 52


def test_hooks_of_the_model_itself() -> None:
    model, x = settled(), images(1, 32, 32)
    fired = []
    model.register_forward_hook(lambda *_: fired.append(1))
    fused(model, x)
    assert fired == [1]


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: MobileNetV2) -> None:
    parametrize.register_parametrization(model.features[3].conv[0][0], "weight", Double())


def weight_norm(model: MobileNetV2) -> None:
    conv = nn.utils.parametrizations.weight_norm(model.features[3].conv[2])
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(2)


def pruned(model: MobileNetV2) -> None:
    prune.l1_unstructured(model.features[3].conv[0][0], "weight", 0.5)


def silu(model: MobileNetV2) -> None:
    model.features[3].conv[1][2] = nn.SiLU()


def identity_norm(model: MobileNetV2) -> None:
    model.features[3].conv[3] = nn.Identity()


def identity_block(model: MobileNetV2) -> None:
    model.features[3] = nn.Sequential(nn.Identity(), nn.Hardtanh())


def reflected(model: MobileNetV2) -> None:
    model.features[3].conv[1][0].padding_mode = "reflect"


def padding_changed(model: MobileNetV2) -> None:
    model.features[0][0].padding = (0, 0)


def dilated(model: MobileNetV2) -> None:
    model.features[2].conv[1][0].dilation = model.features[2].conv[1][0].padding = (2, 2)


def own_forward(model: MobileNetV2) -> None:
    block = model.features[3]
    block.forward = lambda x: 2 * InvertedResidual.forward(block, x)


def own_forward_inside(model: MobileNetV2) -> None:
    model.features[3].conv[0][0].forward = lambda x: torch.zeros(1, 48, 1, 1).expand(len(x), -1, *x.shape[2:])


def residual_off(model: MobileNetV2) -> None:
    model.features[3].use_res_connect = False


def own_forward_of_a_sequential(model: MobileNetV2) -> None:
    stem = model.features[0]
    stem.forward = lambda x: 2 * nn.Sequential.forward(stem, x)


def own_forward_features(model: MobileNetV2) -> None:
    model.forward_features = lambda x: 2 * MobileNetV2.forward_features(model, x)


def hollow_block(model: MobileNetV2) -> None:
    model.features[3].conv = nn.Sequential(nn.Identity())


def another_head(model: MobileNetV2) -> None:
    model.classifier = nn.Sequential(nn.Linear(1280, 20), nn.Tanh(), nn.Linear(20, 5))


def softplus_behind(model: MobileNetV2) -> None:
    model.features[17] = nn.Sequential(model.features[17], nn.Softplus())


UNUSUAL: tuple[Callable[[MobileNetV2], None], ...] = (
    parametrized, weight_norm, pruned, silu, identity_norm, identity_block, reflected, padding_changed, dilated,
    own_forward, own_forward_inside, own_forward_of_a_sequential,
    own_forward_features, hollow_block, residual_off, another_head, softplus_behind,
)  # fmt: skip


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__)
def test_unusual_networks_are_right(change: Callable[[MobileNetV2], None]) -> None:
    """Fused or not, as the case may be: what counts is that the result is that of the modules."""
    model, x = settled(), images(2, 40, 40)
    before = fused(model, x)
    change(model)
    with torch.no_grad():
        after, features = model(x), model.forward_features(x)
        model.fused = False
        right, right_features = model(x), model.forward_features(x)
    assert after.shape != before.shape or error(after, before) > 1e-3
    # Both sides are float32, and a map's errors are not averaged by the pooling.
    assert error(after, right) < 2 * TOLERANCE and error(features, right_features) < 4 * TOLERANCE


def test_a_replica() -> None:
    """Of nn.DataParallel shares the packed weights of its original, and its parameters are no Parameters."""
    replica = copy.copy(model := settled())
    replica._is_replica = True
    with torch.no_grad():
        assert replica.why_not_fused(images(1, 32, 32)) == "a replica of nn.DataParallel"
        assert model.why_not_fused(images(1, 32, 32)) == ""


def test_one_norm_left_in_training() -> None:
    model, x = settled(), images(4, 32, 32)
    eval_logits = fused(model, x)
    bn = model.features[4].conv[3].train()
    mean = bn.running_mean.clone()
    with torch.no_grad():
        y = model(x)
    assert error(y, eval_logits) > 1e-3 and not torch.equal(bn.running_mean, mean)
    bn.eval()
    assert error(check(model, x), eval_logits) > 1e-3  # the statistics have moved


def test_dropout_left_in_training() -> None:
    model, x = settled(), images(4, 32, 32)
    eval_logits = fused(model, x)
    model.classifier.train()
    with torch.no_grad():
        assert error(model(x), eval_logits) > 1e-3


def test_training_is_the_composition() -> None:
    """In float64, where rounding does not carry values across the kinks of ReLU6."""
    model, x = settled().double().train(), images(4, 32, 32).double()
    composition = copy.deepcopy(model)
    composition.fused = False
    outputs = []
    for one in (model, composition):
        torch.manual_seed(0)
        outputs.append(one(x))
        outputs[-1].square().mean().backward()
    assert error(*outputs) < 1e-10
    largest = max(float(p.grad.norm()) for p in composition.parameters())  # some gradients are 0 but for rounding
    for (name, p), q in zip(model.named_parameters(), composition.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12 * largest, msg=name)
    for (name, b), c in zip(model.named_buffers(), composition.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_in_eval_mode() -> None:
    """With gradients enabled the blocks may run fused, but every gradient is there and right."""
    model, x = settled(), images(2, 40, 40).clone().requires_grad_()
    model(x).square().mean().backward()
    double = copy.deepcopy(model).double()
    double.fused = False
    double.zero_grad()
    x64 = x.detach().double().requires_grad_()
    double(x64).square().mean().backward()
    for (name, p), q in zip([("x", x), *model.named_parameters()], [x64, *double.parameters()], strict=True):
        assert error(p.grad.flatten()[None], q.grad.flatten()[None]) < 1e-4, name


def test_grad_modes() -> None:
    model, x = settled(), images(2, 32, 32)
    y = fused(model, x)
    assert model(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    model.requires_grad_(False)
    assert model.why_not_fused(x) == "" and torch.equal(model(x), y)
    model.classifier.requires_grad_(True)
    assert model(x).requires_grad and error(model(x).detach(), y) < TOLERANCE
    model.requires_grad_(False)
    wanted = x.clone().requires_grad_()
    assert model(wanted).requires_grad


def test_forward_mode() -> None:
    """Forward derivatives are not dropped, though nothing requires grad."""
    model, x = settled().requires_grad_(False), images(1, 32, 32)
    double = copy.deepcopy(model).double()
    double.fused = False
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    right = torch.func.jvp(double, (x.double(),), (tangent.double(),))[1]
    assert error(torch.func.jvp(model, (x,), (tangent,))[1], right) < 1e-3
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, tangent)))
    assert y.tangent is not None and error(y.tangent, right) < 1e-3


def test_function_transforms() -> None:
    model, x = settled().requires_grad_(False), images(1, 32, 32)
    double = copy.deepcopy(model).double()
    double.fused = False
    right = torch.func.grad(lambda x: double(x).sum())(x.double())
    assert error(torch.func.grad(lambda x: model(x).sum())(x).flatten(1), right.flatten(1)) < 1e-3
    batches = torch.stack([x, x + 1])
    with torch.no_grad():
        assert error(torch.vmap(model)(batches)[:, 0], torch.cat([plain(model, x), plain(model, x + 1)])) < TOLERANCE


def test_tracing() -> None:
    """torch.fx sees the network's layers; torch.compile and torch.export one op, of the same bits."""
    model, x = settled(), images(2, 32, 32)
    y = fused(model, x)
    with torch.no_grad():
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), y)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), y)
        assert error(torch.fx.symbolic_trace(model)(x), y) < TOLERANCE


# ------------------------------------------------------------------------------------------------ errors, layers' times


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(1, 1, 3, 32, 32),
        torch.zeros(32),
        torch.zeros(1, 4, 32, 32),
        torch.zeros(1, 1, 32, 32),
        torch.zeros(1, 3, 32, 32).double(),
        torch.zeros(1, 3, 32, 32).int(),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32).bfloat16(),
        torch.zeros(1, 3, 0, 32),
        torch.zeros(1, 3, 32, 0),
        "an image",
        None,
    ],
    ids=lambda x: f"{list(x.shape)}-{x.dtype}" if isinstance(x, Tensor) else str(x),
)
def test_wrong_input(x: Any) -> None:
    """What PyTorch's own modules refuse is refused with the same kind of error."""
    model = settled()
    composition = copy.deepcopy(model)
    composition.fused = False
    with torch.no_grad():
        with pytest.raises(Exception) as right:
            composition(x)
        with pytest.raises(right.type) as raised:
            model(x)
    assert str(raised.value)


@pytest.mark.parametrize("threads", [1, 2])
def test_layer_seconds(threads: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model, x = MobileNetV2(10, 0.35).eval(), torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        start = time.perf_counter()
        found = model.layer_seconds(x)
        wall = time.perf_counter() - start
        with FlopCounterMode(display=False) as counter:
            model(x)
    assert len(found) == len(model.features) + 2  # the mean, the classifier
    assert sum(macs for _, macs, _ in found) == counter.get_total_flops() // 2
    computed_with_the_next = {0, len(model.features) - 1}  # the stem, the head
    assert {i for i, (_, _, seconds) in enumerate(found) if seconds == 0} == computed_with_the_next
    assert all(seconds >= 0 for *_, seconds in found) and 0 < sum(seconds for *_, seconds in found) < wall
    model.fused = False
    with torch.no_grad(), pytest.raises(RuntimeError, match="the attribute `fused` is False"):
        model.layer_seconds(x)
    model.fused = True
    with pytest.raises(RuntimeError, match="gradients are asked for"):
        model.layer_seconds(x)
