"""MobileNetV2 in bfloat16 on the CPU, in eval mode: by its own dtype and under autocast, against float64 and eager."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from networks import SIZES, WIDTHS, error, fused, images, plain, settled
from torch import Tensor, nn

from mnv2_fused import InvertedResidual, MobileNetV2, ops


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not model.fused or model.why_not_fused(x) == ""
        return model(x)


def mean_error(y: Tensor, value: Tensor) -> float:
    """Of the rows, in norm."""
    assert y.dtype == torch.bfloat16 and y.shape == value.shape
    return float(((y.double() - value).norm(dim=1) / value.norm(dim=1)).mean())


@cache
def settled_once(width_mult: float = 0.35) -> MobileNetV2:
    """Settled by the kernel that is chosen when this is first called; not to be changed."""
    with pytest.MonkeyPatch.context() as context:
        context.delenv("MNV2_FUSED_KERNEL", raising=False)
        return settled(width_mult)


def check_bfloat16(model: MobileNetV2, x: Tensor) -> None:
    """As near to float64 as PyTorch's own bfloat16, and nearer under autocast, whose weights are rounded once folded.

    What a row is off by varies, and so does the mean over the rows, by about a tenth.
    """
    composition = copy.deepcopy(model)
    composition.fused = False
    value = plain(model, x)
    y = autocast(model, x)
    assert mean_error(y, value) < 1.05 * mean_error(autocast(composition, x), value)
    model, composition, narrow = model.bfloat16(), composition.bfloat16(), x.bfloat16()
    with torch.no_grad():
        assert mean_error(fused(model, narrow), value) < 1.15 * mean_error(composition(narrow), value)


@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_bfloat16(bfloat16_kernel: str, size: tuple[int, int]) -> None:
    check_bfloat16(copy.deepcopy(settled_once()), images(4, *size))


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", WIDTHS)
def test_bfloat16_widths(bfloat16_kernel: str, width: float) -> None:
    for size in SIZES[1:]:
        check_bfloat16(copy.deepcopy(settled_once(width)), images(4, *size))


def test_rounding_is_to_the_nearest_even(bfloat16_kernel: str) -> None:
    """A block that gives its last biases, which are float32: beside the middle between two bfloat16 and on it."""
    random = torch.Generator().manual_seed(0)
    high = torch.randint(0x80, 0x7F80, (2000,), generator=random)  # no denormals, which the kernels take for 0
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = ((high[:, None] << 16) | low).flatten()
    bits = torch.cat([bits, torch.tensor([0x7F800000, 0x7FC00000, 0x7FFFFFFF])])  # infinity, NaN, the last NaN
    bias = bits.to(torch.int32).view(torch.float32)
    bias = torch.cat([bias, -bias])
    layer = ops.Layer(ops.BLOCK, 1, 1, len(bias), 1, 1, 1, 1, 1, 1)
    plan = ops.make_plan([layer], torch.bfloat16)
    packed = torch.ops.mnv2_fused.pack(torch.cat([torch.zeros(10 + len(bias)), bias]), plan)
    y = torch.ops.mnv2_fused.network(torch.zeros(1, 1, 3, 5, dtype=torch.bfloat16), packed, plan)
    right = bias.bfloat16()
    assert 0 < int((right.float() == bias).sum()) < len(bias) / 2
    torch.testing.assert_close(y, right[:, None, None].expand(1, -1, 3, 5), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_as_initialised() -> None:
    """The whole network at its true size; without a trained one's cancellations nothing but roundings is seen."""
    torch.manual_seed(0)
    model, x = MobileNetV2().eval(), images(2, 224, 224)
    value = plain(model, x)
    assert error(autocast(model, x), value) < 0.01
    assert error(fused(model.bfloat16(), x.bfloat16()), value) < 0.01


def test_bfloat16_any_batch_and_threads(bfloat16_kernel: str) -> None:
    model, x = copy.deepcopy(settled_once()), images(5, 65, 33)
    alone = [autocast(model, x[i : i + 1]) for i in range(5)]
    for threads in (1, 2, 3, 4, 7, 16):
        torch.set_num_threads(threads)
        assert torch.equal(autocast(model, x), torch.cat(alone)), threads
        assert torch.equal(autocast(model, x[1:2]), alone[1]), threads


@pytest.mark.parametrize("special", ["none", "range", "nan"])
def test_an_image_in_float32(bfloat16_kernel: str, special: str) -> None:
    """Is rounded as PyTorch rounds it, every width of rows and any strides, also what float32 hardly holds."""
    model = copy.deepcopy(settled_once())
    for batch, height, width in ((2, 33, 45), (1, 32, 16), (3, 34, 1), (1, 40, 79)):
        x = images(batch, height, width).clone()
        # Halfway between two bfloat16, to the even one and to the odd one; denormal in both; and overflowing.
        x[:, 0, ::5] = {"none": 1 + 2.0**-8, "range": 1e-40, "nan": float("nan")}[special]
        x[:, 1, ::7] = {"none": 1 + 3 * 2.0**-8, "range": 3.4e38, "nan": -float("inf")}[special]
        expected = autocast(model, x.bfloat16())
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3).flip(3), x.mT.contiguous().mT):
            torch.testing.assert_close(autocast(model, given), expected, rtol=0, atol=0, equal_nan=True)
    plan = model._chain._packing.plan
    x = images(1, 32, 32)
    torch.library.opcheck(torch.ops.mnv2_fused.network.default, (x, model._chain._packing.packed, plan))


def test_autocast() -> None:
    """Images of any dtype that autocast rounds, and of any strides; what it leaves alone stays float64."""
    model, x = settled(), images(2, 32, 40)
    y = autocast(model, x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, autocast(model, x.bfloat16()))
    assert torch.equal(y, autocast(model, x.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(y, autocast(model, x.transpose(2, 3).contiguous().transpose(2, 3)))
    exact = fused(model, x)
    assert exact.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert "float16" in model.why_not_fused(x)
        assert model(x).dtype == torch.float16
    double = copy.deepcopy(model).double()
    assert torch.equal(autocast(double, x.double()), fused(double, x.double()))
    narrow = copy.deepcopy(model).bfloat16()
    assert torch.equal(autocast(narrow, x), fused(narrow, x.bfloat16()))


def test_bfloat16_parts() -> None:
    """Maps, blocks and heads of a network, each as one op where it can be."""
    model, x = settled().bfloat16(), images(2, 64, 48).bfloat16()
    composition = copy.deepcopy(model)
    composition.fused = False
    with torch.no_grad():
        assert all(m.why_not_fused(torch.zeros(1, m.in_channels, 5, 5).bfloat16()) == "" for m in blocks_of(model))
        found, right = (m.forward_intermediates(x, [2, "5.expansion", 18]) for m in (model, composition))
        truth = composition.double().forward_intermediates(x.double(), [2, "5.expansion", 18])
    for y, theirs, value in zip(found, right, truth, strict=True):
        assert y.dtype == torch.bfloat16 and error(y, value) < 1.15 * error(theirs, value)


def blocks_of(model: MobileNetV2) -> list[InvertedResidual]:
    return [m for m in model.modules() if isinstance(m, InvertedResidual)]


def test_bfloat16_kernel_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = settled().bfloat16(), images(1, 32, 32).bfloat16()
    monkeypatch.setenv("MNV2_FUSED_KERNEL", "scalar_f32")
    with torch.no_grad(), pytest.raises(ValueError, match="scalar_f32 computes in float32.*bfloat16"):
        model(x)
