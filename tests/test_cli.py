"""The command line as scripts and people see it: exit status, what is on stdout, what on stderr."""

import csv
import dataclasses
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import mnv2_fused
from mnv2_fused import benchmark, cli_demo, cli_pictures, digits, images
from mnv2_fused.cli import app
from mnv2_fused.weights import random_model

KERNELS = [kernel for kernel in mnv2_fused.kernels() if kernel.dtype == torch.float32]


def run(*args, status=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == status, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures, one of them deeper; weights of 10 classes; their labels."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "pictures" / "deep").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.jpg", "deep/c.webp")):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), np.uint8)
        Image.fromarray(pixels).resize((300, 200)).save(folder / "pictures" / name)
    files = images.find_images([folder], recursive=True)
    inputs = np.stack([images.preprocess(images.read_image(path)) for path in files])
    # As initialised, all ten classes would have 10%
    model = random_model(torch.from_numpy(inputs), num_classes=10, width_mult=0.35)
    torch.save(model.state_dict(), folder / "weights.pth")
    (folder / "labels.txt").write_text("".join(f"thing {i}\n" for i in range(10)))
    return folder


# ---- the command itself


def test_help_lists_the_commands():
    text = run("--help").stdout
    assert all(command in text for command in ("info", "bench", "classify", "demo"))
    for command in ("info", "bench", "classify", "demo"):
        assert "--" in run(command, "-h").stdout
    assert "mnv2-fused[demo]" in run("demo", "-h").stdout


def test_version():
    assert run("--version").stdout == f"mnv2-fused {mnv2_fused.__version__}\n"


# ---- info


def test_info_json():
    report = json.loads(run("info", "--json").stdout)
    assert report["versions"]["mnv2_fused"] == mnv2_fused.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert [row["name"] for row in report["kernels"]] == [kernel.name for kernel in mnv2_fused.kernels()]
    assert report["selected"]["float32"] == mnv2_fused.selected_kernel()
    assert report["cpu"]["name"] and report["build"]


def test_info_table():
    text = run("info").stdout
    assert all(kernel.name in text for kernel in mnv2_fused.kernels())
    assert torch.__version__ in text


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_info_with_a_forced_kernel(monkeypatch, kernel):
    monkeypatch.setenv("MNV2_FUSED_KERNEL", kernel.name)
    report = json.loads(run("info", "--json", status=0 if kernel.supported else 1).stdout)
    assert report["override"] == kernel.name
    name = str(kernel.dtype).removeprefix("torch.")
    others = dict.fromkeys({"float32", "float64", "bfloat16", "int8"} - {name})
    assert report["selected"] == {name: kernel.name if kernel.supported else None, **others}
    assert report["errors"].keys() >= others.keys()


def test_info_with_an_impossible_kernel(monkeypatch):
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "avx9000_f32")
    result = run("info", status=1)
    assert "avx2_f32" in result.stdout
    assert result.stderr.startswith("error: ") and "avx9000_f32" in result.stderr and result.stderr.count("\n") == 1


# ---- classify


def test_classify_json_is_what_the_model_says(folder):
    result = run("classify", folder / "pictures", "--weights", folder / "weights.pth", "--json", "--topk", 3)
    report = json.loads(result.stdout)
    assert result.stderr == "" and report["skipped"] == []
    assert [os.path.basename(entry["path"]) for entry in report["results"]] == ["a.jpg", "b.png"]
    model = mnv2_fused.MobileNetV2(num_classes=10, width_mult=0.35).eval()
    model.load_state_dict(torch.load(folder / "weights.pth"))
    for entry in report["results"]:
        pixels = images.preprocess(images.read_image(entry["path"]), 256, 224)
        with torch.inference_mode():
            probabilities, classes = model(torch.from_numpy(pixels)[None])[0].double().softmax(0).topk(3)
        assert [top["class"] for top in entry["top"]] == classes.tolist()
        assert [top["probability"] for top in entry["top"]] == probabilities.tolist()
        assert [top["label"] for top in entry["top"]] == [None] * 3


def test_results_do_not_depend_on_the_batch(folder):
    torch.set_num_threads(3)  # as many pictures are read at once
    args = ("classify", folder / "pictures", "-r", "--weights", folder / "weights.pth", "--json", "--batch-size")
    assert run(*args, 1).stdout == run(*args, 2).stdout == run(*args, 3).stdout


