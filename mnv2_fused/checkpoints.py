"""The keys under which other libraries keep a MobileNetV2, and what their weights expect of a network beside.

A layout names, for every convolution and BatchNorm, where its tensors are. All go through ours, which is torchvision's.
Sources: torchvision (models/mobilenetv2.py), timm (models/efficientnet.py), transformers
(models/mobilenet_v2/modeling_mobilenet_v2.py), TensorFlow's slim (research/slim/nets/mobilenet), and the repositories
tonylins/pytorch-mobilenet-v2 and d-li14/mobilenetv2.pytorch ("flat").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from .mobilenet_v2 import IMAGENET_MEAN, IMAGENET_STD, INVERTED_RESIDUAL_SETTING

HALF = (0.5, 0.5, 0.5)
REPEATS = tuple(n for _, _, n, _ in INVERTED_RESIDUAL_SETTING)


class Traits(NamedTuple):
    """What belongs to weights and is not in them."""

    padding: str = "symmetric"  # or "same": as of MobileNetV2
    norm_eps: float = 1e-5
    image_mean: tuple[float, ...] = IMAGENET_MEAN
    image_std: tuple[float, ...] = IMAGENET_STD
    background: bool = False  # class 0 is none of ImageNet's 1000


TENSORFLOW = Traits("same", 1e-3, HALF, HALF, background=True)


class Block(NamedTuple):
    """Of the network's blocks, from 0: which stage (row of the paper's Table 2), which in it, and its first layer."""

    index: int
    stage: int
    within: int
    expands: bool


# (convolution, its BatchNorm or ""), by role: "stem", "head", "classifier", and of block i "i.expand", "i.depthwise",
# "i.project".
Places = dict[str, tuple[str, str]]
Keys = Mapping[str, object]  # those of a state dict, where a layout has variants


def _torchvision(blocks: list[Block], keys: Keys) -> Places:
    places = {"stem": ("features.0.0", "features.0.1")}
    for i, _, _, expands in blocks:
        at, first = f"features.{i + 1}.conv", int(expands)
        if expands:
            places[f"{i}.expand"] = (f"{at}.0.0", f"{at}.0.1")
        places[f"{i}.depthwise"] = (f"{at}.{first}.0", f"{at}.{first}.1")
        places[f"{i}.project"] = (f"{at}.{first + 1}", f"{at}.{first + 2}")
    head = f"features.{len(blocks) + 1}"
    return places | {"head": (f"{head}.0", f"{head}.1"), "classifier": ("classifier.1", "")}


def _flat(blocks: list[Block], keys: Keys) -> Places:
    places = _torchvision(blocks, keys)
    for i, _, _, expands in blocks:
        at, first = f"features.{i + 1}.conv", 3 * expands
        if expands:
            places[f"{i}.expand"] = (f"{at}.0", f"{at}.1")
        places[f"{i}.depthwise"] = (f"{at}.{first}", f"{at}.{first + 1}")
        places[f"{i}.project"] = (f"{at}.{first + 3}", f"{at}.{first + 4}")
    if "conv.0.weight" in keys:  # d-li14's
        places["head"] = ("conv.0", "conv.1")
    if "classifier.1.weight" not in keys:
        places["classifier"] = ("classifier", "")
    return places


def _timm(blocks: list[Block], keys: Keys) -> Places:
    places = {"stem": ("conv_stem", "bn1")}
    for i, stage, within, expands in blocks:
        at = f"blocks.{stage}.{within}"
        if expands:
            places[f"{i}.expand"] = (f"{at}.conv_pw", f"{at}.bn1")
        places[f"{i}.depthwise"] = (f"{at}.conv_dw", f"{at}.bn{1 + expands}")
        # conv_pw is the expansion, but where there is none it is the projection
        places[f"{i}.project"] = (f"{at}.conv_pw{'l' * expands}", f"{at}.bn{2 + expands}")
    return places | {"head": ("conv_head", "bn2"), "classifier": ("classifier", "")}


def _transformers(blocks: list[Block], keys: Keys) -> Places:
    def layer(name: str) -> tuple[str, str]:
        return f"mobilenet_v2.{name}.convolution", f"mobilenet_v2.{name}.normalization"

    places = {"stem": layer("conv_stem.first_conv")}
    for i, _, _, expands in blocks:
        at = f"layer.{i - 1}" if i else "conv_stem"
        if expands:
            places[f"{i}.expand"] = layer(f"{at}.expand_1x1")
        places[f"{i}.depthwise"] = layer(f"{at}.conv_3x3")
        places[f"{i}.project"] = layer(f"{at}.reduce_1x1")
    return places | {"head": layer("conv_1x1"), "classifier": ("classifier", "")}


def _slim(blocks: list[Block], keys: Keys) -> Places:
    def layer(name: str) -> tuple[str, str]:
        return f"MobilenetV2/{name}", f"MobilenetV2/{name}/BatchNorm"

    places = {"stem": layer("Conv")}
    for i, _, _, expands in blocks:
        at = f"expanded_conv_{i}" if i else "expanded_conv"
        places |= {f"{i}.{role}": layer(f"{at}/{role}") for role in ("expand", "depthwise", "project")[not expands :]}
    return places | {"head": layer("Conv_1"), "classifier": ("MobilenetV2/Logits/Conv2d_1c_1x1", "")}


class Layout(NamedTuple):
    places: Callable[[list[Block], Keys], Places]
    sign: str  # a key that only it has
    block: str  # with what a block's keys begin; its groups give the order
    traits: Traits | None  # None: the keys are ours too, and what weights of ours expect is what their model had


LAYOUTS = {
    "torchvision": Layout(_torchvision, "features.1.conv.0.0.weight", r"features\.(\d+)\.conv\.", None),
    "timm": Layout(_timm, "blocks.0.0.conv_dw.weight", r"blocks\.(\d+)\.(\d+)\.", Traits()),
    "transformers": Layout(
        _transformers, "mobilenet_v2.conv_stem.first_conv.convolution.weight",
        r"mobilenet_v2\.(?:conv_stem|layer\.(\d+))\.", TENSORFLOW,
    ),
    "slim": Layout(_slim, "MobilenetV2/Conv/weights", r"MobilenetV2/expanded_conv(?:_(\d+))?/", TENSORFLOW),
    "flat": Layout(_flat, "features.1.conv.0.weight", r"features\.(\d+)\.conv\.", Traits()),
}  # fmt: skip

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_SLIM_NORM = ("gamma", "beta", "moving_mean", "moving_variance")  # and it counts no batches
_AVERAGE = "/ExponentialMovingAverage"
_SLOTS = re.compile(r"/(RMSProp(_1)?|Momentum|Adam(_1)?|ExponentialMovingAverage)$|^global_step$")


class Checkpoint(NamedTuple):
    """A state dict in our keys, what it came as, and what belongs to it."""

    state_dict: dict[str, Tensor]  # a key that the layout does not have stays as it is
    layout: str
    repeats: tuple[int, ...]  # blocks by stage
    traits: Traits | None
    names: dict[str, str]  # the keys in the layout by ours, also of what is missing


def recognise(state_dict: Mapping[str, Tensor]) -> Checkpoint | None:
    """What the keys are those of; None where they are of none of LAYOUTS."""
    tensors = _plain_names(state_dict)
    name = next((name for name, layout in LAYOUTS.items() if layout.sign in tensors), None)
    blocks = _blocks(name, tensors) if name else []
    if not blocks:
        return None
    names: dict[str, str] = {}
    found: dict[str, Tensor] = {}
    for role, ours, theirs in _pairs(name, blocks, tensors):
        names[ours] = theirs
        if theirs in tensors:
            tensor = tensors.pop(theirs)
            found[ours] = _from_slim(role, tensor) if name == "slim" else tensor
    repeats = [sum(block.stage == stage for block in blocks) for stage in range(blocks[-1].stage + 1)]
    return Checkpoint(found | tensors, name, tuple(repeats), LAYOUTS[name].traits, names)


def convert_state_dict(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A MobileNetV2's state dict under the keys of another library; the tensors are shared, or views.

    Args:
        state_dict: in any of the layouts.
        layout: "torchvision" (which is ours too), "timm", "transformers", "slim" (TensorFlow's names and order of axes)
            or "flat". What weights expect beside their keys does not change: those from transformers and slim want
            TensorFlow's padding and an eps of 0.001 wherever they go.

    Raises:
        ValueError: no such layout; or keys that are of none, or more than a MobileNetV2 has.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout should be one of {', '.join(LAYOUTS)}, got {layout!r}")
    checkpoint = recognise(state_dict)
    if checkpoint is None:
        raise ValueError(f"keys of none of the layouts {', '.join(LAYOUTS)}: {', '.join(list(state_dict)[:3])}, ...")
    left, result = dict(checkpoint.state_dict), {}
    for role, ours, theirs in _pairs(layout, _blocks("torchvision", left, checkpoint.repeats), {}):
        if ours in left:
            tensor = left.pop(ours)
            result[theirs] = _to_slim(role, tensor) if layout == "slim" else tensor
    if unknown := [key for key in left if not key.endswith("num_batches_tracked")]:
        raise ValueError(f"{len(unknown)} keys that no MobileNetV2 has: {', '.join(unknown[:5])}")
    return result


def _plain_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what optimizers add, TensorFlow's moving averages in place of what they are averages of."""
    if LAYOUTS["slim"].sign in state_dict:
        plain = {key: value for key, value in state_dict.items() if not _SLOTS.search(key)}
        return {key: state_dict.get(key + _AVERAGE, value) for key, value in plain.items()}
    if "conv_stem.first_conv.convolution.weight" in state_dict:  # transformers' MobileNetV2Model, without a classifier
        return {f"mobilenet_v2.{key}": value for key, value in state_dict.items()}
    return dict(state_dict)


