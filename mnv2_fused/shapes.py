"""Training on generated shapes: SSDLite finds them, DeepLabV3 paints them. What `mnv2-fused shapes` runs.

It is the proof that both learn, on data that need no download; a real data set wants a real recipe.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .datasets import Shapes, Target, collate, normalize, random_flip
from .deeplab import DeepLabV3, segmentation_loss
from .metrics import MeanIoU, Overlap, Precision, mean_average_precision
from .ssdlite import SSDLite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Items = list[tuple[Tensor, Target]]


class Task(NamedTuple):
    """What is trained and how; `target` is the score that it is to reach, mAP at an IoU of 0.5 or mIoU."""

    name: str
    width_mult: float
    size: int
    images: int
    epochs: int
    batch: int
    learning_rate: float
    target: float


TASKS = {
    "detection": Task("detection", 0.5, 128, 3000, 16, 32, 4e-3, 0.80),
    "segmentation": Task("segmentation", 0.35, 160, 2000, 20, 32, 4e-3, 0.85),
}
TEST_IMAGES = 400
MAX_NORM = 10.0  # of all gradients: the first steps of a detector from scratch may be wild


class Step(NamedTuple):
    """A step that has been taken, `done` of `total`, and the loss before it."""

    done: int
    total: int
    loss: float


class Run(NamedTuple):
    """What `train` returns: the loss of every step, the score on the test images, seconds of the steps."""

    losses: list[float]
    score: Precision | Overlap
    seconds: float


def data(task: Task, count: int, split: str, seed: int = 0) -> Items:
    """The first `count` images of a split and their targets, made now."""
    dataset = Shapes(count, task.name, split, size=task.size, seed=seed)
    return [dataset[i] for i in range(count)]


def network(task: Task, seed: int = 0) -> SSDLite | DeepLabV3:
    """A narrow network for the shapes, in training mode; one seed gives the same weights everywhere."""
    classes = len(Shapes(1, task.name).classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if task.name == "detection":
            return SSDLite(classes, size=(task.size, task.size), width_mult=task.width_mult)
        return DeepLabV3(classes, output_stride=8, width_mult=task.width_mult)


def train(
    model: SSDLite | DeepLabV3,
    task: Task,
    items: Items,
    *,
    seed: int = 0,
    progress: Callable[[Step], None] = lambda step: None,
) -> Run:
    """Trains a model in place, fused or not as it is, with AdamW under one cycle, and leaves it in eval mode.

    The score is that on TEST_IMAGES of the test split. Raises ValueError where there are fewer images than a batch, or
    a loss is not finite; ImportError without the package that the score needs.
    """
    per_epoch = len(items) // task.batch
    if per_epoch == 0:
        raise ValueError(f"{len(items)} images do not fill a batch of {task.batch}")
    total = per_epoch * task.epochs
    evaluate(model.eval(), data(task, 1, "test"), task)  # what is not installed shows now, not after minutes
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cycle((step + 0.5) / total))
    rng, losses = np.random.default_rng(seed), []
    model.train()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the dropout
        while len(losses) < total:
            order = rng.permutation(len(items))[: per_epoch * task.batch]
            for chosen in order.reshape(per_epoch, task.batch):
                images, targets = collate([random_flip(*items[i], rng) for i in chosen])
                loss = loss_of(model, images, targets)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise ValueError(f"the loss is {losses[-1]} in step {len(losses)}: a lower learning rate may help")
                progress(Step(len(losses), total, losses[-1]))
    seconds = time.perf_counter() - start
    return Run(losses, evaluate(model.eval(), data(task, TEST_IMAGES, "test"), task), seconds)


def _cycle(place: float, warm_up: float = 0.2) -> float:
    """The learning rate at a place from 0 to 1 in training, by its highest: up in a line, down along a cosine."""
    if place < warm_up:
        return place / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (place - warm_up) / (1 - warm_up))


def loss_of(model: SSDLite | DeepLabV3, images: Tensor, targets: Sequence[Target] | Tensor) -> Tensor:
    """Of a batch uint8 [N, 3, H, W] as `collate` makes it."""
    if isinstance(model, SSDLite):
        return sum(model(images.float() / 255, targets).values())
    return segmentation_loss(model(normalize(images))["out"], targets)


@torch.no_grad()
def predict(model: SSDLite | DeepLabV3, images: Tensor) -> list[dict[str, Tensor]] | Tensor:
    """Detections of each image, or labels [N, H, W]."""
    if isinstance(model, SSDLite):
        return model(images.float() / 255)
    return model(normalize(images))["out"].argmax(1)


def evaluate(model: SSDLite | DeepLabV3, items: Items, task: Task) -> Precision | Overlap:
    """mAP or mIoU over the items, of a model in eval mode."""
    batches = [collate(items[i : i + task.batch]) for i in range(0, len(items), task.batch)]
    if task.name == "detection":
        found = [detections for images, _ in batches for detections in predict(model, images)]
        return mean_average_precision(found, [target for _, target in items])
    overlap = MeanIoU(len(Shapes(1, task.name).classes))
    for images, masks in batches:
        overlap.update(predict(model, images), masks)
    return overlap.compute()


def score_of(run: Run) -> float:
    """What Task.target is to be compared with."""
    return run.score.at_50 if isinstance(run.score, Precision) else run.score.mean


def draw(model: SSDLite | DeepLabV3, run: Run, task: Task, count: int = 8, least: float = 0.3) -> Figure:
    """Test images with what the model makes of them, and the losses."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    items = data(task, count, "test")
    names = Shapes(1, task.name).classes
    found = predict(model, collate(items)[0])
    columns = (count + 1) // 2
    figure = Figure(figsize=(2.6 * columns, 8.2), layout="constrained")
    grid = figure.add_gridspec(3, columns)
    for i, (image, _) in enumerate(items):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.axis("off")
        if task.name == "segmentation":
            shown = np.ma.masked_equal(found[i].numpy(), 0)
            axes.imshow(shown, cmap="tab10", vmin=0, vmax=9, alpha=0.75, interpolation="nearest")
            axes.set_title(", ".join(names[k] for k in found[i].unique().tolist() if k), fontsize=8)
            continue
        for box, label, score in zip(*(found[i][key].tolist() for key in ("boxes", "labels", "scores")), strict=True):
            if score >= least:
                (left, top, right, bottom), color = box, f"C{label}"
                axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color, lw=2))
                axes.text(left, top, f"{names[label]} {score:.2f}", color="white", fontsize=7, backgroundcolor=color)
    axes = figure.add_subplot(grid[2, :])
    axes.semilogy(run.losses, lw=0.8)
    axes.set_xlabel("step")
    axes.set_title(f"loss; {describe(run)}")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def describe(run: Run) -> str:
    score = run.score
    if isinstance(score, Precision):
        return f"mAP@0.5 {score.at_50:.3f}, mAP {score.mean:.3f}"
    return f"mIoU {score.mean:.3f}"
