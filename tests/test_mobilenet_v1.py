"""MobileNetV1: the paper's table by hand, counts to the last one, one op, the values of plain modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from emulation import TOLERANCE as CUDA_TOLERANCE
from networks import check, error, fused, images, plain, settle
from steps import EXACT, Ran, clear_kinks, errors, results_of, scales
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mnv2_fused
from mnv2_fused.mobilenet_v1 import MobileNetV1, mobilenet_v1


def settled(width_mult: float = 0.25, **options: object) -> MobileNetV1:
    torch.manual_seed(0)
    return settle(MobileNetV1(width_mult=width_mult, **options))


def by_hand(width: float, num_classes: int) -> nn.Sequential:
    """The body of table 1, layer for layer: Conv / s2, then Conv dw and Conv / s1 in turn, Avg Pool, FC."""

    def conv(c: int, k: int, size: int, stride: int, groups: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(k), nn.ReLU6()]

    layers, channels = conv(3, int(32 * width), 3, 2), int(32 * width)
    for strided, k in zip("-s-s-s-----s-", [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024], strict=True):
        k = int(k * width)
        layers += conv(channels, channels, 3, 2 if strided == "s" else 1, channels) + conv(channels, k, 1, 1)
        channels = k
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)).eval()


def same_as_by_hand(model: MobileNetV1, width: float) -> nn.Sequential:
    """The network by hand with the model's weights, which come in the same order."""
    hand = by_hand(width, model.num_classes)
    ours, theirs = model.state_dict(), hand.state_dict()
    assert [t.shape for t in ours.values()] == [t.shape for t in theirs.values()]
    hand.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    return hand


# Millions of multiply-adds and parameters of tables 6 and 7 of the paper, which round down here and up there.
PUBLISHED = {
    (1.0, 224): (569, 4.2),
    (0.75, 224): (325, 2.6),
    (0.5, 224): (149, 1.3),
    (0.25, 224): (41, 0.5),
    (1.0, 192): (418, 4.2),
    (1.0, 160): (290, 4.2),
    (1.0, 128): (186, 4.2),
}


@pytest.mark.parametrize(("width", "resolution"), PUBLISHED)
def test_counts_of_the_paper(width: float, resolution: int) -> None:
    with torch.device("meta"):
        model = MobileNetV1(width_mult=width).eval()
        x = torch.zeros(2, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter:
        model(x)
    millions, parameters = PUBLISHED[width, resolution]
    assert abs(counter.get_total_flops() / 4e6 - millions) < 1  # two images; a multiply-add counts as two
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - parameters) < 0.05


@pytest.mark.parametrize(
    ("width", "resolution", "multiply_adds", "parameters"),
    [(1.0, 224, 567_716_352, 3_185_088), (0.75, 128, 106_002_432, 1_800_144)],
)
def test_counts_of_the_reference(width: float, resolution: int, multiply_adds: int, parameters: int) -> None:
    """The sums at the head of research/slim/nets/mobilenet_v1.py, of convolutions without BatchNorm and classifier."""
    model, x = MobileNetV1(width_mult=width, num_classes=0).eval(), torch.zeros(1, 3, resolution, resolution)
    with torch.no_grad():
        assert model.why_not_fused(x) == ""
        packing = model._chain._packing
        with FlopCounterMode(display=False) as counter:
            torch.ops.mnv2_fused.network(x, packing.packed, packing.plan)
    assert counter.get_total_flops() == 2 * multiply_adds
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) == parameters


def test_parameters() -> None:
    model = MobileNetV1()
    assert sum(p.numel() for p in model.parameters()) == 4_231_976
    assert sum(p.numel() for p in model.classifier.parameters()) == 1_025_000
    assert model.num_features == 1024 and model.classifier[0].p == 0.001
    assert not any(block.use_res_connect for block in model.features[1:])
    assert all(torch.equal(a, b) for a, b in zip(*(seeded().values() for _ in range(2)), strict=True))


def seeded() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return mobilenet_v1(width_mult=0.25).state_dict()


@pytest.mark.parametrize(("width", "channels"), [(0.25, [8, 16, 256]), (0.3, [9, 19, 307]), (0.1, [8, 8, 102])])
def test_widths(width: float, channels: list[int]) -> None:
    model = MobileNetV1(width_mult=width)
    assert [model.features[0][0].out_channels, model.features[1].out_channels, model.num_features] == channels
    with pytest.raises(ValueError, match="width_mult should be positive, got 0"):
        MobileNetV1(width_mult=0)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (45, 33), (64, 96)])