def test_classify_csv(folder):
    args = ("--weights", folder / "weights.pth", "--labels", folder / "labels.txt", "--csv", "--topk", 2)
    rows = list(csv.DictReader(io.StringIO(run("classify", folder / "pictures", "--recursive", *args).stdout)))
    assert [os.path.basename(row["path"]) for row in rows] == ["a.jpg"] * 2 + ["b.png"] * 2 + ["c.webp"] * 2
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    assert all(row["label"] == f"thing {row['class']}" and 0 < float(row["probability"]) < 1 for row in rows)


def test_classify_for_people(folder):
    text = run("classify", folder / "pictures" / "b.png", "--weights", folder / "weights.pth").stdout
    assert "b.png" in text and text.count("class ") == 5 and text.count("%") == 5
    named = run(
        "classify",
        folder / "pictures" / "b.png",
        "--weights",
        folder / "weights.pth",
        "--labels",
        folder / "labels.txt",
    ).stdout
    assert named.count("thing ") == 5


def test_unreadable_pictures_are_skipped(folder, tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("not a picture")
    whole = (folder / "pictures" / "a.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "whole.jpg").write_bytes(whole)
    args = ("classify", tmp_path, tmp_path / "missing.jpg", "--weights", folder / "weights.pth")
    result = run(*args, "--json", status=1)
    report = json.loads(result.stdout)
    assert [os.path.basename(entry["path"]) for entry in report["results"]] == ["whole.jpg"]
    skipped = {os.path.basename(entry["path"]): entry["error"] for entry in report["skipped"]}
    assert set(skipped) == {"empty.jpg", "half.jpg", "missing.jpg", "text.png"}
    lines = result.stderr.splitlines()
    assert len(lines) == 5 and all(line.startswith("skipped ") for line in lines[:4])
    assert lines[4] == "error: 4 of 5 pictures skipped"
    assert run(*args, "--csv", status=1).stdout.count("\n") == 6


def test_all_pictures_unreadable(folder, tmp_path):
    (tmp_path / "empty.jpg").touch()
    result = run("classify", tmp_path, "--weights", folder / "weights.pth", "--json", status=1)
    assert json.loads(result.stdout)["results"] == []


@pytest.mark.parametrize(
    "args, words",
    [
        (["{}/pictures"], ["no weights", "--weights FILE", "--weights torchvision"]),
        (["{}", "--weights", "{}/weights.pth"], ["no pictures in", "--recursive"]),
        (["{}/pictures", "--weights", "{}/nothing.pth"], ["nothing.pth", "no such file"]),
        (["{}/pictures", "--weights", "{}/labels.txt"], ["labels.txt", "expected .pth, .pt, .bin or .safetensors"]),
        (["{}/pictures", "--weights", "{}/weights.pth", "--labels", "{}/nothing"], ["nothing", "cannot read"]),
        (["{}/pictures", "--weights", "{}/weights.pth", "--labels", "{}/weights.pth"], ["cannot read the labels"]),
        (["{}/pictures", "--weights", "{}/weights.pth", "--labels", "{}/short.txt"], ["2 labels", "10 classes"]),
        (["{}/pictures", "--weights", "{}/weights.pth", "--topk", "11"], ["--topk 11", "10 classes"]),
        (["{}/pictures", "--weights", "{}/weights.pth", "--json", "--csv"], ["exclude each other"]),
        (["{}/pictures", "--weights", "{}/weights.pth", "--resize", "100"], ["--resize", "--crop (224)"]),
        (["{}/pictures", "--weights", "{}/grey.pth"], ["grey.pth", "1 channels"]),
    ],
)
def test_what_classify_cannot_do_is_one_line(folder, args, words):
    (folder / "short.txt").write_text("a\nb\n")
    torch.save(mnv2_fused.MobileNetV2(width_mult=0.35, in_channels=1).state_dict(), folder / "grey.pth")
    result = run("classify", *(arg.format(folder) for arg in args), status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_classify_with_an_impossible_kernel(folder, monkeypatch):
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "avx9000_f32")
    result = run("classify", folder / "pictures", "--weights", folder / "weights.pth", status=2)
    assert result.stdout == "" and "avx9000_f32" in result.stderr


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_weights_file_does_not_run(folder, tmp_path):
    torch.save({"state_dict": Attack(tmp_path / "ran")}, tmp_path / "a.pth")
    result = run("classify", folder / "pictures", "--weights", tmp_path / "a.pth", status=2)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and "refused" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_weights_that_overflow_are_reported_not_printed_as_nan(folder, tmp_path):
    model = mnv2_fused.MobileNetV2(num_classes=10, width_mult=0.35)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 3e38)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    result = run("classify", folder / "pictures", "--weights", tmp_path / "a.pth", "--json", status=1)
    assert [entry["error"].split(":")[0] for entry in json.loads(result.stdout)["skipped"]] == [
        "the network's output is not finite"
    ] * 2


def test_hostile_names_do_not_reach_the_terminal(folder, tmp_path):
    name = tmp_path / "a\x1b[31m[red]\n.png"
    name.write_bytes((folder / "pictures" / "b.png").read_bytes())
    (tmp_path / "b\x1b[31m.png").touch()
    args = ("classify", tmp_path, "--weights", folder / "weights.pth")
    result = run(*args, status=1)
    assert "\x1b" not in result.stdout + result.stderr and "[red]" in result.stdout
    assert json.loads(run(*args, "--json", status=1).stdout)["results"][0]["path"] == str(name)
    assert next(csv.DictReader(io.StringIO(run(*args, "--csv", status=1).stdout, newline="")))["path"] == str(name)


def test_an_interrupt_keeps_what_is_done(folder, monkeypatch):
    predict = cli_pictures._predict

    def interrupted(*args):
        yield next(predict(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_pictures, "_predict", interrupted)
    result = run("classify", folder / "pictures", "--weights", folder / "weights.pth", "--json", status=130)
    assert len(json.loads(result.stdout)["results"]) == 1
    assert "interrupted after 1 of 2" in result.stderr


# ---- bench; what it measures is tested with benchmark.py


@pytest.fixture
def measured(monkeypatch):
    """benchmark.run replaced: keeps the options it was given, answers at once."""

    def run(options, model=None, images=None, progress=None):
        result.options = options
        progress(0.5, "half way")
        return result

    rows = [
        benchmark.Row("fused", "1", relative_error=1e-6, ms=2.5, q1_ms=2.0, q3_ms=3.0, calls=9, slower=1.0, gmacs=9.9),
        benchmark.Row("eager", "2", relative_error=1e-6, ms=5.0, q1_ms=4.0, q3_ms=6.0, calls=9, slower=2.0, gmacs=4.9),
    ]
    result = benchmark.Result(benchmark.Options(), rows, macs=300_000_000, peak_kernel="avx2_f32", peak_gmacs=50.0)
    monkeypatch.setattr(benchmark, "run", run)
    return result


def test_bench_passes_its_options_on(measured):
    args = "--batch 2 --threads 1 --width 0.5 --resolution 64 --kernel scalar_f32 --seconds 3 --peers".split()
    args += ["--runner", "fused", "--runner", "eager", "--dtype", "float32"]
    report = json.loads(run("bench", *args, "--json").stdout)
    options = benchmark.Options(2, 1, 0.5, 64, "scalar_f32", True, ("fused", "eager"), seconds=3.0)
    assert measured.options == options
    assert [row["name"] for row in report["rows"]] == ["fused", "eager"] and report["rows"][0]["ms"] == 2.5


def test_bench_table_and_plot(measured, tmp_path):
    result = run("bench", "--plot", tmp_path / "a.png")
    assert all(text in result.stdout for text in ("fused", "2.50", "eager", "5.00"))
    assert Image.open(tmp_path / "a.png").width > 100
    assert "a.png" in result.stderr


def test_bench_with_a_failed_runner(measured):
    measured.rows[1] = benchmark.Row("eager", "2", error="its logits are off")
    result = run("bench", status=1)
    assert "its logits are off" in result.stdout and "not timed: eager" in result.stderr


@pytest.mark.parametrize(
    "args, word",
    [
        (["--kernel", "avx9000_f32"], "avx9000_f32"),
        (["--kernel", "scalar_f64"], "scalar_f64"),
        (["--runner", "lazy"], "lazy"),
        (["--dtype", "float16"], "dtype must be one of ['float32', 'bfloat16', 'int8'], got 'float16'"),
        (["--dtype", "int8", "--train"], "int8 does not train"),
        (["--dtype", "int8", "--network", "ssdlite"], "int8 is of mobilenet_v2 and mobilenet_v1 only"),
        (["--dtype", "bfloat16", "--kernel", "avx2_f32"], "avx2_bf16"),
        (["--dtype", "bfloat16", "--runner", "onnxruntime"], "it has no bfloat16 convolutions on the CPU"),
        (["--plot", "nowhere/a.png"], "a folder that exists"),
        (["--plot", "a.xyz"], "a.xyz"),
    ],
)
def test_what_bench_cannot_do_is_one_line(args, word):
    result = run("bench", *args, status=2)
    assert result.stdout == "" and word in result.stderr and result.stderr.count("\n") == 1


# ---- demo digits; the training is tested with digits.py


@pytest.mark.parametrize(
    "epochs", [pytest.param(["--epochs", 8], id="half"), pytest.param([], id="all", marks=pytest.mark.exhaustive)]
)
def test_demo_digits(tmp_path, epochs):
    """The whole of it; after half the epochs already the test accuracy is a point above what it is to be."""
    result = run("demo", *epochs, "--plot", tmp_path / "demo.png")
    assert "runs as one op" in result.stdout and "plain PyTorch" not in result.stdout
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 100  # digits, not a blank


@pytest.mark.exhaustive  # a minute on one core
def test_demo_digits_compared_and_too_short(tmp_path):
    result = run("demo", "digits", "--compare", "--epochs", 1, "--seed", 3, "--plot", tmp_path / "demo.svg", status=1)
    assert "fused and plain training agree: over the first 21 steps" in result.stdout
    assert all(text in result.stdout for text in ("21 steps of 64 images", "seed 3", "1 thread"))
    wrote, error = result.stderr.splitlines()
    assert "demo.svg" in wrote and error.startswith("error: the test accuracy of fused is ") and "below 97%" in error


@pytest.fixture
def trained(monkeypatch):
    """digits.measure replaced: keeps the options it was given, answers at once."""

    def measure(options, progress):
        trained.append(options)
        progress(digits.Step(1, 2, 1, 2.3, 0.1))
        losses = [2.0 - i / 100 + (1e-4 if options.nudged else 0) for i in range(options.steps or 100)]
        labels = digits.digits().test_labels.tolist()
        return digits.Run(digits.Training(losses, 0.99, 1.5), 3.0, labels, {}, "", 1e-7)

    trained = []
    monkeypatch.setattr(digits, "measure", measure)
    return trained


def test_demo_digits_passes_its_options_on(trained, tmp_path):
    args = "--compare --epochs 2 --seed 4 --threads 3".split()
    shown = run("demo", *args, "--plot", tmp_path / "demo.pdf")
    fused, plain, yardstick = trained
    assert fused == digits.Options(epochs=2, seed=4, threads=3)
    assert plain == digits.Options(fused=False, epochs=2, seed=4, threads=3)
    assert yardstick == digits.Options(fused=False, nudged=True, epochs=2, seed=4, threads=3, steps=50)
    assert shown.stdout.count("99.00%") == 2


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"training": digits.Training([3.0] * 100, 0.99, 1.5)}, "losses of fused and plain training disagree"),
        ({"training": digits.Training([2.0] * 100, 0.96, 1.5)}, "test accuracy of fused is 96.0%, below 97%"),
        ({"why_not_fused": "it is odd"}, "did not run as one op"),
        ({"unfused": {"features.3": "it is odd"}}, "features.3 trained layer by layer: it is odd"),
        ({"eval_error": float("nan")}, "did not run as one op"),
    ],
)
def test_demo_digits_notices(trained, tmp_path, monkeypatch, wrong, words):
    measure = digits.measure

    def faulty(options, progress):
        found = measure(options, progress)
        return dataclasses.replace(found, **wrong) if options.fused else found

    monkeypatch.setattr(digits, "measure", faulty)
    monkeypatch.setattr(cli_demo, "_draw_training", lambda *_: Figure())  # a second each, and not the point
    result = run("demo", "--compare", "--plot", tmp_path / "demo.png", status=1)
    assert words in result.stderr and result.stderr.count("error: ") == 1


