"""Generated shapes, COCO and VOC folders as people and attackers write them, and transforms that must move boxes,
masks and pixels alike."""

import colorsys
import json
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from mnv2_fused import datasets
from mnv2_fused.datasets import (
    FILL,
    IGNORED,
    SHAPES,
    Augmented,
    CocoDetection,
    DatasetError,
    Shapes,
    VocDetection,
    VocSegmentation,
    collate,
    deeplab_transforms,
    normalize,
    pad,
    photometric_distortion,
    random_crop,
    random_flip,
    random_iou_crop,
    random_scale,
    random_zoom_out,
    resize,
    ssd_transforms,
    ssdlite_transforms,
    without_crowds,
)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return torch.equal(a, b)


def check_boxes(image, target):
    """What every target for detection must be."""
    n = len(target["labels"])
    assert {key: value.dtype for key, value in target.items()} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "area": torch.float32,
        "iscrowd": torch.int64,
        "image_id": torch.int64,
    }
    assert target["boxes"].shape == (n, 4) and target["area"].shape == target["iscrowd"].shape == (n,)
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    assert (x1 >= 0).all() and (y1 >= 0).all() and (x1 < x2).all() and (y1 < y2).all()
    assert (x2 <= image.shape[2]).all() and (y2 <= image.shape[1]).all()
    assert (target["labels"] >= 1).all() and (target["area"] > 0).all()


# ---- shapes


def test_shapes_depend_on_seed_split_and_index_alone():
    dataset, fewer = Shapes(20), Shapes(7)
    backwards = [dataset[index] for index in range(6, -1, -1)][::-1]
    for (image, target), (other, expected) in zip(fewer, backwards, strict=True):
        assert torch.equal(image, other) and same(target, expected)
    assert torch.equal(fewer[-1][0], fewer[6][0])
    with pytest.raises(IndexError):
        fewer[7]
    images = [Shapes(3, **kwargs)[i][0] for kwargs in ({}, {"split": "test"}, {"seed": 1}) for i in range(3)]
    assert len({image.numpy().tobytes() for image in images}) == 9


def test_boxes_and_masks_of_shapes_agree():
    for index in range(40):
        image, target = Shapes(40)[index]
        other, mask = Shapes(40, "segmentation")[index]
        assert image.dtype == torch.uint8 and image.shape == (3, 128, 128) and torch.equal(image, other)
        assert mask.dtype == torch.int64 and mask.shape == (128, 128)
        check_boxes(image, target)
        assert 1 <= len(target["labels"]) <= 4 and int(target["image_id"]) == index
        assert target["area"].sum() == (mask != 0).sum()
        outside = torch.ones_like(mask, dtype=torch.bool)
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
            outside[y1:y2, x1:x2] = False
            part = mask[y1:y2, x1:x2]
            assert (part == label).any()
            for side in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert (side == IGNORED).any()  # tight, and the outermost pixels are the edge
        assert (mask[outside] == 0).all()


def test_edge_of_a_shape_is_one_pixel_wide():
    mask = Shapes(1, "segmentation")[0][1].numpy()
    shown = np.pad(mask, 1)
    for y, x in np.argwhere(mask == IGNORED):
        around = [shown[y, x + 1], shown[y + 2, x + 1], shown[y + 1, x], shown[y + 1, x + 2]]
        assert len(set(around) - {IGNORED}) >= 1 and (0 in around or len(set(around)) > 1)
    inner = (mask > 0) & (mask != IGNORED)
    for y, x in np.argwhere(inner):
        assert 0 not in (shown[y, x + 1], shown[y + 2, x + 1], shown[y + 1, x], shown[y + 1, x + 2])
    assert inner.sum() > 0


def test_colours_do_not_tell_the_class():
    """The nearest mean colour of the classes finds no more than chance: of 6 classes, 1 in 6."""
    colours, labels = [], []
    for index in range(150):
        image, mask = Shapes(150, "segmentation")[index]
        for label in set(mask.unique().tolist()) - {0, IGNORED}:
            colours.append(image[:, mask == label].float().mean(1).numpy())
            labels.append(label)
    colours, labels = np.array(colours), np.array(labels)
    half = len(labels) // 2
    means = np.stack([colours[:half][labels[:half] == label].mean(0) for label in range(1, 7)])
    found = np.linalg.norm(colours[half:, None] - means, axis=2).argmin(1) + 1
    count = len(labels) - half
    assert (found == labels[half:]).mean() < 1 / 6 + 4 * np.sqrt(5 / 36 / count)  # 4 standard deviations
    assert all((labels == label).mean() > 0.08 for label in range(1, 7))


