"""Training on the digits: one seed gives one result, fused and plain blocks train alike, bad arguments are refused."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from steps import Ran

from mnv2_fused import digits

STEPS = 4


@pytest.fixture(scope="module")
def data():
    """Half the demo's side: a quarter of its time."""
    return digits.digits(16)


def losses(data, fused=True, nudged=False, steps=STEPS, **kwargs):
    """Of a training that has run fused in every step, where it should."""
    model = digits.digits_network(seed=1)
    model.fused = fused
    if nudged:
        digits.nudge(model)
    with Ran() if fused else nullcontext() as ran:  # counting takes a third of a plain run's time
        result = digits.train(model, data, epochs=10, steps=steps, **kwargs).losses
    if fused:
        ran.check(model, steps)
    return result


def test_digits():
    data = digits.digits()
    assert data.images.shape == (1347, 1, 32, 32) and data.test_images.shape == (450, 1, 32, 32)
    assert data.images.dtype == torch.float32 and data.labels.dtype == torch.int64
    assert data.images.min() == 0 and data.images.max() == 1
    # Stratified: of each digit a quarter, to the image.
    assert (data.test_labels.bincount() - data.labels.bincount() / 3).abs().max() <= 1
    assert torch.equal(data.test_labels, digits.digits(8).test_labels)


def test_what_the_network_contains():
    """Else the demo would not show what it says: blocks with and without residual, expansion and stride."""
    kinds = {(block.stride, block.use_res_connect, len(block.conv)) for block in digits.digits_network().features[1:-1]}
    assert kinds >= {(1, False, 3), (2, False, 4), (1, True, 4)}


def test_one_seed_one_result(data):
    state = torch.get_rng_state()
    first = losses(data)
    torch.rand(1)  # what others draw changes nothing
    assert losses(data) == first != losses(data, seed=1)
    torch.manual_seed(5)
    assert torch.equal(digits.digits_network(1).classifier[1].weight, digits.digits_network(1).classifier[1].weight)
    torch.set_rng_state(state)
    losses(data)
    assert torch.equal(torch.get_rng_state(), state)


def test_first_losses_fused_and_plain(data):
    """The first is a forward pass alone. After a few updates rounding has grown, but not to 1e-4 (see digits.py)."""
    for fused, plain in zip(losses(data), losses(data, fused=False), strict=True):
        assert fused == pytest.approx(plain, rel=1e-4)


def test_200_steps_fused_and_plain(data):
    plain = losses(data, fused=False, steps=200)
    found = digits.difference(losses(data, steps=200), plain)
    yardstick = digits.difference(losses(data, fused=False, nudged=True, steps=digits.COMPARED_STEPS), plain)
    assert digits.agree(found, yardstick), f"{found}, and between two plain runs {yardstick}"
    assert digits.smoothed(plain)[-1] < 0.3  # from 2.3: it has learnt something


def test_steps_and_progress(data):
    seen = []
    model = digits.digits_network()
    result = digits.train(model, data, epochs=2, batch=500, steps=3, progress=seen.append)
    assert [step.loss for step in seen] == result.losses and not model.training
    assert [(step.done, step.total, step.epoch) for step in seen] == [(1, 3, 1), (2, 3, 1), (3, 3, 2)]
    assert 0 <= result.accuracy <= 1 and result.seconds > 0


def test_nudge_is_one_rounding():
    model, same = digits.digits_network(), digits.digits_network()
    digits.nudge(model)
    nudged, weight = (m.features[2].conv[0][0].weight for m in (model, same))
    relative = ((nudged - weight) / weight).abs()
    assert 0 < relative.max() <= 2.0**-23 and (nudged != weight).float().mean() > 0.2


def test_difference():
    found = digits.difference([1.0, 2.0, 3.0], [1.0, 1.0, 2.0, 9.0])
    assert (found.median, found.largest) == (0.5, 1.0)
    assert found.curve == pytest.approx(2 - 4 / 3)
    assert digits.agree(found._replace(curve=0.1), found) and not digits.agree(found, found)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"batch": 5000}, "5000"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"images": torch.zeros(8, 3, 8, 8)}, "[N, 1, H, W]"),
        ({"images": torch.zeros(8, 1, 8, 8, dtype=torch.float64)}, "torch.float64"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "int64 [1347]"),
        ({"labels": torch.full((1347,), 10)}, "labels must be 0 to 9"),
        ({"test_images": torch.zeros(0, 1, 8, 8), "test_labels": torch.zeros(0, dtype=torch.int64)}, "one to test"),
    ],
)
def test_bad_arguments(data, change, words):
    tensors = {name: value for name, value in change.items() if name in data._fields}
    options = {name: value for name, value in change.items() if name not in tensors}
    with pytest.raises(ValueError) as error:
        digits.train(digits.digits_network(), data._replace(**tensors), **options)
    assert words in str(error.value)


def test_a_loss_that_is_not_finite(data):
    model = digits.digits_network()
    torch.nn.init.constant_(model.classifier[1].bias, float("nan"))
    with pytest.raises(ValueError, match="the loss is nan in step 1"):
        digits.train(model, data, steps=1)


# ---- in a process of its own


def test_measure():
    steps = []
    options = digits.Options(steps=2, seed=1)
    run = digits.measure(options, steps.append)
    model, data = digits.digits_network(seed=1), digits.digits()
    assert run.training.losses == digits.train(model, data, steps=2, seed=1).losses == [step.loss for step in steps]
    assert run.predictions == digits.predict(model, data.test_images).argmax(1).tolist()
    assert run.unfused == {} and run.why_not_fused == "" and run.eval_error < 1e-4
    assert run.memory_mb is None or 1 < run.memory_mb < 1000


def test_a_network_that_does_not_train_fused(monkeypatch):
    """Its parts are named: a run says whether it is one of ours."""

    def hooked(seed=0, build=digits.digits_network):
        model = build(seed)
        model.features[2].conv[3].register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(digits, "digits_network", hooked)
    run = digits._run(digits.Options(steps=1), lambda step: None)
    assert list(run.unfused) == ["features.2"] and "hooks" in run.unfused["features.2"]


def test_a_process_that_fails():
    with pytest.raises(digits.TrainingFailed, match="ValueError: epochs"):
        digits.measure(dataclasses.replace(digits.Options(), epochs=0))
