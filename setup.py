"""How mnv2_fused._C is built: against which torch, and each source with which flags. Metadata is in pyproject.toml."""

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent

# The extension uses torch's stable ABI only: what is built against one torch runs on every torch from MIN_TORCH on.
MIN_TORCH = (2, 10)
TORCH_TARGET_VERSION = "0x020a000000000000"  # MIN_TORCH, packed as in torch/headeronly/version.h
TORCH_FOR_BUILD = "torch==2.13.0"  # fetched where there is none; an open range would pull in the newest one's CUDA

CXX_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra"
LINK_FLAGS = "-shared -Wl,-O1 -Wl,--as-needed"

# Those that include torch's headers.
TORCH_SOURCES = (
    "csrc/ops.cpp",
    "csrc/pool.cpp",
    "csrc/training_passes.cpp",
    "csrc/training_ops.cpp",
    "csrc/cuda/ops.cpp",
    "csrc/cuda/training.cpp",
)

# CUDA: machine code for these, and PTX of the last one for what comes after; MNV2_FUSED_CUDA_ARCHS="80;86" instead.
CUDA_ARCHS = "80;90"
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden"

# A source without -m runs on every x86-64; the kernel table decides at run time which of the others are called.
ISA_FLAGS = {
    "csrc/cpu/avx2.cpp": "-mavx2 -mfma",
    "csrc/cpu/avx512.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma",
    "csrc/cpu/avx512_bf16.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma",
    # The int8 rows agree to the bit: a multiply-add in one would round otherwise than a product and a sum in another.
    "csrc/cpu/scalar_s8.cpp": "-ffp-contract=off",
    "csrc/cpu/avx2_s8.cpp": "-mavx2 -ffp-contract=off",
    "csrc/cpu/avx512_vnni_s8.cpp": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -ffp-contract=off",
}


def find_torch() -> Path | None:
    """The directory of the torch to build against, found without importing it; None where there is none.

    pip isolates a build from the target environment by variables alone: the interpreter is still the target's, and
    knows the target's torch once it is asked without them. The build environment itself has one if we required it.
    """
    target = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    query = "import importlib.util; print(getattr(importlib.util.find_spec('torch'), 'origin', None) or '')"
    answer = subprocess.run([sys.executable, "-c", query], env=target, stdout=subprocess.PIPE, text=True).stdout.strip()
    here = getattr(importlib.util.find_spec("torch"), "origin", None)
    directories = (Path(origin).parent for origin in (answer, here) if origin)
    return next((d for d in directories if (d / "include/torch").is_dir() and (d / "lib").is_dir()), None)


def torch_version(torch: Path) -> str:
    """The version that torch/version.py states. PlatformError where it is too old to build against."""
    version = re.search(r"^__version__ = ['\"](.+)['\"]", (torch / "version.py").read_text(), re.MULTILINE)[1]
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        raise PlatformError(f"mnv2_fused needs torch >= 2.10, but {torch} is torch {version}: upgrade it first")
    return version


