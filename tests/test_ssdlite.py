"""SSDLite: published counts, anchors, heads in their order, loss and detections against slow ones, what runs fused."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from steps import Ran
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mnv2_fused import ssdlite
from mnv2_fused.network import Conv2dSame
from mnv2_fused.ssdlite import (
    DefaultBoxGenerator,
    SSDLite,
    batched_nms,
    box_iou,
    decode_boxes,
    encode_boxes,
    match_anchors,
)

TOLERANCE = 2e-5  # relative norm of float32 heads, with room for 60 layers
GRIDS_320 = [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]


@pytest.fixture(autouse=True)
def our_nms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torchvision is installed."""
    monkeypatch.setattr(ssdlite, "_torchvisions_nms", lambda: None)


def small(**options: Any) -> SSDLite:
    return SSDLite(**(dict(num_classes=5, width_mult=0.35, size=(64, 64)) | options))


def heads(model: SSDLite, x: Tensor) -> tuple[Tensor, Tensor]:
    return model.forward_head(model.forward_maps(x))


def settled(**options: Any) -> SSDLite:
    """A model in eval mode as training leaves one: no channel, no statistic is like its neighbour."""
    torch.manual_seed(0)
    model = small(**options)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in norms:
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, 0.5, 0.5)
        bn.momentum = None  # the mean over all batches so far, here one
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        heads(model.train(), torch.randn(4, 3, 64, 64))
    for bn in norms:
        bn.momentum = 0.03
    return model.eval()


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    return float((found.double() - truth).norm() / truth.double().norm())


def random_boxes(count: int, size: float, seed: int, *, integers: bool = False) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    low, extent = torch.rand(2, count, 2, generator=random) * size / 2
    boxes = torch.cat([low, low + extent + 0.01], 1)
    return boxes.round() if integers else boxes


# ------------------------------------------------------------------------------------------- what the papers publish

BACKBONE = 2_223_872  # parameters of MobileNetV2 without its classifier


class Counts(NamedTuple):
    """Parameters, and billions of multiply-adds as they are rounded where they are published; None is not told."""

    options: dict[str, Any]
    resolution: int
    anchors: int
    parameters: int
    macs: float | None = None
    head_macs: float | None = None


# Table 6 of the paper has 4.3M and 0.8B of SSDLite, Table 5 2.1M of its head and 14.8M and 1.25B of SSD's.
COUNTS = {
    "paper": Counts({}, 320, 2034, 4_337_013, 0.789, 0.1776),
    "300x300": Counts({}, 300, 1917, 4_337_013, 0.7346),
    "90 classes, 300x300": Counts(dict(num_classes=91), 300, 1917, 4_500_543, 0.7495),
    "90 classes": Counts(dict(num_classes=91), 320, 2034, 4_500_543, 0.8044),
    "torchvision's anchors": Counts(dict(anchors="torchvision"), 320, 3234, 4_484_148),
    "torchvision's anchors, 90 classes": Counts(
        dict(anchors="torchvision", num_classes=91), 320, 3234, 4_664_988, 0.870
    ),
    "SSD": Counts(dict(use_depthwise=False), 320, 2034, BACKBONE + 14_776_629, None, 1.259),
}


def billions(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 2e9  # torch counts a multiply-add as two


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_counts(counts: Counts) -> None:
    with torch.device("meta"):
        model, x = SSDLite(**counts.options).eval(), torch.empty(1, 3, counts.resolution, counts.resolution)
    model.fused = False
    assert sum(p.numel() for p in model.parameters()) == counts.parameters
    assert sum(p.numel() for p in model.backbone.parameters()) == BACKBONE
    found: list[Tensor] = []
    macs = billions(lambda: found.extend(heads(model, x)))
    assert [tuple(y.shape) for y in found] == [(1, counts.anchors, n) for n in (4, model.num_classes)]
    for value, right in ((macs, counts.macs), (macs - billions(lambda: model.backbone(x)), counts.head_macs)):
        assert right is None or round(value, len(str(right)) - 2) == right


def test_the_fused_network_counts_the_same() -> None:
    model, x, counts = small().eval(), torch.zeros(2, 3, 64, 64), []
    for fused in (True, False):
        model.fused = fused
        counts.append(billions(lambda: heads(model, x)))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (1.4, (816, 1792, 716, 358, 358, 179)),
        (1.0, (576, 1280, 512, 256, 256, 128)),
        (0.35, (192, 1280, 179, 89, 89, 44)),
        (0.1, (96, 1280, 51, 25, 25, 16)),
    ],
)
def test_widths(width: float, expected: tuple[int, ...]) -> None:
    model = small(width_mult=width).eval()
    x = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert model.out_channels == expected == tuple(m.shape[1] for m in model.forward_maps(x))


