"""Training on generated shapes, a little of it: that it learns, and the command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from mnv2_fused import shapes
from mnv2_fused.cli import app

for package in ("faster_coco_eval", "torchmetrics", "matplotlib"):
    pytest.importorskip(package, reason="scores and plots need the packages of the extras det, seg and demo")


SHORT = {
    "detection": shapes.TASKS["detection"]._replace(size=96, images=128, epochs=5),
    "segmentation": shapes.TASKS["segmentation"]._replace(size=64, images=256, epochs=5),
}


@pytest.mark.parametrize("task", SHORT.values(), ids=SHORT)
def test_it_learns(task: shapes.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls, a test image is better understood than before, and two runs agree to the bit."""
    monkeypatch.setattr(shapes, "TEST_IMAGES", 32)
    items, test = shapes.data(task, task.images, "train"), shapes.data(task, 32, "test")
    model, steps = shapes.network(task), []
    before = shapes.score_of(shapes.Run([], shapes.evaluate(model.eval(), test, task), 0.0))
    assert model.train().unfused(torch.zeros(2, 3, task.size, task.size)) == {}
    run = shapes.train(model, task, items, progress=steps.append)
    assert not model.training and [step.done for step in steps] == list(range(1, len(run.losses) + 1))
    first, last = (sum(run.losses[part]) / 5 for part in (slice(5), slice(-5, None)))
    assert last < 0.75 * first, (first, last)
    if task.name == "segmentation":
        assert shapes.score_of(run) > before + 0.02
    short = task._replace(epochs=1, images=64)
    runs = [shapes.train(shapes.network(short), short, items[:64]) for _ in range(2)]
    assert runs[0].losses == runs[1].losses and len(runs[0].losses) == 2


def test_fused_and_plain_steps_agree() -> None:
    for task in SHORT.values():
        task = task._replace(images=32, epochs=1)
        items, losses = shapes.data(task, 32, "train"), []
        for fused in (True, False):
            model = shapes.network(task)
            model.fused = fused
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0  # what it drops depends on how the map lies in memory
            losses.append(shapes.loss_of(model.train(), *shapes.collate(items)).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_too_few_images() -> None:
    task = SHORT["detection"]
    with pytest.raises(ValueError, match="31 images do not fill a batch of 32"):
        shapes.train(shapes.network(task), task, shapes.data(task, 31, "train"))


@pytest.mark.parametrize("name", SHORT)
def test_command(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(shapes, "TEST_IMAGES", 8)
    monkeypatch.setitem(shapes.TASKS, name, SHORT[name])
    plot = tmp_path / "plot.png"
    command = ["shapes", name, "--images", "32", "--epochs", "1", "--json", "--plot", str(plot)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "expected at least" in done.stderr, "one step is not enough"
    assert json.loads(done.stdout)["task"]["images"] == 32 and plot.stat().st_size > 10_000


def test_a_seed_out_of_range_is_told() -> None:
    done = CliRunner().invoke(app, ["shapes", "detection", "--seed", str(2**70)])
    assert done.exit_code == 2 and "--seed" in done.stderr
