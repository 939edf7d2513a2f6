"""Training where PyTorch does more than call and differentiate: compiled, exported, transformed, checkpointed, copied.

Everywhere the results are those of the composition (`fused = False`), and it is seen that ours ran, or did not.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from blocks import Block
from steps import (
    EPS,
    EXACT,
    NORMS,
    SMALL,
    USUAL,
    Ran,
    Results,
    check,
    check_equal,
    check_ops,
    condition,
    errors,
    forward,
    module,
    norms,
    prepared,
    results_of,
    scales,
    step,
    step_of,
    tiny,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import mnv2_fused
from mnv2_fused import InvertedResidual, MobileNetV2, ops, peers, tasks

# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Graphs(NamedTuple):
    """What torch.compile made, as it is to be run."""

    forward: list[GraphModule]
    backward: list[GraphModule]

    @property
    def aot_eager(self) -> Callable[..., Any]:
        """A backend that keeps the graphs."""

        def keep(graphs: list[GraphModule]) -> Callable[..., Any]:
            return lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep(self.forward), bw_compiler=keep(self.backward))

    def inductor(self, graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """As `aot_eager`."""
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(graph: GraphModule, *arguments: Any, **options: Any) -> Any:
            (self.backward if options.get("is_backward") else self.forward).append(copy.deepcopy(graph))
            return compile_fx_inner(graph, *arguments, **options)

        return compile_fx(graph, inputs, inner_compile=inner)

    def check(self, root: nn.Module) -> None:
        """One graph each way, without a break, in which all that can runs fused."""
        assert (len(self.forward), len(self.backward)) == (1, 1)
        for (graph,), suffix in zip(self, ("", "_backward"), strict=True):
            calls = (node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
            check_ops(Counter(op._opname.removesuffix(suffix) for op in calls if op._opname.endswith(suffix)), root)


def check_compiled(root: nn.Module, x: Tensor, backend: str = "aot_eager", allowed: float = EXACT) -> None:
    truth, graphs = step(root, x, fused=False), Graphs([], [])
    scale = scales(root, x, truth)
    root.compile(backend=getattr(graphs, backend), fullgraph=True)
    check(errors(results_of(root, x.clone().requires_grad_()), truth, scale), allowed)
    graphs.check(root)


@pytest.mark.parametrize("evaluated", [None, 1], ids=["", "a norm frozen"])
@pytest.mark.parametrize("case", [USUAL, SMALL[1], SMALL[3]], ids=lambda case: case.id)
def test_compile_block(case: Block, evaluated: int | None) -> None:
    block, x = prepared(case)
    if evaluated is not None:
        norms(block)[evaluated].eval()
    check_compiled(block, x)


def test_compile_for_any_size() -> None:
    """One graph serves two sizes, and two numbers of images."""
    block, graphs = module(USUAL), Graphs([], [])
    compiled = copy.deepcopy(block)
    compiled.compile(backend=graphs.aot_eager, fullgraph=True, dynamic=True)
    for size in ((2, 9, 8), (3, 14, 11)):
        x = torch.randn(size[0], USUAL.in_channels, *size[1:], generator=torch.Generator().manual_seed(0)).double()
        truth = step(block, x, fused=False)
        compiled.load_state_dict(block.state_dict())
        compiled.zero_grad()
        check(errors(results_of(compiled, x.clone().requires_grad_()), truth, scales(block, x, truth)), EXACT, size)
    graphs.check(block)


def test_compile_to_code() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"there is no C++ compiler: {error}")
    with torch._functorch.config.patch(enable_autograd_cache=False):  # from there graphs come without being compiled
        check_compiled(*prepared(SMALL[0]), "inductor")


def test_compile_network() -> None:
    check_compiled(tiny().double(), torch.randn(4, 3, 33, 30).double())


@pytest.mark.exhaustive
def test_compile_whole_network() -> None:
    model = MobileNetV2(width_mult=0.35, dropout=0.0).double().train()
    check_compiled(model, torch.randn(4, 3, 64, 64).double(), allowed=1e-6)


def test_compile_an_average_over_all_batches() -> None:
    """momentum=None: the statistics' weight changes from step to step, and is no constant of the graph."""
    model, graphs = tiny().double(), Graphs([], [])
    NORMS["momentum None"](model)
    composition = copy.deepcopy(model)
    composition.fused = False
    model.compile(backend=graphs.aot_eager, fullgraph=True)
    for i in range(3):
        x = torch.randn(2, 3, 20, 17, generator=torch.Generator().manual_seed(i)).double() + i
        scale = scales(composition, x, step(composition, x, fused=False))
        truth = results_of(composition, x.clone().requires_grad_())
        check(errors(results_of(model, x.clone().requires_grad_()), truth, scale), EXACT, i)
        model.zero_grad(), composition.zero_grad()
    graphs.check(model)


