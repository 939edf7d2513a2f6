"""Training on scikit-learn's handwritten digits: data, a small network, the loop, and measured runs of it.

What `mnv2-fused demo` trains. Nothing here knows whether the blocks run fused: that is the model's attribute `fused`.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .mobilenet_v2 import MobileNetV2
from .tasks import peak_memory, restart_peak

# t, c, n, s as in Table 2 of the paper: the stem and two blocks of stride 2 make 4x4 maps of 32x32 images.
SETTING = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2))
IMAGE_SIZE = 32
EPOCHS = 15
BATCH = 64
# Of 0.005 to 0.05 all train well; the lower, the longer two runs that differ by a rounding stay together.
LEARNING_RATE = 0.02
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARM_UP = 0.25  # the share of the steps in which the learning rate rises
SHIFT = 8  # training images are shifted by up to 1/8 of their side: a pixel of the 8x8 digits

# Training magnifies rounding: two right runs are 1e-7 apart at first, 1e-4 after 10 steps, up to 1e-1 after 50, and
# from then on only alike. How fast that goes depends on the seed and the schedule, so the first steps have a yardstick:
# plain training against itself, from weights changed by one rounding. Between right runs such medians were 0.5e-3 to
# 2.3e-3 with 15 epochs and 0.5e-3 to 4.1e-3 with 12, a factor of 8 apart; smoothed losses, 2.3 at first, up to 0.09.
COMPARED_STEPS = 50
YARDSTICKS = 20
SMOOTHED_STEPS = 20
CURVE_TOLERANCE = 0.2


class Digits(NamedTuple):
    """1347 images to train on, 450 to test with: float32 [N, 1, size, size] from 0 to 1; labels int64 [N], 0 to 9."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Step(NamedTuple):
    """A step that has been taken.

    Attributes:
        done, total: steps so far, with it, and in all.
        epoch: 1 in the first.
        loss: the mean cross-entropy of its batch, before it.
        accuracy: the share of its batch that was right, before it and in training mode: at first the running
            statistics, which eval mode takes, lag far behind the weights.
    """

    done: int
    total: int
    epoch: int
    loss: float
    accuracy: float


Progress = Callable[[Step], None]


class Training(NamedTuple):
    """What `train` returns.

    Attributes:
        losses: Step.loss of each step.
        accuracy: the share of the test images that the network, in eval mode, gets right after the last step.
        seconds: of the steps.
    """

    losses: list[float]
    accuracy: float
    seconds: float


def digits(size: int = IMAGE_SIZE) -> Digits:
    """scikit-learn's 1797 handwritten digits, bilinearly enlarged from 8x8; the split is always the same.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=0)
    images, test_images = (torch.from_numpy(part.astype(np.float32)).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    labels, test_labels = (torch.from_numpy(part.astype(np.int64)) for part in parts[2:])
    images, test_images = (nn.functional.interpolate(x, size=size, mode="bilinear") for x in (images, test_images))
    return Digits(images, labels, test_images, test_labels)


def digits_network(seed: int = 0) -> MobileNetV2:
    """A MobileNetV2 for `digits`, 96 394 parameters, in training mode; one seed gives the same weights everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # No dropout: a network this small is not helped by it.
        return MobileNetV2(num_classes=10, inverted_residual_setting=SETTING, in_channels=1, dropout=0.0)


