"""The engine of `mnv2-fused bench`, its tasks, and the runners of peers.py: each computes the logits, or a step."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import mnv2_fused
from mnv2_fused import benchmark, cli, peers, tasks
from mnv2_fused.benchmark import Options, Row
from mnv2_fused.weights import random_model

TRAINERS = {runner.name: runner for runner in peers.TRAINERS}
TORCH_RUNNERS = ("fused", "eager", "eager channels_last")
COMPILE = "torch.compile"
SMALL = dict(width=0.35, resolution=32, threads=1, seconds=0.0)


class _Says:
    """In place of a worker: gives this answer."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def ask(self, command: str) -> tuple[Any, str]:
        return self.answer, ""


@pytest.fixture(scope="module")
def small() -> tuple[mnv2_fused.MobileNetV2, torch.Tensor]:
    """A narrow network, and two images whose sizes are odd and even, and differ."""
    generator = torch.Generator().manual_seed(1)
    model = random_model(torch.randn(8, 3, 64, 64, generator=generator), width_mult=0.35, num_classes=20)
    return model, torch.randn(2, 3, 65, 38, generator=generator)


@pytest.fixture(scope="module")
def result() -> benchmark.Result:
    fractions: list[float] = []
    options = Options(**SMALL, batch=2, rounds=3, runners=TORCH_RUNNERS, memory=False)
    result = benchmark.run(options, progress=lambda fraction, description: fractions.append(fraction))
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    return result


# ---- runners


