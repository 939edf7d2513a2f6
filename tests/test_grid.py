"""`mnv2-fused bench --grid`: its rows, what it keeps, and what it says of them; the runs are benchmark.py's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mnv2_fused import benchmark, cli, grid, peers
from mnv2_fused.benchmark import Options, Row
from mnv2_fused.tables import GRID

PEERS = ("openvino", "ncnn")  # that have a part in every precision here


def _row(name: str, ms: float | None, error: str = "") -> Row:
    return Row(name, "1", error=error, relative_error=1e-6, ms=ms, q1_ms=ms, q3_ms=ms, calls=5 * bool(ms))


@pytest.fixture
def runs(monkeypatch) -> list[Options]:
    """benchmark.run answers at once: fused takes 2 ms, the peers 3 and 4, but ncnn 1 ms in two rows of int8."""

    def run(options: Options, progress: benchmark.Progress) -> benchmark.Result:
        asked.append(options)
        progress(0.5, "timing")
        slow = options.dtype == "int8" and options.width == 0.35 and options.resolution <= 128
        rows = [_row("fused", 2.0), _row("openvino", 3.0), _row("ncnn", 1.0 if slow else 4.0)]
        macs = round(3e8 * options.width * (options.resolution / 224) ** 2)
        return benchmark.Result(options, rows, macs, "scalar_f32", peak_gmacs=100.0, tolerance=1e-3)

    asked: list[Options] = []
    able = {
        dtype: tuple(peers.Runner(name, peers.RUNNERS[0].prepare, ("torch",) * (name != "fused")) for name in names)
        for dtype, names in dict.fromkeys(benchmark.DTYPES, ("fused", "eager", *PEERS)).items()
    }
    able = {dtype: tuple(r._replace(packages=()) if r.name == "eager" else r for r in rs) for dtype, rs in able.items()}
    absent = peers.Runner("imaginary", None, ("torch",), unable="it knows no such numbers")
    monkeypatch.setattr(grid, "RUNNERS_IN", able | {"bfloat16": (*able["bfloat16"], absent)})
    monkeypatch.setattr(benchmark, "run", run)
    return asked


def test_rows_are_the_papers(runs):
    told: list[tuple[float, str]] = []
    entries: list[grid.Entry] = []
    options = Options(threads=1, seconds=3.0)
    result = grid.run(options, progress=lambda *said: told.append(said), found=entries.append)
    assert result.entries == entries and len(entries) == len(runs) == 66
    networks = [row[:2] for row in GRID]
    assert [(o.width, o.resolution) for o in runs] == networks * 3
    assert [o.dtype for o in runs] == [dtype for dtype in benchmark.DTYPES for _ in networks]
    assert {(o.runners, o.threads, o.seconds, o.memory, o.batch) for o in runs} == {
        (("fused", *PEERS), 1, 3.0, False, 1)
    }
    assert {(e.tolerance, e.peak_gmacs) for e in entries} == {(1e-3, 100.0)}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0][1] == "row 1 of 66, 1.4/224 float32: timing"
    assert told[-1][1].startswith("row 66 of 66, 0.35/96 int8, about ") and told[-1][1].endswith(" min left: timing")
    assert str(entries[0]) == "1.4/224 float32: fused 2 ms; openvino 3 ms, 1.50 times"


def test_summary_names_the_rows_where_fused_is_not_the_fastest(runs):
    result = grid.run(Options(threads=1))
    float32, bfloat16, int8 = result.summary()
    assert float32.startswith(
        "float32: fused is the fastest in 22 of 22 rows; the fastest peer takes 1.50 times as long"
    )
    assert "it is not" not in float32 + bfloat16
    assert "fastest in 20 of 22 rows; the fastest peer takes 1.36 times as long (geometric mean)" in int8
    assert "at least 0.50 times (ncnn, 0.35/128)" in int8
    assert int8.endswith("it is not at 0.35/128 (ncnn, 0.50 times), 0.35/96 (ncnn, 0.50 times)")
    console = Console(file=io.StringIO(), width=160)
    console.print(result.table())
    said = " ".join(console.file.getvalue().split())
    assert "the paper's 22 networks, batch 1, 1 thread" in said and said.count("0.50x") == 2
    assert "bfloat16: imaginary is left out: it knows no such numbers" in said
    json.dumps(result.to_dict(), allow_nan=False)


def test_as_fast_as_a_peer_is_not_slower():
    rows = [_row("fused", 2.0), _row("ncnn", 2.0), _row("openvino", None, "no")]
    entry = grid.Entry(1.0, 224, "int8", 1, None, 1e-3, {}, rows)
    (line,) = grid.Grid(Options(), ("int8",), [entry]).summary()
    assert entry.ratio == 1 and "fastest in 1 of 1 rows" in line and "it is not" not in line


def test_minutes_left_are_of_the_rows_not_done(runs, monkeypatch):
    """A row takes a minute here."""
    monkeypatch.setattr(grid.time, "monotonic", lambda: 60.0 * len(runs))
    told: list[str] = []
    grid.run(Options(threads=1), progress=lambda done, description: told.append(description))
    assert "left" not in told[0] and "row 2 of 66" in told[1]
    # What is told in the middle of a row was reckoned at its beginning.
    assert [text.split("about ")[1].split(":")[0] for text in (told[1], told[-1])] == ["65 min left", "1 min left"]


def test_runners_are_those_that_can(runs):
    assert grid.runners("float32") == ("fused", *PEERS)
    assert grid.runners("bfloat16", ("eager", "imaginary")) == ("fused", "eager")
    with pytest.raises(ValueError, match="of imaginary none is here to compare with in bfloat16: pip install"):
        grid.runners("bfloat16", ("imaginary",))


def test_an_interrupted_run_goes_on(runs, tmp_path, monkeypatch):
    path = tmp_path / "grid.json"
    measure = benchmark.run

    def interrupted(options: Options, progress: benchmark.Progress) -> benchmark.Result:
        if len(runs) == 30:
            raise KeyboardInterrupt
        result = measure(options, progress)
        if len(runs) == 3:
            result.rows[1] = _row("openvino", None, "its process ended")
        return result

    monkeypatch.setattr(benchmark, "run", interrupted)
    first = grid.run(Options(threads=1), path=path)
    assert len(first.entries) == 30 and first.errors == ["1.0/224 float32, openvino: its process ended"]
    assert len(json.loads(path.read_text())["rows"]) == 30 and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(benchmark, "run", measure)
    second = grid.run(Options(threads=1), path=path)  # what failed is measured again
    assert len(runs) == 30 + 37 and len(second.entries) == 66 and not second.errors
    assert json.loads(path.read_text()) == json.loads(json.dumps(second.to_dict()))
    third = grid.run(Options(threads=1), path=path)
    assert len(runs) == 30 + 37 and third.summary() == second.summary()


def test_rows_of_another_run_are_refused(runs, tmp_path, monkeypatch):
    path = tmp_path / "grid.json"
    grid.run(Options(threads=1), ("int8",), path)
    with pytest.raises(ValueError, match=r"grid.json is of another options: .*'threads': 1.*, not .*'threads': 2"):
        grid.run(Options(threads=2), ("int8",), path)
    for other in (dict(seconds=3.0), dict(rounds=9), dict(runners=("ncnn",)), dict(batch=2), dict(kernel="scalar_s8")):
        with pytest.raises(ValueError, match="grid.json is of another options"):
            grid.run(Options(threads=1, **{"dtype": "int8"} | other), ("int8",), path)
    report = json.loads(path.read_text())
    path.write_text(json.dumps(report | {"machine": {"cpu": "of somebody else"}}))
    with pytest.raises(ValueError, match="grid.json is of another machine: "):
        grid.run(Options(threads=1), ("int8",), path)
    path.write_text(json.dumps(report))
    for module, name in ((grid, "__version__"), (grid.torch, "__version__")):
        with monkeypatch.context() as context, pytest.raises(ValueError, match="grid.json is of another versions"):
            context.setattr(module, name, "0.0")
            grid.run(Options(threads=1), ("int8",), path)
    for text in "", "[]", "{}", json.dumps(report | {"rows": [{"width": 1}]}):
        path.write_text(text)
        with pytest.raises(ValueError, match="grid.json holds no grid"):
            grid.run(Options(threads=1), ("int8",), path)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(runs, tmp_path, monkeypatch):
    def refuse(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        grid.run(Options(threads=1), path=tmp_path / "grid.json")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("dtypes", [benchmark.DTYPES, ("bfloat16",)])
def test_plot(runs, tmp_path, dtypes):
    pytest.importorskip("matplotlib")
    grid.run(Options(threads=1), dtypes).plot(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


# ---- the command line


def bench(*args: object, status: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(cli.app, ["bench", "--grid", *map(str, args)])
    assert result.exit_code == status, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result.stdout, result.stderr


def test_command(runs, tmp_path):
    said, remarks = bench("--threads", 1, "--dtype", "int8", "--json", "--seconds", 1, "--runner", "ncnn")
    assert len(json.loads(said)["rows"]) == 22 and {o.seconds for o in runs} == {1.0}
    assert {o.runners for o in runs} == {("fused", "ncnn")}
    assert remarks.count("\n") == 22 and "1.4/224 int8: fused 2 ms" in remarks
    said, _ = bench("--resume", tmp_path / "grid.json", "--plot", tmp_path / "grid.svg")
    assert "float32: fused is the fastest in 22 of 22 rows" in " ".join(said.split())
    assert (tmp_path / "grid.svg").exists() and len(json.loads((tmp_path / "grid.json").read_text())["rows"]) == 66
    assert {o.seconds for o in runs[22:]} == {grid.SECONDS}


def test_command_interrupted(runs, tmp_path, monkeypatch):
    measure = benchmark.run

    def interrupted(options: Options, progress: benchmark.Progress) -> benchmark.Result:
        if len(runs) == 2:
            raise KeyboardInterrupt
        return measure(options, progress)

    monkeypatch.setattr(benchmark, "run", interrupted)
    said, remarks = bench("--resume", tmp_path / "grid.json", status=130)
    assert "1.3/224" in said and "1.0/224" not in said
    assert "interrupted, rows missing: 64; the same command with --resume" in remarks


def test_command_with_a_failed_runner(runs, monkeypatch):
    measure = benchmark.run

    def failing(options: Options, progress: benchmark.Progress) -> benchmark.Result:
        result = measure(options, progress)
        result.rows[0] = _row("fused", None, "its results are off")
        return result

    monkeypatch.setattr(benchmark, "run", failing)
    said, remarks = bench("--dtype", "int8", status=1)
    assert said.count("error") == 22 and "1.4/224 int8, fused: its results are off" in remarks


@pytest.mark.parametrize(
    "args, words",
    [
        (["--train"], "--grid and --train exclude each other"),
        (["--width", "0.5"], "--grid and --width exclude each other"),
        (["--network", "ssdlite"], "--grid and --network exclude each other"),
        (["--kernel", "avx2_f32"], "--kernel is of one precision: name it, --dtype too"),
        (["--dtype", "float16"], "dtype must be one of"),
        (["--runner", "lazy"], "runners must be among"),
        (["--resume", "nowhere/grid.json"], "expected a file name, in a folder that exists"),
        (["--plot", "grid.xyz"], "grid.xyz"),
    ],
)
def test_what_the_grid_cannot_do_is_one_line(args, words):
    said, remarks = bench(*args, status=2)
    assert said == "" and words in remarks and remarks.count("\n") == 1


def test_resume_without_a_grid_is_one_line():
    result = CliRunner().invoke(cli.app, ["bench", "--resume", "grid.json"])
    assert result.exit_code == 2 and "--resume is of --grid only" in result.stderr


@pytest.mark.exhaustive  # a minute or two: rows as they are, without the seconds of timing
@pytest.mark.parametrize("dtype", benchmark.DTYPES)
def test_every_row_is_verified(dtype, tmp_path: Path):
    try:
        grid.runners(dtype)
    except ValueError as error:
        pytest.skip(str(error))
    result = grid.run(Options(threads=1, seconds=0.0, rounds=1), (dtype,), tmp_path / "grid.json")
    assert not result.errors and len(result.of(dtype)) == 22
