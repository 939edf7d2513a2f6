"""The engine of `mnv2-fused bench`: verifies all ways to run or to train the network, then times them in alternation.

Each runner lives in a process of its own that waits on a pipe until it is its turn: no thread pool, allocator or flag
of one is seen by another, and all of them see the same state of the machine. What the runners are stands in peers.py,
what they are asked to do in tasks.py.
"""

from __future__ import annotations

import importlib.metadata
import math
import multiprocessing
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _C, __version__
from .ops import kernels, selected_kernel
from .peers import Quantized, Runner
from .tasks import NETWORKS, Inference, Training
from .weights import random_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TURN_SECONDS = 0.05  # a runner's turn in a round: short beside the seconds over which a machine's clock drifts
PEAK_SECONDS = 0.02
SETTLE_SECONDS = 0.05  # idle threads of OpenMP and ONNX Runtime spin for 10 to 35 ms, as measured, before they sleep
SPREAD = 1.25  # between the quartiles of an idle machine's times lie a few percent

DTYPES = ("float32", "bfloat16", "int8")
CALIBRATION_IMAGES = 8
SHIFT = 1.0  # of the random networks: rounding to 8 bits would make nonsense of one with all its ReLU6 at their corners

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        batch: images per call, or per step of training.
        threads: of every runner; None is torch's number of threads.
        width: the factor on the network's widths.
        resolution: height and width of the images in pixels; None is the network's own.
        kernel: the row of the kernel table, of this dtype, that the fused network uses; None leaves the choice to it.
        peers: also those of onnxruntime, openvino, litert and ncnn that are installed.
        runners: names from peers.RUNNERS, or TRAINERS, instead: exactly these.
        seconds: time spent in rounds, at least; start-up and verification come on top.
        rounds: each runner has at least so many turns.
        memory: also measure the memory, which takes a second process per runner.
        train: a step of training of MobileNetV2 instead of inference; there are no peers for that.
        network: one of tasks.NETWORKS.
        dtype: one of DTYPES: what all runners compute in. Images are float32 in each, and results are compared with
            those in float64. Training in bfloat16 is under torch.autocast; int8 is of chains, and of inference, only.
    """

    batch: int = 1
    threads: int | None = None
    width: float = 1.0
    resolution: int | None = None
    kernel: str | None = None
    peers: bool = False
    runners: tuple[str, ...] | None = None
    seconds: float = 20.0
    rounds: int = 5
    memory: bool = True
    train: bool = False
    network: str = "mobilenet_v2"
    dtype: str = "float32"

    @property
    def task(self) -> type[Inference] | type[Training]:
        return Training if self.train else Inference

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network must be one of {list(NETWORKS)}, got {self.network!r}")
        if self.resolution is None:
            object.__setattr__(self, "resolution", NETWORKS[self.network].resolution)
        for name in ("batch", "threads", "resolution", "rounds"):
            value = getattr(self, name)
            if (value is not None or name != "threads") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        if not 0 < self.width < math.inf or not 0 <= self.seconds < math.inf:
            raise ValueError(f"width must be above 0 and seconds not below 0, got {self.width} and {self.seconds}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, got {self.dtype!r}")
        if self.dtype == "int8" and self.train:
            raise ValueError("int8 does not train: train goes with float32 and bfloat16")
        if self.dtype == "int8" and self.network not in ("mobilenet_v2", "mobilenet_v1"):
            raise ValueError(f"int8 is of mobilenet_v2 and mobilenet_v1 only, got {self.network}")
        if self.train and self.peers:
            raise ValueError("train and peers exclude each other: the other runtimes do inference only")
        if self.train and self.network != "mobilenet_v2":
            raise ValueError(f"train is of mobilenet_v2 only, got {self.network}")
        smallest = math.ceil(self.resolution / 32) ** 2
        if self.train and self.batch * smallest < 2:
            what = f"batch {self.batch} at {self.resolution}x{self.resolution}"
            raise ValueError(f"BatchNorm trains on two values or more: {what} leaves one; batch 2 or 33x33 would do")
        known = [runner.name for runner in self.task.runners(self.dtype)]
        if unknown := [name for name in self.runners or () if name not in known]:
            raise ValueError(f"runners must be among {known}, got {unknown}")
        rows = [kernel.name for kernel in kernels() if kernel.dtype == self.torch_dtype]
        if self.kernel is not None and self.kernel not in rows:
            raise ValueError(f"kernel must be one of {rows} for {self.dtype}, got {self.kernel!r}")


@dataclass
class Row:
    """One runner's results; those that were not measured are None.

    Attributes:
        name, version: of the runner.
        error: why it was not timed; "" when it was.
        relative_error: |results - exact| / |exact| of the worst image, exact being the plain composition in float64;
            of training the median of it over the gradients of one step; its loss and running statistics are within
            tasks.STEP_LIMITS.
        ms, q1_ms, q3_ms: median and quartiles over all calls, in milliseconds per image.
        calls: how many were timed.
        slower: how many times the fused network's time it takes.
        memory_mb: what inference needs beyond the model and its input, in 10^6 bytes. It is the peak resident memory of
            the warm runner's process during calls, less that of another process prepared for one 32x32 image, less what
            the input has grown. Peak resident memory is Linux's VmHWM; its noise is about 1 MB. Of training it is what
            a step adds to a process that holds model, optimizer and batch, gradients included, see
            tasks.Training.memory; its noise is some percent.
        heavier: how many times the fused network's memory it takes.
        kept_mb: what autograd keeps for backward, per image, beside model, input and labels, in 10^6 bytes.
        resident_mb: that process' whole peak: Python, libraries, model, input and all.
        images_per_second: at the median.
        gmacs: 10^9 multiply-adds a second, at the median.
        share_of_peak: gmacs over what this machine's vector units can do, see Result.peak_gmacs.
        remark: what a reader should know, see Runner.
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
    heavier: float | None = None
    kept_mb: float | None = None
    resident_mb: float | None = None
    images_per_second: float | None = None
    gmacs: float | None = None
    share_of_peak: float | None = None
    remark: str = ""


