"""DeepLabV3: the paper's counts, the values of layers written by hand, evaluation by scales, the loss, training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from networks import TOLERANCE, error, images, settle
from steps import EXACT, Ran
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mnv2_fused import MobileNetV2, segmentation_loss
from mnv2_fused.deeplab import VOC_SCALES, DeepLabV3
from mnv2_fused.mobilenet_v1 import MobileNetV1
from mnv2_fused.network import Conv2dSame

# Five blocks, as the head sits on the fifth map.
tiny_backbone = partial(MobileNetV2, inverted_residual_setting=[(1, 8, 1, 1), *[(3, 8, 1, 2)] * 4])


def settled(num_classes: int = 5, output_stride: int = 16, aspp: bool = False, **options: Any) -> DeepLabV3:
    torch.manual_seed(0)
    return settle(DeepLabV3(num_classes, output_stride, aspp, **{"backbone": tiny_backbone, **options}))


def plain(model: DeepLabV3, x: Tensor) -> Tensor:
    model = copy.deepcopy(model).double()
    model.fused = False
    with torch.no_grad():
        return model(x.double())["out"]


def corners(n: int, m: int) -> Tensor:
    """[m, n]: linear interpolation of n values at m places, the first and the last on those of the values."""
    places = torch.linspace(0, n - 1, m, dtype=torch.float64) if m > 1 else torch.zeros(1, dtype=torch.float64)
    return (1 - (places[:, None] - torch.arange(n)).abs()).clamp(min=0)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return torch.einsum("yh,xw,nchw->ncyx", *(corners(*pair) for pair in zip(x.shape[2:], size, strict=True)), x)


def head_by_hand(model: DeepLabV3, x: Tensor, rates: Sequence[int]) -> Tensor:
    """research/deeplab/model.py, _extract_features and _get_logits, on the backbone's map in float64."""
    state = {name.removeprefix("classifier."): t.double() for name, t in model.classifier.state_dict().items()}

    def conv(name: str, x: Tensor, rate: int = 1) -> Tensor:
        weight, norm = state[f"{name}.0.weight"], ("running_mean", "running_var", "weight", "bias")
        y = F.conv2d(x, weight, padding=rate * (weight.shape[2] // 2), dilation=rate)
        return F.batch_norm(y, *(state[f"{name}.1.{key}"] for key in norm)).relu()

    pooled = conv("pool", x.mean((2, 3), keepdim=True))
    branches = [pooled * torch.ones_like(x[:, :1]), conv("branches.0", x)]
    branches += [conv(f"branches.{i}", x, rate) for i, rate in enumerate(rates, 1)]
    return F.conv2d(conv("project", torch.cat(branches, 1)), state["logits.weight"], state["logits.bias"])


# --------------------------------------------------------------------------------------------------------------- counts

COUNTS = {  # table 7 of the paper: arguments, parameters, multiply-adds at 513x513
    "V2, 16": (dict(), 2_113_557, 2.741e9),
    "V2, 8": (dict(output_stride=8), 2_113_557, 8.826e9),
    "V2, 16, ASPP": (dict(aspp=True), 4_523_541, 5.364e9),
    "V1, 16, ASPP": (dict(aspp=True, backbone=MobileNetV1), 11_145_301, 12.761e9),
}


@pytest.mark.parametrize(("options", "parameters", "multiply_adds"), COUNTS.values(), ids=COUNTS)
def test_counts(options: dict[str, Any], parameters: int, multiply_adds: float) -> None:
    with torch.device("meta"):
        model, x = DeepLabV3(**options).eval(), torch.zeros(1, 3, 513, 513)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        assert model(x)["out"].shape == (1, 21, 513, 513)
    assert abs(counter.get_total_flops() / 2 / multiply_adds - 1) < 2e-4


def test_multiply_adds_of_multi_scale_evaluation() -> None:
    """Table 7's MF at output stride 8: 152.6 billion, over six scales and their mirror images."""
    with torch.device("meta"):
        model, x = DeepLabV3(output_stride=8).eval(), torch.zeros(1, 3, 513, 513)
    with FlopCounterMode(display=False) as counter:
        model.predict(x, VOC_SCALES, flip=True)
    assert abs(counter.get_total_flops() / 2 / 152.33e9 - 1) < 1e-3


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("output_stride", "rates", "dilations"),
    [
        (16, (), [1] * 14 + [2] * 3),
        (8, (), [1] * 7 + [2] * 7 + [4] * 3),
        (16, (6, 12, 18), None),
        (8, (12, 24, 36), None),
    ],
    ids=str,
)
def test_rates(output_stride: int, rates: tuple[int, ...], dilations: list[int] | None) -> None:
    model = DeepLabV3(21, output_stride, bool(rates), width_mult=0.35)
    convs = [branch[0] for branch in model.classifier.branches]
    assert tuple(conv.dilation[0] for conv in convs[1:]) == rates and convs[0].kernel_size == (1, 1)
    if dilations:
        assert [block.conv[-3][0].dilation[0] for block in model.backbone.features[1:]] == dilations


def test_arguments_of_the_backbone() -> None:
    model = DeepLabV3(width_mult=0.5, padding="same", in_channels=4, dropout=0.3)
    stem, *rest = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert (stem.in_channels, stem.out_channels, model.backbone.num_features) == (4, 16, 160)
    assert all(type(conv) is Conv2dSame for conv in (stem, *rest)) and len(rest) == 17
    assert not any(isinstance(m, Conv2dSame) for m in DeepLabV3(width_mult=0.5).modules())
    assert model.classifier.dropout.p == 0.3 and len(model.backbone.features) == 18


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (15, 16), (33, 33), (50, 47)], ids=str)
@pytest.mark.parametrize("aspp", [False, True], ids=["", "ASPP"])
def test_values(aspp: bool, size: tuple[int, int]) -> None:
    """Of any size; down to one pixel, whose map is one pixel too."""
    model, x = settled(aspp=aspp, padding="same"), images(3, *size)
    exact = copy.deepcopy(model).double()
    exact.fused = False
    with torch.no_grad():
        (features,) = exact.backbone(x.double())
        assert features.shape[2:] == tuple(-(-n // 16) for n in size)
        truth = resized(head_by_hand(model, features, (6, 12, 18) if aspp else ()), size)
        with Ran() as ran:
            found = model(x)
    assert list(found) == ["out"] and found["out"].shape == (3, 5, *size) and ran.ops["network"] == 1
    assert error(plain(model, x), truth) < 1e-12
    assert error(found["out"], truth) < TOLERANCE


def test_full_size() -> None:
    model, x = settled(21, backbone=MobileNetV2), images(1, 225, 225)
    with torch.no_grad():
        assert error(model(x)["out"], plain(model, x)) < TOLERANCE


def test_on_mobilenet_v1() -> None:
    model, x = settled(backbone=MobileNetV1, width_mult=0.25, output_stride=8), images(2, 40, 33)
    with torch.no_grad(), Ran() as ran:
        assert error(model(x)["out"], plain(model, x)) < TOLERANCE
    assert ran.ops["network"] == 1


def test_the_mean_is_spread_over_no_map() -> None:
    """While fused the branches alone are put side by side, in training too; else the mean as well."""

    class Concatenated(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            y = op(*args, **(kwargs or {}))
            if op is torch.ops.aten.cat.default and y.dim() == 4:
                channels.append(y.shape[1])
            return y

    x = images(2, 33, 33)
    for aspp, fused, expected in (
        (False, True, []),
        (True, True, [1024]),
        (False, False, [512]),
        (True, False, [1280]),
    ):
        model = settled(aspp=aspp)
        model.fused = fused
        assert model.fused == fused == model.backbone.fused
        for training in (False, True):
            channels: list[int] = []
            with torch.no_grad(), Concatenated():
                model.train(training)(x)
            assert channels == expected, (aspp, fused, training)


@pytest.mark.parametrize(
    "name", ["classifier.project.0", "classifier.project", "classifier.pool", "backbone.features.3"]
)
def test_hooks_fire(name: str) -> None:
    model, x = settled(), images(2, 33, 33)
    fired = []
    with torch.no_grad():
        before = model(x)["out"]
        handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, y: fired.append(1) or y * 2)
        after = model(x)["out"]
        assert fired == [1] and error(after, before) > 1e-3
        assert error(after, plain(model, x)) < TOLERANCE and len(fired) == 2
        handle.remove()
        assert torch.equal(model(x)["out"], before)


def test_changes_and_copies() -> None:
    model, x = settled(), images(2, 33, 33)
    with torch.no_grad():
        y = model(x)["out"]
        for name in ("backbone.features.5.conv.2", "classifier.pool.0", "classifier.project.0", "classifier.project.1"):
            before = model(x)["out"]
            model.get_submodule(name).weight.mul_(1.5)
            assert error(model(x)["out"], before) > 1e-3, name
            assert error(model(x)["out"], plain(model, x)) < TOLERANCE, name
        model.backbone.features[0][0].weight.data.mul_(-1)
        model.repack()
        assert error(model(x)["out"], plain(model, x)) < TOLERANCE
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x)["out"], model(x)["out"])
            assert list(other.state_dict()) == list(settled().state_dict())
        assert error(model(x)["out"], y) > 1e-3


