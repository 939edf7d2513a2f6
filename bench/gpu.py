"""`python bench/gpu.py`: builds, tests and measures on an NVIDIA GPU; all it finds goes into one JSON file and a plot.

Whatever touches the device runs in a process of its own, a step each: a kernel that hangs, or after whose fault no
call works any more, costs its own numbers and no others. Such a process notes what it has found, what it is doing and
how long that may take; where it ends or falls silent in the middle of a runner, the step starts anew without that one.
How runners are timed (turns, in an order drawn anew each round) is mnv2_fused/benchmark.py's, as on the CPU.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

if TYPE_CHECKING:
    from mnv2_fused import MobileNetV2
    from mnv2_fused.peers import Runner

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # for mnv2_fused, which functions import: before the build there may be none

PATIENCE = 60.0  # seconds in which a call of anything but a compiler must be over
TURN_SECONDS = 0.05  # of a runner in a round
SANITIZE_SECONDS = 150.0  # for each tool, on top of the budget
IMAGES = 4  # that are different, and computed in float64; a batch repeats them, so that all of it is verified

# Relative norm of the logits. PyTorch eager is within 1.2e-2 in bfloat16 and 2e-3 in float16, on the CPU.
TOLERANCE = {"bfloat16": 2e-2, "float16": 2e-2, "tf32": 5e-3}
LOSS_TOLERANCE = 2e-2
COSINE = 0.98  # between the gradients of a step and those of float32, all in one row
KNOWN, WRONG = 0.8, 0.5  # a tensor whose cosine eager keeps above the one must not fall below the other

Call = Callable[[], Any]
Facts = dict[str, Any]


# ---- What is written


def write_json(path: Path, value: object) -> None:
    """All or nothing: whoever reads it, or kills us meanwhile, finds the old file or the new one."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(_finite(value), indent=1, default=str, allow_nan=False) + "\n")
    fresh.replace(path)


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def message(error: BaseException, limit: int = 800) -> str:
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines[:6])}"[:limit]


@dataclass(frozen=True)
class Options:
    batch: int = 256
    resolution: int = 224
    minutes: float = 8.0
    quick: bool = False
    device: str = "cuda"

    @property
    def seconds(self) -> float:
        """Of each comparison, in rounds."""
        return 1.0 if self.quick else 3.0


class Notes:
    """The side of a step's process: what it has found, what it is doing, until when, in a file that is always whole."""

    def __init__(self, path: Path, seconds: float, left_out: dict[str, str], warming: bool = False) -> None:
        self.path, self.left_out, self.warming = path, left_out, warming
        self.deadline = time.time() + seconds
        self.found: Facts = {}
        self._doing, self._until, self.error = "", self.deadline, ""
        self.save()

    def doing(self, what: str, patience: float = PATIENCE) -> None:
        self._doing, self._until = what, time.time() + patience
        self.save()

    def save(self) -> None:
        write_json(self.path, {"doing": self._doing, "until": self._until, "error": self.error, "found": self.found})


def read_notes(path: Path | None) -> Facts:
    try:
        return json.loads(path.read_text())
    except (AttributeError, OSError, ValueError):  # there are none, or none yet
        return {"doing": "", "until": math.inf, "error": "", "found": {}}


# ---- Time


class Timer:
    """Seconds of each call in a turn: by CUDA events, between which nothing waits; on the CPU by the clock.

    Args:
        flush: bytes that are written before every call, so that it finds nothing in the L2 cache. The device is idle
            then: a call's time is that until its result is there, the launches included.
    """

    def __init__(self, device: torch.device, flush: int = 0) -> None:
        self._cuda = device.type == "cuda"
        self._scratch = torch.empty(flush, dtype=torch.uint8, device=device) if flush else None

    def __call__(self, call: Call, turns: float = 1) -> list[float]:
        once = self._once(call)  # not counted: it brings back what the others have displaced
        calls = max(1, min(200, int(turns * TURN_SECONDS / once)))
        if self._scratch is not None:
            return [self._once(call) for _ in range(calls)]
        marks = [self._mark()]
        for _ in range(calls):
            call()
            marks.append(self._mark())
        self.wait()
        return [self._between(*pair) for pair in zip(marks, marks[1:], strict=False)]

    def _once(self, call: Call) -> float:
        if self._scratch is not None:
            self._scratch.zero_()
        self.wait()
        start = self._mark()
        call()
        end = self._mark()
        self.wait()
        return max(self._between(start, end), 1e-7)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self._cuda else end - start

    def wait(self) -> None:
        """Raises where a kernel has failed since, and for ever after one has broken the device for this process."""
        if self._cuda:
            torch.cuda.synchronize()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after that many seconds of the block, and then every five: compilers swallow the odd exception."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def share(left: float, needs: list[float]) -> float:
    """The limit of the first of the steps to come: its own seconds and all that the others can spare; with too little
    for all, its part of it."""
    slack = left - sum(needs)
    if slack >= 0:
        return needs[0] + slack
    return left * needs[0] / sum(needs) if left > 0 else 0.0


# ---- A comparison


class _Turns(NamedTuple):
    """A runner in this process, for benchmark.py that asks its workers for a turn."""

    name: str
    call: Call
    timer: Timer
    notes: Notes

    def ask(self, command: str) -> tuple[list[float], str]:
        self.notes.doing(self.name)
        try:
            return self.timer(self.call), ""
        except Exception as error:
            self.timer.wait()
            return [], message(error)


class Way(NamedTuple):
    """A runner to compare: make(facts) returns its call, verified, or raises; `compiles` says that it takes long."""

    make: Callable[[Facts], Call]
    compiles: bool = False


