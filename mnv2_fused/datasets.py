"""Images with boxes or label masks: generated shapes, COCO and VOC folders, and the augmentations of SSD and DeepLab.

An image is uint8 [3, H, W], RGB. The target of detection is torchvision's dict of tensors, for n objects: boxes float32
[n, 4] (x1, y1, x2, y2 in pixels, inside the image, never empty), labels int64 [n] from 1, area float32 [n] in pixels,
iscrowd int64 [n], image_id int64 []. The target of segmentation is a mask int64 [H, W]: 0 background, IGNORED pixels
count neither in training nor in testing. A transform takes (image, target, rng), leaves them unchanged and returns
new ones; `Augmented` applies transforms to a dataset, `collate` makes batches and `normalize` the network's input.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance
from torch import Tensor
from torch.utils.data import Dataset

from .images import ImageError, read_image
from .mobilenet_v2 import IMAGENET_MEAN, IMAGENET_STD

IGNORED = 255

MAX_BYTES = 1 << 30  # of an annotation file; COCO's largest, instances_train2017.json, has 0.45e9
MAX_XML_BYTES = 1 << 24  # of one picture's annotation; VOC's have a few thousand
MAX_PIXELS = 1 << 25  # of a picture: the augmentations enlarge it up to 16 times

# ImageNet's mean, which `normalize` makes nearly 0: what an image is padded with.
FILL = tuple(int(value) for value in np.rint(np.array(IMAGENET_MEAN, np.float32) * 255))

Boxes: TypeAlias = dict[str, Tensor]
Target: TypeAlias = Boxes | Tensor
Transform: TypeAlias = Callable[[Tensor, Target, np.random.Generator], tuple[Tensor, Target]]


class DatasetError(ValueError):
    """Data that cannot be used; the message is one line that names the file, the field and the reason."""


# ---- Generated shapes


def _outlines() -> dict[str, np.ndarray]:
    """Polygons [n, 2] between -1 and 1, y downwards."""
    angles = np.arange(48) * np.pi / 24
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    tips = np.arange(10) * np.pi / 5
    star = np.stack([np.sin(tips), -np.cos(tips)], 1) * np.where(np.arange(10) % 2, 0.42, 1)[:, None]
    arm = 0.36
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])  # (x, y) to (-y, x)
    return {
        "ellipse": circle,
        "rectangle": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
        "triangle": np.array([[0, -1], [1, 1], [-1, 1]]),
        "cross": np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)]),
        "star": star,
        "ring": circle,
    }


_OUTLINES = _outlines()
SHAPES = tuple(_OUTLINES)
_HOLES = {"ring": 0.55}  # as large as that times the outline
_MAX_SHAPES = 4
_ATTEMPTS = 12
_VISIBLE = 0.75  # the share of a shape that those drawn after it leave
_MAX_ANGLE = math.radians(20)


class Shapes(Dataset):
    """Shapes in random colours, sizes, aspect ratios and places on noisy gradients: to try a detector or segmenter on.

    Each image has 1 to 4 shapes. A later one may hide up to a quarter of an earlier one; boxes and areas are those of
    the visible pixels. Colours are drawn without regard to the class. In a mask the outermost pixels of a shape are
    IGNORED, as along VOC's objects. An item depends on `seed`, `split` and its index alone; it takes a
    millisecond or two and is not stored.

    Attributes:
        classes: the name of each label, the background's first.

    Args:
        count: images.
        task: "detection" for targets with boxes, "segmentation" for masks.
        split: "train" or "test", which share no image.
        num_classes: how many of SHAPES, without the background.
        size: height and width in pixels, at least 48.
        seed: 0 to 2**32 - 1.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        count: int,
        task: str = "detection",
        split: str = "train",
        *,
        num_classes: int = len(SHAPES),
        size: int = 128,
        seed: int = 0,
    ) -> None:
        for name, value, least, most in (
            ("count", count, 1, 2**32),
            ("num_classes", num_classes, 1, len(SHAPES)),
            ("size", size, 48, 4096),
            ("seed", seed, 0, 2**32 - 1),
        ):
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        for name, value, allowed in (
            ("task", task, ("detection", "segmentation")),
            ("split", split, ("train", "test")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        self.classes = ("background", *SHAPES[:num_classes])
        self._count, self._task, self._size = count, task, size
        self._seed = (seed, ("train", "test").index(split))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        index = range(self._count)[index]
        rng = np.random.default_rng((*self._seed, index))
        image, instances, labels = self._draw(rng)
        image = torch.from_numpy(image)
        if self._task == "segmentation":
            return image, _mask_of(instances, labels)
        objects = []
        for number, label in enumerate(labels, 1):
            visible = instances == number
            rows, columns = (np.flatnonzero(visible.any(axis)) for axis in (1, 0))
            objects.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, label, visible.sum(), 0))
        return image, _boxes_of(index, objects)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """uint8 [3, H, W]; which shape each pixel shows, int64 [H, W], from 1; their labels."""
        ramp = np.linspace(0, 1, self._size)
        ramp = np.stack([1 - ramp, ramp])
        image = ramp.T @ rng.uniform(30, 225, (3, 2, 2)) @ ramp  # between four colours in the corners
        instances = np.zeros((self._size, self._size), np.int64)
        labels: list[int] = []
        areas: list[int] = []
        wanted = rng.integers(1, _MAX_SHAPES + 1)
        for _ in range(_ATTEMPTS):
            if len(labels) == wanted:
                break
            label = int(rng.integers(1, len(self.classes)))
            drawn = np.where(self._stamp(rng, SHAPES[label - 1]), len(labels) + 1, instances)
            *left, area = np.bincount(drawn.ravel(), minlength=len(labels) + 2)[1:]
            if any(now < _VISIBLE * whole for now, whole in zip(left, areas, strict=True)):
                continue
            labels.append(label)
            areas.append(area)
            pixels = drawn == len(labels)
            behind = image[:, pixels].mean(1)
            # Of four colours the one that differs most from what is behind it, lest a shape cannot be seen.
            colour = max(rng.uniform(0, 255, (4, 3)), key=lambda colour: np.abs(colour - behind).sum())
            image[:, pixels] = colour[:, None]
            instances = drawn
        image += rng.integers(-20, 21, image.shape, np.int8)
        return image.clip(0, 255).astype(np.uint8), instances, labels

    def _stamp(self, rng: np.random.Generator, shape: str) -> np.ndarray:
        """bool [H, W]: the pixels of a shape, all of it inside the image."""
        extent = rng.uniform(self._size / 5, self._size / 2)
        stretch = math.sqrt(2) ** rng.uniform(-1, 1)  # aspect ratios from 1:2 to 2:1
        points = _OUTLINES[shape] * (extent * stretch / 2, extent / stretch / 2)
        angle = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE)
        points = points @ [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        centre = rng.uniform(-points.min(0), self._size - 1 - points.max(0))
        drawing = Image.new("L", (self._size, self._size))
        for factor, fill in ((1, 1), (_HOLES.get(shape, 0), 0)):
            if factor:
                ImageDraw.Draw(drawing).polygon((centre + factor * points).ravel().tolist(), fill=fill)
        return np.asarray(drawing, bool)


def _mask_of(instances: np.ndarray, labels: Sequence[int]) -> Tensor:
    mask = np.array([0, *labels])[instances]
    around = np.pad(instances, 1, mode="edge")
    edge = np.zeros(instances.shape, bool)
    for neighbours in (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]):
        edge |= neighbours != instances
    mask[edge & (instances > 0)] = IGNORED
    return torch.from_numpy(mask)