def test_what_is_unfused() -> None:
    model, x = settled(), images(2, 33, 33)
    with torch.no_grad():
        assert model.unfused(x) == {}
    assert model.train().unfused(x) == {}
    model.backbone.features[2].conv[0].register_forward_hook(lambda *_: None)
    assert list(model.unfused(x)) == ["backbone.features.2"]
    model.fused = False
    assert model.unfused(x) == {"backbone": "the attribute `fused` is False"}


@pytest.mark.parametrize("output_stride", [4, 32, None])
def test_wrong_output_stride(output_stride: Any) -> None:
    with pytest.raises(ValueError, match=f"output_stride should be 8 or 16, got {output_stride}"):
        DeepLabV3(output_stride=output_stride)


# -------------------------------------------------------------------------------------------------------------- predict


@pytest.mark.parametrize("size", [(33, 33), (40, 27), (1, 3)], ids=str)
@pytest.mark.parametrize("flip", [False, True], ids=["", "flip"])
def test_predict(size: tuple[int, int], flip: bool) -> None:
    """The mean over scales and mirror images of the softmax at the image's size, as the reference has it."""
    model, x = settled(), images(2, *size)
    exact, probabilities = copy.deepcopy(model).double(), []
    for scale in VOC_SCALES:
        scaled = [max(1, int((n - 1.0) * scale + 1.0)) for n in size]
        with torch.no_grad():
            for mirrored in (False, True) if flip else (False,):
                image = x.double().flip(3) if mirrored else x.double()
                logits = exact.classifier(*exact.backbone(resized(image, scaled)))
                logits = resized(logits, size)
                probabilities.append((logits.flip(3) if mirrored else logits).softmax(1))
    found = model.predict(x, VOC_SCALES, flip)
    assert found.shape == (2, 5, *size) and not found.requires_grad and found.dtype == torch.float32
    assert error(found, torch.stack(probabilities).mean(0)) < TOLERANCE
    assert float((found.sum(1) - 1).abs().max()) < 1e-6


