"""MobileNetV2 as a backbone: dilation by output stride, SAME padding, maps from inside, the blocks that heads want."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from emulation import TOLERANCE as CUDA_TOLERANCE
from networks import TOLERANCE, check, error, images, plain, settle
from steps import EXACT, Ran, check_exact, clear_kinks
from torch import Tensor, nn
from torch.nn import functional as F

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2
from mnv2_fused.network import same_padding

STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)  # of blocks 1 to 17, Table 2 of the paper
# By output stride, the strides and rates that the reference's loop (research/slim/nets/mobilenet/mobilenet.py) leaves.
# Its layer k is features[k - 1]; the layer whose stride is left out keeps the rate of those before.
GEOMETRY = {
    32: (STRIDES, (1,) * 17),
    16: (STRIDES[:13] + (1,) * 4, (1,) * 14 + (2,) * 3),
    8: (STRIDES[:6] + (1,) * 11, (1,) * 7 + (2,) * 7 + (4,) * 3),
}


def settled(width_mult: float = 0.35, **options: Any) -> MobileNetV2:
    torch.manual_seed(0)
    return settle(MobileNetV2(width_mult=width_mult, **options))


def by_hand(state: dict[str, Tensor], x: Tensor, output_stride: int, padding: str) -> list[Tensor]:
    """The features of MobileNetV2 in eval mode, of a state dict, layer by layer: the output of each."""

    def pad(x: Tensor, size: int, stride: int, rate: int) -> Tensor:
        reach, sides = rate * (size - 1) + 1, []
        for n in (x.shape[3], x.shape[2]):  # as TensorFlow's documentation has it
            total = max(reach - (stride if n % stride == 0 else n % stride), 0)
            sides += [total // 2, total - total // 2] if padding == "same" else [rate * (size // 2)] * 2
        return F.pad(x, sides)

    def conv(name: str, bn: str, x: Tensor, stride: int = 1, rate: int = 1, relu6: bool = True) -> Tensor:
        weight = state[f"{name}.weight"]
        x = pad(x, weight.shape[2], stride, rate)
        y = F.conv2d(x, weight, None, stride, 0, rate, x.shape[1] // weight.shape[1])
        y = F.batch_norm(y, *(state[f"{bn}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))
        return y.clamp(0, 6) if relu6 else y

    state = {name: t.to(x.dtype) for name, t in state.items()}
    maps = [conv("features.0.0", "features.0.1", x, 2)]
    for i, (stride, rate) in enumerate(zip(*GEOMETRY[output_stride], strict=True), 1):
        name, y = f"features.{i}.conv", maps[-1]
        if i > 1:
            y = conv(f"{name}.0.0", f"{name}.0.1", y)
        k = 1 if i > 1 else 0
        y = conv(f"{name}.{k}.0", f"{name}.{k}.1", y, stride, rate)
        y = conv(f"{name}.{k + 1}", f"{name}.{k + 2}", y, relu6=False)
        maps.append(maps[-1] + y if STRIDES[i - 1] == 1 and maps[-1].shape == y.shape else y)
    return [*maps, conv("features.18.0", "features.18.1", maps[-1])]


# ------------------------------------------------------------------------------------------ output stride and padding


@pytest.mark.parametrize("output_stride", GEOMETRY)
def test_strides_and_rates(output_stride: int) -> None:
    blocks = MobileNetV2(output_stride=output_stride, width_mult=0.35).features[1:18]
    depthwise = [block.conv[-3][0] for block in blocks]
    assert tuple(conv.stride[0] for conv in depthwise) == GEOMETRY[output_stride][0]
    assert tuple(conv.dilation[0] for conv in depthwise) == GEOMETRY[output_stride][1]


@pytest.mark.parametrize(
    ("output_stride", "padding"), [(None, "same"), (16, "symmetric"), (16, "same"), (8, "symmetric"), (8, "same")]
)
def test_values(
    float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, output_stride: int | None, padding: str
) -> None:
    """Against layers written by hand; the composition of the modules too, where the padding of each is looked up."""
    model, stride = settled(output_stride=output_stride, padding=padding), output_stride or 32
    exact = copy.deepcopy(model).double()
    exact.fused = False
    for size in ((64, 47), (33, 65), (1, 2)):
        x = images(2, *size)
        with torch.no_grad():
            truth = by_hand(model.state_dict(), x.double(), stride, padding)[-1]
            with Ran() as ran:
                features = model.forward_features(x)
            assert ran.ops["network"] == 1
            assert error(features, truth) < TOLERANCE
            assert error(exact.forward_features(x.double()), truth) < 1e-12
        assert features.shape[2:] == tuple(-(-n // stride) for n in size)


@pytest.mark.parametrize(("output_stride", "size"), [(16, 513), (None, 224)])
def test_full_size(output_stride: int | None, size: int) -> None:
    """513 is what the reference segments at, 224 what it classifies: there every padding is uneven."""
    model, x = settled(1.0, output_stride=output_stride, padding="same"), images(1, size, size)
    with torch.no_grad():
        found = model.forward_features(x)
    truth = by_hand(model.state_dict(), x, output_stride or 32, "same")[-1]
    assert error(found, truth) < 2 * TOLERANCE  # both sides are float32


def test_same_is_symmetric_where_all_sizes_are_odd() -> None:
    """Not a bit else; and something else where they are even."""
    one, two = settled(padding="same"), settled()
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        for size in ((65, 33), (1, 97)):
            assert torch.equal(one(images(2, *size)), two(images(2, *size)))
        assert error(one(images(2, 64, 64)), two(images(2, 64, 64))) > 1e-3


@pytest.mark.parametrize(
    ("size", "stride", "rate", "expected"),
    [
        (224, 2, 1, (0, 1)),
        (513, 2, 1, (1, 1)),
        (7, 1, 1, (1, 1)),
        (7, 1, 4, (4, 4)),
        (8, 2, 2, (1, 2)),
        (1, 2, 1, (1, 1)),
    ],
)
def test_same_padding(size: int, stride: int, rate: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, 3, stride, rate) == expected


def test_many_sizes() -> None:
    """The plans of an image's size are made once for each, and the oldest go, whoever calls; results stay right."""
    model = settled(padding="same", inverted_residual_setting=[(1, 8, 1, 1), (6, 8, 1, 2)], num_classes=5)
    sizes = [(n, m) for n in range(1, 11) for m in range(1, 10)]
    truth = {size: plain(model, images(2, *size)) for size in sizes}

    def run(size: tuple[int, int]) -> float:
        with torch.no_grad():
            assert model.why_not_fused(images(2, *size)) == ""
            return error(model(images(2, *size)), truth[size])

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(run, sizes * 3)) < TOLERANCE
    assert 0 < len(model._chain._packing._plans) <= 64 + 3