def compare(
    notes: Notes, title: str, ways: dict[str, Way], timer: Timer, seconds: float, batch: int, rounds: int = 5
) -> list[Facts]:
    """Makes all ways, then times them in alternation: a row each, with median and quartiles in ms, or with the error.

    Where `notes` are those of a process that only warms caches, the compilers run and nothing is timed.
    """
    from mnv2_fused import benchmark

    options = benchmark.Options(threads=1, seconds=seconds, rounds=rounds, memory=False)  # a batch of 1: one call
    rows = {name: benchmark.Row(name, "") for name, way in ways.items() if way.compiles or not notes.warming}
    facts: dict[str, Facts] = {name: {} for name in rows}

    def results() -> list[Facts]:
        kept = ("name", "ms", "q1_ms", "q3_ms", "calls", "slower", "images_per_second", "error")
        table = [{key: getattr(row, key) for key in kept} for row in rows.values()]
        return [{key: v for key, v in row.items() if v not in (None, "", 0)} | facts[row["name"]] for row in table]

    def note() -> None:
        notes.found[title] = results()

    note()
    timed = []
    slow = [name for name in rows if ways[name].compiles]
    for name, row in rows.items():
        row.error = notes.left_out.get(name, "")
        if row.error:
            continue
        limit = PATIENCE
        if name in slow:
            reserve = 0 if notes.warming else 10 + 2 * seconds
            limit = (notes.deadline - time.time() - reserve) / (len(slow) - slow.index(name))
        if limit < 10:
            facts[name]["skipped"] = "no time was left to compile it"
            continue
        notes.doing(name, limit + 20)
        start = time.time()
        try:
            with limited(limit):
                timed.append((row, _Turns(name, ways[name].make(facts[name]), timer, notes)))
                timer.wait()
        except Exception as error:
            late = time.time() - start >= limit  # of which compilers make errors of their own
            row.error = f"not ready after {limit:.0f} s: not timed" if late else message(error)
            timed = [pair for pair in timed if pair[0] is not row]
            traceback.print_exc()
            timer.wait()
        facts[name]["prepared_in_s"] = round(time.time() - start, 2)
        note()
    if not notes.warming:
        result = benchmark.Result(options, list(rows.values()), None, "")
        benchmark._time(result, timed, lambda fraction: None)
        benchmark._compare(result.rows)
        for row in rows.values():
            row.images_per_second = row.images_per_second and batch * row.images_per_second
        notes.doing("the end")
    note()
    return notes.found[title]


def relative_error(values: Tensor, exact: Tensor) -> float:
    exact = exact.to(values.device, torch.float64)
    return ((values.double() - exact).norm() / exact.norm()).item()


def verify(facts: Facts, values: Tensor, exact: Tensor, tolerance: float) -> None:
    """Raises where the values are off by more: what is wrong is not timed."""
    if values.shape != exact.shape:
        raise ValueError(f"the result is {list(values.shape)}, expected {list(exact.shape)}: not timed")
    facts["relative_error"] = error = relative_error(values, exact)
    if not error <= tolerance:
        raise ValueError(f"the result is off by {error:.1e} (relative norm), more than {tolerance:g}: not timed")


# ---- The network