@dataclass
class Result:
    """What `run` measured.

    Attributes:
        options: as given, `threads` and `kernel` filled in.
        rows: one for each runner, in the order of peers.py.
        macs: multiply-adds per image; None of training, for which there is no agreed count.
        tolerance: the relative error up to which results were accepted, see tasks.Exact; None of training.
        peak_kernel, peak_gmacs: the best row that this CPU supports for the dtype, and the multiply-adds that `threads`
            threads did with its vectors in registers (10^9 a second): the median of one measurement in each round. Not
            measured where macs is None.
        rounds: turns that each runner had.
        left_out: peers that are not here, and why, or what to install.
    """

    options: Options
    rows: list[Row]
    macs: int | None
    peak_kernel: str
    peak_gmacs: float | None = None
    rounds: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    tolerance: float | None = None

    def __getitem__(self, name: str) -> Row:
        """The row of the runner of this name."""
        return next(row for row in self.rows if row.name == name)

    @property
    def title(self) -> str:
        o = self.options
        threads = "1 thread" if o.threads == 1 else f"{o.threads} threads"
        name = NETWORKS[o.network].title
        return f"{name} {o.width}/{o.resolution}, {o.dtype}, batch {o.batch}, {threads}{o.task.title}"

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
            "tolerance": self.tolerance,
            "rows": [asdict(row) for row in self.rows],
            "left_out": self.left_out,
        }

    def table(self) -> Table:
        """A rich table: one line for each runner."""
        from rich.table import Table
        from rich.text import Text

        cpu = _C.cpu_name().strip()
        if self.peak_gmacs:
            cpu += f", FMA peak {self.peak_gmacs:.1f} GMAC/s ({self.peak_kernel}, measured alongside)"
        notes = f"\nresults accepted up to an error of {self.tolerance:.2g}" if self.tolerance else ""
        notes += "".join(f"\n{name} {reason}" for name, reason in self.left_out.items())
        notes += "".join(f"\n{row.name}: {row.remark}" for row in self.rows if row.remark)
        if any(row.ms and row.q3_ms > SPREAD * row.q1_ms for row in self.rows):
            notes += "\nThe times spread widely: something else is using this machine. Measure again when it is idle."
        table = Table(title=self.title, caption=cpu + notes, title_style="bold", caption_justify="left")
        table.add_column("runner")
        table.add_column("version")
        for heading in self.options.task.columns:
            table.add_column(heading, justify="right")
        for row in self.rows:
            texts = [row.name, row.version]
            for form in self.options.task.columns.values():
                try:
                    texts.append(form.format(**vars(row)))
                except TypeError:  # None, which was not measured, takes no format
                    texts.append("")
            table.add_row(*map(Text, texts), style="green" if row.name == "fused" else None)
            if row.error:
                table.add_row("", Text(row.error, "red"))
        return table

    def plot(self, path: str | os.PathLike) -> None:
        """Draws the times as bars, and the time that the FMA peak allows, if known, as a line.

        The file's format follows from its name.

        Raises:
            RuntimeError: matplotlib is not installed.
            ValueError: a file name that matplotlib knows no format for.
        """
        rows = [row for row in reversed(self.rows) if row.ms is not None]
        figure = empty_figure(8, 1.4 + 0.42 * len(rows))
        axes = figure.subplots()
        colors = ["tab:green" if row.name == "fused" else "tab:gray" for row in rows]
        times = [row.ms for row in rows]
        spread = [[row.ms - row.q1_ms for row in rows], [row.q3_ms - row.ms for row in rows]]
        bars = axes.barh([row.name for row in rows], times, xerr=spread, color=colors, ecolor="black", capsize=2)
        axes.bar_label(bars, [f"{ms:.2f}" for ms in times], padding=6)
        axes.margins(x=0.12)
        if self.macs and self.peak_gmacs:
            limit = self.macs / self.peak_gmacs / 1e6
            axes.axvline(limit, color="tab:red", linestyle="--", label=f"FMA peak: {limit:.2f}")
            axes.legend(loc="lower right")
        axes.set(xlabel="ms per image (median, quartiles)", title=self.title)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)


