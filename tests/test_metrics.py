"""mAP and mIoU: cases small enough to count by hand, COCO's matching written out, and data that holds nothing."""

import math
import sys

import numpy as np
import pytest
import torch

from mnv2_fused.metrics import COCO_THRESHOLDS, MeanIoU, mean_average_precision

NAN = math.nan


@pytest.fixture
def needs_coco_eval():
    pytest.importorskip("faster_coco_eval", reason="mAP needs faster-coco-eval")


@pytest.fixture
def needs_torchmetrics():
    pytest.importorskip("torchmetrics", reason="mIoU needs torchmetrics")


def objects(*rows, crowds=None):
    """A target of rows (x1, y1, x2, y2, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    target = {"boxes": table[:, :4], "labels": table[:, 4].long()}
    return target if crowds is None else target | {"iscrowd": torch.tensor(crowds)}


def detections(*rows):
    """Predictions of rows (x1, y1, x2, y2, label, score)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


A, B = (0, 0, 10, 10), (20, 20, 40, 40)
FAR = (70, 70, 90, 90)
HALF = 51 / 101  # precision 1 up to a recall of 1/2: 51 of COCO's 101 points


# ---- mean average precision


@pytest.mark.usefixtures("needs_coco_eval")
@pytest.mark.parametrize(
    "predicted, truth, expected",
    [
        pytest.param([[(*A, 1, 0.5)]], [[(*A, 1)]], (1, 1, 1, {1: 1}), id="right"),
        pytest.param([[]], [[(*A, 1)]], (0, 0, 0, {1: 0}), id="missed"),
        pytest.param([[(*A, 2, 0.5)]], [[(*A, 1)]], (0, 0, 0, {1: 0}), id="wrong class"),
        pytest.param([[(*A, 1, 0.5)]], [[]], (NAN, NAN, NAN, {}), id="no objects"),
        pytest.param([[]], [[]], (NAN, NAN, NAN, {}), id="nothing"),
        pytest.param([], [], (NAN, NAN, NAN, {}), id="no images"),
        # IoU 0.64 passes at 0.5, 0.55 and 0.6
        pytest.param([[(0, 0, 8, 8, 1, 0.5)]], [[(*A, 1)]], (0.3, 1, 0, {1: 0.3}), id="IoU 0.64"),
        # Precision 1/2 at every recall
        pytest.param([[(*A, 1, 0.5), (*FAR, 1, 0.9)]], [[(*A, 1)]], (0.5, 0.5, 0.5, {1: 0.5}), id="false first"),
        pytest.param([[(*A, 1, 0.9), (*FAR, 1, 0.5)]], [[(*A, 1)]], (1, 1, 1, {1: 1}), id="false last"),
        pytest.param([[(*A, 1, 0.9), (*A, 1, 0.8)]], [[(*A, 1), (*B, 1)]], (HALF, HALF, HALF, {1: HALF}), id="twice"),
        # Right box, wrong image: precision 1/2 up to a recall of 1/2
        pytest.param(
            [[(*A, 1, 0.9)], [(*A, 1, 0.8)]], [[(*B, 1)], [(*A, 1)]], (*[HALF / 2] * 3, {1: HALF / 2}), id="two images"
        ),
        pytest.param([[(*A, 7, 0.9)]], [[(*A, 7), (*B, 3)]], (0.5, 0.5, 0.5, {3: 0, 7: 1}), id="two classes"),
    ],
)  # fmt: skip
def test_mean_average_precision_by_hand(predicted, truth, expected):
    result = mean_average_precision([detections(*rows) for rows in predicted], [objects(*rows) for rows in truth])
    assert result[:3] == pytest.approx(expected[:3], nan_ok=True)
    assert result.per_class == pytest.approx(expected[3])


@pytest.mark.usefixtures("needs_coco_eval")
def test_detections_in_a_crowd_do_not_count():
    predicted = [detections((*A, 1, 0.5), (50, 50, 55, 55, 1, 0.9), (60, 60, 65, 65, 1, 0.8))]
    crowd = (45, 45, 100, 100, 1)
    assert mean_average_precision(predicted, [objects((*A, 1), crowd, crowds=[0, 1])]).mean == pytest.approx(1)
    assert mean_average_precision(predicted, [objects((*A, 1))]).mean == pytest.approx(1 / 3)
    assert math.isnan(mean_average_precision(predicted, [objects(crowd, crowds=[1])]).mean)


@pytest.mark.usefixtures("needs_coco_eval")
def test_thresholds_and_number_of_detections():
    predicted, truth = [detections((0, 0, 8, 8, 1, 0.5), (*FAR, 1, 0.9))], [objects((*A, 1))]
    result = mean_average_precision(predicted, truth, [0.6, 0.7])
    assert result[:3] == pytest.approx((0.25, NAN, NAN), nan_ok=True)
    assert mean_average_precision(predicted, truth, [0.75]).at_75 == 0
    assert mean_average_precision(predicted, truth, [0.5], max_detections=1).at_50 == 0
    assert mean_average_precision(predicted, truth, [0.5], max_detections=2).at_50 == 0.5


