"""The engine of `mnv2-fused bench`: verifies all ways to run the network, then times them in alternation.

Each runner lives in a process of its own that waits on a pipe until it is its turn: no thread pool, allocator or flag
of one is seen by another, and all of them see the same state of the machine. What the runners are stands in peers.py.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import importlib.metadata
import math
import multiprocessing
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from . import _C, __version__
from .mobilenet_v2 import MobileNetV2
from .ops import kernels, selected_kernel
from .peers import RUNNERS, Runner
from .weights import random_model

if TYPE_CHECKING:
    from rich.table import Table

TOLERANCE = 1e-3  # relative norm of the logits; every float32 run is within 1e-5, this is for runs of another network
TURN_SECONDS = 0.05  # a runner's turn in a round: short beside the seconds over which a machine's clock drifts
PEAK_SECONDS = 0.02
SETTLE_SECONDS = 0.05  # idle threads of OpenMP and ONNX Runtime spin for 10 to 35 ms, as measured, before they sleep
SPREAD = 1.25  # between the quartiles of an idle machine's times lie a few percent
_BASE_SIZE = 32  # the image beside which memory is counted: 1/49 of the activations of 224x224

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        batch: images per call.
        threads: of every runner; None is torch's number of threads.
        width: the factor on the network's widths.
        resolution: height and width of the images in pixels.
        kernel: the row of the kernel table that the fused network uses; None leaves the choice to it.
        peers: also those of onnxruntime, openvino, litert and ncnn that are installed.
        runners: names from peers.RUNNERS instead: exactly these.
        seconds: time spent in rounds, at least; start-up and verification come on top.
        rounds: each runner has at least so many turns.
        memory: also measure the memory, which takes a second process per runner.
    """

    batch: int = 1
    threads: int | None = None
    width: float = 1.0
    resolution: int = 224
    kernel: str | None = None
    peers: bool = False
    runners: tuple[str, ...] | None = None
    seconds: float = 20.0
    rounds: int = 5
    memory: bool = True

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "resolution", "rounds"):
            value = getattr(self, name)
            if (value is not None or name != "threads") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if not 0 < self.width < math.inf or not 0 <= self.seconds < math.inf:
            raise ValueError(f"width must be above 0 and seconds not below 0, got {self.width} and {self.seconds}")
        known = [runner.name for runner in RUNNERS]
        if unknown := [name for name in self.runners or () if name not in known]:
            raise ValueError(f"runners must be among {known}, got {unknown}")
        rows = [kernel.name for kernel in kernels() if kernel.dtype == torch.float32]
        if self.kernel is not None and self.kernel not in rows:
            raise ValueError(f"kernel must be one of {rows}, got {self.kernel!r}")


@dataclass
class Row:
    """One runner's results; those that were not measured are None.

    Attributes:
        name, version: of the runner.
        error: why it was not timed; "" when it was.
        relative_error: |logits - exact| / |exact|, exact being the plain composition in float64.
        ms, q1_ms, q3_ms: median and quartiles over all calls, in milliseconds per image.
        calls: how many were timed.
        slower: how many times the fused network's time it takes.
        memory_mb: what inference needs beyond the model and its input, in 10^6 bytes. It is the peak resident memory of
            the warm runner's process during calls, less that of another process prepared for one 32x32 image, less what
            the input has grown. Peak resident memory is Linux's VmHWM; its noise is about 1 MB.
        resident_mb: that process' whole peak: Python, libraries, model, input and all.
        gmacs: 10^9 multiply-adds a second, at the median.
        share_of_peak: gmacs over what this machine's vector units can do, see Result.peak_gmacs.
    """

    name: str
    version: str
    error: str = ""
    relative_error: float | None = None
    ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    calls: int = 0
    slower: float | None = None
    memory_mb: float | None = None
    resident_mb: float | None = None
    gmacs: float | None = None
    share_of_peak: float | None = None