def test_one_op(float32_kernel: mnv2_fused.ops.Kernel, poisoned_memory: None, size: tuple[int, int]) -> None:
    """The whole network, from the image to the logits; of any size."""
    model, x = settled(0.3, num_classes=11), images(3, *size)
    with Ran() as ran:
        y = check(model, x)
    assert ran.ops == {"pack": 1, "network": 1}
    truth = same_as_by_hand(model, 0.3).double()
    assert error(plain(model, x), truth(x.double())) < 1e-13 and y.shape == (3, 11)


def test_full_size() -> None:
    check(settled(1.0), images(1, 224, 224))


def test_float64() -> None:
    model, x = settled().double(), images(2, 40, 33).double()
    assert error(fused(model, x), plain(model, x)) < 1e-13


def test_training_is_the_composition() -> None:
    """13 blocks and the stem, each one op; the gradients of plain modules."""
    model, x = settled(num_classes=5, dropout=0.0).double().train(), images(4, 33, 40).double()
    clear_kinks(model, x)
    composition = copy.deepcopy(model)
    composition.fused = False
    truth = results_of(composition, x.clone().requires_grad_())
    with Ran() as ran:
        found = results_of(model, x.clone().requires_grad_())
    assert (ran.ops["block_train"], ran.ops["conv_bn_relu6"]) == (13, 1), ran.ops
    worst = errors(found, truth, scales(model, x, truth))
    assert max(worst.values()) < EXACT, max(worst.items(), key=lambda item: item[1])
    assert model.unfused(x) == {} and composition.unfused(x).keys() == {""}


def test_parts_and_a_new_classifier() -> None:
    model, x = settled(num_classes=7), images(2, 64, 50)
    before = check(model, x)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 2, 2)
        assert error(model.forward_head(features), before) < 2e-5
    model.reset_classifier(3)
    assert check(model, x).shape == (2, 3)
    model.features[5].conv[1].weight.data.mul_(2)
    model.repack()
    check(model, x)
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(fused(other, x), fused(model, x))


def test_maps() -> None:
    """The last block of every resolution; of its output stride 8, as the reference's loop leaves strides and rates."""
    model, x = settled(features_only=True, output_stride=8), images(1, 65, 65)
    assert [info["module"] for info in model.feature_info] == [f"features.{i}" for i in (1, 3, 5, 11, 13)]
    assert [info["num_chs"] for info in model.feature_info] == [16, 32, 64, 128, 256]
    assert [info["reduction"] for info in model.feature_info] == [2, 4, 8, 8, 8]
    depthwise = [block.conv[0][0] for block in model.features[1:]]
    assert [conv.dilation[0] for conv in depthwise] == [1] * 6 + [2] * 6 + [4]
    assert [conv.stride[0] for conv in depthwise] == [1, 2, 1, 2, *[1] * 9]
    with torch.no_grad():
        maps = model(x)
    assert [m.shape[2] for m in maps] == [33, 17, 9, 9, 9]
    for found, truth in zip(maps, plain(model, x), strict=True):
        assert error(found, truth) < 2e-5


def test_padding() -> None:
    """TensorFlow's is PyTorch's where every strided convolution reads an odd size, and another where it does not."""
    one, two = settled(padding="same"), settled()
    two.load_state_dict(one.state_dict())
    assert torch.equal(fused(one, images(2, 65, 33)), fused(two, images(2, 65, 33)))
    assert error(check(one, images(2, 64, 64)), fused(two, images(2, 64, 64))) > 1e-3


@pytest.mark.parametrize("kind", ["float16", "float32"])
@torch.no_grad()
def test_on_a_gpu(device: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = settled(num_classes=6), images(2, 33, 40)
    truth = plain(model, x)
    dtype = getattr(torch, kind)
    usual = error(plain(model, x, dtype), truth)
    model, x = model.to(device, dtype), x.to(device, dtype)
    assert model.why_not_fused(x) == ""
    assert error(model(x).cpu(), truth) <= max(CUDA_TOLERANCE[kind], 1.5 * usual)
