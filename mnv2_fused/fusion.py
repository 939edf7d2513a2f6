"""`fuse`: networks that people have run on our ops, in place; `unfuse` takes it back.

A fused module stays the object that it was, of a subclass of its class that differs in `forward` alone: the layers that
it was recognised to compute (recognition.py) run as one op where they can, and the forward that it had runs elsewhere.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.utils import _pytree as pytree

from . import network, ops, recognition, training
from .network import FusedChain, Stage, expect

Model = TypeVar("Model", bound=nn.Module)


class _Fusion:
    """What a fused module has in addition: what it was recognised to be, and its packed weights.

    Copies and pickles come without either, and find them again at the first call.
    """

    def __init__(self, trains: bool, known: recognition.Chain | None = None, module: nn.Module | None = None) -> None:
        self._trains = trains  # not a network, whose parts are fused for that
        self._module = None if module is None else weakref.ref(module)  # a shallow copy shares this object
        self._chain = FusedChain((), self._describe, _steering)
        self._known = known

    def __reduce__(self) -> tuple[object, ...]:
        return _Fusion, (self._trains,)

    def _recognise(self, module: nn.Module) -> recognition.Chain:
        """Anew where the module is no longer what it was."""
        known = self._known
        if is_compiling():
            same = known is not None and (known.looks_like() if is_dynamo_compiling() else known.is_of(module))
            expect(same, "it was changed, and not called before it is compiled")
        elif known is None or not known.is_of(module):
            known = self._known = recognition.recognise(module)
        expect(not known.refusal, known.refusal)
        return known

    def _describe(self, module: nn.Module) -> list[Stage]:
        known = self._recognise(module)
        if known.not_in_training:
            trains = any(m.training for m in module.modules() if type(m) is not nn.Sequential)
            expect(not trains, f"a module inside is in training mode, and {known.not_in_training}")
        return known.stages

    def _describe_training(self, module: nn.Module) -> list[Stage]:
        known = self._recognise(module)
        expect(not known.not_in_training, known.not_in_training)
        return known.stages

    def forget(self) -> None:
        self._known = None
        self._chain.forget()

    def why_not(self, module: nn.Module, x: Tensor) -> str:
        if not self._is_of(module):
            return "a shallow copy, or a replica of nn.DataParallel"
        if reason := self._why_not_dtype(module, x):
            return reason
        reason = self._chain.why_not(module, x)
        if not reason or not self._trains:
            return reason
        return training.why_not(functools.partial(self._describe_training, module), module.children(), x)

    def _is_of(self, module: nn.Module) -> bool:
        if is_dynamo_compiling():
            return True
        if self._module is None:  # a deep copy or a pickle, and its first call
            self._module = weakref.ref(module)
        return self._module() is module

    def _why_not_dtype(self, module: nn.Module, x: Tensor) -> str:
        known = self._known
        halved = known is not None and known.not_in_16_bits and network.arithmetic(x).dtype in ops.HALVES
        return known.not_in_16_bits if halved else ""

    def __call__(self, module: nn.Module, x: Tensor) -> Any:
        """The module's result; None where it cannot run fused."""
        if not self._is_of(module) or self._why_not_dtype(module, x):
            return None
        y = self._chain(module, x)
        if y is None and self._trains:
            y = training.run(functools.partial(self._describe_training, module), module.children(), x)
        spec = self._known.spec if y is not None else None
        return y if spec is None else pytree.tree_unflatten([y], spec)


def _steering(module: nn.Module) -> list[dict[str, Any]]:
    return recognition.configurations(module.modules())


