"""What all tests share: one test per kernel row, memory that arrives full of NaN, threads put back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import emulation
import pytest
import torch
from emulation import Op
from torch import Tensor

import mnv2_fused
from mnv2_fused import ops

# Every row of the table, supported or not: a test names the rows that this CPU cannot run as skipped, and why.
_ROWS = mnv2_fused.kernels()
_M_PERTURB = -6  # of glibc's mallopt


def _force(row: mnv2_fused.ops.Kernel, monkeypatch: pytest.MonkeyPatch) -> mnv2_fused.ops.Kernel:
    if not row.supported:
        pytest.skip(f"{row.name}: {row.reason}")
    monkeypatch.setenv("MNV2_FUSED_KERNEL", row.name)
    return row


@pytest.fixture(params=[row for row in _ROWS if row.dtype.is_floating_point], ids=lambda row: row.name)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> mnv2_fused.ops.Kernel:
    """Each floating-point kernel row in turn, forced by MNV2_FUSED_KERNEL."""
    return _force(request.param, monkeypatch)


@pytest.fixture(params=[row for row in _ROWS if row.dtype == torch.int8], ids=lambda row: row.name)
def int8_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> mnv2_fused.ops.Kernel:
    """Each int8 kernel row in turn, forced by MNV2_FUSED_KERNEL."""
    return _force(request.param, monkeypatch)


_TRAINING = [row for row in _ROWS if row.dtype in (torch.float32, torch.float64)]


@pytest.fixture(params=_TRAINING, ids=lambda row: row.name)
def training_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> mnv2_fused.ops.Kernel:
    """Each float32 and float64 kernel row in turn, forced by MNV2_FUSED_KERNEL."""
    return _force(request.param, monkeypatch)


@pytest.fixture(params=[row for row in _ROWS if row.dtype == torch.float32], ids=lambda row: row.name)
def float32_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> mnv2_fused.ops.Kernel:
    """Each float32 kernel row in turn, forced by MNV2_FUSED_KERNEL."""
    return _force(request.param, monkeypatch)


@pytest.fixture(params=[row for row in _ROWS if row.dtype == torch.bfloat16], ids=lambda row: row.name)
def bfloat16_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each bfloat16 kernel row in turn, forced by MNV2_FUSED_KERNEL."""
    return _force(request.param, monkeypatch).name


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """malloc hands out bytes 0xff, which are NaN in every float type: what is read before it is written shows."""
    if hasattr(ctypes.CDLL(None), "__asan_init"):  # AddressSanitizer's malloc fills memory as ASAN_OPTIONS tell it
        assert torch.empty(10_000).isnan().all(), "ASAN_OPTIONS need max_malloc_fill_size and malloc_fill_byte=255"
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # glibc fills with the complement of the value's last byte; 0x100 is the only way to ask for 0xff, as 0 is "off".
    if mallopt is None or mallopt(_M_PERTURB, 0x100) != 1:
        pytest.skip("needs glibc's M_PERTURB")
    assert torch.empty(10_000).isnan().all()
    yield
    mallopt(_M_PERTURB, 0)


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """torch on one thread until a test asks for more, for what a module's tests share too. Small shapes gain nothing by
    a second one, and where the cores are busy every region of two threads waits for the scheduler."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> Iterator[None]:
    """Back to one thread after a test that has asked for more."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emulated() -> None:
    if "mnv2_emulated" not in {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}:
        torch.ops.load_library(emulation.build())


@pytest.fixture
def emulated_device(emulated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules take CPU tensors for those of a GPU, and the ops run on the emulated one."""
    monkeypatch.setattr(ops, "device_type", lambda x: "cuda")
    library = torch.library.Library("mnv2_fused", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, op = name.split("::")
        if namespace == "mnv2_emulated":
            library.impl(op, getattr(torch.ops.mnv2_emulated, op).default, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.fixture(params=["emulated", "device"])
def device(request: pytest.FixtureRequest) -> str:
    """Where modules run: on the CPU's emulation of a GPU, or on one."""
    if request.param == "emulated":
        request.getfixturevalue("emulated_device")
        return "cpu"
    if reason := ops.why_no_cuda():
        pytest.skip(f"no GPU: {reason}")
    return "cuda"


@pytest.fixture(params=["emulated", "device"])
def call(request: pytest.FixtureRequest) -> Op:
    """Runs an op by its name, in the emulation or on the device; results are on the CPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return lambda op, *arguments: getattr(torch.ops.mnv2_emulated, op)(*arguments)
    if reason := ops.why_no_cuda():
        pytest.skip(f"no GPU: {reason}")

    def run(op: str, *arguments: object) -> Tensor | tuple[Tensor, ...]:
        moved = [a.cuda() if isinstance(a, Tensor) else a for a in arguments]
        found = getattr(torch.ops.mnv2_fused, op)(*moved)
        if found is None:  # the first was changed
            arguments[0].copy_(moved[0])
            return None
        return found.cpu() if isinstance(found, Tensor) else tuple(t.cpu() for t in found)

    return run
