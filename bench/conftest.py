"""`pytest bench`: what the block and model benchmarks share. Verification may fail; a time never does.

Threads are torch's: OMP_NUM_THREADS=1 pytest bench times one. Beside pytest-benchmark's table a summary gives GMAC/s
and the share of this machine's FMA peak, measured before each benchmark: the median so far. Training, whose
multiply-adds have no agreed count, is in the table only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mnv2_fused
from mnv2_fused import benchmark as engine

SECONDS = 0.25  # of calls per benchmark; there are more than a hundred
MIN_ROUNDS, MAX_ROUNDS = 3, 200

_PEAKS: dict[torch.dtype, list[float]] = {}  # all that were measured in this run


def pytest_configure(config: pytest.Config) -> None:
    # Only what is compared here: one group per block or model, slowest last.
    config.option.benchmark_columns = ["median", "iqr", "min", "rounds"]
    config.option.benchmark_sort = "median"


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[mnv2_fused.ops.Kernel], None]:
    """force(kernel): the fused code runs this row from now on; skips where the CPU does not support it."""

    def force(kernel: mnv2_fused.ops.Kernel) -> None:
        if not kernel.supported:
            pytest.skip(f"{kernel.name}: {kernel.reason}")
        monkeypatch.setenv("MNV2_FUSED_KERNEL", kernel.name)

    return force


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """measure(group, macs, call): times call() and adds GMAC/s and the share of the peak to the report.

    Where macs is None there is nothing to add. With `setup`, each time anew, call(setup()) is timed.
    """

    def measure(
        group: str,
        macs: int | None,
        call: Callable[..., object],
        dtype: torch.dtype = torch.float32,
        setup: Callable[[], object] | None = None,
    ) -> None:
        benchmark.group = group
        threads = torch.get_num_threads()

        def arguments() -> tuple[tuple[object, ...], dict[str, object]]:
            return (setup(),) if setup else (), {}

        call(*arguments()[0])
        ready, _ = arguments()
        start = time.perf_counter()
        call(*ready)
        rounds = min(max(int(SECONDS / (time.perf_counter() - start)), MIN_ROUNDS), MAX_ROUNDS)
        if macs:
            _PEAKS.setdefault(dtype, []).append(engine.fma_peak(engine.best_kernel(dtype), threads))
        benchmark.pedantic(call, setup=arguments, rounds=rounds, warmup_rounds=1)
        if macs and benchmark.stats:  # None with --benchmark-disable
            peak = statistics.median(_PEAKS[dtype])
            gmacs = macs / benchmark.stats.stats.median / 1e9
            benchmark.extra_info |= {
                "gmacs": gmacs,
                "share_of_peak": gmacs / peak,
                "peak_gmacs": peak,
                "threads": threads,
                "cpu": mnv2_fused._C.cpu_name(),
            }

    return measure


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [b for b in session.benchmarks if "gmacs" in b.extra_info] if session else []
    if not rows:
        return
    terminalreporter.section(f"GMAC/s and share of the FMA peak, {rows[0].extra_info['threads']} threads")
    for file in dict.fromkeys(b.fullname.split("::")[0] for b in rows):
        _write_summary(terminalreporter, [b for b in rows if b.fullname.startswith(file)])


def _write_summary(terminalreporter: pytest.TerminalReporter, rows: list[Any]) -> None:
    runners = list(dict.fromkeys(b.params["runner"] for b in rows))
    groups = list(dict.fromkeys(b.group for b in rows))
    cells = {(b.group, b.params["runner"]): "{gmacs:.1f} {share_of_peak:4.0%}".format(**b.extra_info) for b in rows}
    columns = [[runner, *(cells.get((group, runner), "") for group in groups)] for runner in runners]
    left = max(map(len, groups))
    widths = [max(map(len, column)) for column in columns]
    for label, *texts in zip(["", *groups], *columns, strict=True):
        line = "".join(f"  {text:>{width}}" for text, width in zip(texts, widths, strict=True))
        terminalreporter.write_line(f"{label:<{left}}{line}")
