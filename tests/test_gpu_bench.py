"""bench/gpu.py without a GPU: what it writes, how it goes on after a failure, that it refuses what is wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

PATH = Path(__file__).resolve().parents[1] / "bench/gpu.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    if not PATH.exists():
        pytest.skip("bench/ is not here")
    spec = importlib.util.spec_from_file_location("bench_gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(gpu, monkeypatch):
    monkeypatch.setattr(gpu.Options, "seconds", 0.0)
    monkeypatch.setattr(gpu, "TURN_SECONDS", 1e-3)
    return gpu.Options(batch=5, resolution=64, quick=True, device="cpu")


@pytest.fixture
def notes(gpu, tmp_path):
    return gpu.Notes(tmp_path / "notes.json", 60, {})


@pytest.fixture
def bench(gpu, tmp_path, options, monkeypatch):
    monkeypatch.setattr(gpu.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    (tmp_path / "mnv2_fused-gpu-").mkdir()
    return gpu.Bench(tmp_path / "gpu.json", options, Console(quiet=True))


# ---- what is written


def test_a_file_is_always_whole(gpu, tmp_path):
    path = tmp_path / "a.json"
    gpu.write_json(path, {"a": [1.5, math.nan], 2: path})
    assert json.loads(path.read_text()) == {"a": [1.5, "nan"], "2": str(path)}

    class Unspeakable:
        def __str__(self):
            raise OSError

    with pytest.raises(OSError):
        gpu.write_json(path, {"b": Unspeakable()})
    assert "a" in json.loads(path.read_text()) and list(tmp_path.iterdir()) == [path]


def test_the_rest_goes_on_after_a_step_that_failed(gpu, bench):
    seen = {}

    def succeeds(bench, limit):
        seen.update(json.loads(bench.path.read_text())["steps"])
        return {"rows": [1]}

    def fails(bench, limit):
        raise gpu.Failed("the device is gone", {"rows": [2]})

    def raises(bench, limit):
        raise KeyError("rows")

    steps = [gpu.StepOf(run.__name__, 1, run) for run in (fails, raises, succeeds)]
    bench.run([steps[:2], steps[2:]])  # two at once, then one
    assert seen["fails"]["error"] == "the device is gone" and seen["fails"]["rows"] == [2]
    assert seen["raises"]["error"] == "KeyError: 'rows'"
    assert "not over" in seen["succeeds"]["error"]  # what would stand there if we were killed now
    assert json.loads(bench.path.read_text())["steps"]["succeeds"]["error"] == ""
    assert {where for where, _ in gpu.failures(bench.result)} == {"fails", "raises"}


def test_limits(gpu, bench):
    assert gpu.share(100, [20, 30]) == 70 and gpu.share(10, [20, 30]) == 4 and gpu.share(-1, [20]) == 0
    with pytest.raises(TimeoutError), gpu.limited(0.05):
        time.sleep(5)
    start = time.monotonic()
    assert bench.execute(["sleep", "9"], 0.2, "sleep") == (-1, "stopped: not done after 0 s")
    assert bench.execute(["sleep", "9"], 9, "silent", silence=0.2) == (-1, "stopped: no sign of life any more")
    quiet = bench.path.with_name("notes")
    gpu.Notes(quiet, 0.3, {})
    assert bench.execute(["sleep", "9"], 9, "notes", quiet)[0] == -1
    assert bench.execute(["sh", "-c", "echo $A; sleep 9 & exit 3"], 9, "ends", A="a") == (3, "a")
    assert time.monotonic() - start < 3 and not bench._running


def test_a_step_starts_anew_without_what_broke_it(gpu, bench, monkeypatch):
    asked = []

    def execute(command, limit, name, notes):
        arguments = json.loads(command[-1])
        asked.append(arguments["left_out"])
        noted = gpu.Notes(notes, limit, {})
        noted.found["rows"] = [{"name": "fused"}, {"name": "eager"}]
        noted.doing("fused" if not arguments["left_out"] else "the end")
        return (-11, "") if not arguments["left_out"] else (0, "")

    monkeypatch.setattr(bench, "execute", execute)
    assert bench.measure("inference", 60)["rows"][1]["name"] == "eager"
    assert [list(left_out) for left_out in asked] == [[], ["fused"]]
    assert asked[1]["fused"].startswith("its process ended with status -11")


def test_a_step_in_a_process_of_its_own(gpu, bench):
    """Which dies of something that is no runner's fault: there is nothing to leave out."""
    with pytest.raises(gpu.Failed, match="KeyError: 'no_such_step'"):
        bench.measure("no_such_step", 60)