def test_layers() -> None:
    """Of an extra layer and of a head, as the paper's authors have them."""

    def describe(root: nn.Module) -> list[str]:
        layers = []
        for m in root.modules():
            if isinstance(m, nn.Conv2d):
                (kernel_size, _), (stride, _), bias = m.kernel_size, m.stride, " + bias" * (m.bias is not None)
                shape = f"{m.in_channels}-{m.out_channels}"
                layers.append(f"{kernel_size}x{kernel_size} {shape} /{m.groups} s{stride}{bias}")
            elif not list(m.children()):
                layers.append(type(m).__name__)
        return layers

    with torch.device("meta"):
        model, dense = SSDLite(), SSDLite(use_depthwise=False)
    after = ["BatchNorm2d", "ReLU6"]
    assert describe(model.extra[0]) == [
        "1x1 1280-256 /1 s1", *after, "3x3 256-256 /256 s2", *after, "1x1 256-512 /1 s1", *after
    ]  # fmt: skip
    assert describe(model.extra[3])[-3:] == ["1x1 64-128 /1 s1", *after]
    assert describe(model.head["regression_head"][0]) == ["3x3 576-576 /576 s1", *after, "1x1 576-12 /1 s1 + bias"]
    assert describe(model.head["classification_head"][5]) == ["3x3 128-128 /128 s1", *after, "1x1 128-486 /1 s1 + bias"]
    assert not any(m.use_res_connect for m in (*model.extra, *model.head["regression_head"]))
    assert describe(dense.extra[0]) == ["1x1 1280-256 /1 s1", *after, "3x3 256-512 /1 s2", *after]
    assert describe(dense.head["classification_head"][0]) == ["3x3 576-243 /1 s1 + bias"]


@pytest.mark.parametrize("use_depthwise", [True, False], ids=["ssdlite", "ssd"])
def test_padding_of_tensorflow(use_depthwise: bool) -> None:
    model = small(padding="same", use_depthwise=use_depthwise)
    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    assert len(strided) == 5 + 4 and all(type(m) is Conv2dSame for m in strided)


def test_initialisation() -> None:
    model = SSDLite()
    for conv in (m for part in (model.extra, model.head) for m in part.modules() if isinstance(m, nn.Conv2d)):
        assert abs(float(conv.weight.detach().std()) - 0.03) < 0.03 * 5 / (2 * conv.weight.numel()) ** 0.5
        assert conv.bias is None or not conv.bias.any()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(bn.eps, bn.momentum) for bn in norms} == {(1e-3, 0.03)} and len(norms) == 52 + 12 + 12


# ----------------------------------------------------------------------------------------------------------- anchors


def slow_anchors(arrangement: str, image: tuple[int, int], grids: list[tuple[int, int]]) -> Tensor:
    scales, height, width = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0], *image
    boxes = []
    for k, (rows, columns) in enumerate(grids):
        for row in range(rows):
            for column in range(columns):
                x, y = (column + 0.5) / columns * width, (row + 0.5) / rows * height
                s, between = scales[k], (scales[k] * scales[k + 1]) ** 0.5
                if arrangement == "torchvision":
                    pairs = [(s, s), (between, between)]
                    for ratio in (2, 3):
                        w, h = s * ratio**0.5, s / ratio**0.5
                        pairs += [(w, h), (h, w)]
                    pairs = [(min(w, 1) * width, min(h, 1) * height) for w, h in pairs]
                else:
                    specs = [(0.1, 1.0), (s, 2.0), (s, 0.5)]
                    if k > 0:
                        specs = [(s, 1.0), (s, 2.0), (s, 0.5), (s, 3.0), (s, 1 / 3), (between, 1.0)]
                    side = min(height, width)
                    pairs = [(scale * ratio**0.5 * side, scale / ratio**0.5 * side) for scale, ratio in specs]
                boxes += [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in pairs]
    return torch.tensor(boxes, dtype=torch.float64)


@pytest.mark.parametrize("arrangement", ["paper", "torchvision"])
@pytest.mark.parametrize(
    ("image", "grids"),
    [
        ((320, 320), GRIDS_320),
        ((300, 300), [(19, 19), *GRIDS_320[1:]]),
        ((96, 160), [(6, 10), (3, 5), (2, 3), (1, 2), (1, 1), (1, 1)]),
    ],
)
def test_anchors(arrangement: str, image: tuple[int, int], grids: list[tuple[int, int]]) -> None:
    generator, right = DefaultBoxGenerator(arrangement), slow_anchors(arrangement, image, grids)
    torch.testing.assert_close(generator(image, grids, torch.float64), right, rtol=0, atol=1e-10)
    torch.testing.assert_close(generator(image, grids), right.float(), rtol=0, atol=0)
    cells = [rows * columns for rows, columns in grids]
    assert len(right) == sum(map(math.prod, zip(cells, generator.num_anchors_per_location(), strict=True)))


def test_first_and_last_anchor_of_the_paper() -> None:
    found = DefaultBoxGenerator()((320, 320), GRIDS_320)
    assert len(found) == 2034
    torch.testing.assert_close(found[0], torch.tensor([-8.0, -8.0, 24.0, 24.0]))  # 32 pixels around the first of 20
    side = 320 * 0.95**0.5
    torch.testing.assert_close(found[-1], torch.tensor([160 - side / 2] * 2 + [160 + side / 2] * 2))
    wide = found[1, 2:] - found[1, :2]
    torch.testing.assert_close(wide, torch.tensor([64 * 2**0.5, 64 / 2**0.5]))  # x, y: twice as wide as high


@pytest.mark.parametrize("arrangement", ["paper", "torchvision"])
def test_anchors_are_kept_and_not_without_end(arrangement: str) -> None:
    generator = DefaultBoxGenerator(arrangement)
    with torch.inference_mode():
        first = generator((320, 320), GRIDS_320)
    assert generator((320, 320), GRIDS_320) is first and not first.is_inference()
    assert generator((320, 320), GRIDS_320, torch.float64).dtype == torch.float64
    for size in range(1, 100):
        generator((size, size), GRIDS_320)
        assert len(generator._cache) <= 16
    assert pickle.loads(pickle.dumps(generator))._cache == {}
    torch.testing.assert_close(copy.deepcopy(generator)((320, 320), GRIDS_320), first, rtol=0, atol=0)