def autocast_step(root: nn.Module, x: Tensor) -> Results:
    """Forward under autocast, backward outside, as PyTorch recommends it."""

    def call(root: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return root(x)

    return results_of(root, x.clone().requires_grad_(), call=call)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("network", [False, True], ids=["block", "network"])
def test_autocast(network: bool, compiled: bool) -> None:
    """The composition's dtypes; compiled or not, one thing: test_bfloat16_training.py compares it with float64."""
    case = SMALL[1]  # without a residual, which is float32
    root, x = (tiny(), torch.randn(4, 3, 33, 30)) if network else (module(case).float(), case.tensors()[0])
    composition, fused = copy.deepcopy(root), copy.deepcopy(root)
    composition.fused = False
    with Ran() as ran:
        right = autocast_step(fused, x)
    ran.check(fused)
    dtypes = {name: t.dtype for name, t in autocast_step(composition, x).items()}
    assert right["y"].dtype == torch.bfloat16 and {name: t.dtype for name, t in right.items()} == dtypes
    if not compiled:
        return
    graphs = Graphs([], [])
    root.compile(backend=graphs.aot_eager, fullgraph=True)
    found = autocast_step(root, x)
    graphs.check(root)
    assert {name: t.dtype for name, t in found.items()} == dtypes
    for name, t in right.items():  # the same roundings of the same numbers
        assert torch.allclose(found[name].double(), t.double(), rtol=1e-2, atol=1e-2 * float(t.abs().max())), name


# ------------------------------------------------------------------------------------------------------------ exported


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_export(evaluated: bool, strict: bool) -> None:
    """With gradients asked for: in training mode none of our ops is in it, in eval mode there is nothing else."""
    model, x = tiny().train(not evaluated), torch.randn(2, 3, 33, 30)
    plain = copy.deepcopy(model)
    plain.fused = False
    assert torch.is_grad_enabled() and model.classifier[1].weight.requires_grad
    program = torch.export.export(model, (x,), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    if evaluated:
        assert names == ["mnv2_fused.chain.default"]
    else:
        assert any("conv2d" in name for name in names) and not any("mnv2_fused" in name for name in names)
    y = program.module()(x)
    assert torch.allclose(y, plain(x), atol=1e-5)
    if evaluated:
        with pytest.raises(RuntimeError, match="mnv2_fused::chain, as which .* has no gradients"):
            program.module()(x.requires_grad_()).sum().backward()


# -------------------------------------------------------------------------------------------------------- torch.func's

Function = Callable[[Tensor], Tensor]
TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, other: torch.func.jvp(f, (x,), (other,))[1],
    "grad": lambda f, x, other: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x, other: torch.func.vjp(f, x)[1](f(other))[0],
    "jacrev": lambda f, x, other: torch.func.jacrev(lambda x: f(x)[:, :2, :2, :2])(x),
    "vmap": lambda f, x, other: torch.vmap(f)(torch.stack([x, other])),
    "vmap(grad)": lambda f, x, other: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(
        torch.stack([x, other])
    ),
    "grad(grad)": lambda f, x, other: torch.func.grad(
        lambda x: (torch.func.grad(lambda x: f(x).square().sum())(x) * other).sum()
    )(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], replace(SMALL[3], project_relu6=True)], ids=lambda case: case.id)
def test_transforms_of_the_op(case: Block, transform: Callable[..., Tensor]) -> None:
    """With respect to x, to each weight and to each bias, as of the reference."""
    tensors = case.tensors(torch.float64)
    for i, t in enumerate(tensors):
        if t is None:
            continue
        results = []
        for function in (ops.inverted_residual, ops.inverted_residual_reference):

            def of_one(value: Tensor, function: Callable[..., Tensor] = function, i: int = i) -> Tensor:
                return function(*tensors[:i], value, *tensors[i + 1 :], **case.options)

            other = torch.randn(t.shape, generator=torch.Generator().manual_seed(0), dtype=t.dtype)
            results.append(transform(of_one, t, other))
        assert relative_error(*results) < 1e-12, i


