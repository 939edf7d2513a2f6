"""The commands classify, detect and segment: what is on these pictures?"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import MofNCompleteColumn, TimeRemainingColumn
from rich.text import Text

from . import annotate, images
from .terminal import JsonOption, check_kernel, fail, note, out, print_json, printable, progress
from .weights import TORCHVISION_URL, WeightsError, load_detector, load_model, load_segmenter

if TYPE_CHECKING:
    from .mobilenet_v2 import MobileNetV2

MAX_LABEL_BYTES = 16 << 20

PicturesArgument = Annotated[
    list[Path], typer.Argument(metavar="IMAGE|FOLDER", help="Pictures, and folders of pictures.")
]
RecursiveOption = Annotated[bool, typer.Option("--recursive", "-r", help="Search folders inside folders too.")]


def _find(paths: list[Path], recursive: bool) -> list[Path]:
    files = images.find_images(paths, recursive)
    if not files:
        hint = "" if recursive else "; folders inside are searched with --recursive"
        fail(f"no pictures in {', '.join(map(str, paths))}{hint}")
    return files


def read_labels(path: Path, num_classes: int) -> list[str]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_LABEL_BYTES:
            raise OSError(f"no such file, or more than {MAX_LABEL_BYTES} bytes")
        labels = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: cannot read the labels ({error})")
    if len(labels) != num_classes:
        fail(f"{path}: {len(labels)} labels, but the weights know {num_classes} classes")
    return [label.strip() for label in labels]


# ---- classify


def classify(
    paths: PicturesArgument,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|torchvision", help="A state dict of torchvision, timm or transformers, or a 14 MB download."
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one per line; without it classes are numbers.")
    ] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes to report for each picture.")] = 5,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, one line per class.")] = False,
    recursive: RecursiveOption = False,
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
        fail("--json and --csv exclude each other")
    if weights is None:
        fail(
            "no weights: give --weights FILE (keys of torchvision, timm or transformers; .pth, .pt or .safetensors) "
            f"or --weights torchvision (downloads {TORCHVISION_URL}, 14 MB)"
        )
    if resize is None:
        resize = 232 if weights == "torchvision" else round(crop * 8 / 7)
    if not crop <= resize <= 8192:
        fail(f"--resize must be between --crop ({crop}) and 8192, got {resize}")
    check_kernel()
    files = _find(paths, recursive)
    model = load_classifier(weights)
    names = read_labels(labels, model.num_classes) if labels else None
    if topk > model.num_classes:
        fail(f"--topk {topk}, but these weights know {model.num_classes} classes")

    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    interrupted = False
    with progress("classifying", len(files), MofNCompleteColumn(), TimeRemainingColumn()) as show:
        try:
            for path, answer in _predict(model, files, topk, batch_size, resize, crop):
                if isinstance(answer, images.ImageError):
                    note(f"skipped {path}: {answer}")
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
        print_json({"results": results, "skipped": skipped})
    elif as_csv:
        _print_csv(results)
    else:
        _print_top(results)
    if interrupted:
        fail(f"interrupted after {len(results) + len(skipped)} of {len(files)} pictures", status=130)
    if skipped:
        fail(f"{len(skipped)} of {len(files)} pictures skipped", status=1)


def load_classifier(weights: str) -> MobileNetV2:
    try:
        model = load_model(weights)
    except WeightsError as error:
        fail(error)
    if model.in_channels != 3:
        fail(f"{weights}: made for pictures of {model.in_channels} channels; RGB has 3")
    return model


def _predict(
    model: MobileNetV2, files: list[Path], topk: int, batch_size: int, resize: int, crop: int
) -> Iterator[tuple[Path, list[tuple[int, float]] | images.ImageError]]:
    """For each file, in order, its [(class, probability)], or why there is none."""

    def read(path: Path) -> np.ndarray | images.ImageError:
        try:
            return images.preprocess(images.read_image(path), resize, crop, model.image_mean, model.image_std)
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
                yield path, pixels if isinstance(pixels, images.ImageError) else most_probable(next(outputs), topk)


def most_probable(logits: torch.Tensor, topk: int) -> list[tuple[int, float]] | images.ImageError:
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
        out.print(Text(printable(result["path"]), "bold"), soft_wrap=True)
        for top in result["top"]:
            label = f"  {printable(top['label'])}" if top["label"] is not None else ""
            out.print(Text(f"  {top['probability']:6.1%}  class {top['class']}{label}"), soft_wrap=True)


# ---- detect, segment

WeightsOption = Annotated[str, typer.Option(metavar="FILE", help="A .pth, .pt or .safetensors state dict.")]
NamesOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Class names, one per line, the background's first; without it numbers."),
]
OutOption = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where the annotated pictures go, as PNG; made where missing.")
]


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
        fail(error)
    names = read_labels(labels, model.num_classes) if labels else None

    def line(found: dict[str, Any]) -> str:
        return f"{found['name']} {found['score']:.2f} at " + ", ".join(f"{value:.0f}" for value in found["box"])

    _annotate(paths, recursive, folder, as_json, lambda picture: annotate.detect(model, picture, names, score), line)


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
        fail(error)
    names = read_labels(labels, model.num_classes) if labels else None

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
    check_kernel()
    files = _find(paths, recursive)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make {folder} ({error})")
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    written: set[str] = set()
    originals = {path.resolve() for path in files}
    with progress("looking", len(files), MofNCompleteColumn(), TimeRemainingColumn()) as show:
        for path in files:
            try:
                found, drawn = find(images.read_image(path))
            except images.ImageError as error:
                note(f"skipped {path}: {error}")
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
                fail(f"cannot write {target} ({error})", status=1)
            results.append({"path": str(path), "annotated": str(target), "found": found})
            show(len(results) + len(skipped))
    if as_json:
        print_json({"results": results, "skipped": skipped})
    else:
        for result in results:
            out.print(Text(printable(result["path"]), style="bold"), soft_wrap=True)
            for found in result["found"]:
                out.print(Text("  " + printable(line(found))), soft_wrap=True)
    if skipped:
        fail(f"{len(skipped)} of {len(files)} pictures skipped", status=1)
