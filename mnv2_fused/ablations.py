"""Figure 6 of the paper at a small scale: what the linear bottleneck and the place of the shortcut are worth.

Every variant is trained from the same seeds on handwritten digits, and on a harder set that is made of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from . import digits
from .mobilenet_v2 import MobileNetV2

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Arguments of MobileNetV2; the first is the paper's network.
VARIANTS: dict[str, dict[str, str]] = {
    "linear bottleneck, shortcut between bottlenecks": {},
    "ReLU6 in the bottleneck": dict(bottleneck_activation="relu6"),
    "shortcut between expansions": dict(shortcut="expansion"),
    "no shortcut": dict(shortcut="none"),
}
# t, c, n, s as in table 2 of the paper: with n = 3 there are six places for shortcuts.
SETTING = ((1, 16, 1, 1), (6, 16, 3, 2), (6, 24, 3, 2), (6, 32, 3, 1))
EPOCHS = 8
SEEDS = 3


class Accuracy(NamedTuple):
    """Test accuracies of one variant on one set, by seed, from 0 to 1."""

    data: str
    variant: str
    accuracies: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; 0 of one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def cluttered(data: digits.Digits, seed: int = 0) -> digits.Digits:
    """The same digits, harder to see: turned, of any size and place, light on dark or dark on light, among strokes.

    Three times as many to train on. Every image gets one affine map of its own, two faint pieces of other digits, a
    slope of light and noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    def moved(images: Tensor, scale: tuple[float, float], shift: float) -> Tensor:
        count = len(images)
        angle, size = uniform(-0.5, 0.5, count), uniform(*scale, count)
        cos, sin, (x, y) = angle.cos() / size, angle.sin() / size, uniform(-shift, shift, 2, count)
        maps = torch.stack([torch.stack([cos, -sin, x / size], 1), torch.stack([sin, cos, y / size], 1)], 1)
        grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
        return nn.functional.grid_sample(images, grid, align_corners=False)

    def harder(images: Tensor) -> Tensor:
        count, size = len(images), images.shape[-1]
        result = moved(images, (0.55, 0.95), 0.3)
        for _ in range(2):
            others = images[torch.randperm(count, generator=generator)]
            piece = moved(others, (0.3, 0.5), 1.0)
            result = torch.maximum(result, uniform(0.2, 0.5, count, 1, 1, 1) * piece)
        ramp = torch.linspace(-1, 1, size)
        slope = uniform(-0.3, 0.3, count, 1, 1, 1) * ramp + uniform(-0.3, 0.3, count, 1, 1, 1) * ramp[:, None]
        sign = torch.where(uniform(0, 1, count, 1, 1, 1) < 0.5, -1.0, 1.0)
        result = 0.5 + sign * uniform(0.6, 1.0, count, 1, 1, 1) * (result - 0.5) + slope
        return (result + 0.05 * torch.randn(result.shape, generator=generator)).clamp(0, 1)

    images, labels = data.images.repeat(3, 1, 1, 1), data.labels.repeat(3)
    return digits.Digits(harder(images), labels, harder(data.test_images), data.test_labels)


def network(seed: int, **variant: str) -> MobileNetV2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MobileNetV2(10, inverted_residual_setting=SETTING, in_channels=1, dropout=0.0, **variant)


def run(
    epochs: int = EPOCHS, seeds: int = SEEDS, progress: Callable[[int, int, str], None] = lambda done, total, what: None
) -> Iterator[Accuracy]:
    """Trains every variant on both sets, once per seed; gives the accuracies of each as soon as they are known.

    `progress` is told the steps done, of how many, and what is being trained. Raises ImportError without scikit-learn.
    """
    plain = digits.digits()
    sets = {"digits": plain, "cluttered digits": cluttered(plain)}
    runs = len(sets) * len(VARIANTS) * seeds
    done = 0
    for name, data in sets.items():
        for variant, options in VARIANTS.items():
            accuracies = []
            for seed in range(seeds):

                def show(step: digits.Step, label: str = f"{name}, {variant}", before: int = done) -> None:
                    progress(before * step.total + step.done, runs * step.total, label)

                model = network(seed, **options)
                accuracies.append(digits.train(model, data, epochs, seed=seed, progress=show).accuracy)
                done += 1
            yield Accuracy(name, variant, accuracies)


def draw(results: list[Accuracy]) -> Figure:
    """Mean accuracy with its standard deviation, and every run as a dot."""
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(result.data for result in results))
    figure = Figure(figsize=(10, 1.2 + 2.2 * len(sets)), layout="constrained")
    for ax, name in zip(figure.subplots(len(sets), 1, squeeze=False)[:, 0], sets, strict=True):
        shown = [result for result in results if result.data == name]
        places = range(len(shown))
        ax.barh(places, [100 * r.mean for r in shown], 0.6, xerr=[100 * r.spread for r in shown], alpha=0.7, capsize=4)
        for place, result in zip(places, shown, strict=True):
            ax.plot([100 * a for a in result.accuracies], [place] * len(result.accuracies), "k.")
        ax.set_yticks(places, [result.variant for result in shown])
        ax.invert_yaxis()
        lowest = min(min(result.accuracies) for result in shown)
        ax.set_xlim(max(0.0, 100 * lowest - 5), 100)
        ax.set_title(f"{name}: test accuracy in %")
        ax.spines[["top", "right"]].set_visible(False)
    return figure