def test_shapes_are_not_hidden(monkeypatch):
    stamp = np.zeros((128, 128), bool)
    stamp[10:50, 20:80] = True
    monkeypatch.setattr(Shapes, "_stamp", lambda *_: stamp)  # the next one would cover all of the first
    assert {len(target["labels"]) for _, target in Shapes(10)} == {1}


def test_arguments_of_shapes():
    dataset = Shapes(30, num_classes=2, size=64)
    assert dataset.classes == ("background", *SHAPES[:2])
    assert {label for _, target in dataset for label in target["labels"].tolist()} == {1, 2}
    assert dataset[0][0].shape == (3, 64, 64)
    for kwargs, message in [
        ({"count": 0}, "count must be a whole number from 1"),
        ({"num_classes": 7}, "num_classes must be a whole number from 1 to 6, got 7"),
        ({"size": 16}, "size must be a whole number from 48"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"task": "boxes"}, "task must be detection or segmentation, got 'boxes'"),
        ({"split": "val"}, "split must be train or test"),
    ]:
        with pytest.raises(ValueError, match=message):
            Shapes(**({"count": 1} | kwargs))


# ---- COCO


def coco():
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "sub/a.png", "width": 20, "height": 20},
            {"id": 9, "file_name": "c.png", "width": 10, "height": 10},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [1.5, 2, 10, 5.25], "area": 33.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [30, 20, 15, 10], "iscrowd": 1, "segmentation": [[1]]},
            {"id": 3, "image_id": 3, "category_id": 1, "bbox": [0, 0, 20, 20], "area": 1},
        ],
    }


