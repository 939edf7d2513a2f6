"""Builds csrc/cuda/ and csrc/training_ops.cpp for the host: a library whose ops run the threads of a GPU in turn.

The kernels are the same templates that nvcc compiles; csrc/cuda/host.h takes the place of the device.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from blocks import Block, network_blocks
from filelock import FileLock
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    *sorted((ROOT / "csrc/cuda").glob("*.c*")),
    *(ROOT / "csrc" / name for name in ("training_ops.cpp", "cpu/pack.cpp")),
]
# How far from float64 a result on CUDA may be, in the norm over all elements, by how numbers are stored and multiplied.
TOLERANCE = {"float16": 1e-2, "bfloat16": 1e-2, "tf32": 1e-3, "float32": 1e-5}
TYPES = tuple(TOLERANCE)
Op = Callable[..., Tensor | tuple[Tensor, ...]]  # an op by its name and arguments

# -O1 and line numbers alone: half of what -O2 -g takes to compile, for kernels that take a tenth longer.
FLAGS = "-O1 -g1 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Werror -DMNV2_EMULATED"


def scaled(block: Block) -> Block:
    """A block of the network with its channels, on a map of a few tiles."""
    size = {112: 20, 56: 18, 28: 9, 14: 6, 7: 7}[block.height]
    return Block(**vars(block) | {"height": size, "width": size - 1, "batch": 2 if size < 9 else 1})


NETWORK = [scaled(block) for block in dict.fromkeys(network_blocks(224))]


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind == "tf32" else getattr(torch, kind)


def build() -> Path:
    """The library, compiled if no test run has compiled the same sources before."""
    torch_home = Path(torch.__file__).parent
    cxx = os.environ.get("CXX", "c++")
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").glob("**/*.*")))
    key = hashlib.sha256(text + f"{cxx} {FLAGS} {torch.__version__} {torch_home}".encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"emulated-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "emulated.so"

    def run(*command: str | Path) -> None:
        done = subprocess.run([*shlex.split(cxx), *shlex.split(FLAGS), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        how = ["-std=c++17", "-x", "c++"]
        if source.suffix == ".cpp":
            how = ["-std=c++20", "-isystem", torch_home / "include", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        run(*how, "-c", source, "-o", target)
        return target

    with FileLock(folder / "lock"):  # other processes of the same test run want it too
        if not library.exists():
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                objects = list(pool.map(compile_one, SOURCES))
            unfinished = folder / "unfinished.so"
            run("-shared", *objects, f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-Wl,-z,defs", "-o", unfinished)
            unfinished.rename(library)
    return library