# ---- Folders with annotations. Whatever is read from them is untrusted.


class CocoDetection(Dataset):
    """Pictures with boxes in COCO's format, instances_*.json.

    COCO's category ids, which have gaps, become labels 1, 2, ... in their order; boxes are cut at the image's border.
    Crowds are in the targets: `without_crowds` takes them out for training, mAP needs them.

    Attributes:
        classes: the name of each label, the background's first.
        category_ids: COCO's id of each label, 0 for the background: to write results in COCO's format.

    Args:
        folder: of the pictures.
        annotations: the JSON file.
        keep_empty: whether images without a box are items.
        drop_degenerate: whether boxes without area are left out; otherwise they are errors. COCO's own has a few.

    Raises:
        DatasetError: for an unusable annotation file; on access, for an unusable picture or one whose size is not what
            the annotations say.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        annotations: str | os.PathLike,
        *,
        keep_empty: bool = True,
        drop_degenerate: bool = False,
    ) -> None:
        path = Path(annotations)
        content = _read_json(path)
        categories: dict[int, str] = {}
        for record, where in _records(content, "categories", path):
            identity = _integer(record, "id", where)
            if identity in categories:
                raise DatasetError(f"{where}: id {identity} a second time")
            categories[identity] = _text(record, "name", where)
        self.category_ids = (0, *sorted(categories))
        self.classes = ("background", *(categories[identity] for identity in self.category_ids[1:]))
        labels = {identity: label for label, identity in enumerate(self.category_ids) if label}

        images: dict[int, tuple[Path, int, int]] = {}
        objects: dict[int, list[tuple]] = {}
        for record, where in _records(content, "images", path):
            identity = _integer(record, "id", where)
            if identity in images:
                raise DatasetError(f"{where}: id {identity} a second time")
            picture = _member(Path(folder), _text(record, "file_name", where), f"{where}: file_name")
            images[identity] = (picture, *(_integer(record, key, where, 1) for key in ("width", "height")))
            objects[identity] = []
        for record, where in _records(content, "annotations", path):
            identity = _integer(record, "image_id", where)
            category = _integer(record, "category_id", where)
            if identity not in images:
                raise DatasetError(f"{where}: image_id {identity} is not the id of an image")
            if category not in labels:
                raise DatasetError(f"{where}: category_id {category} is not the id of a category")
            x, y, width, height = _numbers(record, "bbox", where, 4)
            box = _cut((x, y, x + width, y + height), *images[identity][1:])
            if box is None:
                if drop_degenerate:
                    continue
                raise DatasetError(
                    f"{path}: annotation {record.get('id')} of image {identity}: bbox {[x, y, width, height]} has no "
                    f"area inside the image; drop_degenerate=True leaves such boxes out"
                )
            crowd = _integer(record, "iscrowd", where, 0, 1) if "iscrowd" in record else 0
            area = _numbers(record, "area", where)[0] if "area" in record else width * height
            objects[identity].append((*box, labels[category], area, crowd))
        self._items = [
            (identity, *images[identity], np.array(found)) for identity, found in objects.items() if found or keep_empty
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Boxes]:
        identity, path, width, height, objects = self._items[index]
        image = _picture(path)
        if image.shape != (3, height, width):
            found = f"{image.shape[2]} x {image.shape[1]}"
            raise DatasetError(f"{path}: {found} pixels (upright), but {width} x {height} in the annotations")
        return image, _boxes_of(identity, objects)


VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()


class _Voc(Dataset):
    _task = ""

    def __init__(self, root: str | os.PathLike, split: str) -> None:
        self.classes = tuple(VOC_CLASSES)
        self._root = Path(root)
        path = self._root / "ImageSets" / self._task / f"{split}.txt"
        lines = _decoded(_read(path), path).splitlines()
        self._names = [name for line in lines if (name := line.strip())]
        for name in self._names:
            _member(self._root, name, str(path))

    def __len__(self) -> int:
        return len(self._names)

    def _image(self, index: int) -> Tensor:
        return _picture(self._root / "JPEGImages" / f"{self._names[index]}.jpg")


class VocSegmentation(_Voc):
    """Pictures with label masks in the layout of PASCAL VOC 2012.

    Masks are read as they are stored, palette indices: 1 to 20 are VOC_CLASSES, IGNORED is void.

    Attributes:
        classes: the name of each label, the background's first.

    Args:
        root: the folder that holds ImageSets, JPEGImages and SegmentationClass, often VOCdevkit/VOC2012.
        split: "train", "val", "trainval" or another file of ImageSets/Segmentation, without its .txt.

    Raises:
        DatasetError: for an unusable list of names; on access, for an unusable picture or mask.
    """

    _task = "Segmentation"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self._image(index)
        path = self._root / "SegmentationClass" / f"{self._names[index]}.png"
        content = _read(path)
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as mask:
                bits = content[24]  # of a sample, in the header; Pillow stretches greys of fewer bits to 0 to 255
                if mask.mode not in ("P", "L") or (mask.mode == "L" and bits != 8):
                    found = f"greys of {bits} bits" if mask.mode == "L" else mask.mode
                    raise DatasetError(f"{path}: a mask holds palette indices or 8-bit greys, not {found}")
                if mask.size != (image.shape[2], image.shape[1]):
                    sizes = f"{mask.width} x {mask.height} pixels, its picture has {image.shape[2]} x {image.shape[1]}"
                    raise DatasetError(f"{path}: {sizes}")
                labels = torch.from_numpy(np.array(mask)).long()
        except DatasetError:
            raise
        except Exception as error:  # a damaged file makes the decoder raise nearly anything
            raise DatasetError(f"{path}: not a PNG that can be decoded ({_one_line(error)})") from error
        wrong = labels[(labels >= len(self.classes)) & (labels != IGNORED)]
        if len(wrong):
            raise DatasetError(f"{path}: label {wrong[0]}; labels are 0 to {len(self.classes) - 1} and {IGNORED}")
        return image, labels


class VocDetection(_Voc):
    """Pictures with boxes in the layout of PASCAL VOC 2012.

    VOC counts pixels from 1 and includes the last one: its box 1, 1, 1, 1 becomes 0, 0, 1, 1. Objects marked
    difficult, which VOC's evaluation passes over, are crowds here.

    Attributes:
        classes: the name of each label, the background's first.

    Args:
        root: the folder that holds ImageSets, JPEGImages and Annotations, often VOCdevkit/VOC2012.
        split: "train", "val", "trainval" or another file of ImageSets/Main, without its .txt.

    Raises:
        DatasetError: for an unusable list of names; on access, for an unusable picture or annotation.
    """

    _task = "Main"

    def __getitem__(self, index: int) -> tuple[Tensor, Boxes]:
        image = self._image(index)
        path = self._root / "Annotations" / f"{self._names[index]}.xml"
        content = _read(path, MAX_XML_BYTES)
        parser = ElementTree.XMLParser(target=_NoDoctype())
        try:
            parser.feed(content)
            annotation = parser.close()
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise DatasetError(f"{path}: {_one_line(error)}") from error
        objects = []
        for number, element in enumerate(annotation.findall("object")):
            where = f"{path}: object[{number}]"
            name = element.findtext("name", "").strip()
            if name not in self.classes[1:]:
                raise DatasetError(f"{where}: name {name!r:.40} is not one of VOC's classes")
            corners = [element.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax")]
            try:
                left, top, right, bottom = map(float, corners)
            except ValueError:
                raise DatasetError(f"{where}: bndbox needs the numbers xmin, ymin, xmax, ymax") from None
            box = _cut((left - 1, top - 1, right, bottom), image.shape[2], image.shape[1])
            if box is None:
                raise DatasetError(f"{where}: bndbox {[left, top, right, bottom]} has no area inside the image")
            area = (box[2] - box[0]) * (box[3] - box[1])
            difficult = element.findtext("difficult", "0").strip() == "1"
            objects.append((*box, self.classes.index(name), area, difficult))
        return image, _boxes_of(index, objects)


class _NoDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:  # entities could grow without bound
        raise DatasetError("a DOCTYPE, which VOC's files do not have")


def _boxes_of(identity: int, objects: Sequence[tuple] | np.ndarray) -> Boxes:
    """The target of objects (x1, y1, x2, y2, label, area, iscrowd)."""
    table = torch.from_numpy(np.array(objects, np.float64).reshape(-1, 7))
    return {
        "boxes": table[:, :4].float(),
        "labels": table[:, 4].long(),
        "area": table[:, 5].float(),
        "iscrowd": table[:, 6].long(),
        "image_id": torch.tensor(identity),
    }


def _cut(box: tuple[float, float, float, float], width: int, height: int) -> tuple[float, ...] | None:
    """What of the box lies in the image; None where nothing is left, also when rounded to float32."""
    limits = (width, height, width, height)
    x1, y1, x2, y2 = (float(np.float32(min(max(value, 0), limit))) for value, limit in zip(box, limits, strict=True))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _picture(path: Path) -> Tensor:
    try:
        return _from_pillow(read_image(path, MAX_PIXELS))
    except ImageError as error:
        raise DatasetError(f"{path}: {error}") from error


def _member(folder: Path, name: str, where: str) -> Path:
    """A file named in a file: below the folder, going by the name alone; links that the user made are followed."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(c in name for c in "\\\0\n"):
        raise DatasetError(f"{where}: {name!r:.80} does not name a file inside the folder")
    return folder / name