def _blocks(layout: str, tensors: Keys, repeats: tuple[int, ...] = ()) -> list[Block]:
    """`repeats`: blocks by stage where the keys do not tell, by default the paper's, or each is a stage."""
    matches = [match for key in tensors if (match := re.match(LAYOUTS[layout].block, key))]
    order = sorted({tuple(-1 if group is None else int(group) for group in match.groups()) for match in matches})
    stages = [stage for stage, n in enumerate(repeats or REPEATS) for _ in range(n)]
    if layout == "timm":
        stages = [place[0] for place in order]
    elif len(stages) != len(order):
        stages = list(range(len(order)))
    blocks = []
    for i, stage in enumerate(stages):
        block = Block(i, stage, i - stages.index(stage), False)
        # Which of the two has more of its keys: one may be missing.
        readings = [block, block._replace(expands=True)]
        blocks.append(max(readings, key=lambda reading: _count(layout, reading, tensors)))
    return blocks


def _count(layout: str, block: Block, tensors: Keys) -> int:
    own = f"features.{block.index + 1}.conv."
    return sum(theirs in tensors for _, ours, theirs in _pairs(layout, [block], tensors) if ours.startswith(own))


def _weight(layout: str, role: str, conv: str) -> str:
    if layout != "slim":
        return f"{conv}.weight"
    return f"{conv}/{'depthwise_weights' if role == 'depthwise' else 'weights'}"


