"""int8: every row against the exact reference, quantisation of models, files, errors, training for it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import quantized
import safetensors.torch
import torch
from blocks import Block, network_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, settle
from quantized import check_equal
from test_ops import KINDS, edge_blocks, random_blocks
from torch import Tensor, nn
from torch.nn import functional as F

import mnv2_fused
from mnv2_fused import MobileNetV1, MobileNetV2, QuantizedModel, digits, ops, prepare_qat, quantization, quantize
from mnv2_fused.weights import WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")

SETTING = ((1, 8, 1, 1), (6, 12, 2, 2), (6, 20, 2, 2))


@cache
def small(seed: int = 0, **options: object) -> MobileNetV2:
    torch.manual_seed(seed)
    return settle(MobileNetV2(num_classes=10, inverted_residual_setting=SETTING, round_nearest=4, **options))


@cache
def small_int8(**options: object) -> QuantizedModel:
    return quantize(small(**options), [images(8, 33, 40)])


# ------------------------------------------------------------------------------------------------ rows and reference


def test_reference_is_the_definition() -> None:
    """reference_layer against loops in Python's integers over one small block."""
    q = quantized.block_layer(Block(3, 4, 3, 3, 4, padding=(1, 1, 0, 2), residual=True))
    x = torch.randint(0, 256, (1, 3, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    zero, ratio, offset, _ = q.constants

    def byte(t: Tensor) -> int:
        return max(0, min(255, round(float(t))))  # ties to even, as Python's round

    def sums(c: quantization.Convolution, n: int, pairs: list[tuple[int, int]]) -> Tensor:
        total = int(c.bias[n]) + sum(w * a for w, a in pairs)
        return torch.tensor(total, dtype=torch.float32) * c.multiplier[n]

    expand, depthwise, project = q.convolutions
    h = {}
    for n in range(4):
        for i in range(3):
            for j in range(4):
                pairs = [(int(expand.weight[n, c, 0, 0]), int(x[0, c, i, j])) for c in range(3)]
                h[n, i, j] = byte(sums(expand, n, pairs))
    y = torch.zeros(1, 3, 3, 4, dtype=torch.uint8)
    for i in range(3):
        for j in range(4):
            d = []
            for n in range(4):
                pairs = []
                for ky in range(3):
                    for kx in range(3):
                        at = n, i + ky - 0, j + kx - 1
                        pairs.append((int(depthwise.weight[n, 0, ky, kx]), h.get(at, 0)))
                d.append(byte(sums(depthwise, n, pairs)))
            for o in range(3):
                t = sums(project, o, [(int(project.weight[o, n, 0, 0]), d[n]) for n in range(4)])
                y[0, o, i, j] = byte((t + x[0, o, i, j].float() * ratio) + offset)
    check_equal(quantization.reference_layer(q, x)[-1], y)
    assert 0 < int((y == 0).sum()) + int((y == 255).sum()) < y.numel() and len(y.unique()) > 10


def check_block(block: Block, numbers: str = "usual") -> None:
    layers, x = [quantized.block_layer(block, numbers=numbers)], quantized.block_input(block)
    before = x.clone()
    y = quantized.run(layers, x)
    check_equal(y, quantized.exact_block(layers[0], x), (block, numbers))
    check_equal(y, quantized.reference(layers, x), (block, numbers))
    assert torch.equal(x, before), f"x was written to: {block}"


@pytest.mark.parametrize(
    ("examples", "limit"), [(100, 1_000_000), pytest.param(2000, 10_000_000, marks=pytest.mark.exhaustive)]
)
def test_random_blocks(int8_kernel: ops.Kernel, poisoned_memory: None, examples: int, limit: int) -> None:
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(random_blocks(limit), st.sampled_from([*quantized.NUMBERS]))
    def check_one(block: Block, numbers: str) -> None:
        check_block(block, numbers)

    check_one()


@pytest.mark.parametrize("block", KINDS, ids=lambda block: block.id)
def test_kinds_of_schedule(int8_kernel: ops.Kernel, poisoned_memory: None, block: Block) -> None:
    check_block(block)


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_tile_edges(int8_kernel: ops.Kernel, poisoned_memory: None, every: int) -> None:
    for block in edge_blocks(every):
        check_block(block)


@pytest.mark.parametrize("resolution", [64, pytest.param(224, marks=pytest.mark.exhaustive)])
def test_blocks_of_the_network(int8_kernel: ops.Kernel, poisoned_memory: None, resolution: int) -> None:
    for block in network_blocks(resolution):
        check_block(block)


@pytest.mark.parametrize("stride", [1, 2])
def test_dilation(int8_kernel: ops.Kernel, poisoned_memory: None, stride: int) -> None:
    """Odd and even ones: a dilated filter's rows make streams, two strides of an even one a stream of stride 1."""
    for dilation in (1, 2, 3, 4, 7):
        for padding in (dilation, (0, 3, 1, 2)):
            for size in ((15, 17), (40, 21)):
                check_block(Block(6, 35, 10, *size, stride=stride, dilation=dilation, padding=padding))
        check_block(Block(9, 9, 4, 22, 19, stride=stride, dilation=dilation, padding=(1, dilation, 8, 0), expand=False))


def test_big_padding(int8_kernel: ops.Kernel, poisoned_memory: None) -> None:
    for padding in ((20, 0, 0, 20), (3, 17, 9, 40), 33):
        for block in (Block(3, 20, 5, 1, 1), Block(3, 20, 5, 4, 2, stride=2), Block(9, 9, 4, 2, 3, expand=False)):
            check_block(replace(block, padding=padding))


def test_wide_and_long(int8_kernel: ops.Kernel, poisoned_memory: None) -> None:
    for block in (
        Block(1025, 33, 5, 3, 3),
        Block(5, 2051, 3, 3, 4),
        Block(3, 19, 1283, 2, 2),
        Block(3, 18, 8, 2, 1501),
        Block(3, 18, 8, 1501, 2, stride=2),
    ):
        check_block(block)


def test_ends_of_the_range(int8_kernel: ops.Kernel) -> None:
    """Bytes of 255 and weights of -127 and 127, where sums of two in 16 bits would saturate."""
    for weight in (-127, 127):
        q = quantized.block_layer(Block(64, 64, 64, 5, 5))
        convolutions = [c._replace(weight=torch.full_like(c.weight, weight)) for c in q.convolutions]
        spread = [torch.arange(64, dtype=torch.float32) * 250 / 64 / (255 * 127 * k) for k in (64, 9, 64)]
        convolutions = [
            c._replace(bias=torch.zeros_like(c.bias) + (weight < 0) * 255 * 127 * k, multiplier=m)
            for c, m, k in zip(convolutions, spread, (64, 9, 64), strict=True)
        ]
        q = q._replace(convolutions=tuple(convolutions))
        x = torch.full((1, 64, 5, 5), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        check_equal(quantized.run([q], x), quantized.reference([q], x))


def test_products_and_sums_are_rounded_one_by_one(int8_kernel: ops.Kernel) -> None:
    """Outputs beside the middle between two bytes, where another order, or a rounding less, gives another byte."""
    channels, random = 64, torch.Generator().manual_seed(0)
    ratio, offset, multiplier = (torch.tensor(value) for value in (0.7310585, 57.61172, 3.0517579e-05))
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, channels, 1, 1)
    weight = torch.zeros(channels, channels, 1, 1, dtype=torch.int8)
    nothing = quantization.Convolution(
        torch.zeros(channels, 1, 3, 3, dtype=torch.int8), torch.zeros(channels, dtype=torch.int32), torch.ones(channels)
    )
    layer = ops.Layer(ops.BLOCK, channels, channels, channels, 1, 1, 1, 1, 1, 1, 0, 1, 0)
    other_order = other_rounding = 0
    for _ in range(20):
        middle = torch.randint(0, 255, (channels,), generator=random) + 0.5
        byte = torch.randint(0, 256, (channels,), generator=random)
        bias = ((middle - byte * ratio.double() - offset) / multiplier.double()).round()
        bias = bias + torch.randint(-1, 2, (channels,), generator=random)
        project = quantization.Convolution(weight, bias.to(torch.int32), multiplier.repeat(channels))
        q = quantized.QuantizedLayer(layer, False, (nothing, project), torch.tensor([0.0, ratio, offset, 0.0]), ())
        y = quantized.exact_block(q, x)
        check_equal(quantized.run([q], x), y)
        t, product = (bias.float() * multiplier).view(1, -1, 1, 1), x.float() * ratio
        once = (t.double() + x.double() * ratio.double()).float()
        other_order += int(((t + offset) + product).round().clamp(0, 255).ne(y).sum())
        other_rounding += int((once + offset).round().clamp(0, 255).ne(y).sum())
    assert min(other_order, other_rounding) > 4, "these numbers tell nothing apart"


def chains() -> list[tuple[list[quantized.QuantizedLayer], tuple[int, int]]]:
    q = quantized
    stem, block = q.conv_layer(3, 33, 2, (1, 1, 1, 1)), Block(33, 33, 20, 1, 1, expand=False)
    return [
        ([q.conv_layer(3, 20, 1, (1, 1, 1, 1)), q.pool_layer(20)], (9, 7)),
        ([q.conv_layer(5, 33, 2, (0, 1, 2, 1)), q.pool_layer(33, 3), q.linear_layer(33, 7)], (8, 11)),
        ([q.conv_layer(1, 8, 2, (1, 1, 1, 1)), q.pointwise_layer(8, 70), q.pool_layer(70)], (33, 65)),
        ([q.conv_layer(4, 12, 2, (2, 2, 2, 2)), q.pointwise_layer(12, 70, 0), q.pool_layer(70, 120)], (5, 6)),
        ([q.conv_layer(3, 12, 2, (1, 1, 1, 1)), q.pointwise_layer(12, 40), q.pool_layer(40), q.linear_layer(40, 300)],
         (20, 40)),
        ([stem, q.block_layer(block, 0), q.pool_layer(20, 99), q.linear_layer(20, 5)], (40, 37)),
        ([stem, q.block_layer(replace(block, stride=2, dilation=2, padding=2), 0), q.pool_layer(20, 99)], (40, 37)),
        ([stem, q.block_layer(replace(block, dilation=3, padding=(3, 2, 0, 4)), 0), q.pool_layer(20, 99)], (61, 30)),
    ]  # fmt: skip


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "crop": lambda x: F.pad(x, (3, 2, 1, 4), value=float("nan"))[:, :, 1:-4, 3:-2],
    "reversed batch": lambda x: x.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_images_to_logits(int8_kernel: ops.Kernel, poisoned_memory: None, layout: str) -> None:
    for layers, (height, width) in chains():
        channels = layers[0].layer.in_channels
        x = LAYOUTS[layout](images(3, height, width, channels))
        check_equal(quantized.run(layers, x), quantized.reference(layers, x), [q.layer for q in layers])


def test_many_images_share_the_classifier(int8_kernel: ops.Kernel) -> None:
    layers = [quantized.conv_layer(3, 8, 2, (1, 1, 1, 1)), quantized.pool_layer(8), quantized.linear_layer(8, 70)]
    for batch in (0, 1, 13, 14, 15, 31):
        x = images(40, 5, 6)[:batch]
        check_equal(quantized.run(layers, x), quantized.reference(layers, x), batch)


def test_pixels_are_rounded_twice(int8_kernel: ops.Kernel) -> None:
    """Pixels beside the middle between two bytes, in whole vectors and in the rest of a row."""
    layers = [quantized.conv_layer(3, 20, 1, (1, 1, 1, 1)), quantized.pool_layer(20)]
    inverse, zero = torch.tensor(37.313434), torch.tensor(100.0)
    layers[0] = layers[0]._replace(constants=torch.tensor([inverse, zero, 0.0, 0.0]))
    random = torch.Generator().manual_seed(0)
    for width in (7, 16, 21):
        middle = torch.randint(1, 254, (1, 3, 200, width), generator=random) + 0.5
        x = ((middle - zero) / inverse.double()).float()
        x = torch.nextafter(x, torch.where(torch.rand(x.shape, generator=random) < 0.5, x, -x))
        once = (x.double() * inverse.double() + zero).float()
        assert int((once.round() != (x * inverse + zero).round()).sum()) > 4, "these numbers tell nothing apart"
        for layout in (x, x.contiguous(memory_format=torch.channels_last)):
            found, right = (f(layers[:1], layout) for f in (quantized.run, quantized.reference))
            check_equal(found, right, width)


def test_images_too_large_to_add_up(int8_kernel: ops.Kernel) -> None:
    """A mean's sum of bytes has 32 bits: its last pixel, and one more."""
    for layers in ([quantized.pool_layer(1)], [quantized.pointwise_layer(1, 3), quantized.pool_layer(3)]):
        x = torch.full((1, 1, 1, (2**31 - 1) // 255), 255, dtype=torch.uint8)
        check_equal(quantized.run(layers, x), quantized.reference(layers, x))
        with pytest.raises(ValueError, match="sum of so many bytes"):
            quantized.run(layers, F.pad(x, (0, 1)))


def test_images_that_are_not_finite(int8_kernel: ops.Kernel) -> None:
    """NaN is the least byte, whatever its place in a vector; infinities saturate."""
    layers = [quantized.conv_layer(3, 20, 2, (1, 1, 1, 1)), quantized.pool_layer(20)]
    x = images(2, 9, 39).clone()
    x[0, 0, ::2, ::3], x[1, 1, 1::2, ::2], x[1, 2, :, 5::7] = float("nan"), float("inf"), -float("inf")
    x[0, 1] *= 1e30
    check_equal(quantized.run(layers, x), quantized.reference(layers, x))


def test_guarded_pages() -> None:
    """Tensors between unmapped pages, in a process of its own: a read outside them kills it."""
    script = Path(__file__).with_name("guarded_pages.py")
    package = str(Path(mnv2_fused.__file__).parents[1])  # the one that is under test here
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, *sys.path])}
    command = [sys.executable, str(script), "int8"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    last = result.stdout.splitlines()[-1:]
    assert result.returncode == 0, f"exit status {result.returncode} at {last}\n{result.stderr[-3000:]}"
    assert last == ["done"]


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "make",
    [
        lambda: (small(), (33, 40)),
        lambda: (small(padding="same"), (40, 31)),
        lambda: (small(output_stride=4), (32, 47)),
        lambda: (small(in_channels=1), (32, 32)),
        lambda: (settle(MobileNetV2(num_classes=0, width_mult=0.35)), (64, 64)),
        lambda: (settle(MobileNetV1(num_classes=7, width_mult=0.25)), (65, 64)),
        lambda: (settle(MobileNetV2(num_classes=7, width_mult=0.35, bottleneck_activation="relu6", shortcut="none")),
                 (64, 64)),
        pytest.param(lambda: (settle(MobileNetV2(width_mult=1.4)), (224, 224)), marks=pytest.mark.exhaustive),
        pytest.param(lambda: (settle(MobileNetV2()), (225, 191)), marks=pytest.mark.exhaustive),
    ],
)  # fmt: skip
def test_models(monkeypatch: pytest.MonkeyPatch, make: Callable[[], tuple[nn.Module, tuple[int, int]]]) -> None:
    torch.manual_seed(0)
    model, size = make()
    x = images(4, *size, model.in_channels)
    q = quantize(model, [x])
    expected = q.reference(x)
    for row in mnv2_fused.kernels():
        if row.dtype != torch.int8 or not row.supported:
            continue
        monkeypatch.setenv("MNV2_FUSED_KERNEL", row.name)
        for threads in (1, 2, 3, 7, 16):
            torch.set_num_threads(threads)
            for batch in (1, 2, 4):  # an image alone on all threads, images on threads of their own, and both
                check_equal(q(x[:batch]), expected[:batch], (row.name, threads, batch))


def test_quantised_is_like_the_model() -> None:
    """A byte is 10 log10(12 * 255^2) - 10 = 49 dB exact where 255 steps are six standard deviations or so; the weights
    of the first layer and the image take 10 or 15 of them, and 16 layers of random weights some 15 more."""
    model = small()
    for per_channel in (True, False):
        rows = quantization.report(
            quantize(model, [images(8, 33, 40)], per_channel=per_channel), model, images(8, 33, 40)
        ).rows
        assert rows[0].name == "0.conv" and rows[0].snr_db > 30
        assert rows[-1].name == "8.linear" and rows[-1].snr_db > (15 if per_channel else 10), rows


def test_per_channel_is_more_exact() -> None:
    model, x = small(), images(8, 33, 40)
    snr = [quantization.report(quantize(model, [x], per_channel=p), model, x).rows[1].snr_db for p in (False, True)]
    assert snr[1] > snr[0] + 1


def test_report() -> None:
    model = small()
    found = quantization.report(small_int8(), model, images(4, 33, 40))
    names = [row.name for row in found.rows]
    assert names[:4] == ["0.conv", "1.depthwise", "1.project", "2.expand"] and names[-3:] == [
        "6.conv",
        "7.mean",
        "8.linear",
    ]
    with torch.no_grad():
        for row, (name, r, y) in zip(found.rows, small_int8().reference_tensors(images(4, 33, 40)), strict=True):
            ends = torch.zeros(()) if r is None else (y == 255) | (y == 0 if r.zero_point else y > 255)
            assert row.name == name and row.saturated == pytest.approx(float(ends.double().mean())), name
    assert any(row.zero_point and row.saturated for row in found.rows)
    lines = str(found).splitlines()
    assert len(lines) == 1 + len(names) and all(line.startswith(n) for line, n in zip(lines[1:], names, strict=True))
    with pytest.raises(ValueError, match="other layers"):
        quantization.report(small_int8(), settle(MobileNetV2(width_mult=0.35)), images(4, 33, 40))


def test_calibration() -> None:
    """Of normal values, 4 deviations at the most, and one of 40: "max" spends its steps on that, "percentile" does not,
    and "mse" is as exact as the better of them."""
    x = images(16, 33, 40).clone()
    x[3, 1, 5, 7] = 40
    found = {method: quantize(small(), x.split(4), method=method) for method in quantization.METHODS}
    errors = {m: float((quantization._quantized(x.double(), q.image) - x).square().mean()) for m, q in found.items()}
    assert found["max"].image.scale > 43 / 255 and found["percentile"].image.scale < 9 / 255
    assert errors["mse"] < 1.02 * min(errors.values()), errors
    for method, q in found.items():
        assert q.image == quantize(small(), [x], method=method).image, "batches matter"
        for layer in q.layers:
            if layer.layer.kind == ops.BLOCK:
                assert all(r.scale <= 6 / 255 * 1.0001 and r.zero_point == 0 for r in layer.ranges[:-1])


def test_range_of_percentile() -> None:
    """On both sides where both have values, to a bin; and 0 is one of the steps."""
    x = torch.cat([torch.randn(200_000, generator=torch.Generator().manual_seed(0)) + 0.5, torch.tensor([-30.0, 50.0])])
    for values, percentile in ((x, 99.5), (x, 90.0), (x.abs(), 99.0), (-x.abs(), 99.0)):
        histogram = quantization._Histogram()
        for part in values.split(70_000):
            histogram.stretch(part)
        for part in values.split(70_000):
            histogram.count(part)
        found = histogram.range("percentile", percentile)
        share = torch.tensor([1 - percentile / 100, percentile / 100])
        low, high = values.sort().values[(share * (len(values) - 1)).long()].tolist()
        step = (histogram.high - histogram.low) / 4096
        assert -found.zero_point * found.scale == pytest.approx(min(low, 0.0), abs=step + found.scale / 2)
        assert (255 - found.zero_point) * found.scale == pytest.approx(max(high, 0.0), abs=step + found.scale / 2)
    assert quantization._range_of(-0.999, 2.0) == (2.999 / 255, 85)  # 84.94


def test_range_of_the_least_error() -> None:
    """The best of all shares of the whole range, here of a third: few values are far away from many."""
    histogram = quantization._Histogram()
    histogram.stretch(torch.tensor([-20.0, 20.0]))
    centers = (torch.arange(4096, dtype=torch.float64) + 0.5) * 40 / 4096 - 20
    histogram.counts += (-centers.square() / 2).exp() + 1e-9
    errors = {}
    for i in range(100, 0, -1):
        scale = 0.4 * i / 255
        rounded = ((centers / scale + 128).round().clamp(0, 255) - 128) * scale
        errors[i] = float((histogram.counts * (rounded - centers).square()).sum())
    best = min(errors, key=lambda i: errors[i])
    found = histogram.range("mse", 0)
    assert 10 < best < 50 and found == (pytest.approx(0.4 * best / 255), 128)


def test_a_channel_of_nothing() -> None:
    """Dead channels, which pruning and training leave: weights of 0, with and without a bias."""
    model = copy.deepcopy(small())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::3] = 0
                module.weight[1::3] *= 1e-9  # far below their biases
                module.bias[::6] = 0
        model.features[3].conv[0][1].bias.fill_(-9)  # and a block that gives nothing but its biases
    x = images(8, 33, 40)
    q = quantize(model, [x])
    check_equal(q(x), q.reference(x))
    assert quantization.report(q, model, x).rows[-1].snr_db > 15


