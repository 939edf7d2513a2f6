"""SSDLite on MobileNetV2 (section 6.2 of the paper): network, anchors, loss, detections. Needs no torchvision.

The architecture and the anchors are those of the paper's authors (tensorflow/models, research/object_detection,
ssdlite_mobilenet_v2_coco.config); the loss, the detections and all names those of torchvision, which trains with a
softmax over the classes (torchvision/models/detection/ssd.py and ssdlite.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import network
from .mobilenet_v2 import InvertedResidual, MobileNetV2, conv_bn_relu6

FIRST_MAP = "14.expansion"  # what the stride-2 depthwise of the 14th block reads; "layer 15" in the paper's text
EXTRA_DEPTHS = (512, 256, 256, 128)
MIN_DEPTH = 16

# ------------------------------------------------------------------------------------------------------------- boxes

# Boxes are [..., 4], x1, y1, x2, y2 in pixels. How a box stands to its anchor is told by (x, y, w, h), weighed:
_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_CLIP = math.log(1000 / 16)  # no box is more than 62.5 times as wide or as high as its anchor


def _centers(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes, each [..., 2], x and y."""
    low, high = boxes.split(2, -1)
    return (low + high) / 2, high - low


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """What the box head should say of boxes [..., 4] at anchors [..., 4]; torchvision's BoxCoder(10, 10, 5, 5)."""
    (center, size), (anchor, extent) = _centers(boxes), _centers(anchors)
    codes = torch.cat([(center - anchor) / extent, (size / extent).log()], -1)
    return codes * codes.new_tensor(_WEIGHTS)


