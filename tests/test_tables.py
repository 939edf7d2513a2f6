"""The paper's tables, ours beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mnv2_fused import tables
from mnv2_fused.cli import app


def columns(table: tables.Table, *names: str) -> list[tuple]:
    return [tuple(row[table.columns.index(name)] for name in names) for row in table.rows]


def test_classification() -> None:
    """Published multiply-adds are ours cut off; published parameters are ours without the BatchNorms', to 10 kB."""
    table = tables.classification()
    assert len(table.rows) == 23
    first, *others = columns(table, "network", "params M", "MAdds M", "MAdds M, published", "params M, published")
    assert first[:3] == ("MobileNetV1 1.0_224", pytest.approx(4.231976), pytest.approx(568.7, abs=0.1))
    for name, parameters, macs, published_macs, published_parameters in others:
        assert int(macs) == int(published_macs), name
        assert 0 < parameters - float(published_parameters) < 0.055, name


def test_largest_maps() -> None:
    table = tables.largest_maps()
    assert columns(table, "bottleneck KiB", "expanded KiB") == [
        (784, 2352), (147, 882), (49, 294), (36.75, 220.5), (30.625, 91.875)
    ]  # fmt: skip
    for printed, ruled in columns(table, "printed", "largest c of table 2 / KiB")[1:]:
        (channels, size), (ours, kib) = printed.split("/"), ruled.split("/")
        assert channels == ours and float(kib) == pytest.approx(float(size), rel=0.05)


def test_detection() -> None:
    (lite, ssd) = columns(tables.detection(), "head params M", "head MAdds G", "params M", "MAdds G")
    assert lite == (2.113141, pytest.approx(0.1776, abs=1e-4), 4.337013, pytest.approx(0.789, abs=5e-4))
    assert ssd[:2] == (14.776629, pytest.approx(1.259, abs=5e-4))


def test_segmentation() -> None:
    assert columns(tables.segmentation(), "params M", "MAdds G") == [
        (2.113557, pytest.approx(2.741, rel=1e-3)),
        (4.523541, pytest.approx(5.364, rel=1e-3)),
        (2.113557, pytest.approx(8.826, rel=1e-3)),
    ]


PEAK = """
import torch
from mnv2_fused import tables
x = torch.ones(1 << 20)
print(tables.peak_activations(lambda: (x + 1).exp_() + x), 2 * x.nbytes)
"""


def test_peak_activations(tmp_path: Path) -> None:
    """To some 0.1 MB; the tensor that the call makes counts, its result too. In a process that does nothing else."""
    command = [sys.executable, "-c", PEAK]
    found, expected = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    if found == "None":
        pytest.skip("only Linux tells the peak")
    assert int(found) == pytest.approx(int(expected), abs=1e6)


def test_memory_of_blocks() -> None:
    """A block's fused memory is little more than its output; layer by layer the expanded tensors come on top."""
    found = {row[0]: row[1:] for row in tables.memory("block", 2).rows}
    if None in next(iter(found.values())):
        pytest.skip("only Linux tells the peak")
    assert len(found) == 17
    fused, plain, ratio = found["2: 16 to 24 channels, 112x112"]
    output, expanded = 2 * 24 * 56**2 * 4 / 1e6, 2 * 96 * 112**2 * 4 / 1e6
    assert output - 0.3 <= fused <= output + 2.5 and plain >= expanded and ratio == pytest.approx(plain / fused)


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="a plot needs matplotlib")
    plot = tmp_path / "plot.svg"
    done = CliRunner().invoke(app, ["tables", "--no-memory", "--json", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert [len(table["rows"]) for table in json.loads(done.stdout)] == [23, 5, 2, 3]
    assert plot.stat().st_size > 1000
    monkeypatch.setattr(tables, "classification", lambda: tables.Table("", ("a", "b"), [("4.337", 1.0)]))
    text = CliRunner().invoke(app, ["tables", "--no-memory", "--markdown"]).stdout
    assert "4.337" in CliRunner().invoke(app, ["tables", "--no-memory"]).stdout
    assert "| 112x112 | 1/O(1) | 24/588 | 32 | 784 | 96 | 2352 |" in text and "None" not in text
    assert CliRunner().invoke(app, ["tables", "--json", "--markdown"]).exit_code == 2