def _read(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would block or never end
            raise DatasetError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
        if (size := path.stat().st_size) > max_bytes:
            raise DatasetError(f"{path}: {size} bytes; at most {max_bytes} are read")
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}") from error


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: not UTF-8 text") from None


def _read_json(path: Path) -> dict[str, Any]:
    text = _decoded(_read(path), path)
    try:
        # The polygons, most of COCO's bytes, are let go at once.
        content = json.loads(text, object_hook=lambda record: (record.pop("segmentation", None), record)[1])
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not JSON that can be read ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: expected an object with images, annotations and categories")
    return content


def _records(content: dict[str, Any], key: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    records = content.get(key)
    if not isinstance(records, list):
        raise DatasetError(f"{path}: {key} must be a list, {_found(content, key)}")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DatasetError(f"{path}: {key}[{number}] must be an object, got {record!r:.40}")
        yield record, f"{path}: {key}[{number}]"


def _integer(record: dict[str, Any], key: str, where: str, least: int = -(2**62), most: int = 2**62) -> int:
    value = record.get(key)
    if type(value) is not int or not least <= value <= most:  # a bool is an int, too
        span = "" if most > 1 and least < 0 else f" of at least {least}" if most > 1 else f" from {least} to {most}"
        raise DatasetError(f"{where}: {key} must be a whole number{span}, {_found(record, key)}")
    return value


def _numbers(record: dict[str, Any], key: str, where: str, count: int = 1) -> list[float]:
    value = record.get(key)
    values = value if count > 1 and isinstance(value, list) else [value]
    # Below 1e30 nothing overflows float32; NaN compares false.
    if len(values) != count or not all(type(v) in (int, float) and -1e30 < v < 1e30 for v in values):
        kind = "a finite number" if count == 1 else f"{count} finite numbers"
        raise DatasetError(f"{where}: {key} must be {kind}, {_found(record, key)}")
    return [float(v) for v in values]


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise DatasetError(f"{where}: {key} must be a string, {_found(record, key)}")
    return value


def _found(record: dict[str, Any], key: str) -> str:
    return f"got {record[key]!r:.40}" if key in record else "it is missing"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---- Transforms


class Augmented(Dataset):
    """`dataset` with `transforms` applied, in their order, to each item.

    What is drawn depends on `seed`, `epoch` and the item's index alone: not on the order of access or the number of
    worker processes.

    Attributes:
        epoch: to be set anew before each, or it sees the same images. Workers that a DataLoader keeps
            (persistent_workers) do not learn of it.

    Args:
        dataset: of (image, target).
        transforms: functions of (image, target, rng) that return (image, target), as those of `ssdlite_transforms`.
        seed: 0 to 2**32 - 1.
    """

    def __init__(self, dataset: Dataset, transforms: Sequence[Transform], seed: int = 0) -> None:
        self.dataset, self.transforms, self.seed = dataset, tuple(transforms), seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        index = range(len(self))[index]
        image, target = self.dataset[index]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target


def ssdlite_transforms(size: int = 320) -> tuple[Transform, ...]:
    """Training of SSDLite: IoU crop, flip, size x size; torchvision's references/detection/presets.py, "ssdlite"."""
    return without_crowds, random_iou_crop, random_flip, partial(resize, size=(size, size))


def ssd_transforms(size: int = 320) -> tuple[Transform, ...]:
    """Training of SSD, which distorts and zooms out first: section 2.2 of its paper; torchvision's preset "ssd"."""
    return without_crowds, photometric_distortion, random_zoom_out, *ssdlite_transforms(size)[1:]


def deeplab_transforms(size: int = 513) -> tuple[Transform, ...]:
    """Training of DeepLab: scale by 0.5 to 2, crop of size x size, flip; its input_preprocess.py.

    To test, pad: `partial(pad, size=(513, 513))`.
    """
    return random_scale, partial(random_crop, size=(size, size)), random_flip


def without_crowds(image: Tensor, target: Boxes, rng: np.random.Generator | None = None) -> tuple[Tensor, Boxes]:
    """The target without the boxes that are around crowds."""
    _size_of(image, target, dict)
    return image, _moved(target, target["boxes"], target["iscrowd"] == 0)


def random_iou_crop(
    image: Tensor,
    target: Boxes,
    rng: np.random.Generator,
    *,
    options: Sequence[float] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0),
    scale: tuple[float, float] = (0.3, 1.0),
    aspect: tuple[float, float] = (0.5, 2.0),
    trials: int = 40,
) -> tuple[Tensor, Boxes]:
    """A crop that overlaps an object by a minimum IoU: section 2.2 of SSD's paper, torchvision's RandomIoUCrop.

    Objects whose centre lies inside are kept, their boxes cut at the crop's border; at least one is. Without objects
    the image stays whole.

    Args:
        options: minimum IoUs, one of which is drawn, and another after `trials` crops in vain. 1 leaves the image
            whole.
        scale: of the crop's sides.
        aspect: the least and the highest width / height in pixels.
        trials: crops to draw for an option.

    Raises:
        ValueError: no option of 1, without which there may be no end.
    """
    height, width = _size_of(image, target, dict)
    if max(options, default=0) < 1:
        raise ValueError(f"options must hold 1, which leaves the image whole, got {list(options)}")
    boxes = target["boxes"].double().numpy()
    starts, ends = boxes[:, :2], boxes[:, 2:]
    centres, areas = (starts + ends) / 2, (ends - starts).prod(1)
    whole = np.array([width, height])
    while (least := options[rng.integers(len(options))]) < 1:
        # All trials at once; the first that fits is the crop.
        sides = (whole * rng.uniform(*scale, (trials, 2))).astype(int)
        corners = ((whole - sides) * rng.random((trials, 2))).astype(int)
        limits = corners + sides
        allowed = (aspect[0] * sides[:, 1] <= sides[:, 0]) & (sides[:, 0] <= aspect[1] * sides[:, 1])
        # No centre is inside a crop without pixels.
        inside = ((corners[:, None] < centres) & (centres < limits[:, None])).all(2)  # [trials, n]
        common = np.minimum(limits[:, None], ends) - np.maximum(corners[:, None], starts)
        common = common.clip(0).prod(2)
        iou = common / (sides.prod(1)[:, None] + areas - common)
        allowed &= (inside & (iou >= least)).any(1)
        if not allowed.any():
            continue
        trial = allowed.argmax()
        (left, top), (right, bottom) = corners[trial].tolist(), limits[trial].tolist()
        shifted = target["boxes"] - torch.tensor([left, top, left, top])
        side = torch.tensor([right - left, bottom - top] * 2, dtype=shifted.dtype)
        cut = torch.minimum(shifted.clamp(min=0), side)
        return image[:, top:bottom, left:right], _moved(target, cut, torch.from_numpy(inside[trial]))
    return image, target


