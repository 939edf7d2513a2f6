"""SyncBatchNorm: fused blocks, and stem and head, over several processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from steps import EXACT, Ran, biased, norms, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from mnv2_fused import InvertedResidual, MobileNetV2, training


class Problem(NamedTuple):
    """What the processes compute together: in each its images, as many as `shares` says, go through the module."""

    module: nn.Module
    x: Tensor
    shares: tuple[int, int] = (2, 3)

    @property
    def weights(self) -> Tensor:
        """The loss weighs each output by another number."""
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            y = copy.deepcopy(self.module)(self.x)
        return torch.randn(y.shape, generator=random, dtype=torch.float64)


def blocks() -> Problem:
    """With and without expansion and residual; images whose means differ from process to process."""
    torch.manual_seed(0)
    blocks = InvertedResidual(6, 6, 1, 6), InvertedResidual(6, 10, 2, 4), InvertedResidual(10, 10, 1, 1)
    x = torch.randn(5, 6, 9, 7, dtype=torch.float64) + 2 * torch.arange(5).view(5, 1, 1, 1)
    return Problem(nn.Sequential(*blocks).double().train(), x)


def far_from_0() -> Problem:
    """Where x is taken its mean away before anything is computed of it."""
    module, x, _ = blocks()
    return Problem(module, x + 100)


def one_far_from_0() -> Problem:
    """There in one process only."""
    module, x, _ = blocks()
    return Problem(module, x + 100 * (torch.arange(5) > 1).view(5, 1, 1, 1))


def one_without_images() -> Problem:
    """It takes part in the others' sums."""
    return blocks()._replace(shares=(5, 0))


def network() -> Problem:
    """Stem and head; biases in all convolutions; a frozen norm in a block, one in the head; frozen parameters."""
    model = tiny().double()
    biased(model)
    for bn in (norms(model)[4], norms(model)[-1]):
        nn.init.uniform_(bn.running_mean), nn.init.uniform_(bn.running_var, 0.5, 2)
        bn.eval()
    for name in ("features.0.1.weight", "features.1.conv.0.0.weight", "features.2.conv.0.1.bias"):
        model.get_parameter(name).requires_grad_(False)
    x = torch.randn(5, 3, 21, 18, dtype=torch.float64) + torch.arange(5).view(5, 1, 1, 1) / 2
    return Problem(model, x)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    problem.__name__: problem for problem in (blocks, far_from_0, one_far_from_0, one_without_images, network)
}


def together(modules: list[nn.Module], xs: list[Tensor]) -> list[Tensor]:
    """Each process's module on its own images, by PyTorch alone, in one process: only the statistics are joint.

    It has every process's own gradients, in which terms stand that cancel in their sum.
    """
    kind = type(modules[0])
    if kind is InvertedResidual:
        ys = together([m.conv for m in modules], xs)
        return [x + y for x, y in zip(xs, ys, strict=True)] if modules[0].use_res_connect else ys
    if kind is MobileNetV2:
        ys = together([m.features for m in modules], xs)
        return [m.forward_head(y) for m, y in zip(modules, ys, strict=True)]
    if issubclass(kind, nn.Sequential):
        for children in zip(*modules, strict=True):
            xs = together(list(children), xs)
        return xs
    if kind is nn.BatchNorm2d and modules[0].training:
        joint = F.batch_norm(torch.cat(xs), None, None, training=True, eps=modules[0].eps)
        parts = joint.split([len(x) for x in xs])
        return [
            part * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1) for m, part in zip(modules, parts, strict=True)
        ]
    return [m(x) for m, x in zip(modules, xs, strict=True)]


class Centers(Ran):
    """Of each block: whether it took a mean off x."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[bool] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(op, types, args, kwargs)
        if op._opname == "block_train":
            self.taken.append(bool(result[2 + training._STATISTICS.index("x_center")].any()))
        return result


def gradients(root: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in root.named_parameters() if p.grad is not None}


def one_of_two(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for name, make in PROBLEMS.items():
        problem = make()
        weights = problem.weights.split(problem.shares)[rank]
        module = nn.SyncBatchNorm.convert_sync_batchnorm(problem.module)
        mine = problem.x.split(problem.shares)[rank].clone().requires_grad_()
        with Centers() as ran:
            y = module(mine)
        ran.check(module)
        (y * weights).sum().backward()
        tensors = {"y": y.detach(), "x": mine.grad, **gradients(module), **dict(module.named_buffers())}
        found[name] = {"tensors": tensors, "centers": ran.taken}
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two gloo processes computes, by problem."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(one_of_two, (str(folder / "store"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def check(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    largest = max(float(t.double().norm()) for t in right.values())
    for name, truth in right.items():
        allowed = EXACT * float(truth.double().norm()) + 1e-13 * largest
        error = float((found[name] - truth).double().norm())
        assert error <= allowed, f"{name} is off by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_processes_are_one(found: list[dict[str, Any]], name: str) -> None:
    """Their gradients add up to those of one process with all images; results and statistics are its own."""
    module, x, shares = problem = PROBLEMS[name]()
    weights = problem.weights
    for part in module.modules():
        if isinstance(part, (InvertedResidual, MobileNetV2)):
            part.fused = False
    y = module(x.requires_grad_())
    (y * weights).sum().backward()
    each = [one[name]["tensors"] for one in found]
    right = gradients(module)
    assert each[0].keys() == each[1].keys() == {"y", "x", *right, *dict(module.named_buffers())}
    check({name: each[0][name] + each[1][name] for name in right}, right)
    for one, own_y, own_x in zip(each, y.detach().split(shares), x.grad.split(shares), strict=True):
        check(one, {"y": own_y, "x": own_x, **dict(module.named_buffers())})


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_of_each_process(found: list[dict[str, Any]], name: str) -> None:
    """Before they are added up: what the other processes' images have to do with a process's own weights counts.

    But for a convolution's bias, which a BatchNorm of the batch takes away again: its shares add up to 0, and each
    process has 0.
    """
    module, x, shares = problem = PROBLEMS[name]()
    each = [copy.deepcopy(module) for _ in shares]
    ys = together(each, list(x.split(shares)))
    sum((y * w).sum() for y, w in zip(ys, problem.weights.split(shares), strict=True)).backward()
    rights = [gradients(one) for one in each]
    for part_name, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            key = f"{part_name}.bias"
            if float(sum(right[key] for right in rights).norm()) < 1e-12 * float(rights[0][key].norm()):
                for right in rights:
                    right[key].zero_()
    for one, right in zip(found, rights, strict=True):
        check(one[name]["tensors"], right)


def test_means_that_are_taken_off_x(found: list[dict[str, Any]]) -> None:
    """The problems far from 0 are what they are for: else they would show no more than the first."""
    first = {name: [one[name]["centers"][0] for one in found] for name in PROBLEMS}
    assert first["far_from_0"] == [True, True] and first["one_far_from_0"] == [False, True]