def written_out(predictions, targets, thresholds):
    """COCO's evaluation (cocoeval.py of cocodataset/cocoapi), a detection at a time: {label: AP by threshold}."""
    precisions = {}
    for label in {int(label) for target in targets for label in target["labels"][target["iscrowd"] == 0]}:
        rows = []
        for threshold in thresholds:
            matches, total = [], 0
            for predicted, target in zip(predictions, targets, strict=True):
                of_label = target["labels"] == label
                crowds, boxes = target["iscrowd"][of_label].bool().tolist(), target["boxes"][of_label].tolist()
                total += crowds.count(False)
                taken = set()
                chosen = predicted["labels"] == label
                order = predicted["scores"][chosen].argsort(descending=True, stable=True)
                for box, score in zip(
                    predicted["boxes"][chosen][order], predicted["scores"][chosen][order], strict=True
                ):
                    candidates = [
                        (not crowd, overlap, number)
                        for number, (other, crowd) in enumerate(zip(boxes, crowds, strict=True))
                        if number not in taken and (overlap := iou(box.tolist(), other, crowd)) >= threshold
                    ]
                    real, _, number = max(candidates, default=(True, 0, None))
                    if number is not None and real:
                        taken.add(number)
                    if real:
                        matches.append((float(score), number is not None))
            matches.sort(key=lambda match: -match[0])
            right = np.cumsum([match for _, match in matches])
            precision, recall = right / np.arange(1, len(right) + 1), right / total
            rows.append(np.mean([max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)]))
        precisions[label] = rows
    return precisions


def iou(box, other, crowd):
    width, height = (min(box[k + 2], other[k + 2]) - max(box[k], other[k]) for k in (0, 1))
    common = max(width, 0) * max(height, 0)
    area, another = ((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))
    return common / (area if crowd else area + another - common)


@pytest.mark.usefixtures("needs_coco_eval")
@pytest.mark.parametrize("seed", range(4))
def test_mean_average_precision_of_random_boxes(seed):
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(12):
        n = rng.integers(0, 6)
        starts = rng.integers(0, 60, (n, 2))
        boxes = np.concatenate([starts, starts + rng.integers(5, 40, (n, 2))], 1)
        labels = rng.integers(1, 4, n)
        targets.append(objects(*np.column_stack([boxes, labels]).tolist(), crowds=(rng.random(n) < 0.2).astype(int)))
        # each about three times, some of another class, and some boxes at random
        shaken = np.repeat(boxes, 3, 0) + rng.integers(-4, 5, (3 * n, 4))
        shaken[:, 2:] = np.maximum(shaken[:, 2:], shaken[:, :2] + 1)
        relabelled = np.where(rng.random(3 * n) < 0.8, np.repeat(labels, 3), rng.integers(1, 5, 3 * n))
        predictions.append(detections(*np.column_stack([shaken, relabelled, rng.random(3 * n)]).tolist()))
    expected = written_out(predictions, targets, COCO_THRESHOLDS)
    result = mean_average_precision(predictions, targets)
    assert result.per_class == pytest.approx({label: np.mean(rows) for label, rows in expected.items()})
    table = np.array(list(expected.values()))
    assert result[:3] == pytest.approx((table.mean(), table[:, 0].mean(), table[:, 5].mean()))
    assert 0.1 < result.mean < 0.9, "the case does not try anything"


@pytest.mark.usefixtures("needs_coco_eval")
@pytest.mark.parametrize(
    "predicted, target, message",
    [
        ({}, {}, r"predictions\[0\]: no boxes and no labels and no scores"),
        ({"scores": None}, {}, r"no boxes"),
        ({"boxes": torch.zeros(4)}, {}, r"predictions\[0\]: boxes must be \[n, 4\], got \[4\]"),
        ({"labels": torch.ones(2, dtype=torch.int64)}, {}, r"labels must be \[1\], as there are boxes, got \[2\]"),
        ({"labels": torch.ones(1)}, {}, r"labels must be whole numbers, got torch.float32"),
        ({"scores": torch.tensor([NAN])}, {}, r"must be finite"),
        ({"boxes": torch.tensor([[0, 0, math.inf, 1]])}, {}, r"must be finite"),
        ({"boxes": torch.tensor([[5.0, 0, 4, 1]])}, {}, r"x1 <= x2"),
        (None, {"boxes": torch.zeros(1, 5)}, r"targets\[0\]: boxes must be \[n, 4\]"),
        (None, {"iscrowd": torch.zeros(2)}, r"targets\[0\]: iscrowd must be \[1\]"),
    ],
)
def test_what_is_wrong_with_boxes_is_named(predicted, target, message):
    predicted = predicted if predicted in ({}, {"scores": None}) else detections((*A, 1, 0.5)) | (predicted or {})
    with pytest.raises(ValueError, match=message):
        mean_average_precision([predicted], [objects((*A, 1)) | target])


