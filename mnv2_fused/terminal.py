"""What the commands share: consoles, errors, progress, JSON, plots, checks before minutes of work, options."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import mnv2_fused

# Without markup and emoji: labels and paths may hold [brackets] and :colons:.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def printable(text: object, limit: int = 1000) -> str:
    # Names and messages come from other people's files: an escape sequence in them must not reach the terminal.
    text = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return text if len(text) <= limit else text[:limit] + "..."


def fail(message: object, status: int = 2) -> NoReturn:
    """One line on stderr and the end of the process: status 2 for what was asked wrongly, 1 for what went wrong."""
    err.print(Text.assemble(("error: ", "bold red"), printable(message)), soft_wrap=True)
    raise typer.Exit(status)


def note(message: object) -> None:
    err.print(Text(printable(message)), soft_wrap=True)


@contextmanager
def progress(description: str, total: float | None, *columns: Any) -> Iterator[Callable[[float, str | None], None]]:
    """Yields show(done, description=None); the bar is on stderr, and only where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), *columns, TimeElapsedColumn())
    # redirect_stdout would send results to stderr while the bar is up.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal, redirect_stdout=False) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, description=None: bar.update(task, completed=done, description=description)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def check_plot(path: Path) -> None:
    """Before minutes of work, not after: can a plot be written there?"""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("a plot needs matplotlib: pip install 'mnv2-fused[demo]'")
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats or not path.parent.is_dir() or path.is_dir():
        fail(f"--plot {path}: expected a file name like plot.png, in a folder that exists")


def write(path: Path, save: Callable[[], None]) -> None:
    """Calls save(), which is to write `path`, and says so."""
    try:
        save()
    except OSError as error:
        fail(f"cannot write {path} ({error})", status=1)
    note(f"wrote {path}")


def check_kernel() -> None:
    """Before minutes of work too: can the kernel run that is wanted?"""
    try:
        mnv2_fused.selected_kernel()
    except ValueError as error:  # MNV2_FUSED_KERNEL names one that cannot run
        fail(error)