@pytest.mark.parametrize("runner", peers.RUNNERS, ids=lambda runner: runner.name)
def test_runner_computes_the_logits(runner, small):
    model, images = small
    if reason := runner.missing(model):
        pytest.skip(f"{runner.name} {reason}")
    expected, _ = tasks.Inference.exact(model, (images,))
    x = runner.input(images)
    logits = torch.as_tensor(runner.prepare(model, x, 1)(x))
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    error = (logits.double() - expected).norm() / expected.norm()
    assert error < 2e-5, f"{runner.name} is off by {error:.1e} (relative norm)"
    # Every image on its own: a mistake in one row of a batch is not lost in the norm of all.
    errors = (logits.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert (errors < 2e-5).all(), errors
    assert model.fused and not any(module.training for module in model.modules())
    assert not torch._inductor.config.freezing  # the flag that torch.compile's runner sets is for itself alone


ROUNDED = [  # float32's are above
    pytest.param(runner, dtype, id=f"{dtype} {runner.name}", marks=[pytest.mark.exhaustive] * (runner.name == COMPILE))
    for dtype in ("bfloat16", "int8")
    for runner in peers.RUNNERS_IN[dtype]
]


@pytest.fixture(scope="module")
def tame() -> tuple[mnv2_fused.MobileNetV2, torch.Tensor, torch.Tensor]:
    """A narrow network that bears rounding, two images of odd and even sizes, and others to calibrate it on."""
    generator = torch.Generator().manual_seed(1)
    like = torch.randn(8, 3, 64, 64, generator=generator)
    model = random_model(like, width_mult=0.35, num_classes=20, shift=benchmark.SHIFT)
    return model, torch.randn(2, 3, 65, 38, generator=generator), like


@pytest.fixture(scope="module")
def references(tame) -> dict[str, tuple[Any, tasks.Exact]]:
    """By dtype what runners are given, and what their results are compared with."""
    model, images, like = tame
    found = {}
    for dtype in benchmark.DTYPES:
        given, batch = tasks.Inference.inputs(model, images, dtype, like)
        found[dtype] = given, tasks.Inference.reference(model, given, batch, dtype)[0]
    return found


@pytest.mark.parametrize("runner, dtype", ROUNDED)
def test_runner_computes_rounded_logits(runner, dtype, tame, references):
    """Of float32 images, within what rounding makes of this network, and not by float32."""
    model, images, _ = tame
    given, exact = references[dtype]
    if reason := runner.missing(given):
        assert runner.unable or "pip install" in reason
        pytest.skip(f"{runner.name} {reason}")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    row = Row(runner.name, "1")
    tasks.Inference.verify(row, _Says(tasks.Inference(runner, given, (images,), 1, False, dtype).answer()), exact)
    assert row.error == "" and 1e-3 < row.relative_error < exact.tolerance
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_precisions_have_the_same_runners():
    names = [runner.name for runner in peers.RUNNERS]
    for dtype in benchmark.DTYPES:
        assert [runner.name for runner in peers.RUNNERS_IN[dtype]] == names
        assert all((runner.prepare is None) == bool(runner.unable) for runner in peers.RUNNERS_IN[dtype])


def test_int8_description_is_the_fused_networks(tame, references):
    """Its integers and scales stand for the float32 weights, to half a step; and every range is somebody's.

    Both fold BatchNorm, in float32 and not in the same order of work: 4 units in the last place of each value.
    """
    model, _, _ = tame
    quantized = references["int8"][0]
    exact, found = peers.describe(model), peers.describe_quantized(quantized)
    x = found.image
    for a, b in zip((*exact.layers, exact), (*found.layers, found), strict=True):
        scale = b.scale.reshape(-1, *[1] * (a.weight.ndim - 1))
        assert b.weight.dtype == np.int8 and b.bias.dtype == np.int32
        for integers, step, value in (b.weight, scale, a.weight), (b.bias, b.scale * x.scale, a.bias):
            off = np.abs(np.float64(step) * integers - value) - step / 2
            assert np.all(off <= 4 * np.finfo(np.float32).eps * np.abs(value)), (off / np.abs(value)).max()
        if isinstance(a, peers.Layer):
            assert a[2:6] == b[2:6] and (b.summand is None) == (a.residual is None)
            assert not b.relu6 or (b.rounded.zero_point == 0 and 255 * b.rounded.scale <= 6)
            x = b.rounded
        if b is found.layers[-1]:
            x = found.mean


@pytest.mark.parametrize("dtype", benchmark.DTYPES)
@pytest.mark.parametrize("wrong", ["shortcut", "stride", "weights", "channel"])
def test_another_network_is_not_timed_in_any_precision(dtype, wrong, tame, references):
    """The plain network with one mistake, in float32: what rounding would add is not needed."""
    model, images, _ = tame
    model = copy.deepcopy(model)
    model.fused = False
    if wrong == "shortcut":
        model.features[9].use_res_connect = False
    elif wrong == "stride":  # TensorFlow's padding: (0, 1) instead of (1, 1)
        conv = model.features[0][0]
        conv.padding = (0, 0)
        model.features[0].insert(0, torch.nn.ZeroPad2d((0, 1, 0, 1)))
    elif wrong == "weights":
        with torch.no_grad():
            model.features[12].conv[1][0].weight.copy_(model.features[12].conv[1][0].weight.flip(0))
    else:
        with torch.no_grad():
            model.classifier[-1].weight.copy_(model.classifier[-1].weight.roll(1, 0))
    with torch.no_grad():
        row = Row("wrong", "1")
        tasks.Inference.verify(row, _Says(model(images)), references[dtype][1])
    assert "off by" in row.error and row.error.endswith("not timed"), row.relative_error


def test_what_rounds_too_badly_is_not_accepted(small):
    """Where the network bears no rounding: an error of half the logits' norm is too much for any runner."""
    model, images = small
    given, batch = tasks.Inference.inputs(model, images, "int8", images)
    exact, _ = tasks.Inference.reference(model, given, batch, "int8")
    assert exact.tolerance == tasks.WRONG


def test_fused_runner_refuses_a_model_that_would_not_run_fused(small):
    model, images = small
    with pytest.raises(RuntimeError, match="would not run fused: .*float64"):
        peers.RUNNERS[0].prepare(model, images.double(), 1)


def test_description_covers_all_weights(small):
    model, _ = small
    network = peers.describe(model)
    convs = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [layer.weight.shape for layer in network.layers] == [tuple(conv.weight.shape) for conv in convs]
    shortcuts = sum(getattr(module, "use_res_connect", False) for module in model.modules())
    assert sum(layer.residual is not None for layer in network.layers) == shortcuts == 10


def test_importing_the_benchmark_imports_no_peer():
    code = "import sys, mnv2_fused.benchmark; print({'onnx', 'onnxruntime', 'openvino', 'ncnn'} & {*sys.modules})"
    here = Path(__file__).parent  # not the root of the tree, whose package may be one without its extension
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here).stdout
    assert said.strip() == "set()"


@pytest.mark.parametrize("network", ["mobilenet_v1", "ssdlite", "deeplabv3"])
@pytest.mark.parametrize("runner", peers.RUNNERS, ids=lambda runner: runner.name)
def test_runner_computes_other_networks(runner, network):
    """Every output of every runner, whichever order or layout it prefers; those that have no graph say so."""
    generator = torch.Generator().manual_seed(3)
    make = tasks.NETWORKS[network].make
    model = random_model(torch.randn(8, 3, 64, 64, generator=generator), network=make, width_mult=0.35)
    if reason := runner.missing(model):
        assert runner.name in ("litert", "ncnn") or "pip install" in reason
        pytest.skip(f"{runner.name} {reason}")
    if runner.name == "torch.compile":
        pytest.skip("compiling each takes half a minute: the benchmark itself verifies it before it is timed")
    images = torch.randn(1, 3, 65, 65, generator=generator)
    expected, macs = tasks.Inference.exact(model, (images,))
    found = tasks.Inference(runner, model, (images,), 1, spare=False).answer()
    assert macs > 0 and found.dtype == torch.float32 and found.shape == expected.shape
    error = ((found.double() - expected).norm() / expected.norm()).item()
    assert error < 1e-4, f"{runner.name} is off by {error:.1e} (relative norm)"