def random_zoom_out(
    image: Tensor,
    target: Boxes,
    rng: np.random.Generator,
    *,
    sides: tuple[float, float] = (1.0, 4.0),
    fill: Sequence[int] = FILL,
    p: float = 0.5,
) -> tuple[Tensor, Boxes]:
    """With probability `p` the image anywhere on a canvas whose sides are `sides` times as long, in colour `fill`.

    Expansion of SSD's paper, section 3.6; torchvision's RandomZoomOut.
    """
    height, width = _size_of(image, target, dict)
    if rng.random() >= p:
        return image, target
    ratio = rng.uniform(*sides)
    canvas = _canvas(int(height * ratio), int(width * ratio), fill)
    top = int((canvas.shape[1] - height) * rng.random())
    left = int((canvas.shape[2] - width) * rng.random())
    canvas[:, top : top + height, left : left + width] = image
    return canvas, _moved(target, target["boxes"] + torch.tensor([left, top, left, top]))


def photometric_distortion(
    image: Tensor,
    target: Target,
    rng: np.random.Generator,
    *,
    brightness: tuple[float, float] = (0.875, 1.125),
    contrast: tuple[float, float] = (0.5, 1.5),
    saturation: tuple[float, float] = (0.5, 1.5),
    hue: tuple[float, float] = (-0.05, 0.05),
    p: float = 0.5,
) -> tuple[Tensor, Target]:
    """Brightness, contrast, saturation, hue and the order of the channels, each changed with probability `p`.

    Brightness, contrast and saturation are multiplied by a factor from the range, the hue is turned by a part of the
    circle. Contrast comes either before saturation and hue or after them: torchvision's RandomPhotometricDistort on
    Pillow images, by way of which it is done here, too.
    """
    _size_of(image, target)
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    steps = [
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Color, saturation),
        (_turn_hue, hue),
    ]
    steps.insert(rng.choice([1, 3]), (ImageEnhance.Contrast, contrast))
    for change, limits in steps:
        if rng.random() < p:
            factor = rng.uniform(*limits)
            pixels = change(pixels, factor) if change is _turn_hue else change(pixels).enhance(factor)
    result = _from_pillow(pixels)
    return result[torch.from_numpy(rng.permutation(3))] if rng.random() < p else result, target


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(int(turn * 255) % 256)  # wraps around, as hues do
    return Image.fromarray(pixels, "HSV").convert("RGB")