def network(resolution: int) -> tuple[MobileNetV2, Tensor]:
    """A MobileNetV2 of seeded random weights in eval mode, and the images that it is verified with; on the CPU.

    BatchNorms have the statistics of these images, and shifts of about 1. With statistics at random nearly nothing of
    an image reaches the logits: whoever takes the borders for something else, or drops channels, stays within the
    tolerance. With shifts of about 0 every layer doubles what has been rounded before it, and eager in bfloat16 is off
    by 10%, its gradients by more than half; here by 1%, while those two mistakes make 27% and 3%.
    """
    from mnv2_fused import MobileNetV2

    images = torch.randn(IMAGES, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = MobileNetV2(num_classes=1000).train()
        model.fused = False
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(1, 0.3)
            norm.momentum = 1.0
        model.forward_features(images)
        for norm in norms:
            norm.momentum = 0.1
        model.fused = True
    return model.eval(), images


def folded(module: nn.Module) -> nn.Module:
    """A copy in plain PyTorch with every BatchNorm folded into its convolution, in float64."""
    plain = copy.deepcopy(module).eval()
    dtype = next(plain.parameters()).dtype
    plain.fused = False
    plain.double()
    for layers in [layers for layers in plain.modules() if type(layers) is nn.Sequential]:
        for i in range(len(layers) - 1):
            if isinstance(layers[i], nn.Conv2d) and isinstance(layers[i + 1], nn.BatchNorm2d):
                layers[i], layers[i + 1] = fuse_conv_bn_eval(layers[i], layers[i + 1]), nn.Identity()
    return plain.to(dtype, memory_format=torch.channels_last)


def captured(call: Call, calls: int = 1) -> tuple[Call, Any]:
    """Replays of a CUDA graph of so many calls, and the last one's result."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = call()
    return graph.replay, result


def settings() -> None:
    """For all runners: TF32 where numbers are float32, and the fastest of cuDNN's algorithms."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def runners(options: Options) -> list[Runner]:
    """The ways to run the network, in the terms of peers.py."""
    from mnv2_fused import peers

    ways = {runner.name: runner for runner in peers.RUNNERS}

    def graphed(model: MobileNetV2, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
        call, image = ways["fused"].prepare(model, example, threads), example.clone()
        replay, logits = captured(lambda: call(image))

        def run(x: Tensor) -> Tensor:
            image.copy_(x)  # as torch.compile's graphs do
            replay()
            return logits

        return run

    def compiled(mode: str) -> Runner:
        def prepare(model: MobileNetV2, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
            return torch.no_grad()(torch.compile(folded(model), mode=mode, dynamic=False))

        return peers.Runner(f"torch.compile {mode}", prepare, channels_last=True, compiles=True)

    found = [ways["fused"]._replace(channels_last=True)]
    if options.device == "cuda":
        found.append(peers.Runner("fused, CUDA graph", graphed, channels_last=True))
    found += [ways["eager channels_last"], ways["eager"]]
    if not options.quick:
        found += [compiled("reduce-overhead"), compiled("max-autotune")]  # the latter may not be over in time
    return found


# ---- The steps that run in a process of their own


def inference(notes: Notes, options: Options, kind: str, batch: str | int) -> None:
    """The logits of a batch, all of them verified."""
    from mnv2_fused.tasks import Inference

    notes.doing("computing exactly")
    settings()
    device, batch = torch.device(options.device), int(batch)
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    model, images = network(options.resolution)
    exact, macs = Inference.exact(model, (images[:batch],))
    x, exact = (t.repeat(-(-batch // len(t)), *[1] * (t.dim() - 1))[:batch] for t in (images, exact))
    model, x = model.to(device, dtype), x.to(device, dtype)
    with torch.no_grad():
        notes.found |= {"macs_per_image": macs, "why_not_fused": model.why_not_fused(x)}

    def make(runner: Runner, facts: Facts) -> Call:
        example = runner.input(x)
        call = runner.prepare(model, example, torch.get_num_threads())
        for _ in range(3):  # torch.compile's graphs: a call to warm up, one to capture, a replay
            verify(facts, call(example), exact, TOLERANCE[kind])
        return lambda: call(example)

    flush = 0
    if batch == 1 and device.type == "cuda":
        flush = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    notes.found["l2"] = "flushed before each call" if flush else "as the call before left it"
    ways = {r.name: Way(lambda facts, r=r: make(r, facts), r.compiles) for r in runners(options)}
    title = f"{kind} {batch}" if notes.warming else "rows"
    for row in compare(notes, title, ways, Timer(device, flush), options.seconds, batch):
        if "images_per_second" in row:
            row["tflops"] = 2 * macs * row["images_per_second"] / 1e12


def blocks(notes: Notes, options: Options) -> None:
    """Each inverted residual by itself in bfloat16, on what reaches it in the network, against eager with its
    BatchNorms folded: replays of a CUDA graph of ten calls, so that no launch is waited for."""
    from torch.utils.flop_counter import FlopCounterMode

    notes.doing("the inputs of the blocks")
    settings()
    device, cuda = torch.device(options.device), options.device == "cuda"
    dtype, calls = (torch.bfloat16, 10) if cuda else (torch.float32, 1)
    model, images = network(options.resolution)
    model.to(device)
    shapes = json.loads(Path(__file__).with_name("blocks.json").read_text())
    x = model.features[0](images.to(device)).detach()
    timer, notes.found["blocks"] = Timer(device), []
    times = -(-options.batch // IMAGES)
    for shape, block in zip(shapes, model.features[1:-1], strict=True):
        widths = f"{x.shape[1]}-{shape['hidden_channels']}-{block.out_channels}"
        label, x = f"{x.shape[2]}x{x.shape[2]} {widths} /{block.stride}", x.to(dtype)
        with torch.no_grad():
            exact = folded(block).double()
            with FlopCounterMode(display=False) as counter:
                y = exact(x.double())
            flops = counter.get_total_flops() // IMAGES * options.batch
            batch = x.repeat(times, 1, 1, 1)[: options.batch].contiguous(memory_format=torch.channels_last)
            expected = y.repeat(times, 1, 1, 1)[: options.batch]
            fused, plain = copy.deepcopy(block).to(dtype), folded(block).to(dtype)

            def make(module: nn.Module, facts: Facts, x: Tensor = batch, expected: Tensor = expected) -> Call:
                if module.fused and (reason := module.why_not_fused(x)):
                    raise RuntimeError(f"the block would not run fused: {reason}")
                verify(facts, module(x), expected, 1e-2)
                if not cuda:
                    return lambda: module(x)
                replay, result = captured(lambda: module(x), calls)
                replay()
                verify(facts, result, expected, 1e-2)
                return replay

            ways = {
                f"fused {label}": Way(lambda facts, m=fused: make(m, facts)),
                f"eager {label}": Way(lambda facts, m=plain: make(m, facts)),
            }
            rows = compare(notes, "rows", ways, timer, 0.0, 1, rounds=5)
            weights = sum(t.numel() for t in plain.parameters()) * batch.element_size()
            traffic = batch.nbytes + expected.numel() * batch.element_size() + weights
            found = {"block": shape["block"], "shape": label, "flops": flops, "traffic_bytes": traffic}
            for way, row in zip(("fused", "eager"), rows, strict=True):
                if "ms" in row:
                    seconds = row["ms"] / 1e3 / calls
                    row |= {"us": 1e6 * seconds, "gb_per_s": traffic / seconds / 1e9, "tflops": flops / seconds / 1e12}
                    row |= {f"{q}_us": 1e3 * row[f"{q}_ms"] / calls for q in ("q1", "q3")}
                kept = ("us", "q1_us", "q3_us", "gb_per_s", "tflops", "relative_error", "error")
                found[way] = {key: row[key] for key in kept if key in row}
            notes.found["blocks"].append(found)
            x = y.float()
    del notes.found["rows"]
    notes.save()


def trainers(options: Options) -> list[Runner]:
    from mnv2_fused import peers

    ways = {runner.name: runner for runner in peers.TRAINERS}
    found = [ways["fused"], ways["eager channels_last"]]
    if not options.quick:
        found.append(ways["torch.compile"])

        def tuned(model: MobileNetV2, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
            plain = ways["eager channels_last"].prepare(model, example, threads)
            compiled = torch.compile(plain, mode="max-autotune", dynamic=False)

            def forward(x: Tensor) -> Tensor:
                torch.compiler.cudagraph_mark_step_begin()
                return compiled(x)

            return forward

        remark = "its CUDA graphs keep their memory: see reserved_mb"
        found.append(peers.Runner("torch.compile max-autotune", tuned, (), True, compiles=True, remark=remark))
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().float().clone() for name, p in model.named_parameters() if p.grad is not None}


def cosines(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """Between all gradients in one row, and tensor by tensor; ValueError where one is missing."""
    if missing := exact.keys() - found.keys():
        raise ValueError(f"there is no gradient of {min(missing)}: not timed")

    def cosine(a: Tensor, b: Tensor) -> float:
        a, b = a.flatten().double(), b.flatten().double()
        return (a @ b / (a.norm() * b.norm()).clamp_min(1e-300)).item()

    rows = (torch.cat([tensors[name].flatten() for name in exact]) for tensors in (found, exact))
    return cosine(*rows), {name: cosine(found[name], exact[name]) for name in exact}


class Reference(NamedTuple):
    """The loss and gradients of a step in float32, and the cosines that eager keeps in the same arithmetic."""

    loss: float
    gradients: dict[str, Tensor]
    cosine: float
    by_tensor: dict[str, float]


def verify_step(facts: Facts, loss: float, found: dict[str, Tensor], exact: Reference) -> None:
    """Raises where a step is none: its loss, all its gradients, or one that eager gets right, are too far off."""
    cosine, by_tensor = cosines(found, exact.gradients)
    known = {name: by_tensor[name] for name, value in exact.by_tensor.items() if value >= KNOWN}
    worst = min(known, key=lambda name: known[name] if math.isfinite(known[name]) else -2.0, default="")
    facts |= {
        "loss": loss,
        "loss_error": abs(loss - exact.loss) / abs(exact.loss),
        "gradient_cosine": cosine,
        "gradient_cosine_median": statistics.median(by_tensor.values()),
        "gradient_cosine_worst": {worst: known.get(worst)},
    }
    least = min(COSINE, exact.cosine - 0.01)
    if not facts["loss_error"] <= LOSS_TOLERANCE:
        raise ValueError(f"the loss is {loss:.4f}, in float32 {exact.loss:.4f}: not timed")
    if not cosine >= least:
        raise ValueError(f"the gradients' cosine with float32 is {cosine:.4f}, below {least:.4f}: not timed")
    if known and not known[worst] >= WRONG:
        what = f"the gradient of {worst} has a cosine of {known[worst]:.3f} with float32"
        raise ValueError(f"{what}, eager's {KNOWN} or more: not timed")


class Step:
    """Forward, cross entropy, backward, SGD with momentum; on CUDA under autocast to bfloat16."""

    def __init__(self, runner: Runner, model: MobileNetV2, x: Tensor, labels: Tensor) -> None:
        self.model, self._x, self._labels = copy.deepcopy(model), runner.input(x), labels
        with self._autocast():  # what autocast hands to the blocks: that is what is asked for
            example = self._x.to(torch.bfloat16) if x.is_cuda else self._x
            self._forward = runner.prepare(self.model, example, torch.get_num_threads())
        # So small a rate leaves the weights about where they are: the last step timed computes what the first did.
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5, momentum=0.9)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._x.device.type, torch.bfloat16, enabled=self._x.is_cuda)

    def loss(self) -> Tensor:
        with self._autocast():
            return nn.functional.cross_entropy(self._forward(self._x), self._labels)

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.loss().backward()
        self.update()


def reference(model: MobileNetV2, x: Tensor, labels: Tensor, eager: Runner) -> Reference:
    """In float32 without TF32, blocks run anew in backward: in float32 eager's activations may not fit."""
    from mnv2_fused.peers import checkpointed

    plain = copy.deepcopy(model)
    plain.fused = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = False
    loss = nn.functional.cross_entropy(checkpointed(plain)(x), labels)
    loss.backward()
    exact = gradients(plain)
    settings()
    step = Step(eager, model, x, labels)
    step.loss().backward()
    return Reference(loss.item(), exact, *cosines(gradients(step.model), exact))


def training(notes: Notes, options: Options) -> None:
    """A step on a batch, under autocast to bfloat16."""
    from mnv2_fused.tasks import Training

    notes.doing("a step in float32", 2 * PATIENCE)
    settings()
    device, cuda = torch.device(options.device), options.device == "cuda"
    model, _ = network(options.resolution)
    size = (options.batch, 3, options.resolution, options.resolution)
    model, (x, labels) = Training.inputs(model, torch.randn(size, generator=torch.Generator().manual_seed(1)))
    model, x, labels = model.to(device), x.to(device), labels.to(device)
    found = trainers(options)
    eager = next(runner for runner in found if runner.name == "eager channels_last")
    exact = reference(model, x, labels, eager)
    names = exact.by_tensor.values()
    notes.found["eager"] = {"gradient_cosine": exact.cosine, "gradient_cosine_median": statistics.median(names)}
    with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
        notes.found["unfused"] = model.unfused(x.to(torch.bfloat16) if cuda else x)

    def make(runner: Runner, facts: Facts) -> Call:
        facts["remark"] = runner.remark
        if cuda:
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved()
        step = Step(runner, model, x, labels)
        loss = step.loss()
        loss.backward()
        verify_step(facts, loss.item(), gradients(step.model), exact)
        step.update()
        del loss
        for _ in range(2):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = step.loss()
            facts["kept_mb"] = (torch.cuda.memory_allocated() - before) / 1e6
            loss.backward()
            step.update()
            facts["memory_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            facts["reserved_mb"] = (torch.cuda.memory_reserved() - reserved) / 1e6
            facts["kept_mb_per_image"] = facts["kept_mb"] / options.batch
        return step

    ways = {r.name: Way(lambda facts, r=r: make(r, facts), r.compiles) for r in found}
    title = "training" if notes.warming else "rows"
    compare(notes, title, ways, Timer(device), options.seconds, options.batch)


def compilation(notes: Notes, options: Options) -> None:
    """What torch.compile takes longest for, while the tests run: the steps to come find it in its cache."""
    notes.warming, end = True, notes.deadline
    steps = ((0.6, inference, "bfloat16", options.batch), (0.5, inference, "bfloat16", 1), (1.0, training))
    for part, step, *details in steps:
        torch._dynamo.reset()
        notes.deadline = time.time() + part * (end - time.time())
        step(notes, options, *details)


def kernels_of(profiler: Any, device: torch.device, count: int = 15) -> Facts:
    """Where the time of a profile goes: the most expensive kernels, and the sum of all."""
    cuda = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    rows = [(event.self_device_time_total if cuda else event.self_cpu_time_total, event) for event in events]
    total = sum(us for us, _ in rows)
    if not total:
        raise RuntimeError("the profiler saw no kernel")
    rows.sort(key=lambda row: -row[0])
    top = [{"name": e.key[:200], "calls": e.count, "us": us, "share": us / total} for us, e in rows[:count]]
    return {"total_us": total, "kernels": len(rows), "launches": sum(e.count for _, e in rows), "top": top}


def profile(notes: Notes, options: Options) -> None:
    """One call and one step of ours, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    from mnv2_fused.tasks import Inference, Training

    settings()
    device, cuda = torch.device(options.device), options.device == "cuda"
    model, images = network(options.resolution)
    _, macs = Inference.exact(model, (images[:1],))
    size = (options.batch, 3, options.resolution, options.resolution)
    images = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)
    images = images.contiguous(memory_format=torch.channels_last)

    def call() -> Call:
        plain = next(runner for runner in runners(options) if runner.name == "fused")
        ours, x = copy.deepcopy(model).to(device), images
        if cuda:
            ours, x = ours.to(torch.bfloat16), x.to(torch.bfloat16)
        run = plain.prepare(ours, x, torch.get_num_threads())
        return lambda: run(x)

    def step() -> Call:
        ours, (x, labels) = Training.inputs(model.to(device), images)
        return Step(trainers(options)[0], ours, x, labels.to(device))

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    wait = Timer(device).wait
    for name, make, flops in (("inference", call, 2 * macs * options.batch), ("training", step, None)):
        notes.doing(name)
        try:
            run = make()
            for _ in range(3):
                run()
            wait()
            with profiling(activities=activities) as profiler:
                run()
                wait()
            notes.found[name] = kernels_of(profiler, device)
            if flops:
                notes.found[name]["tflops"] = flops / notes.found[name]["total_us"] / 1e6
        except Exception as error:
            notes.found[name] = {"error": message(error)}
            traceback.print_exc()
            notes.save()
            wait()


def copy_rate(device: torch.device, timer: Timer, size: int) -> float:
    """GB/s of a copy of so many bytes, those read and those written, at the median."""
    source, target = (torch.randint(0, 255, (size,), dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / statistics.median(timer(lambda: target.copy_(source), 6)) / 1e9


def matmul_rate(device: torch.device, timer: Timer, size: int) -> float:
    """TFLOP/s of a product of square matrices of random bfloat16 numbers, at the median."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(timer(lambda: a @ b, 10)) / 1e12


def machine(notes: Notes, options: Options) -> None:
    """What the device can do at best, its clocks under load, and what `mnv2-fused info` says."""
    device, cuda = torch.device(options.device), options.device == "cuda"
    notes.doing("the ceilings")
    timer = Timer(device)
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        notes.found["device"] = {
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
    notes.found["copy_gb_per_s"] = copy_rate(device, timer, 2 << 30 if cuda else 1 << 20)
    notes.found["matmul_bfloat16_tflops"] = matmul_rate(device, timer, 8192 if cuda else 64)
    if cuda:
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        for _ in range(1000):  # a second and more, during which we ask
            a @ a
        notes.found["under_load"] = smi()
        timer.wait()
    notes.doing("mnv2-fused info")
    from mnv2_fused import cli

    notes.found["info"] = cli._info()


STEPS: dict[str, Callable[..., None]] = {
    "machine": machine,
    "compilation": compilation,
    "inference": inference,
    "blocks": blocks,
    "training": training,
    "profile": profile,
}


def run_step(arguments: Facts) -> None:
    """The life of a step's process."""
    notes = Notes(Path(arguments["notes"]), arguments["limit"], arguments["left_out"])
    name, *details = arguments["step"].split()
    try:
        STEPS[name](notes, Options(**arguments["options"]), *details)
        notes.save()
    except BaseException as error:
        notes.error = message(error)
        notes.save()
        raise


# ---- The steps, from outside


def smi() -> dict[str, str]:
    """What nvidia-smi says of the first GPU that we see; without it, why not."""
    wanted = {
        "name": "product_name",
        "power_limit": "gpu_power_readings/current_power_limit",
        "power_draw": "gpu_power_readings/instant_power_draw",
        "temperature": "temperature/gpu_temp",
        "performance_state": "performance_state",
        "persistence": "persistence_mode",
        "mig": "mig_mode/current_mig",
        "ecc": "ecc_mode/current_ecc",
        "memory": "fb_memory_usage/total",
        "memory_used": "fb_memory_usage/used",
    }
    for clocks in ("clocks", "max_clocks", "applications_clocks"):
        for which in ("graphics_clock", "sm_clock", "mem_clock"):
            wanted[f"{clocks}_{which.removesuffix('_clock')}"] = f"{clocks}/{which}"
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    try:
        said = subprocess.run(
            ["nvidia-smi", "-q", "-x", "-i", which], capture_output=True, text=True, timeout=30, check=True
        )
        log = ElementTree.fromstring(said.stdout)
    except (OSError, subprocess.SubprocessError, ElementTree.ParseError) as error:
        return {"error": message(error)}
    found = {name: log.findtext(f"gpu/{path}") for name, path in wanted.items()}
    found |= {"driver": log.findtext("driver_version"), "cuda": log.findtext("cuda_version")}
    limits = [reason for tag in ("event", "throttle") for reason in log.iterfind(f"gpu/clocks_{tag}_reasons/*")]
    found["clocks_limited_by"] = " ".join(reason.tag for reason in limits if reason.text == "Active")
    return {name: value for name, value in found.items() if value and value != "N/A"}


def said_by(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return message(error)


def cuda_tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name, path=os.pathsep.join([f"{home}/bin", os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


# After one of these every call fails in its process.
_BROKEN = re.compile(
    r"CUDA error|illegal memory access|illegal instruction|misaligned address|launch failure|device-side assert"
)


def junit(path: Path) -> dict[str, tuple[str, str]]:
    """By test, in order: ("passed" | "failed" | "skipped", the first lines of why)."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        found[name] = ("passed", "")
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                text = child.get("message") or child.text or ""
                verdict = "skipped" if child.tag == "skipped" else "failed"
                found[name] = (verdict, "\n".join(text.strip().splitlines()[:8])[:1500])
    return found


def verdicts(log: str) -> dict[str, tuple[str, str]]:
    """The same from what `pytest -v` has printed, of a run that was stopped: the test it was in has failed."""
    known = {"PASSED": "passed", "SKIPPED": "skipped", "": "failed"}
    lines = re.findall(r"^(\S+\.py::\w+(?:\[.*?\])?) ?(PASSED|FAILED|ERROR|SKIPPED)?", log, re.MULTILINE)
    return {name: (known.get(word, "failed"), "" if word else "the run ended in it") for name, word in lines}


class Failed(Exception):
    """A step that failed, with what it had found before."""

    def __init__(self, reason: str, found: Facts | None = None) -> None:
        super().__init__(reason)
        self.found = found or {}


class Bench:
    """The parent: runs the steps one after the other within the budget, and writes the result after each."""

    def __init__(self, path: Path, options: Options, console: Console) -> None:
        self.path, self.options, self.console = path, options, console
        self.result: Facts = {"steps": {}}
        self._start, self._lock = time.monotonic(), threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopping = False
        self._scratch = Path(tempfile.mkdtemp(prefix="mnv2_fused-gpu-"))

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def save(self, step: str = "", found: Facts | None = None) -> None:
        with self._lock:
            if found is not None:
                self.result["steps"][step] = found
            self.result["seconds"] = round(self.elapsed(), 1)
            write_json(self.path, self.result)

    def run(self, groups: list[list[StepOf]]) -> None:
        """The steps of a group run at the same time. One that fails is recorded, and the rest goes on."""
        try:
            for i, group in enumerate(groups):
                needs = [max(step.needs for step in later) for later in groups[i:]]
                limit = share(60 * self.options.minutes - self.elapsed(), needs)
                with ThreadPoolExecutor(len(group)) as pool:
                    try:
                        list(pool.map(lambda step, limit=limit: self._step(step, limit), group))
                    except BaseException:
                        self.stop()
                        raise
        finally:
            self.stop()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _step(self, step: StepOf, limit: float) -> None:
        limit = step.limit or limit
        start = time.monotonic()
        self.console.print(f"{self.elapsed():5.0f} s  {step.name} (at most {limit:.0f} s) ...")
        self.save(step.name, {"error": "it was not over when this was written"})
        try:
            if limit < 3:
                raise Failed("no time was left for it")
            found, error = step.run(self, limit), ""
        except Exception as failure:
            found, error = getattr(failure, "found", {}), str(failure) or type(failure).__name__
            if not isinstance(failure, Failed):
                error = message(failure)
        seconds = round(time.monotonic() - start, 1)
        self.save(step.name, {"seconds": seconds, "error": error} | found)
        verdict = f"[red]{escape(error[:300])}[/]" if error else "[green]done[/]"
        self.console.print(f"{self.elapsed():5.0f} s  {step.name}: {seconds:.0f} s, {verdict}")

    def execute(
        self,
        command: list[str],
        limit: float,
        name: str,
        notes: Path | None = None,
        silence: float = math.inf,
        **env: str,
    ) -> tuple[int, str]:
        """A command's exit status and what it said. Where it was stopped, for it took too long or said nothing for
        so many seconds or longer than its notes allow, the status is -1 and the last line says why."""
        if self._stopping:
            raise Failed("interrupted")
        log = self._scratch / f"{name}.log"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | env, start_new_session=True,
            )  # fmt: skip
        self._running.add(process)
        end, stopped = time.monotonic() + limit, ""
        try:
            while process.poll() is None and not stopped:
                time.sleep(0.1)
                if time.monotonic() > end:
                    stopped = f"stopped: not done after {limit:.0f} s"
                elif time.time() > min(log.stat().st_mtime + silence, read_notes(notes)["until"]):
                    stopped = "stopped: no sign of life any more"
        finally:
            self._stop(process)
        said = log.read_text(errors="replace").strip()
        return (-1, f"{said}\n{stopped}".strip()) if stopped else (process.returncode, said)

    def _stop(self, process: subprocess.Popen) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with the workers of its compilers
        process.wait()
        self._running.discard(process)

    def stop(self) -> None:
        self._stopping = True
        for process in list(self._running):
            self._stop(process)

    def measure(self, name: str, limit: float) -> Facts:
        """Runs a step in a process of its own, anew without the runner in which it ended or fell silent."""
        end, left_out, attempt, logs = time.monotonic() + limit, {}, 0, []
        while True:
            attempt += 1
            left = end - time.monotonic()
            notes = self._scratch / f"{name}-{attempt}.json"
            arguments = {"step": name, "options": asdict(self.options), "limit": left - 2, "left_out": left_out}
            command = [sys.executable, __file__, "--step", json.dumps(arguments | {"notes": str(notes)})]
            status, said = self.execute(command, left, f"{name}-{attempt}", notes)
            noted = read_notes(notes)
            found, culprit = noted["found"], noted["doing"]
            if "Traceback" in said:
                found["log"] = [*logs, *said.splitlines()[-40:]]
            if status == 0:
                return found
            last = " / ".join(said.splitlines()[-3:])
            reason = last if status == -1 else noted["error"] or f"its process ended with status {status}: {last}"
            tables = (rows for title, rows in found.items() if isinstance(rows, list) and title != "log")
            named = {row.get("name") for rows in tables for row in rows}
            if culprit not in named or culprit in left_out or end - time.monotonic() < 15:
                raise Failed(f"{culprit}: {reason}" if culprit else reason, found)
            logs = found.get("log", [])
            left_out = left_out | {culprit: reason[-800:]}
            self.console.print(f"{self.elapsed():5.0f} s  {name}: anew without {culprit} ({escape(reason[-200:])})")

    def build(self, limit: float) -> Facts:
        arch = "".join(map(str, torch.cuda.get_device_capability()))
        environment = {"MNV2_FUSED_CUDA": "1", "MNV2_FUSED_CUDA_ARCHS": arch}
        status, said = self.execute(
            [sys.executable, "setup.py", "build_ext", "--inplace"], limit, "build", **environment
        )
        found = {"architecture": arch, "log": said.splitlines()[-30 if status else -3 :]}
        if status:
            raise Failed(f"the build ended with status {status}: {' / '.join(found['log'][-3:])}", found)
        return found

    def tests(self, limit: float) -> Facts:
        """Tests on the device. After one that broke it, hung or crashed, the others go on in another process."""
        end, outcome, stopped = time.monotonic() + limit, {}, ""
        wanted = [*sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_cuda*.py")), "-k", "device"]
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
        for attempt in range(1, 20):
            report, left = self._scratch / f"junit-{attempt}.xml", end - time.monotonic()
            command = [*pytest, "-v", "--tb=short", f"--junitxml={report}", *wanted]
            status, said = self.execute(command, left, f"tests-{attempt}", silence=PATIENCE)
            found = junit(report) if report.exists() else verdicts(said)
            broke = next((name for name, (_, why) in found.items() if _BROKEN.search(why)), None)
            for name, verdict in found.items():
                outcome[name] = verdict
                if name == broke:
                    break
            whole = report.exists() and not broke
            if whole or not found or end - time.monotonic() < 20:
                stopped = "" if whole else f"not all were run: {' / '.join(said.splitlines()[-2:])}"
                break
            if attempt == 1:
                listed = self.execute([*pytest, "--collect-only", "-q", *wanted], PATIENCE, "collection")[1]
            wanted = [line for line in listed.splitlines() if "::" in line and line not in outcome]
            if not wanted:
                break
        said = [verdict for verdict, _ in outcome.values()]
        counts = {key: said.count(key) for key in ("passed", "failed", "skipped")}
        failed = {name: why for name, (verdict, why) in outcome.items() if verdict == "failed"}
        skips = sorted({why for verdict, why in outcome.values() if verdict == "skipped"})
        result = counts | {"processes": attempt, "failed_tests": failed, "skipped_because": skips}
        if stopped or failed or not counts["passed"]:
            summary = ", ".join(f"{n} {key}" for key, n in counts.items())
            raise Failed(": ".join(filter(None, [summary, stopped, *list(failed)[:1], *skips[:1]])), result)
        return result

    def sanitize(self, tool: str, limit: float) -> Facts:
        sanitizer = cuda_tool("compute-sanitizer")
        if not sanitizer:
            raise Failed("there is no compute-sanitizer in CUDA_HOME, /usr/local/cuda or PATH")
        some = "device and (random_blocks or moments)"
        tests = ["tests/test_cuda.py", "tests/test_cuda_training.py", "-k", some, "-v", "--color=no"]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "66", sys.executable, "-m", "pytest", *tests]
        status, said = self.execute(command, limit, tool, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        lines = [line for line in said.splitlines() if line.startswith("=========")]
        done = verdicts(said)
        passed = sum(verdict == "passed" for verdict, _ in done.values())
        found = {"status": status, "passed": passed, "first": lines[:40], "last": said.splitlines()[-5:]}
        if status:
            raise Failed(f"status {status}, {passed} tests passed: {' / '.join(said.splitlines()[-2:])}", found)
        return found


class StepOf(NamedTuple):
    """A step of the plan: the seconds kept for it while those before it run, and a limit of its own, if any."""

    name: str
    needs: float
    run: Callable[[Bench, float], Facts]
    limit: float | None = None


def plan(options: Options, skip_build: bool, skip_tests: bool, sanitize: bool) -> list[list[StepOf]]:
    """Groups of steps, what matters most first: where time runs out, the last ones go without torch.compile."""

    def measured(name: str, needs: float) -> StepOf:
        return StepOf(name, needs, lambda bench, limit: bench.measure(name, limit))

    groups = [] if skip_build else [[StepOf("build", 45, Bench.build)]]
    groups.append([measured("machine", 15)])
    beside = [] if skip_tests else [StepOf("tests", 60, Bench.tests)]
    # The tests keep the CPU busy and the GPU hardly at all: compilers may choose kernels meanwhile.
    beside += [] if options.quick else [measured("compilation", 150)]
    groups += [beside] if beside else []
    groups += [[measured(f"inference bfloat16 {batch}", 40)] for batch in dict.fromkeys((options.batch, 1))]
    groups += [[measured("blocks", 25)], [measured("training", 55)], [measured("profile", 20)]]
    if not options.quick:
        groups += [
            [measured(f"inference {kind} {batch}", 18)]
            for batch in dict.fromkeys((options.batch, 1))
            for kind in ("float16", "tf32")
        ]
    for tool in ("memcheck", "racecheck") if sanitize else ():
        run = StepOf(tool, 0, lambda bench, limit, tool=tool: bench.sanitize(tool, limit), SANITIZE_SECONDS)
        groups.append([run])
    return groups


# ---- What is shown


class Column(NamedTuple):
    heading: str
    step: str
    key: str
    form: str
    more_is_better: bool


def columns(options: Facts) -> list[Column]:
    batch, found = options["batch"], []
    for kind, name in (("bfloat16", "bfloat16"), ("float16", "float16"), ("tf32", "TF32")):
        heading = f"{name}, batch {batch}, images/s"
        found.append(Column(heading, f"inference {kind} {batch}", "images_per_second", "{:,.0f}", True))
    found.append(Column("bfloat16, batch 1, ms", "inference bfloat16 1", "ms", "{:.3f}", False))
    found.append(Column("training, images/s", "training", "images_per_second", "{:,.0f}", True))
    found.append(Column("kept for backward, MB/image", "training", "kept_mb_per_image", "{:.1f}", False))
    return found


def cells(result: Facts, column: Column) -> dict[str, float]:
    """By runner, what was measured."""
    rows = result["steps"].get(column.step, {}).get("rows", [])
    return {row["name"]: row[column.key] for row in rows if row.get(column.key) and not row.get("error")}


def markdown(result: Facts) -> str:
    """The README's table: a line for each runner, and how many times better the best of ours is than the best other."""
    shown = columns(result["options"])
    values = [cells(result, column) for column in shown]
    names = list(dict.fromkeys(name for column in values for name in column))
    lines = [["", *(column.heading for column in shown)], ["---"] * (len(shown) + 1)]
    for name in sorted(names, key=lambda name: (not name.startswith("fused"), not name.startswith("torch"))):
        ours = name.startswith("fused")
        texts = [column.form.format(v[name]) if name in v else "" for column, v in zip(shown, values, strict=True)]
        label = name.replace("fused", "mnv2_fused") if ours else name.replace("eager", "PyTorch eager")
        lines.append([f"**{text}**" if ours and text else text for text in [label, *texts]])
    for others in ("torch.compile", "eager"):
        texts = []
        for column, found in zip(shown, values, strict=True):
            best = max if column.more_is_better else min
            ours, theirs = (
                best((v for n, v in found.items() if n.startswith(prefix)), default=None)
                for prefix in ("fused", others)
            )
            ratio = ours and theirs and (ours / theirs if column.more_is_better else theirs / ours)
            texts.append(f"{ratio:.2f}x" if ratio else "")
        lines.append([f"*better than {others} by*", *texts])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def failures(result: Facts) -> list[tuple[str, str]]:
    """Everything that went wrong: where, and the message."""
    found = []
    for step, entry in result["steps"].items():
        found += [(step, entry["error"])] if entry.get("error") else []
        for name, value in entry.items():
            rows = value if isinstance(value, list) else [value]
            for row in (row for row in rows if isinstance(row, dict)):
                parts = {name: row} | {key: part for key, part in row.items() if isinstance(part, dict)}
                for key, part in parts.items():
                    if part.get("error"):
                        where = part.get("name") or f"{row.get('shape', '')} {key}".strip()
                        found.append((f"{step}: {where}", part["error"]))
    return found


def tables(result: Facts) -> list[Table]:
    rows = Table(title="Medians; in alternation, verified before", title_justify="left")
    for heading in ("step", "runner", "ms", "quartiles", "images/s", "time / fused", "error", "kept MB", "added MB"):
        rows.add_column(heading, justify="left" if heading in ("step", "runner") else "right")

    def text(row: Facts, form: str) -> str:
        try:
            return form.format(**row)
        except KeyError:
            return ""

    forms = ("{ms:.3f}", "{q1_ms:.3f} - {q3_ms:.3f}", "{images_per_second:,.0f}", "{slower:.2f}x")
    for step, entry in result["steps"].items():
        for row in entry.get("rows", []):
            error = text(row, "{relative_error:.1e}") or text(row, "cos {gradient_cosine:.3f}")
            cells = [*(text(row, form) for form in forms), error]
            cells += [text(row, "{kept_mb:,.0f}"), text(row, "{memory_mb:,.0f}")]
            rows.add_row(step, row["name"], *cells, style="green" if row["name"].startswith("fused") else None)
    found = [rows]
    measured = result["steps"].get("blocks", {}).get("blocks", [])
    if measured:
        ceiling = result["steps"].get("machine", {})
        copied, matmul = ceiling.get("copy_gb_per_s"), ceiling.get("matmul_bfloat16_tflops")
        title = "Blocks: what they must read and write over their time, and their arithmetic"
        page = Table(
            title=title,
            title_justify="left",
            caption=f"copy {copied or 0:,.0f} GB/s, matrix product {matmul or 0:,.0f} TFLOP/s",
        )
        for heading in ("block", "shape", "fused us", "eager us", "eager / fused", "GB/s", "of copy", "TFLOP/s"):
            page.add_column(heading, justify="left" if heading == "shape" else "right")
        for block in measured:
            ours, plain = block.get("fused", {}), block.get("eager", {})
            ratio = f"{plain['us'] / ours['us']:.2f}x" if "us" in ours and "us" in plain else ""
            part = f"{ours['gb_per_s'] / copied:.0%}" if copied and "us" in ours else ""
            texts = [text(ours, "{us:.1f}"), text(plain, "{us:.1f}"), ratio, text(ours, "{gb_per_s:.0f}"), part]
            page.add_row(str(block["block"]), block["shape"], *texts, text(ours, "{tflops:.1f}"))
        found.append(page)
    return found


def plot(result: Facts, path: Path) -> None:
    """A panel for each column of the table, and the blocks."""
    from matplotlib.figure import Figure

    panels = [(column, values) for column in columns(result["options"]) if (values := cells(result, column))]
    measured = [b for b in result["steps"].get("blocks", {}).get("blocks", []) if "us" in {**b["fused"], **b["eager"]}]
    lines = -(-len(panels) // 2) + bool(measured)
    figure = Figure(figsize=(13, 1 + 2.4 * max(lines, 1)), layout="constrained")
    grid = figure.add_gridspec(max(lines, 1), 2)
    for i, (column, values) in enumerate(panels):
        axes = figure.add_subplot(grid[i // 2, i % 2])
        colors = ["tab:green" if name.startswith("fused") else "tab:gray" for name in values]
        bars = axes.barh(list(values), list(values.values()), color=colors)
        axes.bar_label(bars, [column.form.format(value) for value in values.values()], padding=4)
        axes.margins(x=0.18)
        axes.invert_yaxis()
        axes.set_title(column.heading)
        axes.spines[["top", "right"]].set_visible(False)
    if measured:
        axes = figure.add_subplot(grid[lines - 1, :])
        for way, color, shift in (("fused", "tab:green", -0.2), ("eager", "tab:gray", 0.2)):
            times = [block[way].get("us", 0) for block in measured]
            axes.bar([i + shift for i in range(len(measured))], times, 0.4, color=color, label=way)
        labels = [f"{block['block']}\n{block['shape'].split()[0]}" for block in measured]
        axes.set_xticks(range(len(measured)), labels, fontsize=8)
        axes.set(title="the blocks one by one, us")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    name = result.get("gpu", {}).get("name", "")
    figure.suptitle(f"MobileNetV2 1.0/{result['options']['resolution']} on {name}")
    figure.savefig(path, dpi=120)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unknown"


def about(options: Options, commit: str) -> Facts:
    """Device, versions, commit and date, as far as they can be told before the build."""
    nvcc = cuda_tool("nvcc")
    gpu = smi()
    if options.device == "cuda":
        gpu |= {"name": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    version = re.search(r'__version__ = "(.+)"', (ROOT / "mnv2_fused/__init__.py").read_text())
    return {
        "gpu": gpu,
        "versions": {
            "mnv2_fused": version and version[1],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "nvcc": said_by(nvcc, "--version").splitlines()[-2:] if nvcc else None,
        },
        "system": f"{platform.system()} {platform.release()}, {os.cpu_count()} CPUs",
        "commit": said_by("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or commit or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "options": asdict(options),
        "steps": {},
    }


def main(
    out: Annotated[Path, typer.Option(metavar="FILE|FOLDER", help="The JSON file, or where to put it.")] = ROOT
    / "bench/results",
    skip_build: Annotated[bool, typer.Option("--skip-build", help="Take the extension as it is.")] = False,
    skip_tests: Annotated[bool, typer.Option("--skip-tests", help="Go on without the tests.")] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="The budget, --sanitize aside.")] = 8.0,
    batch: Annotated[int, typer.Option(min=2, help="Images per call, beside one; and per step of training.")] = 256,
    sanitize: Annotated[
        bool, typer.Option("--sanitize", help="At the end, some tests under compute-sanitizer: memcheck, racecheck.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="bfloat16 alone, without torch.compile.")] = False,
    commit: Annotated[str, typer.Option(help="The commit, to be recorded where git cannot tell.")] = "",
    resolution: Annotated[int, typer.Option(min=32, hidden=True)] = 224,
    device: Annotated[str, typer.Option(hidden=True, help="cpu: a rehearsal without a GPU, in float32.")] = "cuda",
    step: Annotated[str, typer.Option(hidden=True, help="One step, in this process: JSON.")] = "",
) -> None:
    """Build, test and measure mnv2_fused on this machine's GPU: inference, training, each block, a profile.

    The exit status is 1 when anything failed; all that was measured is in the JSON file all the same.
    """
    if step:
        run_step(json.loads(step))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    if device == "cuda" and not torch.cuda.is_available():
        why = "is a build without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        console.print(f"[red]error:[/] torch {torch.__version__} {why}: this bench needs an NVIDIA GPU")
        raise typer.Exit(2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind

    options = Options(batch, resolution, minutes, quick, device)
    facts = about(options, commit)
    path = out if out.suffix == ".json" else out / f"gpu_{slug(facts['gpu'].get('name', device))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(path, options, console)
    bench.result = facts
    console.print(f"{facts['gpu'].get('name', device)}: results go to {path}")
    bench.run(plan(options, skip_build, skip_tests, sanitize))

    result = bench.result
    result["failures"] = [f"{where}: {what}" for where, what in failures(result)]
    result["markdown"] = markdown(result)
    bench.save()
    for table in tables(result):
        console.print(table)
    try:
        plot(result, path.with_suffix(".png"))
        console.print(f"wrote {path} and {path.with_suffix('.png').name} after {bench.elapsed():.0f} s")
    except Exception as error:
        console.print(f"wrote {path}, but no plot: {escape(message(error))}")
    for line in result["failures"]:
        console.print(f"[red]failed[/] {escape(line[:500])}", soft_wrap=True)
    print(f"\n{result['markdown']}")
    raise typer.Exit(1 if result["failures"] else 0)


if __name__ == "__main__":
    typer.run(main)
