"""The command demo: a network trained on handwritten digits, or two photographs classified; checked, timed, drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import TimeRemainingColumn
from rich.table import Table

from . import _C, benchmark, digits, images
from .cli_pictures import load_classifier, most_probable, read_labels
from .terminal import check_kernel, check_plot, fail, note, out, printable, progress, write
from .weights import random_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .mobilenet_v2 import MobileNetV2

FUSED_COLOR, OTHER_COLOR = "tab:green", "tab:gray"


class Subject(str, Enum):
    digits = "digits"
    photographs = "photographs"


def demo(
    subject: Annotated[Subject, typer.Argument(help="What to show.")] = Subject.digits,
    plot: Annotated[Path, typer.Option(metavar="FILE", help="Where the plot goes: .png, .svg or .pdf.")] = Path(
        "demo.png"
    ),
    compare: Annotated[
        bool, typer.Option("--compare", help="Train with plain PyTorch layers too.", rich_help_panel="digits")
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, show_default=str(digits.EPOCHS), help="Passes through the data.", rich_help_panel="digits"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, show_default="0", help="Of weights, batches and shifts.", rich_help_panel="digits"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="1, which gives the same losses whatever the number of cores",
            help="To train with.",
            rich_help_panel="digits",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="random|torchvision|FILE",
            show_default="random",
            help="Random ones need no network; the classes then mean nothing, the agreement and the times do.",
            rich_help_panel="photographs",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Class names, one per line; without it classes are numbers.",
            rich_help_panel="photographs",
        ),
    ] = None,
) -> None:
    """Train a small network on handwritten digits, or classify two photographs; check it, time it, draw a plot.

    **digits**: trains from scratch, then tests the trained network as one fused op. With --compare the same from the
    same seed with plain PyTorch layers, to see that the losses agree. The exit status is 1 when they do not, or when
    the test accuracy is below 97%.

    **photographs**: classifies fused and with plain PyTorch, shows that both agree, times both.

    Each takes less than a minute, --compare about twice as long. The digits and the photographs are real data that
    come with scikit-learn: pip install 'mnv2-fused[demo]'.
    """
    training = {"--compare": compare or None, "--epochs": epochs, "--seed": seed, "--threads": threads}
    others = training if subject is Subject.photographs else {"--weights": weights, "--labels": labels}
    if unfit := [option for option, value in others.items() if value is not None]:
        fail(f"{', '.join(unfit)}: not for the demo of {subject.value}")
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        fail("the demo needs scikit-learn: pip install 'mnv2-fused[demo]'")
    check_plot(plot)
    check_kernel()
    if subject is Subject.photographs:
        _demo_photographs(plot, weights or "random", labels)
    else:
        given = {"epochs": epochs, "seed": seed, "threads": threads}
        _demo_digits(
            plot, compare, digits.Options(**{name: value for name, value in given.items() if value is not None})
        )


# ---- demo digits

MIN_ACCURACY = 0.97

Runs = dict[str, digits.Run]  # by way: "fused", and "plain PyTorch" where it was asked for


def _demo_digits(plot: Path, compare: bool, options: digits.Options) -> None:
    data = digits.digits()
    ways = {"fused": options}
    if compare:
        ways["plain PyTorch"] = replace(options, fused=False)
        ways["yardstick"] = replace(options, fused=False, nudged=True, steps=digits.COMPARED_STEPS)
    runs = _train(ways)
    yardstick = runs.pop("yardstick", None)
    out.print(_runs_table(runs, options, data))

    fused = runs["fused"]
    right = sum(map(int.__eq__, fused.predictions, data.test_labels.tolist()))
    ran = f"not one op ({fused.why_not_fused})" if fused.why_not_fused else "one op"
    out.print(
        f"In eval mode the network that was trained fused runs as {ran}: {right} of {len(data.test_labels)} test "
        f"digits right, its logits within {fused.eval_error:.1e} (relative norm) of those of plain layers."
    )
    problems = [
        f"the test accuracy of {way} is {run.training.accuracy:.1%}, below {MIN_ACCURACY:.0%}"
        for way, run in runs.items()
        if run.training.accuracy < MIN_ACCURACY
    ]
    problems += [f"{name or 'the network'} trained layer by layer: {why}" for name, why in fused.unfused.items()]
    if fused.why_not_fused or not fused.eval_error <= TOLERANCE:
        problems.append("the trained network did not run as one op with the logits of plain layers")
    if yardstick:
        agree, verdict = _agreement(runs, yardstick)
        out.print(verdict)
        if not agree:
            problems.append("the losses of fused and plain training disagree")
    title = f"MobileNetV2 trained on handwritten digits, seed {options.seed}, {_C.cpu_name()}"
    write(plot, lambda: _draw_training(runs, data, title).savefig(plot, dpi=120))
    if problems:
        fail("; ".join(problems), status=1)


def _train(ways: dict[str, digits.Options]) -> Runs:
    """One run after the other, so that none takes time from another."""
    runs = {}
    with progress("starting", len(ways), TimeRemainingColumn()) as show:
        for i, (way, options) in enumerate(ways.items()):

            def shown(step: digits.Step, i: int = i, way: str = way) -> None:
                where = f"{way}: epoch {step.epoch}, step {step.done}/{step.total}"
                show(i + step.done / step.total, f"{where}, loss {step.loss:.3f}, accuracy {step.accuracy:.0%}")

            try:
                runs[way] = digits.measure(options, shown)
            except digits.TrainingFailed as error:
                fail(f"training ({way}) failed: {error}", status=1)
    return runs


def _runs_table(runs: Runs, options: digits.Options, data: digits.Digits) -> Table:
    steps = len(runs["fused"].training.losses)
    parameters = sum(parameter.numel() for parameter in digits.digits_network().parameters())
    threads = "1 thread" if options.threads == 1 else f"{options.threads} threads"
    table = Table(
        title=f"MobileNetV2 of {parameters:,} parameters, float32, {steps} steps of {digits.BATCH} images, "
        f"seed {options.seed}, {threads}",
        caption=f"scikit-learn's handwritten digits: {len(data.images)} to train on, {len(data.test_images)} others to "
        "test with. Memory: what the first step adds to model, optimizer and batch.",
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("trained")
    for heading in ("test accuracy", f"loss, last {digits.SMOOTHED_STEPS} steps", "seconds", "ms / step", "memory MB"):
        table.add_column(heading, justify="right")
    for way, run in runs.items():
        losses, accuracy, seconds = run.training
        cells = [
            f"{accuracy:.2%}",
            f"{digits.smoothed(losses)[-1]:.3f}",
            f"{seconds:.1f}",
            f"{1e3 * seconds / steps:.1f}",
        ]
        cells.append("" if run.memory_mb is None else f"{run.memory_mb:.0f}")
        table.add_row(way, *cells, style="green" if way == "fused" else None)
    return table


def _agreement(runs: Runs, yardstick: digits.Run) -> tuple[bool, str]:
    plain = runs["plain PyTorch"].training.losses
    found = digits.difference(runs["fused"].training.losses, plain)
    usual = digits.difference(yardstick.training.losses, plain)
    agree = digits.agree(found, usual)
    steps = min(digits.COMPARED_STEPS, len(plain))
    return agree, (
        f"The losses of fused and plain training {'agree' if agree else 'DISAGREE'}: over the first {steps} steps they "
        f"differ by at most {found.largest:.1e}, in the median by {found.median:.1e} (relative); two plain runs "
        f"by {usual.largest:.1e} and {usual.median:.1e} when one starts from weights changed by one rounding. "
        f"Averages over {digits.SMOOTHED_STEPS} steps differ by at most {found.curve:.3f}."
    )


def _draw_training(runs: Runs, data: digits.Digits, title: str) -> Figure:
    """The losses, test digits with what the fused network takes them for (mistakes first), bars of time and memory."""
    from matplotlib.figure import Figure

    colors = {way: FUSED_COLOR if way == "fused" else OTHER_COLOR for way in runs}
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
    axes = figure.add_subplot(grid[0, 0])
    for way, run in reversed(runs.items()):  # fused on top
        losses = run.training.losses
        smooth = digits.smoothed(losses)
        first = (len(losses) - len(smooth)) / 2 + 1  # an average stands at the middle of its steps
        axes.semilogy(np.arange(1, len(losses) + 1), losses, color=colors[way], alpha=0.3, linewidth=1)
        label = f"{way}, test accuracy {run.training.accuracy:.1%}"
        style = "-" if way == "fused" else "--"
        axes.semilogy(first + np.arange(len(smooth)), smooth, style, color=colors[way], linewidth=2, label=label)
    axes.set(title=f"loss by step, thick: averages over {digits.SMOOTHED_STEPS}", xlabel="step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)

    predictions, labels = runs["fused"].predictions, data.test_labels.tolist()
    wrong = [predicted != label for predicted, label in zip(predictions, labels, strict=True)]
    shown = sorted(range(len(labels)), key=lambda i: not wrong[i])[:48]
    tiles = grid[:, 1].subgridspec(8, 6)
    for place, i in enumerate(shown):
        axes = figure.add_subplot(tiles[place // 6, place % 6])
        axes.imshow(data.test_images[i, 0].numpy(), cmap="gray_r")
        text = f"{predictions[i]}, not {labels[i]}" if wrong[i] else f"{predictions[i]}"
        axes.set_title(text, color="tab:red" if wrong[i] else "black", fontsize=9, pad=2)
        axes.axis("off")

    bars = grid[1, 0].subgridspec(2, 1)
    seconds = {way: run.training.seconds for way, run in runs.items()}
    memory = {way: run.memory_mb for way, run in runs.items() if run.memory_mb is not None}
    _bars(figure.add_subplot(bars[0]), seconds, "seconds of training")
    _bars(figure.add_subplot(bars[1]), memory, "memory that the first step adds, MB")
    figure.suptitle(f"{title}: {sum(wrong)} of {len(wrong)} test digits mistaken")
    return figure


# ---- demo photographs

# Relative norm. A float32 run of the 53 layers is about 1e-5 from exact; centred logits cancel, which magnifies it.
TOLERANCE = 1e-4

DEMO_SECONDS = 6.0

Answers = dict[str, dict[str, dict[int, float]]]  # photograph -> "fused" or "PyTorch" -> class -> probability


def _demo_photographs(plot: Path, weights: str, labels: Path | None) -> None:
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    files = [Path(name).name for name in samples.filenames]
    photos = dict(zip(files, map(Image.fromarray, samples.images), strict=True))
    if weights == "random":
        note(
            "Random weights, as trained ones are a download (--weights torchvision): the classes mean nothing, "
            "but fused and plain PyTorch must find the same ones."
        )
        model = random_model(_crops(photos.values()))
    else:
        model = load_classifier(weights)
    names = read_labels(labels, model.num_classes) if labels else None
    inputs = torch.from_numpy(
        np.stack([images.preprocess(photo, 232, 224, model.image_mean, model.image_std) for photo in photos.values()])
    )

    answers, agree, verdict = _compare(model, inputs, list(photos))
    out.print(_answers_table(answers, names))
    out.print(verdict + "\n")
    options = benchmark.Options(
        width=model.config["width_mult"],
        runners=("fused", "eager", "eager channels_last"),
        seconds=DEMO_SECONDS,
    )
    with progress("timing", 1.0) as show:
        result = benchmark.run(options, model, inputs[:1], show)
    out.print(result.table())
    title = f"{result.title}, {_C.cpu_name()}, weights: {printable(weights, 60)}"
    write(plot, lambda: _draw(photos, answers, names, result, title).savefig(plot, dpi=120))
    if not agree or any(row.error for row in result.rows):
        fail("fused and plain PyTorch disagree, or one of them failed", status=1)


def _compare(model: MobileNetV2, inputs: torch.Tensor, photos: list[str]) -> tuple[Answers, bool, str]:
    """The top 5 of the fused network and of the same modules in plain PyTorch, whether they agree, and by how much."""
    plain = copy.deepcopy(model)
    plain.fused = False
    with torch.inference_mode():
        logits = {"fused": model(inputs), "PyTorch": plain(inputs)}
        exact = plain.double()(inputs.double())
    if not all(values.isfinite().all() for values in (*logits.values(), exact)):
        fail("the network's output is not finite: the weights do not fit such pictures")
    topk = min(5, model.num_classes)
    answers = {
        photo: {way: dict(most_probable(values[i], topk)) for way, values in logits.items()}
        for i, photo in enumerate(photos)
    }
    fused, plain_logits = logits.values()
    distance = _distance(fused, plain_logits)
    agree = distance <= TOLERANCE and all(list(ways["fused"]) == list(ways["PyTorch"]) for ways in answers.values())
    verdict = (
        f"Fused and plain PyTorch {'agree' if agree else 'DISAGREE'}: the logits, up to {exact.abs().max():.1f}, "
        f"differ by at most {(fused - plain_logits).abs().max():.1e}, in relative norm by {distance:.1e}. "
        f"From a float64 run fused is {_distance(fused, exact):.1e} away, PyTorch {_distance(plain_logits, exact):.1e}."
    )
    return answers, agree, verdict


def _crops(photos: Iterable[Image.Image], count: int = 4) -> torch.Tensor:
    rng = np.random.default_rng(0)
    pixels = []
    for photo in photos:
        for side in rng.integers(min(photo.size) // 2, min(photo.size), count):
            left, top = rng.integers(photo.width - side), rng.integers(photo.height - side)
            pixels.append(images.preprocess(photo.crop((left, top, left + side, top + side))))
    return torch.from_numpy(np.stack(pixels))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _class_name(index: int, names: list[str] | None) -> str:
    return printable(names[index], 40) if names else f"class {index}"


def _answers_table(answers: Answers, names: list[str] | None) -> Table:
    table = Table()
    table.add_column("photograph", style="bold")
    for way in next(iter(answers.values())):
        table.add_column(f"{way}, top 5")
        table.add_column("", justify="right")
    for photo, ways in answers.items():
        for rank, tops in enumerate(zip(*(ways[way].items() for way in ways), strict=True)):
            cells = [text for index, probability in tops for text in (_class_name(index, names), f"{probability:.2%}")]
            table.add_row(photo if rank == 0 else "", *cells, end_section=rank + 1 == len(ways["fused"]))
    return table


def _draw(
    photos: dict[str, Image.Image], answers: Answers, names: list[str] | None, result: benchmark.Result, title: str
) -> Figure:
    """A row for each photograph with the top 5 of both; beside them the times and the memory."""
    from matplotlib.figure import Figure

    def literal(text: str) -> str:  # matplotlib takes what stands between dollars for TeX
        return text.replace("$", r"\$")

    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1.15))
    for i, (name, photo) in enumerate(photos.items()):
        axes = figure.add_subplot(grid[i, 0])
        axes.imshow(photo)
        axes.set_title(name)
        axes.axis("off")
        axes = figure.add_subplot(grid[i, 1])
        ranks = np.arange(len(answers[name]["fused"]))
        for way, offset, color in (("fused", -0.2, FUSED_COLOR), ("PyTorch", 0.2, OTHER_COLOR)):
            percent = [100 * probability for probability in answers[name][way].values()]
            axes.barh(ranks + offset, percent, height=0.4, color=color, label=way)
        axes.set_yticks(ranks, [literal(_class_name(index, names)) for index in answers[name]["fused"]])
        axes.invert_yaxis()
        axes.set_title("top 5, probability in %")
        axes.spines[["top", "right"]].set_visible(False)
        if i == 0:
            axes.legend(loc="lower right", frameon=False)
    times = {row.name: row.ms for row in result.rows if row.ms is not None}
    memory = {row.name: row.memory_mb for row in result.rows if row.memory_mb is not None}
    _bars(figure.add_subplot(grid[0, 2]), times, "ms per image, batch 1 (median)")
    _bars(figure.add_subplot(grid[1, 2]), memory, "memory beyond the model and its input, MB")
    figure.suptitle(literal(title))
    return figure


def _bars(axes: Axes, values: dict[str, float], title: str) -> None:
    colors = [FUSED_COLOR if name == "fused" else OTHER_COLOR for name in values]
    bars = axes.barh(list(values), list(values.values()), color=colors)
    axes.bar_label(bars, [f"{value:.1f}" for value in values.values()], padding=4)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