def test_the_plan(gpu):
    groups = gpu.plan(gpu.Options(), skip_build=False, skip_tests=False, sanitize=True)
    names = [[step.name for step in group] for group in groups]
    assert names[:3] == [["build"], ["machine"], ["tests", "compilation"]]
    assert names[-2:] == [["memcheck"], ["racecheck"]]
    kept = sum(max(step.needs for step in group) for group in groups)
    assert kept <= 60 * gpu.Options().minutes
    assert {column.step for column in gpu.columns({"batch": 256})} <= {step.name for group in groups for step in group}
    quick = gpu.plan(gpu.Options(quick=True), skip_build=True, skip_tests=True, sanitize=False)
    assert [group[0].name for group in quick][:2] == ["machine", "inference bfloat16 256"]


# ---- comparisons


def test_turns_alternate_and_what_is_wrong_is_not_timed(gpu, notes):
    log = []

    def timer(call):
        call()
        return [1e-3 * len(log)]

    timer.wait = lambda: None

    def way(name, value):
        def make(facts):
            gpu.verify(facts, torch.tensor([value, 1.0]), torch.tensor([2.0, 1.0]), 1e-2)
            return lambda: log.append(name)

        return gpu.Way(make)

    ways = {"fused": way("fused", 2.0), "wrong": way("wrong", 2.1), "nan": way("nan", math.nan)}
    ways |= {name: way(name, 2.001) for name in ("a", "b")}
    rows = {row["name"]: row for row in gpu.compare(notes, "rows", ways, timer, 0.0, 7, rounds=6)}
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 6 and all(sorted(names) == ["a", "b", "fused"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1
    for name in ("wrong", "nan"):
        assert "not timed" in rows[name]["error"] and "ms" not in rows[name]
    for name in ("fused", "a", "b"):
        row = rows[name]
        assert row["q1_ms"] <= row["ms"] <= row["q3_ms"] and "error" not in row
        assert row["images_per_second"] == pytest.approx(7e3 / row["ms"])
    assert rows["fused"]["slower"] == 1 and json.loads(notes.path.read_text())["found"]["rows"]


def test_time_is_kept_for_timing(gpu, tmp_path):
    compiled = []
    way = gpu.Way(lambda facts: compiled.append(facts) or (lambda: None), compiles=True)
    short = gpu.Notes(tmp_path / "short", 15, {})
    (row,) = gpu.compare(short, "rows", {"compiler": way}, gpu.Timer(CPU), 0.0, 1)
    assert "no time was left" in row["skipped"] and not compiled and not gpu.failures({"steps": {"s": {"rows": [row]}}})
    ways = {"compiler": way, "other": gpu.Way(lambda facts: pytest.fail("it compiles nothing"))}
    long = gpu.Notes(tmp_path / "long", 60, {})
    long.warming = True
    (row,) = gpu.compare(long, "rows", ways, gpu.Timer(CPU), 0.0, 1)
    assert len(compiled) == 1 and "ms" not in row


def test_timer(gpu):
    for flush in (0, 1000):
        times = gpu.Timer(CPU, flush)(lambda: time.sleep(0.002), 0.4)
        assert 2 <= len(times) <= 10 and min(times) >= 0.002


def test_verification_notices_what_it_should(gpu):
    """An image's border taken for something else, channels dropped; folding and rounding are fine."""
    model, x = gpu.network(224)
    model.fused = False
    with torch.no_grad():
        exact = model(x)
        assert gpu.relative_error(gpu.folded(model)(x), exact) < 1e-5
        model.features[8].conv[0][0].weight[:8] = 0
        assert gpu.relative_error(model(x), exact) > gpu.TOLERANCE["bfloat16"]
        model, _ = gpu.network(224)
        model.fused = False
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d) and conv.groups > 1:
                conv.padding_mode, conv._reversed_padding_repeated_twice = "replicate", [1] * 4
        assert gpu.relative_error(model(x), exact) > 10 * gpu.TOLERANCE["bfloat16"]


def test_a_step_that_is_none_is_refused(gpu):
    right = {"a": torch.randn(50), "b": torch.randn(5)}
    exact = gpu.Reference(7.0, right, 0.999, {"a": 0.99, "b": 0.3})
    facts = {}
    gpu.verify_step(facts, 7.01, right, exact)
    assert facts["gradient_cosine"] == pytest.approx(1) and list(facts["gradient_cosine_worst"]) == ["a"]
    for loss, found, reason in (
        (7.2, right, "the loss is 7.2"),
        (math.nan, right, "the loss is nan"),
        (7.0, right | {"a": -right["a"]}, "the gradients' cosine"),
        (7.0, right | {"a": right["a"] * math.nan}, "the gradients' cosine"),
        (7.0, {"a": right["a"]}, "no gradient of b"),
    ):
        with pytest.raises(ValueError, match=reason):
            gpu.verify_step({}, loss, found, exact)
    right |= {"a": 0.1 * right["a"], "b": 100 * right["b"]}
    exact = gpu.Reference(7.0, right, 0.999, {"a": 0.99, "b": 0.9})
    with pytest.raises(ValueError, match="the gradient of a"):  # of which the cosine of all is not aware
        gpu.verify_step({}, 7.0, right | {"a": -right["a"]}, exact)


# ---- the steps, in float32 on the CPU


def named(found: dict) -> dict:
    assert not [row["error"] for row in found["rows"] if "error" in row]
    return {row["name"]: row for row in found["rows"]}


def test_inference(gpu, notes, options):
    gpu.inference(notes, options, "tf32", 5)
    rows = named(notes.found)
    assert list(rows) == ["fused", "eager channels_last", "eager"] and notes.found["why_not_fused"] == ""
    assert all(row["relative_error"] < 1e-5 and row["ms"] > 0 for row in rows.values())


def test_training(gpu, notes, options):
    gpu.training(notes, options)
    rows = named(notes.found)
    assert list(rows) == ["fused", "eager channels_last"]
    assert all(row["gradient_cosine"] > 0.999 and row["ms"] > 0 for row in rows.values())


def test_blocks(gpu, notes, options):
    gpu.blocks(notes, options)
    found = notes.found["blocks"]
    assert len(found) == 17 and found[2]["shape"] == "16x16 24-144-24 /1"
    weights = 24 * 144 + 144 + 9 * 144 + 144 + 144 * 24 + 24
    assert found[2]["traffic_bytes"] == 4 * (2 * 5 * 16 * 16 * 24 + weights)
    assert found[2]["flops"] == 2 * 5 * 16 * 16 * 144 * (24 + 9 + 24)
    for block in found:
        assert block["fused"]["us"] > 0 and block["eager"]["relative_error"] < 1e-5
    assert not gpu.failures({"steps": {"blocks": notes.found}})


def test_profile_and_machine(gpu, notes, options):
    gpu.profile(notes, options)
    assert "mnv2_fused::network" in notes.found["inference"]["top"][0]["name"]
    assert 0 < len(notes.found["training"]["top"]) <= 15
    gpu.machine(notes, options)
    assert notes.found["copy_gb_per_s"] > 0 and notes.found["matmul_bfloat16_tflops"] > 0
    assert notes.found["info"]["versions"]["torch"] == torch.__version__


# ---- reports of others


def test_reports_of_pytest(gpu, tmp_path):
    test = tmp_path / "test_a.py"
    test.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('name', ['a b', 'c'])\n"
        "def test_x(name): assert name == 'c', 'CUDA: an illegal memory access was encountered'\n"
        "def test_y(): pytest.skip('no GPU')\n"
        "def test_crash(): os._exit(1)\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "test_a.py"]

    def run(*arguments: str) -> str:
        return subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True).stdout

    said = run("--junitxml=r.xml", "-k", "not crash")
    expected = {"test_a.py::test_x[a b]": "failed", "test_a.py::test_x[c]": "passed", "test_a.py::test_y": "skipped"}
    for found in (gpu.junit(tmp_path / "r.xml"), gpu.verdicts(said)):
        assert {name: verdict for name, (verdict, _) in found.items()} == expected
    assert [name for name, (_, why) in gpu.junit(tmp_path / "r.xml").items() if gpu._BROKEN.search(why)] == [
        "test_a.py::test_x[a b]"
    ]
    assert gpu.verdicts(run("-k", "crash")) == {"test_a.py::test_crash": ("failed", "the run ended in it")}


