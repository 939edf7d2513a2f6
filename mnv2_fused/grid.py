"""`mnv2-fused bench --grid`: the paper's 22 networks in each precision, the fused one against the other runtimes.

A row is one network in one precision, a run of benchmark.py: verified, in alternation, medians. Rows are independent
of each other and kept as they are found, in a file too.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _C, __version__, benchmark
from .benchmark import DTYPES, Options, Row
from .peers import RUNNERS_IN
from .tables import GRID

if TYPE_CHECKING:
    from rich.table import Table

SECONDS = 8.0  # of a row: it takes about as long again to start its processes

COLORS = ("tab:orange", "tab:blue", "tab:purple", "tab:brown", "tab:pink", "tab:gray", "tab:olive")  # of peers

Progress = Callable[[float, str], None]  # (rows done, what is being done)


@dataclass
class Entry:
    """A row of the grid.

    Attributes:
        width, resolution, dtype: the network, and what it is computed in.
        macs: multiply-adds per image.
        peak_gmacs, tolerance, left_out: as of benchmark.Result.
        rows: the runners'.
    """

    width: float
    resolution: int
    dtype: str
    macs: int
    peak_gmacs: float | None
    tolerance: float
    left_out: dict[str, str]
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{self.width}/{self.resolution} {self.dtype}"

    @property
    def fused(self) -> Row:
        return next(row for row in self.rows if row.name == "fused")

    @property
    def best(self) -> Row | None:
        """The fastest peer that was timed."""
        return min((row for row in self.rows if row.name != "fused" and row.ms), key=lambda row: row.ms, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times the fused network's time the fastest peer takes; None where either was not timed."""
        return self.best.ms / self.fused.ms if self.best and self.fused.ms else None

    @property
    def errors(self) -> list[str]:
        return [f"{self.title}, {row.name}: {row.error}" for row in self.rows if row.error]

    def __str__(self) -> str:
        fused = f"{self.fused.ms:.3g} ms" if self.fused.ms else "not timed"
        peer = f"; {self.best.name} {self.best.ms:.3g} ms" if self.best else ""
        return f"{self.title}: fused {fused}{peer}" + (f", {self.ratio:.2f} times" if self.ratio else "")