def train(
    model: MobileNetV2,
    data: Digits,
    epochs: int = EPOCHS,
    *,
    batch: int = BATCH,
    learning_rate: float = LEARNING_RATE,
    steps: int | None = None,
    seed: int = 0,
    progress: Progress = lambda step: None,
) -> Training:
    """Trains `model` in place, fused or not as it is, and leaves it in eval mode.

    SGD with Nesterov momentum under one cycle of the learning rate; batches drawn anew in each epoch, the rest of an
    epoch that fills no batch left out; images shifted at random. With one seed, and as many threads, two calls see
    the same batches, and with the same arithmetic they return the same losses to the bit.

    Args:
        model: of data.images' channels, with a class for each label; float32 on the CPU.
        data: images float32 [N, C, H, W], labels int64 [N], and those to test with.
        epochs: passes through data.images.
        batch: images per step.
        learning_rate: the highest of the cycle.
        steps: end after so many, on the schedule of all epochs; None is all of them.
        seed: of the order, the shifts and the dropout, if the model has any; not of the weights.
        progress: called after each step.

    Raises:
        ValueError: an argument out of range, tensors of other shapes or dtypes, or a loss that is not finite.
    """
    per_epoch = _check(model, data, epochs, batch, learning_rate, steps)
    total = per_epoch * epochs
    last = total if steps is None else min(steps, total)
    optimizer = torch.optim.SGD(
        model.parameters(), learning_rate, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    # Not OneCycleLR, which divides by zero where the warm-up is a single step.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cycle((step + 0.5) / total))
    # Of its own, so that nothing that a model draws changes the batches.
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(losses) < last:
            order = torch.randperm(len(data.images), generator=generator)
            for indices in order.split(batch)[: min(per_epoch, last - len(losses))]:
                images = _shifted(data.images[indices], generator)
                loss, accuracy = _step(model, optimizer, images, data.labels[indices])
                schedule.step()
                losses.append(loss)
                if not math.isfinite(loss):
                    raise ValueError(f"the loss is {loss} in step {len(losses)}: a lower learning_rate may help")
                progress(Step(len(losses), last, (len(losses) - 1) // per_epoch + 1, loss, accuracy))
    seconds = time.perf_counter() - start
    accuracy = (predict(model, data.test_images).argmax(1) == data.test_labels).double().mean().item()
    return Training(losses, accuracy, seconds)


def _check(model: MobileNetV2, data: Digits, epochs: int, batch: int, learning_rate: float, steps: int | None) -> int:
    """Raises ValueError; returns the steps of an epoch."""
    for name, value in (("epochs", epochs), ("batch", batch), ("steps", 1 if steps is None else steps)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate}")
    for images, labels in ((data.images, data.labels), (data.test_images, data.test_labels)):
        if images.dim() != 4 or images.shape[1] != model.in_channels or images.dtype != torch.float32:
            shape = f"[N, {model.in_channels}, H, W]"
            raise ValueError(f"images must be float32 {shape}, got {images.dtype} {list(images.shape)}")
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 [{len(images)}], got {labels.dtype} {list(labels.shape)}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < model.num_classes:
            raise ValueError(f"labels must be 0 to {model.num_classes - 1}, got {labels.min()} to {labels.max()}")
    if batch > len(data.images) or len(data.test_images) == 0:
        counts = f"{len(data.images)} and {len(data.test_images)}"
        raise ValueError(f"a batch of {batch} images to train on and one to test with are needed, got {counts}")
    return len(data.images) // batch


def _step(model: MobileNetV2, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The loss before the step, and the share of the batch that was right."""
    logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), (logits.detach().argmax(1) == labels).double().mean().item()


def _cycle(done: float) -> float:
    """The learning rate's factor when this share of the steps is done: half a cosine up from 0, half a cosine down."""
    phase = done / WARM_UP - 1 if done < WARM_UP else (done - WARM_UP) / (1 - WARM_UP)
    return (1 + math.cos(math.pi * phase)) / 2


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by its own whole numbers of pixels, background (0) coming in."""
    n, _, height, width = images.shape
    reach_y, reach_x = height // SHIFT, width // SHIFT
    padded = nn.functional.pad(images, (reach_x, reach_x, reach_y, reach_y))
    rows = torch.randint(2 * reach_y + 1, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * reach_x + 1, (n, 1), generator=generator) + torch.arange(width)
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return moved.permute(0, 3, 1, 2).contiguous()


def predict(model: MobileNetV2, images: Tensor) -> Tensor:
    """Puts the model into eval mode; the logits [N, num_classes] of images [N, C, H, W]."""
    model.eval()
    with torch.no_grad():
        return model(images)


# ---- Comparing two runs


class Difference(NamedTuple):
    """How far two runs' losses are apart.

    Attributes:
        median, largest: of |a - b| / |b| over the first COMPARED_STEPS steps.
        curve: the largest |a - b| of the whole runs, each averaged over SMOOTHED_STEPS steps.
    """

    median: float
    largest: float
    curve: float


def difference(losses: Sequence[float], others: Sequence[float]) -> Difference:
    """How far `losses` are from `others`, over as many steps as both have."""
    pairs = list(zip(losses, others, strict=False))
    relative = [abs(a - b) / abs(b) for a, b in pairs[:COMPARED_STEPS]]
    a, b = (smoothed(values) for values in zip(*pairs, strict=True))
    return Difference(statistics.median(relative), max(relative), np.abs(a - b).max().item())


def agree(found: Difference, yardstick: Difference) -> bool:
    """Whether losses that are `found` apart may be those of one and the same training.

    Args:
        found: of a run from plain training.
        yardstick: of plain training with `nudge`d weights from the same.

    This notices faults that matter to training: with the gradients of the blocks' parameters, or of their inputs,
    halved, the smoothed losses were 0.25 and 0.34 apart, with those of one depthwise convolution negated 0.41. With all
    of the former 10% short it was 0.05, as between right runs: gradients have tests of their own.
    """
    return found.median <= YARDSTICKS * yardstick.median and found.curve <= CURVE_TOLERANCE


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The averages over SMOOTHED_STEPS steps in a row, or over all where there are fewer."""
    length = min(SMOOTHED_STEPS, len(losses))
    return np.convolve(losses, np.full(length, 1 / length), "valid")


def nudge(model: MobileNetV2, seed: int = 0) -> None:
    """Changes each parameter by about one rounding, a relative 2^-24, up or down.

    Training magnifies rounding: a run with nudged weights shows how far apart two runs may be that are both right.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # float64, since in float32 the factor itself would be rounded to 1
            up = torch.randint(2, parameter.shape, generator=generator).double() * 2 - 1
            parameter.copy_(parameter.double() * (1 + up * 2.0**-24))


# ---- Measured runs


@dataclass(frozen=True)
class Options:
    """One run.

    Attributes:
        fused: the model's attribute.
        nudged: start from weights changed by `nudge`.
        epochs, steps: as in `train`.
        seed: of the weights, the batches and the shifts.
        threads: torch's. With one, the default, the losses do not depend on the number of cores, and a busy machine
            costs little: with more, every small loop waits for a thread that another program has displaced.
    """

    fused: bool = True
    nudged: bool = False
    epochs: int = EPOCHS
    steps: int | None = None
    seed: int = 0
    threads: int = 1


@dataclass
class Run:
    """What a run of `measure` gave.

    Attributes:
        training: see Training.
        memory_mb: what the first step adds to the resident memory of a process that holds model, optimizer and batch,
            in 10^6 bytes; None where it is not told (it is Linux's VmHWM; its noise is a few percent).
        predictions: the class of each test image, by the trained network in eval mode.
        unfused: parts of the network that trained layer by layer, and why; {} means that all trained fused.
        why_not_fused: of the trained network in eval mode; "" means that it has run as one op.
        eval_error: |logits - plain| / |plain| over the test images, plain being the same network with fused = False.
    """

    training: Training
    memory_mb: float | None
    predictions: list[int]
    unfused: dict[str, str]
    why_not_fused: str
    eval_error: float


class TrainingFailed(Exception):
    """Why a process that trained gave no result."""


def measure(options: Options, progress: Progress = lambda step: None) -> Run:
    """Trains `digits_network` on `digits` in a process of its own, where nothing else uses memory or threads.

    Raises:
        TrainingFailed: with the reason.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pool and memory
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, options), daemon=True)
    process.start()
    theirs.close()
    try:
        while True:
            message = pipe.recv()
            if isinstance(message, Run):
                return message
            if isinstance(message, str):
                raise TrainingFailed(message)
            progress(message)
    except EOFError:
        process.join()
        raise TrainingFailed(f"its process ended with exit code {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
        pipe.close()


def _serve(pipe: Connection, options: Options) -> None:
    """The process of `measure`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends us
    try:
        torch.set_num_threads(options.threads)
        pipe.send(_run(options, pipe.send))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _run(options: Options, progress: Progress) -> Run:
    data = digits()
    model = digits_network(options.seed)
    model.fused = options.fused
    if options.nudged:
        nudge(model)
    memory = _memory(model, data)
    unfused = model.train().unfused(data.images[:BATCH])
    training = train(model, data, options.epochs, steps=options.steps, seed=options.seed, progress=progress)
    logits = predict(model, data.test_images)
    with torch.no_grad():
        reason = model.why_not_fused(data.test_images)
    model.fused = False
    plain = predict(model, data.test_images)
    error = ((logits - plain).norm() / plain.norm()).item()
    return Run(training, memory, logits.argmax(1).tolist(), unfused, reason, error)


def _memory(model: MobileNetV2, data: Digits) -> float | None:
    model = copy.deepcopy(model)  # these steps must not count
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=MOMENTUM, nesterov=True)
    images, labels = data.images[:BATCH].clone(), data.labels[:BATCH]
    _step(
        model, optimizer, images[:2].clone(), labels[:2]
    )  # loads the code and makes the optimizer's state, which stay
    before = restart_peak()
    _step(model, optimizer, images, labels)
    return None if before is None else (peak_memory() - before) / 1e6
