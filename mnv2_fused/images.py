"""Pictures from untrusted files to network input: torchvision's evaluation recipe in Pillow and numpy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .mobilenet_v2 import IMAGENET_MEAN, IMAGENET_STD

# What may be decoded, by content and not by file name. Pillow knows more formats, but EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What counts as a picture when a folder is searched; a file that is named by the user is always tried.
SUFFIXES = frozenset(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .jp2 .avif".split())

MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30


class ImageError(ValueError):
    """A file that cannot be used as a picture; the message says why, without the file's name."""


def find_images(paths: Iterable[str | os.PathLike], recursive: bool = False) -> list[Path]:
    """Files to classify: the files given, in order, and for each folder the pictures in it, sorted by name.

    In folders, hidden files and names without a picture's suffix are left out, and links to folders are not followed.
    A path that does not exist is kept: reading it reports the reason.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if recursive and not name.startswith("."))
            found += [
                Path(folder, name)
                for name in sorted(names)
                if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
            ]
    return found


def read_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to 8-bit RGB, upright (EXIF orientation); of an animation the first frame.

    Transparent pixels are laid over white, 16-bit greys scaled to 8 bits. Raises ImageError for whatever cannot be
    decoded and for pictures above `max_pixels`, which is checked in the header before any pixel is decoded.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ImageError("no such file")
        if not path.is_file():  # a pipe or a device would block or never end
            raise ImageError("not a regular file")
        size = path.stat().st_size
        if size == 0:
            raise ImageError("the file is empty")
        if size > MAX_BYTES:
            raise ImageError(f"{size} bytes; at most {MAX_BYTES} are read")
        Image.init()
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels; at most {max_pixels} are decoded")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError("not a picture in a format that is read here: " + ", ".join(FORMATS)) from None
    except MemoryError:
        raise ImageError("not enough memory to decode it") from None
    except Exception as error:  # a damaged file makes decoders raise nearly anything: struct.error, KeyError, ...
        raise ImageError(_one_line(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip these at 255 instead of scaling them
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError("32-bit integer pixels, whose range is not known; convert the picture to 8 or 16 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels, whose range is not known; convert the picture to 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def preprocess(
    image: Image.Image,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> np.ndarray:
    """RGB picture to float32 (3, crop, crop): short side to `resize` (bilinear, antialiased), centre crop, values of 0
    to 1 less `mean` by `std` (of each channel; ImageNet's). The same numbers as torchvision's
    `transforms._presets.ImageClassification` for a PIL image. Raises ImageError for a picture so long and thin that the
    resized one would exceed MAX_PIXELS.
    """
    if not 0 < crop <= resize:
        raise ValueError(f"crop must be in 1..resize; got crop={crop}, resize={resize}")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized = int(resize * long / short)
    if resize * resized > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels is too long and thin for a {crop} x {crop} crop")
    width, height = (resize, resized) if width <= height else (resized, resize)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)))
    pixels = (pixels.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