@functools.cache
def _fused_class(of: type[nn.Module]) -> type[nn.Module]:
    """A subclass with another forward. Its name is that of `of`, under which libraries save and print their models."""
    argument = next(iter(list(inspect.signature(of.forward).parameters)[1:]), "")

    @functools.wraps(of.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        y, fusion = None, self.__dict__.get("_fusion")  # none in what a Sequential makes of its class, a slice
        if fusion is not None and len(args) + len(kwargs) == 1:
            x = args[0] if args else kwargs.get(argument)
            y = fusion(self, x) if isinstance(x, Tensor) else None
        return of.forward(self, *args, **kwargs) if y is None else y

    def why_not_fused(self: nn.Module, x: Tensor) -> str:
        """Why a call with x would now not run as one op; "" when it would, in training too."""
        fusion = self.__dict__.get("_fusion")
        return fusion.why_not(self, x) if fusion else "a part of a fused Sequential"

    def repack(self: nn.Module) -> None:
        """Packs the weights anew at the next call: for a write that PyTorch does not count (`.data`, a NumPy view)."""
        if fusion := self.__dict__.get("_fusion"):
            fusion.forget()

    def reduce(self: nn.Module, protocol: int) -> Any:
        make, arguments, *state = of.__reduce_ex__(self, max(protocol, 2))
        if make is not copyreg.__newobj__ or arguments[0] is not type(self):
            raise TypeError(f"{of.__name__} is pickled by a method of its own: unfuse(model) first")
        return (_new_fused, (of, *arguments[1:]), *state)

    members = dict(
        forward=forward, why_not_fused=why_not_fused, repack=repack, __reduce_ex__=reduce, _unfused_class=of,
        __module__=of.__module__, __qualname__=of.__qualname__, __doc__=of.__doc__,
    )  # fmt: skip
    return type(of.__name__, (of,), members)


def _new_fused(of: type[nn.Module], *arguments: Any) -> nn.Module:
    fused = _fused_class(of)
    return fused.__new__(fused, *arguments)


class Found(NamedTuple):
    """A line of a report."""

    name: str  # as of named_modules
    what: str  # what it is: "21 layers", "inverted residual", ...
    reason: str  # why it is not fused; "" where it is


class FuseReport(list[Found]):
    """What `fuse` found: chains of layers, blocks, and modules with a depthwise convolution that are neither."""

    @property
    def fused(self) -> list[Found]:
        return [found for found in self if not found.reason]

    @property
    def unfused(self) -> list[Found]:
        return [found for found in self if found.reason]

    def __str__(self) -> str:
        width = max((len(found.name or "(the model)") for found in self), default=0)
        lines = [
            f"{name or '(the model)':{width}}  {what}: {f'not fused, {reason}' if reason else 'fused'}"
            for name, what, reason in self
        ]
        return "\n".join([*lines, f"{len(self.fused)} fused, {len(self.unfused)} not"])


_KINDS = {ops.CONV3X3: "3x3 convolution", ops.POINTWISE: "1x1 convolution"}


def _name_of(stages: list[Stage]) -> str:
    if len(stages) > 1:
        blocks = sum(stage.layer.kind == ops.BLOCK for stage in stages)
        return f"{len(stages)} layers as one op, {blocks} of them blocks"
    layer = stages[0].layer
    if layer.kind == ops.BLOCK:
        return "inverted residual" if layer.expand else "depthwise separable convolution"
    return _KINDS[layer.kind]


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == __package__ and not isinstance(module, nn.Conv2d)


def _inner_hook(module: nn.Module) -> str:
    names = (name for name, inner in module.named_modules() if name and network.has_hooks(inner))
    return next(names, "")


def _convs(module: nn.Module) -> int:
    return sum(isinstance(inner, nn.Conv2d) for inner in module.modules())


class _Place(NamedTuple):
    line: Found
    module: nn.Module
    chain: recognition.Chain | None

    @property
    def is_block(self) -> bool:
        return self.chain is not None and any(stage.layer.kind == ops.BLOCK for stage in self.chain.stages)


def _visit(module: nn.Module, name: str, inside: bool, called: Callable[[str], bool]) -> list[_Place]:
    """What there is in a module, outermost first.

    Args:
        inside: a chain that runs as one op already.
        called: whether a module inside, by its name, is called; its children might be, one by one, in its place.
    """
    if _is_ours(module):
        return [_Place(Found(name, "runs on mnv2_fused as it is", ""), module, None)]
    convs, depthwise = _convs(module), sum(map(recognition.is_depthwise, module.modules()))
    chain = None
    if depthwise <= 1 and convs in (1, 2, 3) or depthwise and not inside:
        tried = called("") and not isinstance(module, (nn.Conv2d, nn.ModuleList, nn.ModuleDict))
        chain = recognition.recognise(module) if tried else None
    found = _name_of(chain.stages) if chain and chain.stages else ""
    whole = bool(found) and chain.is_network
    hooked = _inner_hook(module) if found and not whole else ""
    if found and not whole and not hooked:
        return [_Place(Found(name, found, ""), module, chain)]
    if chain and chain.called is not None:
        called = chain.called.__contains__
    places = []
    for key, child in module.named_children():
        within = functools.partial(_within, called, key)
        places += _visit(child, f"{name}.{key}".lstrip("."), inside or whole, within)
    if whole and not inside:
        return [_Place(Found(name, found, ""), module, chain), *places]
    reason = f"a hook inside, on {hooked}" if hooked else chain.refusal if chain else ""
    # What is around one depthwise convolution is a block, or was meant as one, where none inside it is.
    if reason and depthwise == 1 and convs > 1 and not any(place.is_block for place in places):
        refused = _Place(Found(name, found or f"a block of {convs} convolutions", reason), module, None)
        return [refused, *(place for place in places if not place.line.reason)]
    return places


def _within(called: Callable[[str], bool], key: str, name: str) -> bool:
    return called(f"{key}.{name}".rstrip("."))


@overload
def fuse(model: Model) -> Model: ...
@overload
def fuse(model: Model, *, report: bool) -> tuple[Model, FuseReport]: ...
def fuse(model: Model, *, report: bool = False) -> Model | tuple[Model, FuseReport]:
    """Makes the inverted residuals and depthwise separable blocks of any network run fused, in place.

    They are found by what they compute, whatever their classes and names: [1x1 convolution, BatchNorm, ReLU6],
    3x3 depthwise convolution, BatchNorm, ReLU6, 1x1 convolution, [BatchNorm], [the sum with the input], as in
    torchvision's, timm's and transformers' MobileNetV2. Where a whole network, or a part that is called as a module, is
    a chain of such blocks and of 3x3 and 1x1 convolutions with BatchNorm and ReLU6, in eval mode without gradients that
    is one op call; in training every block is one, forward and backward.

    Parameters and buffers, their names and identities, the state dict, hooks on a block or on the model, `isinstance`,
    `repr`, `copy.deepcopy` and pickling (with mnv2_fused importable) stay. `type(module)` becomes a subclass. With
    hooks inside a block, in a trace, and wherever the ops cannot run, a call is what it was before:
    `module.why_not_fused(x)` of a fused module says why. With MNV2_FUSED_DISABLE=1 in the environment all calls are.
    Results are in channels_last memory. Later changes of modules, weights and attributes are noticed, but not writes
    through `.data` or into an attribute that is a list or dictionary: then call `module.repack()`.

    Args:
        model: any module; those inside that are shared stay shared.
        report: also returns what was found.

    Returns:
        The model itself; with `report` (model, FuseReport), whose lines are (name, what, reason): fused, or why not.

    Raises:
        TypeError: model is no nn.Module.

    A warning is given where nothing was found to fuse.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse() takes a model, an nn.Module, got {type(model).__name__}")
    found = FuseReport()
    for line, module, chain in _visit(model, "", False, lambda name: True):
        found.append(line)
        if not line.reason and chain is not None and not is_fused(module):
            module.__dict__["_fusion"] = _Fusion(not chain.is_network, chain, module)
            module.__class__ = _fused_class(recognition.unfused_class(module))
    if not found.fused:
        why = f"; {found.unfused[0].name}: {found.unfused[0].reason}" if found else ""
        warnings.warn(f"nothing in {type(model).__name__} was found to fuse{why}", stacklevel=2)
    return (model, found) if report else model


def is_fused(module: nn.Module) -> bool:
    """Whether `fuse` has changed this very module."""
    return "_fusion" in module.__dict__


def unfuse(model: Model) -> Model:
    """Takes back what `fuse` did, everywhere in the model, in place; returns the model."""
    for module in model.modules():
        module.__class__ = recognition.unfused_class(module)
        module.__dict__.pop("_fusion", None)
    return model