def test_networks_are_the_papers():
    """Parameters and multiply-adds at the size that each is timed at."""
    found = {}
    for name, network in tasks.NETWORKS.items():
        model = network.make(width_mult=1.0).eval()
        model.fused = False
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            model.to("meta")(torch.empty(1, 3, network.resolution, network.resolution))
        found[name] = (sum(p.numel() for p in model.parameters()), round(counter.get_total_flops() / 2e6, 1))
    assert found == {
        "mobilenet_v2": (3_504_872, 300.8),
        "mobilenet_v1": (4_231_976, 568.7),
        "ssdlite": (4_337_013, 788.8),
        "deeplabv3": (2_113_557, 2740.7),
    }


# ---- the engine


def test_rows(result):
    assert [row.name for row in result.rows] == list(TORCH_RUNNERS)
    for row in result.rows:
        assert row.error == "" and 0 < row.relative_error < 2e-5
        assert 0 < row.q1_ms <= row.ms <= row.q3_ms
        assert row.calls >= result.rounds == 3
        assert row.gmacs == pytest.approx(result.macs / (row.ms * 1e-3) / 1e9)
        assert row.share_of_peak == pytest.approx(row.gmacs / result.peak_gmacs)
        assert row.slower == pytest.approx(row.ms / result["fused"].ms)
        assert row.memory_mb is None and row.resident_mb is None
    assert result["fused"].version.split() == [mnv2_fused.__version__, mnv2_fused.selected_kernel()]


def test_multiply_adds_are_the_papers():
    model = random_model(torch.randn(2, 3, 64, 64))
    logits, macs = tasks.Inference.exact(model, (torch.zeros(2, 3, 224, 224),))
    assert logits.dtype == torch.float64 and round(macs / 1e6, 2) == 300.77  # per image


def test_exact_results_leave_the_threads_as_they_were(small):
    model, images = small
    torch.set_num_threads(2)
    tasks.Inference.exact(model, (images,))
    assert torch.get_num_threads() == 2


def test_memory_is_counted_beside_input_and_the_small_image():
    row = Row("any", "1")
    tasks.Inference.measure_memory(row, _Says((90_000_000, 20_000_000)), _Says((50_000_000, 5_000_000)))
    assert (row.resident_mb, row.memory_mb, row.error) == (90, 25, "")


def test_dictionary_is_json(result):
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["options"] | SMALL == report["options"]
    assert report["options"]["kernel"] == mnv2_fused.selected_kernel()
    assert {"machine", "system", "versions", "macs_per_image", "fma_peak", "rounds", "left_out"} <= {*report}
    assert [row["name"] for row in report["rows"]] == list(TORCH_RUNNERS)
    assert report["rows"][0]["ms"] == result["fused"].ms


def test_table(result):
    console = Console(file=io.StringIO(), width=160)
    console.print(result.table())
    text = console.file.getvalue()
    assert "MobileNetV2 0.35/32, float32, batch 2, 1 thread" in text and "FMA peak" in text
    assert all(name in text for name in TORCH_RUNNERS) and f"{result['eager'].ms:.2f}" in text


class _Turns:
    """In place of a worker: the seconds of the calls of each turn, then an error."""

    def __init__(self, name: str, turns: list[list[float]], asked: list[str]) -> None:
        self.name, self.turns, self.asked = name, turns, asked

    def ask(self, command: str) -> tuple[Any, str]:
        assert command == "time"
        self.asked.append(self.name)
        return (self.turns.pop(0), "") if self.turns else (None, "its process ended")


def test_times_are_medians_and_quartiles_of_all_calls(monkeypatch):
    peaks = [100.0, 300.0, 110.0, 120.0]
    monkeypatch.setattr(benchmark, "fma_peak", lambda kernel, threads: peaks.pop(0))
    options = Options(batch=2, threads=1, seconds=0.0, rounds=3)
    fused, eager = Row("fused", "1"), Row("eager", "1")
    result = benchmark.Result(options, [fused, eager], 300_000_000, "scalar_f32")
    asked: list[str] = []
    turns = _Turns("fused", [[0.001, 0.010], [0.003, 0.004], [0.002]], asked), _Turns("eager", [[0.006]], asked)
    told: list[float] = []
    benchmark._time(result, [*zip(result.rows, turns, strict=True)], told.append)
    assert (fused.q1_ms, fused.ms, fused.q3_ms, fused.calls) == pytest.approx((1.0, 1.5, 2.0, 5))
    assert fused.images_per_second == pytest.approx(1e3 / 1.5)
    assert result.peak_gmacs == 115 and not peaks and result.rounds == 3
    assert fused.gmacs == pytest.approx(200) and fused.share_of_peak == pytest.approx(200 / 115)
    assert eager.error == "its process ended" and eager.ms is None and asked.count("eager") == 2
    assert told == pytest.approx([1 / 3, 2 / 3, 1])