def find_compiler(flags: str) -> tuple[str, str]:
    """(command, first line of --version) of a C++ compiler that knows all `flags`. CompileError says what is amiss."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    cxx = next((c for c in candidates if shutil.which(shlex.split(c)[0])), None)
    if cxx is None:
        raise CompileError(f"no C++ compiler: looked for {', '.join(candidates)}. Install g++, or set CXX")
    # The headers too: a compiler that accepts every flag may lack its C++ library.
    probe = "#include <immintrin.h>\n#include <optional>\nstd::optional<__m512> f() { return _mm512_setzero_ps(); }\n"
    command = shlex.split(f"{cxx} {flags} -x c++ -fsyntax-only -")
    result = subprocess.run(command, input=probe, capture_output=True, text=True)
    if result.returncode:
        needed = "C++17, C++20 (for torch's headers), AVX2 and AVX-512, as g++ 11 and clang++ 14 do"
        raise CompileError(f"the C++ compiler {cxx} must support {needed}. It says:\n{result.stderr}")
    version = subprocess.run([*shlex.split(cxx), "--version"], check=True, capture_output=True, text=True).stdout
    return cxx, version.splitlines()[0]


def find_cuda() -> tuple[Path | None, str]:
    """The CUDA toolkit to compile with, or None and why there is none. MNV2_FUSED_CUDA is auto, 0 or 1."""
    wish = os.environ.get("MNV2_FUSED_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise PlatformError(f"MNV2_FUSED_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "MNV2_FUSED_CUDA is 0"
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    for home in (Path(place) for place in places if place):
        if (home / "bin/nvcc").is_file():
            return home, ""
    if wish == "1":
        raise CompileError("MNV2_FUSED_CUDA is 1, but there is no nvcc in CUDA_HOME, /usr/local/cuda or PATH")
    return None, "no nvcc was found in CUDA_HOME, /usr/local/cuda or PATH"


def cuda_archs() -> list[str]:
    archs = os.environ.get("MNV2_FUSED_CUDA_ARCHS", CUDA_ARCHS).split(";")
    if not all(re.fullmatch(r"\d{2,3}a?", arch) and int(arch.rstrip("a")) >= 80 for arch in archs):
        raise PlatformError(f"MNV2_FUSED_CUDA_ARCHS must name architectures from 80 on, like 80;90, got {archs}")
    return archs


def nvcc_command(cuda: Path, cxx: str) -> str:
    archs = cuda_archs()
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    nvcc = cuda / "bin/nvcc"
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    if (
        int(re.search(r"release (\d+)", version)[1]) >= 13
    ):  # a quarter of the size; drivers that know no 13 cannot read it
        codes.append("--compress-mode=size")
    return f"{shlex.quote(str(nvcc))} -ccbin {shlex.split(cxx)[0]} {NVCC_FLAGS} {' '.join(codes)}"


def ninja_file(build: Path, cxx: str, nvcc: str, common: str, link: str, flags: dict[str, str]) -> str:
    """A build.ninja that compiles each source in `flags` with them and links build/_C.so; for ninja run in ROOT."""
    objects = {source: f"{build}/{source}.o" for source in flags}
    rules = {source: "nvcc" if source.endswith(".cu") else "compile" for source in flags}
    # -MD and not -MMD: a torch that takes the place of another must be noticed too.
    return "\n".join(
        [
            f"builddir = {build}",
            "rule compile",
            f"  command = {cxx} {common} $flags -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "  description = $in",
            "rule nvcc",
            f"  command = {nvcc} -MD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "  description = $in",
            "rule link",
            f"  command = {cxx} $in {link} -o $out",
            "  description = $out",
            *(f"build {objects[name]}: {rules[name]} {name}\n  flags = {value}" for name, value in flags.items()),
            f"build {build}/_C.so: link {' '.join(objects.values())}",
            "",
        ]
    )


class NinjaBuild(build_ext):
    """Flags per source, in parallel, and only what has changed: setuptools alone does none of the three."""

    def build_extension(self, ext: Extension) -> None:
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            here = f"{platform.system()} on {platform.machine()}"
            raise PlatformError(f"this version of mnv2_fused supports Linux on x86_64 only, and this is {here}")
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").is_file():
            raise CompileError(f"no Python.h in {python_include}: install Python's headers (python3-dev in Debian)")
        torch = find_torch()
        if torch is None:
            raise PlatformError(f"no torch to build against: pip install {TORCH_FOR_BUILD}, or any torch >= 2.10")
        report = {"TORCH_VERSION": torch_version(torch)}
        import pybind11  # here, since metadata and sdist are made without it

        common, link = CXX_FLAGS, f"{LINK_FLAGS} {shlex.quote(f'-L{torch}/lib')} -ltorch_cpu"
        if sanitizers := os.environ.get("MNV2_FUSED_SANITIZE"):
            # Without recovery, so that a finding fails the test that met it.
            sanitize = f" -fsanitize={sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
            common, link = common + sanitize, link + sanitize
        cxx, report["COMPILER"] = find_compiler(" ".join([common, "-std=c++20", *ISA_FLAGS.values()]))
        report["FLAGS"] = "; ".join([common, *(f"{Path(source).name} {f}" for source, f in ISA_FLAGS.items())])

        cuda, report["CUDA"] = find_cuda()
        sources = [source for source in ext.sources if cuda or not source.startswith("csrc/cuda/")]
        nvcc = ""
        if cuda:
            nvcc, report["CUDA"] = nvcc_command(cuda, cxx), ";".join(cuda_archs())
            # cudart inside, and none of its names outside: a torch with CUDA brings its own.
            libraries = next(d for d in (cuda / "lib64", cuda / "lib") if (d / "libcudart_static.a").is_file())
            link += f" -L{shlex.quote(str(libraries))} -lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"
        else:
            print(f"mnv2_fused is built for the CPU alone: {report['CUDA']}")
        report["HAS_CUDA"] = "1" if cuda else ""

        flags = dict.fromkeys(sources, "") | ISA_FLAGS
        for source in flags.keys() & set(TORCH_SOURCES):
            # C++20 in these alone: the headers of torch >= 2.14 may ask for it.
            flags[source] = shlex.join(
                ["-std=c++20", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-isystem", f"{torch}/include"]
                + ["-DMNV2_FUSED_WITH_CUDA"] * bool(cuda)
            )
        flags["csrc/bindings.cpp"] = shlex.join(
            ["-isystem", pybind11.get_include(), "-isystem", python_include]
            + [f'-DMNV2_FUSED_{name}="{value}"' for name, value in report.items()]
            + ["-DMNV2_FUSED_WITH_CUDA"] * bool(cuda)
        )

        # A directory for each set of flags: a sanitizer build and the normal one both stay incremental.
        key = hashlib.sha256(repr((report["COMPILER"], common, ISA_FLAGS, nvcc)).encode()).hexdigest()[:8]
        build = Path("build", f"{sys.implementation.cache_tag}-{key}")
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(build, cxx, nvcc, common, link, flags))
        jobs = len(os.sched_getaffinity(0))
        if subprocess.run([sys.executable, "-m", "ninja", f"-j{jobs}", "-f", build / "build.ninja"]).returncode:
            raise CompileError("mnv2_fused._C did not compile: the messages of the compiler are above")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a new file: a process that has the old one mapped must not see it change
        shutil.copy2(build / "_C.so", target)


setup(
    ext_modules=[
        Extension("mnv2_fused._C", sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.c*") if p.is_file()))
    ],
    cmdclass={"build_ext": NinjaBuild},
    # Front ends ask for the build requirements through egg_info; no other command may fetch anything.
    setup_requires=[TORCH_FOR_BUILD] if "egg_info" in sys.argv and find_torch() is None else [],
)
