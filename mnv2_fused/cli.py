"""The command `mnv2-fused`: info, bench, tables, ablate, shapes, classify, detect, segment, demo.

Results go to stdout, remarks and errors to stderr.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import safetensors.torch
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import mnv2_fused

from . import _C, ablations, annotate, benchmark, digits, images
from . import shapes as shape_tasks
from . import tables as paper
from .tasks import NETWORKS
from .weights import (
    TORCHVISION_URL,
    WeightsError,
    infer_architecture,
    load_detector,
    load_model,
    load_segmenter,
    random_model,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .mobilenet_v2 import MobileNetV2

app = typer.Typer(
    help="MobileNetV2 on the CPU as one fused PyTorch op: is it right, how fast is it, what is on these pictures?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich", the default, would swallow the [demo] in an install command
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Without markup and emoji: labels and paths may hold [brackets] and :colons:.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

MAX_LABEL_BYTES = 16 << 20
PIPE_WIDTH = 132  # columns where stdout is no terminal; rich would take 80 and fold the tables

Answers = dict[str, dict[str, dict[int, float]]]  # photograph -> "fused" or "PyTorch" -> class -> probability


def _printable(text: object, limit: int = 1000) -> str:
    # Names and messages come from other people's files: an escape sequence in them must not reach the terminal.
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return text if len(text) <= limit else text[:limit] + "..."


def _fail(message: object, status: int = 2) -> NoReturn:
    err.print(Text.assemble(("error: ", "bold red"), _printable(message)), soft_wrap=True)
    raise typer.Exit(status)


def _note(message: object) -> None:
    err.print(Text(_printable(message)), soft_wrap=True)


@contextmanager
def _progress(description: str, total: float | None, *columns: Any) -> Iterator[Callable[[float, str | None], None]]:
    """Yields show(done, description=None); the bar is on stderr, and only where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn())
    # redirect_stdout would send results to stderr while the bar is up.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal, redirect_stdout=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, description=None: bar.update(task, completed=done, description=description)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mnv2-fused {mnv2_fused.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal's encoding cannot
    if not out.is_terminal:
        out.width = PIPE_WIDTH


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