@pytest.mark.parametrize("arrangement", ["paper", "torchvision"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("use_depthwise", [True, False], ids=["ssdlite", "ssd"])
@torch.no_grad()
def test_heads_say_where_they_are(arrangement: str, fused: bool, use_depthwise: bool) -> None:
    """Maps that hold their pixels' places, heads that hand them on beside the shape's size: out come the anchors."""
    image, grids = (96, 160), [(6, 10), (3, 5), (2, 3), (1, 2), (1, 1), (1, 1)]
    model = small(anchors=arrangement, size=image, use_depthwise=use_depthwise).eval()
    model.fused = fused
    maps = []
    for channels, (rows, columns) in zip(model.out_channels, grids, strict=True):
        x = torch.zeros(2, channels, rows, columns)
        x[:, 0] = (torch.arange(columns) + 0.5) / columns
        x[:, 1] = ((torch.arange(rows) + 0.5) / rows)[:, None]
        x[1] *= 2  # the second image says twice that
        maps.append(x)
    for module in model.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
            module.weight[:, 0, 1:2, 1:2] = 1.0 if module.groups > 1 else 0.0  # of a depthwise the middle
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    last = {name: [[m for m in head.modules() if isinstance(m, nn.Conv2d)][-1] for head in model.head[name]]
            for name in model.head}  # fmt: skip
    shapes = model.anchor_generator.num_anchors_per_location()
    for i, conv in enumerate(last["regression_head"]):
        for shape in range(shapes[i]):
            for coordinate in (0, 1):
                conv.weight[4 * shape + coordinate, coordinate].flatten()[conv.weight[0, 0].numel() // 2] = 1.0
            conv.bias[4 * shape + 2] = i
            conv.bias[4 * shape + 3] = shape
    for conv in last["classification_head"]:
        conv.bias.copy_(torch.arange(len(conv.bias)))
    regression, logits = model.forward_head(maps)
    anchors = model.anchor_generator(image, grids)
    center = (anchors[:, :2] + anchors[:, 2:]) / 2 / torch.tensor([160, 96])
    places = [(i, shape) for i, (rows, columns) in enumerate(grids) for shape in [*range(shapes[i])] * rows * columns]
    shape = torch.tensor([shape for _, shape in places])
    for n in (0, 1):
        torch.testing.assert_close(regression[n, :, :2], center * (n + 1), rtol=0, atol=1e-6)
        assert torch.equal(regression[n, :, 2:].round(), torch.tensor(places).float())
        assert torch.equal(logits[n].round(), (shape[:, None] * 5 + torch.arange(5)).float())


# ------------------------------------------------------------------------------------------------------------- boxes


def test_iou() -> None:
    ours = random_boxes(30, 50, 0), random_boxes(20, 50, 1)
    found = box_iou(*ours)
    for i, a in enumerate(ours[0].tolist()):
        for j, b in enumerate(ours[1].tolist()):
            assert found[i, j] == pytest.approx(slow_iou(a, b), abs=1e-6)
    assert torch.equal(box_iou(ours[0].view(3, 10, 4), ours[1]), found.view(3, 10, 20))
    assert box_iou(ours[0], ours[1][:0]).shape == (30, 0)
    integers = torch.tensor([[0, 0, 500, 400]])
    for dtype in (torch.int64, torch.float16):  # of which the area is out of range
        assert box_iou(integers.to(dtype), integers.to(dtype) // 2).tolist() == [[0.25]]


def test_codes() -> None:
    anchors, boxes = random_boxes(50, 300, 0).double(), random_boxes(50, 300, 1).double()
    codes = encode_boxes(boxes, anchors)
    torch.testing.assert_close(decode_boxes(codes, anchors), boxes, rtol=1e-12, atol=1e-9)
    a, b = torch.tensor([10.0, 20.0, 30.0, 60.0]), torch.tensor([15.0, 20.0, 55.0, 40.0])
    # The centre 15 to the right of 20 wide and 10 above of 40 high; twice as wide, half as high.
    right = torch.tensor([10 * 15 / 20, 10 * -10 / 40, 5 * math.log(2), 5 * math.log(0.5)])
    torch.testing.assert_close(encode_boxes(b, a), right)
    torch.testing.assert_close(decode_boxes(right, a), b)
    huge = decode_boxes(torch.tensor([0.0, 0.0, 1e4, -1e4]), a)
    torch.testing.assert_close(huge, torch.tensor([20 - 625.0, 40, 20 + 625, 40]))  # 62.5 times 20 at most


def slow_matches(boxes: Tensor, anchors: Tensor, threshold: float) -> list[int]:
    iou = [[slow_iou(b, a) for a in anchors.tolist()] for b in boxes.tolist()]
    matches = []
    for j in range(len(anchors)):
        column = [row[j] for row in iou]
        best = max(range(len(boxes)), key=lambda i: column[i], default=-1)
        matches.append(best if best >= 0 and column[best] >= threshold else -1)
    for i, row in enumerate(iou):
        matches[max(range(len(row)), key=row.__getitem__)] = i
    return matches


@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_matches(count: int) -> None:
    anchors = slow_anchors("paper", (64, 64), [(4, 4), (2, 2), *[(1, 1)] * 4])
    boxes = random_boxes(count, 64, count).double()
    found = match_anchors(boxes, anchors)
    assert found.tolist() == slow_matches(boxes, anchors, 0.5) and found.dtype == torch.int64
    assert set(found.tolist()) - {-1} or count == 0


def test_every_box_has_an_anchor_and_the_last_of_equal_ones_has_it() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]])
    far = torch.tensor([[8.0, 8, 18, 18]])  # overlaps the first a little, and another box would have it
    assert match_anchors(far, anchors).tolist() == [0, -1, -1]
    assert match_anchors(torch.cat([anchors[:1], far]), anchors).tolist() == [1, -1, -1]
    assert match_anchors(torch.cat([far, anchors[:1], far]), anchors).tolist() == [2, -1, -1]
    half = torch.tensor([[50.0, 50, 60, 55]])  # an IoU of exactly the threshold
    assert match_anchors(half, torch.cat([anchors, half])).tolist() == [-1, 0, -1, 0]
    assert match_anchors(half, torch.cat([anchors, half]), 0.51).tolist() == [-1, -1, -1, 0]


# -------------------------------------------------------------------------------------------- non-maximum suppression


def slow_iou(a: list[float], b: list[float]) -> float:
    w, h = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union else math.nan


def slow_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, threshold: float) -> list[int]:
    kept: list[int] = []
    values, labels = boxes.tolist(), idxs.tolist()
    for i in sorted(range(len(values)), key=lambda i: -float(scores[i])):
        if all(labels[i] != labels[j] or not slow_iou(values[i], values[j]) > threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize(("count", "classes"), [(0, 3), (1, 1), (2, 1), (40, 1), (150, 1), (150, 4), (150, 90)])
@pytest.mark.parametrize("seed", range(3))
def test_nms(count: int, classes: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ties of scores and of IoUs with the threshold, boxes twice, boxes of no area, and in blocks of any size."""
    random = torch.Generator().manual_seed(seed)
    boxes = random_boxes(count, 16, seed, integers=True)
    boxes[: count // 20, 2:] = boxes[: count // 20, :2]
    scores = torch.randint(20, (count,), generator=random) / 20
    idxs = torch.randint(classes, (count,), generator=random)
    for threshold in (0.0, 0.25, 0.5, 0.55, 1.0):
        right = slow_nms(boxes, scores, idxs, threshold)
        for pairs in (1, 100, 3000, 1 << 20):
            monkeypatch.setattr(ssdlite, "_PAIRS", pairs)
            assert batched_nms(boxes, scores, idxs, threshold).tolist() == right, (threshold, pairs)


def test_nms_of_a_chain() -> None:
    """Each box overlaps the next: every other one stays, and what becomes of the last depends on the first."""
    x = torch.arange(300.0)
    boxes = torch.stack([x * 4, x * 0, x * 4 + 10, x * 0 + 10], 1)
    scores, one = 1 - x / 300, torch.zeros(300, dtype=torch.int64)
    assert batched_nms(boxes, scores, one, 0.4).tolist() == list(range(0, 300, 2))
    assert batched_nms(boxes.flip(0), scores.flip(0), one, 0.4).tolist() == list(range(299, 0, -2))


def test_torchvisions_nms_is_used_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    package, broken = types.ModuleType("torchvision"), types.ModuleType("torchvision.ops")
    package.ops = works = types.ModuleType("torchvision.ops")
    works.batched_nms = lambda *arguments: arguments

    def refuse(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    broken.__getattr__ = refuse
    for module, right in ((works, works.batched_nms), (broken, None), (None, None)):
        monkeypatch.setitem(sys.modules, "torchvision", package if module else None)
        monkeypatch.setitem(sys.modules, "torchvision.ops", module)
        ssdlite._torchvisions_nms.cache_clear()
        assert ssdlite._torchvisions_nms() is right
    ssdlite._torchvisions_nms.cache_clear()


# -------------------------------------------------------------------------------------------------- loss, detections


def slow_loss(targets: list[dict[str, Tensor]], codes: Tensor, logits: Tensor, anchors: Tensor) -> tuple[float, float]:
    box_loss = class_loss = 0.0
    found = 0
    for target, code, logit in zip(targets, codes, logits, strict=True):
        entropy = -logit.log_softmax(-1)
        background, foreground = [], []
        for j, i in enumerate(slow_matches(target["boxes"], anchors, 0.5)):
            if i < 0:
                background.append(float(entropy[j, 0]))
                continue
            foreground.append(float(entropy[j, target["labels"][i]]))
            for k in range(4):
                d = abs(float(code[j, k] - encode_boxes(target["boxes"][i], anchors[j])[k]))
                box_loss += d * d / 2 if d < 1 else d - 0.5
        found += len(foreground)
        class_loss += sum(foreground) + sum(sorted(background, reverse=True)[: 3 * len(foreground)])
    return box_loss / max(found, 1), class_loss / max(found, 1)


def targets_of(counts: list[int], size: float = 64, classes: int = 5, seed: int = 0) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        {
            "boxes": random_boxes(count, size, seed + i),
            "labels": torch.randint(1, classes, (count,), generator=random),
        }
        for i, count in enumerate(counts)
    ]


@pytest.mark.parametrize(
    ("counts", "size"),
    [([2], 64), ([0], 64), ([0, 3, 1], 64), ([60, 1], 64), ([1], 3)],
    ids=["two boxes", "none", "three images", "fewer than three negatives for each positive", "one anchor matched"],
)
def test_loss(counts: list[int], size: float) -> None:
    model = small()
    anchors = model.anchor_generator((64, 64), [(4, 4), (2, 2), *[(1, 1)] * 4], torch.float64)
    targets = [{"boxes": t["boxes"].double(), "labels": t["labels"]} for t in targets_of(counts, size)]
    torch.manual_seed(0)
    codes = torch.randn(len(counts), len(anchors), 4, dtype=torch.float64) * 2
    logits = torch.randn(len(counts), len(anchors), 5, dtype=torch.float64) * 2
    found = model.compute_loss(targets, codes, logits, anchors)
    assert list(found) == ["bbox_regression", "classification"]
    assert [float(v) for v in found.values()] == pytest.approx(slow_loss(targets, codes, logits, anchors), rel=1e-9)


def slow_detections(
    model: SSDLite, codes: Tensor, logits: Tensor, anchors: Tensor, sizes: list[tuple[int, int]]
) -> list[list[tuple[float, ...]]]:
    height, width = model.size
    results = []
    for code, logit, (h, w) in zip(codes, logits, sizes, strict=True):
        boxes, scores = decode_boxes(code, anchors), logit.softmax(-1)
        boxes = torch.stack([v.clamp(0, edge) for v, edge in zip(boxes.T, (width, height) * 2, strict=True)], 1)
        rows = []
        for label in range(1, logits.shape[-1]):
            best = sorted((-float(s), j) for j, s in enumerate(scores[:, label]) if s > model.score_thresh)
            rows += [(-s, j, label) for s, j in best[: model.topk_candidates]]
        if rows:
            score, anchor, label = (torch.tensor(column) for column in zip(*rows, strict=True))
            keep = slow_nms(boxes[anchor], score, label, model.nms_thresh)[: model.detections_per_img]
            rows = [(*boxes[anchor[i]].tolist(), float(score[i]), int(label[i])) for i in keep]
        scale = (w / width, h / height)
        results.append([(*(v * scale[k % 2] for k, v in enumerate(row[:4])), *row[4:]) for row in rows])
    return results


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(score_thresh=0.3, detections_per_img=2),
        dict(topk_candidates=3, nms_thresh=0.2),
        dict(score_thresh=0.0, detections_per_img=20, nms_thresh=0.0, topk_candidates=10_000),
    ],
    ids=str,
)
def test_detections(options: dict[str, Any]) -> None:
    model = small(size=(64, 96), **options)
    anchors = model.anchor_generator((64, 96), [(4, 6), (2, 3), (1, 2), *[(1, 1)] * 3], torch.float64)
    torch.manual_seed(0)
    sizes = [(64, 96), (10, 200), (100, 33)]
    codes = torch.randn(3, len(anchors), 4, dtype=torch.float64) * 4
    logits = torch.randn(3, len(anchors), 5, dtype=torch.float64) * 2
    found = model.postprocess_detections(codes, logits, anchors, sizes)
    right = slow_detections(model, codes, logits, anchors, sizes)
    for detections, rows, (h, w) in zip(found, right, sizes, strict=True):
        assert len(rows) == len(detections["labels"]) <= model.detections_per_img
        torch.testing.assert_close(detections["boxes"].tolist(), [list(row[:4]) for row in rows], rtol=1e-9, atol=1e-9)
        assert detections["scores"].tolist() == pytest.approx([row[4] for row in rows])
        assert detections["labels"].tolist() == [row[5] for row in rows] and detections["labels"].dtype == torch.int64
        limit = torch.tensor([w, h, w, h]) * (1 + 1e-12)
        assert ((detections["boxes"] >= 0) & (detections["boxes"] <= limit)).all()


@pytest.mark.parametrize("arrangement", ["paper", "torchvision"])
@torch.no_grad()
def test_heads_that_say_nothing_detect_the_anchors(arrangement: str) -> None:
    """All of them, in their order, as they are in images of other shapes than the network's, which is no square."""
    many = dict(nms_thresh=1.0, detections_per_img=10_000, topk_candidates=10_000)
    model = small(num_classes=2, size=(64, 96), anchors=arrangement, **many).eval()
    for module in model.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    anchors = slow_anchors(arrangement, (64, 96), [(4, 6), (2, 3), (1, 2), *[(1, 1)] * 3])
    anchors = torch.minimum(anchors.clamp(min=0), torch.tensor([96, 64, 96, 64]))
    for detections, (height, width) in zip(
        model([torch.rand(3, 64, 96), torch.rand(3, 100, 30)]), [(64, 96), (100, 30)], strict=True
    ):
        right = anchors * torch.tensor([width / 96, height / 64] * 2)
        torch.testing.assert_close(detections["boxes"], right.float(), rtol=1e-5, atol=1e-4)
        assert (detections["scores"] == 0.5).all() and (detections["labels"] == 1).all()
    model.score_thresh = 0.5  # which is not above itself
    assert len(model(torch.rand(1, 3, 64, 96))[0]["boxes"]) == 0


def test_detections_behind_many_of_one_box() -> None:
    """Where the best candidates are all of one place, those after them are found as well."""
    model = small(num_classes=2, detections_per_img=3, topk_candidates=1000)
    anchors = torch.tensor([[0.0, 0, 30, 30]] * 500 + [[32.0, 0, 62, 30], [0, 32, 30, 62], [32, 32, 62, 62]])
    logits = torch.stack([torch.zeros(503), -torch.arange(503) / 100], 1)
    (found,) = model.postprocess_detections(torch.zeros(1, 503, 4), logits[None], anchors, [(64, 64)])
    torch.testing.assert_close(found["boxes"], anchors[[0, 500, 501]])


def test_training_finds_a_box() -> None:
    """Some steps on two pictures of one square each: the loss falls, and eval mode finds the squares where they are."""
    torch.manual_seed(0)
    model = small(num_classes=3, size=(96, 96), nms_thresh=0.3)
    images, targets = torch.zeros(2, 3, 96, 128), []
    for i, (x, y) in enumerate(((20, 10), (70, 40))):
        images[i, i, y : y + 40, x : x + 40] = 1
        targets.append({"boxes": torch.tensor([[x, y, x + 40, y + 40]]), "labels": torch.tensor([i + 1])})
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(40):
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2.5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(images, targets)
        found = model.eval()(images)
    for i, (detections, target) in enumerate(zip(found, targets, strict=True)):
        assert detections["labels"][0] == i + 1 and detections["scores"][0] > 0.5
        assert box_iou(detections["boxes"][:1], target["boxes"]) > 0.5


# ------------------------------------------------------------------------------------------------------ fused or not


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (300, dict(width_mult=1.0, num_classes=81)),
        (320, dict(width_mult=1.0, num_classes=81, padding="same")),
        (300, dict(padding="same", anchors="torchvision")),
        (320, dict()),
        (97, dict(use_depthwise=False)),
        (1, dict()),
    ],
    ids=str,
)
@torch.no_grad()
def test_fused_is_unfused(size: int, options: dict[str, Any]) -> None:
    model = settled(size=(size, size), **options)
    x = torch.randn(1, 3, size, size)
    with Ran() as ran:
        found = heads(model, x)
    dense = not options.get("use_depthwise", True)
    assert ran.ops["network"] == (2 if dense else 18) and ran.ops.keys() == {"network", "pack"}
    assert list(model.unfused(x).values()) == ["dense 3x3 convolutions"] * (16 * dense)
    model.fused = False
    with Ran() as ran:
        right = heads(model, x)
    assert not ran.ops and model.unfused(x) == {"": "the attribute `fused` is False"}
    for ours, theirs in zip(found, right, strict=True):
        assert error(ours, theirs) < TOLERANCE