def test_tests_go_on_after_one_that_broke_the_device_or_the_process(gpu, bench, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_cuda.py").write_text(
        "import os, pytest\n"
        "broken = []\n"
        "@pytest.mark.parametrize('name', ['device-fine', 'device-breaks', 'device-fine too', 'device-wrong',\n"
        "                                  'device-dies', 'device-last', 'emulated'])\n"
        "def test_x(name):\n"
        "    assert name != 'device-wrong', 'off by 1'\n"
        "    broken.append(name == 'device-breaks')\n"
        "    assert not any(broken), 'CUDA: an illegal memory access was encountered'\n"
        "    if name == 'device-dies': os._exit(1)\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    with pytest.raises(gpu.Failed, match="3 passed, 3 failed, 0 skipped") as failed:
        bench.tests(60)
    found = failed.value.found
    names = ["device-breaks", "device-wrong", "device-dies"]
    assert list(found["failed_tests"]) == [f"tests/test_cuda.py::test_x[{name}]" for name in names]
    assert "illegal memory access" in found["failed_tests"]["tests/test_cuda.py::test_x[device-breaks]"]
    assert found["processes"] == 3


def test_what_nvidia_smi_says(gpu, monkeypatch):
    page = """<nvidia_smi_log><driver_version>580.1</driver_version><gpu><product_name>NVIDIA H100</product_name>
    <clocks><sm_clock>1980 MHz</sm_clock></clocks><max_clocks><sm_clock>N/A</sm_clock></max_clocks>
    <clocks_event_reasons><gpu_idle>Active</gpu_idle><power>Not Active</power></clocks_event_reasons>
    </gpu></nvidia_smi_log>"""
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=page))
    expected = {"name": "NVIDIA H100", "clocks_sm": "1980 MHz", "driver": "580.1", "clocks_limited_by": "gpu_idle"}
    assert gpu.smi() == expected
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


