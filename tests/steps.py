"""Steps of training to test with: blocks and networks, what a step gives, what ran fused, how far off a result is.

The truth is the composition of the modules (`fused = False`) in float64; what precision is to be expected is what the
composition gets in float32.
"""

from __future__ import annotations

import copy
import itertools
import zlib
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from blocks import Block
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnv2_fused import InvertedResidual, MobileNetV2

EXACT = 1e-9  # what two float64 computations of one thing may differ by, relative to its norm
EPS = torch.finfo(torch.float32).eps
Results = dict[str, Tensor]

SMALL = (
    Block(3, 7, 3, 4, 5, batch=2, residual=True),
    Block(3, 7, 4, 5, 4, batch=2, stride=2),
    Block(4, 4, 4, 4, 4, batch=2, expand=False, residual=True),
    Block(4, 4, 3, 5, 7, expand=False, dilation=2, padding=2),
)
USUAL = Block(12, 44, 12, 9, 8, batch=2, residual=True)  # for what depends on no shape


def module(case: Block) -> InvertedResidual:
    """The block as a module in float64, in training; both sides of both ReLU6 are reached, some scales are negative."""
    _, expand, _, depthwise, _, project, _ = case.tensors(torch.float64)
    # A ratio of exactly 1 means no expansion.
    ratio = case.hidden_channels / case.in_channels * (1 + 1e-9) if case.expand else 1
    block = InvertedResidual(case.in_channels, case.out_channels, case.stride, ratio).double()
    block.use_res_connect = case.residual
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    convs[-2].dilation = (case.dilation,) * 2
    convs[-2].padding = case.padding if isinstance(case.padding, tuple) else (case.padding,) * 2
    random = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    with torch.no_grad():
        for conv, weight in zip(convs, [w for w in (expand, depthwise, project) if w is not None], strict=True):
            conv.weight.copy_(weight)
        for bn in norms(block):
            bn.weight.uniform_(0.5, 2.5, generator=random).mul_(bn.weight.sub(0.75).sign())
            bn.bias.normal_(1, 1, generator=random)
    return block.train()


def norms(root: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in root.modules() if isinstance(m, nn.BatchNorm2d)]


TINY = ((1, 16, 1, 1), (6, 24, 2, 2), (3, 24, 1, 1))


def tiny(seed: int = 0, **options: Any) -> MobileNetV2:
    torch.manual_seed(seed)
    return MobileNetV2(num_classes=5, width_mult=0.5, inverted_residual_setting=TINY, dropout=0.0, **options).train()


# ---------------------------------------------------------------------------------------------------- what ran fused


class Ran(TorchDispatchMode):
    """Counts the calls of our ops in this thread, by name; not those that they make of one another.

    Results alone do not tell: where nothing runs fused, they are the composition's, and right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if op.namespace == "mnv2_fused":
            self.ops[op._opname] += 1
        return op(*args, **(kwargs or {}))

    def check(self, root: nn.Module, times: int = 1) -> None:
        """In so many forwards, in training or with gradients, all that can has run fused: nothing, if not `fused`."""
        check_ops(self.ops, root, times)


def check_ops(ops: Counter[str], root: nn.Module, times: int = 1) -> None:
    """One op for each block, one for a network's stem and one for its head."""
    blocks = sum(isinstance(m, InvertedResidual) and m.fused for m in root.modules())
    networks = sum(isinstance(m, MobileNetV2) and m.fused for m in root.modules())
    right = {"block_train": times * blocks, "conv_bn_relu6": times * 2 * networks}
    found = {name: ops[name] for name in right}
    assert found == right, f"{found}, expected {right}"


def forward(root: nn.Module, x: Tensor) -> Tensor:
    """A call in training, or with gradients, in which all that can has run fused."""
    with Ran() as ran:
        y = root(x)
    ran.check(root)
    return y


# ---------------------------------------------------------------------------------------------------- what a step gives


def step(root: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64, *, fused: bool, seed: int = 1) -> Results:
    """Output, all gradients and all buffers after one forward and backward of a copy."""
    root = copy.deepcopy(root).to(dtype)
    root.fused = fused
    return step_of(root, x.detach().to(dtype).requires_grad_(), seed)


def step_of(root: nn.Module, x: Tensor, seed: int = 1) -> Results:
    """As `step`, of the module itself, for x as it is."""
    return results_of(root, x, seed, forward)


