"""How good detections and segmentations are: COCO's mean average precision, VOC's mean intersection over union."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .datasets import IGNORED

# 0.50 to 0.95. As multiples of 1/20, since steps of 0.05 would add up to 0.7500000000000002.
COCO_THRESHOLDS = tuple(n / 20 for n in range(10, 20))


class Precision(NamedTuple):
    """What `mean_average_precision` returns, all from 0 to 1; NaN where no class has an object, or for `at_50` and
    `at_75` where that threshold was not asked for.

    Attributes:
        mean: over thresholds and classes, COCO's AP.
        at_50, at_75: over classes, at an IoU of 0.5 and 0.75.
        per_class: over thresholds, by label; of the labels that have an object that is no crowd.
    """

    mean: float
    at_50: float
    at_75: float
    per_class: dict[int, float]


def mean_average_precision(
    predictions: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Tensor]],
    iou_thresholds: Sequence[float] = COCO_THRESHOLDS,
    *,
    max_detections: int = 100,
) -> Precision:
    """COCO's average precision of boxes, 101 points of recall, by faster-coco-eval.

    A class without objects in the targets does not count, however often it was predicted; one whose objects were all
    missed counts 0. A detection in a crowd's box counts neither as right nor as wrong.

    Args:
        predictions: for each image, boxes [n, 4] (x1, y1, x2, y2), scores [n] and integer labels [n], on any device.
        targets: for each image, boxes [n, 4], integer labels [n], and, where there are crowds, iscrowd [n].
        iou_thresholds: in (0, 1].
        max_detections: how many an image and class may have; those of lower scores do not count. COCO has 100.

    Raises:
        ValueError: other lengths or shapes, a missing key, a number that is not finite, or a box with x2 < x1 or
            y2 < y1; the message says which image.
        ImportError: faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise ImportError("mean average precision needs faster-coco-eval: pip install 'mnv2_fused[det]'") from None
    if len(predictions) != len(targets):
        raise ValueError(f"as many predictions as targets are needed, got {len(predictions)} and {len(targets)}")
    thresholds = np.array(iou_thresholds, np.float64)
    if thresholds.ndim != 1 or not len(thresholds) or not ((thresholds > 0) & (thresholds <= 1)).all():
        raise ValueError(f"iou_thresholds must be numbers above 0 and up to 1, got {iou_thresholds}")
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    objects = _annotations(targets, "targets")
    detections = _annotations(predictions, "predictions", "scores")

    labels = sorted({annotation["category_id"] for annotation in objects + detections})
    truth = COCO(
        {
            "images": [{"id": number} for number in range(len(targets))],
            "categories": [{"id": label} for label in labels],
            "annotations": objects,
        }
    )
    evaluation = COCOeval_faster(truth, truth.loadRes(detections), iouType="bbox")
    evaluation.params.iouThrs = thresholds
    evaluation.params.maxDets = [max_detections]
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, math.inf]], ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0].mean(1)  # [thresholds, classes]
    counted = precision[0] >= 0  # -1 where a class has no objects
    precision = precision[:, counted]

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if values.size else math.nan

    return Precision(
        mean(precision),
        mean(precision[np.isclose(thresholds, 0.5)]),
        mean(precision[np.isclose(thresholds, 0.75)]),
        {label: mean(values) for label, values in zip(np.array(labels)[counted].tolist(), precision.T, strict=True)},
    )


def _annotations(images: Sequence[Mapping[str, Tensor]], kind: str, *scores: str) -> list[dict]:
    """Checked, and in COCO's form: ids from 1, since 0 means unmatched there; boxes x, y, width, height."""
    annotations: list[dict] = []
    for number, image in enumerate(images):
        where = f"{kind}[{number}]"
        names = ("boxes", "labels", *(scores or ["iscrowd"] * ("iscrowd" in image)))
        if missing := [name for name in names if name not in image]:
            raise ValueError(f"{where}: no {' and no '.join(missing)}")
        boxes, *columns = (torch.as_tensor(image[name]).detach().cpu() for name in names)
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{where}: boxes must be [n, 4], got {list(boxes.shape)}")
        for name, column in zip(names[1:], columns, strict=True):
            if column.shape != boxes.shape[:1]:
                raise ValueError(
                    f"{where}: {name} must be [{len(boxes)}], as there are boxes, got {list(column.shape)}"
                )
        if columns[0].is_floating_point():
            raise ValueError(f"{where}: labels must be whole numbers, got {columns[0].dtype}")
        if not all(values.isfinite().all() for values in (boxes, *columns)):
            raise ValueError(f"{where}: {' and '.join(names)} must be finite")
        boxes = boxes.double()
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise ValueError(f"{where}: boxes must be x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
        boxes[:, 2:] -= boxes[:, :2]
        others = columns[1].tolist() if len(columns) > 1 else [0] * len(boxes)
        for box, label, other in zip(boxes.tolist(), columns[0].tolist(), others, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "score" if scores else "iscrowd": other if scores else int(other),
                }
            )
    return annotations