def random_flip(image: Tensor, target: Target, rng: np.random.Generator, *, p: float = 0.5) -> tuple[Tensor, Target]:
    """With probability `p`, left and right exchanged."""
    _, width = _size_of(image, target)
    if rng.random() >= p:
        return image, target
    if isinstance(target, Tensor):
        return image.flip(-1), target.flip(-1)
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    return image.flip(-1), _moved(target, torch.stack([width - x2, y1, width - x1, y2], 1))


def resize(
    image: Tensor, target: Target, rng: np.random.Generator | None = None, *, size: tuple[int, int]
) -> tuple[Tensor, Target]:
    """To `size` (height, width), whatever the aspect ratio: the image bilinear and antialiased, a mask nearest.

    An IoU does not change when both boxes are resized, so that detections can be scored at the network's size.
    """
    height, width = _size_of(image, target)
    if isinstance(target, Tensor):
        rows, columns = (
            ((torch.arange(new) + 0.5) * (old / new)).long() for new, old in zip(size, (height, width), strict=True)
        )
        target = target[rows[:, None], columns]
    else:
        factors = torch.tensor([size[1] / width, size[0] / height] * 2)
        # Rounding must not carry a box over the border.
        boxes = torch.minimum(target["boxes"] * factors, torch.tensor([size[1], size[0]] * 2, dtype=torch.float32))
        target = _moved(target, boxes)
    if size != (height, width):
        pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        image = _from_pillow(pixels.resize(size[::-1], Image.Resampling.BILINEAR))
    return image, target