def test_the_order_of_turns_changes():
    asked: list[str] = []
    rows = [Row(name, "1") for name in "abc"]
    timed = [(row, _Turns(row.name, [[0.1]] * 20, asked)) for row in rows]
    result = benchmark.Result(Options(threads=1, seconds=0.0, rounds=20), rows, None, "scalar_f32")
    benchmark._time(result, timed, lambda fraction: None)
    rounds = {"".join(asked[i : i + 3]) for i in range(0, 60, 3)}
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(rounds) > 3


def test_a_turn_does_not_count_its_first_call(monkeypatch):
    monkeypatch.setattr(benchmark, "TURN_SECONDS", 0.0)
    clock = iter([0.0, 0.0, 5.0, 6.0])  # the end of the turn, a call's start and end, a look at the clock
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    called: list[int] = []
    assert benchmark._turn(lambda: called.append(1)) == [5.0] and len(called) == 2


def test_rows_are_compared_with_what_was_measured():
    def row(name: str, ms: float | None, memory_mb: float | None) -> Row:
        return Row(name, "1", ms=ms, memory_mb=memory_mb)

    for fused, other, found in (
        (row("fused", 2.0, 4.0), row("eager", 3.0, 6.0), (1.5, 1.5)),
        (row("fused", 2.0, -0.5), row("eager", 3.0, 6.0), (1.5, None)),
        (row("fused", 2.0, 4.0), row("eager", None, None), (None, None)),
        (row("fused", None, 4.0), row("eager", 3.0, 6.0), (None, None)),
    ):
        benchmark._compare([fused, other])
        assert (other.slower, other.heavier) == found


def test_times_that_spread_are_remarked():
    said = []
    for q3 in (1.2, 1.3):
        row = Row("fused", "1", ms=1.1, q1_ms=1.0, q3_ms=q3)
        console = Console(file=io.StringIO(), width=160)
        console.print(benchmark.Result(Options(threads=1), [row], None, "scalar_f32").table())
        said.append("spread widely" in console.file.getvalue())
    assert said == [False, True]


def test_the_peak_is_of_all_threads(monkeypatch):
    monkeypatch.setattr(benchmark, "_C", SimpleNamespace(fma_peak=lambda kernel, seconds: 7.0))
    assert benchmark.fma_peak("scalar_f32", 3) == 21


def test_a_forced_kernel_computes(small, monkeypatch):
    """A worker's numbers are those of the row, to the bit."""
    model, images = small
    options = benchmark._complete(Options(**SMALL, memory=False, kernel="scalar_f32"))
    with benchmark._workers(list(peers.RUNNERS[:1]), options, model, (images,)) as ((worker,), _):
        assert worker.error() == ""
        found, _ = worker.ask("answer")
    with torch.no_grad():
        usual = model(images)
        monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_f32")
        assert torch.equal(found, model(images))
    assert mnv2_fused.kernels()[0].supported is False or not torch.equal(found, usual)


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plot(result, tmp_path, suffix, start):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{suffix}"
    result.plot(path)
    assert path.read_bytes().startswith(start)


