"""The command `mnv2-fused`, and of its commands info and bench; the others are in cli_*.py.

Results go to stdout, remarks and errors to stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

import mnv2_fused

from . import _C, benchmark
from . import grid as grids
from .cli_demo import demo
from .cli_paper import ablate, shapes, tables
from .cli_pictures import classify, detect, segment
from .tables import GRID
from .tasks import NETWORKS
from .terminal import JsonOption, check_plot, fail, note, out, print_json, printable, progress, write

app = typer.Typer(
    help="MobileNetV2 on the CPU as one fused PyTorch op: is it right, how fast is it, what is on these pictures?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich", the default, would swallow the [demo] in an install command
    context_settings={"help_option_names": ["-h", "--help"]},
)

PIPE_WIDTH = 132  # columns where stdout is no terminal; rich would take 80 and fold the tables


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mnv2-fused {mnv2_fused.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal's encoding cannot
    if not out.is_terminal:
        out.width = PIPE_WIDTH


# ---- info


def info(as_json: JsonOption = False) -> None:
    """Versions, CPU features, the kernels and which of them runs, threads, how it was built.

    The environment variable MNV2_FUSED_KERNEL forces a kernel; when it names one that cannot run, the exit status is 1.
    """
    report = _info()
    if as_json:
        print_json(report)
    else:
        out.print(_info_tables(report))
    if not any(report["selected"].values()):
        fail(next(iter(report["errors"].values())), status=1)


def _info() -> dict[str, Any]:
    kernels = mnv2_fused.kernels()
    selected: dict[str, str | None] = {}
    errors: dict[str, str] = {}
    for dtype in dict.fromkeys(kernel.dtype for kernel in kernels):
        name = str(dtype).removeprefix("torch.")
        try:
            selected[name] = mnv2_fused.selected_kernel(dtype)
        except ValueError as error:  # MNV2_FUSED_KERNEL names a row that is unknown, unsupported or of another dtype
            selected[name] = None
            errors[name] = str(error)
    return {
        "versions": {
            "mnv2_fused": mnv2_fused.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "cpu": {"name": _C.cpu_name(), "features": _C.cpu_features()},
        "cuda": {
            "compiled": [f"sm_{arch}" for arch in _C.build_report()["cuda"].split(";") if arch],
            "device": "" if mnv2_fused.ops.why_no_cuda() else torch.cuda.get_device_name(),
            "unusable": mnv2_fused.ops.why_no_cuda(),
        },
        "threads": torch.get_num_threads(),
        "kernels": [
            {
                "name": kernel.name,
                "dtype": str(kernel.dtype).removeprefix("torch."),
                "requires": list(kernel.requires),
                "supported": kernel.supported,
                "reason": kernel.reason,
            }
            for kernel in kernels
        ],
        "override": os.environ.get("MNV2_FUSED_KERNEL") or None,
        "selected": selected,
        "errors": errors,
        "build": _C.build_report(),
    }


def _info_tables(report: dict[str, Any]) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, version in report["versions"].items():
        facts.add_row(name, version)
    features = report["cpu"]["features"]
    facts.add_row("CPU", report["cpu"]["name"])
    facts.add_row("features", " ".join(name for name, present in features.items() if present) or "none")
    if absent := [name for name, present in features.items() if not present]:
        facts.add_row("absent", " ".join(absent))
    cuda = report["cuda"]
    compiled = f"kernels for {', '.join(cuda['compiled'])} and PTX; " if cuda["compiled"] else ""
    facts.add_row("CUDA", Text(compiled + (cuda["device"] or f"not usable: {cuda['unusable']}")))
    facts.add_row("threads", str(report["threads"]))
    if report["override"]:
        facts.add_row("forced", f"MNV2_FUSED_KERNEL={printable(report['override'])}")
    for name in ("compiler", "flags", "torch"):
        facts.add_row(f"built: {name}", Text(report["build"][name]))

    kernels = Table(title="Kernels, best first", title_justify="left", title_style="bold")
    for heading in ("kernel", "dtype", "requires", "supported", "in use"):
        kernels.add_column(heading)
    for row in report["kernels"]:
        in_use = row["name"] == report["selected"][row["dtype"]]
        supported = "yes" if row["supported"] else Text(f"no: {row['reason']}")
        requires = " ".join(row["requires"]) or "nothing"
        kernels.add_row(row["name"], row["dtype"], requires, supported, "yes" if in_use else "", style="green" * in_use)

    page = Table.grid(padding=(1, 0))
    page.add_row(facts)
    page.add_row(kernels)
    return page


# ---- bench


def bench(
    batch: Annotated[
        int | None, typer.Option(min=1, show_default="1; with --train 32", help="Images per call, or step.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default="torch's", help="Threads of each runner.")] = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="mobilenet_v2", help=f"Which network: {', '.join(NETWORKS)}."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            show_default="float32; with --grid all",
            help=f"What all compute in: {', '.join(benchmark.DTYPES)}.",
        ),
    ] = None,
    width: Annotated[
        float | None, typer.Option(min=0.05, max=10, show_default="1.0", help="Width multiplier of the network.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, show_default="the network's own", help="Height and width of the images.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="the best", help="Kernel to run, as info lists them.")
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also onnxruntime, openvino, ai-edge-litert, ncnn, if installed.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="A step of training instead: its time, and the memory that it adds.")
    ] = False,
    runner: Annotated[
        list[str] | None, typer.Option(metavar="NAME", show_default="all", help="Only this one; may be repeated.")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="The paper's 22 networks against the other runtimes, in each precision.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --grid: keep each row there (JSON), and go on from those there already."
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            show_default=f"20; with --grid {grids.SECONDS:g} for each row",
            help="Time to measure; start-up and verification come on top.",
        ),
    ] = None,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the times: .png, .svg or .pdf.")] = None,
) -> None:
    """Time the fused network against PyTorch eager, channels_last and torch.compile; --peers adds other runtimes.

    All runners have the same weights. First the outputs are verified, then all are timed in alternation. In bfloat16
    and int8 (--dtype) images and what outputs are compared with stay as they are in float32, and what rounding alone
    makes of the outputs is accepted up to twice; in int8 all have the integers and scales of one calibration. With
    --train that is a step of training (forward, cross entropy, backward, SGD with momentum), verified by loss,
    gradients and running statistics, and compared with checkpointing too; in bfloat16 under autocast. The exit status
    is 1 when a runner failed or its results were wrong.

    With --grid it is the 22 networks that the paper publishes, in each precision, against the other runtimes (or those
    that --runner names), 66 rows in 20 minutes; an interrupt shows what there is, and --resume goes on another time.
    """
    if resume and not grid:
        fail("--resume is of --grid only")
    if grid:
        own = {"network": network, "width": width, "resolution": resolution, "train": train}
        if other := [f"--{name}" for name, value in own.items() if value]:
            fail(f"--grid and {other[0]} exclude each other: its rows are the paper's networks, in inference")
        if kernel and not dtype:
            fail("--kernel is of one precision: name it, --dtype too")
        if plot:
            check_plot(plot)
        chosen = dict(batch=batch or 1, threads=threads, kernel=kernel, runners=tuple(runner) if runner else None)
        chosen["seconds"] = grids.SECONDS if seconds is None else seconds
        return _grid(chosen, dtype, resume, as_json, plot)
    if train and peers:
        fail("--train and --peers exclude each other: the other runtimes do inference only")
    if plot:
        check_plot(plot)
    try:
        options = benchmark.Options(
            batch=batch or (32 if train else 1),
            threads=threads,
            network=network or "mobilenet_v2",
            dtype=dtype or "float32",
            width=width or 1.0,
            resolution=resolution,
            kernel=kernel,
            peers=peers,
            runners=tuple(runner) if runner else None,
            seconds=20.0 if seconds is None else seconds,
            train=train,
        )
        with progress("starting", 1.0) as show:
            result = benchmark.run(options, progress=show)
    except ValueError as error:
        fail(error)
    if as_json:
        print_json(result.to_dict())
    else:
        out.print(result.table())
    if plot:
        write(plot, lambda: result.plot(plot))
    if failed := [row.name for row in result.rows if row.error]:
        fail(f"not timed: {', '.join(failed)}", status=1)


def _grid(options: dict[str, Any], dtype: str | None, resume: Path | None, as_json: bool, plot: Path | None) -> None:
    dtypes = (dtype,) if dtype else benchmark.DTYPES
    if resume and (resume.is_dir() or not resume.parent.is_dir()):
        fail(f"--resume {resume}: expected a file name, in a folder that exists")
    try:
        wanted = benchmark.Options(dtype=dtypes[0], **options)
        with progress("starting", float(len(GRID) * len(dtypes))) as show:
            found = grids.run(wanted, dtypes, resume, show, note)
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(f"cannot write {resume} ({error})", status=1)
    if as_json:
        print_json(found.to_dict())
    else:
        out.print(found.table())
    if plot and found.entries:
        write(plot, lambda: found.plot(plot))
    if (missing := len(GRID) * len(dtypes) - len(found.entries)) > 0:
        hint = f"; the same command with --resume {resume} goes on" if resume else ""
        fail(f"interrupted, rows missing: {missing}{hint}", status=130)
    if found.errors:
        fail("not timed: " + "; ".join(found.errors), status=1)


for _command in (info, bench, tables, ablate, shapes, classify, detect, segment, demo):  # as --help lists them
    app.command()(_command)
