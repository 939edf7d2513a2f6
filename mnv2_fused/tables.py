"""The paper's tables beside what our networks have: parameters, multiply-adds, and the memory of activations.

Published numbers are those of Sandler et al., CVPR 2018, and of the reference's README (tensorflow/models,
research/slim/nets/mobilenet). Ours are counted from the modules; memory is measured on this machine.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .deeplab import DeepLabV3
from .mobilenet_v1 import MobileNetV1
from .mobilenet_v2 import INVERTED_RESIDUAL_SETTING, InvertedResidual, MobileNetV2
from .ssdlite import SSDLite
from .tasks import peak_memory, restart_peak

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# width, resolution, published: millions of multiply-adds (cut off), millions of parameters (without BatchNorm), top-1 %
GRID = (
    (1.4, 224, 582, 6.06, 75.0), (1.3, 224, 509, 5.34, 74.4),
    (1.0, 224, 300, 3.47, 71.8), (1.0, 192, 221, 3.47, 70.7), (1.0, 160, 154, 3.47, 68.8), (1.0, 128, 99, 3.47, 65.3),
    (1.0, 96, 56, 3.47, 60.3),
    (0.75, 224, 209, 2.61, 69.8), (0.75, 192, 153, 2.61, 68.7), (0.75, 160, 107, 2.61, 66.4),
    (0.75, 128, 69, 2.61, 63.2), (0.75, 96, 39, 2.61, 58.8),
    (0.5, 224, 97, 1.95, 65.4), (0.5, 192, 71, 1.95, 63.9), (0.5, 160, 50, 1.95, 61.0), (0.5, 128, 32, 1.95, 57.7),
    (0.5, 96, 18, 1.95, 51.2),
    (0.35, 224, 59, 1.66, 60.3), (0.35, 192, 43, 1.66, 58.2), (0.35, 160, 30, 1.66, 55.7), (0.35, 128, 20, 1.66, 50.8),
    (0.35, 96, 11, 1.66, 45.5),
)  # fmt: skip

# Table 3: channels and kB in float16 as printed, by the side of the map; the last row its largest.
TABLE_3 = {112: "1/O(1)", 56: "32/200", 28: "64/100", 14: "160/62", 7: "320/32"}


class Table(NamedTuple):
    """Rows of numbers and text; `bars` names the columns of which a chart is drawn."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str = ""
    bars: tuple[str, ...] = ()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(call: Callable[[Tensor], object], x: Tensor) -> int:
    """As torch counts them, for the whole of x."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(x)
    return counter.get_total_flops() // 2


def _meta(model: nn.Module, height: int, width: int) -> tuple[nn.Module, Tensor]:
    """A network without numbers, to count in."""
    return model.eval().to("meta"), torch.empty(1, 3, height, width, device="meta")


def classification() -> Table:
    """The 22 networks that the reference publishes (and table 4), with MobileNetV1 before them."""
    model, x = _meta(MobileNetV1(), 224, 224)
    rows = [("MobileNetV1 1.0_224", "4.2", parameters(model) / 1e6, "575", multiply_adds(model, x) / 1e6, 70.6)]
    for width, resolution, macs, millions, top1 in GRID:
        model, x = _meta(MobileNetV2(width_mult=width), resolution, resolution)
        counted = parameters(model) / 1e6, multiply_adds(model, x) / 1e6
        rows.append((f"MobileNetV2 {width}_{resolution}", str(millions), counted[0], str(macs), counted[1], top1))
    columns = ("network", "params M, published", "params M", "MAdds M, published", "MAdds M", "top-1 %, published")
    note = "Published parameters of MobileNetV2 leave out the BatchNorms, published multiply-adds are cut off."
    return Table("Classification (table 4 and the reference's README)", columns, rows, note)


def largest_maps() -> Table:
    """Table 3 three times: as printed, by the rule that gives its numbers, and as the network is."""
    model, x = _meta(MobileNetV2(), 224, 224)
    narrow: dict[int, int] = {}
    wide: dict[int, int] = {}

    def keep(largest: dict[int, int], channels: int, side: int) -> None:
        largest[side] = max(largest.get(side, 0), channels)

    keep(narrow, model.features[0][0].out_channels, 112)
    side = 112
    for block in model.features:
        if isinstance(block, InvertedResidual):
            depthwise = block.conv[-3][0]
            keep(wide, depthwise.in_channels, side)
            side //= block.stride
            keep(narrow, block.out_channels, side)
    # The printed rows follow from the largest c of the rows of table 2 whose input has that side, whatever the stride.
    ruled: dict[int, int] = {}
    side = 112
    for _, c, _, s in INVERTED_RESIDUAL_SETTING:
        keep(ruled, c, side)
        side //= s

    def kib(side: int, channels: int) -> float:
        return side * side * channels * 2 / 1024

    rows = [
        (f"{side}x{side}", printed, f"{ruled[side]}/{kib(side, ruled[side]):.0f}", narrow[side],
         kib(side, narrow[side]), wide[side], kib(side, wide[side]))
        for side, printed in TABLE_3.items()
    ]  # fmt: skip
    columns = (
        "map", "printed", "largest c of table 2 / KiB", "bottleneck channels", "bottleneck KiB", "expanded channels",
        "expanded KiB",
    )  # fmt: skip
    note = (
        "Float16, one image. The printed numbers are the largest c among the rows of table 2 with that input, times "
        "the input's size; the row's output is smaller where it has a stride. Beside them the largest tensor between "
        "blocks and the largest inside one, which a fused block does not write."
    )
    return Table("Largest maps (table 3)", columns, rows, note, ("bottleneck KiB", "expanded KiB"))


def detection() -> Table:
    rows = []
    for name, lite, published in (
        ("SSDLite 320", True, ("2.1", "0.35", "4.3", "0.8")), ("SSD 320", False, ("14.8", "1.25", None, None)),
    ):  # fmt: skip
        model, x = _meta(SSDLite(81, use_depthwise=lite), 320, 320)
        macs = multiply_adds(lambda x, model=model: model.forward_head(model.forward_maps(x)), x)
        counted = (
            (parameters(model) - parameters(model.backbone)) / 1e6,
            (macs - multiply_adds(model.backbone.forward_features, x)) / 1e9,
            parameters(model) / 1e6,
            macs / 1e9,
        )
        rows.append((name, *(value for pair in zip(published, counted, strict=True) for value in pair)))
    columns = ("head params M", "head MAdds G", "params M", "MAdds G")
    columns = ("network", *(name for column in columns for name in (f"{column}, published", column)))
    note = (
        "81 classes with the background, MobileNetV2 1.0; the head is all that is not MobileNetV2. The published 0.35 "
        "is twice what the layers have."
    )
    return Table("Detection (tables 5 and 6)", columns, rows, note)


def segmentation() -> Table:
    rows = []
    for stride, aspp, millions, billions, miou in ((16, False, "2.11", "2.75", 75.32), (16, True, "4.52", "5.8", 75.70),
                                                   (8, False, "2.11", None, None)):  # fmt: skip
        model, x = _meta(DeepLabV3(21, output_stride=stride, aspp=aspp), 513, 513)
        name = f"DeepLabv3 513, output stride {stride}" + ", ASPP" * aspp
        rows.append((name, millions, parameters(model) / 1e6, billions, multiply_adds(model, x) / 1e9, miou))
    columns = ("network", "params M, published", "params M", "MAdds G, published", "MAdds G", "mIoU %, published")
    note = "Published multiply-adds with ASPP count the maps as TensorFlow pads them for dilated convolutions."
    return Table("Segmentation (table 7)", columns, rows, note)


def peak_activations(call: Callable[[], object]) -> int | None:
    """By how many bytes the process grows in a call, at its peak; None where Linux does not tell.

    A call before it loads what stays; what it leaves free is given back.
    """
    call()
    before = restart_peak()
    if before is None:
        return None
    result = call()
    grown = peak_memory() - before
    del result
    return grown


def memory(of: str, batch: int, progress: Callable[[str], None] = lambda name: None) -> Table:
    """Peak memory of the activations, results included, fused and not, of every block or of whole networks.

    Args:
        of: "block" or "network".
        batch: images; of SSDLite and DeepLabv3 an eighth.
        progress: told what is measured next.
    """
    rows = []
    for name, module, call in _blocks(batch) if of == "block" else _networks(batch):
        progress(name)
        found = []
        for fused in (True, False):
            for part in module.modules():
                if hasattr(part, "fused"):
                    part.fused = fused
            gc.collect()
            peak = peak_activations(call)
            found.append(None if peak is None else peak / 1e6)
        rows.append((name, *found, None if None in found else found[1] / max(found[0], 0.1)))
    title = f"Peak memory of activations by {of}, in MB (10^6 bytes), float32, batch {batch}, as measured"
    note = "By the process's resident memory; its noise is some 0.1 MB."
    return Table(title, ("", "fused", "layer by layer", "ratio"), rows, note, ("fused", "layer by layer"))


def _blocks(batch: int) -> Iterator[tuple[str, nn.Module, Callable[[], object]]]:
    model, side = MobileNetV2().eval().to(memory_format=torch.channels_last), 112
    for index, block in enumerate(model.features):
        if not isinstance(block, InvertedResidual):
            continue
        x = torch.randn(batch, block.in_channels, side, side).contiguous(memory_format=torch.channels_last)
        name = f"{index}: {block.in_channels} to {block.out_channels} channels, {side}x{side}"
        side //= block.stride
        yield name, block, _without_gradients(block, x)


def _networks(batch: int) -> Iterator[tuple[str, nn.Module, Callable[[], object]]]:
    def images(count: int, size: int) -> Tensor:
        return torch.randn(count, 3, size, size).contiguous(memory_format=torch.channels_last)

    model = MobileNetV2().to(memory_format=torch.channels_last)
    yield "MobileNetV2 224, inference", model.eval(), _without_gradients(model, images(batch, 224))

    def step() -> None:
        model.train()
        model(x).square().mean().backward()
        model.zero_grad()

    x = images(batch, 224)
    yield "MobileNetV2 224, forward and backward", model, step
    few = max(1, batch // 8)
    detector = SSDLite(81).eval().to(memory_format=torch.channels_last)

    def detect(x: Tensor) -> object:
        return detector.forward_head(detector.forward_maps(x))

    yield f"SSDLite 320, batch {few}", detector, _without_gradients(detect, images(few, 320))
    segmenter = DeepLabV3(21).eval().to(memory_format=torch.channels_last)
    yield f"DeepLabv3 513, batch {few}", segmenter, _without_gradients(segmenter, images(few, 513))


def _without_gradients(call: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call(x)

    return run


def markdown(table: Table) -> str:
    lines = [f"### {table.title}", "", "| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    lines += ["| " + " | ".join(map(text, row)) + " |" for row in table.rows]
    return "\n".join([*lines, "", table.note] if table.note else lines) + "\n"


def text(value: object) -> str:
    """A cell: four digits of what was counted or measured."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(tables: list[Table]) -> Figure:
    """A bar chart of every table that has columns for one."""
    from matplotlib.figure import Figure

    drawn = [table for table in tables if table.bars]
    figure = Figure(figsize=(11, sum(1.2 + 0.36 * len(table.rows) for table in drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=[2 + len(table.rows) for table in drawn])[:, 0]
    for ax, table in zip(axes, drawn, strict=True):
        height = 0.8 / len(table.bars)
        for i, bar in enumerate(table.bars):
            column = table.columns.index(bar)
            values = [row[column] or 0.0 for row in table.rows]
            places = [place + i * height for place in range(len(values))]
            ax.bar_label(ax.barh(places, values, height, label=bar), [text(value) for value in values], padding=3)
        ax.set_yticks([place + 0.4 - height / 2 for place in range(len(table.rows))], [row[0] for row in table.rows])
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_title(table.title)
        ax.legend(loc="lower right", frameon=False)
    return figure