@torch.no_grad()
def test_exported() -> None:
    """From normalised images to boxes and scores, on our ops; what was traced does not stay in the model."""
    model, x = settled(), torch.randn(2, 3, 64, 64)

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            maps = model.forward_maps(x)
            codes, logits = model.forward_head(maps)
            anchors = model.anchor_generator(model.size, [tuple(m.shape[2:]) for m in maps])
            return decode_boxes(codes, anchors), logits.softmax(-1)

    program = torch.export.export(Exported(), (x,), strict=False)
    assert [node for node in program.graph.nodes if "mnv2_fused.chain" in str(node.target)]
    for found, right in zip(program.module()(x), Exported()(x), strict=True):
        assert type(right) is Tensor and error(found, right) < TOLERANCE


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_a_step_of_training(padding: str) -> None:
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 80), torch.rand(3, 64, 64)]
    targets = targets_of([2, 0, 5], 50)
    model, results = settled(padding=padding).double().train(), []
    for fused in (True, False):
        copied = copy.deepcopy(model)
        copied.fused = fused
        with Ran() as ran:
            losses = copied(images, targets)
        # The expansion of the 14th block, the stem and the head; 17 blocks, 4 extra layers and 12 heads.
        assert ran.ops["conv_bn_relu6"] == 3 * fused and ran.ops["block_train"] == 33 * fused
        assert bool(copied.unfused(torch.rand(2, 3, 64, 64, dtype=torch.float64))) is not fused
        sum(losses.values()).backward()
        gradients = {name: p.grad for name, p in copied.named_parameters()}
        results.append(losses | gradients | {name: b for name, b in copied.named_buffers() if b.is_floating_point()})
    ours, theirs = results
    assert ours.keys() == theirs.keys() and all(t is not None for t in ours.values())
    scale = max(float(t.detach().norm()) for t in theirs.values())
    for name, t in theirs.items():
        assert float((ours[name] - t).detach().norm()) <= 1e-6 * max(float(t.detach().norm()), 1e-6 * scale), name