# ---- info


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Versions, CPU features, the kernels and which of them runs, threads, how it was built.

    The environment variable MNV2_FUSED_KERNEL forces a kernel; when it names one that cannot run, the exit status is 1.
    """
    report = _info()
    if as_json:
        _print_json(report)
    else:
        out.print(_info_tables(report))
    if not any(report["selected"].values()):
        _fail(next(iter(report["errors"].values())), status=1)


def _info() -> dict[str, Any]:
    kernels = mnv2_fused.kernels()
    selected: dict[str, str | None] = {}
    errors: dict[str, str] = {}
    for dtype in dict.fromkeys(kernel.dtype for kernel in kernels):
        name = str(dtype).removeprefix("torch.")
        try:
            selected[name] = mnv2_fused.selected_kernel(dtype)
        except ValueError as error:  # MNV2_FUSED_KERNEL names a row that is unknown, unsupported or of another dtype
            selected[name] = None
            errors[name] = str(error)
    return {
        "versions": {
            "mnv2_fused": mnv2_fused.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "cpu": {"name": _C.cpu_name(), "features": _C.cpu_features()},
        "cuda": {
            "compiled": [f"sm_{arch}" for arch in _C.build_report()["cuda"].split(";") if arch],
            "device": "" if mnv2_fused.ops.why_no_cuda() else torch.cuda.get_device_name(),
            "unusable": mnv2_fused.ops.why_no_cuda(),
        },
        "threads": torch.get_num_threads(),
        "kernels": [
            {
                "name": kernel.name,
                "dtype": str(kernel.dtype).removeprefix("torch."),
                "requires": list(kernel.requires),
                "supported": kernel.supported,
                "reason": kernel.reason,
            }
            for kernel in kernels
        ],
        "override": os.environ.get("MNV2_FUSED_KERNEL") or None,
        "selected": selected,
        "errors": errors,
        "build": _C.build_report(),
    }


def _info_tables(report: dict[str, Any]) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, version in report["versions"].items():
        facts.add_row(name, version)
    features = report["cpu"]["features"]
    facts.add_row("CPU", report["cpu"]["name"])
    facts.add_row("features", " ".join(name for name, present in features.items() if present) or "none")
    if absent := [name for name, present in features.items() if not present]:
        facts.add_row("absent", " ".join(absent))
    cuda = report["cuda"]
    compiled = f"kernels for {', '.join(cuda['compiled'])} and PTX; " if cuda["compiled"] else ""
    facts.add_row("CUDA", Text(compiled + (cuda["device"] or f"not usable: {cuda['unusable']}")))
    facts.add_row("threads", str(report["threads"]))
    if report["override"]:
        facts.add_row("forced", f"MNV2_FUSED_KERNEL={_printable(report['override'])}")
    for name in ("compiler", "flags", "torch"):
        facts.add_row(f"built: {name}", Text(report["build"][name]))

    kernels = Table(title="Kernels, best first", title_justify="left", title_style="bold")
    for heading in ("kernel", "dtype", "requires", "supported", "in use"):
        kernels.add_column(heading)
    for row in report["kernels"]:
        in_use = row["name"] == report["selected"][row["dtype"]]
        supported = "yes" if row["supported"] else Text(f"no: {row['reason']}")
        requires = " ".join(row["requires"]) or "nothing"
        kernels.add_row(row["name"], row["dtype"], requires, supported, "yes" if in_use else "", style="green" * in_use)

    page = Table.grid(padding=(1, 0))
    page.add_row(facts)
    page.add_row(kernels)
    return page


# ---- bench


@app.command()
def bench(
    batch: Annotated[
        int | None, typer.Option(min=1, show_default="1; with --train 32", help="Images per call, or step.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default="torch's", help="Threads of each runner.")] = None,
    network: Annotated[
        str, typer.Option(metavar="NAME", help=f"Which network: {', '.join(NETWORKS)}.")
    ] = "mobilenet_v2",
    width: Annotated[float, typer.Option(min=0.05, max=10, help="Width multiplier of the network.")] = 1.0,
    resolution: Annotated[
        int | None, typer.Option(min=1, show_default="the network's own", help="Height and width of the images.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="the best", help="Kernel to run, as info lists them.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also onnxruntime, openvino, ai-edge-litert, ncnn, if installed.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="A step of training instead: its time, and the memory that it adds.")
    ] = False,
    runner: Annotated[
        list[str] | None, typer.Option(metavar="NAME", show_default="all", help="Only this one; may be repeated.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time to measure; start-up and verification come on top.")] = 20,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the times: .png, .svg or .pdf.")] = None,
) -> None:
    """Time the fused network against PyTorch eager, channels_last and torch.compile; --peers adds other runtimes.

    All runners have the same weights. First the outputs are verified, then all are timed in alternation. With --train
    that is a step of training (forward, cross entropy, backward, SGD with momentum), verified by loss, gradients and
    running statistics, and compared with checkpointing too. The exit status is 1 when a runner failed or its results
    were wrong.
    """
    if train and peers:
        _fail("--train and --peers exclude each other: the other runtimes do inference only")
    if plot:
        _check_plot(plot)
    try:
        options = benchmark.Options(
            batch=batch or (32 if train else 1),
            threads=threads,
            network=network,
            width=width,
            resolution=resolution,
            kernel=kernel,
            peers=peers,
            runners=tuple(runner) if runner else None,
            seconds=seconds,
            train=train,
        )
        with _progress("starting", 1.0) as show:
            result = benchmark.run(options, progress=show)
    except ValueError as error:
        _fail(error)
    if as_json:
        _print_json(result.to_dict())
    else:
        out.print(result.table())
    if plot:
        _save(plot, lambda: result.plot(plot))
    if failed := [row.name for row in result.rows if row.error]:
        _fail(f"not timed: {', '.join(failed)}", status=1)


def _check_plot(path: Path) -> None:
    """Before minutes of work, not after: can a plot be written there?"""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _fail("a plot needs matplotlib: pip install 'mnv2-fused[demo]'")
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats or not path.parent.is_dir() or path.is_dir():
        _fail(f"--plot {path}: expected a file name like plot.png, in a folder that exists")


def _save(path: Path, save: Callable[[], None]) -> None:
    try:
        save()
    except OSError as error:
        _fail(f"cannot write {path} ({error})", status=1)
    _note(f"wrote {path}")


# ---- tables


@app.command()
def tables(
    batch: Annotated[int, typer.Option(min=1, help="Images in the measurements of memory.")] = 8,
    memory: Annotated[bool, typer.Option(help="Also measure the memory of activations, fused and not.")] = True,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown on stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw bar charts: .png, .svg or .pdf.")] = None,
) -> None:
    """The paper's tables beside what these networks have: parameters, multiply-adds, largest maps, memory."""
    if as_json and as_markdown:
        _fail("--json and --markdown exclude each other")
    if plot:
        _check_plot(plot)
    found = [paper.classification(), paper.largest_maps(), paper.detection(), paper.segmentation()]
    if memory:
        with _progress("memory", None) as show:
            found += [paper.memory(of, batch, lambda name: show(0, name)) for of in ("block", "network")]
    if as_json:
        _print_json([table._asdict() for table in found])
    elif as_markdown:
        print("\n".join(map(paper.markdown, found)), end="")
    else:
        for table in found:
            printed = Table(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
            for i, column in enumerate(table.columns):
                printed.add_column(column, justify="right" if i else "left")
            for row in table.rows:
                printed.add_row(*map(paper.text, row))
            out.print(printed)
    if plot:
        _save(plot, lambda: paper.draw(found).savefig(plot))


# ---- ablate


@app.command()
def ablate(
    epochs: Annotated[int, typer.Option(min=1, help="Passes through the training images.")] = ablations.EPOCHS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = ablations.SEEDS,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the accuracies: .png, .svg, .pdf.")
    ] = None,
) -> None:
    """Train the variants of figure 6 of the paper on digits and on harder ones: bottleneck activation, shortcuts."""
    if plot:
        _check_plot(plot)
    results = []
    try:
        with _progress("starting", 1.0) as show:
            for result in ablations.run(epochs, seeds, lambda done, total, what: show(done / total, what)):
                results.append(result)
    except ImportError as error:
        _fail(f"{error}: pip install 'mnv2-fused[demo]'")
    if as_json:
        _print_json([result._asdict() | dict(mean=result.mean, spread=result.spread) for result in results])
    else:
        table = Table("data", "variant", "accuracy %", "standard deviation", "runs")
        for result in results:
            runs = " ".join(f"{100 * accuracy:.1f}" for accuracy in result.accuracies)
            table.add_row(result.data, result.variant, f"{100 * result.mean:.1f}", f"{100 * result.spread:.1f}", runs)
        out.print(table)
    if plot:
        _save(plot, lambda: ablations.draw(results).savefig(plot))