def test_demo_digits_whose_process_fails(monkeypatch, tmp_path):
    def measure(options, progress):
        raise digits.TrainingFailed("its process ended with exit code -11")

    monkeypatch.setattr(digits, "measure", measure)
    result = run("demo", "--plot", tmp_path / "demo.png", status=1)
    assert result.stderr == "error: training (fused) failed: its process ended with exit code -11\n"


# ---- demo photographs


def test_demo_photographs(tmp_path, monkeypatch):
    """The whole of it, but for the seconds of timing."""
    monkeypatch.setattr(cli_demo, "DEMO_SECONDS", 0.0)
    result = run("demo", "photographs", "--plot", tmp_path / "demo.png")
    assert "plain PyTorch agree" in result.stdout and "Random weights" in result.stderr
    assert all(text in result.stdout for text in ("china.jpg", "flower.jpg", "eager channels_last"))
    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 1000  # photographs, not a blank


def test_demo_photographs_with_weights_and_labels(folder, tmp_path, measured):
    (tmp_path / "labels.txt").write_text("".join(f"$thing [b]{i}\n" for i in range(10)))  # TeX and markup, if taken so
    args = ("--weights", folder / "weights.pth", "--labels", tmp_path / "labels.txt", "--plot", tmp_path / "demo.svg")
    measured.rows[0].memory_mb = 3.0
    shown = run("demo", "photographs", *args)
    assert shown.stdout.count("$thing [b]") == 20 and "Random" not in shown.stderr
    assert measured.options.width == 0.35
    assert (tmp_path / "demo.svg").read_text().count("<svg") == 1