def test_a_change_of_the_geometry_is_followed() -> None:
    model, x = settled(padding="same"), images(1, 40, 40)
    before = check(model, x)
    model.features[17].conv[1][0].dilation = (3, 3)
    assert error(check(model, x), before) > 1e-3


def test_without_an_output_stride_all_strides_are_taken() -> None:
    """Five strided rows after the stem, as torchvision runs them: the image by 64."""
    model = MobileNetV2(inverted_residual_setting=[(1, 8, 1, 2)] * 5, width_mult=0.25).eval()
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 128, 64)).shape[2:] == (2, 1)
    with pytest.raises(ValueError, match="stride should be 1 or 2, got 3"):
        MobileNetV2(inverted_residual_setting=[(1, 8, 1, 2), (1, 8, 1, 3)], output_stride=4)


# ---------------------------------------------------------------------------------------------------- maps from inside


def taps_by_hooks(model: MobileNetV2, x: Tensor, indices: list[int | str]) -> list[Tensor]:
    """What modules give while all features run, one by one."""
    found: dict[str, Tensor] = {}

    def look(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda module, inputs, y: found.update({name: y}))

    handles = []
    for i, module in enumerate(model.features):
        handles.append(look(f"{i}", module))
        if isinstance(module, InvertedResidual):
            *expand, depthwise = module.conv[:-2]
            handles += [look(f"{i}.expansion", e) for e in expand] + [look(f"{i}.depthwise", depthwise)]
    fused, model.fused = model.fused, False
    model.features(x)
    model.fused = fused
    for handle in handles:
        handle.remove()
    return [found[str(index)] for index in indices]


