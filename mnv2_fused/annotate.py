"""What a detector or a segmenter finds on pictures, drawn into them. What `mnv2-fused detect` and `segment` run."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .datasets import normalize
from .deeplab import DeepLabV3
from .images import ImageError
from .ssdlite import SSDLite


def color_of(label: int) -> tuple[int, int, int]:
    """Of a class, far from those of the classes beside it: steps of the golden ratio around the circle of hues."""
    return tuple(round(255 * value) for value in colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 0.9))


def name_of(label: int, names: Sequence[str] | None) -> str:
    return f"class {label}" if names is None else names[label]


def _pixels(picture: Image.Image) -> Tensor:
    """[3, H, W], uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def detect(
    model: SSDLite, picture: Image.Image, names: Sequence[str] | None = None, least: float = 0.3
) -> tuple[list[dict[str, object]], Image.Image]:
    """The objects on an RGB picture with at least that score, best first, and the picture with their boxes.

    An object is {"label", "name", "score", "box"}: x1, y1, x2, y2 in pixels. `names` has one for each class, the
    background's first.
    """
    (found,) = model([_pixels(picture).float() / 255])
    drawn, objects = picture.copy(), []
    draw, width = ImageDraw.Draw(drawn), max(1, round(max(picture.size) / 300))
    for box, label, score in zip(*(found[key].tolist() for key in ("boxes", "labels", "scores")), strict=True):
        if score < least:
            continue
        objects.append({"label": label, "name": name_of(label, names), "score": score, "box": box})
        draw.rectangle(box, outline=color_of(label), width=width)
        _write(draw, (box[0], box[1]), f"{name_of(label, names)} {score:.2f}", color_of(label), picture)
    return objects, drawn


@torch.no_grad()
def segment(
    model: DeepLabV3, picture: Image.Image, names: Sequence[str] | None = None
) -> tuple[list[dict[str, object]], Image.Image]:
    """The share of an RGB picture that each class covers, the largest first, and the picture with them in colour.

    A region is {"label", "name", "share"}; the background, class 0, is left out. `names` as of `detect`. Raises
    ImageError where the network's output is not finite: that would look like background.
    """
    logits = model(normalize(_pixels(picture)[None]))["out"][0]
    if not logits.isfinite().all():
        raise ImageError("the network's output is not finite: the weights do not fit such pictures")
    labels = logits.argmax(0)
    pixels, shown = np.asarray(picture), []
    drawn = pixels.astype(np.float32)
    counts = torch.bincount(labels.flatten())
    for label in counts.argsort(descending=True).tolist():
        if label == 0 or not counts[label]:
            continue
        share = counts[label].item() / labels.numel()
        shown.append({"label": label, "name": name_of(label, names), "share": share})
        where = (labels == label).numpy()
        drawn[where] = 0.35 * drawn[where] + 0.65 * np.array(color_of(label), np.float32)
    drawn = Image.fromarray(drawn.round().astype(np.uint8))
    draw, top = ImageDraw.Draw(drawn), 0.0
    for region in shown:
        top = _write(draw, (0, top), f"{region['name']} {region['share']:.0%}", color_of(region["label"]), picture)
    return shown, drawn


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, color: tuple[int, int, int], picture: Image.Image
) -> float:
    """A line of text on its colour, inside the picture; gives where the next may begin."""
    text, size = text[:60], max(10, max(picture.size) // 40)
    left, top, right, bottom = draw.textbbox((0, 0), text, font_size=size)
    x = max(0.0, min(place[0], picture.width - right))
    y = max(0.0, min(place[1], picture.height - bottom))
    draw.rectangle((x + left, y, x + right, y + bottom), fill=color)
    draw.text((x, y), text, fill="white" if sum(color) < 400 else "black", font_size=size)
    return y + bottom + 1