def test_a_change_is_noticed_and_a_hidden_one_after_repack() -> None:
    model, x = settled(), torch.randn(2, 3, 64, 64)
    places = [
        model.backbone.features[5].conv[0][0],
        model.extra[2].conv[2],
        model.head["regression_head"][1].conv[1],
    ]
    with torch.no_grad():
        before = heads(model, x)
        for conv in places:
            conv.weight.mul_(1.5)
            after = heads(model, x)
            assert not torch.equal(after[0], before[0])
            before = after
            conv.weight.data.mul_(1.5)
            assert torch.equal(heads(model, x)[0], before[0])
            model.repack()
            before, last = heads(model, x), before
            assert not torch.equal(before[0], last[0])
        model.fused = False
        assert error(before[0], heads(model, x)[0]) < TOLERANCE


@torch.no_grad()
def test_what_is_not_fused_is_named() -> None:
    model, x = settled(), torch.randn(2, 3, 64, 64)
    assert model.unfused(x) == {}
    model.head["classification_head"][2].conv[0][1].register_forward_hook(lambda *_: None)
    model.extra[1].fused = False
    assert model.unfused(x) == {
        "extra.1": "the attribute `fused` is False",
        "head.classification_head.2": "a module inside has hooks or a forward of its own",
    }
    with Ran() as ran:
        heads(model, x)
    assert ran.ops["network"] == 16
    model.backbone.features[3].conv[0][1].register_forward_hook(lambda *_: None)
    assert "backbone.features.3" in model.unfused(x)
    model.backbone.fused = False
    assert model.unfused(x)["backbone"] == "the attribute `fused` is False"
    assert len(settled().unfused(x.to(torch.bfloat16))) > 16


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle", "torch.save"])
@torch.no_grad()
def test_copies(way: str) -> None:
    model, images = settled(), [torch.rand(3, 40, 50)]
    right = model(images)
    assert [key for key in model.state_dict() if not key.startswith(("backbone.features.", "extra.", "head."))] == []
    if way == "state_dict":
        other = small().eval()
        other.load_state_dict(model.state_dict())
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        assert len(file.getvalue()) < 1.2 * 4 * sum(t.numel() for t in model.state_dict().values()) + 5e5
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    for value, truth in zip(other(images)[0].values(), right[0].values(), strict=True):
        assert torch.equal(value, truth)
    other.head["classification_head"][0].conv[1].bias.add_(1)
    assert not torch.equal(other(images)[0]["scores"], right[0]["scores"])
    assert torch.equal(model(images)[0]["scores"], right[0]["scores"])


