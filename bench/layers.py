"""Where the time of one fused forward goes: by layer, in microseconds and as a share of what the vector units can do.

    python bench/layers.py --threads 1
    python bench/layers.py --threads 2 --json bench/results/layers_threads2.json --plot layers.png

The times are the first thread's, taken inside of the call; in each round the peak of the same kernel is measured with
as many threads, multiply-adds in registers. What a layer loses is its time less the time of its multiply-adds at that
peak.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from mnv2_fused import _C, MobileNetV2
from mnv2_fused.benchmark import SETTLE_SECONDS, fma_peak
from mnv2_fused.ops import BLOCK, CONV3X3, LINEAR, POOL, Layer, selected_kernel
from mnv2_fused.weights import random_model

CALLS = 20  # in a round


def name(layer: Layer, size: int) -> str:
    channels = f"{layer.in_channels}-{layer.hidden_channels}-{layer.out_channels}"
    if layer.kind == BLOCK:
        return f"block {channels}, stride {layer.stride}, {size}x{size}"
    kind = {CONV3X3: "3x3", POOL: "mean", LINEAR: "linear"}.get(layer.kind, "1x1")
    return f"{kind} {layer.in_channels}-{layer.out_channels}, {size}x{size}"


def measure(model: MobileNetV2, x: torch.Tensor, rounds: int) -> dict:
    threads, kernel = torch.get_num_threads(), selected_kernel(x.dtype)
    model(x)
    peaks, calls, whole = [], [], []
    for _ in range(rounds):
        time.sleep(SETTLE_SECONDS)  # torch's idle threads spin, and would take from the peak
        peaks.append(fma_peak(kernel, threads))
        model(x)
        for _ in range(CALLS):
            calls.append([seconds for _, _, seconds in model.layer_seconds(x)])
            start = time.perf_counter()
            model(x)
            whole.append(time.perf_counter() - start)
    peak = statistics.median(peaks) * 1e9
    rows, label, macs, size = [], [], 0, x.shape[2]
    for i, (layer, of_layer, _) in enumerate(model.layer_seconds(x)):
        label.append(name(layer, size))
        macs += of_layer
        size = 1 if layer.kind == POOL else -(-size // layer.stride)
        seconds = statistics.median(call[i] for call in calls)
        if seconds:  # else it is computed with the next
            rows.append(dict(layer=" + ".join(label), macs=macs, seconds=seconds))
            label, macs = [], 0
    total = sum(row["macs"] for row in rows)
    rows.append(dict(layer="all layers", macs=total, seconds=sum(row["seconds"] for row in rows)))
    rows.append(dict(layer="the call", macs=total, seconds=statistics.median(whole)))
    for row in rows:
        ideal = row["macs"] / peak
        row.update(share=ideal / row["seconds"], lost=row["seconds"] - ideal)
    return {
        "cpu": _C.cpu_name(),
        "torch": torch.__version__,
        "kernel": kernel,
        "threads": threads,
        "batch": len(x),
        "resolution": x.shape[2],
        "peak_gmacs": peak / 1e9,
        "rows": rows,
    }


def table(result: dict) -> str:
    lines = [
        f"{result['kernel']}, threads {result['threads']}, batch {result['batch']}, "
        f"peak {result['peak_gmacs']:.1f} GMAC/s",
        "",
        "| layer | M multiply-adds | us | of the peak | us lost |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['layer']} | {row['macs'] / 1e6:.1f} | {row['seconds'] * 1e6:.0f} | {row['share']:.0%} "
            f"| {row['lost'] * 1e6:.0f} |"
        )
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    rows = result["rows"][-3::-1]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    names = [row["layer"] for row in rows]
    at_peak = [(row["seconds"] - row["lost"]) * 1e6 for row in rows]
    axes.barh(names, at_peak, color="tab:green", label="multiply-adds at the peak")
    axes.barh(names, [row["lost"] * 1e6 for row in rows], left=at_peak, color="tab:red", label="all else")
    for place, row in enumerate(rows):
        axes.text(row["seconds"] * 1e6, place, f" {row['share']:.0%}", va="center")
    axes.set(xlabel="microseconds", title=f"{result['kernel']}, {result['threads']} threads, batch {result['batch']}")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--kernel", help="a row of the kernel table, by default the best")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.kernel:
        os.environ["MNV2_FUSED_KERNEL"] = options.kernel
    generator = torch.Generator().manual_seed(0)
    model = random_model(torch.randn(8, 3, 64, 64, generator=generator), width_mult=options.width)
    x = torch.randn(options.batch, 3, options.resolution, options.resolution, generator=generator)
    with torch.no_grad():
        result = measure(model, x, options.rounds)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.plot:
        draw(result, options.plot)


if __name__ == "__main__":
    main()
