"""What `mnv2-fused bench` has a runner do, with which network, and whether it did it right: inference, or training.

A task's instances live in the workers' processes, one runner and one batch each: calling one does the work once. Its
static methods are the parent's. Processes, turns and times are benchmark.py, the runners peers.py.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .deeplab import DeepLabV3
from .mobilenet_v1 import MobileNetV1
from .mobilenet_v2 import MobileNetV2
from .ops import empty_cache
from .peers import RUNNERS_IN, TRAINERS, Quantized, Runner, checkpointed, quantized
from .ssdlite import SSDLite

if TYPE_CHECKING:
    from .benchmark import Row, Worker

TOLERANCE = 1e-3  # relative norm of the results; every float32 run is within 1e-5, this is for runs of another network
_BASE_SIZE = 32  # the image beside which memory is counted: 1/49 of the activations of 224x224

# In bfloat16 and int8 what rounding makes of the results depends on the network, of which errors grow from layer to
# layer: for MobileNetV2 1.0/224 as it is timed here 5% and 10%, for the paper's other widths and sizes up to 9% and
# 19%. It is measured, once for each network: in bfloat16 as the error of PyTorch eager, in int8 as that of the integers
# that all runners are given, computed exactly. A runner that rounds elsewhere has an error of that size but not the
# same one, 0.4 to 1.3 times it in all that were tried; a network in which one layer is wrong is off by more than four
# times it.
ROUNDINGS = 2  # times that error are accepted
WRONG = 0.5  # is not, however badly the network rounds: results that have nothing to do with the right ones are at 1.4


class StepLimits(NamedTuple):
    """How far a step of training may be off, as relative norms.

    Attributes:
        value: of the loss, and of each running statistic.
        margin: of the gradients' median: times eager's error in the same precision,
        floor: or what is no mistake yet, however lucky eager was;
        gross: what is one, however bad eager is; of a single gradient too
        known: that eager misses by no more than this. Gradients of the projections' BatchNorm biases, for one, are zero
            but for rounding.
    """

    value: float
    margin: float
    floor: float
    gross: float
    known: float


# Gradients are no smooth function of what is rounded: where float32's last bits carry an activation over the corner of
# a ReLU6, its whole gradient comes or goes. At 224x224 PyTorch eager is off by 0.4 to 1% for that, and by 2 to 5% in
# channels_last, which sums a BatchNorm's statistics less exactly. In a small batch one such activation may make 5%, or
# there is none and eager is within 1e-4. In bfloat16 so many are carried over that eager is off by 32 to 36%, and by as
# much in every batch; statistics by 0.2%, the loss by 1%. A gradient of zero is off by 1, one of another loss by 1.4.
STEP_LIMITS = {
    "float32": StepLimits(TOLERANCE, margin=10, floor=0.1, gross=0.5, known=0.1),
    "bfloat16": StepLimits(3e-2, margin=ROUNDINGS, floor=0.1, gross=0.8, known=0.4),
}


class Tensors(nn.Module):
    """A model of which a runtime is asked for bare tensors: from images [N, 3, H, W] as they go into its backbone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def fused(self) -> bool:
        return self.model.fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self.model.fused = value

    def why_not_fused(self, x: Tensor) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.model.unfused(x).items())


class DetectorTensors(Tensors):
    """Backbone, extra layers and heads: what comes after depends on what is found, and no two runtimes do it alike."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of boxes [N, A, 4] and class logits [N, A, classes]."""
        return self.model.forward_head(self.model.forward_maps(x))


class SegmenterTensors(Tensors):
    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes, H, W], of the images' size."""
        return self.model(x)["out"]


class Network(NamedTuple):
    """A network that `bench` knows.

    Attributes:
        title: as it is written.
        resolution: height and width of its images where none is asked for: the paper's.
        make: the network of a width_mult.
    """

    title: str
    resolution: int
    make: Callable[..., nn.Module]


NETWORKS = {
    "mobilenet_v2": Network("MobileNetV2", 224, MobileNetV2),
    "mobilenet_v1": Network("MobileNetV1", 224, MobileNetV1),
    "ssdlite": Network("SSDLite", 320, lambda **kwargs: DetectorTensors(SSDLite(81, **kwargs))),
    "deeplabv3": Network("DeepLabv3", 513, lambda **kwargs: SegmenterTensors(DeepLabV3(21, **kwargs))),
}