def results_of(
    root: nn.Module, x: Tensor, seed: int = 1, call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
) -> Results:
    """As `step_of`, whatever runs fused. The loss weighs each output by another number."""
    y = call(root, x)
    random = torch.Generator().manual_seed(seed)
    y.backward(torch.randn(y.shape, generator=random, dtype=torch.float64).to(y.dtype))
    gradients = {name: p.grad for name, p in [("x", x), *root.named_parameters()] if p.grad is not None}
    buffers = {name: t.clone() for name, t in root.named_buffers()}
    return {"y": y.detach(), **gradients, **buffers}


def clear_kinks(root: nn.Module, x: Tensor, margin: float = 256 * EPS) -> None:
    """Moves the BatchNorms' shifts until no element stands within rounding of a kink of ReLU6.

    An element that rounds to the other side of 0 or 6 changes the gradients by all that passes through it, which is
    no rounding error. The margin is relative to the kink and the channel's largest element. Shifts move by up to 20
    margins at a time; of a channel of a thousand values one move in two is enough.
    """
    random = torch.Generator().manual_seed(0)

    def move(bn: nn.BatchNorm2d, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        flat = y.transpose(0, 1).flatten(1)
        reach = margin * (6 + (flat - bn.bias[:, None]).abs().amax(1, keepdim=True))
        for _ in range(1000):
            near = torch.minimum(flat.abs(), (flat - 6).abs()) < reach
            moved = near.any(1) * (reach[:, 0] * 20 * torch.rand(len(flat), generator=random, dtype=flat.dtype))
            if not moved.any():
                return flat.view(y.transpose(0, 1).shape).transpose(0, 1)
            bn.bias += moved
            flat = flat + moved[:, None]
        raise AssertionError("no shift without an element near a kink")

    state = copy.deepcopy(dict(root.named_buffers()))
    chains = [list(m) for m in root.modules() if type(m) is nn.Sequential]
    before = [one for chain in chains for one, next in itertools.pairwise(chain) if isinstance(next, nn.ReLU6)]
    handles = [bn.register_forward_hook(move) for bn in before]  # hooks: the modules run one by one
    with torch.no_grad():
        root(x)
        for name, buffer in root.named_buffers():
            buffer.copy_(state[name])
    for handle in handles:
        handle.remove()


def still(root: nn.Module, x: Tensor) -> nn.Module:
    """A copy that takes the statistics of batch x, wherever it takes a batch's, as constants."""

    def fix(bn: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        if bn.training or bn.running_mean is None:
            values = inputs[0].transpose(0, 1).flatten(1)
            bn.running_mean, bn.running_var = values.mean(1), values.var(1, unbiased=False)
            bn.eval()

    root = copy.deepcopy(root)
    root.fused = False
    handles = [bn.register_forward_pre_hook(fix) for bn in norms(root)]
    with torch.no_grad():
        root(x)
    for handle in handles:
        handle.remove()
    return root


def scales(root: nn.Module, x: Tensor, truth: Results) -> dict[str, float]:
    """By name, what an error is measured by: the norm of the truth, or of the terms that cancel to it.

    A BatchNorm takes out of a gradient g its mean and its part along the values: what is left may be nothing (a bias
    before a BatchNorm, two values per channel), and its rounding error is still that of g. So g counts as well: the
    gradient with the statistics held constant. Sums over few channels may happen to be small: three losses are taken.
    What three BatchNorms of two values each leave of a gradient, 1e-17 of it, has no scale of its own: a millionth of
    the block's largest gradient is the least.
    """
    root = still(root, x)
    terms = [step(root, x, fused=False, seed=seed) for seed in (1, 2, 3)]
    result = {
        name: max(float(t[name].norm()) for t in (truth, *terms)) for name in truth if truth[name].is_floating_point()
    }
    least = 1e-6 * max((result[name] for name, _ in root.named_parameters() if name in result), default=0.0)
    result = {name: max(scale, least) for name, scale in result.items()}
    for name in result:
        if name.endswith("running_mean"):  # a mean of values of both signs: their size counts
            result[name] += float(truth[name.replace("mean", "var")].sqrt().norm())
    return result


def errors(found: Results, truth: Results, scale: dict[str, float]) -> dict[str, float]:
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    for name, t in truth.items():
        assert found[name].shape == t.shape, name
        if not t.is_floating_point():
            assert torch.equal(found[name], t), name
    return {name: float((found[name].double() - truth[name]).norm()) / max(s, 1e-300) for name, s in scale.items()}


def check(found: dict[str, float], allowed: dict[str, float] | float, what: object = "") -> None:
    """All errors are within what is allowed; names the tensor that is farthest out."""
    limits = allowed if isinstance(allowed, dict) else dict.fromkeys(found, allowed)
    excess = {name: e / limits[name] if e == e else float("inf") for name, e in found.items()}
    name = max(excess, key=excess.get)
    assert excess[name] <= 1, f"{name} is off by {found[name]:.3g}, allowed {limits[name]:.3g}: {what}"


def check_exact(root: nn.Module, x: Tensor, what: object = "") -> None:
    """In float64 a fused step and the composition's agree."""
    truth = step(root, x, fused=False)
    check(errors(step(root, x, fused=True), truth, scales(root, x, truth)), EXACT, what)


def condition(block: InvertedResidual, x: Tensor) -> float:
    """How much larger than a channel's standard deviation the terms are that sum up to its values, at most.

    By this factor the BatchNorms enlarge what rounds in the convolutions; it is large where a channel has few values.
    """
    found: list[float] = []

    def look(conv: nn.Conv2d, inputs: tuple[Tensor], v: Tensor) -> None:
        terms = conv._conv_forward(inputs[0].abs(), conv.weight.abs(), None)
        std = (v.var((0, 2, 3), unbiased=False) + 1e-5).sqrt()
        found.append(float((terms.amax((0, 2, 3)) / std).max()))

    block = copy.deepcopy(block)
    block.fused = False
    for conv in [m for m in block.modules() if isinstance(m, nn.Conv2d)]:
        conv.register_forward_hook(look)
    with torch.no_grad():
        block(x)
    return max(found)


class Prepared(NamedTuple):
    block: InvertedResidual
    x: Tensor
    truth: Results
    scale: dict[str, float]
    eager: dict[str, float]  # the composition's errors in float32
    condition: float


@lru_cache(100)
def prepare(case: Block) -> Prepared:
    """What all kernel rows are compared with."""
    block, x = module(case), case.tensors()[0].double()
    clear_kinks(block, x)
    truth = step(block, x, fused=False)
    scale = scales(block, x, truth)
    eager = errors(step(block, x, torch.float32, fused=False), truth, scale)
    return Prepared(block, x, truth, scale, eager, condition(block, x))


def prepared(case: Block = USUAL) -> tuple[InvertedResidual, Tensor]:
    block, x = module(case), case.tensors()[0].double()
    clear_kinks(block, x)
    return block, x


def check_equal(found: Results, right: Results) -> None:
    assert found.keys() == right.keys()
    for name in found:
        assert torch.equal(found[name], right[name]), name


# ------------------------------------------------------------------------------------------------ norms of all kinds


def renorm(**options: Any) -> Callable[[nn.Module], None]:
    """Replaces the BatchNorms by others with the same parameters and these options."""

    def change(root: nn.Module) -> None:
        for parent in root.modules():
            for name, old in list(parent._modules.items()):
                if isinstance(old, nn.BatchNorm2d):
                    new = nn.BatchNorm2d(old.num_features, **options).double()
                    new.load_state_dict(
                        {**new.state_dict(), **{k: v for k, v in old.state_dict().items() if k in new.state_dict()}}
                    )
                    parent._modules[name] = new

    return change


def untracked(root: nn.Module) -> None:
    for bn in norms(root):
        bn.track_running_stats = False


def uncounted(root: nn.Module) -> None:
    for bn in norms(root):
        bn.num_batches_tracked = None


def biased(root: nn.Module) -> None:
    for conv in root.modules():
        if isinstance(conv, nn.Conv2d):
            random = torch.Generator().manual_seed(conv.out_channels)
            conv.bias = nn.Parameter(torch.randn(conv.out_channels, generator=random).double())


NORMS: dict[str, Callable[[nn.Module], None]] = {
    "as built": lambda root: None,
    "momentum None": renorm(momentum=None),
    "momentum 0.3": renorm(momentum=0.3),
    "momentum 0": renorm(momentum=0.0),
    "momentum 1": renorm(momentum=1.0),
    "no running statistics": renorm(track_running_stats=False),
    "not affine": renorm(affine=False),
    "eps 0.1": renorm(eps=0.1),
    "momentum None, not affine, eps 1": renorm(momentum=None, affine=False, eps=1.0),
    "track_running_stats switched off": untracked,
    "no num_batches_tracked": uncounted,
    "convolutions with biases": biased,
}