@pytest.mark.usefixtures("needs_coco_eval")
def test_wrong_arguments_of_mean_average_precision():
    with pytest.raises(ValueError, match="got 1 and 0"):
        mean_average_precision([detections()], [])
    for thresholds in ([], [0.0], [1.5], 0.5):
        with pytest.raises(ValueError, match="iou_thresholds must be numbers above 0 and up to 1"):
            mean_average_precision([], [], thresholds)
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        mean_average_precision([], [], max_detections=0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ImportError, match=r"pip install 'mnv2_fused\[det\]'"):
        mean_average_precision([], [])
    with pytest.raises(ImportError, match=r"pip install 'mnv2_fused\[seg\]'"):
        MeanIoU(2)


# ---- mean intersection over union


@pytest.mark.usefixtures("needs_torchmetrics")
def test_mean_iou_by_hand():
    metric = MeanIoU(4)
    metric.update(torch.tensor([[[0, 0, 1], [2, 1, 1]]]), torch.tensor([[[0, 1, 1], [255, 1, 0]]]))
    # class 0: 1 of 3; class 1: 2 of 4; the prediction of class 2 lies where it does not count; 3 never occurs
    result = metric.compute()
    assert result.per_class == pytest.approx([1 / 3, 2 / 4, NAN, NAN], nan_ok=True)
    assert result.mean == pytest.approx((1 / 3 + 2 / 4) / 2)


@pytest.mark.usefixtures("needs_torchmetrics")
def test_mean_iou_counts_pixels_of_all_batches():
    """Not a mean of means: a large and a small batch, one with a class that the other lacks."""
    rng = np.random.default_rng(0)
    metric = MeanIoU(5)
    intersection, union = np.zeros(5), np.zeros(5)
    for size, classes in ((40, 4), (3, 5)):
        predicted, target = rng.integers(0, classes, (2, 2, size, size))
        target[rng.random(target.shape) < 0.2] = 255
        metric.update(torch.from_numpy(predicted), torch.from_numpy(target))
        for label in range(5):
            counts = target != 255
            intersection[label] += ((predicted == label) & (target == label) & counts).sum()
            union[label] += (((predicted == label) | (target == label)) & counts).sum()
    result = metric.compute()
    assert result.per_class == pytest.approx(intersection / union)
    assert result.mean == pytest.approx((intersection / union).mean())
    metric.reset()
    metric.update(torch.zeros(2, 2).long(), torch.zeros(2, 2).long())
    assert metric.compute().mean == 1


@pytest.mark.usefixtures("needs_torchmetrics")
@pytest.mark.parametrize("leading", [(), (2,)])
def test_logits_count_as_their_argmax(leading):
    logits = torch.randn(*leading, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    target = torch.randint(3, (*leading, 5, 7), generator=torch.Generator().manual_seed(1))
    metric, other = MeanIoU(3), MeanIoU(3)
    metric.update(logits, target)
    other.update(logits.argmax(-3), target)
    assert metric.compute() == other.compute()
    assert 0 < metric.compute().mean < 1


@pytest.mark.usefixtures("needs_torchmetrics")
def test_only_ignored_pixels():
    metric = MeanIoU(2)
    metric.update(torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), 255))
    result = metric.compute()
    assert math.isnan(result.mean) and all(map(math.isnan, result.per_class))


@pytest.mark.usefixtures("needs_torchmetrics")
@pytest.mark.parametrize(
    "predictions, target, message",
    [
        (torch.zeros(1, 2, 2), torch.zeros(1, 2, 2).long(), r"predictions must be logits \[N, 3, H, W\]"),
        (torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2).long(), r"size \[1, 2, 2\], got torch.float32 \[1, 4, 2, 2\]"),
        (torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 2).long(), r"got torch.int64 \[1, 2, 3\]"),
        (torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2), r"target must be integer \[N, H, W\], got torch.float32"),
        (torch.full((1, 2, 2), 3), torch.zeros(1, 2, 2).long(), r"labels in predictions must be 0 to 2, got 3 to 3"),
        (torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), -1), r"target must be 0 to 2 or 255, got -1 to -1"),
        (torch.full((1, 3, 2, 2), NAN), torch.zeros(1, 2, 2).long(), r"predictions hold NaN"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_labels_is_named(predictions, target, message):
    with pytest.raises(ValueError, match=message):
        MeanIoU(3).update(predictions, target)


@pytest.mark.usefixtures("needs_torchmetrics")
def test_wrong_arguments_of_mean_iou():
    with pytest.raises(ValueError, match="num_classes must be a whole number of at least 2, got 1"):
        MeanIoU(1)
    with pytest.raises(ValueError, match="ignored must be no label, 0 to 20, got 0"):
        MeanIoU(21, ignored=0)
