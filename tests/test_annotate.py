"""Weights of detectors and segmenters from files, and the commands that draw what they find into pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from mnv2_fused import DeepLabV3, MobileNetV2, SSDLite, annotate
from mnv2_fused.cli import app
from mnv2_fused.datasets import normalize
from mnv2_fused.weights import WeightsError, load_detector, load_segmenter


def saved(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of one name, of different sizes, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for path, size in ((folder / "a.png", (90, 60)), (folder / "more" / "a.jpg", (50, 70))):
        rng = np.random.default_rng(len(path.parts))
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
    (folder / "z.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def detector() -> SSDLite:
    """One that finds something: the scores of class 2 stand above the others, those of one map above its others."""
    torch.manual_seed(0)
    model = SSDLite(3, width_mult=0.35, size=(96, 96)).eval()
    with torch.no_grad():
        for head in model.head["classification_head"]:
            head.conv[-1].weight.mul_(30)
            head.conv[-1].bias.view(-1, 3)[:, 2] = 1.0
    return model


DETECTORS = (
    dict(num_classes=7, width_mult=0.35), dict(num_classes=81), dict(num_classes=2, anchors="torchvision"),
    dict(num_classes=4, width_mult=0.5, anchors="torchvision"),
)  # fmt: skip
SEGMENTERS = (
    dict(num_classes=5, width_mult=0.35), dict(num_classes=21), dict(num_classes=1, width_mult=0.5, aspp=True)
)  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("options", DETECTORS, ids=str)
def test_detector_from_a_file(options: dict, suffix: str, tmp_path: Path) -> None:
    model = SSDLite(**options)
    again = load_detector(saved(model, tmp_path / f"w{suffix}"), (64, 64))
    assert not again.training and again.size == (64, 64) and again.num_classes == options["num_classes"]
    for (name, right), found in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(found, right), name


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("options", SEGMENTERS, ids=str)
def test_segmenter_from_a_file(options: dict, suffix: str, tmp_path: Path) -> None:
    model, x = DeepLabV3(**options, output_stride=8).eval(), torch.randn(1, 3, 33, 33)
    again = load_segmenter(saved(model, tmp_path / f"w{suffix}"), 8)
    with torch.no_grad():
        assert torch.equal(model(x)["out"], again(x)["out"])


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    detector, segmenter = SSDLite(3, width_mult=0.35), DeepLabV3(3, width_mult=0.35)
    other = saved(MobileNetV2(width_mult=0.35), tmp_path / "other.pt")
    for load, what in ((load_detector, "an SSDLite"), (load_segmenter, "a DeepLabV3")):
        with pytest.raises(WeightsError, match=rf"other\.pt: not {what}: .* keys missing"):
            load(other)
        with pytest.raises(WeightsError, match="no such file"):
            load(tmp_path / "none.pt")
    for model, load, key in (
        (detector, load_detector, "extra.1.conv.0.0.weight"), (segmenter, load_segmenter, "classifier.project.0.weight")
    ):  # fmt: skip
        state = model.state_dict()
        missing = {name: tensor for name, tensor in state.items() if name != key}
        torch.save(missing, tmp_path / "missing.pt")
        with pytest.raises(WeightsError, match=rf"1 keys missing: {key}"):
            load(tmp_path / "missing.pt")
        torch.save(state | {key: state[key][:1]}, tmp_path / "shape.pt")
        with pytest.raises(WeightsError, match=rf"shapes that do not fit width 0.35: {key} \(1,"):
            load(tmp_path / "shape.pt")
        torch.save(state | {key: state[key] * torch.inf}, tmp_path / "infinite.pt")
        with pytest.raises(WeightsError, match=f"{key} holds values that are not finite"):
            load(tmp_path / "infinite.pt")
    state = detector.state_dict()
    name = "head.classification_head.0.conv.1.bias"
    torch.save(state | {name: torch.zeros(10)}, tmp_path / "heads.pt")
    with pytest.raises(WeightsError, match=r"\[12, 10\] outputs of the first heads"):
        load_detector(tmp_path / "heads.pt")
    torch.save(state | {name: torch.zeros(3)}, tmp_path / "one.pt")
    with pytest.raises(WeightsError, match="num_classes counts the background and should be at least 2, got 1"):
        load_detector(tmp_path / "one.pt")


def test_detect(detector: SSDLite, pictures: Path, tmp_path: Path) -> None:
    weights, labels = saved(detector, tmp_path / "w.safetensors"), tmp_path / "names.txt"
    labels.write_text("background\ncat\ndog\n")
    command = ("detect", pictures, "-r", "--weights", weights, "--labels", labels, "--size", 96, "--score", 0.4)
    done = run(*command, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 1 and "1 of 3 pictures skipped" in done.stderr, done.output
    said = json.loads(done.stdout)
    assert [Path(result["path"]).name for result in said["results"]] == ["a.png", "a.jpg"]
    assert [Path(result["annotated"]).name for result in said["results"]] == ["a.png", "a-1.png"]
    assert [Path(skip["path"]).name for skip in said["skipped"]] == ["z.png"]
    for result in said["results"]:
        before, after = (np.asarray(Image.open(result[key]).convert("RGB")) for key in ("path", "annotated"))
        assert before.shape == after.shape and (before != after).any() and result["found"]
        (right,) = detector([torch.from_numpy(before.copy()).permute(2, 0, 1).float() / 255])
        expected = [[*box] for box, score in zip(right["boxes"].tolist(), right["scores"], strict=True) if score >= 0.4]
        assert [found["box"] for found in result["found"]] == expected
        for found in result["found"]:
            assert found["score"] >= 0.4 and found["name"] == ("background", "cat", "dog")[found["label"]]
    text = run("detect", pictures / "a.png", "--weights", weights, "--size", 96, "--out", tmp_path / "out").stdout
    assert "class 2 0." in text


def test_segment(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DeepLabV3(4, width_mult=0.35).eval()
    with torch.no_grad():
        model.classifier.logits.weight.mul_(100)
    weights = saved(model, tmp_path / "w.pt")
    done = run("segment", pictures / "a.png", "--weights", weights, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    (result,) = json.loads(done.stdout)["results"]
    regions, drawn = annotate.segment(model, Image.open(pictures / "a.png").convert("RGB"))
    assert result["found"] == regions and (np.asarray(Image.open(result["annotated"])) == np.asarray(drawn)).all()
    shares = [region["share"] for region in regions]
    assert (
        shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 and {r["label"] for r in regions} <= {1, 2, 3}
    )
    # Half of the pixels of a region, and all far from the text, have its colour mixed in; the background has none.
    labels = annotate.segment(model, Image.new("RGB", (40, 40), "white"))[0]
    assert all(0 < region["share"] <= 1 for region in labels)


def test_colours_of_regions() -> None:
    """Each class's colour where it is found, far from the text; the background as it was."""
    torch.manual_seed(0)
    model = DeepLabV3(3, width_mult=0.35).eval()
    with torch.no_grad():
        model.classifier.logits.weight.mul_(1e3)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), np.uint8))
    regions, drawn = annotate.segment(model, picture)
    with torch.no_grad():
        labels = model(normalize(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]))["out"][0].argmax(0)
    assert {region["label"]: region["share"] for region in regions} == {
        label: (labels == label).double().mean().item() for label in labels.unique().tolist() if label
    }
    before, after, labels = (np.asarray(t)[60:, 100:].astype(float) for t in (picture, drawn, labels))
    assert len(np.unique(labels)) > 1
    for label in np.unique(labels):
        share = 0.65 if label else 0.0
        expected = (1 - share) * before[labels == label] + share * np.array(annotate.color_of(int(label)))
        assert np.abs(after[labels == label] - expected).max() <= 0.51