def _pairs(layout: str, blocks: list[Block], keys: Keys) -> Iterator[tuple[str, str, str]]:
    """(role, our key, the layout's key) of all tensors that such a network may have."""
    theirs = LAYOUTS[layout].places(blocks, keys)
    for place, (conv, norm) in _torchvision(blocks, {}).items():
        role = place.rpartition(".")[2]
        their_conv, their_norm = theirs[place]
        yield role, f"{conv}.weight", _weight(layout, role, their_conv)
        yield role, f"{conv}.bias", f"{their_conv}/biases" if layout == "slim" else f"{their_conv}.bias"
        if norm and layout == "slim":
            yield from (("", f"{norm}.{a}", f"{their_norm}/{b}") for a, b in zip(_NORM, _SLIM_NORM, strict=False))
        elif norm:
            yield from (("", f"{norm}.{leaf}", f"{their_norm}.{leaf}") for leaf in _NORM)


def _from_slim(role: str, tensor: Tensor) -> Tensor:
    """From height, width, in, out, or of a depthwise convolution height, width, channels, 1."""
    if tensor.ndim != 4:
        return tensor
    tensor = tensor.permute(2, 3, 0, 1) if role == "depthwise" else tensor.permute(3, 2, 0, 1)
    return tensor.flatten(1) if role == "classifier" else tensor.contiguous()


def _to_slim(role: str, tensor: Tensor) -> Tensor:
    if role == "classifier" and tensor.ndim == 2:
        return tensor.t()[None, None].contiguous()
    if tensor.ndim != 4:
        return tensor
    return (tensor.permute(2, 3, 0, 1) if role == "depthwise" else tensor.permute(2, 3, 1, 0)).contiguous()