def test_predict_at_one_scale() -> None:
    model, x = settled(), images(2, 40, 27)
    with torch.no_grad():
        assert torch.equal(model.predict(x), model(x)["out"].softmax(1))
    both = model.predict(x, flip=True)
    assert error(model.predict(x.flip(3), flip=True), both.flip(3)) < TOLERANCE
    assert error(both, model.predict(x)) > 1e-3


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1,)], ids=str)
def test_predict_with_wrong_scales(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="scales should be one or more positive numbers"):
        settled().predict(images(1, 33, 33), scales)


def test_predict_in_training_mode() -> None:
    model = settled().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="predict needs the model in eval mode"):
        model.predict(images(2, 33, 33))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


# ------------------------------------------------------------------------------------------------------------- training


def gradients(model: DeepLabV3, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    segmentation_loss(model(x)["out"], labels).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def labels_for(x: Tensor, num_classes: int = 5) -> Tensor:
    """A third of the pixels is ignored."""
    random = torch.Generator().manual_seed(2)
    labels = torch.randint(num_classes, (len(x), *x.shape[2:]), generator=random)
    return labels.masked_fill(torch.rand(labels.shape, generator=random) < 1 / 3, 255)


@pytest.mark.parametrize("aspp", [False, True], ids=["", "ASPP"])
def test_gradients(aspp: bool) -> None:
    """Those of the plain modules, in float64; running statistics too, also those of the pooled branch."""
    model, x = settled(aspp=aspp, dropout=0.0).double().train(), images(3, 34, 41).double()
    composition = copy.deepcopy(model)
    composition.fused = False
    with Ran() as ran:
        found = gradients(model, x, labels_for(x))
    assert (ran.ops["block_train"], ran.ops["conv_bn_relu6"]) == (5, 1)
    truth = gradients(composition, x, labels_for(x))
    least = 1e-6 * max(float(g.norm()) for g in truth.values())
    for name, gradient in truth.items():
        assert float((found[name] - gradient).norm()) < EXACT * max(float(gradient.norm()), least) * 100, name
    for (name, b), c in zip(model.named_buffers(), composition.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=1e-10, atol=1e-12, msg=name)


def test_loss() -> None:
    logits = torch.randn(2, 5, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = labels_for(torch.empty(2, 3, 7, 6))
    loss = segmentation_loss(logits, labels)
    kept = labels != 255
    picked = logits.log_softmax(1).permute(0, 2, 3, 1)[kept].gather(1, labels[kept][:, None])
    torch.testing.assert_close(loss, -picked.mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.permute(0, 2, 3, 1)[~kept].any() and gradient.permute(0, 2, 3, 1)[kept].any(1).all()
    none = segmentation_loss(logits, torch.full_like(labels, 255))
    assert none == 0 and not torch.autograd.grad(none, logits)[0].any()
    assert segmentation_loss(logits, labels.masked_fill(~kept, 4), ignore_label=4) != loss


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_16_bit_logits(dtype: torch.dtype) -> None:
    """The sum over the pixels of an image is beyond float16; their mean is what float32 makes of the same logits."""
    logits = 20 * torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.zeros(1, 160, 160, dtype=torch.int64)
    assert torch.equal(segmentation_loss(logits, labels), segmentation_loss(logits.float(), labels))
    assert F.cross_entropy(logits.float(), labels, reduction="sum") > torch.finfo(torch.float16).max


def test_learns() -> None:
    """A label that depends on the place and the image; a few steps of the reference's optimiser, SGD with momentum."""
    torch.manual_seed(0)
    model = DeepLabV3(2, backbone=tiny_backbone, dropout=0.0)
    x = torch.randn(4, 3, 1, 1).sign() * torch.ones(33, 33) + 0.1 * torch.randn(4, 3, 33, 33)
    labels = ((x[:, 0] > 0) ^ (torch.arange(33) > 16)).long()
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = segmentation_loss(model(x)["out"], labels)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[0] > 0.65 and losses[-1] < 0.25, losses


def test_a_batch_of_one_in_training() -> None:
    """The pooled branch has one value a channel, and BatchNorm says so; with frozen norms one image will do."""
    model, x = settled().train(), images(1, 33, 33)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size .*256"):
        model(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.classifier.dropout.eval()
    segmentation_loss(model(x)["out"], labels_for(x)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_compiled() -> None:
    """In training, without a graph break, with the same gradients."""
    model, x = settled(dropout=0.0).double().train(), images(2, 18, 17).double()
    compiled = DeepLabV3(5, backbone=tiny_backbone, dropout=0.0).double()  # not called before
    compiled.load_state_dict(model.state_dict())
    truth = gradients(model, x, labels_for(x))
    torch._dynamo.reset()
    segmentation_loss(torch.compile(compiled, backend="aot_eager", fullgraph=True)(x)["out"], labels_for(x)).backward()
    least = 1e-6 * max(float(g.norm()) for g in truth.values())
    for name, p in compiled.named_parameters():
        assert float((p.grad - truth[name]).norm()) < 1e-7 * max(float(truth[name].norm()), least), name


@torch.no_grad()
def test_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, x = settled(aspp=True, padding="same"), images(2, 33, 40)
    truth = plain(model, x)
    with Ran() as ran:
        y = model.to(device)(x.to(device))["out"]
    assert ran.ops["network"] == 1 and error(y.cpu(), truth) < TOLERANCE


@torch.no_grad()
def test_bfloat16_on_the_cpu() -> None:
    """The backbone is one op; the result is as near to float64 as that of PyTorch's modules.

    Parameters that are bfloat16 themselves are rounded again when they have been folded, PyTorch's activations before
    each BatchNorm: two draws of roundings, each the same for all images, of which one may be twice the other.
    """
    model, x = settled(), images(2, 65, 49)
    value = plain(model, x)
    composition = copy.deepcopy(model)
    composition.fused = False
    with torch.autocast("cpu", torch.bfloat16), Ran() as ran:
        assert model.unfused(x) == {}
        y = model(x)["out"]
    assert ran.ops["network"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert error(y, value) < 1.15 * error(composition(x)["out"], value)
    y, right = (m.bfloat16()(x.bfloat16())["out"] for m in (model, composition))
    assert y.dtype == torch.bfloat16 and error(y, value) < 2.5 * error(right, value)