@dataclass
class Result:
    """What `run` measured.

    Attributes:
        options: as given, `threads` and `kernel` filled in.
        rows: one for each runner, in the order of peers.RUNNERS.
        macs: multiply-adds per image.
        peak_kernel, peak_gmacs: the best row that this CPU supports, and the multiply-adds that `threads` threads did
            with its vectors in registers (10^9 a second): the median of one measurement in each round.
        rounds: turns that each runner had.
        not_installed: peers that were asked for and are not here, and what to install.
    """

    options: Options
    rows: list[Row]
    macs: int
    peak_kernel: str
    peak_gmacs: float = 0.0
    rounds: int = 0
    not_installed: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Row:
        """The row of the runner of this name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def title(self) -> str:
        o = self.options
        threads = "1 thread" if o.threads == 1 else f"{o.threads} threads"
        return f"MobileNetV2 {o.width}/{o.resolution}, float32, batch {o.batch}, {threads}"

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON, with the machine and the versions; it holds no date and no paths."""
        return {
            "machine": {"cpu": _C.cpu_name(), "cores": os.cpu_count(), "features": _C.cpu_features()},
            "system": f"{platform.system()} {platform.machine()}",
            "versions": {"mnv2_fused": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "options": asdict(self.options),
            "macs_per_image": self.macs,
            "fma_peak": {"kernel": self.peak_kernel, "gmacs": self.peak_gmacs},
            "rounds": self.rounds,
            "rows": [asdict(row) for row in self.rows],
            "not_installed": self.not_installed,
        }

    def table(self) -> Table:
        """A rich table: one line for each runner."""
        from rich.table import Table
        from rich.text import Text

        cpu = f"{_C.cpu_name().strip()}, FMA peak {self.peak_gmacs:.1f} GMAC/s ({self.peak_kernel}, measured alongside)"
        notes = "".join(f"\n{name} {reason}" for name, reason in self.not_installed.items())
        if any(row.ms and row.q3_ms > SPREAD * row.q1_ms for row in self.rows):
            notes += "\nThe times spread widely: something else is using this machine. Measure again when it is idle."
        table = Table(title=self.title, caption=cpu + notes, title_style="bold", caption_justify="left")
        table.add_column("runner")
        table.add_column("version")
        for heading in ("ms / image", "quartiles", "time / fused", "memory MB", "GMAC/s", "of peak", "error"):
            table.add_column(heading, justify="right")

        def show(value: float | None, form: str, unit: str = "") -> str:
            return "" if value is None else format(value, form) + unit

        for row in self.rows:
            texts = [row.name, row.version, show(row.ms, ".2f")]
            texts.append("" if row.ms is None else f"{row.q1_ms:.2f} - {row.q3_ms:.2f}")
            texts += [show(row.slower, ".2f", "x"), show(row.memory_mb, ".1f"), show(row.gmacs, ".1f")]
            texts += [show(row.share_of_peak, ".0%"), show(row.relative_error, ".1e")]
            table.add_row(*map(Text, texts), style="green" if row.name == "fused" else None)
            if row.error:
                table.add_row("", Text(row.error, "red"))
        return table

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the times as bars, and the time that the FMA peak allows as a line; the format follows from the name.

        Raises:
            RuntimeError: matplotlib is not installed.
            ValueError: a file name that matplotlib knows no format for.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise RuntimeError("a plot needs matplotlib: pip install matplotlib") from None
        rows = [row for row in reversed(self.rows) if row.ms is not None]
        figure = Figure(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        colors = ["tab:green" if row.name == "fused" else "tab:gray" for row in rows]
        times = [row.ms for row in rows]
        spread = [[row.ms - row.q1_ms for row in rows], [row.q3_ms - row.ms for row in rows]]
        bars = axes.barh([row.name for row in rows], times, xerr=spread, color=colors, ecolor="black", capsize=2)
        axes.bar_label(bars, [f"{ms:.2f}" for ms in times], padding=6)
        axes.margins(x=0.12)
        limit = self.macs / self.peak_gmacs / 1e6
        axes.axvline(limit, color="tab:red", linestyle="--", label=f"FMA peak: {limit:.2f}")
        axes.set(xlabel="ms per image (median, quartiles)", title=self.title)
        axes.legend(loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def run(
    options: Options = Options(),  # noqa: B008  (it is frozen)
    model: MobileNetV2 | None = None,
    images: Tensor | None = None,
    progress: Progress = lambda fraction, description: None,
) -> Result:
    """Verifies, then times, the runners that `options` ask for.

    A runner that cannot start, or whose logits are off by more than TOLERANCE, gets a row with the reason and no times.

    Args:
        options: see Options; with `model` given, `width` is only shown.
        model: in eval mode, float32; by default a MobileNetV2 with seeded random weights.
        images: [batch, channels, resolution, resolution], float32; random by default.
        progress: called as (fraction done, what is being done).

    Raises:
        ValueError: images of another shape, or a kernel that this CPU does not support.
    """
    options = _complete(options)
    shape = (options.batch, model.in_channels if model else 3, options.resolution, options.resolution)
    generator = torch.Generator().manual_seed(0)
    if images is None:
        images = torch.randn(shape, generator=generator)
    if images.shape != shape or images.dtype != torch.float32:
        raise ValueError(f"images must be float32 {list(shape)}, got {images.dtype} {list(images.shape)}")
    if model is None:
        model = random_model(torch.randn(8, 3, 64, 64, generator=generator), width_mult=options.width)

    wanted = [r for r in RUNNERS if (r.name in options.runners if options.runners else options.peers or not r.packages)]
    not_installed = {runner.name: reason for runner in wanted if (reason := runner.missing())}
    runners = [runner for runner in wanted if runner.name not in not_installed]
    rows = [Row(runner.name, _version(runner, options)) for runner in runners]

    with _workers(runners, options, model, images) as (workers, bases):
        for i, row in enumerate(rows):
            progress(0.3 * i / len(rows), f"starting {row.name}")
            row.error = workers[i].error()
            if options.memory and not row.error:
                row.error = bases[i].error()
        progress(0.3, "computing the exact logits")
        expected, macs = exact(model, images)
        result = Result(options, rows, macs, best_kernel(), not_installed=not_installed)
        for i, row in enumerate(rows):
            progress(0.35 + 0.1 * i / len(rows), f"verifying {row.name}")
            if not row.error:
                _verify(row, workers[i], expected)
            if options.memory and not row.error:
                _measure_memory(row, workers[i], bases[i])
        for base in bases:
            base.leave()
        timed = [(row, worker) for row, worker in zip(rows, workers, strict=True) if not row.error]
        _time(result, timed, lambda fraction: progress(0.45 + 0.55 * fraction, "timing in alternation"))
    progress(1.0, "done")
    return result


def _complete(options: Options) -> Options:
    supported = {kernel.name: kernel for kernel in kernels()}
    if options.kernel and not supported[options.kernel].supported:
        raise ValueError(f"kernel {options.kernel} cannot run here: {supported[options.kernel].reason}")
    values = {name: getattr(options, name) for name in options.__dataclass_fields__}
    values["threads"] = options.threads or torch.get_num_threads()
    values["kernel"] = options.kernel or selected_kernel()
    return Options(**values)


def _version(runner: Runner, options: Options) -> str:
    if runner.packages:
        return importlib.metadata.version(runner.packages[-1])
    return f"{__version__} {options.kernel}" if runner.name == "fused" else torch.__version__


def exact(model: MobileNetV2, images: Tensor) -> tuple[Tensor, int]:
    """The logits of the plain composition in float64, and the multiply-adds per image."""
    plain = copy.deepcopy(model).double()
    plain.fused = False
    # In float64 PyTorch runs a depthwise convolution channel by channel: too little work for a second thread.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            logits = torch.cat([plain(image.double()) for image in images.split(1)])
    finally:
        torch.set_num_threads(threads)
    return logits, counter.get_total_flops() // 2 // len(images)


def _verify(row: Row, worker: _Worker, exact: Tensor) -> None:
    logits, row.error = worker.ask("logits")
    if row.error:
        return
    if logits.shape != exact.shape:
        row.error = f"its logits are {list(logits.shape)}, expected {list(exact.shape)}"
        return
    error = ((logits.double() - exact).norm() / exact.norm()).item()
    row.relative_error = error if math.isfinite(error) else None
    if not error <= TOLERANCE:
        row.error = f"its logits are off by {error:.1e} (relative norm), more than {TOLERANCE:g}: not timed"


def _measure_memory(row: Row, worker: _Worker, base: _Worker) -> None:
    (full, row.error), (least, error) = worker.ask("peak"), base.ask("peak")
    row.error = row.error or error
    if full and least and not row.error:
        row.resident_mb = full[0] / 1e6
        row.memory_mb = (full[0] - full[1] - (least[0] - least[1])) / 1e6


def _time(result: Result, timed: list[tuple[Row, _Worker]], progress: Callable[[float], None]) -> None:
    """Rounds of turns: in each round every runner has one, in an order drawn anew, and the FMA peak is measured."""
    options = result.options
    seconds: dict[str, list[float]] = {row.name: [] for row, _ in timed}
    order = random.Random(0)
    peaks = [fma_peak(result.peak_kernel, options.threads)]
    start = time.perf_counter()
    while timed and (result.rounds < options.rounds or time.perf_counter() - start < options.seconds):
        for row, worker in order.sample(timed, len(timed)):
            _settle(options.threads)
            calls, row.error = worker.ask("time")
            if not row.error:
                seconds[row.name] += calls
        timed = [(row, worker) for row, worker in timed if not row.error]
        _settle(options.threads)
        peaks.append(fma_peak(result.peak_kernel, options.threads))
        result.rounds += 1
        elapsed = (time.perf_counter() - start) / options.seconds if options.seconds else 1.0
        progress(min(1.0, elapsed, result.rounds / options.rounds))
    result.peak_gmacs = statistics.median(peaks)
    for row, _ in timed:
        per_image = [1e3 * s / options.batch for s in seconds[row.name]]
        row.q1_ms, row.ms, row.q3_ms = np.quantile(per_image, (0.25, 0.5, 0.75)).tolist()
        row.calls = len(per_image)
        row.gmacs = result.macs / row.ms / 1e6
        row.share_of_peak = row.gmacs / result.peak_gmacs
    fused = next((row.ms for row, _ in timed if row.name == "fused"), None)
    for row, _ in timed:
        row.slower = row.ms / fused if fused else None


def _settle(threads: int) -> None:
    if threads > 1:
        time.sleep(SETTLE_SECONDS)


def best_kernel(dtype: torch.dtype = torch.float32) -> str:
    """The best kernel row of this dtype that the CPU supports, whatever MNV2_FUSED_KERNEL says."""
    return next(kernel.name for kernel in kernels() if kernel.supported and kernel.dtype == dtype)


def fma_peak(kernel: str, threads: int) -> float:
    """Multiply-adds in registers with this row's vectors, by `threads` threads at once, in 10^9 a second."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda _: _C.fma_peak(kernel, PEAK_SECONDS), range(threads)))


# ---- The workers


class _Worker:
    """A process that runs one runner, seen from the parent. Answers are (value, error); one of them is empty."""

    def __init__(self, folder: Path, label: str, source: Path, runner: Runner, options: Options) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pool and memory
        self._log = folder / f"{label}.log"
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._log, source, runner.name, options.threads, options.kernel)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def error(self) -> str:
        """Waits until the runner is prepared; why it could not be, or ""."""
        return self._receive()[1]

    def ask(self, command: str) -> tuple[Any, str]:
        with suppress(OSError):  # it has ended: what it said last is still in the pipe
            self._pipe.send(command)
        return self._receive()

    def _receive(self) -> tuple[Any, str]:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            said = self._log.read_text(errors="replace").strip().splitlines()[-1:] if self._log.exists() else []
            return None, ": ".join([f"its process ended with exit code {self._process.exitcode}", *said])

    def leave(self) -> None:
        """Tells the process to end, which it does once it is idle."""
        self._pipe.close()

    def stop(self) -> None:
        self.leave()
        self._process.join(2)
        self._process.terminate()
        self._process.join()


@contextmanager
def _workers(
    runners: list[Runner], options: Options, model: MobileNetV2, images: Tensor
) -> Iterator[tuple[list[_Worker], list[_Worker]]]:
    """A worker for each runner; and one prepared for a single small image, beside which its memory is counted."""
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory(prefix="mnv2_fused-") as name:
        folder = Path(name)
        source, base = folder / "source.pt", folder / "base.pt"
        small = images[:1, :, :_BASE_SIZE, :_BASE_SIZE].clone()
        torch.save((model, images.contiguous()), source)
        torch.save((model, small), base)
        try:
            for i, runner in enumerate(runners):
                workers.append(_Worker(folder, f"{i}", source, runner, options))
            for i, runner in enumerate(runners if options.memory else []):
                workers.append(_Worker(folder, f"{i}base", base, runner, options))
            yield workers[: len(runners)], workers[len(runners) :]
        finally:
            for worker in workers:
                worker.leave()
            for worker in workers:
                worker.stop()


def _serve(pipe: Connection, log: Path, source: Path, name: str, threads: int, kernel: str) -> None:
    """The worker's process: prepares its runner, then obeys."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends us
    with open(log, "wb") as stream:
        for descriptor in (1, 2):  # the runtimes' remarks, and the last words of one that aborts
            os.dup2(stream.fileno(), descriptor)
    try:
        os.environ["MNV2_FUSED_KERNEL"] = kernel
        runner = next(runner for runner in RUNNERS if runner.name == name)
        model, images = torch.load(source, weights_only=False)  # the parent has just written it
        x = runner.input(images)
        del images
        call = runner.prepare(model, x, threads)
        call(x)
        pipe.send((None, ""))
        commands = {
            "logits": lambda: torch.as_tensor(call(x)),
            "time": lambda: _turn(call, x),
            "peak": lambda: _peak(call, x),
        }
        while True:
            pipe.send((commands[pipe.recv()](), ""))
    except EOFError:
        pass
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))


def _turn(call: Callable[[Tensor], Any], x: Tensor) -> list[float]:
    """Seconds of each call within one turn."""
    call(x)  # not counted: it brings the weights back into the caches that the others had
    calls: list[float] = []
    end = time.perf_counter() + TURN_SECONDS
    while not calls or time.perf_counter() < end:
        start = time.perf_counter()
        call(x)
        calls.append(time.perf_counter() - start)
    return calls


def _peak(call: Callable[[Tensor], Any], x: Tensor) -> tuple[int, int] | None:
    """The peak of the resident memory during calls and the size of the input, in bytes; None where it is not told."""
    if sys.platform != "linux":
        return None
    gc.collect()
    with suppress(AttributeError):  # glibc's: what loading and compiling left on the heap is not inference's
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
    for _ in range(3):
        call(x)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024, x.nbytes