TAPS: dict[str, list[int | str]] = {
    "one": [17],
    "all of it": [18],
    "the stem": [0],
    "SSDLite": ["14.expansion", 18],
    "DeepLabv3+": ["4.depthwise", 17],
    "out of order, twice": [17, 3, 4, 3, 0],
    "a block's insides and the block": ["5.depthwise", 5, "5.expansion", 4],  # 5 adds its input
    "an expansion of a block that adds": ["3.expansion", 3, 8],
    "neighbours": ["2.expansion", "3.expansion", "4.expansion", "4.depthwise", 4],
    "no expansion": ["1.depthwise", "1"],
    "all": [*range(19), *(f"{i}.expansion" for i in range(2, 18)), *(f"{i}.depthwise" for i in range(1, 18))],
}


@pytest.mark.parametrize("indices", TAPS.values(), ids=TAPS)
def test_taps(poisoned_memory: None, indices: list[int | str]) -> None:
    model, x = settled(output_stride=16, padding="same"), images(2, 46, 64)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        truth = taps_by_hooks(exact, x.double(), indices)
        found = model.forward_intermediates(x, indices)
        again = model.forward_intermediates(x, indices)
    for index, y, same, value in zip(indices, found, again, truth, strict=True):
        assert error(y, value) < TOLERANCE and torch.equal(y, same), index
    exact.fused = False
    with torch.no_grad():
        for y, value in zip(exact.forward_intermediates(x.double(), indices), truth, strict=True):
            assert error(y, value) < 1e-13


@pytest.mark.parametrize(
    ("indices", "segments"),
    [
        ([17], 1),
        ([18], 1),
        (["14.expansion", 18], 2),
        ([3, 3, 17], 2),
        (["4.depthwise", 17], 3),
        (["5.expansion", 5], 3),
    ],
    ids=str,
)
def test_segments_between_taps_are_one_op(indices: list[int | str], segments: int) -> None:
    """Also those of a block cut in two; where a depthwise convolution is asked for, the expansion and what follows."""
    model, x = settled(), images(1, 33, 33)
    with torch.no_grad():
        model.forward_intermediates(x, indices)
        with Ran() as ran:
            model.forward_intermediates(x, indices)
    assert ran.ops == {"network": segments}


def weighed(maps: list[Tensor]) -> Tensor:
    """A loss in which each element of each map has another weight."""
    generator = torch.Generator().manual_seed(5)
    return sum((m * torch.randn(m.shape, generator=generator).to(m.dtype)).sum() for m in maps)