def empty_figure(width: float, height: float) -> Figure:
    """A figure to draw on, in inches.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("a plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def run(
    options: Options = Options(),  # noqa: B008  (it is frozen)
    model: nn.Module | None = None,
    images: Tensor | None = None,
    progress: Progress = lambda fraction, description: None,
) -> Result:
    """Verifies, then times, the runners that `options` ask for.

    A runner that cannot start, or whose results are further off than the task allows, gets a row with the reason and
    no times.

    Args:
        options: see Options; with `model` given, `network` and `width` are only shown.
        model: in eval mode, float32; by default the network with seeded random weights. Training takes a copy of it.
        images: [batch, channels, resolution, resolution], float32; random by default. In int8 the ranges are those on
            these images if they are given, and else on others like them.
        progress: called as (fraction done, what is being done).

    Raises:
        ValueError: images of another shape, a kernel that this CPU does not support, or a runner asked for by its name
            that cannot be prepared.
    """
    options = _complete(options)
    shape = (options.batch, getattr(model, "in_channels", 3), options.resolution, options.resolution)
    generator = torch.Generator().manual_seed(0)
    calibration = images
    if images is None:
        images = torch.randn(shape, generator=generator)
    if images.shape != shape or images.dtype != torch.float32:
        raise ValueError(f"images must be float32 {list(shape)}, got {images.dtype} {list(images.shape)}")
    if model is None:
        network = NETWORKS[options.network]
        side = network.resolution // 2  # large enough for statistics of its smallest maps
        like = torch.randn(8, 3, side, side, generator=generator)
        model = random_model(like, network=network.make, shift=SHIFT, width_mult=options.width)
    if calibration is None:
        calibration = torch.randn(CALIBRATION_IMAGES, *shape[1:], generator=generator)

    task = options.task
    progress(0.0, "preparing the network")
    given, batch = task.inputs(model, images, options.dtype, calibration)
    wanted = [
        runner
        for runner in task.runners(options.dtype)
        if (runner.name in options.runners if options.runners else options.peers or not runner.packages)
    ]
    left_out = {runner.name: reason for runner in wanted if (reason := runner.missing(given))}
    if options.runners and left_out:  # what is asked for by its name is not left out silently
        raise ValueError("; ".join(f"{name} {reason}" for name, reason in left_out.items()))
    runners = [runner for runner in wanted if runner.name not in left_out]
    rows = [Row(runner.name, _version(runner, options), remark=runner.remark) for runner in runners]

    with _workers(runners, options, given, batch) as (workers, spares):
        for i, row in enumerate(rows):
            progress(0.3 * i / len(rows), f"starting {row.name}")
            row.error = workers[i].error()
            if options.memory and not row.error:
                row.error = spares[i].error()
        progress(0.3, "computing exactly")
        expected, macs = task.reference(model, given, batch, options.dtype)
        result = Result(options, rows, macs, best_kernel(options.torch_dtype), left_out=left_out)
        result.tolerance = getattr(expected, "tolerance", None)
        for i, row in enumerate(rows):
            progress(0.35 + 0.1 * i / len(rows), f"verifying {row.name}")
            if not row.error:
                task.verify(row, workers[i], expected)
            if options.memory and not row.error:
                task.measure_memory(row, workers[i], spares[i])
        for spare in spares:
            spare.leave()
        timed = [(row, worker) for row, worker in zip(rows, workers, strict=True) if not row.error]
        _time(result, timed, lambda fraction: progress(0.45 + 0.55 * fraction, "timing in alternation"))
    _compare(rows)
    progress(1.0, "done")
    return result


def _complete(options: Options) -> Options:
    supported = {kernel.name: kernel for kernel in kernels()}
    if options.kernel and not supported[options.kernel].supported:
        raise ValueError(f"kernel {options.kernel} cannot run here: {supported[options.kernel].reason}")
    threads, kernel = options.threads or torch.get_num_threads(), options.kernel or selected_kernel(options.torch_dtype)
    return replace(options, threads=threads, kernel=kernel)


def _version(runner: Runner, options: Options) -> str:
    if runner.packages:
        return importlib.metadata.version(runner.packages[-1])
    return f"{__version__} {options.kernel}" if runner.name == "fused" else torch.__version__


def _time(result: Result, timed: list[tuple[Row, Worker]], progress: Callable[[float], None]) -> None:
    """Rounds of turns: in each round every runner has one, in an order drawn anew, and the FMA peak is measured."""
    options = result.options
    seconds: dict[str, list[float]] = {row.name: [] for row, _ in timed}
    order = random.Random(0)
    peaks: list[float] = []

    def measure_peak() -> None:
        if result.macs:
            peaks.append(fma_peak(result.peak_kernel, options.threads))

    measure_peak()
    start = time.perf_counter()
    while timed and (result.rounds < options.rounds or time.perf_counter() - start < options.seconds):
        for row, worker in order.sample(timed, len(timed)):
            _settle(options.threads)
            calls, row.error = worker.ask("time")
            if not row.error:
                seconds[row.name] += calls
        timed = [(row, worker) for row, worker in timed if not row.error]
        _settle(options.threads)
        measure_peak()
        result.rounds += 1
        elapsed = (time.perf_counter() - start) / options.seconds if options.seconds else 1.0
        progress(min(1.0, elapsed, result.rounds / options.rounds))
    if peaks:
        result.peak_gmacs = statistics.median(peaks)
    for row, _ in timed:
        per_image = [1e3 * s / options.batch for s in seconds[row.name]]
        row.q1_ms, row.ms, row.q3_ms = np.quantile(per_image, (0.25, 0.5, 0.75)).tolist()
        row.calls = len(per_image)
        row.images_per_second = 1e3 / row.ms
        if result.macs:
            row.gmacs = result.macs / row.ms / 1e6
            row.share_of_peak = row.gmacs / result.peak_gmacs


def _compare(rows: list[Row]) -> None:
    fused = next((row for row in rows if row.name == "fused" and row.ms), None)
    for row in rows if fused else []:
        row.slower = row.ms and row.ms / fused.ms
        # A small network's memory may be less than the noise of its measurement.
        if row.memory_mb is not None and fused.memory_mb and fused.memory_mb > 0:
            row.heavier = row.memory_mb / fused.memory_mb


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


class Worker:
    """A process that runs one runner, seen from the parent. Answers are (value, error); one of them is empty."""

    def __init__(self, folder: Path, source: Path, runner: Runner, options: Options, spare: bool) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's thread pool and memory
        self._log = folder / f"{runner.name}{' spare' * spare}.log"
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, self._log, source, runner.name, options, spare)
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
    runners: list[Runner], options: Options, model: nn.Module | Quantized, batch: tuple[Tensor, ...]
) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """A worker for each runner; and a spare one, by which its memory is measured."""
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="mnv2_fused-") as name:
        folder = Path(name)
        source = folder / "source.pt"
        torch.save((model, tuple(tensor.contiguous() for tensor in batch)), source)
        try:
            for spare in (False, True)[: 1 + options.memory]:
                workers += [Worker(folder, source, runner, options, spare) for runner in runners]
            yield workers[: len(runners)], workers[len(runners) :]
        finally:
            for worker in workers:
                worker.leave()
            for worker in workers:
                worker.stop()


def _serve(pipe: Connection, log: Path, source: Path, name: str, options: Options, spare: bool) -> None:
    """The worker's process: prepares its runner, then obeys."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends us
    with open(log, "wb") as stream:
        for descriptor in (1, 2):  # the runtimes' remarks, and the last words of one that aborts
            os.dup2(stream.fileno(), descriptor)
    try:
        if selected_kernel(options.torch_dtype) != options.kernel:
            os.environ["MNV2_FUSED_KERNEL"] = options.kernel  # and no other dtype has a kernel from here on
        runner = next(runner for runner in options.task.runners(options.dtype) if runner.name == name)
        model, batch = torch.load(source, weights_only=False)  # the parent has just written it
        task = options.task(runner, model, batch, options.threads, spare, options.dtype)
        del model, batch  # the task has what it needs of them, and its memory is measured
        pipe.send((None, ""))
        commands = {"answer": task.answer, "time": lambda: _turn(task), "memory": task.memory}
        while True:
            pipe.send((commands[pipe.recv()](), ""))
    except EOFError:
        pass
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))


def _turn(call: Callable[[], None]) -> list[float]:
    """Seconds of each call within one turn."""
    call()  # not counted: it brings the weights back into the caches that the others had
    calls: list[float] = []
    end = time.perf_counter() + TURN_SECONDS
    while not calls or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        calls.append(time.perf_counter() - start)
    return calls