@dataclass
class Grid:
    """What `run` measured: `entries` in the order of measurement, which are fewer than asked for after an interrupt."""

    options: Options
    dtypes: tuple[str, ...]
    entries: list[Entry] = field(default_factory=list)

    def find(self, width: float, resolution: int, dtype: str) -> Entry | None:
        return next((e for e in self.entries if (e.width, e.resolution, e.dtype) == (width, resolution, dtype)), None)

    def of(self, dtype: str) -> list[Entry]:
        """Those of the precision in which fused and a peer were timed."""
        return [entry for entry in self.entries if entry.dtype == dtype and entry.ratio]

    @property
    def found(self) -> tuple[str, ...]:
        """The precisions of which there are rows."""
        return tuple(dtype for dtype in self.dtypes if any(entry.dtype == dtype for entry in self.entries))

    @property
    def errors(self) -> list[str]:
        return [error for entry in self.entries for error in entry.errors]

    @property
    def title(self) -> str:
        threads = "1 thread" if self.options.threads == 1 else f"{self.options.threads} threads"
        return f"MobileNetV2, the paper's {len(GRID)} networks, batch {self.options.batch}, {threads}"

    def summary(self) -> list[str]:
        """A line for each precision: in how many rows fused is the fastest, and which the others are."""
        lines = []
        for dtype in self.dtypes:
            entries = self.of(dtype)
            if not entries:
                continue
            slower = [entry for entry in entries if entry.ratio < 1]
            mean = statistics.geometric_mean(entry.ratio for entry in entries)
            least = min(entries, key=lambda entry: entry.ratio)
            line = f"{dtype}: fused is the fastest in {len(entries) - len(slower)} of {len(entries)} rows; the fastest"
            line += f" peer takes {mean:.2f} times as long (geometric mean), at least {least.ratio:.2f} times"
            line += f" ({least.best.name}, {least.width}/{least.resolution})"
            if slower:
                names = (f"{e.width}/{e.resolution} ({e.best.name}, {e.ratio:.2f} times)" for e in slower)
                line += f"; it is not at {', '.join(names)}"
            lines.append(line)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON; it holds no date and no paths."""
        return {**_header(self.options, self.dtypes), "summary": self.summary(), "rows": [*map(asdict, self.entries)]}

    def table(self) -> Table:
        """A rich table: one line for each network."""
        from rich.table import Table
        from rich.text import Text

        left_out = {(e.dtype, name): reason for e in self.entries for name, reason in e.left_out.items()}
        notes = [f"{_C.cpu_name().strip()}; ms per image, medians; M MAdds: million multiply-adds"]
        notes += self.summary() + [f"{dtype}: {name} {reason}" for (dtype, name), reason in left_out.items()]
        table = Table(title=self.title, caption="\n".join(notes), title_style="bold", caption_justify="left")
        table.add_column("\nnetwork", no_wrap=True)
        table.add_column("M\nMAdds", justify="right")
        for dtype in self.found:
            table.add_column(f"{dtype}\nfused", justify="right", style="green")
            table.add_column("\nfastest peer", no_wrap=True)
            table.add_column("/\nfused", justify="right")
        for width, resolution, *_ in GRID:
            found = [self.find(width, resolution, dtype) for dtype in self.found]
            if not any(found):
                continue
            cells = [f"{width}/{resolution}", f"{next(entry.macs for entry in found if entry) / 1e6:.0f}"]
            for entry in found:
                fused = entry and (f"{entry.fused.ms:.3g}" if entry.fused.ms else "error")
                peer = f"{entry.best.name} {entry.best.ms:.3g}" if entry and entry.best else ""
                ratio = f"{entry.ratio:.2f}x" if entry and entry.ratio else ""
                cells += [fused or "", peer, ratio]
            table.add_row(*map(Text, cells))
        return table

    def plot(self, path: str | os.PathLike) -> None:
        """Draws, for each precision, time against multiply-adds, and below the ratio to the fastest peer in each row.

        The file's format follows from its name.

        Raises:
            RuntimeError: matplotlib is not installed.
            ValueError: a file name that matplotlib knows no format for.
        """
        figure = benchmark.empty_figure(max(9.0, 4.6 * len(self.found)), 9)
        from matplotlib.ticker import LogLocator, NullFormatter

        figure.suptitle(self.title)
        above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
        names = list(dict.fromkeys(row.name for entry in self.entries for row in entry.rows))
        colors = dict(zip([name for name in names if name != "fused"], COLORS, strict=False)) | {"fused": "tab:green"}
        panels = above.subplots(1, len(self.found), sharex=True, sharey=True, squeeze=False)[0]
        for axes, dtype in zip(panels, self.found, strict=True):
            for name in names:
                points = sorted(
                    (e.macs / 1e6, row.ms) for e in self.entries if e.dtype == dtype for row in e.rows
                    if row.name == name and row.ms
                )  # fmt: skip
                if points:
                    style = dict(zorder=3, markersize=6) if name == "fused" else dict(markersize=4, alpha=0.8)
                    axes.plot(*zip(*points, strict=True), "o", color=colors[name], label=name, **style)
            axes.set(title=dtype, xscale="log", yscale="log", xlabel="million multiply-adds")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter(NullFormatter())
            axes.grid(True, alpha=0.25)
            axes.legend(frameon=False)
        panels[0].set_ylabel("ms per image")
        axes = below.subplots()
        places = {row[:2]: place for place, row in enumerate(GRID)}
        for dtype, marker in zip(self.found, "osD", strict=False):
            entries = self.of(dtype)
            at = [places[entry.width, entry.resolution] for entry in entries]
            axes.plot(at, [entry.ratio for entry in entries], marker, label=dtype)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xticks(range(len(GRID)), [f"{width}/{side}" for width, side, *_ in GRID], rotation=60, ha="right")
        axes.set(ylabel="time of the fastest peer / fused", xlim=(-0.6, len(GRID) - 0.4))
        axes.set_ylim(bottom=min([0.9, *(entry.ratio * 0.95 for dtype in self.found for entry in self.of(dtype))]))
        axes.grid(True, axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=len(self.found))
        figure.savefig(path, dpi=130)


def _header(options: Options, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """What rows must have in common to stand in one grid: the machine, the versions, the options."""
    kept = ("batch", "threads", "kernel", "runners", "seconds", "rounds")
    chosen = {name: value for name, value in asdict(options).items() if name in kept}
    return {
        "machine": {"cpu": _C.cpu_name(), "cores": os.cpu_count()},
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"mnv2_fused": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "options": {**chosen, "dtypes": list(dtypes)},
    }


def runners(dtype: str, named: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Those of a row: fused, and the other runtimes that are installed and compute in it, or of the named ones those.

    Raises:
        ValueError: there is none beside fused.
    """
    able = [runner for runner in RUNNERS_IN[dtype] if not runner.unavailable()]
    found = [r.name for r in able if r.name != "fused" and (r.name in named if named else r.packages)]
    if not found:
        wanted = f"of {', '.join(named)} none is here" if named else "no other runtime is installed"
        hint = "pip install 'mnv2-fused[peers]', or compare with 'eager channels_last'"
        raise ValueError(f"{wanted} to compare with in {dtype}: {hint}")
    return ("fused", *found)