def _flat(outputs: Any) -> Tensor:
    """A runner's result, one tensor or several, as [N, values]."""
    several = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return torch.cat([torch.as_tensor(output).flatten(1) for output in several], 1)


class Exact(NamedTuple):
    """What results [N, values] are compared with: the float64 ones, and by how much the worst image may be off."""

    values: Tensor
    tolerance: float = TOLERANCE


class Inference:
    """The results for a batch (images,) in eval mode, without gradients."""

    title = ""
    columns = {
        "ms / image": "{ms:.2f}",
        "quartiles": "{q1_ms:.2f} - {q3_ms:.2f}",
        "time / fused": "{slower:.2f}x",
        "memory MB": "{memory_mb:.1f}",
        "GMAC/s": "{gmacs:.1f}",
        "of peak": "{share_of_peak:.0%}",
        "error": "{relative_error:.1e}",
    }

    def __init__(
        self,
        runner: Runner,
        model: nn.Module | Quantized,
        batch: tuple[Tensor],
        threads: int,
        spare: bool,
        dtype: str = "float32",
    ) -> None:
        (images,) = batch
        self._x = runner.input(images[:1, :, :_BASE_SIZE, :_BASE_SIZE].clone() if spare else images)
        self._call = runner.prepare(model, self._x, threads)
        self()

    def __call__(self) -> None:
        self._call(self._x)

    def answer(self) -> Tensor:
        return _flat(self._call(self._x))

    def memory(self) -> tuple[int, int] | None:
        """The peak of the resident memory during calls and the size of the input, in bytes; None where not told."""
        if restart_peak() is None:
            return None
        for _ in range(3):
            self()
        return peak_memory(), self._x.nbytes

    @staticmethod
    def runners(dtype: str) -> tuple[Runner, ...]:
        return RUNNERS_IN[dtype]

    @staticmethod
    def inputs(
        model: nn.Module, images: Tensor, dtype: str, calibration: Tensor
    ) -> tuple[nn.Module | Quantized, tuple[Tensor]]:
        """What the runners are given, and on what they work; `calibration` are images for int8's ranges."""
        return quantized(model, calibration) if dtype == "int8" else model, (images,)

    @staticmethod
    def reference(
        model: nn.Module, given: nn.Module | Quantized, batch: tuple[Tensor], dtype: str
    ) -> tuple[Exact, int]:
        """For `verify`, and the multiply-adds per image; `model` is what `given` was made of."""
        values, macs = Inference.exact(model, batch)
        if dtype == "float32":
            return Exact(values), macs
        if dtype == "int8":
            rounded = torch.cat([given.model.reference(image) for image in batch[0].split(1)])
        else:
            eager = next(runner for runner in RUNNERS_IN[dtype] if runner.name == "eager")
            rounded = Inference(eager, given, batch, torch.get_num_threads(), spare=False, dtype=dtype).answer()
        return Exact(values, min(ROUNDINGS * _worst(rounded, values), WRONG)), macs

    @staticmethod
    def exact(model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, int]:
        """The results of the plain composition in float64, [N, values], and the multiply-adds per image."""
        (images,) = batch
        plain = copy.deepcopy(model).double()
        plain.fused = False
        # In float64 PyTorch runs a depthwise convolution channel by channel: too little work for a second thread.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                values = torch.cat([_flat(plain(image.double())) for image in images.split(1)])
        finally:
            torch.set_num_threads(threads)
        return values, counter.get_total_flops() // 2 // len(images)

    @staticmethod
    def verify(row: Row, worker: Worker, exact: Exact) -> None:
        values, row.error = worker.ask("answer")
        if row.error:
            return
        if values.shape != exact.values.shape:
            row.error = f"its results are {list(values.shape)}, expected {list(exact.values.shape)}"
            return
        error = _worst(values, exact.values)
        row.relative_error = error if math.isfinite(error) else None
        if not error <= exact.tolerance:
            limit = f"{exact.tolerance:.2g}"
            row.error = f"its results are off by {error:.1e} (relative norm), more than {limit}: not timed"

    @staticmethod
    def measure_memory(row: Row, worker: Worker, spare: Worker) -> None:
        """The spare worker is prepared for one small image: what both have is not the batch's."""
        (full, row.error), (least, error) = worker.ask("memory"), spare.ask("memory")
        row.error = row.error or error
        if full and least and not row.error:
            row.resident_mb = full[0] / 1e6
            row.memory_mb = (full[0] - full[1] - (least[0] - least[1])) / 1e6