def test_sums_fit_into_32_bits() -> None:
    """What the kernels round is below 2^31, however small the output's scale; more products than fit are an error."""
    x, bias = quantization.Range(0.02, 100), torch.tensor([5.0, -1e-3], dtype=torch.float64)
    weight = torch.linspace(-1, 1, 128, dtype=torch.float64).view(2, 64)
    c = quantization._convolution(weight, bias, x, 1e-12, per_channel=True)
    largest = 255 * c.weight.double().abs().sum(1) + c.bias.double().abs()
    assert 1 << 29 < float((largest * c.multiplier).max()) < 1.001 * (1 << 30)
    wide = torch.ones(1, 70_000, dtype=torch.float64)
    with pytest.raises(ValueError, match="a sum of 70000 products does not fit into 32 bits"):
        quantization._convolution(wide, bias[:1], x, 1.0, per_channel=True)
    quantization._convolution(wide[:, :60_000], bias[:1], x._replace(zero_point=0), 1.0, per_channel=True)


# -------------------------------------------------------------------------------------------------------------- files


def test_file(tmp_path: Path) -> None:
    q, x = small_int8(), images(3, 33, 40)
    q.save(tmp_path / "model.safetensors")
    loaded = QuantizedModel.load(tmp_path / "model.safetensors")
    check_equal(loaded(x), q(x))
    assert loaded.image == q.image and [a.ranges for a in loaded.layers] == [b.ranges for b in q.layers]
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * sum(p.numel() for p in small().parameters()) + 40_000
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        size = len(pickle.dumps(other))
        check_equal(other(x), q(x))
        assert len(pickle.dumps(other)) == size, "packed weights are not kept"


