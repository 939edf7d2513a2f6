"""MobileNetV2 (Sandler et al., CVPR 2018) with torchvision's state dict: modules, rounding, initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import network, training
from .network import FusedChain, Stage

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


def _conv_bn_relu6(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False),
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

    Raises:
        ValueError: stride is neither 1 nor 2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: float) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride should be 1 or 2, got {stride}")
        hidden_channels = round(in_channels * expand_ratio)
        self.stride = stride
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.use_res_connect = stride == 1 and in_channels == out_channels
        self._is_cn = stride > 1
        expand = [] if expand_ratio == 1 else [_conv_bn_relu6(in_channels, hidden_channels, 1)]
        self.fused = True
        self._chain = FusedChain(("conv",), _describe_block)
        self.conv = nn.Sequential(
            *expand,
            _conv_bn_relu6(hidden_channels, hidden_channels, 3, stride, groups=hidden_channels),
            nn.Conv2d(hidden_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def repack(self) -> None:
        """Packs the weights anew at the next call: for a write that PyTorch does not count (`.data`, a NumPy view)."""
        self._chain.forget()

    def why_not_fused(self, x: Tensor) -> str:
        """Why a call with x would now run layer by layer; "" when it would run as one op, in training too."""
        if not self.fused:
            return "the attribute `fused` is False"
        reason = self._chain.why_not(self, x)
        return reason and training.why_not(self.conv, x, self.use_res_connect)

    def forward(self, x: Tensor) -> Tensor:
        y = self._chain(self, x) if self.fused else None
        if y is None and self.fused:
            y = training.run_block(self.conv, x, self.use_res_connect)
        if y is not None:
            return y
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def _describe_block(module: InvertedResidual) -> list[Stage]:
    return [network.block(module.conv, module.use_res_connect)]


def _describe_features(model: MobileNetV2) -> list[Stage]:
    network.expect(len(model.features) >= 2, "features without a stem and a head")
    first, *blocks, last = model.features
    for block in blocks:
        network.expect(type(block) is InvertedResidual, f"{type(block)} where an InvertedResidual was expected")
    return [network.stem(first), *(_describe_block(block)[0] for block in blocks), network.pointwise(last)]


def _describe_network(model: MobileNetV2) -> list[Stage]:
    for name in ("forward_features", "forward_head"):
        own = name in model.__dict__ or getattr(type(model), name) is not getattr(MobileNetV2, name)
        network.expect(not own, f"the model has a {name} of its own")
    network.expect(model.classifier is not None, "there is no classifier")
    stages = [*_describe_features(model), network.pool(model.features[-1][0].out_channels)]
    if type(model.classifier) is nn.Identity:
        return stages
    return [*stages, network.classifier(model.classifier)]


class MobileNetV2(nn.Module):
    """MobileNetV2: images [N, in_channels, H, W] -> logits [N, num_classes], any H, W >= 1.

    The state dict is torchvision's, key for key, and so are rounding and initialisation: one seed gives both the same
    weights. In eval mode without gradients the whole network is one op call on packed weights, which follow every
    change of the parameters; where that cannot be (`why_not_fused`), it runs block by block or layer by layer.

    Args:
        num_classes: width of the classifier; 0 leaves it out, the result is then the pooled features [N, num_features].
        width_mult: factor on every width, the last (1280) is only ever enlarged (section 4 of the paper).
        inverted_residual_setting: rows (t, c, n, s) in place of the paper's Table 2.
        round_nearest: every width is rounded to a multiple of this.
        dropout: probability of the dropout before the classifier.
        in_channels: channels of the image.

    Raises:
        ValueError: inverted_residual_setting is empty, or a row of it is not four numbers, or a stride not 1 or 2.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        inverted_residual_setting: Sequence[Sequence[int]] | None = None,
        round_nearest: int = 8,
        dropout: float = 0.2,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        setting = INVERTED_RESIDUAL_SETTING if inverted_residual_setting is None else inverted_residual_setting
        if len(setting) == 0 or not all(_is_row(row) for row in setting):
            raise ValueError(f"inverted_residual_setting should be non-empty rows of (t, c, n, s), got {setting}")

        channels = make_divisible(STEM_CHANNELS * width_mult, round_nearest)
        features: list[nn.Module] = [_conv_bn_relu6(in_channels, channels, 3, stride=2)]
        for t, c, n, s in setting:
            out_channels = make_divisible(c * width_mult, round_nearest)
            for i in range(n):
                features.append(InvertedResidual(channels, out_channels, s if i == 0 else 1, t))
                channels = out_channels
        self.num_features = make_divisible(HEAD_CHANNELS * max(1.0, width_mult), round_nearest)
        features.append(_conv_bn_relu6(channels, self.num_features, 1))

        self.in_channels = in_channels
        self.dropout = dropout
        self.num_classes = num_classes
        self._chain = FusedChain(("features", "classifier"), _describe_network)
        self._features_chain = FusedChain(("features",), _describe_features)
        self.features = nn.Sequential(*features)
        self.fused = True
        self.classifier = self._make_classifier(num_classes)
        self._init_weights()

    def _make_classifier(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return nn.Sequential(nn.Dropout(self.dropout), nn.Linear(self.num_features, num_classes))

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                _init_linear(module)

    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the classifier by a freshly initialised one of `num_classes`, or by none (0)."""
        like = next(self.features.parameters())
        self.num_classes = num_classes
        self.classifier = self._make_classifier(num_classes).to(like.device, like.dtype).train(self.training)
        for module in self.classifier.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [N, num_features, ceil(H/32), ceil(W/32)] with the paper's strides."""
        y = self._features_chain(self, x) if self.fused else None
        if y is not None:
            return y
        if not self.fused or training.has_hooks(self.features) or type(self.features) is not nn.Sequential:
            return self.features(x)
        for module in self.features:
            y = None if isinstance(module, InvertedResidual) else training.run_conv_bn_relu6(module, x)
            x = module(x) if y is None else y
        return x

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
        self._features_chain.forget()
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
        reasons = {"features": "hooks or a forward of its own"} if training.has_hooks(self.features) else {}
        requires_grad, channels, dtype = x.requires_grad, x.shape[1], x.dtype
        for name, module in self.features.named_children():
            given = x.new_empty(x.shape[0], channels, 1, 1, dtype=dtype).requires_grad_(requires_grad)
            if isinstance(module, InvertedResidual):
                reason, channels = module.why_not_fused(given), module.out_channels
            else:
                reason = training.why_not_conv_bn_relu6(module, given)
                channels = getattr(next(module.children(), None), "out_channels", channels)
            if reason:
                reasons[f"features.{name}"] = reason
            dtype = network.arithmetic(given).dtype
            requires_grad |= torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
        return reasons

    def why_not_fused(self, x: Tensor) -> str:
        """Why a call with x would now not run as one op; "" when it would run as one. In training see `unfused`."""
        return self._chain.why_not(self, x) if self.fused else "the attribute `fused` is False"

    def forward(self, x: Tensor) -> Tensor:
        y = self._chain(self, x) if self.fused else None
        return self.forward_head(self.forward_features(x)) if y is None else y


def mobilenet_v2(**kwargs: Any) -> MobileNetV2:
    """`MobileNetV2(**kwargs)`, by the name under which model zoos list it."""
    return MobileNetV2(**kwargs)