def decode_boxes(codes: Tensor, anchors: Tensor) -> Tensor:
    """The boxes that the box head's codes [..., 4] tell at anchors [..., 4]: the inverse of `encode_boxes`."""
    anchor, extent = _centers(anchors)
    shift, stretch = (codes / codes.new_tensor(_WEIGHTS)).split(2, -1)
    center, size = anchor + shift * extent, extent * stretch.clamp(max=_CLIP).exp()
    return torch.cat([center - size / 2, center + size / 2], -1)


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union, [..., M, N], of boxes [..., M, 4] and [..., N, 4], in float32 at least.

    It is NaN of two boxes without an area.
    """
    boxes1, boxes2 = (_at_least_float32(boxes) for boxes in (boxes1, boxes2))
    # Each coordinate dense: with the four of a box side by side it takes six times as long.
    ax1, ay1, ax2, ay2 = boxes1.movedim(-1, 0).contiguous().unsqueeze(-1)
    bx1, by1, bx2, by2 = boxes2.movedim(-1, 0).contiguous().unsqueeze(-2)
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).clamp_(min=0)
    intersection = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).clamp_(min=0).mul_(width)
    union = ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1)).sub_(intersection)
    return intersection.div_(union)


_PAIRS = 1 << 20  # of which IoUs are computed at a time: a few tensors of 4 MB


@torch.no_grad()
def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression within each class; torchvision.ops.batched_nms in PyTorch.

    Of two equal scores the earlier box comes first. Nothing is rounded to keep classes apart, and a box without an area
    neither suppresses nor is suppressed. The memory that it takes does not grow with the square of M.

    Args:
        boxes: [M, 4], x1, y1, x2, y2.
        scores: [M].
        idxs: [M], the classes, integers.
        iou_threshold: a box goes whose IoU with a better one that stays is larger than this.

    Returns:
        The indices of the boxes that stay, int64, best first.
    """
    order = scores.argsort(descending=True, stable=True)
    keep = torch.ones_like(order, dtype=torch.bool)
    order_by_class = order[idxs[order].argsort(stable=True)]
    counts = idxs[order_by_class].unique_consecutive(return_counts=True)[1]
    ends = counts.cumsum(0)
    counts, largest_first = counts.sort(descending=True)
    starts = ends[largest_first] - counts
    sizes, first = counts.tolist(), 0
    while first < len(sizes) and sizes[first] > 1:  # classes of a similar size are the rows of one tensor
        longest = sizes[first]
        rows = slice(first, first + max(_PAIRS // longest**2, 1))
        column = torch.arange(longest, device=boxes.device)
        valid = column < counts[rows, None]
        members = order_by_class[(starts[rows, None] + column).clamp_(max=len(order) - 1)]
        keep[members[valid]] = _nms_rows(boxes[members], valid, iou_threshold)[valid]
        first = rows.stop
    return order[keep[order]]


def _nms_rows(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes of each row stay, [R, T]; of boxes [R, T, 4], best first, only the valid ones [R, T] count.

    Greedy NMS goes from the best box to the worst. Here a block of them is looked at in turns: after k turns it is
    right what becomes of the first k, as it depends on better boxes alone; so where a turn changes nothing, all is
    right. That takes about as many turns as there are boxes in a chain of which each overlaps the next: few.
    """
    rows, count = valid.shape
    step = max(_PAIRS // (rows * count), 1)
    keep = valid.clone()
    for first in range(0, count, step):
        block = slice(first, first + step)
        overlaps = box_iou(boxes[:, block], boxes[:, : block.stop]) > iou_threshold
        left = valid[:, block] & ~(overlaps[..., :first] & keep[:, None, :first]).any(2)
        overlaps = overlaps[..., first:].tril(-1)
        stay, before = left, None
        while before is None or not torch.equal(stay, before):
            stay, before = left & ~(overlaps & stay.unsqueeze(1)).any(2), stay
        keep[:, block] = stay
    return keep


@cache
def _torchvisions_nms() -> Any:
    """torchvision.ops.batched_nms, compiled; None where there is no torchvision, or one of another torch."""
    try:
        from torchvision.ops import batched_nms
    except (ImportError, RuntimeError, OSError):
        return None
    return batched_nms


@torch.no_grad()
def match_anchors(boxes: Tensor, anchors: Tensor, iou_thresh: float = 0.5) -> Tensor:
    """For each of A anchors which of the boxes [M, 4] it is to find, int64 [A]; -1 is none.

    It is the box of the highest IoU where that is at least iou_thresh, and every box has the anchor of its highest IoU
    whatever that is; where several have the same one, the last (torchvision's SSDMatcher; force_match_for_each_row).
    """
    if len(boxes) == 0:
        return torch.full((len(anchors),), -1, device=anchors.device)
    iou = box_iou(boxes, anchors)
    best, matched = iou.max(0)
    matched = torch.where(best >= iou_thresh, matched, -1)
    # Not matched[...] = ...: which of two writes to one place comes last is not said.
    box = torch.arange(len(iou), device=iou.device)
    own = torch.full_like(matched, -1).scatter_reduce(0, iou.argmax(1), box, "amax")
    return torch.where(own >= 0, own, matched)


class DefaultBoxGenerator:
    """The anchors of six maps, in the order of the heads' outputs: by map, then row, column and shape.

    Args:
        arrangement: "paper": tensorflow/models' multiple_grid_anchor_generator as the paper's authors configure it.
            Three shapes on the first map and six on the others, sizes by the image's shorter side, not clipped.
            "torchvision": its DefaultBoxGenerator([[2, 3]] * 6, 0.2, 0.95). Six shapes on all maps, widths by the
            image's width and heights by its height, at most the image's.

    Raises:
        ValueError: arrangement is neither.
    """

    def __init__(self, arrangement: str = "paper") -> None:
        if arrangement not in ("paper", "torchvision"):
            raise ValueError(f"anchors should be 'paper' or 'torchvision', got {arrangement!r}")
        self.arrangement = arrangement
        self._cache: dict[tuple[object, ...], Tensor] = {}
        self.shapes: list[list[tuple[float, float]]] = []  # of each map (width, height), 1 is the image
        scales = [0.2 + 0.15 * i for i in range(6)] + [1.0]
        for i, (scale, larger) in enumerate(zip(scales, scales[1:], strict=False)):
            between = (math.sqrt(scale * larger), 1.0)
            if arrangement == "torchvision":
                specs = [(scale, 1.0), between, *((scale, ratio) for ratio in (2.0, 1 / 2, 3.0, 1 / 3))]
            elif i == 0:  # reduce_boxes_in_lowest_layer
                specs = [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
            else:
                specs = [*((scale, ratio) for ratio in (1.0, 2.0, 1 / 2, 3.0, 1 / 3)), between]
            self.shapes.append([(size * math.sqrt(ratio), size / math.sqrt(ratio)) for size, ratio in specs])

    def __reduce__(self) -> tuple[object, ...]:
        return DefaultBoxGenerator, (self.arrangement,)

    def num_anchors_per_location(self) -> list[int]:
        """How many shapes there are on each map."""
        return [len(shapes) for shapes in self.shapes]

    def __call__(
        self,
        image_size: tuple[int, int],
        grid_sizes: Sequence[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The anchors [A, 4], x1, y1, x2, y2 in pixels of the image. Do not write to them: they are kept for next time.

        Args:
            image_size: height and width.
            grid_sizes: height and width of each map.
        """
        key = (*image_size, *grid_sizes, dtype, device)
        found = self._cache.get(key)
        if found is None:
            # Tensors of inference mode would be useless to a training step later.
            with torch.inference_mode(False), torch.device("cpu"):
                found = self._make(image_size, grid_sizes).to(device, dtype)
            if type(found) is Tensor:  # not that of an export, which is no tensor outside of it
                if len(self._cache) >= 16:
                    self._cache = {}
                self._cache[key] = found
        return found

    def _make(self, image_size: tuple[int, int], grid_sizes: Sequence[tuple[int, int]]) -> Tensor:
        image = torch.tensor([image_size[1], image_size[0]], dtype=torch.float64)
        parts = []
        for shapes, (rows, columns) in zip(self.shapes, grid_sizes, strict=True):
            size = torch.tensor(shapes, dtype=torch.float64)
            size = size * image.min() if self.arrangement == "paper" else size.clamp(max=1) * image
            y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (rows, columns))
            center = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).unsqueeze(-2) * image
            parts.append(torch.cat([center - size / 2, center + size / 2], -1).view(-1, 4))
        return torch.cat(parts)


# ----------------------------------------------------------------------------------------------------------- network


def _extra_layer(in_channels: int, depth: int, use_depthwise: bool, padding: str) -> nn.Module:
    """Half the size: 1x1 to half the depth, 3x3 of stride 2, each followed by BatchNorm and ReLU6."""
    hidden = depth // 2
    if use_depthwise:
        options = dict(hidden_channels=hidden, activation="relu6", shortcut=False, padding=padding)
        return InvertedResidual(in_channels, depth, 2, 1, **options)
    return nn.Sequential(
        conv_bn_relu6(in_channels, hidden, 1), conv_bn_relu6(hidden, depth, 3, stride=2, padding=padding)
    )


def _predictor(in_channels: int, out_channels: int, use_depthwise: bool) -> nn.Module:
    if use_depthwise:
        return InvertedResidual(in_channels, out_channels, 1, 1, shortcut=False, norm=False)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class SSDLite(nn.Module):
    """SSDLite on MobileNetV2: images -> losses in training, detections in eval mode. Called as torchvision's detectors.

    The paper's 4.3M parameters (4,337,013) and 0.8B multiply-adds are those of the defaults. The first map is the
    expansion of the 14th block (stride 16), the second the last one of MobileNetV2, four extra layers make the others;
    on each stand a class head and a box head. An extra layer is an inverted residual without a shortcut but with a
    last ReLU6, a head one without expansion and norm but with a bias: each runs as one op. In eval mode without
    gradients the whole is 18 op calls.

    Called with:
        images: a list of [3, H, W], of any sizes, or [N, 3, H, W]; floating point, from 0 to 1. They are resized to
            `size` (bilinear), normalised and cast to the dtype of the model.
        targets: in training for each image {"boxes": [M, 4], "labels": int64 [M]}, the boxes x1, y1, x2, y2 in pixels
            of the image as given, the labels from 1 to num_classes - 1; M may be 0.

    Returns:
        In training {"bbox_regression", "classification"}, the two losses; their sum is to be minimised. In eval mode
        for each image {"boxes": [K, 4], "scores": [K], "labels": int64 [K]}, best first, in pixels of the image as
        given; float32, of a float64 model float64.

    Training wants at least two images where a map is a single pixel (at 320x320 the last one is): so does BatchNorm.

    Args:
        num_classes: with the background, which is class 0.
        size: height and width to which images are resized. (torchvision's SSD takes the width first.)
        width_mult: of MobileNetV2; the extra layers' depths scale with it as well, down to 16.
        anchors: "paper" or "torchvision", see DefaultBoxGenerator.
        padding: of MobileNetV2 and the extra layers, see there: "same" is TensorFlow's.
        use_depthwise: False for SSD in place of SSDLite (Table 5 of the paper): the extra layers and heads have dense
            3x3 convolutions, which PyTorch runs.
        score_thresh: detections have a larger score than this.
        nms_thresh: of two detections of a class with a larger IoU than this only the better one stays.
        detections_per_img: how many there are at most.
        topk_candidates: how many of each class non-maximum suppression sees at most.
        iou_thresh: from which IoU on an anchor is to find a box.
        positive_fraction: of the anchors that count in the classification loss, how many have a box.
        image_mean, image_std: of the normalisation, per channel.

    Raises:
        ValueError: there is no class but the background; size, anchors, padding, positive_fraction, image_mean or
            image_std are none of those; in a call, images or targets are not as above. Image and box are named.
        TypeError: in a call, images or boxes are no tensors, or images are integers.
        FloatingPointError: in training a loss is not finite.
    """

    def __init__(
        self,
        num_classes: int = 81,
        *,
        size: tuple[int, int] = (320, 320),
        width_mult: float = 1.0,
        anchors: str = "paper",
        padding: str = "symmetric",
        use_depthwise: bool = True,
        score_thresh: float = 0.001,
        nms_thresh: float = 0.55,
        detections_per_img: int = 300,
        topk_candidates: int = 300,
        iou_thresh: float = 0.5,
        positive_fraction: float = 0.25,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and should be at least 2, got {num_classes}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size should be a height and a width of at least 1, got {size}")
        if not 0 < positive_fraction <= 1:
            raise ValueError(f"positive_fraction should be above 0 and at most 1, got {positive_fraction}")
        if not len(image_mean) == len(image_std) == 3:
            raise ValueError(f"image_mean and image_std should be of 3 channels, got {image_mean} and {image_std}")
        self.num_classes = num_classes
        self.size = (int(size[0]), int(size[1]))
        self.score_thresh, self.nms_thresh = score_thresh, nms_thresh
        self.detections_per_img, self.topk_candidates = detections_per_img, topk_candidates
        self.iou_thresh = iou_thresh
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.neg_to_pos_ratio = (1 - positive_fraction) / positive_fraction
        self.anchor_generator = DefaultBoxGenerator(anchors)

        self.backbone = MobileNetV2(num_classes=0, width_mult=width_mult, padding=padding)
        index = int(FIRST_MAP.partition(".")[0])
        channels = [self.backbone.features[index].conv[0][0].out_channels, self.backbone.num_features]
        self.extra = nn.ModuleList()
        for depth in EXTRA_DEPTHS:
            depth = max(int(depth * width_mult), MIN_DEPTH)
            self.extra.append(_extra_layer(channels[-1], depth, use_depthwise, padding))
            channels.append(depth)
        self.out_channels = tuple(channels)
        self.head = nn.ModuleDict()
        for name, numbers in (("regression_head", 4), ("classification_head", num_classes)):
            anchor_counts = self.anchor_generator.num_anchors_per_location()
            heads = (_predictor(c, n * numbers, use_depthwise) for c, n in zip(channels, anchor_counts, strict=True))
            self.head[name] = nn.ModuleList(heads)
        self.fused = True
        self._init_weights()

    def _init_weights(self) -> None:
        """As both references do, of which torchvision's states eps and momentum; the backbone is MobileNetV2's own."""
        for module in (*self.extra.modules(), *self.head.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.03)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = 1e-3, 0.03

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """The six feature maps of normalised images [N, 3, H, W], any H, W >= 1, finest first.

        They are of `out_channels` channels, and each of half the size of the one before, rounded up; the first of a
        sixteenth.
        """
        last = len(self.backbone.features) - 1
        maps = self.backbone.forward_intermediates(x, [FIRST_MAP, last])
        for layer in self.extra:
            maps.append(layer(maps[-1]))
        return maps

    def forward_head(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Codes of boxes [N, A, 4] and class logits [N, A, num_classes] of the maps, in the order of the anchors."""
        regression, classification = self.head["regression_head"], self.head["classification_head"]
        return _by_anchor(maps, regression, 4), _by_anchor(maps, classification, self.num_classes)

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        sizes = _check_images(images)
        if self.training:
            if not sizes:
                raise ValueError("there is no image to train on")
            targets = self._check_targets(sizes, targets)
        elif not sizes:
            return []
        x = self._batch(images)
        maps = self.forward_maps(x)
        box_regression, cls_logits = map(_at_least_float32, self.forward_head(maps))
        grid_sizes = [(m.shape[2], m.shape[3]) for m in maps]
        anchors = self.anchor_generator(self.size, grid_sizes, box_regression.dtype, box_regression.device)
        if self.training:
            return self.compute_loss(targets, box_regression, cls_logits, anchors)
        return self.postprocess_detections(box_regression, cls_logits, anchors, sizes)

    def _batch(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        if isinstance(images, Tensor):
            x = self._resize(images)
        else:
            x = torch.cat([self._resize(image.unsqueeze(0)) for image in images])
        x = x.to(next(self.parameters()).dtype)
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.image_mean, self.image_std))
        return x.sub(mean).div_(std)

    def _resize(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) == self.size:
            return x
        return F.interpolate(x, size=self.size, mode="bilinear", align_corners=False)

    def _check_targets(
        self, sizes: list[tuple[int, int]], targets: Sequence[dict[str, Tensor]] | None
    ) -> list[dict[str, Tensor]]:
        """The targets with their boxes as they are in images of `size`."""
        if targets is None or len(targets) != len(sizes):
            given = "none" if targets is None else len(targets)
            raise ValueError(f"in training mode targets should be one per image: {len(sizes)} images, targets: {given}")
        checked = []
        for i, (target, original) in enumerate(zip(targets, sizes, strict=True)):
            if missing := {"boxes", "labels"} - target.keys():
                raise ValueError(f"targets should have boxes and labels, that of image {i} has no {min(missing)}")
            boxes, labels = target["boxes"], target["labels"]
            if not isinstance(boxes, Tensor) or not isinstance(labels, Tensor):
                kinds = f"{type(boxes)} and {type(labels)}"
                raise TypeError(f"boxes and labels should be tensors, got {kinds} for image {i}")
            if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                shapes = f"{list(boxes.shape)} and {list(labels.shape)}"
                raise ValueError(f"boxes should be [M, 4] and labels [M], got {shapes} for image {i}")
            if labels.is_floating_point():
                raise ValueError(f"labels should be integers, got {labels.dtype} for image {i}")
            known = (labels >= 1) & (labels < self.num_classes)
            if not known.all():
                at = int((~known).nonzero()[0])
                allowed = f"1 to {self.num_classes - 1}"
                raise ValueError(f"labels should be {allowed}, got {int(labels[at])} for box {at} of image {i}")
            scaled = _scale(boxes, original, self.size)
            sound = (scaled[:, 2:] > scaled[:, :2]).all(1) & scaled.isfinite().all(1)
            if not sound.all():
                at = int((~sound).nonzero()[0])
                wrong = f"{boxes[at].tolist()} for box {at} of image {i}"
                raise ValueError(f"boxes should be finite with x1 < x2 and y1 < y2, got {wrong}")
            checked.append({"boxes": scaled, "labels": labels})
        return checked

    def compute_loss(
        self, targets: Sequence[dict[str, Tensor]], box_regression: Tensor, cls_logits: Tensor, anchors: Tensor
    ) -> dict[str, Tensor]:
        """The losses, each divided by the number of anchors that have a box (torchvision's SSD.compute_loss).

        Smooth L1 of the anchors that have a box. Cross entropy of these and of the worst others in their image, three
        times as many (by default) or all there are; no anchor counts twice, as in torchvision where there are too few.

        Args:
            targets: as of a call, boxes in pixels of the image in which the anchors are.
            box_regression: [N, A, 4].
            cls_logits: [N, A, num_classes].
            anchors: [A, 4].

        Raises:
            FloatingPointError: a loss is not finite.
        """
        classes = torch.zeros(cls_logits.shape[:2], dtype=torch.int64, device=cls_logits.device)
        box_losses = []
        for target, codes, of_image in zip(targets, box_regression, classes, strict=True):
            boxes = target["boxes"].to(anchors)
            matched = match_anchors(boxes, anchors, self.iou_thresh)
            found = matched >= 0
            matched = matched[found]
            of_image[found] = target["labels"].to(classes)[matched]
            expected = encode_boxes(boxes[matched], anchors[found])
            box_losses.append(F.smooth_l1_loss(codes[found], expected, reduction="sum"))
        cls_losses = F.cross_entropy(cls_logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
        positive = classes > 0
        worst_first = cls_losses.detach().masked_fill(positive, -math.inf).argsort(1, descending=True)
        rank = worst_first.argsort(1)
        counts = positive | (rank < self.neg_to_pos_ratio * positive.sum(1, keepdim=True))
        found = positive.sum().clamp(min=1)
        losses = {
            "bbox_regression": torch.stack(box_losses).sum() / found,
            "classification": cls_losses[counts].sum() / found,
        }
        for name, loss in losses.items():
            if not loss.isfinite():
                raise FloatingPointError(f"the {name} loss is {loss.item()}: weights, images or a box are out of range")
        return losses

    def postprocess_detections(
        self, box_regression: Tensor, cls_logits: Tensor, anchors: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The detections, as a call returns them (torchvision's SSD.postprocess_detections).

        Args:
            box_regression: [N, A, 4].
            cls_logits: [N, A, num_classes].
            anchors: [A, 4], in pixels of an image of `size`.
            sizes: height and width of the images as they were given, in pixels of which the boxes are to be.
        """
        height, width = self.size
        limit = anchors.new_tensor([width, height, width, height])
        boxes = decode_boxes(box_regression, anchors).clamp(min=torch.zeros_like(limit), max=limit)
        scores = cls_logits.softmax(-1)[..., 1:]
        detections = []
        for boxes_of_image, scores_of_image, original in zip(boxes, scores, sizes, strict=True):
            anchor, label = self._candidates(scores_of_image).nonzero(as_tuple=True)
            score = scores_of_image[anchor, label]
            best_first = score.argsort(descending=True, stable=True)
            anchor, score, label = anchor[best_first], score[best_first], label[best_first] + 1
            keep = self._nms(boxes_of_image[anchor], score, label)
            found = _scale(boxes_of_image[anchor[keep]], self.size, original)
            detections.append({"boxes": found, "scores": score[keep], "labels": label[keep]})
        return detections

    def _nms(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """The first of those boxes, best first, that non-maximum suppression leaves.

        What becomes of a box depends on better ones alone: most of the time the best candidates give enough.
        """
        nms = _torchvisions_nms() or batched_nms
        count = 4 * self.detections_per_img
        keep = nms(boxes[:count], scores[:count], labels[:count], self.nms_thresh)
        while len(keep) < self.detections_per_img and count < len(boxes):
            count *= 4
            keep = nms(boxes[:count], scores[:count], labels[:count], self.nms_thresh)
        return keep[: self.detections_per_img]

    def _candidates(self, scores: Tensor) -> Tensor:
        """Which scores [A, C] non-maximum suppression sees: those above the threshold, of each class the best."""
        candidates = scores > self.score_thresh
        crowded = (candidates.sum(0) > self.topk_candidates).nonzero()[:, 0]
        if len(crowded):
            best = scores[:, crowded].topk(self.topk_candidates, 0).indices
            candidates[:, crowded] = torch.zeros_like(candidates[:, crowded]).scatter_(0, best, True)
        return candidates

    def _blocks(self) -> Iterator[tuple[str, int, nn.Module]]:
        """The extra layers and heads by name, with the channels that they read."""
        for i, layer in enumerate(self.extra):
            yield f"extra.{i}", self.out_channels[i + 1], layer
        for name, heads in self.head.items():
            for i, head in enumerate(heads):
                yield f"head.{name}.{i}", self.out_channels[i], head

    @property
    def fused(self) -> bool:
        """Whether the network may run fused; False makes it, and its parts, the composition of their modules."""
        return self._fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self._fused = value
        self.backbone.fused = value
        for _, _, block in self._blocks():
            if isinstance(block, InvertedResidual):
                block.fused = value

    def repack(self) -> None:
        """Packs the weights anew at the next call: for a write that PyTorch does not count (`.data`, a NumPy view)."""
        self.backbone.repack()
        for _, _, block in self._blocks():
            if isinstance(block, InvertedResidual):
                block.repack()

    def unfused(self, x: Tensor) -> dict[str, str]:
        """The parts of the network that a call would now run layer by layer, and why; {} when all is fused.

        x is what `forward_maps` takes. As MobileNetV2.unfused.
        """
        if not self.fused:
            return {"": "the attribute `fused` is False"}
        reasons = {f"backbone.{name}".rstrip("."): why for name, why in self.backbone.unfused(x).items()}
        requires_grad = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        for name, channels, block in self._blocks():
            given = x.new_empty(x.shape[0], channels, 1, 1, dtype=network.arithmetic(x).dtype)
            given.requires_grad_(requires_grad or x.requires_grad)
            if not isinstance(block, InvertedResidual):
                reasons[name] = "dense 3x3 convolutions"
            elif reason := block.why_not_fused(given):
                reasons[name] = reason
        return reasons


def _by_anchor(maps: Sequence[Tensor], heads: nn.ModuleList, numbers: int) -> Tensor:
    """[N, A, numbers] from each map's [N, shapes * numbers, H, W]."""
    found = [head(x).permute(0, 2, 3, 1) for x, head in zip(maps, heads, strict=True)]
    return torch.cat([y.reshape(y.shape[0], -1, numbers) for y in found], 1)


def _scale(boxes: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Boxes of an image of one height and width as they are in that image of another."""
    y, x = to[0] / size[0], to[1] / size[1]
    boxes = _at_least_float32(boxes)
    return boxes * boxes.new_tensor([x, y, x, y])


def _check_images(images: Sequence[Tensor] | Tensor) -> list[tuple[int, int]]:
    """The heights and widths of the images."""
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images should be a list of [3, H, W] or [N, 3, H, W], got {list(images.shape)}")
    for i, image in enumerate(images):
        if not isinstance(image, Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, Tensor) else type(image)
            raise TypeError(f"images should be tensors of floating point from 0 to 1, got {kind} for image {i}")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images should be [3, H, W] with pixels, got {list(image.shape)} for image {i}")
    return [(image.shape[1], image.shape[2]) for image in images]