class ExactStep(NamedTuple):
    """What a step of training is compared with.

    Attributes:
        tensors: in float64, by name: the loss, the gradients and the statistics; the latter also as they are after the
            blocks have been run twice, under names that end in _AGAIN.
        eager: by the same names, the relative error of PyTorch eager in the precision that is timed.
        limits: of that precision.
    """

    tensors: dict[str, Tensor]
    eager: dict[str, float]
    limits: StepLimits


_GRADIENT, _AGAIN = "gradient of ", ", updated twice"


def _median(errors: dict[str, float]) -> float:
    """Over the gradients alone: the other half of all tensors are statistics and counters, which are nearly exact."""
    return statistics.median(error for name, error in errors.items() if name.startswith(_GRADIENT))


class Training:
    """A step of training on a batch (images, labels): forward, cross entropy, backward, SGD with momentum.

    In bfloat16 forward and loss are under torch.autocast; parameters, gradients and optimizer stay float32.

    Nothing heavy happens before the first command: the steps of several workers at once would not fit into memory.
    """

    title = ", a step of training"
    columns = {  # in two lines, or the table is too wide for most windows
        "ms\n/ image": "{ms:.2f}",
        "quartiles": "{q1_ms:.2f} - {q3_ms:.2f}",
        "images\n/ s": "{images_per_second:.1f}",
        "time\n/ fused": "{slower:.2f}x",
        "memory\nMB": "{memory_mb:.1f}",
        "memory\n/ fused": "{heavier:.2f}x",
        "kept MB\n/ image": "{kept_mb:.2f}",
        "error": "{relative_error:.1e}",
    }

    def __init__(
        self,
        runner: Runner,
        model: MobileNetV2,
        batch: tuple[Tensor, Tensor],
        threads: int,
        spare: bool,
        dtype: str = "float32",
    ) -> None:
        images, self._labels = batch
        self._runner, self._model = runner, model
        self._x = runner.input(images)
        self._autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
        with self._autocast:
            self._forward = runner.prepare(model, self._x, threads)
        # So small a rate leaves the weights about where they are: the last step timed computes what the first did.
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def __call__(self) -> None:
        self._step(self._x, self._labels)

    def _step(self, x: Tensor, labels: Tensor) -> None:
        self._loss(x, labels).backward()
        self._update()

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        with self._autocast:
            return nn.functional.cross_entropy(self._forward(x), labels)

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def answer(self) -> dict[str, np.ndarray]:
        """One step. It must be the first, from the weights as they were given."""
        loss = self._loss(self._x, self._labels)
        loss.backward()
        found = {"loss": loss.detach()} | _gradients(self._model)
        self._update()
        found |= _statistics(self._model, _AGAIN if self._runner.recomputes else "")
        # By value: torch hands tensors over as open files, of which a process may not have so many.
        return {name: tensor.numpy() for name, tensor in found.items()}

    def memory(self) -> tuple[int | None, int | None, float]:
        """What a step adds to the resident memory, the peak with all, and what autograd keeps per image, in bytes.

        The step measured is the first that this process takes on its batch. One on a small batch comes before: it
        loads the code and makes the optimizer's state, which stay, and leaves neither buffers of the batch's size in
        a library's cache nor free memory on the heap for the measured step to find; that would be resident before it
        and not count. What torch.compile runs is made for one shape, and making it takes more than running it: there
        the step before is on the batch itself, and malloc_trim returns what it freed. The two differ by a few percent.
        """
        x, labels = self._x, self._labels
        if not self._runner.compiles:
            x, labels = self._runner.input(x[:2, :, :64, :64].clone()), labels[:2]
        self._step(x, labels)
        before = restart_peak()
        self()
        peak = None if before is None else peak_memory()
        return None if before is None else peak - before, peak, self._kept() / len(self._x)

    def _kept(self) -> int:
        """Bytes of the storages that autograd keeps for the backward pass, beside model, optimizer, input, labels."""
        given = {_address(tensor) for tensor in (*self._model.state_dict().values(), self._x, self._labels)}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if _address(tensor) not in given:
                kept[_address(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # The result holds the graph, and it the tensors: no address is given out twice until all are counted.
            loss = self._loss(self._x, self._labels)
        del loss
        return sum(kept.values())

    @staticmethod
    def runners(dtype: str) -> tuple[Runner, ...]:
        return TRAINERS

    @staticmethod
    def inputs(
        model: MobileNetV2, images: Tensor, dtype: str = "float32", calibration: Tensor | None = None
    ) -> tuple[MobileNetV2, tuple[Tensor, Tensor]]:
        """In training mode, but without dropout: what it drops is drawn anew in every runner."""
        model = copy.deepcopy(model).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        classes = model.num_classes or model.num_features
        return model, (images, torch.randint(classes, (len(images),), generator=torch.Generator().manual_seed(0)))

    @staticmethod
    def reference(
        model: MobileNetV2, given: MobileNetV2, batch: tuple[Tensor, Tensor], dtype: str
    ) -> tuple[ExactStep, None]:
        """For `verify`; multiply-adds of a step have no agreed count."""
        return Training.exact(given, batch, dtype), None

    @staticmethod
    def exact(model: MobileNetV2, batch: tuple[Tensor, Tensor], dtype: str = "float32") -> ExactStep:
        """A step of the plain composition in float64, which runs blocks anew in backward: a quarter of the memory."""
        images, labels = batch
        plain = copy.deepcopy(model).double()
        plain.fused = False
        loss = nn.functional.cross_entropy(checkpointed(plain)(images.double()), labels)
        tensors = {"loss": loss.detach()}
        tensors |= {name: tensor.clone() for name, tensor in _statistics(plain).items()}
        loss.backward()
        tensors |= _gradients(plain) | _statistics(plain, _AGAIN)
        eager = next(runner for runner in TRAINERS if runner.name == "eager")
        found = Training(eager, copy.deepcopy(model), batch, torch.get_num_threads(), False, dtype).answer()
        return ExactStep(tensors, _errors(found, tensors), STEP_LIMITS[dtype])

    @staticmethod
    def verify(row: Row, worker: Worker, exact: ExactStep) -> None:
        """Refuses gradients that are worse than eager's by more than rounding explains, and a single wrong tensor."""
        found, row.error = worker.ask("answer")
        if row.error:
            return
        if missing := exact.eager.keys() - {name.removesuffix(_AGAIN) for name in found}:
            row.error = f"it has no {min(missing)}: not timed"
            return
        errors = _errors(found, exact.tensors)
        if wrong := [name for name, error in errors.items() if not math.isfinite(error)]:
            row.error = f"its {wrong[0]} is not finite: not timed"
            return
        row.relative_error = _median(errors)
        limits = exact.limits
        limit = min(max(limits.margin * _median(exact.eager), limits.floor), limits.gross)
        if row.relative_error > limit:
            row.error = f"its gradients are off by {row.relative_error:.1e} (median), more than {limit:.1e}: not timed"
            return
        for name, error in errors.items():
            limit = limits.value
            if name.startswith(_GRADIENT):
                limit = limits.gross if exact.eager[name] < limits.known else math.inf
            if error > limit:
                row.error = f"its {name} is off by {error:.1e} (relative norm), more than {limit:g}: not timed"
                return

    @staticmethod
    def measure_memory(row: Row, worker: Worker, spare: Worker) -> None:
        """The spare worker has taken no step before."""
        measured, row.error = spare.ask("memory")
        if not row.error:
            added, peak, kept = measured
            row.memory_mb, row.resident_mb = (None if size is None else size / 1e6 for size in (added, peak))
            row.kept_mb = kept / 1e6


def _gradients(model: MobileNetV2) -> dict[str, Tensor]:
    # A parameter that got none is left out: verify() misses it.
    return {_GRADIENT + name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _statistics(model: MobileNetV2, suffix: str = "") -> dict[str, Tensor]:
    return {name + suffix: buffer for name, buffer in model.named_buffers()}


def _errors(found: dict[str, np.ndarray], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: _relative_error(torch.from_numpy(values), exact[name]) for name, values in found.items()}


def _worst(values: Tensor, exact: Tensor) -> float:
    """The relative error of the image that is furthest off: a mistake in one is not lost in the norm of all."""
    errors = (values.double() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(torch.finfo(exact.dtype).tiny)
    return errors.max().item()


def _relative_error(values: Tensor, exact: Tensor) -> float:
    exact = exact.double()
    return ((values.double() - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny)).item()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# ---- Resident memory, as Linux counts it


def restart_peak() -> int | None:
    """Returns free memory to the system and starts the peak anew: the bytes resident now; None where not told."""
    if sys.platform != "linux":
        return None
    gc.collect()
    empty_cache()
    with suppress(AttributeError):  # glibc's: what loading and compiling left on the heap is not the task's
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
    return peak_memory()


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