def test_plot_in_an_unknown_format_is_refused(result, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nonsense"):
        result.plot(tmp_path / "plot.nonsense")


def test_given_model_and_images_are_used_and_left_as_they_were(small):
    model, images = small
    images = images[:1, :, :32, :32]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = benchmark.run(Options(**SMALL, rounds=1, runners=("fused",), memory=False), model, images)
    assert result["fused"].error == "" and model.fused
    assert result.macs == tasks.Inference.exact(model, (images,))[1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"images must be float32 \[1, 3, 32, 32\], got .* \[2, 3, 32, 32\]"):
        benchmark.run(Options(**SMALL), model, images.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="images must be float32 .*, got torch.float64"):
        benchmark.run(Options(**SMALL), model, images.double())


def test_another_network_is_timed_at_its_own_size():
    options = Options(threads=1, seconds=0.0, rounds=1, runners=("fused", "eager"), memory=False, network="ssdlite")
    options = dataclasses.replace(options, width=0.35)
    result = benchmark.run(options)
    assert [row.error for row in result.rows] == ["", ""] and all(row.ms > 0 for row in result.rows)
    assert result.title == "SSDLite 0.35/320, float32, batch 1, 1 thread"


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_precision(dtype):
    """From options to rows: the kernel and the peak are of the precision, and so is what is accepted."""
    result = benchmark.run(Options(**SMALL, rounds=1, runners=("fused",), memory=False, dtype=dtype))
    kernel = mnv2_fused.selected_kernel(getattr(torch, dtype))
    assert result["fused"].error == "" and result["fused"].version.endswith(kernel)
    assert result.peak_kernel == benchmark.best_kernel(getattr(torch, dtype)) and result.peak_gmacs > 0
    assert 0 < result["fused"].relative_error < result.tolerance < tasks.WRONG
    assert dtype in result.title and json.loads(json.dumps(result.to_dict()))["tolerance"] == result.tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_mobilenet_v1_in_other_precisions(dtype):
    runners = [runner for runner in peers.RUNNERS_IN[dtype] if runner.name in ("fused", "litert")]
    generator = torch.Generator().manual_seed(4)
    like = torch.randn(8, 3, 64, 64, generator=generator)
    model = random_model(like, network=mnv2_fused.MobileNetV1, width_mult=0.25, num_classes=20, shift=benchmark.SHIFT)
    images = torch.randn(1, 3, 64, 64, generator=generator)
    given, batch = tasks.Inference.inputs(model, images, dtype, like)
    exact, _ = tasks.Inference.reference(model, given, batch, dtype)
    for runner in runners:
        if not runner.missing(given):
            row = Row(runner.name, "1")
            answer = tasks.Inference(runner, given, batch, 1, False, dtype).answer()
            tasks.Inference.verify(row, _Says(answer), exact)
            assert row.error == "", runner.name


FLOAT32_ROWS = [row for row in mnv2_fused.kernels() if row.dtype == torch.float32]


@pytest.mark.parametrize(
    "row",
    [  # one that would not be chosen is enough: processes take seconds to start
        pytest.param(row, id=row.name, marks=[] if row == FLOAT32_ROWS[-1] else [pytest.mark.exhaustive])
        for row in FLOAT32_ROWS
    ],
)
def test_forced_kernel(row):
    if not row.supported:
        pytest.skip(f"{row.name}: {row.reason}")
    result = benchmark.run(Options(**SMALL, rounds=1, runners=("fused",), memory=False, kernel=row.name))
    assert result["fused"].error == "" and result["fused"].version.endswith(row.name)
    assert result.peak_kernel == benchmark.best_kernel()  # the machine's limit, whichever row runs


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident memory is read from /proc")
def test_memory():
    batch, resolution = 16, 96
    result = benchmark.run(
        Options(batch, threads=1, resolution=resolution, seconds=0, rounds=1, runners=("fused", "eager"))
    )
    largest = batch * 96 * (resolution // 2) ** 2 * 4 / 1e6  # the expanded tensor of the second block, in MB
    assert result["eager"].memory_mb > largest > result["fused"].memory_mb
    for row in result.rows:
        assert row.resident_mb > row.memory_mb


# ---- training

STEP = dict(width=0.35, resolution=64, batch=3, threads=1, seconds=0.0, train=True)


@pytest.fixture(scope="module")
def trained() -> benchmark.Result:
    return benchmark.run(Options(**STEP, rounds=2, runners=("fused", "eager")))


def test_training_rows(trained):
    assert [row.name for row in trained.rows] == ["fused", "eager"]
    for row in trained.rows:
        assert row.error == "" and 0 < row.relative_error < tasks.STEP_LIMITS["float32"].floor
        assert 0 < row.q1_ms <= row.ms <= row.q3_ms and row.calls >= trained.rounds == 2
        assert row.images_per_second == pytest.approx(1e3 / row.ms)
        assert row.slower == pytest.approx(row.ms / trained["fused"].ms)
        assert row.gmacs is None and row.share_of_peak is None
    assert trained.macs is None and trained.peak_gmacs is None


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident memory is read from /proc")
def test_training_memory(trained):
    # Eager keeps its activations until backward: a step adds them, whatever else it takes.
    assert trained["eager"].memory_mb > 0.8 * STEP["batch"] * trained["eager"].kept_mb
    for row in trained.rows:
        assert row.resident_mb > row.memory_mb
        assert row.heavier == pytest.approx(row.memory_mb / trained["fused"].memory_mb)


def test_training_report(trained, tmp_path):
    report = json.loads(json.dumps(trained.to_dict(), allow_nan=False))
    assert report["options"] | STEP == report["options"] and report["macs_per_image"] is None
    keys = {"relative_error", "ms", "images_per_second", "slower", "memory_mb", "heavier", "kept_mb", "remark"}
    assert all(keys <= {*row} for row in report["rows"])
    console = Console(file=io.StringIO(), width=160)
    trained["eager"].remark = "as it comes"
    console.print(trained.table())
    text = console.file.getvalue()
    assert "batch 3, 1 thread, a step of training" in text and "eager: as it comes" in text
    assert f"{trained['eager'].images_per_second:.1f}" in text and "of peak" not in text and "FMA" not in text
    pytest.importorskip("matplotlib")
    trained.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def step() -> tuple[mnv2_fused.MobileNetV2, tuple, tasks.ExactStep]:
    """A network to train, a batch, and the exact step."""
    generator = torch.Generator().manual_seed(2)
    model = random_model(torch.randn(8, 3, 64, 64, generator=generator), width_mult=0.35, num_classes=20)
    trained, batch = tasks.Training.inputs(model, torch.randn(8, 3, 64, 64, generator=generator))
    assert trained.training and not model.training  # it is a copy
    return trained, batch, tasks.Training.exact(trained, batch)


def take(runner: peers.Runner, step: tuple) -> dict[str, Any]:
    model, batch, _ = step
    return tasks.Training(runner, copy.deepcopy(model), batch, 1, spare=False).answer()


@pytest.mark.parametrize("runner", peers.TRAINERS[:4], ids=lambda runner: runner.name)  # compiling takes a minute
def test_trainer_takes_the_step(runner, step):
    model, batch, exact = step
    model = copy.deepcopy(model)
    row = Row(runner.name, "1")
    tasks.Training.verify(row, _Says(tasks.Training(runner, model, batch, 1, spare=False).answer()), exact)
    assert row.error == "" and row.relative_error < tasks.STEP_LIMITS["float32"].floor
    assert model.fused == (runner.name == "fused")


@pytest.fixture(scope="module")
def rounded_step() -> tuple[mnv2_fused.MobileNetV2, tuple, tasks.ExactStep]:
    """The same in bfloat16, of a network that bears rounding."""
    generator = torch.Generator().manual_seed(2)
    like = torch.randn(8, 3, 64, 64, generator=generator)
    model = random_model(like, width_mult=0.35, num_classes=20, shift=benchmark.SHIFT)
    trained, batch = tasks.Training.inputs(model, torch.randn(8, 3, 64, 64, generator=generator))
    return trained, batch, tasks.Training.exact(trained, batch, "bfloat16")


@pytest.mark.parametrize("runner", peers.TRAINERS[:4], ids=lambda runner: runner.name)
def test_trainer_takes_the_step_in_bfloat16(runner, rounded_step):
    """Under autocast, with float32 parameters; a runner that cannot says so."""
    model, batch, exact = rounded_step
    model = copy.deepcopy(model)
    try:
        task = tasks.Training(runner, model, batch, 1, False, "bfloat16")
    except RuntimeError as error:
        assert runner.name == "fused" and "the model would not train fused: " in str(error)
        return
    row = Row(runner.name, "1")
    tasks.Training.verify(row, _Says(task.answer()), exact)
    assert row.error == "" and 1e-3 < row.relative_error < exact.limits.gross
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "word, factor, said",
    [
        ("gradient", 2, r"its gradients are off by .* \(median\), more than"),
        ("features.9.conv.1.1.running_var", 1.05, "its features.9.conv.1.1.running_var is off by 5"),
        ("loss", 1.1, "its loss is off by"),
        ("gradient of features.18.1.bias", 0, "its gradient of features.18.1.bias is off by 1.0e+00"),
    ],
)
def test_a_wrong_step_in_bfloat16_is_not_timed(rounded_step, word, factor, said):
    model, batch, exact = rounded_step
    row = Row("wrong", "1")
    found = tasks.Training(TRAINERS["eager"], copy.deepcopy(model), batch, 1, False, "bfloat16").answer()
    tasks.Training.verify(row, _Says(_scale(found, word, factor)), exact)
    assert re.match(said.replace("+", r"\+"), row.error) and row.error.endswith("not timed")


def test_exact_step_is_that_of_the_whole_network(step):
    """Without checkpointing, and with a second forward for what is updated twice."""
    model, (images, labels), exact = step
    plain = copy.deepcopy(model).double()
    plain.fused = False
    loss = torch.nn.functional.cross_entropy(plain(images.double()), labels)
    loss.backward()
    torch.testing.assert_close(exact.tensors["loss"], loss.detach())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(exact.tensors[f"gradient of {name}"], p.grad, atol=1e-9, rtol=1e-6)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(exact.tensors[name], buffer)
    with torch.no_grad():
        plain(images.double())
    for name, buffer in plain.features[1:-1].named_buffers(prefix="features"):
        position, rest = name.removeprefix("features.").split(".", 1)
        again = exact.tensors[f"features.{position}.{rest}, updated twice"]
        torch.testing.assert_close(again, buffer)


def test_what_autograd_keeps(step):
    """All that a step keeps, each storage once, but for the parameters, the statistics, the images and the labels."""
    model, batch, _ = step
    kept = {}
    for name in ("eager", "checkpointed"):
        task = tasks.Training(TRAINERS[name], copy.deepcopy(model), batch, 1, spare=True)
        kept[name] = task.memory()[-1]
    # Checkpointing keeps what goes into the blocks, and of stem and head what eager does.
    assert kept["eager"] > 4 * kept["checkpointed"] > 0
    # Eager keeps what goes into each BatchNorm, each ReLU6 (a copy, as that writes in place) and each convolution after
    # it; the few bytes more are what comes out of the blocks, and the head.
    sizes: list[int] = []
    plain = copy.deepcopy(model)
    plain.fused = False
    for module in plain.modules():
        copies = {torch.nn.Conv2d: 1, torch.nn.ReLU6: 2}.get(type(module), 0)
        module.register_forward_hook(lambda module, x, y, copies=copies: sizes.append(copies * y[0].nbytes))
    plain(batch[0])
    assert sum(sizes) < kept["eager"] < 1.1 * sum(sizes)


def test_train_on_the_command_line(monkeypatch):
    asked = []

    def run(options, progress):
        asked.append(options)
        return benchmark.Result(options, [Row("fused", "1", ms=1.0, q1_ms=1.0, q3_ms=1.0)], None, "scalar_f32")

    monkeypatch.setattr(benchmark, "run", run)
    command = CliRunner().invoke(cli.app, ["bench", "--train", "--json"])
    assert command.exit_code == 0 and json.loads(command.stdout)["options"]["train"]
    assert asked == [Options(batch=32, train=True)]
    for bad, word in (["--peers"], "--peers"), (["--batch", "1", "--resolution", "32"], "BatchNorm"):
        command = CliRunner().invoke(cli.app, ["bench", "--train", *bad])
        assert command.exit_code == 2 and command.stdout == ""
        assert word in command.stderr and command.stderr.count("\n") == 1


def _scale(found: dict[str, Any], word: str, factor: float) -> dict[str, Any]:
    return {name: np.asarray(values * factor) if word in name else values for name, values in found.items()}


@pytest.mark.parametrize(
    "word, factor, said",
    [
        ("gradient", 1.2, r"its gradients are off by 2\.0e-01 \(median\), more than"),
        (
            "gradient of features.8.conv.1.0.weight",
            2,
            r"its gradient of features.8.conv.1.0.weight is off by 1\.0e\+00",
        ),
        ("features.9.conv.1.1.running_var", 1.01, "its features.9.conv.1.1.running_var is off by 1.0e-02"),
        ("features.9.conv.1.1.num_batches_tracked", 0, "its features.9.conv.1.1.num_batches_tracked is off by 1"),
        ("loss", 1.01, "its loss is off by 1.0e-02"),
        ("gradient of features.18.1.bias", math.nan, "its gradient of features.18.1.bias is not finite"),
    ],
)
def test_a_wrong_step_is_not_timed(step, word, factor, said):
    row = Row("wrong", "1")
    found = _scale(take(TRAINERS["eager"], step), word, factor)
    tasks.Training.verify(row, _Says(found), step[-1])
    assert re.match(said, row.error) and row.error.endswith("not timed")


@pytest.mark.parametrize(
    "eager, found, accepted",
    [(1e-4, 0.09, True), (1e-4, 0.11, False), (0.03, 0.29, True), (0.03, 0.31, False), (0.2, 0.49, True),
     (0.2, 0.51, False)],
)  # fmt: skip
def test_what_gradients_may_be_off_by(eager, found, accepted):
    """A floor where eager was lucky, ten times its error, and in no case half of their norm."""
    names = [f"gradient of {name}" for name in "abc"] + ["loss", "running_mean"]
    exact = tasks.ExactStep(
        {name: torch.ones(4, dtype=torch.float64) for name in names},
        {name: eager for name in names},
        tasks.STEP_LIMITS["float32"],
    )
    answer = {name: np.ones(4) * (1 + found * name.startswith("gradient")) for name in names}
    row = Row("any", "1")
    tasks.Training.verify(row, _Says(answer), exact)
    assert row.relative_error == pytest.approx(found) and (row.error == "") == accepted


def test_a_step_without_a_gradient_or_with_statistics_updated_twice_is_not_timed(step):
    row = Row("wrong", "1")
    found = take(TRAINERS["eager"], step)
    del found["gradient of classifier.1.bias"]
    tasks.Training.verify(row, _Says(found), step[-1])
    assert row.error == "it has no gradient of classifier.1.bias: not timed"
    secretly = TRAINERS["checkpointed"]._replace(recomputes=False)
    tasks.Training.verify(row, _Says(take(secretly, step)), step[-1])
    assert "num_batches_tracked is off" in row.error or "running" in row.error


# ---- what goes wrong


@pytest.mark.parametrize("factor, shown", [(1.002, 0.002), (math.nan, None)])
def test_wrong_logits_are_not_timed(factor, shown):
    values = torch.randn(2, 10, dtype=torch.float64)
    exact = tasks.Exact(values)
    row = Row("wrong", "1")
    factors = torch.tensor([[1.0], [factor]], dtype=torch.float64)  # a mistake in one image alone
    tasks.Inference.verify(row, _Says(values * factors), exact)
    assert "off by" in row.error and row.relative_error == (shown and pytest.approx(shown))
    right = Row("right", "1")
    tasks.Inference.verify(right, _Says(values * 1.0005), exact)
    assert right.error == "" and right.relative_error == pytest.approx(0.0005)


def test_logits_of_another_shape_are_not_timed():
    row = Row("wrong", "1")
    tasks.Inference.verify(row, _Says(torch.ones(10)), tasks.Exact(torch.ones(2, 10)))
    assert row.error == "its results are [10], expected [2, 10]"


def test_a_row_with_an_error_is_shown():
    result = benchmark.Result(Options(threads=1), [Row("broken", "1", "its process ended")], 1, "scalar_f32")
    console = Console(file=io.StringIO(), width=160)
    console.print(result.table())
    assert "its process ended" in console.file.getvalue()
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_worker_that_dies_or_cannot_prepare_says_why(small):
    model, images = small
    options = benchmark._complete(Options(**SMALL, memory=False))
    with benchmark._workers(list(peers.RUNNERS[:1]), options, model, (images,)) as ((worker,), _):
        assert worker.error() == ""
        assert worker.ask("answer")[0].shape == (2, 20)
        os.kill(worker._process.pid, signal.SIGKILL)
        assert worker.ask("time") == (None, "its process ended with exit code -9")
        assert worker.ask("time") == (None, "its process ended with exit code -9")
    with benchmark._workers(list(peers.RUNNERS[:1]), options, model, (images.double(),)) as ((worker,), _):
        assert "RuntimeError: the model would not run fused" in worker.error()


def test_peers_that_are_not_installed_are_named(monkeypatch):
    absent = peers.Runner("imaginary", peers.RUNNERS[0].prepare, ("onnx-of-nobody", "imaginary-runtime"))
    monkeypatch.setitem(peers.RUNNERS_IN, "float32", (peers.RUNNERS[0], absent))
    result = benchmark.run(Options(**SMALL, rounds=1, peers=True, memory=False))
    assert [row.name for row in result.rows] == ["fused"]
    assert result.left_out == {"imaginary": "not installed: pip install onnx-of-nobody imaginary-runtime"}


def test_a_runner_that_is_asked_for_by_its_name_and_is_not_here_is_an_error():
    with pytest.raises(ValueError, match="litert is left out: XNNPACK has no bfloat16 convolutions"):
        benchmark.run(Options(**SMALL, dtype="bfloat16", runners=("fused", "litert"), memory=False))
    with pytest.raises(ValueError, match="litert is left out: its graph is written here for MobileNetV2 alone"):
        benchmark.run(Options(network="ssdlite", resolution=32, runners=("fused", "litert"), memory=False))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batch=None), "batch must be a whole number of at least 1, got None"),
        (dict(batch=0), "batch must be a whole number of at least 1, got 0"),
        (dict(threads=0), "threads must be"),
        (dict(resolution=1.5), "resolution must be"),
        (dict(rounds=0), "rounds must be"),
        (dict(width=0.0), "width must be"),
        (dict(seconds=math.nan), "width must be above 0 and seconds not below 0"),
        (dict(runners=("eager", "lazy")), r"runners must be among .*, got \['lazy'\]"),
        (dict(kernel="scalar_f64"), "kernel must be one of .* for float32, got 'scalar_f64'"),
        (dict(kernel="avx2_f32", dtype="int8"), r"kernel must be one of \[.*'avx2_s8'.*\] for int8, got 'avx2_f32'"),
        (dict(dtype="float16"), r"dtype must be one of \['float32', 'bfloat16', 'int8'\], got 'float16'"),
        (dict(dtype="int8", train=True), "int8 does not train"),
        (dict(dtype="int8", network="ssdlite"), "int8 is of mobilenet_v2 and mobilenet_v1 only, got ssdlite"),
        (dict(train=True, runners=("onnxruntime",)), r"runners must be among .*, got \['onnxruntime'\]"),
        (dict(train=True, peers=True), "train and peers exclude each other"),
        (dict(train=True, network="ssdlite"), "train is of mobilenet_v2 only, got ssdlite"),
        (dict(network="resnet"), r"network must be one of \['mobilenet_v2', .*\], got 'resnet'"),
        (dict(train=True, batch=1, resolution=32), "two values or more: batch 1 at 32x32 leaves one"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_one_image_of_several_values_trains():
    assert Options(train=True, batch=1, resolution=33).batch == 1


def test_a_kernel_that_the_cpu_lacks_is_refused(monkeypatch):
    rows = [row._replace(supported=False, reason="no such unit") for row in mnv2_fused.kernels()]
    monkeypatch.setattr(benchmark, "kernels", lambda: rows)
    with pytest.raises(ValueError, match="kernel avx2_f32 cannot run here: no such unit"):
        benchmark.run(Options(**SMALL, kernel="avx2_f32"))


# ---- bench/


def test_block_shapes_are_the_networks():
    listed = json.loads((Path(__file__).parents[1] / "bench" / "blocks.json").read_text())
    size, blocks = 112, []
    for block in mnv2_fused.mobilenet_v2().features[1:-1]:
        *_, depthwise, project, _ = block.conv
        hidden = depthwise[0].out_channels
        shape = dict(block=len(blocks) + 1, size=size, in_channels=block.in_channels, hidden_channels=hidden)
        shape |= dict(out_channels=project.out_channels, stride=block.stride, residual=block.use_res_connect)
        blocks.append(shape)
        size //= block.stride
    assert listed == blocks and len(blocks) == 17