def test_demo_photographs_notices_a_disagreement(tmp_path, measured, monkeypatch):
    monkeypatch.setattr(cli_demo, "TOLERANCE", -1.0)
    monkeypatch.setattr(cli_demo, "_draw", lambda *_: Figure())
    result = run("demo", "photographs", "--plot", tmp_path / "demo.png", status=1)
    assert "DISAGREE" in result.stdout and "disagree" in result.stderr


# ---- either demo


@pytest.mark.parametrize("subject", ["digits", "photographs"])
@pytest.mark.parametrize("module", ["sklearn.datasets", "matplotlib.figure"])
def test_a_missing_extra_is_one_line(monkeypatch, module, subject):
    monkeypatch.setitem(sys.modules, module, None)
    result = run("demo", subject, status=2)
    assert "pip install 'mnv2-fused[demo]'" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (["--plot", "nowhere/demo.png"], "a folder that exists"),
        (["photographs", "--plot", "nowhere/demo.png"], "a folder that exists"),
        (["photographs", "--compare", "--seed", "0"], "--compare, --seed: not for the demo of photographs"),
        (["--weights", "random"], "--weights: not for the demo of digits"),
    ],
)
def test_what_demo_cannot_do_is_one_line(args, words):
    result = run("demo", *args, status=2)
    assert words in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize("subject", ["digits", "photographs"])
def test_demo_with_an_impossible_kernel(monkeypatch, tmp_path, subject):
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "avx9000_f32")
    result = run("demo", subject, "--plot", tmp_path / "demo.png", status=2)
    assert result.stdout == "" and "avx9000_f32" in result.stderr


# ---- as a process


def process(*args, **kwargs):
    command = [sys.executable, "-c", "from mnv2_fused.cli import app; app()", *map(str, args)]
    here = os.path.dirname(__file__)  # not the root of the tree, whose package may be one without its extension
    return subprocess.run(command, capture_output=True, timeout=120, cwd=here, **kwargs)


def test_streams_of_a_process(folder, tmp_path):
    (tmp_path / "broken.png").touch()
    name = os.fsencode(tmp_path) + b"/\xff\xfe.png"  # not UTF-8
    with open(name, "wb") as file:
        file.write((folder / "pictures" / "b.png").read_bytes())
    result = process("classify", tmp_path, "--weights", folder / "weights.pth", "--json")
    assert result.returncode == 1
    assert os.fsencode(json.loads(result.stdout)["results"][0]["path"]) == name
    assert result.stderr.decode().splitlines()[-1] == "error: 1 of 2 pictures skipped"
