"""MobileNetV2 as the libraries that people have write it: stand-ins with their module trees and forwards, and the real
ones where they are installed.

The stand-ins are in our words; `test_stand_ins` compares their keys and results with the real ones'. How to install
those beside a CPU-only torch stands in README.md.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from mnv2_fused.mobilenet_v2 import INVERTED_RESIDUAL_SETTING, make_divisible


def rows(width_mult: float) -> list[tuple[int, int, int, int, int]]:
    """(stage, expansion, in, out, stride) of the 17 blocks."""
    channels, found = make_divisible(32 * width_mult, 8), []
    for stage, (t, c, n, s) in enumerate(INVERTED_RESIDUAL_SETTING):
        for i in range(n):
            out = make_divisible(c * width_mult, 8)
            found.append((stage, t, channels, out, s if i == 0 else 1))
            channels = out
    return found


def head_of(width_mult: float) -> int:
    return make_divisible(1280 * max(1.0, width_mult), 8)


# ------------------------------------------------------------------------------------------------------ torchvision


def conv_norm_activation(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1):
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6(inplace=True))


class TorchvisionBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        self.stride, self.use_res_connect = stride, stride == 1 and in_channels == out_channels
        self.out_channels, self._is_cn = out_channels, stride > 1
        self.conv = nn.Sequential(
            *([conv_norm_activation(in_channels, hidden, 1)] if expand_ratio != 1 else []),
            conv_norm_activation(hidden, hidden, 3, stride, hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class TorchvisionMobileNetV2(nn.Module):
    def __init__(self, width_mult: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        blocks = rows(width_mult)
        self.last_channel = head_of(width_mult)
        self.features = nn.Sequential(
            conv_norm_activation(3, blocks[0][2], 3, 2),
            *(TorchvisionBlock(i, o, s, t) for _, t, i, o, s in blocks),
            conv_norm_activation(blocks[-1][3], self.last_channel, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.last_channel, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


# ------------------------------------------------------------------------------------------------------------- timm


class BatchNormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation as a child, and a forward in functions."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, factor, self.eps)
        return self.act(self.drop(x))


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)


class TimmBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int, drop_path: float) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_pw = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = BatchNormAct(hidden)
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = BatchNormAct(hidden)
        self.aa, self.se = nn.Identity(), nn.Identity()
        self.conv_pwl = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = BatchNormAct(out_channels, act=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.bn1(self.conv_pw(x))
        x = self.se(self.aa(self.bn2(self.conv_dw(x))))
        x = self.bn3(self.conv_pwl(x))
        return self.drop_path(x) + shortcut if self.has_skip else x


class TimmSeparable(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.has_skip = in_channels == out_channels
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, 1, 1, groups=in_channels, bias=False)
        self.bn1 = BatchNormAct(in_channels)
        self.aa, self.se = nn.Identity(), nn.Identity()
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = BatchNormAct(out_channels, act=False)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.se(self.aa(self.bn1(self.conv_dw(x))))
        x = self.bn2(self.conv_pw(x))
        return self.drop_path(x) + shortcut if self.has_skip else x


class TimmMobileNetV2(nn.Module):
    """`maps` makes it what features_only=True gives: no head, the stages' maps as a list."""

    def __init__(
        self, width_mult: float = 1.0, num_classes: int = 1000, drop_path: float = 0.0, maps: bool = False
    ) -> None:
        super().__init__()
        blocks, self.maps = rows(width_mult), maps
        self.conv_stem = nn.Conv2d(3, blocks[0][2], 3, 2, 1, bias=False)
        self.bn1 = BatchNormAct(blocks[0][2])
        stages: list[list[nn.Module]] = [[] for _ in INVERTED_RESIDUAL_SETTING]
        for stage, t, i, o, s in blocks:
            stages[stage].append(TimmSeparable(i, o) if t == 1 else TimmBlock(i, o, s, t, drop_path))
        self.blocks = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))
        if not maps:
            self.conv_head = nn.Conv2d(blocks[-1][3], head_of(width_mult), 1, bias=False)
            self.bn2 = BatchNormAct(head_of(width_mult))
            self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
            self.classifier = nn.Linear(head_of(width_mult), num_classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.bn1(self.conv_stem(x))
        if self.maps:
            found = []
            for stage in self.blocks:
                x = stage(x)
                found.append(x)
            return [found[i] for i in (0, 1, 2, 4, 6)]
        x = self.global_pool(self.bn2(self.conv_head(self.blocks(x))))
        return self.classifier(x)


# ----------------------------------------------------------------------------------------------------- transformers


@dataclass
class Config:
    depth_multiplier: float = 1.0
    tf_padding: bool = True
    output_stride: int = 32
    output_hidden_states: bool = False
    num_labels: int = 1001


class Output(OrderedDict):
    """A dictionary whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: Output(zip(keys, values, strict=True)),
    serialized_type_name="zoo.Output",
)


class TransformersConv(nn.Module):
    def __init__(
        self, config: Config, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1,
        dilation: int = 1, act: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        padding = 0 if config.tf_padding else kernel // 2 * dilation
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, groups=groups, dilation=dilation, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels, eps=0.001, momentum=0.997)
        self.activation = nn.ReLU6() if act else None

    def forward(self, x: Tensor) -> Tensor:
        if self.config.tf_padding:
            (stride, _), (kernel, _), (dilation, _) = (
                self.convolution.stride,
                self.convolution.kernel_size,
                self.convolution.dilation,
            )
            pads = []
            for size in (int(x.shape[-1]), int(x.shape[-2])):
                total = max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)
                pads += [total // 2 * dilation, (total - total // 2) * dilation]
            x = F.pad(x, pads, "constant", 0.0)
        x = self.normalization(self.convolution(x))
        return x if self.activation is None else self.activation(x)


class TransformersBlock(nn.Module):
    def __init__(self, config: Config, in_channels: int, out_channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.use_residual = stride == 1 and in_channels == out_channels
        hidden = in_channels * 6
        self.expand_1x1 = TransformersConv(config, in_channels, hidden, 1)
        self.conv_3x3 = TransformersConv(config, hidden, hidden, 3, stride, hidden, dilation)
        self.reduce_1x1 = TransformersConv(config, hidden, out_channels, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce_1x1(self.conv_3x3(self.expand_1x1(x)))
        return x + y if self.use_residual else y


class TransformersStem(nn.Module):
    def __init__(self, config: Config, channels: int, out_channels: int) -> None:
        super().__init__()
        self.first_conv = TransformersConv(config, 3, channels, 3, 2)
        self.conv_3x3 = TransformersConv(config, channels, channels, 3, 1, channels)
        self.reduce_1x1 = TransformersConv(config, channels, out_channels, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce_1x1(self.conv_3x3(self.first_conv(x)))


class TransformersBackbone(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        first, *blocks = rows(config.depth_multiplier)
        self.conv_stem = TransformersStem(config, first[2], first[3])
        self.layer = nn.ModuleList()
        reached, dilation = 2, 1
        for _, _, i, o, s in blocks:
            if reached == config.output_stride:
                self.layer.append(TransformersBlock(config, i, o, 1, dilation))
                dilation *= s
            else:
                self.layer.append(TransformersBlock(config, i, o, s, 1))
                reached *= s
        self.conv_1x1 = TransformersConv(config, blocks[-1][3], head_of(config.depth_multiplier), 1)
        self.pooler = nn.AdaptiveAvgPool2d((1, 1))

    def forward(self, pixel_values: Tensor) -> Output:
        x = self.conv_stem(pixel_values)
        states = []
        for layer in self.layer:
            x = layer(x)
            states.append(x)
        x = self.conv_1x1(x)
        result = Output(last_hidden_state=x, pooler_output=torch.flatten(self.pooler(x), 1))
        if self.config.output_hidden_states:
            result["hidden_states"] = tuple(states)
        return result


class TransformersMobileNetV2(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.mobilenet_v2 = TransformersBackbone(config)
        self.dropout = nn.Dropout(0.8, inplace=True)
        self.classifier = nn.Linear(head_of(config.depth_multiplier), config.num_labels)

    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None) -> Output:
        found = self.mobilenet_v2(pixel_values)
        result = Output(logits=self.classifier(self.dropout(found.pooler_output)))
        if labels is not None:
            result = Output(loss=F.cross_entropy(result.logits, labels), **result)
        if self.config.output_hidden_states:
            result["hidden_states"] = found.hidden_states
        return result


# ------------------------------------------------------------------------------------------------------------- flat


class FlatBlock(nn.Module):
    """Of tonylins/pytorch-mobilenet-v2 and d-li14/mobilenetv2.pytorch: one Sequential of single layers."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = in_channels * expand_ratio
        self.use_res_connect = stride == 1 and in_channels == out_channels
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers += [nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(
            *layers,
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class FlatMobileNetV2(nn.Module):
    """tonylins's, or with `head_apart` d-li14's, whose last convolution is no part of `features`."""

    def __init__(self, width_mult: float = 1.0, num_classes: int = 1000, head_apart: bool = False) -> None:
        super().__init__()
        blocks = rows(width_mult)
        features = [conv_norm_activation(3, blocks[0][2], 3, 2), *(FlatBlock(i, o, s, t) for _, t, i, o, s in blocks)]
        head = conv_norm_activation(blocks[-1][3], head_of(width_mult), 1)
        self.features = nn.Sequential(*features, *([] if head_apart else [head]))
        self.conv = head if head_apart else nn.Identity()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1)) if head_apart else None
        self.classifier = nn.Linear(head_of(width_mult), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.features(x))
        if self.avgpool is None:
            return self.classifier(x.mean(3).mean(2))
        return self.classifier(self.avgpool(x).view(x.size(0), -1))


# ------------------------------------------------------------------------------------------------------------- all


@contextmanager
def _without_torchvision_kernels():
    """torchvision's own ops are missing beside a CPU-only torch that it was not built for; its models need none."""
    register = torch.library.register_fake

    def skip(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    torch.library.register_fake = skip
    try:
        yield
    finally:
        torch.library.register_fake = register


def library(name: str) -> Any:
    """A module of one of the real libraries; skips the test where it is not installed."""
    try:
        with _without_torchvision_kernels():
            importlib.import_module("torchvision")
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed ({error}); README.md says how")


def _transformers(**options: Any) -> nn.Module:
    module = library("transformers")
    config = module.MobileNetV2Config(num_labels=1001, **options)
    return module.MobileNetV2ForImageClassification(config)


@dataclass(frozen=True)
class Net:
    """A network of some library, at any width: a stand-in, and the real one."""

    name: str
    stand_in: Callable[[float], nn.Module]
    real: Callable[[float], nn.Module] | None = None
    parts: int = 19  # modules that are fused beside the whole: blocks, stem and head; transformers has two in one
    whole: bool = True  # it is one chain of layers


def logits_of(result: Any) -> Tensor:
    """The tensor to compare, of what any of the networks returns."""
    result = getattr(result, "logits", result)
    return torch.cat([t.flatten(1) for t in result], 1) if isinstance(result, list) else result


def with_statistics(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Random scales and shifts, and the running statistics of the images; in eval mode."""
    torch.manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(1, 0.3)
            norm.momentum = 1.0
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def _timm_name(width: float) -> str:
    return f"mobilenetv2_{round(width * 100):03d}"


NETS = [
    Net(
        "torchvision", TorchvisionMobileNetV2,
        lambda w: library("torchvision").models.mobilenet_v2(width_mult=w),
    ),
    Net("timm", TimmMobileNetV2, lambda w: library("timm").create_model(_timm_name(w)), parts=17),
    Net(
        "timm features_only", lambda w: TimmMobileNetV2(w, maps=True),
        lambda w: library("timm").create_model(_timm_name(w), features_only=True), parts=17, whole=False,
    ),
    Net(
        "transformers", lambda w: TransformersMobileNetV2(Config(w)),
        lambda w: _transformers(depth_multiplier=w), parts=18,
    ),
    Net(
        "transformers dilated", lambda w: TransformersMobileNetV2(Config(w, tf_padding=False, output_stride=8)),
        lambda w: _transformers(depth_multiplier=w, tf_padding=False, output_stride=8), parts=18,
    ),
    Net("tonylins", FlatMobileNetV2),
    Net("d-li14", lambda w: FlatMobileNetV2(w, head_apart=True)),
]  # fmt: skip
