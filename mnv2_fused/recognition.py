"""What chain of layers a module of someone else computes: found by watching a call of it, not by names or classes.

A copy of the module without data (on PyTorch's meta device) is called with images of two sizes, in eval and in training
mode. Of every operator that PyTorch is asked for is noted what it was given, so the result is an expression of the
input, and this either reads as layers that the kernels have or tells what else is done. What cannot be seen so: a
forward that looks at the numbers in a tensor (it fails on the meta device, and says so) or does other things at other
sizes than these.
"""

from __future__ import annotations

import copy
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import network, ops
from .network import Stage, Unfusable, expect
from .ops import Layer

# Height and width, even after every halving and odd after every halving: TensorFlow's padding tells the two apart.
EVEN, ODD = (128, 192), (129, 193)

# Of a 3x3 convolution at most: our kernel is one for images, and PyTorch's is faster where there are many.
STEM_CHANNELS = 4


@dataclass(eq=False)
class Value:
    """A tensor of the watched call: the operator that made it, of which values, with what else it was given."""

    operator: str
    inputs: tuple[Value, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()


_UNKNOWN = Value("constant")


class _Watcher(TorchDispatchMode):
    """Notes the operators that run under it, down to torch's own (ATen), where spellings no longer differ."""

    def __init__(self, image: Tensor, counters: Iterable[Tensor]) -> None:
        super().__init__()
        self._values: dict[int, Value] = {}
        self._tensors: list[Tensor] = []  # alive, so that no other gets its id
        self._sharing: dict[int, set[int]] = {}  # by storage, the tensors in it
        self._counters = {id(counter) for counter in counters}  # num_batches_tracked
        self._image, self.refusal = image, ""
        self._set(image, Value("image"))

    def _set(self, tensor: Tensor, value: Value) -> None:
        value.shape = tuple(tensor.shape)
        self._tensors.append(tensor)
        self._values[id(tensor)] = value
        self._sharing.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))

    def value_of(self, tensor: Tensor) -> Value:
        return self._values.get(id(tensor), _UNKNOWN)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        try:
            result = _like(func, args) if func in _ELEMENTWISE else func(*args, **kwargs)
        except NotImplementedError:  # on the meta device
            raise Unfusable(_what(Value(name))) from None
        arguments = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        sources = [self.value_of(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inputs = tuple(value for value in sources if value is not _UNKNOWN)
        self.refusal = self.refusal or self._why_impure(func, name, args, arguments)
        tensors = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in tensors[:1]:
            value = self._read(name.removesuffix("_"), inputs, arguments, tensor)
            if value.operator == "same":
                value = inputs[0]
            self._set(tensor, value)
        for tensor in tensors[1:]:  # the statistics of a BatchNorm
            self._set(tensor, Value(f"{name}, another result", inputs))
        return result

    def _why_impure(self, func: Any, name: str, args: Any, arguments: dict[str, Any]) -> str:
        """What the operator does beside its result that a fused call would not; "" if nothing."""
        if torch.Tag.nondeterministic_seeded in func.tags:
            return _what(Value(name)) if "dropout" in name else f"random numbers, as of dropped paths ({name})"
        if not func._schema.is_mutable:
            return ""
        written = [arguments.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        for tensor in pytree.tree_leaves([t for t in written if t is not None]):
            if tensor is self._image:
                return f"it changes its input in place ({name})"
            norm = "batch_norm" in name or id(tensor) in self._counters
            own = args and tensor is args[0] and id(tensor) in self._values
            alone = self._sharing.get(tensor.untyped_storage()._cdata, set()) == {id(tensor)}
            if not norm and not (own and alone):
                return f"it writes into a tensor that something else may read ({name})"
        return ""

    def hooked(self) -> bool:
        return any(tensor._backward_hooks for tensor in self._tensors)

    def _read(self, name: str, inputs: tuple[Value, ...], given: dict[str, Any], result: Tensor) -> Value:
        shape = tuple(result.shape)
        if not inputs:
            return Value("transposed" if name == "t" else "constant", (), given)  # the weight of a linear layer
        first = inputs[0]
        if name == "convolution" and not given["transposed"]:
            return Value("convolution", inputs, given)
        if "batch_norm" in name and "running_mean" in given:
            return Value("norm", inputs, given)
        if name in ("hardtanh", "clamp"):
            low, high = (given.get(key, default) for key, default in _BOUNDS[name])
            return Value("relu6" if (low, high) == (0, 6) else f"{name}({low}, {high})", inputs)
        if name == "constant_pad_nd":
            pads = [*given["pad"], 0, 0, 0, 0][:4]
            if not any(given["pad"]):
                return Value("same", inputs)
            zero = given.get("value", 0) == 0 and not any(given["pad"][4:])
            return Value("pad" if zero else "a padding that is not of zeros", inputs, {"pads": tuple(pads)})
        if name == "add" and len(inputs) == 2 and given.get("alpha", 1) == 1 and inputs[0].shape == inputs[1].shape:
            return Value("sum", inputs)
        if name == "mean" and given.get("dim"):
            axes = sorted(d % len(first.shape) for d in given["dim"])
            if (len(first.shape), axes) == (4, [2, 3]):
                return Value("mean", inputs)
            if (len(first.shape), axes, len(shape)) == (4, [3], 3):
                return Value("mean of columns", inputs)
            if (first.operator, axes) == ("mean of columns", [2]):
                return Value("mean", first.inputs)
        if name in _VIEWS:
            return Value("same" if shape == first.shape else "reshaped", inputs)
        if name in ("addmm", "mm"):
            return Value("linear", inputs, given)
        return Value(name, inputs)


_ATEN = torch.ops.aten
# On the meta device these run as dozens of others, ten times as long as all else.
_ELEMENTWISE = {_ATEN.native_batch_norm.default, _ATEN.hardtanh.default, _ATEN.hardtanh_.default}


def _like(func: Any, args: Any) -> Any:
    if func is _ATEN.native_batch_norm.default:
        return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
    return args[0] if func is _ATEN.hardtanh_.default else torch.empty_like(args[0])


_BOUNDS = {"hardtanh": (("min_val", -1), ("max_val", 1)), "clamp": (("min", None), ("max", None))}
_VIEWS = "view _unsafe_view reshape flatten squeeze alias detach clone contiguous".split()


def unfused_class(module: nn.Module) -> type[nn.Module]:
    """That of the module before fusion.fuse has changed it."""
    return getattr(type(module), "_unfused_class", type(module))


def _copy_without_data(module: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    """A copy on the meta device, without hooks, and the original tensors by the ids of their copies."""
    memo: dict[int, Any] = {}
    originals: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, empty.is_floating_point()) if isinstance(tensor, nn.Parameter) else empty
        originals[id(memo[id(tensor)])] = tensor
    for inner in module.modules():
        memo |= {id(table): OrderedDict() for table in (getattr(inner, name) for name in network.HOOKS)}
    copied = copy.deepcopy(module, memo)
    for inner in copied.modules():
        inner.__class__ = unfused_class(inner)
        if type(inner) is nn.SyncBatchNorm:  # refuses tensors that are on no GPU
            inner.__class__ = nn.BatchNorm2d
    return copied, originals


def _watch(module: nn.Module, image: Tensor, gradients: bool) -> tuple[Any, _Watcher]:
    """The result of a call, and what was noted of it."""
    norms = [inner for inner in module.modules() if isinstance(inner, nn.modules.batchnorm._BatchNorm)]
    watcher = _Watcher(image, [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None])
    before, drawn = _state_of(module), (random.getstate(), numpy.random.get_state()[1].tobytes())
    try:
        with torch.set_grad_enabled(gradients), torch.random.fork_rng(devices=[]), watcher:
            result = module(image)
    except Unfusable:
        raise
    except Exception as error:  # whatever someone's forward raises for a tensor without data
        lines = str(error).strip().splitlines()
        raise Unfusable(f"its forward cannot be watched: {type(error).__name__}: {lines[0] if lines else ''}") from None
    if drawn != (random.getstate(), numpy.random.get_state()[1].tobytes()):
        watcher.refusal = "random numbers, as of dropped paths"
    if not _same_state(before, _state_of(module)):
        watcher.refusal = "its forward writes to attributes of its modules"
    return result, watcher


# Of autograd's nodes, those whose gradients the ops of training have.
_NODES = re.compile(
    r"(Convolution|Native|Mkldnn|Cudnn|Hardtanh|Relu6|Clamp|Add|ConstantPadNd|Alias|View|Clone)\w*Backward\d*|"
    r"NativeBatchNorm\w*|AccumulateGrad"
)


def _expect_gradients(result: Tensor, image: Tensor, parameters: list[nn.Parameter], watcher: _Watcher) -> None:
    """Unfusable where gradients go other ways than through the layers, or not all the way."""
    expect(not watcher.hooked(), "hooks on the gradients of activations")
    reached: set[int] = set()
    pending, seen = [result.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        expect(bool(_NODES.fullmatch(node.name().rpartition("::")[2])), f"gradients of its own ({node.name()})")
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    expect(all(id(t) in reached for t in (image, *parameters)), "gradients that do not reach every weight")


# ------------------------------------------------------------------------------------- from an expression to layers


class _Conv(NamedTuple):
    """[padding], convolution, [BatchNorm], [ReLU6] of a value."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d | None
    relu6: bool
    given: Value
    geometry: dict[str, int]  # as of Layer

    @property
    def pointwise(self) -> bool:
        conv, unpadded = self.conv, not any(self.geometry[side] for side in _SIDES)
        return conv.kernel_size == (1, 1) and conv.groups == 1 and conv.stride == (1, 1) and unpadded

    @property
    def depthwise(self) -> bool:
        return is_depthwise(self.conv)


_SIDES = ("pad_left", "pad_right", "pad_top", "pad_bottom")


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _kind(conv: nn.Conv2d) -> str:
    return f"a {'x'.join(map(str, conv.kernel_size))} convolution, stride {conv.stride}, groups {conv.groups}"


_ACTIVATIONS = "relu leaky_relu elu gelu silu mish hardswish hardsigmoid sigmoid prelu _prelu_kernel tanh".split()


def _what(value: Value) -> str:
    name = value.operator
    if name.startswith(("hardtanh(", "clamp(")) or name in _ACTIVATIONS:
        return f"another activation than ReLU6: {name}"
    if name == "mul":
        dropped = any(given.operator in ("bernoulli", "div") for given in value.inputs)
        return "dropped paths" if dropped else "a product, as of squeeze-and-excitation"
    if "quantize" in name or "fused_moving_avg" in name:
        return f"a quantiser: {name}"
    if "dropout" in name:
        return "dropout"
    return {
        "image": "it does not end in layers that the kernels have",
        "norm": "a BatchNorm that follows no convolution",
        "relu6": "a ReLU6 that follows no convolution",
        "sum": "a sum in the middle of a block",
        "constant": "a tensor that does not come from the input",
    }.get(name, f"an operator that is of no such layer: {name}")


class _Reader:
    """Reads the expression of one call, from its result back to the image."""

    def __init__(self, originals: dict[int, Tensor], modules: list[nn.Module], batch: int, train: bool) -> None:
        self._originals = originals
        self._batch, self._train = batch, train
        self._owners: dict[int, nn.Module] = {}
        for module in modules:
            for tensor in _own_tensors(module):
                self._owners.setdefault(id(tensor), module)
        self._known: dict[int, list[Stage] | Unfusable] = {}

    def stages(self, value: Value) -> list[Stage]:
        """The layers from the image to a value. Unfusable with what else is done."""
        if id(value) not in self._known:
            try:
                self._known[id(value)] = self._read(value)
            except Unfusable as refusal:
                self._known[id(value)] = refusal
        found = self._known[id(value)]
        if isinstance(found, Unfusable):
            raise found
        return found

    def _read(self, value: Value) -> list[Stage]:
        if value.operator == "image":
            return []
        if value.operator == "linear":
            return [*self._pooled(value.inputs[0]), self._linear(value)]
        if value.operator == "reshaped":
            return self._pooled(value)
        if value.operator == "sum":
            orders = sorted((value.inputs, value.inputs[::-1]), key=lambda pair: pair[1].operator == "image")
            return self._first(partial(self._block, branch, base) for base, branch in orders)
        last = self._conv(value)
        if last.pointwise and not last.relu6:
            return self._block(value)
        readings = [partial(self._dense, last)]
        if last.pointwise:
            with suppress(Unfusable):
                if self._conv(last.given).depthwise:
                    readings.insert(0, partial(self._block, value))
        return self._first(readings)

    @staticmethod
    def _first(readings: Iterable[Callable[[], list[Stage]]]) -> list[Stage]:
        """The first that can be read, or the refusal of the first."""
        refusals = []
        for reading in readings:
            try:
                return reading()
            except Unfusable as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def _pooled(self, value: Value) -> list[Stage]:
        flat = value.operator == "reshaped" and len(value.shape) == 2
        mean = value.inputs[0] if flat else value
        expect(mean.operator == "mean", _what(mean))
        stages = self.stages(mean.inputs[0])
        expect(bool(stages), "a mean over the image")
        kept = value.shape == (self._batch, stages[-1].layer.out_channels)
        expect(kept, "features that are not [N, C] for every number of images")
        return [*stages, network.pool(stages[-1].layer.out_channels)]

    def _linear(self, value: Value) -> Stage:
        given = value.given
        expect(given.get("alpha", 1) == given.get("beta", 1) == 1, "a linear layer with factors")
        expect(len(value.inputs) == 2 and value.inputs[1].operator == "transposed", "a product of computed matrices")
        bias = given["self"] if "mat1" in given else None  # addmm, or mm of x and the weight
        return network.classifier(self._owner(weight=value.inputs[1].given["self"], bias=bias))

    def _owner(self, **given: Tensor | None) -> nn.Module:
        """The module whose tensors of these names they are, all of them."""
        tensors = [tensor for tensor in given.values() if tensor is not None]
        originals = [self._originals.get(id(tensor)) for tensor in tensors]
        expect(all(t is not None for t in originals), "a weight that is computed, and no parameter of a layer")
        owner = self._owners.get(id(originals[0])) if originals else None
        expect(owner is not None, "a BatchNorm without weights and statistics, or a weight that is of no layer")
        for name, tensor in given.items():
            own = getattr(owner, name, None)
            expect(own is (None if tensor is None else self._originals[id(tensor)]), f"a layer with another {name}")
        return owner

    def _conv(self, value: Value) -> _Conv:
        relu6, norm = value.operator == "relu6", None
        if relu6:
            (value,) = value.inputs
        if value.operator == "norm":
            given = value.given
            norm = self._owner(**{name: given[name] for name in ("running_mean", "running_var", "weight", "bias")})
            expect(isinstance(norm, nn.modules.batchnorm._BatchNorm), f"a norm of another kind: {type(norm).__name__}")
            expect(norm.momentum is None or norm.momentum == given["momentum"], "a BatchNorm with another momentum")
            batch = self._train or norm.running_mean is None
            kept = given["eps"] == norm.eps and given["training"] == batch
            expect(kept, "a BatchNorm with another eps, or with statistics of another kind")
            value = value.inputs[0]
        expect(value.operator == "convolution", _what(value))
        conv, given = self._owner(weight=value.given["weight"], bias=value.given["bias"]), value.inputs[0]
        fits = isinstance(conv, nn.Conv2d) and conv.groups == value.given["groups"]
        expect(fits and conv.kernel_size == tuple(conv.weight.shape[2:]), f"a convolution by a {type(conv).__name__}")
        pads = (0, 0, 0, 0)
        if given.operator == "pad":
            pads, given = given.given["pads"], given.inputs[0]
        (stride, stride_x), (dilation, dilation_x) = value.given["stride"], value.given["dilation"]
        expect(stride == stride_x and dilation == dilation_x, _kind(conv))
        y, x = value.given["padding"]
        expect(min(pads) >= 0, "a map that is cropped")
        pads = [pad + own for pad, own in zip(pads, (x, x, y, y), strict=True)]
        geometry = dict(stride=stride, dilation=dilation, **dict(zip(_SIDES, pads, strict=True)))
        return _Conv(conv, norm, relu6, given, geometry)

    def _dense(self, last: _Conv) -> list[Stage]:
        conv, shape = last.conv, (last.conv.in_channels, 0, last.conv.out_channels)
        expect(last.relu6 and not last.depthwise, f"{_kind(conv)} that no 1x1 convolution follows")
        if last.pointwise:
            layer = Layer(ops.POINTWISE, *shape, relu6=1)
        else:
            fits = conv.kernel_size == (3, 3) and conv.groups == 1 and last.geometry["dilation"] == 1
            fits = fits and last.geometry["stride"] in (1, 2) and conv.in_channels <= STEM_CHANNELS
            expect(fits, f"{_kind(conv)}, {conv.in_channels} channels, where the 3x3 of a first layer was expected")
            layer = Layer(ops.CONV3X3, *shape, **last.geometry, relu6=1)
        return [*self.stages(last.given), Stage(layer, ((conv, last.norm),))]

    def _block(self, value: Value, base: Value | None = None) -> list[Stage]:
        """With the shortcut from `base`, where there is one."""
        project = self._conv(value)
        expect(project.pointwise, f"{_kind(project.conv)} where a projection was expected")
        expect(base is None or not project.relu6, "a ReLU6 before the shortcut")
        depthwise = self._conv(project.given)
        fits = depthwise.depthwise and depthwise.conv.kernel_size == (3, 3) and depthwise.geometry["stride"] in (1, 2)
        expect(fits, f"{_kind(depthwise.conv)} before the projection, where a depthwise 3x3 was expected")
        expect(depthwise.relu6, "no ReLU6 after the depthwise convolution")

        def read(expand: _Conv | None, source: Value) -> list[Stage]:
            expect(base is None or source is base, "a shortcut that does not come from the input of its block")
            pads = [depthwise.geometry[side] for side in _SIDES]
            kept = depthwise.geometry["stride"] == 1 and pads == [depthwise.geometry["dilation"]] * 4
            expect(base is None or kept, "a shortcut around a convolution that moves the pixels")
            parts = [part for part in (expand, depthwise, project) if part is not None]
            channels = (parts[0].conv.in_channels, depthwise.conv.out_channels, project.conv.out_channels)
            layer = Layer(
                ops.BLOCK, *channels, **depthwise.geometry,
                expand=int(expand is not None), residual=int(base is not None), relu6=int(project.relu6),
            )  # fmt: skip
            return [*self.stages(source), Stage(layer, tuple((part.conv, part.norm) for part in parts))]

        readings = [partial(read, None, depthwise.given)]
        if depthwise.given.operator == "relu6":
            expand = self._conv(depthwise.given)
            if expand.pointwise:
                readings.insert(0, partial(read, expand, expand.given))
        return self._first(readings)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _merged(even: list[Stage], odd: list[Stage]) -> list[Stage]:
    """The stages of the two sizes as one: they differ in their padding at most, and then as TensorFlow's does."""
    alike = [s.layer._replace(**dict.fromkeys(_SIDES, 0)) for s in even] == [
        s.layer._replace(**dict.fromkeys(_SIDES, 0)) for s in odd
    ] and [s.weights for s in even] == [s.weights for s in odd]
    expect(alike, "it does other things at other sizes of images")
    merged, sizes = [], [EVEN, ODD]
    for pair in zip(even, odd, strict=True):
        stage = pair[0]
        if stage.layer != pair[1].layer:
            stage = stage._replace(same=True)
            layers = [stage.at(*size) for size in sizes]
            expect(layers == [s.layer for s in pair], "a padding that depends on the size otherwise than SAME")
        merged.append(stage)
        sizes = [ops.output_size(s.layer, *size) for s, size in zip(pair, sizes, strict=True)]
    return merged


# ------------------------------------------------------------------------------------------------ what is remembered

# What every module has, what fuse gives them, and notes of torch.compile and FSDP.
_MODULE = {*nn.Module().__dict__, "_fusion", "_is_torch_compile", "_is_fsdp_managed_module", "_fsdp_use_orig_params"}
_SIMPLE = (bool, int, float, str, tuple, type(None))


def settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its forward may depend on, beside children and tensors."""
    return {key: value for key, value in module.__dict__.items() if key not in _MODULE}


def configurations(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The dictionaries of objects among their attributes that steer a forward, as transformers' config does."""
    found: dict[int, dict[str, Any]] = {}
    for module in modules:
        for value in settings(module).values():
            if type(value) not in _SIMPLE and not callable(value) and hasattr(value, "__dict__"):
                found[id(value)] = value.__dict__
    return list(found.values())


def _state_of(module: nn.Module) -> list[Any]:
    modules = list(module.modules())
    state: list[Any] = []
    for inner in modules:
        kind = unfused_class(inner)
        state += (inner, kind)
        if kind not in _PLAIN:
            state += settings(inner).values()
    for table in configurations(modules):
        state += table.values()
    return state


_PLAIN = (nn.Sequential, nn.ReLU6, nn.Identity)


def _same_state(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(v is w or (type(v) in _SIMPLE and type(v) is type(w) and v == w) for v, w in pairs)


@dataclass(frozen=True)
class Chain:
    """The layers that a call of a module with one image computes, in eval mode."""

    state: list[Any]
    stages: list[Stage]
    spec: pytree.TreeSpec | None  # of the result, where it is something that holds one tensor
    refusal: str  # why there are no stages; "" where there are
    called: frozenset[str] | None  # the modules inside that a call calls, by name; None where it could not be watched
    not_in_training: str  # why a call in training mode is not the same blocks and convolutions; "" where it is
    not_in_16_bits: str  # the same of a call with 16-bit numbers
    simple: list[tuple[nn.Module, str, Any]] = field(default_factory=list)  # attributes that a compiler can compare

    @property
    def is_network(self) -> bool:
        """Whether it is more than what one module may be in training: at most one block, and convolutions around it."""
        kinds = [stage.layer.kind for stage in self.stages]
        return kinds.count(ops.BLOCK) > 1 or ops.POOL in kinds

    def looks_like(self) -> bool:
        """`is_of` in what a compiler can trace, and guards then."""
        return all(getattr(module, name) == value for module, name, value in self.simple)

    def is_of(self, module: nn.Module) -> bool:
        """Whether the module is as it was: children and attributes; what tensors hold does not matter."""
        return _same_state(self.state, _state_of(module))


def recognise(module: nn.Module) -> Chain:
    """What a call of the module is, or why it is no chain of layers that the kernels have."""
    state = _state_of(module)
    called: set[str] = set()
    with torch.inference_mode(False):  # in which operators are not taken apart
        try:
            read = _reader_of(module, called)
            stages, spec = _both(read)
        except Unfusable as refusal:
            return Chain(state, [], None, str(refusal), frozenset(called) if called else None, str(refusal), "")
        simple = [
            (inner, name, value)
            for inner in module.modules()
            if unfused_class(inner) not in _PLAIN
            for name, value in settings(inner).items()
            if type(value) in _SIMPLE
        ]
        chain = Chain(state, stages, spec, "", frozenset(called), "its parts are fused one by one", "", simple)
        try:
            expect(_both(partial(read, dtype=torch.bfloat16)) == (stages, spec), "it is not what it is in float32")
        except Unfusable as refusal:
            chain = replace(chain, not_in_16_bits=f"in bfloat16: {refusal}")
        if chain.is_network:
            return chain
        try:
            expect(_both(partial(read, train=True)) == (stages, spec), "it is not what it is in eval mode")
        except Unfusable as refusal:
            return replace(chain, not_in_training=f"in training: {refusal}")
    return replace(chain, not_in_training="")


Read = Callable[..., tuple[list[Stage], "pytree.TreeSpec | None"]]


def _both(read: Read) -> tuple[list[Stage], pytree.TreeSpec | None]:
    """Of two images of even sizes, and of one of odd."""
    (even, spec), (odd, other) = read(EVEN, 2), read(ODD, 1)
    expect(spec == other, "results of another kind for another number of images")
    return _merged(even, odd), spec


def _reader_of(module: nn.Module, called: set[str]) -> Read:
    """A function that calls a copy with images of this size, in training mode or not, and reads what it computes.

    `called` receives the names of the modules inside that such a call calls, if it comes to an end.
    """
    expect(not network.global_hooks(), "there are global hooks")
    expect(not isinstance(module, torch.fx.GraphModule), "a graph of torch.fx, which writes its own forward")
    own = next((name for name, m in module.named_modules() if "forward" in m.__dict__), None)
    expect(own is None, f"a forward that was set on the module itself, {own or 'the outermost'}")
    modules = list(module.modules())
    convs = [m for m in modules if isinstance(m, nn.Conv2d)]
    expect(bool(convs), "there is no convolution")
    owned = [id(t) for m in modules for t in m._parameters.values() if t is not None]
    expect(len(owned) == len(set(owned)), "layers that share a weight")
    try:
        copied, originals = _copy_without_data(module)
    except Exception as error:  # whatever someone's module raises that is no plain data
        raise Unfusable(f"it cannot be copied: {type(error).__name__}: {error}") from None
    copies = {id(original): copied_id for copied_id, original in originals.items()}
    parameters = {id(p): p for p in copied.parameters()}
    seen: set[str] = set()
    for name, inner in copied.named_modules():
        inner.register_forward_pre_hook(lambda *_, name=name: seen.add(name))

    def read(
        size: tuple[int, int], batch: int, train: bool = False, dtype: torch.dtype = convs[0].weight.dtype
    ) -> tuple[list[Stage], pytree.TreeSpec | None]:
        copied.train(train)
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        refusals = []
        for channels in list(dict.fromkeys(conv.in_channels for conv in convs))[:3]:  # which conv is first is not known
            image = torch.empty(batch, channels, *size, dtype=dtype, device="meta", requires_grad=train)
            given = image.clone() if train else image  # no leaf, which no operator may write to
            try:
                seen.clear()
                result, watcher = _watch(copied, given, train)
            except Unfusable as refusal:
                refusals.append(refusal)
                continue
            called.update(seen)
            expect(not watcher.refusal, watcher.refusal)
            leaves, spec = pytree.tree_flatten(result)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            expect(len(leaves) == len(tensors) == 1, f"its forward returns {len(leaves)} values, not one tensor")
            stages = _Reader(originals, modules, batch, train).stages(watcher.value_of(tensors[0]))
            expect(bool(stages), "it returns its input")
            if train:
                used = [
                    t
                    for stage in stages
                    for pair in stage.weights
                    for m in pair
                    if m is not None
                    for t in m.parameters()
                ]
                _expect_gradients(tensors[0], image, [parameters[copies[id(t)]] for t in used], watcher)
            return stages, None if isinstance(result, Tensor) else spec
        raise refusals[0]

    return read
