"""The installed package: where the library has which instructions, what it needs of torch, and how it is made anew."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import mnv2_fused
import mnv2_fused._C

ROOT = Path(__file__).parent.parent
LIBRARY = mnv2_fused._C.__file__


def run(*command: str | Path) -> str:
    """What a command prints, which must succeed."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    result = subprocess.run(command, **pipes, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout[-8000:]}"
    return result.stdout


def binutil(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"{name} (of GNU binutils) is not installed")


def isa_namespace(symbol: str) -> str:
    """The <isa> of a function in mnv2_fused::<isa>, "" of any other. A mangled name begins with it."""
    match = re.match(r"_ZZ*NK?10mnv2_fused(\d+)(?=[a-z])", symbol)
    if not match:
        return ""
    end = match.end() + int(match[1])
    # "E" or "I": the name is that of the function itself, not of a namespace around it.
    return "" if symbol[end : end + 1] in "EI" else symbol[match.end() : end]


@pytest.mark.parametrize(
    "symbol, namespace",
    [
        ("_ZN10mnv2_fused6avx5125scaleEPKfPfl", "avx512"),
        ("_ZZN10mnv2_fused4avx212_GLOBAL__N_11KIfE3runEPKfPflENKUlvE_clEv", "avx2"),
        ("_ZN10mnv2_fused11avx512_bf1612_GLOBAL__N_17forwardILi6EEEvPKf.cold", "avx512_bf16"),
        ("_ZN10mnv2_fused10avx512_f32Ev", ""),
        ("_ZN10mnv2_fused12_GLOBAL__N_15scaleINS_6avx5123IsaEEEvv", ""),
        ("_ZSt3maxIfERKT_S2_S2_", ""),
        ("_GLOBAL__sub_I_avx512.cpp", ""),
    ],
)
def test_isa_namespace(symbol: str, namespace: str) -> None:
    assert isa_namespace(symbol) == namespace


def test_vector_instructions_stay_in_their_namespace() -> None:
    """An older CPU can run it: AVX-512 instructions are in mnv2_fused::avx512* only, AVX ones in mnv2_fused::avx* only.

    Caught: an inline function of a header that avx512.cpp emits too, since the linker keeps any one of the copies.
    """
    # In 64-bit code the first byte tells the encoding: c4 and c5 are VEX (AVX, AVX2, FMA, BMI), 62 is EVEX (AVX-512).
    avx, avx512 = set(), set()
    symbol = ""
    for line in run(binutil("objdump"), "--disassemble", "--wide", LIBRARY).splitlines():
        if line.endswith(">:"):
            symbol = line[line.index("<") + 1 : -2]
        elif instruction := re.match(r" *[0-9a-f]+:\t([0-9a-f]{2}) [^\t]*\t(.*)", line):
            if instruction[1] == "62" or re.search(r"%zmm|%k[0-7]", instruction[2]):
                avx512.add(symbol)
            elif instruction[1] in ("c4", "c5"):
                avx.add(symbol)
    assert sorted(s for s in avx512 if not isa_namespace(s).startswith("avx512")) == []
    assert sorted(s for s in avx if not isa_namespace(s).startswith("avx")) == []
    assert {"avx2", "avx512"} <= {isa_namespace(s) for s in avx | avx512}, "the library is stripped, or lacks an ISA"


def test_library_uses_only_the_stable_c_interface_of_torch() -> None:
    """One build serves every torch >= 2.10, whose C functions aoti_torch_* and torch_* are stable, unlike C++."""
    needed = run(binutil("nm"), "--dynamic", "--undefined-only", "--demangle", LIBRARY)
    assert "aoti_torch_library_init_" in needed
    assert re.findall(r".*\b(?:at|c10|caffe2|torch)::.*|.*\bTHP.*", needed) == []


def test_library_names_no_path_of_the_build_machine() -> None:
    dynamic = run(binutil("readelf"), "--dynamic", "--wide", LIBRARY)
    assert "[libtorch_cpu.so]" in dynamic
    assert re.findall(r".*(?:RPATH|RUNPATH).*", dynamic) == []


def test_metadata_version() -> None:
    if not list(importlib.metadata.distributions(name="mnv2_fused")):
        pytest.skip("built in place, not installed")
    assert importlib.metadata.version("mnv2_fused") == mnv2_fused.__version__


@pytest.mark.slow
def test_sdist_to_wheel_to_import(tmp_path: Path) -> None:
    """The sdist is complete and makes a wheel where there is no torch; beside a torch it builds against that one."""
    run(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    (wheel,) = tmp_path.glob("*.whl")
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    needed = {ROOT / name for name in ("setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")}
    needed |= {path for tree in ("csrc", "mnv2_fused", "tests", "bench") for path in (ROOT / tree).rglob("*.*")}
    ignored = ("*.so", "*.pyc")
    assert {str(p.relative_to(ROOT)) for p in needed if not any(map(p.match, ignored))} <= packed

    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    pip, python = [venv / "bin/pip", "install", "--constraint", ROOT / "constraints.txt"], venv / "bin/python"
    load = [python, "-I", "-c", "import mnv2_fused; print(mnv2_fused.kernels())"]
    run(*pip, wheel)
    assert "avx512_f32" in run(*load)
    log = run(*pip, "--verbose", "--force-reinstall", "--no-deps", sdist)
    assert re.search(r"pybind11-\d", log) and not re.search(r"torch(==|-\d)", log), log
    assert "avx512_f32" in run(*load)