def test_the_op_has_no_second_derivative_in_autograd() -> None:
    """It says so, where torch.func's have one."""
    x, *weights = (t.requires_grad_() for t in SMALL[0].tensors(torch.float64))
    (grad,) = torch.autograd.grad(
        ops.inverted_residual(x, *weights, **SMALL[0].options).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        grad.square().sum().backward()


def block_to_transform(evaluated: bool) -> tuple[InvertedResidual, Tensor, Tensor]:
    """In training without running statistics, which torch.func does not move; and two inputs."""
    block, x = prepared()
    if not evaluated:
        NORMS["no running statistics"](block)
    return block.train(not evaluated), x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()


def relative_error(found: Tensor, right: Tensor) -> float:
    found, right = found.detach(), right.detach()
    assert float(right.norm()) > 0
    return float((found - right).norm() / right.norm())


COMPILED_TRANSFORMS = [  # of the others torch compiles not even the composition
    *itertools.product(("jvp", "grad", "vmap", "vmap(grad)"), [None]),
    *itertools.product(("grad", "vmap"), ("eager", "aot_eager")),
    ("vmap(grad)", "eager"),
]


@pytest.mark.parametrize(("transform", "backend"), COMPILED_TRANSFORMS, ids=str)
@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_transforms_of_a_block(evaluated: bool, transform: str, backend: str | None) -> None:
    """As of the composition without torch.compile."""
    block, x, other = block_to_transform(evaluated)
    composition = copy.deepcopy(block)
    composition.fused = False

    def of_block(x: Tensor, other: Tensor) -> Tensor:
        return TRANSFORMS[transform](block, x, other)

    right = TRANSFORMS[transform](composition, x, other)
    found = (of_block if backend is None else torch.compile(of_block, backend=backend))(x, other)
    assert relative_error(found, right) < EXACT


def compiled_jvps(rank: int, folder: str) -> None:
    """What each way to compile a block's jvp gives, fused or not: its error, or that there is an exception."""
    gc.disable()  # what is left of an exception would end torch's contexts in the middle of what is compiled next
    results = {}
    for evaluated, backend in itertools.product((False, True), ("eager", "aot_eager")):
        block, x, other = block_to_transform(evaluated)
        block.fused = False
        right, outcomes = TRANSFORMS["jvp"](block, x, other), []
        for block.fused in (False, True):

            def of_block(x: Tensor, other: Tensor, block: InvertedResidual = block) -> Tensor:
                return TRANSFORMS["jvp"](block, x, other)

            try:
                outcomes.append(relative_error(torch.compile(of_block, backend=backend)(x, other), right))
            except RuntimeError:
                outcomes.append(None)
        results[f"{'eval' if evaluated else 'train'}, {backend}"] = outcomes
    torch.save(results, f"{folder}/results.pt")


def test_a_compiled_jvp_is_not_0(tmp_path: Path) -> None:
    """Right where torch compiles that of the composition; where it does not, which is batch_norm's doing, an error.

    In a process of its own: a compilation that fails so leaves torch's modes as they should not be.
    """
    torch.multiprocessing.spawn(compiled_jvps, (str(tmp_path),))
    for name, (plain, fused) in torch.load(tmp_path / "results.pt").items():
        assert (plain is None and fused is None) or fused < EXACT, name


# --------------------------------------------------------------------------------------------- again, and side by side


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    """The gradients of a run without; the statistics move twice, as they do without us.

    But for the last of them: without reentrance a recomputation ends with the last tensor that backward needs, which is
    before a fused head counts its batch again.
    """
    model, x = tiny().double(), torch.randn(4, 3, 33, 30).double().requires_grad_()
    right = step(model, x, fused=True)
    results = []
    for fused in (True, False):
        one = copy.deepcopy(model)
        one.fused = fused
        run = one.forward_features

        def twice(x: Tensor, one: MobileNetV2 = one, run: Callable[[Tensor], Tensor] = run) -> Tensor:
            return one.forward_head(checkpoint(run, x, use_reentrant=use_reentrant))

        one.forward = twice
        results.append(step_of(one, x.detach().clone().requires_grad_()))
    for name in ("x", *dict(model.named_parameters())):
        assert torch.equal(results[0][name], right[name]), name
    if not use_reentrant:
        last = f"features.{len(model.features) - 1}.1."
        statistics = [name for name, _ in model.named_buffers() if name.startswith(last)]
        results = [{name: t for name, t in r.items() if name not in statistics} for r in results]
    check(errors(*results, scales(model, x.detach(), results[1])), EXACT)


@pytest.mark.parametrize("threads", [2, 7, 16])
def test_same_bits_twice(threads: int) -> None:
    torch.set_num_threads(threads)
    model, x = tiny(), torch.randn(threads + 2, 3, 65, 60)
    first = step(model, x, torch.float32, fused=True)
    for _ in range(3):
        check_equal(step(model, x, torch.float32, fused=True), first)


def test_threads_agree(float32_kernel: mnv2_fused.ops.Kernel) -> None:
    for case in (replace(USUAL, batch=3), replace(USUAL, batch=17), SMALL[3]):
        block, x = prepared(case)
        torch.set_num_threads(1)
        one = step(block, x, torch.float32, fused=True)
        scale = scales(block, x, step(block, x, fused=False))
        for n in (2, 7, 16):
            torch.set_num_threads(n)
            found = errors(step(block, x, torch.float32, fused=True), one, scale)
            check(found, 4 * EPS * condition(block, x), (n, case))


def train(model: MobileNetV2, steps: int, seed: int = 0) -> Results:
    """Some steps of SGD; the gradients of the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 33, 30, generator=random, dtype=torch.float64)
        found = step_of(model, x.to(model.classifier[1].weight.dtype))
        optimizer.step()
    return found | {name: p.detach().clone() for name, p in model.state_dict().items()}


def test_two_models_in_two_threads() -> None:
    def work(seed: int) -> Results:
        torch.set_num_threads(1)
        return train(tiny_models[seed], 6, seed)

    tiny_models = [tiny(0), tiny(1)]
    right = [train(copy.deepcopy(model), 6, seed) for seed, model in enumerate(tiny_models)]
    barrier = threading.Barrier(2)

    def together(seed: int) -> Results:
        barrier.wait()
        return work(seed)

    with ThreadPoolExecutor(2) as pool:
        for found, expected in zip(pool.map(together, range(2)), right, strict=True):
            check_equal(found, expected)


def reloaded(model: MobileNetV2) -> MobileNetV2:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = tiny(seed=7)
    other.load_state_dict(torch.load(file), strict=True)
    return other


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "state dict": reloaded}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_after_training(duplicate: Callable[[MobileNetV2], MobileNetV2]) -> None:
    model = tiny()
    train(model, 2)
    other = duplicate(model)
    x = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).eval()(x), copy.deepcopy(other).eval()(x))
    check_equal(train(other, 2), train(model, 2))


def test_train_eval_train() -> None:
    """Each mode sees what the other one did: the packed weights of eval mode follow the training."""
    model = tiny().double()
    composition = copy.deepcopy(model)
    composition.fused = False
    x = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).double()
    for i in range(3):
        train(model.train(), 2, seed=i), train(composition.train(), 2, seed=i)
        results = []
        for one in (model.eval(), composition.eval()):
            with torch.no_grad(), Ran() as ran:
                results.append(one(x))
            assert ran.ops["network"] == one.fused
            results.append(forward(one, x).detach())
            one.zero_grad()
            forward(one, x).square().sum().backward()
            results.append(one.features[2].conv[0][0].weight.grad.clone())
        assert model.why_not_fused(x) != "" and results[0].isfinite().all()
        for found, right in zip(results[:3], results[3:], strict=True):
            assert float((found - right).norm() / right.norm()) < 1e-7, i


def test_second_gradients_are_an_error() -> None:
    """One that says what cannot be done."""
    block, x = prepared()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(forward(block, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|twice differentiable"):
        grad.square().sum().backward()


def test_two_backwards() -> None:
    """With retain_graph the gradients add up; without, PyTorch's error."""
    block, x = prepared()
    right = step(block, x, fused=True)
    y = forward(block, x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        y.backward(weights, retain_graph=True)
    assert torch.allclose(block.conv[2].weight.grad, 2 * right["conv.2.weight"], rtol=1e-12)
    y.backward(weights)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(weights)


def test_a_weight_changed_before_backward_is_an_error() -> None:
    block, x = prepared()
    y = forward(block, x)
    with torch.no_grad():
        block.conv[0][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_two_forwards_before_backward() -> None:
    """As for a discriminator: the statistics move between forward and backward, the first's gradients stay right."""
    gradients = []
    for fused in (True, False):
        block, x = prepared()
        block.fused = fused
        (forward(block, x).square().sum() + forward(block, 2 * x + 1).sum().square()).backward()
        gradients.append(block.conv[1][0].weight.grad)
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < EXACT


@pytest.mark.parametrize("network", [False, True], ids=["block", "network"])
def test_frozen_statistics_that_move_before_backward(network: bool) -> None:
    """In eval mode, then in training, then backward through both: each has the statistics of its own time.

    The composition is no measure: in its backward it takes what the running statistics are by then.
    """
    root, x = (tiny().double(), torch.randn(4, 3, 33, 30).double()) if network else prepared()
    for bn in norms(root):
        bn.momentum = 0.5
    results = [step(copy.deepcopy(root).eval(), x, fused=False), step(copy.deepcopy(root).train(), x + 1, fused=False)]
    y = forward(root.eval(), x), forward(root.train(), x + 1)
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(y[0].shape, generator=random, dtype=torch.float64)
    sum((one * weights).sum() for one in y).backward()
    for name, p in root.named_parameters():
        right = sum(one[name] for one in results)
        allowed = EXACT * max(float(one[name].norm()) for one in results) + 1e-12
        assert float((p.grad - right).norm()) <= allowed, name


@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
def test_no_images(evaluated: bool) -> None:
    """As the composition does it: result and gradients, or the same error."""
    outcomes = []
    for fused in (True, False):
        torch.manual_seed(0)
        block = InvertedResidual(8, 8, 1, 6).train(not evaluated)
        block.fused = fused
        try:
            outcomes.append(results_of(block, torch.zeros(0, 8, 6, 5, requires_grad=True)))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[1], tuple):
        assert outcomes[0] == outcomes[1]
    else:
        assert isinstance(outcomes[0], dict), outcomes[0]
        assert outcomes[0].keys() == outcomes[1].keys()
        for name, right in outcomes[1].items():
            assert torch.allclose(outcomes[0][name], right, equal_nan=True), name


# ------------------------------------------------------------------------------------------------ whether it is told


def backward_hook(model: MobileNetV2) -> None:
    model.features[2].conv[3].register_full_backward_hook(lambda *_: None)


def forward_hook(model: MobileNetV2) -> None:
    model.features[2].conv[3].register_forward_hook(lambda *_: None)


def stem_hook(model: MobileNetV2) -> None:
    model.features[0][1].register_forward_hook(lambda *_: None)


def head_of_its_own(model: MobileNetV2) -> None:
    model.features[-1][2] = nn.SiLU()


def nothing(model: MobileNetV2) -> None:
    pass


@pytest.mark.parametrize("of_x", [False, True], ids=["", "of x"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "parameters frozen"])
@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize(
    "change", [nothing, forward_hook, backward_hook, stem_hook, head_of_its_own], ids=lambda change: change.__name__
)
def test_unfused(change: Callable[[MobileNetV2], None], evaluated: bool, frozen: bool, of_x: bool) -> None:
    """As many parts as it names run layer by layer, whatever gradients are asked for."""
    model, x = tiny().train(not evaluated), torch.randn(2, 3, 33, 30, requires_grad=of_x)
    model.requires_grad_(not frozen)
    change(model)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            unfused = model.unfused(x)
            with Ran() as ran:
                model(x)
        calls = ran.ops.total() - ran.ops["pack"]
        as_one = calls == 1 and not unfused
        assert as_one or calls == len(model.features) - len(unfused), (unfused, ran.ops)


@pytest.mark.parametrize("evaluated", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(2, 4, 33, 30), (3, 33, 30), (0, 3, 33, 30), (2, 3, 0, 30)], ids=str)
def test_unfused_with_what_is_no_image(size: tuple[int, ...], evaluated: bool) -> None:
    model = tiny().train(not evaluated)
    assert model.unfused(torch.zeros(2, 3, 33, 30)) == {}
    assert model.unfused(torch.zeros(size))


@pytest.mark.parametrize("runner", peers.TRAINERS[:2], ids=lambda runner: runner.name)
def test_the_bench_trains_fused(runner: peers.Runner) -> None:
    """The row of that name, not the others."""
    model, batch = tiny(), (torch.randn(4, 3, 33, 30), torch.arange(4))
    task = tasks.Training(runner, model, batch, 1, spare=False)
    with Ran() as ran:
        task()
    ran.check(model)
    assert model.fused == (runner.name == "fused") == (ran.ops.total() > 0)


def test_the_bench_refuses_a_network_that_would_not_train_fused() -> None:
    model = tiny()
    forward_hook(model)
    with pytest.raises(RuntimeError, match=r"not train fused.*features\.2"):
        tasks.Training(peers.TRAINERS[0], model, (torch.randn(4, 3, 33, 30), torch.arange(4)), 1, spare=False)
