"""Figure 6's variants: what they compute, that they train, and the command that compares them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mnv2_fused import MobileNetV2, ablations, digits
from mnv2_fused.cli import app

SETTING = ((1, 8, 1, 1), (6, 16, 3, 2), (6, 16, 1, 1))


def model_of(**options: str) -> MobileNetV2:
    torch.manual_seed(0)
    model = MobileNetV2(5, inverted_residual_setting=SETTING, in_channels=1, dropout=0.0, **options)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.normal_(norm.bias, std=0.3)
    return model


def by_hand(model: MobileNetV2, x: torch.Tensor, shortcut: str, activation: str) -> torch.Tensor:
    """Every convolution by itself, as figure 6 describes the variants."""
    x, before = model.features[0](x), None
    for block in model.features[1:-1]:
        *expand, depthwise, project, norm = [m for m in block.conv if not isinstance(m, nn.ReLU6)]
        h = expand[0](x) if expand else x
        if shortcut == "expansion" and expand and before is not None and before.shape == h.shape:
            h = h + before
        before = h if block.stride == 1 and expand else None
        y = norm(project(depthwise(h)))
        y = y.clamp(0, 6) if activation == "relu6" else y
        x = x + y if shortcut == "bottleneck" and block.stride == 1 and x.shape == y.shape else y
    return model.classifier(model.features[-1](x).mean((2, 3)))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("activation", ["linear", "relu6"])
@pytest.mark.parametrize("shortcut", ["bottleneck", "expansion", "none"])
def test_variants(shortcut: str, activation: str, fused: bool, training: bool) -> None:
    model = model_of(bottleneck_activation=activation, shortcut=shortcut).double().train(training)
    x = torch.randn(3, 1, 17, 20, dtype=torch.float64)
    truth = by_hand(model, x, shortcut, activation)
    wanted = torch.autograd.grad(truth.square().sum(), list(model.parameters()))
    model.fused = fused
    y = model(x)
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    torch.testing.assert_close(y, truth, rtol=1e-9, atol=1e-9)
    scale = max(float(gradient.norm()) for gradient in wanted)
    for gradient, right in zip(found, wanted, strict=True):
        assert float((gradient - right).norm()) <= 1e-6 * scale
    with torch.no_grad():
        torch.testing.assert_close(model(x), truth, rtol=1e-9, atol=1e-9)
    distinct = [
        by_hand(model, x, s, a).detach() for s in ("bottleneck", "expansion", "none") for a in ("linear", "relu6")
    ]
    assert all(float((distinct[i] - distinct[j]).norm()) > 1e-3 for i in range(6) for j in range(i))


def test_what_runs_fused() -> None:
    x = torch.zeros(2, 1, 17, 20)
    assert (
        model_of(shortcut="none").unfused(x)
        == {}
        == model_of(bottleneck_activation="relu6", shortcut="none").unfused(x)
    )
    refused = model_of(bottleneck_activation="relu6").unfused(x)
    assert set(refused) == {"features.3", "features.4", "features.5"} and "ReLU6" in refused["features.3"]
    with torch.no_grad():
        assert model_of(shortcut="expansion").eval().why_not_fused(x) == "shortcuts between expansions"
    with pytest.raises(ValueError, match="shortcut='expansion' gives no maps"):
        model_of(shortcut="expansion").forward_intermediates(x, [1])


@pytest.mark.parametrize("options", [dict(shortcut="identity"), dict(bottleneck_activation="relu")], ids=str)
def test_errors(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"should be '.*, got '{next(iter(options.values()))}'"):
        model_of(**options)


def test_cluttered_digits() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    data = digits.digits()
    hard = ablations.cluttered(data)
    assert hard.images.shape == (3 * len(data.images), 1, 32, 32) and hard.test_images.shape == data.test_images.shape
    assert torch.equal(hard.labels[: len(data.labels)], data.labels) and torch.equal(hard.test_labels, data.test_labels)
    assert hard.images.min() >= 0 and hard.images.max() <= 1
    assert torch.equal(ablations.cluttered(data).images, hard.images)
    assert not torch.equal(ablations.cluttered(data, seed=1).images, hard.images)


def test_ablate(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    pytest.importorskip("matplotlib", reason="a plot needs matplotlib")
    small = digits.digits()
    small = digits.Digits(*(part[:128] for part in small))
    monkeypatch.setattr(digits, "digits", lambda: small)
    plot = tmp_path / "plot.png"
    done = CliRunner().invoke(app, ["ablate", "--epochs", "1", "--seeds", "2", "--json", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["data"], row["variant"]) for row in rows] == [
        (data, variant) for data in ("digits", "cluttered digits") for variant in ablations.VARIANTS
    ]
    for row in rows:
        assert len(row["accuracies"]) == 2 and row["mean"] == pytest.approx(sum(row["accuracies"]) / 2)
    assert plot.stat().st_size > 10_000
