"""The commands tables, ablate and shapes: the paper's tables, its figure 6, its two tasks on generated shapes."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import typer
from rich.progress import TimeRemainingColumn
from rich.table import Table

from . import ablations
from . import shapes as shape_tasks
from . import tables as paper
from .terminal import JsonOption, check_kernel, check_plot, fail, out, print_json, progress, write

# ---- tables


def tables(
    batch: Annotated[int, typer.Option(min=1, help="Images in the measurements of memory.")] = 8,
    memory: Annotated[bool, typer.Option(help="Also measure the memory of activations, fused and not.")] = True,
    as_json: JsonOption = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown on stdout.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw bar charts: .png, .svg or .pdf.")] = None,
) -> None:
    """The paper's tables beside what these networks have: parameters, multiply-adds, largest maps, memory."""
    if as_json and as_markdown:
        fail("--json and --markdown exclude each other")
    if plot:
        check_plot(plot)
    found = [paper.classification(), paper.largest_maps(), paper.detection(), paper.segmentation()]
    if memory:
        with progress("memory", None) as show:
            found += [paper.memory(of, batch, lambda name: show(0, name)) for of in ("block", "network")]
    if as_json:
        print_json([table._asdict() for table in found])
    elif as_markdown:
        print("\n".join(map(paper.markdown, found)), end="")
    else:
        for table in found:
            printed = Table(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
            for i, column in enumerate(table.columns):
                printed.add_column(column, justify="right" if i else "left")
            for row in table.rows:
                printed.add_row(*map(paper.text, row))
            out.print(printed)
    if plot:
        write(plot, lambda: paper.draw(found).savefig(plot))


# ---- ablate


def ablate(
    epochs: Annotated[int, typer.Option(min=1, help="Passes through the training images.")] = ablations.EPOCHS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = ablations.SEEDS,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the accuracies: .png, .svg, .pdf.")
    ] = None,
) -> None:
    """Train the variants of figure 6 of the paper on digits and on harder ones: bottleneck activation, shortcuts."""
    if plot:
        check_plot(plot)
    results = []
    try:
        with progress("starting", 1.0) as show:
            for result in ablations.run(epochs, seeds, lambda done, total, what: show(done / total, what)):
                results.append(result)
    except ImportError as error:
        fail(f"{error}: pip install 'mnv2-fused[demo]'")
    if as_json:
        print_json([result._asdict() | dict(mean=result.mean, spread=result.spread) for result in results])
    else:
        table = Table("data", "variant", "accuracy %", "standard deviation", "runs")
        for result in results:
            runs = " ".join(f"{100 * accuracy:.1f}" for accuracy in result.accuracies)
            table.add_row(result.data, result.variant, f"{100 * result.mean:.1f}", f"{100 * result.spread:.1f}", runs)
        out.print(table)
    if plot:
        write(plot, lambda: ablations.draw(results).savefig(plot))


# ---- shapes


class ShapesTask(str, Enum):
    detection = "detection"
    segmentation = "segmentation"


def shapes(
    task: Annotated[ShapesTask, typer.Argument(help="SSDLite, or DeepLabv3.")],
    epochs: Annotated[int | None, typer.Option(min=1, show_default="the task's", help="Passes through them.")] = None,
    count: Annotated[
        int | None, typer.Option("--images", min=32, show_default="the task's", help="Images to train on.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of weights, images and batches.")] = 0,
    fused: Annotated[bool, typer.Option(help="Run the blocks as single ops, or layer by layer.")] = True,
    plot: Annotated[Path, typer.Option(metavar="FILE", help="Where the plot goes: .png, .svg or .pdf.")] = Path(
        "shapes.png"
    ),
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the trained weights: .safetensors.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a detector or a segmenter from scratch on generated shapes, on this CPU, in minutes.

    Thousands of small images with boxes or masks are made in seconds. The exit status is 1 when the mean average
    precision at an IoU of 0.5 stays below 0.8, or the mean IoU below 0.85.
    """
    chosen = shape_tasks.TASKS[task.value]
    chosen = chosen._replace(epochs=epochs or chosen.epochs, images=count or chosen.images)
    check_plot(plot)
    check_kernel()
    if save and (save.suffix != ".safetensors" or not save.parent.is_dir()):
        fail(f"--save {save}: expected a file name like shapes.safetensors, in a folder that exists")
    model = shape_tasks.network(chosen, seed)
    model.fused = fused
    try:
        with progress("making images", 1.0, TimeRemainingColumn()) as show:
            items = shape_tasks.data(chosen, chosen.images, "train", seed)
            run = shape_tasks.train(
                model, chosen, items, seed=seed,
                progress=lambda step: show(step.done / step.total, f"loss {step.loss:.3f}"),
            )  # fmt: skip
    except (ImportError, ValueError) as error:
        fail(error)
    write(plot, lambda: shape_tasks.draw(model, run, chosen).savefig(plot))
    if save:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        write(save, lambda: safetensors.torch.save_file(state, save))
    said = shape_tasks.describe(run)
    if as_json:
        print_json({"task": chosen._asdict(), "seconds": run.seconds, "score": run.score._asdict()})
    else:
        threads = torch.get_num_threads()
        steps = f"{len(run.losses)} steps of {chosen.batch} images"
        out.print(f"{said} on {shape_tasks.TEST_IMAGES} test images, {run.seconds:.0f} s, {steps}, {threads} threads")
    if not shape_tasks.score_of(run) >= chosen.target:
        fail(f"{said}: expected at least {chosen.target}", status=1)