class Overlap(NamedTuple):
    """What `MeanIoU.compute` returns.

    Attributes:
        mean: over the classes that occur, from 0 to 1; NaN where none does.
        per_class: the IoU of each label, the background's first; NaN for a class in neither predictions nor targets.
    """

    mean: float
    per_class: list[float]


class MeanIoU:
    """VOC's mean intersection over union: pixels are counted over the whole data set, and each class that occurs in
    targets or predictions has one IoU (the VOC development kit's VOCevalseg).

    The counts are torchmetrics' confusion matrix, which adds up over torch.distributed's processes. Its own
    segmentation.MeanIoU is another quantity, the mean of each image's IoU, and counts ignored pixels.

    Args:
        num_classes: with the background, at least 2.
        ignored: the label in targets of pixels that do not count.

    Raises:
        ImportError: torchmetrics is not installed.
        ValueError: num_classes below 2, or `ignored` one of the labels.
    """

    def __init__(self, num_classes: int, ignored: int = IGNORED) -> None:
        try:
            from torchmetrics.classification import MulticlassConfusionMatrix
        except ImportError:
            raise ImportError("mean IoU needs torchmetrics: pip install 'mnv2_fused[seg]'") from None
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be a whole number of at least 2, got {num_classes!r}")
        if 0 <= ignored < num_classes:
            raise ValueError(f"ignored must be no label, 0 to {num_classes - 1}, got {ignored}")
        self._num_classes, self._ignored = num_classes, ignored
        # Its checks are left off: they miss labels out of range, which it would count as other classes.
        self._matrix = MulticlassConfusionMatrix(num_classes, ignore_index=ignored, validate_args=False)

    def update(self, predictions: Tensor, target: Tensor) -> None:
        """Adds a batch, or an image without the dimension N.

        Args:
            predictions: logits, floating point [N, num_classes, H, W], or labels, integer [N, H, W].
            target: labels, integer [N, H, W], on the same device.

        Raises:
            ValueError: other shapes or dtypes, NaN, or a label out of range at a pixel that counts.
        """
        if target.dim() < 2 or target.is_floating_point():
            raise ValueError(f"target must be integer [N, H, W], got {target.dtype} {list(target.shape)}")
        expected = list(target.shape)
        if predictions.is_floating_point():
            expected.insert(-2, self._num_classes)
        if list(predictions.shape) != expected:
            raise ValueError(
                f"predictions must be logits [N, {self._num_classes}, H, W] or integer labels [N, H, W] of target's "
                f"size {list(target.shape)}, got {predictions.dtype} {list(predictions.shape)}"
            )
        if predictions.is_floating_point():
            if predictions.isnan().any():
                raise ValueError("predictions hold NaN")
            predictions = predictions.argmax(-3)
        for name, labels in (("predictions", predictions), ("target", target)):
            labels = labels[target != self._ignored]
            if len(labels) and not 0 <= labels.min() <= labels.max() < self._num_classes:
                span = f"0 to {self._num_classes - 1}" + f" or {self._ignored}" * (name == "target")
                raise ValueError(f"labels in {name} must be {span}, got {labels.min()} to {labels.max()}")
        self._matrix.to(target.device).update(predictions, target)

    def compute(self) -> Overlap:
        """The result for all batches since the start or `reset`."""
        counts = self._matrix.compute().cpu().double()
        right = counts.diagonal()
        iou = right / (counts.sum(0) + counts.sum(1) - right)
        return Overlap(iou.nanmean().item(), iou.tolist())

    def reset(self) -> None:
        """Forgets all batches."""
        self._matrix.reset()