# ---- what is shown


def rows_of(times: dict[str, float]) -> dict:
    rows = [{"name": name, "ms": 256e3 / rate, "images_per_second": rate} for name, rate in times.items()]
    return {"error": "", "rows": rows}


@pytest.fixture
def result() -> dict:
    training = rows_of({"fused": 20_000, "eager channels_last": 5_000})
    for row, kept in zip(training["rows"], (4.0, 40.0), strict=True):
        row |= {"kept_mb": 256 * kept, "kept_mb_per_image": kept, "memory_mb": 1e3}
    latency = {"fused": 0.25, "torch.compile reduce-overhead": 0.5}
    block = {"us": 10.0, "gb_per_s": 900.0, "tflops": 90.0}
    blocks = [{"block": 1, "shape": "112x112", "fused": block, "eager": {"error": "out of memory"}}]
    half = {"error": "", "rows": [{"name": "fused", "error": "off by 1"}, {"name": "eager", "images_per_second": 1.0}]}
    return {
        "gpu": {"name": "NVIDIA H100"},
        "options": {"batch": 256, "resolution": 224},
        "steps": {
            "machine": {"error": "", "copy_gb_per_s": 3000.0, "matmul_bfloat16_tflops": 800.0},
            "inference bfloat16 256": rows_of({"fused": 200_000, "eager": 50_000}) | {"why_not_fused": ""},
            "inference float16 256": half,
            "inference bfloat16 1": {
                "error": "stopped",
                "rows": [{"name": name, "ms": ms} for name, ms in latency.items()],
            },
            "training": training,
            "blocks": {"error": "", "blocks": blocks},
        },
    }


def test_markdown(gpu, result):
    head, rule, *lines = gpu.markdown(result).splitlines()
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    cells = {line.split(" | ")[0]: [cell.strip(" |") for cell in line.split(" | ")[1:]] for line in lines}
    assert cells["| **mnv2_fused**"] == ["**200,000**", "", "", "**0.250**", "**20,000**", "**4.0**"]
    assert cells["| PyTorch eager"] == ["50,000", "1", "", "", "", ""]
    assert cells["| *better than torch.compile by*"] == ["", "", "", "2.00x", "", ""]
    assert cells["| *better than eager by*"] == ["4.00x", "", "", "", "4.00x", "10.00x"]


def test_tables_failures_and_plot(gpu, result, tmp_path):
    console = Console(file=(tmp_path / "page").open("w"), width=160)
    for table in gpu.tables(result):
        console.print(table)
    console.file.close()
    page = (tmp_path / "page").read_text()
    assert "200,000" in page and "10.0" in page and "30%" in page
    assert gpu.failures(result) == [
        ("inference float16 256: fused", "off by 1"),
        ("inference bfloat16 1", "stopped"),
        ("blocks: 112x112 eager", "out of memory"),
    ]
    pytest.importorskip("matplotlib")
    for found in (result, result | {"steps": {}}):
        gpu.plot(found, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu, tmp_path):
    app = typer.Typer()
    app.command()(gpu.main)
    done = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert done.exit_code == 2 and "needs an NVIDIA GPU" in done.stdout and not list(tmp_path.iterdir())