def run(
    options: Options,
    dtypes: tuple[str, ...] = DTYPES,
    path: Path | None = None,
    progress: Progress = lambda done, description: None,
    found: Callable[[Entry], None] = lambda entry: None,
) -> Grid:
    """Measures every network of the paper in each precision.

    Args:
        options: `batch`, `threads`, `kernel`, `seconds` (of each row), `rounds`, and as `runners` those to compare
            with, by default the other runtimes that are installed; all else is the grid's.
        dtypes: of benchmark.DTYPES.
        path: every row is written there when it is found, as `Grid.to_dict`; rows that are there already are taken from
            there, but for those in which a runner failed.
        progress: called as (rows done, what is being done).
        found: called with every row that was measured.

    Returns:
        A grid; after a KeyboardInterrupt of what was found until then.

    Raises:
        ValueError: no runner to compare with; a file that is no grid, or one of another machine, version or options.
    """
    options = replace(options, threads=options.threads or torch.get_num_threads(), memory=False)
    names = {dtype: runners(dtype, options.runners) for dtype in dtypes}
    wanted = [(width, resolution, dtype) for dtype in dtypes for width, resolution, *_ in GRID]
    grid = Grid(options, dtypes, _read(path, _header(options, dtypes)) if path else [])
    taken, start = len(grid.entries), time.monotonic()
    try:
        for width, resolution, dtype in wanted:
            if grid.find(width, resolution, dtype):
                continue
            done = len(grid.entries)
            title = f"row {done + 1} of {len(wanted)}, {width}/{resolution} {dtype}"
            if done > taken:
                minutes = (time.monotonic() - start) / (done - taken) * (len(wanted) - done) / 60
                title += f", about {math.ceil(minutes)} min left"

            def show(fraction: float, description: str, done: int = done, title: str = title) -> None:
                progress(done + fraction, f"{title}: {description}")

            this = replace(options, width=width, resolution=resolution, dtype=dtype, runners=names[dtype])
            result = benchmark.run(this, progress=show)
            unable = {r.name: why for r in RUNNERS_IN[dtype] if r.packages and (why := r.unavailable())}
            peak = result.peak_gmacs
            entry = Entry(width, resolution, dtype, result.macs, peak, result.tolerance, unable, result.rows)
            grid.entries.append(entry)
            if path:
                _write(path, grid)
            found(entry)
    except KeyboardInterrupt:
        pass
    return grid


def _write(path: Path, grid: Grid) -> None:
    """All or nothing: an interrupt leaves the file with one row less."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps(grid.to_dict(), indent=1, allow_nan=False) + "\n")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _read(path: Path, header: dict[str, Any]) -> list[Entry]:
    """The rows of the file in which nothing failed; none where there is no file yet."""
    if not path.exists():
        return []
    header = json.loads(json.dumps(header))  # tuples are lists there
    try:
        report = json.loads(path.read_text())
        other = {name: report[name] for name in header}
        entries = [Entry(**entry | {"rows": [Row(**row) for row in entry["rows"]]}) for entry in report["rows"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no grid ({type(error).__name__}: {error})") from None
    if different := [name for name in header if header[name] != other[name]]:
        name = different[0]
        raise ValueError(f"{path} is of another {name}: {other[name]}, not {header[name]}")
    return [entry for entry in entries if not entry.errors]