def gradients(model: MobileNetV2, maps: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    weighed(maps).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_gradients(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """By the norm of each, or of the largest by 1e-6: some are 0 but for rounding."""
    assert found.keys() == truth.keys() and found
    least = 1e-6 * max(float(g.norm()) for g in truth.values())
    for name, gradient in truth.items():
        assert float((found[name] - gradient).norm()) <= tolerance * max(float(gradient.norm()), least), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("indices", [v for k, v in TAPS.items() if k != "the stem"], ids=lambda v: str(v)[:30])
def test_gradients_of_taps(indices: list[int | str], training: bool) -> None:
    """With the statistics of the batch, or those of training; and running statistics move as they should."""
    padding = "same" if training else "symmetric"
    model, x = settled(output_stride=16, padding=padding).double().train(training), images(2, 34, 33).double()
    clear_kinks(model, x)
    other = copy.deepcopy(model)
    truth = gradients(other, taps_by_hooks(other, x, indices))
    with Ran() as ran:
        found = gradients(model, model.forward_intermediates(x, indices))
    last = max(int(str(index).split(".")[0]) for index in indices)
    aside = {str(index).split(".")[0] for index in indices if str(index).endswith("depthwise")}
    assert ran.ops["block_train"] == min(last, 17) - len(aside), ran.ops
    check_gradients(found, {name: truth[name] for name in found}, 1e-6)
    assert all(not truth[name].any() for name in truth.keys() - found.keys())
    buffers = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        if int(name.split(".")[1]) <= last - 1:
            torch.testing.assert_close(buffer, buffers[name], rtol=1e-9, atol=1e-9, msg=name)


def test_a_network_trains_alike_with_both_paddings() -> None:
    for padding in ("same", "symmetric"):
        model = settled(padding=padding, output_stride=8, num_classes=3, dropout=0.0).double().train()
        x = images(2, 18, 16).double()
        clear_kinks(model, x)
        check_exact(model, x, padding)


WRONG_TAPS = (19, -1, "0.expansion", "18.depthwise", "1.expansion", "4.project", "four", "4.5", None, True, 3.0)


@pytest.mark.parametrize("index", WRONG_TAPS, ids=repr)
def test_wrong_taps(index: Any) -> None:
    with pytest.raises(ValueError, match="indices should be 0 to 18, or of a block|has no expansion"):
        MobileNetV2(width_mult=0.25).forward_intermediates(torch.zeros(1, 3, 32, 32), [3, index])


def test_no_taps() -> None:
    with pytest.raises(ValueError, match="indices should name at least one map"):
        MobileNetV2(width_mult=0.25).forward_intermediates(torch.zeros(1, 3, 32, 32), [])


# ------------------------------------------------------------------------------------------------------- features_only


def test_features_only() -> None:
    """timm's five maps: the last block of every resolution, finest first; nothing is built behind the last."""
    whole, x = settled(1.0), images(1, 65, 64)
    model = MobileNetV2(features_only=True).eval()
    assert [(i["num_chs"], i["reduction"], i["module"]) for i in model.feature_info] == [
        (16, 2, "features.1"), (24, 4, "features.3"), (32, 8, "features.6"),
        (96, 16, "features.13"), (320, 32, "features.17"),
    ]  # fmt: skip
    assert not list(model.classifier.parameters()) and len(model.features) == 18 and model.num_features == 320
    state = model.state_dict()
    model.load_state_dict({name: whole.state_dict()[name] for name in state})
    with torch.no_grad():
        with Ran() as ran:
            maps = model(x)
        assert ran.ops["network"] == 5
        for y, info, value in zip(maps, model.feature_info, taps_by_hooks(whole, x, [1, 3, 6, 13, 17]), strict=True):
            assert error(y, value) < 2 * TOLERANCE
            assert y.shape[1:] == (info["num_chs"], *(-(-n // info["reduction"]) for n in x.shape[2:]))
        assert error(model.forward_features(x), maps[-1]) < TOLERANCE


@pytest.mark.parametrize("chosen", [(4,), (1, 3), (3, 1), [2], (0, 0, 2)], ids=str)
def test_out_indices(chosen: tuple[int, ...]) -> None:
    model = settled_maps(out_indices=chosen)
    channels, last = [8, 8, 16, 32, 112], [1, 3, 6, 13, 17]
    with torch.no_grad():
        maps = model(images(1, 40, 40))
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert [m.shape[1] for m in maps] == [channels[i] for i in sorted(chosen)]
    assert len(model.features) == last[max(chosen)] + 1 and model.num_features == channels[max(chosen)]


def settled_maps(**options: Any) -> MobileNetV2:
    """settle() calls the model; what its maps are does not matter."""
    return settled(features_only=True, **options)


def test_feature_info_of_an_output_stride() -> None:
    model = settled_maps(output_stride=8)
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 8, 8]
    with torch.no_grad():
        assert [m.shape[2] for m in model(images(1, 64, 64))] == [32, 16, 8, 8, 8]


def test_features_only_says_what_is_fused() -> None:
    model, x = MobileNetV2(features_only=True, width_mult=0.25).eval(), torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        assert model.why_not_fused(x) == "" and model.unfused(x) == {}
    assert model.unfused(x) == {}  # block by block, as gradients are asked for
    model.features[3].conv.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert "hooks" in model.why_not_fused(x) and "features.3" in model.unfused(x)
    with pytest.raises(ValueError, match="features_only=True has no classifier"):
        model.reset_classifier(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(output_stride=12), "output_stride should be 2, 4, 8, 16 or 32, got 12"),
        (dict(padding="valid"), "padding should be 'symmetric' or 'same', got 'valid'"),
        (dict(out_indices=(1,)), "out_indices choose maps of a model with features_only=True"),
        (dict(features_only=True, out_indices=(5,)), "out_indices should be some of 0 to 4, got"),
        (dict(features_only=True, out_indices=(-1,)), "out_indices should be some of 0 to 4, got"),
        (dict(features_only=True, out_indices=()), "out_indices should be some of 0 to 4, got"),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNetV2(width_mult=0.25, **options)


# ---------------------------------------------------------------------------------- changes, hooks, copies, compilation


def check_maps(model: MobileNetV2, x: Tensor, tolerance: float = TOLERANCE) -> list[Tensor]:
    with torch.no_grad():
        maps = model(x)
    for found, value in zip(maps, plain(model, x), strict=True):
        assert error(found, value) < tolerance
    return maps


def check_changed(after: list[Tensor], before: list[Tensor]) -> None:
    assert error(after[-1], before[-1]) > 1e-3


def test_tapped_segments_follow_their_weights() -> None:
    """Every segment has packed weights of its own; a change in one module reaches all that come after it."""
    model, x = settled_maps(padding="same").double(), images(2, 40, 33).double()
    maps = check_maps(model, x, EXACT)
    for change in (
        lambda: model.features[14].conv[2].weight.mul_(1.5),
        lambda: setattr(model.features[5].conv[3], "eps", 0.3),
        lambda: model.load_state_dict(
            {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
        ),
        lambda: setattr(model.features[2].conv[0][0], "weight", nn.Parameter(model.features[2].conv[0][0].weight * 2)),
        lambda: (model.features[0][0].weight.data.mul_(-1), model.repack()),
    ):
        with torch.no_grad():
            change()
        before, maps = maps, check_maps(model, x, EXACT)
        check_changed(maps, before)
    step = torch.optim.SGD(model.parameters(), 1e-4)
    weighed(model.train()(x)).backward()
    step.step()
    model.eval()
    check_changed(check_maps(model, x, EXACT), maps)


def test_the_pieces_of_a_block_follow_their_weights() -> None:
    model, x = settled(), images(1, 33, 33)
    indices = ["14.expansion", 14]
    for name in ("features.14.conv.0.0", "features.14.conv.1.0", "features.14.conv.2"):
        with torch.no_grad():
            before = model.forward_intermediates(x, indices)
            model.get_submodule(name).weight.mul_(1.5)
            found = model.forward_intermediates(x, indices)
            truth = taps_by_hooks(copy.deepcopy(model).double(), x.double(), indices)
        check_changed(found, before)
        for y, value in zip(found, truth, strict=True):
            assert error(y, value) < TOLERANCE


HOOKED = (
    "features.0",
    "features.4",
    "features.14",
    "features.14.conv",
    "features.14.conv.0",
    "features.14.conv.0.1",
    "features.14.conv.2",
    "features.18.2",
)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_fire_between_taps(name: str, training: bool) -> None:
    """Once, and what they return is what comes after them reads."""
    model, x = settled().double().train(training), images(2, 33, 33).double()
    fired = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, y: fired.append(name) or y.flip(3))
    indices = ["14.expansion", 18]
    with torch.set_grad_enabled(training):
        found = model.forward_intermediates(x, indices)
        assert fired == [name]
        value = taps_by_hooks(model, x, indices)
        handle.remove()
        without = model.forward_intermediates(x, indices)
    for y, right in zip(found, value, strict=True):
        assert error(y.detach(), right.detach()) < EXACT
    assert error(without[1].detach(), value[1].detach()) > 1e-3


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_hooks_on_a_block_that_gives_pieces(training: bool) -> None:
    """Of every kind of block: with a shortcut, without an expansion, of two pieces; our own hooks are taken off."""
    model, x = settled().double().train(training), images(2, 33, 33).double()
    indices = ["1.depthwise", "2.depthwise", "2.expansion", "3.expansion", "3.depthwise", 4]
    with torch.set_grad_enabled(training):
        right = [t.detach() for t in model.forward_intermediates(x, indices)]
        fired: list[int] = []
        for i in (1, 2, 3):
            model.features[i].register_forward_pre_hook(lambda module, inputs, i=i: fired.append(i))
        for _ in range(2):
            found = model.forward_intermediates(x, indices)
    assert fired == [1, 2, 3] * 2
    for y, value in zip(found, right, strict=True):
        assert error(y.detach(), value) < EXACT
    assert not any(layer._forward_hooks for i in (1, 2, 3) for layer in model.features[i].conv)


def test_a_block_with_a_forward_of_its_own_gives_pieces() -> None:
    class Halved(InvertedResidual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    model, x = settled(), images(1, 33, 33)
    right = model.forward_intermediates(x, [13, "14.expansion", 14])
    model.features[14].__class__ = Halved
    found = model.forward_intermediates(x, [13, "14.expansion", 14])
    for y, value in zip(found, (*right[:2], right[2] / 2), strict=True):
        assert error(y.detach(), value.detach()) < TOLERANCE


def test_copies_and_state() -> None:
    """Copies and pickles are independent, come without packed weights, and are the same; the state is torchvision's."""
    model, x = settled_maps(padding="same", output_stride=16, out_indices=(1, 4)), images(1, 40, 41)
    maps = check_maps(model, x)
    names = [name for name in MobileNetV2().state_dict() if "features.18." not in name]
    assert list(model.state_dict()) == names[:-2]  # without the classifier's
    packed = len(pickle.dumps(model))
    assert packed < 1.3 * sum(t.numel() * t.element_size() for t in model.state_dict().values()) + 200_000
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(check_maps(other, x), maps, strict=True))
        with torch.no_grad():
            other.features[3].conv[0][0].weight.mul_(3)
        check_changed(check_maps(other, x), maps)
    assert all(torch.equal(a, b) for a, b in zip(check_maps(model, x), maps, strict=True))


def test_compiled() -> None:
    """A features_only model in training, without a graph break, with the same gradients."""
    setting = [(1, 8, 1, 1), (6, 8, 2, 2), (6, 16, 1, 2)]
    options = dict(inverted_residual_setting=setting, width_mult=0.35, padding="same", output_stride=4)
    model, x = settled_maps(**options).double().train(), images(2, 18, 21).double()
    compiled = MobileNetV2(features_only=True, **options).double()  # not called before
    compiled.load_state_dict(model.state_dict())
    truth = gradients(model, model(x))
    torch._dynamo.reset()
    found = gradients(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True)(x))
    check_gradients(found, truth, 1e-9)
    for (name, one), two in zip(compiled.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["float16", "float32"])
@torch.no_grad()
def test_on_a_gpu(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SAME padding, dilation and maps from inside, whole blocks and one cut in two."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = settled(padding="same", output_stride=16), images(2, 40, 33)
    dtype, indices = getattr(torch, kind), [3, "14.expansion", 17]
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    truth = taps_by_hooks(exact, x.double(), indices)
    usual = [error(y, value) for y, value in zip(taps_by_hooks(eager, x.to(dtype), indices), truth, strict=True)]
    model, x = model.to(device, dtype), x.to(device, dtype)
    assert model.why_not_fused(x) == ""
    with Ran() as ran:
        found = model.forward_intermediates(x, indices)
    assert ran.ops["network"] == 3
    for y, value, e in zip(found, truth, usual, strict=True):
        assert y.dtype == dtype and error(y.cpu(), value) <= max(CUDA_TOLERANCE[kind], 1.5 * e)


# ------------------------------------------------------------------------------------------------------ blocks of heads

BLOCKS: dict[str, tuple[tuple[int, int, int, float], dict[str, Any]]] = {
    "MobileNetV1's": ((16, 24, 1, 1), dict(activation="relu6", shortcut=False)),
    "MobileNetV1's, same channels": ((16, 16, 1, 1), dict(activation="relu6", shortcut=False)),
    "MobileNetV1's, stride 2": ((16, 24, 2, 1), dict(activation="relu6", padding="same")),
    "SSDLite's extra layer": ((24, 16, 2, 0.5), dict(activation="relu6", hidden_channels=12, padding="same")),
    "SSDLite's predictor": ((24, 42, 1, 1), dict(norm=False)),
    "predictor with expansion": ((24, 10, 1, 2), dict(norm=False)),
    "bias and shortcut": ((16, 16, 1, 3), dict(norm=False)),
    "bias and ReLU6": ((16, 8, 1, 3), dict(norm=False, activation="relu6")),
    "no shortcut": ((16, 16, 1, 3), dict(shortcut=False)),
    "hidden channels": ((16, 16, 1, 1), dict(hidden_channels=16)),
    "dilated": ((16, 16, 1, 6), dict(dilation=4)),
    "dilated, same, stride 2": ((16, 8, 2, 6), dict(dilation=3, padding="same")),
}  # fmt: skip


def block_of(arguments: tuple[int, int, int, float], options: dict[str, Any]) -> InvertedResidual:
    torch.manual_seed(0)
    return settle(InvertedResidual(*arguments, **options))


@pytest.mark.parametrize(("arguments", "options"), BLOCKS.values(), ids=BLOCKS)
def test_blocks(
    float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    block = block_of(arguments, options)
    for size in ((9, 8), (14, 25), (1, 1)):
        x = images(2, *size, arguments[0])
        with torch.no_grad(), Ran() as ran:
            y = check(block, x)
        assert ran.ops["network"] == 1
        adds = options.get("shortcut", True) and arguments[2] == 1 and arguments[0] == arguments[1]
        with torch.no_grad():
            value = copy.deepcopy(block).double().conv(x.double())
            assert error(y, x + value if adds else value) < TOLERANCE
        assert y.shape == (2, arguments[1], *(-(-n // arguments[2]) for n in size))
        assert options.get("activation") != "relu6" or (y.min() >= 0 and y.max() <= 6)


@pytest.mark.parametrize(("arguments", "options"), BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_blocks_train(arguments: tuple[Any, ...], options: dict[str, Any], training: bool) -> None:
    block, x = block_of(arguments, options).double().train(training), images(3, 9, 8, arguments[0]).double()
    clear_kinks(block, x)
    check_exact(block, x)  # one op, the gradients and statistics of the composition


def test_a_block_with_relu6_and_shortcut_runs_unfused() -> None:
    block, x = block_of((16, 16, 1, 6), dict(activation="relu6")), images(2, 9, 8, 16)
    with torch.no_grad():
        assert block.why_not_fused(x) == "a ReLU6 before the shortcut"
        assert error(block(x), plain(block, x)) < TOLERANCE
        assert torch.equal(block(x), x + block.conv(x))
    block.train()
    assert block.why_not_fused(x) == "a ReLU6 before the shortcut" and block(x).requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(padding="valid"), "padding should be 'symmetric' or 'same', got 'valid'"),
        (dict(activation="relu"), "activation should be 'linear' or 'relu6', got 'relu'"),
    ],
    ids=str,
)
def test_wrong_blocks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InvertedResidual(8, 8, 1, 6, **options)


def test_modules_of_a_block() -> None:
    """Where the options put what; the defaults are torchvision's block."""

    def kinds(*arguments: Any, **options: Any) -> list[str]:
        return [type(m).__name__ for m in InvertedResidual(*arguments, **options).conv]

    assert kinds(8, 8, 1, 6) == ["Sequential", "Sequential", "Conv2d", "BatchNorm2d"]
    assert kinds(8, 8, 1, 1, activation="relu6") == ["Sequential", "Conv2d", "BatchNorm2d", "ReLU6"]
    assert kinds(8, 8, 1, 1, norm=False) == ["Sequential", "Conv2d"]
    block = InvertedResidual(8, 4, 1, 6, norm=False, hidden_channels=10)
    assert block.conv[2].bias is not None and block.conv[1][0].in_channels == 10