# ---- shapes


class ShapesTask(str, Enum):
    detection = "detection"
    segmentation = "segmentation"


@app.command()
def shapes(
    task: Annotated[ShapesTask, typer.Argument(help="SSDLite, or DeepLabv3.")],
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the task's", help="Passes through them.")] = None,
    count: Annotated[
        int | None, typer.Option("--images", min=32, show_default="the task's", help="Images to train on.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of weights, images and batches.")] = 0,
    fused: Annotated[bool, typer.Option(help="Run the blocks as single ops, or layer by layer.")] = True,
    plot: Annotated[Path, typer.Option(metavar="FILE", help="Where the plot goes: .png, .svg or .pdf.")] = Path(
        "shapes.png"
    ),
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the trained weights: .safetensors.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a detector or a segmenter from scratch on generated shapes, on this CPU, in minutes.

    Thousands of small images with boxes or masks are made in seconds. The exit status is 1 when the mean average
    precision at an IoU of 0.5 stays below 0.8, or the mean IoU below 0.85.
    """
    chosen = shape_tasks.TASKS[task.value]
    chosen = chosen._replace(epochs=epochs or chosen.epochs, images=count or chosen.images)
    _check_plot(plot)
    _check_kernel()
    if save and (save.suffix != ".safetensors" or not save.parent.is_dir()):
        _fail(f"--save {save}: expected a file name like shapes.safetensors, in a folder that exists")
    model = shape_tasks.network(chosen, seed)
    model.fused = fused
    try:
        with _progress("making images", 1.0, TimeRemainingColumn()) as show:
            items = shape_tasks.data(chosen, chosen.images, "train", seed)
            run = shape_tasks.train(
                model, chosen, items, seed=seed,
                progress=lambda step: show(step.done / step.total, f"loss {step.loss:.3f}"),
            )  # fmt: skip
    except (ImportError, ValueError) as error:
        _fail(error)
    _save(plot, lambda: shape_tasks.draw(model, run, chosen).savefig(plot))
    if save:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        _save(save, lambda: safetensors.torch.save_file(state, save))
    said = shape_tasks.describe(run)
    if as_json:
        _print_json({"task": chosen._asdict(), "seconds": run.seconds, "score": run.score._asdict()})
    else:
        threads = torch.get_num_threads()
        steps = f"{len(run.losses)} steps of {chosen.batch} images"
        out.print(f"{said} on {shape_tasks.TEST_IMAGES} test images, {run.seconds:.0f} s, {steps}, {threads} threads")
    if not shape_tasks.score_of(run) >= chosen.target:
        _fail(f"{said}: expected at least {chosen.target}", status=1)


# ---- classify


@app.command()
def classify(
    paths: Annotated[list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Pictures, and folders of pictures.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="FILE|torchvision", help="A .pth, .pt or .safetensors state dict, or a 14 MB download."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one per line; without it classes are numbers.")
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes to report for each picture.")] = 5,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, one line per class.")] = False,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Search folders inside folders too.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that are read, then run, together.")] = 16,
    resize: Annotated[
        int | None,
        typer.Option(min=1, show_default="232 for torchvision's weights, else 8/7 of the crop", help="Short side."),
    ] = None,
    crop: Annotated[int, typer.Option(min=1, max=4096, help="Side of the centre crop that the network sees.")] = 224,
) -> None:
    """What is on these pictures: the most probable classes of each.

    Pictures that cannot be read are reported on stderr and skipped; the exit status is then 1.
    """
    if as_json and as_csv:
        _fail("--json and --csv exclude each other")
    if weights is None:
        _fail(
            "no weights: give --weights FILE (a state dict in torchvision's layout: .pth, .pt or .safetensors) "
            f"or --weights torchvision (downloads {TORCHVISION_URL}, 14 MB)"
        )
    if resize is None:
        resize = 232 if weights == "torchvision" else round(crop * 8 / 7)
    if not crop <= resize <= 8192:
        _fail(f"--resize must be between --crop ({crop}) and 8192, got {resize}")
    _check_kernel()
    files = _find(paths, recursive)
    model = _load(weights)
    names = _read_labels(labels, model.num_classes) if labels else None
    if topk > model.num_classes:
        _fail(f"--topk {topk}, but these weights know {model.num_classes} classes")

    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    interrupted = False
    with _progress("classifying", len(files), MofNCompleteColumn(), TimeRemainingColumn()) as show:
        try:
            for path, answer in _predict(model, files, topk, batch_size, resize, crop):
                if isinstance(answer, images.ImageError):
                    _note(f"skipped {path}: {answer}")
                    skipped.append({"path": str(path), "error": str(answer)})
                else:
                    top = [
                        {"class": index, "label": names[index] if names else None, "probability": probability}
                        for index, probability in answer
                    ]
                    results.append({"path": str(path), "top": top})
                show(len(results) + len(skipped))
        except KeyboardInterrupt:
            interrupted = True

    if as_json:
        _print_json({"results": results, "skipped": skipped})
    elif as_csv:
        _print_csv(results)
    else:
        _print_top(results)
    if interrupted:
        _fail(f"interrupted after {len(results) + len(skipped)} of {len(files)} pictures", status=130)
    if skipped:
        _fail(f"{len(skipped)} of {len(files)} pictures skipped", status=1)


def _find(paths: list[Path], recursive: bool) -> list[Path]:
    files = images.find_images(paths, recursive)
    if not files:
        hint = "" if recursive else "; folders inside are searched with --recursive"
        _fail(f"no pictures in {', '.join(map(str, paths))}{hint}")
    return files


def _check_kernel() -> None:
    try:
        mnv2_fused.selected_kernel()
    except ValueError as error:  # MNV2_FUSED_KERNEL names one that cannot run
        _fail(error)


def _load(weights: str) -> MobileNetV2:
    try:
        model = load_model(weights)
    except WeightsError as error:
        _fail(error)
    if model.in_channels != 3:
        _fail(f"{weights}: made for pictures of {model.in_channels} channels; RGB has 3")
    return model


def _read_labels(path: Path, num_classes: int) -> list[str]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_LABEL_BYTES:
            raise OSError(f"no such file, or more than {MAX_LABEL_BYTES} bytes")
        labels = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        _fail(f"{path}: cannot read the labels ({error})")
    if len(labels) != num_classes:
        _fail(f"{path}: {len(labels)} labels, but the weights know {num_classes} classes")
    return [label.strip() for label in labels]


def _predict(
    model: MobileNetV2, files: list[Path], topk: int, batch_size: int, resize: int, crop: int
) -> Iterator[tuple[Path, list[tuple[int, float]] | images.ImageError]]:
    """For each file, in order, its [(class, probability)], or why there is none."""

    def read(path: Path) -> np.ndarray | images.ImageError:
        try:
            return images.preprocess(images.read_image(path), resize, crop)
        except images.ImageError as error:
            return error

    # Decoding a photograph takes longer than the network does, and Pillow releases the interpreter lock for it.
    with ThreadPoolExecutor(min(batch_size, torch.get_num_threads())) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd files; whatever matters is an ImageError
        for start in range(0, len(files), batch_size):
            paths = files[start : start + batch_size]
            inputs = list(pool.map(read, paths))
            readable = [pixels for pixels in inputs if isinstance(pixels, np.ndarray)]
            outputs = iter(())
            if readable:
                with torch.inference_mode():
                    outputs = iter(model(torch.from_numpy(np.stack(readable))))
            for path, pixels in zip(paths, inputs, strict=True):
                yield path, pixels if isinstance(pixels, images.ImageError) else _top(next(outputs), topk)


def _top(logits: torch.Tensor, topk: int) -> list[tuple[int, float]] | images.ImageError:
    if not logits.isfinite().all():
        return images.ImageError("the network's output is not finite: the weights do not fit such pictures")
    probabilities, classes = logits.double().softmax(0).topk(topk)
    return list(zip(classes.tolist(), probabilities.tolist(), strict=True))


def _print_csv(results: list[dict[str, Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("path", "rank", "class", "label", "probability"))
    for result in results:
        for rank, top in enumerate(result["top"], 1):
            writer.writerow((result["path"], rank, top["class"], top["label"], top["probability"]))


def _print_top(results: list[dict[str, Any]]) -> None:
    for result in results:
        out.print(Text(_printable(result["path"]), "bold"), soft_wrap=True)
        for top in result["top"]:
            label = f"  {_printable(top['label'])}" if top["label"] is not None else ""
            out.print(Text(f"  {top['probability']:6.1%}  class {top['class']}{label}"), soft_wrap=True)


# ---- detect, segment

PicturesArgument = Annotated[
    list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Pictures, and folders of pictures.")
]
WeightsOption = Annotated[str, typer.Option(metavar="FILE", help="A .pth, .pt or .safetensors state dict.")]
NamesOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names, one per line, the background's first; without it numbers."),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where the annotated pictures go, as PNG; made where missing.")
]
RecursiveOption = Annotated[bool, typer.Option("--recursive", "-r", help="Search folders inside folders too.")]


@app.command()
def detect(
    paths: PicturesArgument,
    weights: WeightsOption,
    labels: NamesOption = None,
    folder: OutOption = Path("annotated"),
    score: Annotated[float, typer.Option(min=0, max=1, help="The least that is shown.")] = 0.3,
    size: Annotated[int, typer.Option(min=1, max=4096, help="Side to which SSDLite resizes a picture.")] = 320,
    as_json: JsonOption = False,
    recursive: RecursiveOption = False,
) -> None:
    """Which objects are where on these pictures, by an SSDLite; writes the pictures with their boxes.

    Pictures that cannot be read are reported on stderr and skipped; the exit status is then 1.
    """
    try:
        model = load_detector(weights, (size, size))
    except WeightsError as error:
        _fail(error)
    names = _read_labels(labels, model.num_classes) if labels else None

    def line(found: dict[str, Any]) -> str:
        return f"{found['name']} {found['score']:.2f} at " + ", ".join(f"{value:.0f}" for value in found["box"])

    _annotate(paths, recursive, folder, as_json, lambda picture: annotate.detect(model, picture, names, score), line)


@app.command()
def segment(
    paths: PicturesArgument,
    weights: WeightsOption,
    labels: NamesOption = None,
    folder: OutOption = Path("annotated"),
    output_stride: Annotated[int, typer.Option(help="Of the DeepLabv3: 16 or 8.")] = 16,
    as_json: JsonOption = False,
    recursive: RecursiveOption = False,
) -> None:
    """What these pictures are made of, by a DeepLabv3; writes the pictures with each class in its colour.

    Pictures are seen at their own size. Those that cannot be read are reported on stderr and skipped; the exit status
    is then 1.
    """
    try:
        model = load_segmenter(weights, output_stride)
    except WeightsError as error:
        _fail(error)
    names = _read_labels(labels, model.num_classes) if labels else None

    def line(found: dict[str, Any]) -> str:
        return f"{found['name']} {found['share']:.1%}"

    _annotate(paths, recursive, folder, as_json, lambda picture: annotate.segment(model, picture, names), line)


def _annotate(
    paths: list[Path],
    recursive: bool,
    folder: Path,
    as_json: bool,
    find: Callable[[Image.Image], tuple[list[dict[str, Any]], Image.Image]],
    line: Callable[[dict[str, Any]], str],
) -> None:
    _check_kernel()
    files = _find(paths, recursive)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"cannot make {folder} ({error})")
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    written: set[str] = set()
    originals = {path.resolve() for path in files}
    with _progress("looking", len(files), MofNCompleteColumn(), TimeRemainingColumn()) as show:
        for path in files:
            try:
                found, drawn = find(images.read_image(path))
            except images.ImageError as error:
                _note(f"skipped {path}: {error}")
                skipped.append({"path": str(path), "error": str(error)})
                continue
            name, number = path.stem, 1
            # The same name in another folder, or with another suffix; or that of a picture which was given.
            while name in written or (folder / f"{name}.png").resolve() in originals:
                name, number = f"{path.stem}-{number}", number + 1
            written.add(name)
            target = folder / f"{name}.png"
            try:
                drawn.save(target)
            except OSError as error:
                _fail(f"cannot write {target} ({error})", status=1)
            results.append({"path": str(path), "annotated": str(target), "found": found})
            show(len(results) + len(skipped))
    if as_json:
        _print_json({"results": results, "skipped": skipped})
    else:
        for result in results:
            out.print(Text(_printable(result["path"]), style="bold"), soft_wrap=True)
            for found in result["found"]:
                out.print(Text("  " + _printable(line(found))), soft_wrap=True)
    if skipped:
        _fail(f"{len(skipped)} of {len(files)} pictures skipped", status=1)


# ---- demo

FUSED_COLOR, OTHER_COLOR = "tab:green", "tab:gray"


class Subject(str, Enum):
    digits = "digits"
    photographs = "photographs"


@app.command()
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
        _fail(f"{', '.join(unfit)}: not for the demo of {subject.value}")
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        _fail("the demo needs scikit-learn: pip install 'mnv2-fused[demo]'")
    _check_plot(plot)
    _check_kernel()
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
    _save(plot, lambda: _draw_training(runs, data, title).savefig(plot, dpi=120))
    if problems:
        _fail("; ".join(problems), status=1)


def _train(ways: dict[str, digits.Options]) -> Runs:
    """One run after the other, so that none takes time from another."""
    runs = {}
    with _progress("starting", len(ways), TimeRemainingColumn()) as show:
        for i, (way, options) in enumerate(ways.items()):

            def shown(step: digits.Step, i: int = i, way: str = way) -> None:
                where = f"{way}: epoch {step.epoch}, step {step.done}/{step.total}"
                show(i + step.done / step.total, f"{where}, loss {step.loss:.3f}, accuracy {step.accuracy:.0%}")

            try:
                runs[way] = digits.measure(options, shown)
            except digits.TrainingFailed as error:
                _fail(f"training ({way}) failed: {error}", status=1)
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


def _demo_photographs(plot: Path, weights: str, labels: Path | None) -> None:
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    files = [Path(name).name for name in samples.filenames]
    photos = dict(zip(files, map(Image.fromarray, samples.images), strict=True))
    if weights == "random":
        _note(
            "Random weights, as trained ones are a download (--weights torchvision): the classes mean nothing, "
            "but fused and plain PyTorch must find the same ones."
        )
        model = random_model(_crops(photos.values()))
    else:
        model = _load(weights)
    names = _read_labels(labels, model.num_classes) if labels else None
    inputs = torch.from_numpy(np.stack([images.preprocess(photo, 232) for photo in photos.values()]))

    answers, agree, verdict = _compare(model, inputs, list(photos))
    out.print(_answers_table(answers, names))
    out.print(verdict + "\n")
    options = benchmark.Options(
        width=infer_architecture(model.state_dict())["width_mult"],
        runners=("fused", "eager", "eager channels_last"),
        seconds=DEMO_SECONDS,
    )
    with _progress("timing", 1.0) as show:
        result = benchmark.run(options, model, inputs[:1], show)
    out.print(result.table())
    title = f"{result.title}, {_C.cpu_name()}, weights: {_printable(weights, 60)}"
    _save(plot, lambda: _draw(photos, answers, names, result, title).savefig(plot, dpi=120))
    if not agree or any(row.error for row in result.rows):
        _fail("fused and plain PyTorch disagree, or one of them failed", status=1)


def _compare(model: MobileNetV2, inputs: torch.Tensor, photos: list[str]) -> tuple[Answers, bool, str]:
    """The top 5 of the fused network and of the same modules in plain PyTorch, whether they agree, and by how much."""
    plain = copy.deepcopy(model)
    plain.fused = False
    with torch.inference_mode():
        logits = {"fused": model(inputs), "PyTorch": plain(inputs)}
        exact = plain.double()(inputs.double())
    if not all(values.isfinite().all() for values in (*logits.values(), exact)):
        _fail("the network's output is not finite: the weights do not fit such pictures")
    topk = min(5, model.num_classes)
    answers = {
        photo: {way: dict(_top(values[i], topk)) for way, values in logits.items()} for i, photo in enumerate(photos)
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
    return _printable(names[index], 40) if names else f"class {index}"


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