# --------------------------------------------------------------------------------------------------- images, targets


@torch.no_grad()
def test_a_model_made_on_the_meta_device() -> None:
    """All that is not in the state dict comes through."""
    model, images = settled(), [torch.rand(3, 40, 50)]
    with torch.device("meta"):
        other = small().eval()
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    for value, right in zip(other(images)[0].values(), model(images)[0].values(), strict=True):
        assert torch.equal(value, right)


@torch.no_grad()
def test_images_of_different_sizes() -> None:
    """Each is resized and normalised as it would be alone, and its boxes are in its own pixels."""
    model = settled(detections_per_img=5)
    images = [torch.rand(3, 64, 64), torch.rand(3, 100, 31), torch.rand(3, 33, 70).double()]
    seen = []
    model.forward_maps = lambda x: seen.append(x) or SSDLite.forward_maps(model, x)
    together = model(images)
    for i, image in enumerate(images):
        right = F.interpolate(image[None], (64, 64), mode="bilinear").float() * 2 - 1
        torch.testing.assert_close(seen[0][i : i + 1], right, rtol=1e-5, atol=1e-6)
        (alone,) = model([image])
        for key, value in alone.items():
            torch.testing.assert_close(together[i][key], value, rtol=1e-4, atol=1e-4)
        height, width = image.shape[1:]
        assert (together[i]["boxes"] <= torch.tensor([width, height] * 2) * (1 + 1e-6)).all()
    batch = torch.stack([images[1], images[1].flip(2)])
    for a, b in zip(model(batch), model(list(batch)), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def test_nothing_found() -> None:
    model = settled(score_thresh=1.0)
    for detections in model(torch.rand(2, 3, 64, 64)):
        assert {key: tuple(value.shape) for key, value in detections.items()} == {
            "boxes": (0, 4), "scores": (0,), "labels": (0,)}  # fmt: skip
        assert detections["labels"].dtype == torch.int64
    assert model([]) == [] and model(torch.rand(0, 3, 64, 64)) == []


@torch.no_grad()
def test_no_detections_wanted() -> None:
    assert settled(detections_per_img=0)(torch.rand(1, 3, 64, 64))[0]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("counts", [[0, 0], [1, 0]], ids=str)
def test_images_without_boxes(counts: list[int]) -> None:
    model = small(num_classes=2).train()
    losses = model([torch.rand(3, 64, 64) for _ in counts], targets_of(counts, classes=2))
    assert all(bool(loss == 0) is (sum(counts) == 0) for loss in losses.values())
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.head.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_boxes_may_be_integers_and_targets_stay_as_they_are() -> None:
    model, images = small().train(), torch.rand(2, 3, 30, 40)
    boxes = torch.tensor([[1, 2, 20, 30], [0, 0, 40, 30]])
    targets = [{"boxes": boxes.clone(), "labels": torch.tensor([1, 4], dtype=torch.int32)}] * 2
    as_floats = [{"boxes": boxes.float(), "labels": torch.tensor([1, 4])}] * 2
    state = copy.deepcopy(model.state_dict())
    losses = model(images, targets)
    model.load_state_dict(state)
    assert all(torch.equal(losses[name], loss) for name, loss in model(images, as_floats).items())
    assert torch.equal(targets[0]["boxes"], boxes)


def test_inference_mode_first_then_training() -> None:
    model = small().eval()
    with torch.inference_mode():
        model(torch.rand(2, 3, 64, 64))
    sum(model.train()(torch.rand(2, 3, 64, 64), targets_of([1, 2])).values()).backward()
    found = model.eval()(torch.rand(1, 3, 64, 64))  # and with gradients in eval mode
    found[0]["boxes"].sum().backward()


def test_autocast_gives_float32_losses_and_detections() -> None:
    model = settled()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(torch.rand(2, 3, 64, 64), targets_of([1, 2]))
        found = model.eval()(torch.rand(2, 3, 64, 64))
    assert {t.dtype for t in (*losses.values(), found[0]["boxes"], found[0]["scores"])} == {torch.float32}


@torch.no_grad()
def test_bfloat16_on_the_cpu() -> None:
    """Fused as in float32, by model.to and under autocast, and as near to float64 as PyTorch's modules."""
    model, x = settled(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    composition = copy.deepcopy(model)
    composition.fused = False
    truth = heads(copy.deepcopy(composition).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.unfused(x) == {}
        pairs = [(heads(model, x), heads(composition, x))]
    model, composition, x = model.bfloat16(), composition.bfloat16(), x.bfloat16()
    assert model.unfused(x) == {}
    pairs.append((heads(model, x), heads(composition, x)))
    for found, right in pairs:
        for y, theirs, value in zip(found, right, truth, strict=True):
            assert y.dtype == torch.bfloat16 and error(y, value) < 1.5 * error(theirs, value)


GOOD = {"boxes": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), "labels": torch.tensor([1, 2])}


def bad(index: int, **change: Any) -> list[dict[str, Any]]:
    return [GOOD if i != index else GOOD | change for i in range(2)]


def with_box(*box: float) -> Tensor:
    return torch.stack([GOOD["boxes"][0], torch.tensor(box)])


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (None, ValueError, "2 images, targets: none"),
        ([GOOD], ValueError, "2 images, targets: 1"),
        ([GOOD, {"boxes": GOOD["boxes"]}], ValueError, "image 1 has no labels"),
        (bad(1, boxes=[[1, 2, 3, 4]]), TypeError, "list.*for image 1"),
        (bad(1, boxes=torch.ones(4)), ValueError, r"\[4\] and \[2\] for image 1"),
        (bad(0, boxes=torch.ones(3, 4)), ValueError, r"\[3, 4\] and \[2\] for image 0"),
        (bad(1, labels=torch.tensor([1, 5])), ValueError, "1 to 4, got 5 for box 1 of image 1"),
        (bad(1, labels=torch.tensor([0, 1])), ValueError, "1 to 4, got 0 for box 0 of image 1"),
        (bad(0, labels=torch.tensor([1.0, 2.0])), ValueError, "integers, got torch.float32 for image 0"),
        (bad(1, boxes=with_box(5, 6, 5, 8)), ValueError, r"\[5.0, 6.0, 5.0, 8.0\] for box 1 of image 1"),
        (bad(1, boxes=with_box(5, 6, 7, 5)), ValueError, r"\[5.0, 6.0, 7.0, 5.0\] for box 1 of image 1"),
        (bad(0, boxes=with_box(5, 6, math.nan, 8)), ValueError, "nan.* for box 1 of image 0"),
        (bad(0, boxes=with_box(5, 6, math.inf, 8)), ValueError, "inf.* for box 1 of image 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_targets_are_named(targets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small().train()([torch.rand(3, 64, 64), torch.rand(3, 20, 30)], targets)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(3, 8, 8), ValueError, r"list of \[3, H, W\] or \[N, 3, H, W\], got \[3, 8, 8\]"),
        (torch.rand(2, 1, 8, 8), ValueError, r"\[1, 8, 8\] for image 0"),
        ([torch.rand(3, 8, 8), torch.rand(8, 8)], ValueError, r"\[8, 8\] for image 1"),
        ([torch.rand(3, 8, 0)], ValueError, r"\[3, 8, 0\] for image 0"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], TypeError, "torch.uint8 for image 0"),
        ([torch.rand(3, 8, 8), "cat.jpg"], TypeError, "str'> for image 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_bad_images_are_named(images: Any, error: type[Exception], message: str, training: bool) -> None:
    with pytest.raises(error, match=message):
        small().train(training)(images, targets_of([1] * len(images)))


def test_there_is_something_to_train_on() -> None:
    with pytest.raises(ValueError, match="no image"):
        small().train()([], [])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = small().train()
    nn.init.constant_(model.head["regression_head"][0].conv[1].bias, math.nan)
    with pytest.raises(FloatingPointError, match="the bbox_regression loss is nan"):
        model(torch.rand(2, 3, 64, 64), [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}] * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_classes=1), "num_classes.*at least 2, got 1"),
        (dict(size=(0, 320)), "size"),
        (dict(size=(320, 320, 3)), "size"),
        (dict(anchors="yolo"), "anchors should be 'paper' or 'torchvision', got 'yolo'"),
        (dict(padding="valid"), "padding"),
        (dict(image_mean=(0.5,)), "image_mean"),
        (dict(positive_fraction=0), "positive_fraction"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSDLite(**options)


# -------------------------------------------------------------------------------------------------------- torchvision


@cache
def torchvision() -> Any:
    try:
        import torchvision.models.detection as detection
    except (ImportError, RuntimeError, OSError) as reason:
        pytest.skip(f"no torchvision: {reason}")
    return detection


@pytest.mark.parametrize("counts", [[2, 3], [0, 1]], ids=str)
def test_as_torchvision(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its SSD with our maps and heads, on what it accepts: the same losses and detections, to rounding."""
    monkeypatch.undo()
    detection = torchvision()
    model = settled(anchors="torchvision")

    class Maps(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {str(i): m for i, m in enumerate(model.forward_maps(x))}

    class Head(nn.Module):
        def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
            return dict(zip(("bbox_regression", "cls_logits"), model.forward_head(maps), strict=True))

    other = detection.ssd.SSD(
        Maps(), detection.anchor_utils.DefaultBoxGenerator([[2, 3]] * 6, min_ratio=0.2, max_ratio=0.95), (64, 64), 5,
        image_mean=[0.5] * 3, image_std=[0.5] * 3, head=Head(), score_thresh=0.001, nms_thresh=0.55,
        detections_per_img=300, topk_candidates=300,
    )  # fmt: skip
    images = [torch.rand(3, 64, 80), torch.rand(3, 90, 41)]
    for a, b in zip(model(images), other.eval()(images), strict=True):
        assert a.keys() == b.keys() and len(a["boxes"]) > 10
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4)
    targets = targets_of(counts, 40)
    state = copy.deepcopy(model.state_dict())
    ours = model.train()(images, targets)
    model.load_state_dict(state)
    theirs = other.train()(images, targets)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_nms_as_torchvision(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torchvision()
    theirs: Callable[..., Tensor] = ssdlite._torchvisions_nms()
    r = random.Random(seed)
    count, boxes = r.choice((10, 300, 1500)), None
    boxes = random_boxes(count, 100, seed)
    scores, idxs = torch.rand(count), torch.randint(r.choice((1, 5, 80)), (count,))
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.5), theirs(boxes, scores, idxs, 0.5))