def test_pictures_that_are_given_are_never_written_over(detector: SSDLite, pictures: Path, tmp_path: Path) -> None:
    """Where --out is their own folder, by whatever path."""
    weights, same = saved(detector, tmp_path / "w.pt"), tmp_path / "same"
    same.symlink_to(pictures)
    before = (pictures / "a.png").read_bytes()
    done = run("detect", pictures / "a.png", "--weights", weights, "--size", 96, "--out", same, "--json")
    assert done.exit_code == 0, done.output
    assert (pictures / "a.png").read_bytes() == before
    assert json.loads(done.stdout)["results"][0]["annotated"] == str(same / "a-1.png") and (same / "a-1.png").exists()


def test_weights_that_do_not_fit_a_picture_are_told(pictures: Path, tmp_path: Path) -> None:
    """Where all logits are NaN argmax says background."""
    model = DeepLabV3(4, width_mult=0.35).eval()
    with torch.no_grad():
        model.classifier.project[1].bias.fill_(1e38)
        model.classifier.logits.weight.fill_(1e38)
        model.classifier.logits.weight[:, ::2] *= -1
    weights = saved(model, tmp_path / "w.pt")
    done = run("segment", pictures / "a.png", "--weights", weights, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "the network's output is not finite" in done.stderr, done.output


def test_errors_of_the_commands(detector: SSDLite, pictures: Path, tmp_path: Path) -> None:
    weights = saved(detector, tmp_path / "w.pt")
    (tmp_path / "file").write_text("")
    labels = tmp_path / "names.txt"
    labels.write_text("one\ntwo\n")
    for arguments, message in (
        ((pictures / "a.png", "--weights", tmp_path / "none.pt"), "no such file"),
        ((pictures / "a.png", "--weights", weights, "--labels", labels), "2 labels, but the weights know 3 classes"),
        ((pictures / "a.png", "--weights", weights, "--out", tmp_path / "file"), "cannot make"),
        ((tmp_path / "none", "--weights", weights, "--out", tmp_path / "out"), "1 of 1 pictures skipped"),
    ):
        done = run("detect", *arguments)
        assert done.exit_code != 0 and message in done.stderr.replace("\n", " "), done.stderr