def written(folder, content):
    (folder / "images" / "sub").mkdir(parents=True, exist_ok=True)
    for name, size in (("b.png", (40, 30)), ("sub/a.png", (20, 20)), ("c.png", (10, 10))):
        Image.new("RGB", size, "red").save(folder / "images" / name)
    (folder / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "images", folder / "a.json"


def test_coco(tmp_path):
    dataset = CocoDetection(*written(tmp_path, coco()))
    assert dataset.classes == ("background", "person", "dog", "toothbrush")
    assert dataset.category_ids == (0, 1, 18, 90)
    assert len(dataset) == 3
    image, target = dataset[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 30, 40) and (image[0] == 255).all()
    assert target["boxes"].tolist() == [[1.5, 2, 11.5, 7.25], [30, 20, 40, 30]]  # cut at the border
    assert target["labels"].tolist() == [2, 3] and target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [33.5, 150] and int(target["image_id"]) == 7
    for item in dataset:
        check_boxes(*item)
    assert dataset[1][1]["labels"].tolist() == [1]
    assert dataset[2][1]["boxes"].shape == (0, 4) and dataset[2][1]["labels"].shape == (0,)
    assert [
        int(t["image_id"]) for _, t in CocoDetection(tmp_path / "images", tmp_path / "a.json", keep_empty=False)
    ] == [7, 3]


@pytest.mark.parametrize("bbox", [[5, 5, 0, 4], [5, 5, 4, -1], [40, 0, 3, 3], [-5, 0, 5, 3], [5, 5, 1e-9, 4]])
def test_coco_boxes_without_area(tmp_path, bbox):
    content = coco()
    content["annotations"][0] |= {"bbox": bbox, "id": 77}
    arguments = written(tmp_path, content)
    with pytest.raises(DatasetError, match=r"a.json: annotation 77 of image 7: bbox .* has no area .* drop_degenerate"):
        CocoDetection(*arguments)
    assert CocoDetection(*arguments, drop_degenerate=True)[0][1]["labels"].tolist() == [3]


@pytest.mark.parametrize(
    "section, change, message",
    [
        ("images", {"id": "7"}, r"images\[0\]: id must be a whole number, got '7'"),
        ("images", {"id": 3}, r"images\[1\]: id 3 a second time"),
        ("images", {"id": 2**70}, r"images\[0\]: id must be"),
        ("images", {"width": 0}, r"images\[0\]: width must be a whole number of at least 1, got 0"),
        ("images", {"height": True}, r"images\[0\]: height must be"),
        ("images", {"file_name": None}, r"images\[0\]: file_name must be a string, got None"),
        ("images", {"file_name": "../b.png"}, r"file_name: '../b.png' does not name a file inside the folder"),
        ("images", {"file_name": "/etc/passwd"}, r"does not name a file inside"),
        ("images", {"file_name": "sub/../../b.png"}, r"does not name a file inside"),
        ("images", {"file_name": ""}, r"does not name a file inside"),
        ("images", {"file_name": "b\0.png"}, r"does not name a file inside"),
        ("images", {"file_name": "..\\b.png"}, r"does not name a file inside"),
        ("categories", {"id": 1}, r"categories\[1\]: id 1 a second time"),
        ("categories", {"name": 5}, r"categories\[0\]: name must be a string, got 5"),
        ("annotations", {"image_id": 8}, r"annotations\[0\]: image_id 8 is not the id of an image"),
        ("annotations", {"image_id": [7]}, r"annotations\[0\]: image_id must be a whole number"),
        ("annotations", {"category_id": 2}, r"annotations\[0\]: category_id 2 is not the id of a category"),
        ("annotations", {"bbox": [1, 2, 3]}, r"annotations\[0\]: bbox must be 4 finite numbers, got \[1, 2, 3\]"),
        ("annotations", {"bbox": [1, 2, 3, "4"]}, r"bbox must be 4 finite numbers"),
        ("annotations", {"bbox": {"x": 1}}, r"bbox must be 4 finite numbers"),
        ("annotations", {"bbox": [1, 2, 3, float("nan")]}, r"bbox must be 4 finite numbers"),
        ("annotations", {"bbox": [1, 2, 10**400, 4]}, r"bbox must be 4 finite numbers"),
        ("annotations", {"area": float("inf")}, r"area must be a finite number"),
        ("annotations", {"iscrowd": 2}, r"iscrowd must be a whole number from 0 to 1, got 2"),
    ],
)
def test_what_is_wrong_in_coco_is_named(tmp_path, section, change, message):
    content = coco()
    content[section][0] |= change
    with pytest.raises(DatasetError, match=message) as caught:
        CocoDetection(*written(tmp_path, content))
    assert str(caught.value).startswith(str(tmp_path / "a.json")) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "not JSON that can be read"),
        ("{", "not JSON that can be read"),
        ("[" * 100_000, "not JSON that can be read"),
        ("[]", "expected an object with images, annotations and categories"),
        ("{}", "categories must be a list, it is missing"),
        ('{"categories": {}}', r"categories must be a list, got \{\}"),
        ('{"categories": [1]}', r"categories\[0\] must be an object, got 1"),
        ('{"categories": [{}]}', r"categories\[0\]: id must be a whole number, it is missing"),
        ('{"categories": []}', "images must be a list, it is missing"),
        ('{"categories": [], "images": []}', "annotations must be a list, it is missing"),
    ],
)
def test_a_file_that_is_not_cocos(tmp_path, content, message):
    with pytest.raises(DatasetError, match=message) as caught:
        CocoDetection(*written(tmp_path, content))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_coco_files(tmp_path, monkeypatch):
    folder, path = written(tmp_path, coco())
    with pytest.raises(DatasetError, match="missing.json: no such file"):
        CocoDetection(folder, tmp_path / "missing.json")
    with pytest.raises(DatasetError, match="images: not a regular file"):
        CocoDetection(folder, folder)
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DatasetError, match="latin.json: not UTF-8 text"):
        CocoDetection(folder, tmp_path / "latin.json")
    dataset = CocoDetection(folder, path)
    Image.new("RGB", (30, 40)).save(folder / "b.png")
    with pytest.raises(DatasetError, match=r"b.png: 30 x 40 pixels \(upright\), but 40 x 30 in the annotations"):
        dataset[0]
    (folder / "b.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="b.png: not a picture"):
        dataset[0]
    monkeypatch.setattr(datasets, "MAX_PIXELS", 399)
    with pytest.raises(DatasetError, match="a.png: 20 x 20 pixels; at most 399 are decoded"):
        dataset[1]
    monkeypatch.setattr(datasets._read, "__defaults__", (10,))
    with pytest.raises(DatasetError, match=r"a.json: \d+ bytes; at most 10 are read"):
        CocoDetection(folder, path)


# ---- VOC


def voc(root, names=("2007_000001", "2007_000002")):
    for folder in ("ImageSets/Segmentation", "ImageSets/Main", "JPEGImages", "SegmentationClass", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for task in ("Segmentation", "Main"):
        (root / "ImageSets" / task / "train.txt").write_text("".join(f"{name}\n" for name in names))
    for name in ("2007_000001", "2007_000002"):
        Image.new("RGB", (6, 4), "blue").save(root / "JPEGImages" / f"{name}.jpg")
        mask = Image.fromarray(np.array([[0, 1, 20, 255, 0, 0]] * 4, np.uint8))
        mask.putpalette([*range(256), *range(256), *range(256)])
        mask.save(root / "SegmentationClass" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(annotation())
    return root


def annotation(name="dog", difficult="0", xmin="2", ymax="3"):
    box = f"<bndbox><xmin>{xmin}</xmin><ymin>1</ymin><xmax>6</xmax><ymax>{ymax}</ymax></bndbox>"
    inner = f"<part><name>head</name>{box}</part>"
    return (
        f"<annotation><object><name>{name}</name><difficult>{difficult}</difficult>{inner}{box}</object></annotation>"
    )


def test_voc_masks(tmp_path):
    dataset = VocSegmentation(voc(tmp_path), "train")
    assert len(dataset) == 2 and dataset.classes[:2] == ("background", "aeroplane") and len(dataset.classes) == 21
    for image, mask in dataset:
        assert image.shape == (3, 4, 6) and mask.dtype == torch.int64
        assert mask.tolist() == [[0, 1, 20, 255, 0, 0]] * 4  # not the palette's colours


def test_voc_boxes(tmp_path):
    dataset = VocDetection(voc(tmp_path), "train")
    image, target = dataset[1]
    check_boxes(image, target)
    assert target["boxes"].tolist() == [[1, 0, 6, 3]]  # xmin 2 is the second pixel, xmax 6 the last one inside
    assert dataset.classes[target["labels"][0]] == "dog" and target["iscrowd"].tolist() == [0]
    assert int(target["image_id"]) == 1 and target["area"].tolist() == [15]
    (tmp_path / "Annotations" / "2007_000001.xml").write_text(annotation(difficult="1", xmin="1.4"))
    target = dataset[0][1]
    assert target["iscrowd"].tolist() == [1] and target["boxes"][0, 0] == pytest.approx(0.4)
    (tmp_path / "Annotations" / "2007_000001.xml").write_text("<annotation></annotation>")
    check_boxes(*dataset[0])


@pytest.mark.parametrize("name", ["../2007_000001", "/etc/passwd", "a/../../b", "a\\..\\b", "a\0b"])
@pytest.mark.parametrize("kind", [VocSegmentation, VocDetection])
def test_voc_names_stay_inside(tmp_path, kind, name):
    voc(tmp_path, ["2007_000001", name])
    with pytest.raises(DatasetError, match=r"train.txt: .* does not name a file inside the folder"):
        kind(tmp_path, "train")


def test_voc_split_that_does_not_exist(tmp_path):
    with pytest.raises(DatasetError, match=r"Segmentation/val.txt: no such file"):
        VocSegmentation(voc(tmp_path), "val")


@pytest.mark.parametrize(
    "mask, message",
    [
        (Image.new("L", (6, 4), 21), "label 21; labels are 0 to 20 and 255"),
        (Image.new("L", (4, 6)), "4 x 6 pixels, its picture has 6 x 4"),
        (Image.new("RGB", (6, 4)), "a mask holds palette indices or 8-bit greys, not RGB"),
        (None, "2007_000001.png: not a PNG that can be decoded"),
    ],
)
def test_what_is_wrong_with_a_mask_is_named(tmp_path, mask, message):
    path = voc(tmp_path) / "SegmentationClass" / "2007_000001.png"
    content = path.read_bytes()
    path.write_bytes(content[:60]) if mask is None else mask.save(path)
    with pytest.raises(DatasetError, match=message) as caught:
        VocSegmentation(tmp_path, "train")[0]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_mask_of_greys_of_four_bits(tmp_path):
    """Pillow makes 17, 34, ... of their 1, 2, ...: other labels, of which the first is one of VOC's."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 6, 4, 4, 0, 0, 0, 0)
    content = zlib.compress(b"\0\x11\x11\x11" * 4)
    path = voc(tmp_path) / "SegmentationClass" / "2007_000001.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b""))
    with pytest.raises(DatasetError, match="palette indices or 8-bit greys, not greys of 4 bits"):
        VocSegmentation(tmp_path, "train")[0]
    Image.fromarray(np.ones((4, 6), np.uint8)).save(path)
    assert (VocSegmentation(tmp_path, "train")[0][1] == 1).all()


@pytest.mark.parametrize(
    "content, message",
    [
        (annotation(name="unicorn"), r"object\[0\]: name 'unicorn' is not one of VOC's classes"),
        (annotation(name="background"), r"name 'background' is not one of VOC's classes"),
        (annotation(xmin=""), r"object\[0\]: bndbox needs the numbers xmin"),
        (annotation(xmin="nan"), r"has no area inside the image"),
        (annotation(ymax="0"), r"object\[0\]: bndbox .* has no area inside the image"),
        ("<annotation>", r"no element found|unclosed"),
        ("", r"no element found"),
        ('<!DOCTYPE a [<!ENTITY b "bb">]>' + annotation(name="&b;"), r"a DOCTYPE, which VOC's files do not have"),
        ('<?xml version="1.0" encoding="nonsense"?><annotation/>', r"unknown encoding"),
    ],
)
def test_what_is_wrong_in_an_annotation_is_named(tmp_path, content, message):
    path = voc(tmp_path) / "Annotations" / "2007_000001.xml"
    path.write_text(content)
    with pytest.raises(DatasetError, match=message) as caught:
        VocDetection(tmp_path, "train")[0]
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


# ---- transforms


def item(boxes, height=48, width=64):
    """An image whose pixels say where they were: red is x, green y."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([x, y, torch.full_like(x, 99)]).to(torch.uint8)
    n = len(boxes)
    return image, {
        "boxes": boxes,
        "labels": torch.arange(1, n + 1),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1) / 2,
        "iscrowd": torch.zeros(n, dtype=torch.int64),
        "image_id": torch.tensor(5),
    }


BOXES = [[2, 3, 20, 30], [30, 10, 60, 40], [50, 1, 63, 9], [0, 0, 64, 48], [10.5, 20.25, 12.75, 47.5]]


def recipe(transforms):
    def run(image, target, rng):
        for transform in transforms:
            image, target = transform(image, target, rng)
        return image, target

    return run


RANDOM = {
    "iou_crop": random_iou_crop,
    "zoom_out": random_zoom_out,
    "photometric": photometric_distortion,
    "flip": random_flip,
    "scale": random_scale,
    "ssdlite": recipe(ssdlite_transforms(40)),
    "ssd": recipe(ssd_transforms(40)),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("boxes", [BOXES, []], ids=["boxes", "empty"])
def test_transforms_keep_targets_well_formed(name, boxes):
    transform = RANDOM[name]
    image, target = item(boxes)
    before = image.clone(), {key: value.clone() for key, value in target.items()}
    outcomes = set()
    for seed in range(25):
        result = transform(image, target, np.random.default_rng(seed))
        assert result[0].dtype == torch.uint8 and result[0].shape[0] == 3
        check_boxes(*result)
        assert int(result[1]["image_id"]) == 5
        again = transform(image, target, np.random.default_rng(seed))
        assert torch.equal(result[0], again[0]) and same(result[1], again[1])
        outcomes.add(result[0].numpy().tobytes())
    assert torch.equal(image, before[0]) and same(target, before[1]), "the argument was changed"
    assert len(outcomes) > 1 or (name == "iou_crop" and not boxes)


@pytest.mark.parametrize("least, boxes", [(0.5, BOXES), (0.0, BOXES[2:3])], ids=["0.5", "0"])
def test_iou_crop_keeps_what_is_centred_inside(least, boxes):
    image, target = item(boxes)
    cropped = 0
    for seed in range(150):
        result, kept = random_iou_crop(image, target, np.random.default_rng(seed), options=(least, 1.0))
        if result.shape == image.shape:
            assert same(kept, target)
            continue
        cropped += 1
        left, top = int(result[0, 0, 0]), int(result[1, 0, 0])
        height, width = result.shape[1:]
        right, bottom = left + width, top + height
        assert torch.equal(result, image[:, top:bottom, left:right])
        assert 0.5 <= width / height <= 2 and width >= int(0.3 * 64) and height >= int(0.3 * 48)
        labels, best = [], 0
        for label, (x1, y1, x2, y2) in enumerate(boxes, 1):
            if left < (x1 + x2) / 2 < right and top < (y1 + y2) / 2 < bottom:
                common = (min(x2, right) - max(x1, left)) * (min(y2, bottom) - max(y1, top))
                best = max(best, common / (width * height + (x2 - x1) * (y2 - y1) - common))
                cut = [max(x1 - left, 0), max(y1 - top, 0), min(x2 - left, width), min(y2 - top, height)]
                assert kept["boxes"][len(labels)].tolist() == pytest.approx(cut)
                # half of its box, as before
                assert kept["area"][len(labels)] == pytest.approx((cut[2] - cut[0]) * (cut[3] - cut[1]) / 2)
                labels.append(label)
        assert kept["labels"].tolist() == labels and len(labels) >= 1
        assert best >= least
    assert 40 < cropped < 110  # one of two options


def test_iou_crop_without_a_way_out():
    with pytest.raises(ValueError, match=r"options must hold 1, .* got \[0.5\]"):
        random_iou_crop(*item(BOXES), np.random.default_rng(0), options=[0.5])
    image, target = item([[0, 0, 1, 1]], 1, 1)  # no crop has a pixel
    assert torch.equal(random_iou_crop(image, target, np.random.default_rng(0))[0], image)


def test_zoom_out():
    image, target = item(BOXES)
    widths = []
    for seed in range(60):
        result, moved = random_zoom_out(image, target, np.random.default_rng(seed), fill=(1, 2, 200))
        widths.append(result.shape[2])
        (top, left), *_ = (result[2] == 99).nonzero().tolist()
        assert torch.equal(result[:, top : top + 48, left : left + 64], image)
        assert (result[2] == 99).sum() == 48 * 64 and ((result[2] == 99) | (result[2] == 200)).all()
        assert torch.equal(moved["boxes"], target["boxes"] + torch.tensor([left, top, left, top]))
        assert torch.equal(moved["area"], target["area"])
    assert 15 < widths.count(64) < 45 and 64 * 3 < max(widths) <= 64 * 4


def test_flip():
    image, target = item(BOXES)
    flipped, moved = random_flip(image, target, np.random.default_rng(0), p=1)
    assert torch.equal(flipped, torch.from_numpy(image.numpy()[:, :, ::-1].copy()))
    assert moved["boxes"][0].tolist() == [64 - 20, 3, 64 - 2, 30]
    assert same(random_flip(flipped, moved, np.random.default_rng(0), p=1)[1], target)
    assert same(random_flip(image, target, np.random.default_rng(0), p=0)[1], target)
    _, mask = random_flip(image, image[0].long(), np.random.default_rng(0), p=1)
    assert mask[0].tolist() == list(range(63, -1, -1))


def test_resize_moves_boxes_and_pixels_alike():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 30:48] = 255
    _, target = item([[30, 10, 48, 20], [0, 0, 60, 40]])
    result, moved = resize(image, target, size=(80, 20))
    assert result.shape == (3, 80, 20)
    assert moved["boxes"].tolist() == [[10, 20, 16, 40], [0, 0, 20, 80]]
    assert moved["area"].tolist() == pytest.approx([60, 800])
    assert (result[:, 21:39, 11:15] == 255).all() and (result[:, :19] == 0).all() and (result[:, :, 17:] == 0).all()
    mask = (image[0] > 0).long() * 7
    _, resized = resize(image, mask, size=(80, 20))
    assert (resized[20:40, 10:16] == 7).all() and (resized == 7).sum() == 20 * 6
    labels = torch.arange(40 * 60).view(40, 60)
    for size in [(16, 24), (48, 64), (96, 8)]:  # where no pixel is as near as another
        nearest = Image.fromarray(labels.int().numpy()).resize(size[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(resize(image, labels, size=size)[1].numpy(), np.asarray(nearest))
    again, same_mask = resize(image, mask, size=(40, 60))
    assert torch.equal(again, image) and torch.equal(same_mask, mask)


def test_boxes_stay_inside_whatever_the_size():
    for size in range(1, 200, 7):
        image, target = item([[0, 0, 61, 47]], 47, 61)
        check_boxes(*resize(image, target, size=(size, size + 3)))


def test_crowds_are_taken_out():
    image, target = item(BOXES)
    target["iscrowd"][1] = 1
    assert without_crowds(image, target)[1]["labels"].tolist() == [1, 3, 4, 5]


@pytest.mark.parametrize("change", ["brightness", "contrast", "saturation", "hue", None])
def test_photometric_distortion(change):
    """Each alone, by its definition; the channels come in any order."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 8, 9), np.uint8))
    pixels = image.permute(1, 2, 0).double().numpy()
    grey = pixels @ [0.299, 0.587, 0.114]
    factor = {"hue": 0.04, None: 1}.get(change, 0.75)
    off = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    expected = {
        None: lambda: pixels,
        "brightness": lambda: pixels * factor,
        "contrast": lambda: factor * pixels + (1 - factor) * grey.mean(),
        "saturation": lambda: factor * pixels + (1 - factor) * grey[..., None],
        "hue": lambda: np.apply_along_axis(turned, 2, pixels, factor),
    }[change]()
    orders = set()
    for seed in range(12):
        ranges = off | ({change: (factor, factor)} if change else {})
        result, target = photometric_distortion(
            image, {"boxes": torch.zeros(0, 4)}, np.random.default_rng(seed), p=1, **ranges
        )
        errors = {
            order: np.abs(result.permute(1, 2, 0).double().numpy() - expected[..., list(order)]).max()
            for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        }
        order = min(errors, key=errors.get)
        orders.add(order)
        # Pillow's HSV has 8 bits: a step of hue is up to 6 of 255 in a channel; even a turn by 0 goes through it.
        assert errors[order] <= (13 if change == "hue" else 8)
    assert len(orders) > 2
    unchanged, _ = photometric_distortion(image, {"boxes": torch.zeros(0, 4)}, np.random.default_rng(0), p=0)
    assert torch.equal(unchanged, image)


def turned(pixel, turn):
    h, s, v = colorsys.rgb_to_hsv(*pixel / 255)
    return np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) * 255


def test_random_scale():
    image, target = item([[0, 0, 32, 24]])
    sizes = set()
    for seed in range(60):
        result, moved = random_scale(image, target, np.random.default_rng(seed))
        sizes.add(result.shape[1:])
        assert moved["boxes"].tolist() == [[0, 0, result.shape[2] / 2, result.shape[1] / 2]]
    assert sizes == {(int(48 * s), int(64 * s)) for s in (0.5, 0.75, 1, 1.25, 1.5, 1.75, 2)}
    assert random_scale(*item([], 1, 1), np.random.default_rng(2), scales=[0.5])[0].shape == (3, 1, 1)


def test_crop_of_a_mask():
    image, _ = item([])
    mask = image[0].long() + 64 * image[1].long()
    corners = set()
    for seed in range(60):
        part, labels = random_crop(image, mask, np.random.default_rng(seed), size=(40, 60))
        assert part.shape == (3, 40, 60) and torch.equal(labels, part[0].long() + 64 * part[1].long())
        corners.add((int(part[0, 0, 0]), int(part[1, 0, 0])))
    assert {x for x, _ in corners} == set(range(5)) and {y for _, y in corners} == set(range(9))
    whole, labels = random_crop(image, mask, np.random.default_rng(0), size=(48, 64))
    assert torch.equal(whole, image) and torch.equal(labels, mask)


def test_padding_is_mean_and_ignored():
    image, _ = item([])
    mask = torch.ones(48, 64, dtype=torch.int64)
    for crop in (pad, partial(random_crop, rng=np.random.default_rng(0))):
        padded, labels = crop(image, mask, size=(50, 70))
        assert torch.equal(padded[:, :48, :64], image) and (labels[:48, :64] == 1).all()
        assert (labels[48:] == IGNORED).all() and (labels[:, 64:] == IGNORED).all()
        assert padded[:, 49, 69].tolist() == list(FILL)
    part, labels = random_crop(image, mask, np.random.default_rng(0), size=(50, 30))  # smaller in one direction
    assert part.shape == (3, 50, 30) and (labels == IGNORED).sum() == 2 * 30
    padded, _ = pad(image, mask, size=(10, 70))
    assert padded.shape == (3, 48, 70)
    assert normalize(torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)).abs().max() < 0.5 / 255 / 0.22


def test_deeplab_transforms():
    dataset = Augmented(Shapes(10, "segmentation"), deeplab_transforms(129))
    labels = set()
    for image, mask in dataset:
        assert image.shape == (3, 129, 129) and mask.shape == (129, 129) and mask.dtype == torch.int64
        labels |= set(mask.unique().tolist())
    assert labels <= {*range(7), IGNORED} and len(labels) > 4


def test_augmented_depends_on_seed_epoch_and_index_alone():
    source = Shapes(4)
    dataset = Augmented(source, ssdlite_transforms(64), seed=3)
    first = [dataset[index] for index in range(4)]
    assert len(dataset) == 4
    assert all(torch.equal(dataset[i][0], first[i][0]) and same(dataset[i][1], first[i][1]) for i in (3, 0, 2, -3 % 4))
    assert torch.equal(dataset[-1][0], first[3][0])
    dataset.epoch = 1
    assert any(not torch.equal(dataset[i][0], first[i][0]) for i in range(4))
    dataset.epoch = 0
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=1)
    images, targets = next(iter(loader))
    assert torch.equal(images, torch.stack([image for image, _ in first]))
    assert all(same(a, b) for a, (_, b) in zip(targets, first, strict=True))


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_collate(kind):
    images, targets = collate([Shapes(3, kind)[index] for index in range(3)])
    assert images.shape == (3, 3, 128, 128) and images.dtype == torch.uint8
    if kind == "segmentation":
        assert targets.shape == (3, 128, 128) and targets.dtype == torch.int64
    else:
        assert [int(target["image_id"]) for target in targets] == [0, 1, 2]


def test_collate_of_different_sizes():
    with pytest.raises(
        ValueError, match=r"images of one size, got \[\(3, 48, 64\), \(3, 48, 65\)\]; resize them first"
    ):
        collate([item([]), item([], 48, 65)])
    with pytest.raises(ValueError, match=r"images of one size, got \[\]"):
        collate([])


def test_normalize():
    image = torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    result = normalize(image)
    assert result.dtype == torch.float32
    expected = [-0.485 / 0.229, (127 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert result.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert normalize(image, [0.5] * 3, [0.5] * 3).flatten().tolist() == pytest.approx(
        [-1, 127 / 127.5 - 1, 1], rel=1e-5
    )


@pytest.mark.parametrize(
    "transform, change, error, message",
    [
        (random_flip, lambda i, t: (i.float(), t), ValueError, r"uint8 \[3, H, W\], got torch.float32 \[3, 48, 64\]"),
        (random_flip, lambda i, t: (i[:1], t), ValueError, r"got torch.uint8 \[1, 48, 64\]"),
        (random_flip, lambda i, t: (i, i[0, 1:]), ValueError, r"have the image's \[48, 64\], got \[47, 64\]"),
        (random_flip, lambda i, t: (i, {"boxes": torch.zeros(4)}), ValueError, r"boxes must be \[n, 4\], got \[4\]"),
        (random_iou_crop, lambda i, t: (i, i[0]), TypeError, r"a dict with boxes, got Tensor"),
        (random_zoom_out, lambda i, t: (i, i[0]), TypeError, r"a dict with boxes, got Tensor"),
        (partial(pad, size=(9, 9)), lambda i, t: (i, t), TypeError, r"a mask \[H, W\], got dict"),
    ],
)
def test_what_a_transform_cannot_take_is_named(transform, change, error, message):
    with pytest.raises(error, match=message):
        transform(*change(*item(BOXES)), np.random.default_rng(0))