def random_scale(
    image: Tensor,
    target: Target,
    rng: np.random.Generator,
    *,
    scales: Sequence[float] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
) -> tuple[Tensor, Target]:
    """Both sides by one of `scales`, those of DeepLab's training."""
    height, width = _size_of(image, target)
    scale = scales[rng.integers(len(scales))]
    return resize(image, target, size=(max(1, int(height * scale)), max(1, int(width * scale))))


def pad(
    image: Tensor,
    mask: Tensor,
    rng: np.random.Generator | None = None,
    *,
    size: tuple[int, int],
    fill: Sequence[int] = FILL,
) -> tuple[Tensor, Tensor]:
    """Below and to the right until it has `size` (height, width): the image with `fill`, the mask with IGNORED.

    A side that is longer stays.
    """
    height, width = _size_of(image, mask, Tensor)
    canvas = _canvas(max(height, size[0]), max(width, size[1]), fill)
    canvas[:, :height, :width] = image
    padded = torch.full(canvas.shape[1:], IGNORED, dtype=mask.dtype)
    padded[:height, :width] = mask
    return canvas, padded


def random_crop(
    image: Tensor,
    mask: Tensor,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    fill: Sequence[int] = FILL,
) -> tuple[Tensor, Tensor]:
    """A part of `size` (height, width), anywhere, after `pad` where the image is smaller."""
    image, mask = pad(image, mask, size=size, fill=fill)
    top, left = (rng.integers(have - want + 1) for have, want in zip(mask.shape, size, strict=True))
    bottom, right = top + size[0], left + size[1]
    return image[:, top:bottom, left:right], mask[top:bottom, left:right]


