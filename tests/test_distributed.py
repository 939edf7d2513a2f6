"""SyncBatchNorm: fused blocks over several processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnv2_fused import InvertedResidual

EXACT = 1e-9  # what two float64 computations of one thing may differ by, relative to its norm
SHARES = slice(0, 2), slice(2, 5)  # the images of each process


def joint_problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Blocks with and without expansion and residual; images whose means differ from process to process."""
    torch.manual_seed(0)
    blocks = InvertedResidual(6, 6, 1, 6), InvertedResidual(6, 10, 2, 4), InvertedResidual(10, 10, 1, 1)
    x = torch.randn(5, 6, 9, 7, dtype=torch.float64) + 2 * torch.arange(5).view(5, 1, 1, 1)
    return nn.Sequential(*blocks).double().train(), x, torch.randn(5, 10, 5, 4, dtype=torch.float64)


def together(modules: list[nn.Module], xs: list[Tensor]) -> list[Tensor]:
    """Each process's module on its own images, by PyTorch alone, in one process: only the statistics are joint.

    It has every process's own gradients, in which terms stand that cancel in their sum.
    """
    kind = type(modules[0])
    if kind is InvertedResidual:
        ys = together([m.conv for m in modules], xs)
        return [x + y for x, y in zip(xs, ys, strict=True)] if modules[0].use_res_connect else ys
    if issubclass(kind, nn.Sequential):
        for children in zip(*modules, strict=True):
            xs = together(list(children), xs)
        return xs
    if kind is nn.BatchNorm2d:
        joint = F.batch_norm(torch.cat(xs), None, None, training=True, eps=modules[0].eps)
        parts = joint.split([len(x) for x in xs])
        return [
            part * m.weight.view(1, -1, 1, 1) + m.bias.view(1, -1, 1, 1) for m, part in zip(modules, parts, strict=True)
        ]
    return [m(x) for m, x in zip(modules, xs, strict=True)]


def one_of_two(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    blocks, x, weights = joint_problem()
    blocks = nn.SyncBatchNorm.convert_sync_batchnorm(blocks)
    mine = x[SHARES[rank]].clone().requires_grad_()
    y = blocks(mine)
    (y * weights[SHARES[rank]]).sum().backward()
    found = {"y": y.detach(), "x": mine.grad, **{name: p.grad for name, p in blocks.named_parameters()}}
    torch.save({**found, **dict(blocks.named_buffers())}, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two gloo processes computes, with 2 and with 3 images."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(one_of_two, (str(folder / "store"), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def check(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    largest = max(float(t.double().norm()) for t in right.values())
    for name, truth in right.items():
        allowed = EXACT * float(truth.double().norm()) + 1e-13 * largest
        assert float((found[name] - truth).double().norm()) <= allowed, name


def test_two_processes_are_one(found: list[dict[str, Tensor]]) -> None:
    """Their gradients add up to those of one process with all images; results and statistics are its own."""
    blocks, x, weights = joint_problem()
    for block in blocks:
        block.fused = False
    y = blocks(x.requires_grad_())
    (y * weights).sum().backward()
    check(
        {name: found[0][name] + found[1][name] for name, _ in blocks.named_parameters()},
        {name: p.grad for name, p in blocks.named_parameters()},
    )
    for share, one in zip(SHARES, found, strict=True):
        check(one, {"y": y.detach()[share], "x": x.grad[share], **dict(blocks.named_buffers())})


def test_gradients_of_each_process(found: list[dict[str, Tensor]]) -> None:
    """Before they are added up: what the other processes' images have to do with a process's own weights counts."""
    blocks, x, weights = joint_problem()
    each = [copy.deepcopy(blocks) for _ in SHARES]
    ys = together(each, [x[share] for share in SHARES])
    sum((y * weights[share]).sum() for y, share in zip(ys, SHARES, strict=True)).backward()
    for one, truth in zip(found, each, strict=True):
        check(one, {name: p.grad for name, p in truth.named_parameters()})
