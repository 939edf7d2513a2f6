"""The command `mnv2-fused`: info, bench, classify, demo. Results go to stdout, all that is said about them to stderr."""

from __future__ import annotations

import csv
import json
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import mnv2_fused

from . import _C, images
from .weights import TORCHVISION_URL, load_model, random_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from .mobilenet_v2 import MobileNetV2

app = typer.Typer(
    help="MobileNetV2 on the CPU as one fused PyTorch op: is it right, how fast is it, what is on these pictures?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

MAX_LABEL_BYTES = 16 << 20


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
def _progress(description: str, total: float | None, *columns: Any) -> Iterator[Any]:
    """Yields advance(steps=1, description=None); the bar is on stderr, and only where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn(), TimeRemainingColumn())
    # redirect_stdout would send results to stderr while the bar is up.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal, redirect_stdout=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1, description=None: bar.update(task, advance=steps, description=description)


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
    facts.add_row("threads", str(report["threads"]))
    if report["override"]:
        facts.add_row("forced", f"MNV2_FUSED_KERNEL={_printable(report['override'])}")
    for name, value in report["build"].items():
        facts.add_row(f"built: {name}", Text(value))

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
    files = _find(paths, recursive)
    model = _load(weights)
    names = _read_labels(labels, model.num_classes) if labels else None
    if topk > model.num_classes:
        _fail(f"--topk {topk}, but these weights know {model.num_classes} classes")

    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    interrupted = False
    with _progress("classifying", len(files), MofNCompleteColumn()) as advance:
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
                advance()
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


def _load(weights: str) -> MobileNetV2:
    try:
        mnv2_fused.selected_kernel()
        model = load_model(weights)
    except ValueError as error:  # an impossible MNV2_FUSED_KERNEL, or a WeightsError
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


# ---- demo

# Relative norm. Each float32 run of the 53 layers is about 1e-5 from exact, and centred logits cancel a few times that.
TOLERANCE = 1e-4


@app.command()
def demo(
    plot: Annotated[Path, typer.Option(metavar="FILE", help="Where the plot goes: .png, .svg or .pdf.")] = Path(
        "demo.png"
    ),
    weights: Annotated[
        str,
        typer.Option(
            metavar="random|torchvision|FILE",
            help="Random ones need no network; the classes then mean nothing, the agreement and the times do.",
        ),
    ] = "random",
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one per line; without it classes are numbers.")
    ] = None,
) -> None:
    """Classify two photographs fused and with plain PyTorch, show that both agree, time both, draw a plot.

    Takes less than a minute. The photographs come with scikit-learn: pip install 'mnv2-fused[demo]'.
    """
    try:
        from matplotlib.figure import Figure
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        _fail(f"the demo needs {error.name}: pip install 'mnv2-fused[demo]'")
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    if plot.suffix.removeprefix(".") not in figure.canvas.get_supported_filetypes() or not plot.parent.is_dir():
        _fail(f"--plot {plot}: expected a name like demo.png in a folder that exists")

    samples = load_sample_images()
    photos = [(Path(name).name, fromarray(pixels)) for name, pixels in zip(samples.filenames, samples.images)]
    if weights == "random":
        model = random_model(_crops([photo for _, photo in photos]))
        _note(
            "random weights, since trained ones are a download (--weights torchvision): the classes mean nothing, "
            "that both computations find the same ones does"
        )
    else:
        model = _load(weights)
    names = _read_labels(labels, model.num_classes) if labels else None

    inputs = torch.from_numpy(np.stack([images.preprocess(photo, 232) for _, photo in photos]))
    fused, plain, exact = _three_ways(model, inputs)
    answers = [(_named(fused[i], names), _named(plain[i], names)) for i in range(len(photos))]
    out.print(_answers_table([name for name, _ in photos], answers))
    same_classes = torch.equal(fused.topk(5).indices, plain.topk(5).indices)
    difference = _distance(fused, plain)
    out.print(_agreement(fused, plain, exact, same_classes))


def _crops(photos: list[Image], count: int = 4) -> torch.Tensor:
    rng = np.random.default_rng(0)
    pixels = []
    for photo in photos:
        for side in rng.integers(min(photo.size) // 2, min(photo.size), count):
            left, top = rng.integers(0, photo.width - side), rng.integers(0, photo.height - side)
            pixels.append(images.preprocess(photo.crop((left, top, left + side, top + side))))
    return torch.from_numpy(np.stack(pixels))


def _three_ways(model: MobileNetV2, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the fused network, of the same modules in plain PyTorch, and of those in float64."""
    plain = copy.deepcopy(model)
    plain.fused = False
    with torch.inference_mode():
        return model(inputs), plain(inputs), plain.double()(inputs.double())


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