def _size_of(image: Tensor, target: Target, kind: Any = (dict, Tensor)) -> tuple[int, int]:
    """Height and width; ValueError or TypeError for what no dataset here gives, or not to this transform."""
    if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
        raise ValueError(f"an image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
    if not isinstance(target, kind):
        expected = "a dict with boxes" if kind is dict else "a mask [H, W]"
        raise TypeError(f"this transform needs a target that is {expected}, got {type(target).__name__}")
    if isinstance(target, Tensor):
        if target.shape != image.shape[1:]:
            raise ValueError(f"a mask must have the image's {list(image.shape[1:])}, got {list(target.shape)}")
    elif target["boxes"].shape[1:] != (4,):
        raise ValueError(f"boxes must be [n, 4], got {list(target['boxes'].shape)}")
    return image.shape[1], image.shape[2]


def _moved(target: Boxes, boxes: Tensor, kept: Tensor | slice = slice(None)) -> Boxes:
    """The target with its boxes changed to `boxes`, areas in proportion, and of the objects only those kept."""
    before, after = ((b[:, 2:] - b[:, :2]).prod(1) for b in (target["boxes"], boxes))
    return {
        **target,
        "boxes": boxes[kept],
        "labels": target["labels"][kept],
        "area": (target["area"] * (after / before))[kept],
        "iscrowd": target["iscrowd"][kept],
    }


def _canvas(height: int, width: int, fill: Sequence[int]) -> Tensor:
    return torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, height, width)


def _from_pillow(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


# ---- Batches


def collate(items: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Boxes] | Tensor]:
    """A DataLoader's collate_fn: images [N, 3, H, W] with a list of N targets or with masks [N, H, W].

    Raises:
        ValueError: images of different sizes, or none.
    """
    sizes = sorted({tuple(image.shape) for image, _ in items})
    if len(sizes) != 1:
        raise ValueError(f"a batch needs images of one size, got {sizes}; resize them first")
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.stack(targets) if isinstance(targets[0], Tensor) else list(targets)


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """uint8 [..., 3, H, W] to the network's float32, (images / 255 - mean) / std, on the images' device.

    ImageNet's mean and deviation are torchvision's; TensorFlow's SSDLite and DeepLab have 0.5 for both.
    """
    mean, std = (torch.as_tensor(np.array(v, np.float32), device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images.float() / 255 - mean) / std
