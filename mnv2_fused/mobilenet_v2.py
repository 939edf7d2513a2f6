"""MobileNetV2 (Sandler et al., CVPR 2018) with torchvision's state dict: modules, rounding, initialisation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import network, training
from .network import Conv2dSame, FusedChain, Stage
from .ops import Layer

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """What says that huggingface_hub is missing."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> Any:
            """Of a folder or a repository on the Hub."""
            raise ImportError("huggingface_hub is not installed: pip install 'mnv2_fused[hub]'")

        save_pretrained = push_to_hub = from_pretrained


# Table 2 of the paper: expansion t, output channels c, repeats n, stride s of the first block in the row.
INVERTED_RESIDUAL_SETTING: tuple[tuple[int, int, int, int], ...] = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def make_divisible(value: float, divisor: int, min_value: int | None = None) -> int:
    """The multiple of `divisor` nearest to `value`, not below 90% of it nor below `min_value` (default: `divisor`)."""
    nearest = int(value + divisor / 2) // divisor * divisor
    rounded = max(divisor if min_value is None else min_value, nearest)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def conv_bn_relu6(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    dilation: int = 1,
    padding: str = "symmetric",
) -> nn.Sequential:
    """Convolution, BatchNorm2d, ReLU6; `padding` as of InvertedResidual."""
    if padding not in ("symmetric", "same"):
        raise ValueError(f"padding should be 'symmetric' or 'same', got {padding!r}")
    conv = Conv2dSame if padding == "same" and kernel_size > 1 else nn.Conv2d
    around = (kernel_size - 1) // 2 * dilation
    options = dict(padding=around, dilation=dilation, groups=groups, bias=False)
    return nn.Sequential(
        conv(in_channels, out_channels, kernel_size, stride, **options),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


def _is_row(row: object) -> bool:
    return isinstance(row, Sequence) and len(row) == 4 and all(isinstance(value, Real) for value in row)


def _init_linear(linear: nn.Linear) -> nn.Linear:
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (Table 1 of the paper): [N, in, H, W] -> [N, out, ceil(H/s), ceil(W/s)].

    Each convolution is followed by its BatchNorm2d, the first two also by ReLU6; `expand_ratio=1` has no expand stage.
    x is added to the result when stride is 1 and in_channels == out_channels. By the attributes `use_res_connect`,
    `out_channels` and `_is_cn` torchvision's detection code finds the feature maps.

    Args:
        stride: of the depthwise convolution, 1 or 2.
        expand_ratio: hidden channels by in_channels.
        hidden_channels: in place of expand_ratio.
        dilation: of the depthwise convolution.
        padding: "symmetric", `dilation` on all sides, as in PyTorch's models; "same" as in TensorFlow's.
        activation: after the projection: "linear", or "relu6" (figure 6 of the paper, and where a block stands for a
            separable convolution). A block with both a ReLU6 and a shortcut runs unfused.
        shortcut: False never adds x.
        norm: False has no BatchNorm after the projection, but a bias in it.

    Raises:
        ValueError: stride is neither 1 nor 2; padding or activation is none of those.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expand_ratio: float,
        *,
        hidden_channels: int | None = None,
        dilation: int = 1,
        padding: str = "symmetric",
        activation: str = "linear",
        shortcut: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2, got {stride}")
        if activation not in ("linear", "relu6"):
            raise ValueError(f"activation should be 'linear' or 'relu6', got {activation!r}")
        expands = expand_ratio != 1 or hidden_channels is not None
        hidden_channels = round(in_channels * expand_ratio) if hidden_channels is None else hidden_channels
        self.stride = stride
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_res_connect = shortcut and stride == 1 and in_channels == out_channels
        self._is_cn = stride > 1
        expand = [conv_bn_relu6(in_channels, hidden_channels, 1)] if expands else []
        self.fused = True
        self._chain = FusedChain(("conv",), _describe_block)
        options = dict(groups=hidden_channels, dilation=dilation, padding=padding)
        self.conv = nn.Sequential(
            *expand,
            conv_bn_relu6(hidden_channels, hidden_channels, 3, stride, **options),
            nn.Conv2d(hidden_channels, out_channels, 1, bias=not norm),
            *([nn.BatchNorm2d(out_channels)] if norm else []),
            *([nn.ReLU6(inplace=True)] if activation == "relu6" else []),
        )

    def _expand(self) -> list[nn.Module]:
        """The expansion, if there is one."""
        first, second, *_ = self.conv
        return [first] if isinstance(second, nn.Sequential) else []

    def repack(self) -> None:
        """Packs the weights anew at the next call: for a write that PyTorch does not count (`.data`, a NumPy view)."""
        self._chain.forget()

    def why_not_fused(self, x: Tensor) -> str:
        """Why a call with x would now run layer by layer; "" when it would run as one op, in training too."""
        if not self.fused:
            return "the attribute `fused` is False"
        reason = self._chain.why_not(self, x)
        return reason and training.why_not(self._describe, [self.conv], x)

    def forward(self, x: Tensor) -> Tensor:
        y = self._chain(self, x) if self.fused else None
        if y is None and self.fused:
            y = training.run(self._describe, [self.conv], x)
        if y is not None:
            return y
        return x + self.conv(x) if self.use_res_connect else self.conv(x)

    def _describe(self) -> list[Stage]:
        return [network.block(self.conv, self.use_res_connect)]


def _describe_block(module: InvertedResidual) -> list[Stage]:
    return module._describe()


def _describe_rest(module: nn.Module) -> list[Stage]:
    return [network.block(module, False)]


def _does_more(block: InvertedResidual) -> bool:
    """Whether a call of the block does more than its layers do, and would be missed where it is run in pieces."""
    own = type(block) is not InvertedResidual or network.has_hooks(block) or network.has_hooks(block.conv)
    return own or network.global_hooks()


def _run_observed(block: InvertedResidual, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The block called as it is, and what its expansion and its depthwise convolution make, by those names."""
    pieces = ("expansion", "depthwise")[1 - len(block._expand()) :]
    inside: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda module, x, y, piece=piece: inside.update({piece: y}))
        for piece, layer in zip(pieces, block.conv, strict=False)
    ]
    try:
        return block(x), inside
    finally:
        for handle in handles:
            handle.remove()


# A part of `features`: the index of a module, and of a block that is cut in two which piece.
WHOLE, EXPAND, REST = "", "expand", "rest"
Unit = tuple[int, str]


def _describe_units(units: tuple[Unit, ...], model: MobileNet) -> list[Stage]:
    network.expect(not model._wide, "shortcuts between expansions")
    stages = []
    for index, piece in units:
        module = model.features[index]
        if piece == EXPAND:
            stages.append(network.pointwise(module.conv[0]))
        elif piece == REST:
            stages.append(network.block(module.conv[1:], False))
        elif isinstance(module, InvertedResidual):
            network.expect(type(module) is InvertedResidual, f"{type(module)} where an InvertedResidual was expected")
            stages += _describe_block(module)
        else:
            stages.append(network.stem(module) if index == 0 else network.pointwise(module))
    return stages


def _describe_features(model: MobileNet) -> list[Stage]:
    network.expect(len(model.features) >= 2, "features of less than two modules")
    return _describe_units(model._units(len(model.features)), model)


def _describe_network(model: MobileNet) -> list[Stage]:
    for name in ("forward_features", "forward_head"):
        own = name in model.__dict__ or getattr(type(model), name) is not getattr(MobileNet, name)
        network.expect(not own, f"the model has a {name} of its own")
    network.expect(model.classifier is not None, "there is no classifier")
    stages = _describe_features(model)
    stages.append(network.pool(stages[-1].layer.out_channels))
    if type(model.classifier) is nn.Identity:
        return stages
    return [*stages, network.classifier(model.classifier)]


class MobileNet(nn.Module):
    """What MobileNetV1 and MobileNetV2 have in common: `features`, the mean over the last map, `classifier`.

    `features` are a 3x3 convolution of stride 2, blocks, and for some a 1x1 convolution. In eval mode without gradients
    the whole network is one op call on packed weights, which follow every change of the parameters; where that cannot
    be (`why_not_fused`), it runs block by block or layer by layer.

    Args:
        stem_channels: of the first convolution.
        blocks: (out_channels, stride, options) of each, options being further arguments of InvertedResidual.
        head_channels: of the last convolution; None leaves it out.
        **options: as of MobileNetV2.
    """

    _wide = False  # shortcuts are between expansions

    def __init__(
        self,
        stem_channels: int,
        blocks: Iterable[tuple[int, int, dict[str, Any]]],
        head_channels: int | None,
        *,
        num_classes: int,
        dropout: float,
        in_channels: int,
        output_stride: int | None,
        padding: str,
        features_only: bool,
        out_indices: Sequence[int] | None,
    ) -> None:
        super().__init__()
        if output_stride not in (None, 2, 4, 8, 16, 32):
            raise ValueError(f"output_stride should be 2, 4, 8, 16 or 32, got {output_stride}")
        if out_indices is not None and not features_only:
            raise ValueError("out_indices choose maps of a model with features_only=True")
        features: list[nn.Module] = [conv_bn_relu6(in_channels, stem_channels, 3, stride=2, padding=padding)]
        channels, reduction, rate = stem_channels, 2, 1
        self.feature_info: list[dict[str, Any]] = []
        for out_channels, stride, options in blocks:
            if stride == 2 and len(features) > 1:
                self._end_stage(features, channels, reduction)
            dilation = rate
            if stride == 2 and reduction == output_stride:  # this block keeps the dilation of those before
                stride, rate = 1, rate * stride
            options = dict(dilation=dilation, padding=padding, **options)
            features.append(InvertedResidual(channels, out_channels, stride, **options))
            reduction *= stride
            channels = out_channels
        self._end_stage(features, channels, reduction)
        self.num_features = channels if head_channels is None else head_channels
        if head_channels is not None:
            features.append(conv_bn_relu6(channels, head_channels, 1))
        self._maps: list[int] | None = None
        if features_only:
            chosen = range(len(self.feature_info)) if out_indices is None else out_indices
            if not chosen or any(i not in range(len(self.feature_info)) for i in chosen):
                raise ValueError(f"out_indices should be some of 0 to {len(self.feature_info) - 1}, got {out_indices}")
            self.feature_info = [self.feature_info[i] for i in sorted(chosen)]
            self._maps = [int(info["module"].removeprefix("features.")) for info in self.feature_info]
            features, self.num_features = features[: self._maps[-1] + 1], self.feature_info[-1]["num_chs"]
            num_classes = 0

        self.in_channels = in_channels
        self.dropout = dropout
        self.num_classes = num_classes
        self._chain = FusedChain(("features", "classifier"), _describe_network)
        self._chains: dict[tuple[Unit, ...], FusedChain] = {}  # of parts of the features
        self.features = nn.Sequential(*features)
        self.fused = True
        self.classifier = self._make_classifier(num_classes)
        self._init_weights()

    def _end_stage(self, features: list[nn.Module], channels: int, reduction: int) -> None:
        name = f"features.{len(features) - 1}"
        self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=name))

    def _make_classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return nn.Sequential(nn.Dropout(self.dropout), nn.Linear(self.num_features, num_classes))

    @property
    def padding(self) -> str:
        """As of MobileNetV2. Setting it changes the convolutions in place: what follows other weights than before."""
        return "same" if any(type(module) is Conv2dSame for module in self.features.modules()) else "symmetric"

    @padding.setter
    def padding(self, value: str) -> None:
        if value not in ("symmetric", "same"):
            raise ValueError(f"padding should be 'symmetric' or 'same', got {value!r}")
        for module in self.features.modules():
            if type(module) in (nn.Conv2d, Conv2dSame) and module.kernel_size == (3, 3):
                module.__class__ = Conv2dSame if value == "same" else nn.Conv2d
        self.repack()

    @property
    def norm_eps(self) -> float:
        """What every BatchNorm adds to the variance."""
        return next(module.eps for module in self.features.modules() if isinstance(module, nn.BatchNorm2d))

    @norm_eps.setter
    def norm_eps(self, value: float) -> None:
        for module in self.features.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eps = value

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                _init_linear(module)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a freshly initialised one of `num_classes`, or by none (0).

        Raises:
            ValueError: the model has no classifier, as its maps are the result (features_only).
        """
        if self._maps is not None:
            raise ValueError("a model with features_only=True has no classifier")
        like = next(self.features.parameters())
        self.num_classes = num_classes
        self.classifier = self._make_classifier(num_classes).to(like.device, like.dtype).train(self.training)
        for module in self.classifier.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [N, num_features, ceil(H/32), ceil(W/32)] with the paper's strides."""
        return self._run(self._units(len(self.features)), x)

    def forward_intermediates(self, x: Tensor, indices: Sequence[int | str]) -> list[Tensor]:
        """Maps from inside the features, in the order of `indices`; what comes after the last of them is not computed.

        Args:
            x: [N, in_channels, H, W].
            indices: 0 to 18 (of the paper's network): the output of that module of `features`; or of a block
                "14.expansion", what its depthwise convolution reads (after BatchNorm and ReLU6; SSDLite's first map),
                or "4.depthwise", what its projection reads. A block whose "depthwise" is asked for runs layer by layer,
                and so does one that has hooks, or a forward of its own, and of which a piece is asked for.

        Raises:
            ValueError: there is no such place.
        """
        if self._wide:
            raise ValueError("a network with shortcut='expansion' gives no maps from inside")
        taps = [self._parse_tap(index) for index in indices]
        if not taps:
            raise ValueError("indices should name at least one map")
        wanted, found = set(taps), {}
        pending: list[Unit] = []

        def flush() -> None:
            nonlocal x, pending
            x, pending = self._run(tuple(pending), x), []

        for index in range(max(index for index, _ in taps) + 1):
            block = self.features[index]
            pieces = {piece for i, piece in wanted if i == index and piece}
            if pieces == {"expansion"} and not block.use_res_connect and not _does_more(block):
                pending.append((index, EXPAND))
                flush()
                found[index, "expansion"] = x
                pending.append((index, REST))
            elif pieces and _does_more(block):
                flush()
                x, inside = _run_observed(block, x)
                found |= {(index, piece): inside[piece] for piece in pieces}
            elif pieces:
                flush()
                h = self._run(((index, EXPAND),), x) if len(block._expand()) else x
                found[index, "expansion"] = h
                if "depthwise" in pieces:
                    _, depthwise, *rest = [None] * (1 - len(block._expand())) + list(block.conv)
                    found[index, "depthwise"] = h = depthwise(h)
                    for module in rest:
                        h = module(h)
                else:
                    h = self._run(((index, REST),), h)
                x = x + h if block.use_res_connect else h
            else:
                pending.append((index, WHOLE))
            if (index, "") in wanted:
                flush()
                found[index, ""] = x
        return [found[tap] for tap in taps]

    def _parse_tap(self, index: int | str) -> tuple[int, str]:
        number, _, piece = str(index).partition(".")
        known = number.isdecimal() and int(number) < len(self.features) and piece in ("", "expansion", "depthwise")
        block = self.features[int(number)] if known else None
        if not known or (piece and not isinstance(block, InvertedResidual)):
            raise ValueError(
                f"indices should be 0 to {len(self.features) - 1}, or of a block 'i.expansion' or 'i.depthwise', "
                f"got {index!r}"
            )
        if piece == "expansion" and not block._expand():
            raise ValueError(f"features.{number} has no expansion")
        return int(number), piece

    def _units(self, stop: int) -> tuple[Unit, ...]:
        return tuple((index, WHOLE) for index in range(stop))

    def _run(self, units: tuple[Unit, ...], x: Tensor) -> Tensor:
        """Consecutive parts of the features: as one op, or each as one, or layer by layer."""
        if not units:
            return x
        if self.fused and not is_compiling():  # the compiler sees blocks, and cannot make a chain
            if units not in self._chains:
                self._chains[units] = FusedChain(("features",), partial(_describe_units, units))
            y = self._chains[units](self, x)
            if y is not None:
                return y
        whole = units == self._units(len(self.features))
        hooked = network.has_hooks(self.features) or type(self.features) is not nn.Sequential
        if self._wide:
            return self._run_wide(units, x)
        if whole and (not self.fused or hooked):
            return self.features(x)
        for index, piece in units:
            x = self._run_unit(self.features[index], piece, x)
        return x

    def _run_wide(self, units: tuple[Unit, ...], x: Tensor) -> Tensor:
        """With shortcuts from each expansion to the next of the same shape."""
        before = None
        for index, _ in units:
            module = self.features[index]
            if not isinstance(module, InvertedResidual) or not module._expand():
                x, before = self._run_unit(module, WHOLE, x), None
                continue
            h = self._run_unit(module, EXPAND, x)
            h = h if before is None or before.shape != h.shape else h + before
            x, before = self._run_unit(module, REST, h), h if module.stride == 1 else None
        return x

    def _run_unit(self, module: nn.Module, piece: str, x: Tensor) -> Tensor:
        y = None
        if piece == REST:
            module = module.conv[1:]
            y = training.run(partial(_describe_rest, module), [module], x) if self.fused else None
        else:
            module = module.conv[0] if piece == EXPAND else module
            if self.fused and not isinstance(module, InvertedResidual):
                y = training.run(partial(network.convolution, module), [module], x)
        return module(x) if y is None else y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average pool of a feature map, then the classifier unless `pre_logits`."""
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return x if pre_logits else self.classifier(x)

    @property
    def fused(self) -> bool:
        """Whether the network may run fused; False makes it, and its blocks, the composition of their modules."""
        return self._fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self._fused = value
        for module in self.features.modules():
            if isinstance(module, InvertedResidual):
                module.fused = value

    def repack(self) -> None:
        """Packs the weights anew at the next call: for a write that PyTorch does not count (`.data`, a NumPy view)."""
        self._chain.forget()
        for chain in self._chains.values():
            chain.forget()
        for module in self.features.modules():
            if isinstance(module, InvertedResidual):
                module.repack()

    def unfused(self, x: Tensor) -> dict[str, str]:
        """The parts of the network that a call with x would now run layer by layer, and why; {} when all is fused.

        All is fused where the network runs as one op, and in training where every block, the stem and the head do.
        """
        if not self.fused:
            return {"": "the attribute `fused` is False"}
        if not self._chain.why_not(self, x):
            return {}
        if reason := network.why_no_op(x):
            return {"": reason}
        reasons = {"features": "hooks or a forward of its own"} if network.has_hooks(self.features) else {}
        requires_grad, channels, dtype = x.requires_grad, x.shape[1], x.dtype
        for name, module in self.features.named_children():
            given = x.new_empty(x.shape[0], channels, 1, 1, dtype=dtype).requires_grad_(requires_grad)
            if isinstance(module, InvertedResidual):
                reason, channels = module.why_not_fused(given), module.out_channels
            else:
                reason = training.why_not(partial(network.convolution, module), [module], given)
                channels = getattr(next(module.children(), None), "out_channels", channels)
            if reason:
                reasons[f"features.{name}"] = reason
            dtype = network.arithmetic(given).dtype
            requires_grad |= torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        return reasons

    def why_not_fused(self, x: Tensor) -> str:
        """Why a call with x would now not run as one op; "" when it would run as one. In training see `unfused`."""
        return self._chain.why_not(self, x) if self.fused else "the attribute `fused` is False"

    def layer_seconds(self, x: Tensor) -> list[tuple[Layer, int, float]]:
        """Where the time of a fused call in eval mode goes: layers, their multiply-adds, seconds of the first thread.

        x is [N, in_channels, H, W] on the CPU; the layers are those of `features`, the pooling and the classifier.
        Where several are computed as one (stem and first block, head and pooling), the seconds stand with the last.

        Raises:
            RuntimeError: the call would not run as one op, or not on the CPU.
        """
        if not self.fused:
            raise RuntimeError("no times by layer: the attribute `fused` is False")
        return self._chain.seconds(self, x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self._maps is not None:
            return self.forward_intermediates(x, self._maps)
        y = self._chain(self, x) if self._fused else None
        return self.forward_head(self.forward_features(x)) if y is None else y


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MobileNetV2(MobileNet, PyTorchModelHubMixin, library_name="mnv2_fused", tags=["mobilenet_v2"]):
    """MobileNetV2: images [N, in_channels, H, W] -> logits [N, num_classes], any H, W >= 1.

    The state dict is torchvision's, key for key, and so are rounding and initialisation: one seed gives both the same
    weights. In eval mode without gradients the whole network is one op call: see MobileNet.

    Args:
        num_classes: width of the classifier; 0 leaves it out, the result is then the pooled features [N, num_features].
        width_mult: factor on every width, the last (1280) is only ever enlarged (section 4 of the paper).
        inverted_residual_setting: rows (t, c, n, s) in place of the paper's Table 2.
        round_nearest: every width is rounded to a multiple of this.
        dropout: probability of the dropout before the classifier.
        in_channels: channels of the image.
        output_stride: by how much the last map is smaller than the image at most, 2 to 32, by default as the strides
            have it (32): where a block would exceed it, its stride is left out and the blocks after it are dilated
            (the reference's `output_stride`: tensorflow/models, research/slim/nets/mobilenet/mobilenet.py).
        padding: "symmetric" as in PyTorch's models, or "same" as in TensorFlow's, whose weights want it.
        features_only: leaves out head and classifier; the result is a list of maps, finest first, those of the last
            block of every resolution (16, 24, 32, 96 and 320 channels; `feature_info` says which). As timm's.
        out_indices: which of those maps, by default all; blocks after the last of them are left out.
        bottleneck_activation: after every projection, "linear" or "relu6" (figure 6a of the paper).
        shortcut: what is added where shapes allow it (figure 6b): "bottleneck", a block's input to its output;
            "expansion", the expansion of a block to that of the next one; or "none".
        norm_eps: of every BatchNorm; 0.001 in TensorFlow.
        image_mean, image_std: by channel, of the normalisation that the weights expect of images in 0 to 1. The network
            does not do it; attributes of these names tell those who prepare images.

    Raises:
        ValueError: inverted_residual_setting is empty, or a row of it is not four numbers, or a stride not 1 or 2;
            output_stride, padding, out_indices, bottleneck_activation or shortcut are none of those.

    `from_pretrained`, `save_pretrained` and `push_to_hub` are huggingface_hub's (the extra `hub`).
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        dropout: float = 0.2,
        in_channels: int = 3,
        *,
        output_stride: int | None = None,
        padding: str = "symmetric",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        bottleneck_activation: str = "linear",
        shortcut: str = "bottleneck",
        norm_eps: float = 1e-5,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if shortcut not in ("bottleneck", "expansion", "none"):
            raise ValueError(f"shortcut should be 'bottleneck', 'expansion' or 'none', got {shortcut!r}")
        setting = INVERTED_RESIDUAL_SETTING if inverted_residual_setting is None else inverted_residual_setting
        if len(setting) == 0 or not all(_is_row(row) for row in setting):
            raise ValueError(f"inverted_residual_setting should be non-empty rows of (t, c, n, s), got {setting}")
        options = dict(activation=bottleneck_activation, shortcut=shortcut == "bottleneck")
        super().__init__(
            make_divisible(STEM_CHANNELS * width_mult, round_nearest),
            [
                (make_divisible(c * width_mult, round_nearest), s if i == 0 else 1, dict(expand_ratio=t, **options))
                for t, c, n, s in setting
                for i in range(n)
            ],
            make_divisible(HEAD_CHANNELS * max(1.0, width_mult), round_nearest),
            num_classes=num_classes,
            dropout=dropout,
            in_channels=in_channels,
            output_stride=output_stride,
            padding=padding,
            features_only=features_only,
            out_indices=out_indices,
        )
        self._wide = shortcut == "expansion"
        rows = inverted_residual_setting
        self._arguments = dict(
            width_mult=width_mult, inverted_residual_setting=rows and [list(row) for row in rows],
            round_nearest=round_nearest,
            output_stride=output_stride, features_only=features_only, out_indices=out_indices,
            bottleneck_activation=bottleneck_activation, shortcut=shortcut,
        )  # fmt: skip
        self.norm_eps = norm_eps
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that make a network like this one, as it is now; of what JSON can hold."""
        now = ("num_classes", "dropout", "in_channels", "padding", "norm_eps", "image_mean", "image_std")
        found = self._arguments | {name: getattr(self, name) for name in now}
        lists = {
            name: list(value) for name, value in found.items() if isinstance(value, Sequence) and value != str(value)
        }
        return found | lists

    def save_pretrained(self, save_directory: str | os.PathLike, *, config: Any = None, **kwargs: Any) -> str | None:
        """Writes model.safetensors, config.json and a model card into a folder; see huggingface_hub's mixin."""
        return super().save_pretrained(save_directory, config=self.config if config is None else config, **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | os.PathLike | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **arguments: Any,
    ) -> MobileNetV2:
        """Of a folder or a repository: ours, or one of timm or transformers, whose config.json says something else."""
        from . import weights  # which makes networks of this class

        folder = model_id
        if not os.path.isdir(folder):
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, force_download=force_download, token=token,
                local_files_only=local_files_only, allow_patterns=["*.json", "model.safetensors"],
            )  # fmt: skip
        return weights.load_folder(cls, folder, arguments, strict=strict).to(map_location)


def mobilenet_v2(**kwargs: Any) -> MobileNetV2:
    """`MobileNetV2(**kwargs)`, by the name under which model zoos list it."""
    return MobileNetV2(**kwargs)