def _too_much(t: dict[str, Tensor]) -> None:
    t["2.expand.bias"] = torch.full_like(t["2.expand.bias"], 2**31 - 1)


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("2.expand.bias"), "2.expand.bias is missing"),
    "unexpected": (lambda t: t.update(more=torch.zeros(1)), "unexpected: more"),
    "shape": (lambda t: t.update({"1.project.weight": t["1.project.weight"][:, 1:].clone()}), "1.project.weight is"),
    "dtype": (lambda t: t.update({"2.expand.bias": t["2.expand.bias"].float()}), "2.expand.bias is torch.float32"),
    "nan": (lambda t: t["2.expand.multiplier"].fill_(float("nan")), "not finite"),
    "negative": (lambda t: t["2.expand.multiplier"].fill_(-1), "multiplier is too large or negative"),
    "large": (lambda t: t["2.expand.multiplier"].fill_(1e9), "multiplier is too large or negative"),
    "sums": (_too_much, "do not fit into 32 bits"),
    "offset": (lambda t: t["2.constants"].fill_(1 << 20), "2.constants are too large"),
    "offset of the 3x3": (lambda t: t["0.constants"][2:].fill_(1e12), "0.constants are too large"),
    "factor of the mean": (lambda t: t["7.constants"][1:2].fill_(1e12), "7.constants are too large"),
    "zero": (lambda t: t["2.constants"].fill_(300), "no zero point"),
    "layer": (lambda t: t["2.layer"].fill_(1 << 40), "2.layer"),
    "kind": (lambda t: t["8.layer"].fill_(0), "8"),
    "ranges": (lambda t: t["2.ranges"].fill_(0), "scales and zero points"),
    "zero points": (lambda t: t["2.ranges"][:, 1:].fill_(256), "scales and zero points"),
    "a fraction": (lambda t: t["2.constants"][:1].fill_(3.5), "no zero point"),
    "before ReLU6": (lambda t: t["0.constants"][2:3].fill_(5), "a zero point before ReLU6's"),
    "flags": (lambda t: t["1.layer"][12:13].fill_(2), "1.layer has flags beside 0 and 1"),
    "hidden": (lambda t: t["1.layer"][2:3].fill_(9), "1.layer"),
    "no layers": (lambda t: [t.pop(name) for name in [*t] if name.endswith(".layer")], "0 layers"),
    "format": (lambda t: t["format"].fill_(2), "version"),
    "nothing": (lambda t: t.clear(), "state dict|tensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    path = tmp_path / "model.safetensors"
    small_int8().save(path)
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(WeightsError, match=message) as error:
        QuantizedModel.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_parts_of_a_model_are_no_file(tmp_path: Path) -> None:
    q, path = small_int8(), tmp_path / "model.safetensors"
    for layers, message in ((q.layers[1:], "the first layer is no 3x3"), (q.layers[:-2], "the last layer is neither")):
        QuantizedModel(layers, q.image).save(path)
        with pytest.raises(WeightsError, match=message):
            QuantizedModel.load(path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 100)
    for path in (tmp_path / "model.pth", tmp_path / "damaged.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(WeightsError, match=path.name):
            QuantizedModel.load(path)


def test_a_plan_that_does_not_fit_its_weights() -> None:
    q = small_int8()
    plan = ops.make_plan([layer.layer for layer in q.layers], torch.int8)
    data = torch.cat([layer.bytes() for layer in q.layers])
    pack, network = torch.ops.mnv2_fused.pack, torch.ops.mnv2_fused.network
    for wrong in (data[:-1], data.to(torch.int16), torch.cat([data, data[:1]])):
        with pytest.raises(RuntimeError, match="one dense row"):
            pack(wrong, plan)
    packed, x = pack(data, plan), images(1, 33, 40)
    for wrong in (packed[:-1], packed.float()):
        with pytest.raises(RuntimeError, match="packed must be"):
            network(x, wrong, plan)
    for wrong in (x.double(), x.to(torch.uint8)):
        with pytest.raises(RuntimeError, match="x must be float32"):
            network(wrong, packed, plan)


# ------------------------------------------------------------------------------------------------------------- errors


def test_models_that_cannot_be_quantised() -> None:
    x = images(2, 33, 40)
    hooked = copy.deepcopy(small())
    hooked.features[2].conv[1].register_forward_hook(lambda *_: None)
    partly, wide = copy.deepcopy(small()), copy.deepcopy(small())
    partly.features[3].conv[1][1].train()
    wide.features[3].conv[1][1].running_var.data = wide.features[3].conv[1][1].running_var.double()
    cases: list[tuple[nn.Module, type[Exception], str]] = [
        (partly, ValueError, "training mode"),
        (wide, ValueError, "float32 on the CPU"),
        (copy.deepcopy(small()).train(), ValueError, "training mode"),
        (copy.deepcopy(small()).double(), ValueError, "float32 on the CPU"),
        (nn.Conv2d(3, 4, 3), TypeError, "not a Conv2d"),
        (MobileNetV2(features_only=True).eval(), ValueError, "features_only"),
        (MobileNetV2(shortcut="expansion").eval(), ValueError, "shortcuts between expansions"),
        (hooked, ValueError, "hooks"),
    ]
    for model, kind, message in cases:
        with pytest.raises(kind, match=message):
            quantize(model, [x])


def test_arguments() -> None:
    x = images(2, 33, 40)
    for batches, options, message in (
        ([], {}, "no calibration batches"),
        ([x[0]], {}, r"float32 \[N, 3, H, W\]"),
        ([x.double()], {}, "float64"),
        ([x[:, :2]], {}, r"\[2, 2, 33, 40\]"),
        ([[1]], {}, "got list"),
        ([x], {"method": "best"}, "mse, percentile, max"),
        ([x], {"percentile": 10}, "above 50"),
        ([x], {"percentile": 100.5}, "at most 100"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(small(), batches, **options)


def test_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = small_int8(), images(2, 33, 40)
    for wrong in (x.double(), x[0], x[:, :1], x.to(torch.uint8)):
        with pytest.raises(ValueError, match="images must be float32"):
            q(wrong)
    with pytest.raises(ValueError, match="images must have pixels"):
        q(x[:, :, :0])
    with pytest.raises(ValueError, match="gradients"):
        q(x.clone().requires_grad_())
    with torch.no_grad():
        check_equal(q(x.clone().requires_grad_()), q(x))
    with pytest.raises(ValueError, match="does not train"):
        q.train()
    for move in (lambda: q.half(), lambda: q.double(), lambda: q.to("meta")):
        with pytest.raises(ValueError, match="stays as it is"):
            move()
    assert q.eval() is q and q.float() is q and not list(q.parameters())
    with pytest.raises(RuntimeError, match="smaller than the dilated 3x3"):
        quantized.run([quantized.conv_layer(3, 4, 1, (0, 0, 0, 0)), quantized.pool_layer(4)], images(1, 2, 2))
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_f32")
    with pytest.raises(ValueError, match="scalar_f32 computes in float32"):
        q(x)
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_s8")
    with pytest.raises(ValueError, match="scalar_s8 computes in int8"):
        small()(x)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images that a call looked at one thing after the other, and not in one step."""
    found: list[Tensor] = []
    check = quantization._check_images

    def record(x: Tensor, channels: int) -> None:
        found.append(x)
        check(x, channels)

    monkeypatch.setattr(quantization, "_check_images", record)
    return found


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_calls_in_a_row(asked: list[Tensor], monkeypatch: pytest.MonkeyPatch, padding: str) -> None:
    """Are asked for once, without the dispatcher; where the padding depends on the image, once for each size."""
    q = copy.deepcopy(small_int8(padding=padding))
    sizes = (2, 33, 40), (1, 33, 40), (3, 64, 32), (2, 33, 40)
    expected = [q.reference(images(*size)) for size in sizes]
    asked.clear()
    op, dispatched = torch.ops.mnv2_fused.network.default, []
    monkeypatch.setattr(quantization, "_NETWORK", lambda *args: dispatched.append(args) or op(*args))
    with torch.no_grad():
        for size, y in zip(sizes, expected, strict=True):
            check_equal(q(images(*size).contiguous(memory_format=torch.channels_last)), y)
            check_equal(q(images(*size)), y)
    assert len(asked) == len(dispatched) == (1 if padding == "symmetric" else 3)
    with torch.inference_mode():
        assert q(images(*sizes[0])).is_inference() and len(asked) > 1


def test_another_call_after_calls_in_a_row(asked: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not taken for one like them."""
    q, x = copy.deepcopy(small_int8()), images(2, 33, 40)
    expected = q.reference(x)

    class Image(Tensor):
        pass

    def in_a_row() -> None:
        with torch.no_grad():
            q(x), q(x)
            asked.clear()
            check_equal(q(x), expected)
        assert not asked

    for wrong in (x.double(), x[0], x[:, :1], x.to(torch.uint8), x.to("meta"), x[..., :0]):
        in_a_row()
        with torch.no_grad(), pytest.raises(ValueError, match="images must"):
            q(wrong)
    in_a_row()
    with pytest.raises(ValueError, match="gradients"):
        q(x.clone().requires_grad_())
    with torch.no_grad():
        in_a_row()
        assert type(q(x.as_subclass(Image))) is Image and len(asked) == 1
        in_a_row()
        check_equal(q(torch._neg_view(x)), q.reference(-x))
        in_a_row()
        graph = str(torch.jit.trace(q, x, check_trace=False).inlined_graph)
        assert graph.count("mnv2_fused::network") == 1
        in_a_row()
        for other in (copy.deepcopy(q), copy.copy(q), pickle.loads(pickle.dumps(q))):
            asked.clear()
            check_equal(other(x), expected)
            assert len(asked) == 1
        in_a_row()
        handle = q.register_forward_hook(lambda module, given, y: y + 1)
        check_equal(q(x), expected + 1)
        handle.remove()
        in_a_row()
        monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_f32")
        with pytest.raises(ValueError, match="scalar_f32 computes in float32"):
            q(x)


def test_follows_no_later_change() -> None:
    model, x = copy.deepcopy(small()), images(2, 33, 40)
    q = quantize(model, [x])
    before = q(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    check_equal(q(x), before)


# ----------------------------------------------------------------------------------------------------------- training


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor) -> float:
    loss = F.cross_entropy(model(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding": "same"}], ids=str)
def test_qat_is_the_int8_model(per_channel: bool, options: dict[str, str]) -> None:
    """In eval mode they differ where a value is as near to the edge of a step as biases are rounded: rare at first."""
    torch.manual_seed(0)
    model = copy.deepcopy(small(**options)).train()
    qat = prepare_qat(model, per_channel=per_channel, averaging=0.5)
    x, labels = images(16, 33, 40), torch.arange(16) % 10
    optimizer = torch.optim.SGD(qat.parameters(), 0.01)
    losses = [step(qat, optimizer, x, labels) for _ in range(12)]
    assert losses[-1] < losses[0]
    q = qat.eval().convert()
    seen, rounded = {}, qat._round
    qat._round = lambda name, x: seen.setdefault(name, rounded(name, x))
    with torch.no_grad():
        qat(x)
    found = {}
    for name, r, y in q.reference_tensors(x):
        if r is not None:
            found[name] = ((r.dequantize(y) - seen[name]).abs() / r.scale).round()
    # A sum is 1000 to 10,000 times as fine as a byte, its bias half of that off at most.
    assert found["0.conv"].max() == 1 and (found["0.conv"] > 0).double().mean() < 2e-3
    assert (found["1.project"] > 0).double().mean() < 0.05
    assert all(steps.mean() < 1.5 for steps in found.values())


def test_qat_passes_gradients_through_rounding() -> None:
    """As if it were not there, but where a value saturates."""
    model = copy.deepcopy(small()).train()
    for per_channel in (True, False):
        qat = prepare_qat(model, per_channel=per_channel)
        conv, norm, _ = model.features[2].conv[0]
        (gradient,) = torch.autograd.grad(qat._weight(conv, norm).sum(), conv.weight)
        torch.testing.assert_close(gradient, torch.ones_like(conv.weight))
        assert not torch.equal(qat._weight(conv, norm), conv.weight)
    qat(images(8, 33, 40)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    x = torch.tensor([-9.0, -0.5, 0.3, 0.7, 9.0], requires_grad=True)
    qat.lows[0], qat.highs[0] = -1, 1
    qat.eval()._round("image", x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_qat_ranges() -> None:
    """Those of the first batch, then moving averages; 0 is always within."""
    qat = prepare_qat(copy.deepcopy(small()), averaging=0.25).train()
    x = images(8, 33, 40)
    qat(x)
    assert (qat.lows[0], qat.highs[0]) == (x.min(), x.max())
    qat(3 * x)
    assert float(qat.highs[0]) == pytest.approx(1.5 * float(x.max()))
    for sign in (1, -1):
        qat = prepare_qat(copy.deepcopy(small())).train()
        qat(sign * (x.abs() + 1))
        ends = qat.lows if sign > 0 else qat.highs
        assert ends[0] == 0


def test_qat_of_a_channel_of_nothing() -> None:
    model = copy.deepcopy(small())
    with torch.no_grad():
        model.features[2].conv[0][1].weight[::3] = 0
    assert prepare_qat(model).train()(images(8, 33, 40)).isfinite().all()


def test_qat_errors() -> None:
    model = copy.deepcopy(small())
    qat = prepare_qat(model)
    with pytest.raises(ValueError, match="training mode"):
        qat.train().convert()
    for call in (lambda: qat.eval()(images(2, 33, 40)), lambda: qat.eval().convert()):
        with pytest.raises(ValueError, match="no ranges yet"):
            call()
    with pytest.raises(ValueError, match="averaging"):
        prepare_qat(model, averaging=0)
    with pytest.raises(TypeError, match="not a Linear"):
        prepare_qat(nn.Linear(1, 1))


def test_qat_state(tmp_path: Path) -> None:
    """Its state dict holds the ranges, so that training goes on from a checkpoint."""
    qat, other = (prepare_qat(copy.deepcopy(small())) for _ in range(2))
    qat.train()(images(8, 33, 40))
    other.load_state_dict(qat.state_dict())
    x = images(2, 33, 40)
    check_equal(other.eval().convert()(x), qat.eval().convert()(x))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", [0, 1])
def test_digits(seed: int) -> None:
    """A network trained on digits loses at most half a point of accuracy in int8, and nothing when trained for it."""
    torch.set_num_threads(2)
    data, model = digits.digits(), digits.digits_network(seed)
    accuracy = digits.train(model, data, seed=seed).accuracy

    def right(m: nn.Module) -> float:
        with torch.no_grad():
            return (m(data.test_images).argmax(1) == data.test_labels).double().mean().item()

    for options in ({}, {"method": "percentile"}, {"per_channel": False}):
        assert right(quantize(model, data.images[:512].split(64), **options)) >= accuracy - 0.005, options
    qat = prepare_qat(model).train()
    optimizer = torch.optim.SGD(qat.parameters(), 0.001, momentum=0.9)
    for start in range(0, 1280, 64):
        step(qat, optimizer, data.images[start : start + 64], data.labels[start : start + 64])
    assert right(qat.eval().convert()) >= accuracy - 0.005
