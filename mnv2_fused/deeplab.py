"""Mobile DeepLabv3 (section 6.3 and table 7 of the paper): a label for every pixel, on a MobileNet's last map.

Source: tensorflow/models, research/deeplab/model.py; DeepLabv3 is Chen et al., arXiv:1706.05587.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import network
from .mobilenet_v2 import MobileNet, MobileNetV2

HEAD_CHANNELS = 256
IGNORE_LABEL = 255  # of PASCAL VOC's borders and Cityscapes' void: such pixels have no part in the loss
# Dilation of the 3x3 convolutions of atrous spatial pyramid pooling, by output stride: the same reach on the image.
ASPP_RATES = {8: (12, 24, 36), 16: (6, 12, 18)}
VOC_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the rows MF of table 7, with `flip`


def _conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=True)


class DeepLabHead(nn.Module):
    """A map [N, in_channels, H, W] -> logits [N, num_classes, H, W].

    The map's mean through a 1x1 convolution, the map through another and through dilated 3x3 convolutions, all side by
    side into one 1x1 convolution, then the logits. While `fused` the mean's part of that convolution is computed once
    for an image, not for every pixel: the same sums in another order.

    Args:
        atrous_rates: dilation of each of the 3x3 convolutions.
        dropout: probability of the dropout before the logits.
    """

    def __init__(
        self, in_channels: int, num_classes: int, atrous_rates: Iterable[int] = (), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.fused = True
        self.pool = _conv_bn_relu(in_channels, HEAD_CHANNELS)
        branches = [_conv_bn_relu(in_channels, HEAD_CHANNELS)]
        branches += [_conv_bn_relu(in_channels, HEAD_CHANNELS, 3, rate) for rate in atrous_rates]
        self.branches = nn.ModuleList(branches)
        self.project = _conv_bn_relu(HEAD_CHANNELS * (1 + len(branches)), HEAD_CHANNELS)
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Conv2d(HEAD_CHANNELS, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.logits.weight, std=0.01)
        nn.init.zeros_(self.logits.bias)

    def _project(self, pooled: Tensor, maps: list[Tensor]) -> Tensor:
        conv, *rest = self.project
        seen = network.global_hooks() or network.has_hooks(conv) or network.has_hooks(self.project)
        if not self.fused or seen or type(conv) is not nn.Conv2d:
            return self.project(torch.cat([pooled.expand(-1, -1, *maps[0].shape[2:]), *maps], 1))
        x = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        of_mean, of_maps = conv.weight.split([pooled.shape[1], x.shape[1]], 1)
        x = F.conv2d(x, of_maps) + F.conv2d(pooled, of_mean, conv.bias)
        for module in rest:
            x = module(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(F.adaptive_avg_pool2d(x, 1))
        return self.logits(self.dropout(self._project(pooled, [branch(x) for branch in self.branches])))


class DeepLabV3(nn.Module):
    """Mobile DeepLabv3: images [N, in_channels, H, W] -> {"out": logits [N, num_classes, H, W]}, any H, W >= 1.

    Table 7's head on the last map of the backbone's blocks (320 channels of MobileNetV2): image pooling and a 1x1
    convolution, by argument also the dilated convolutions of ASPP. 2 113 557 parameters, with ASPP 4 523 541; 2.74
    billion multiply-adds at 513x513 (output stride 16), 8.83 (8) or 5.36 (16, ASPP; the paper's 5.8 counts pixels by
    which TensorFlow pads the map). The logits are enlarged bilinearly, corner on corner (align_corners=True), as in the
    reference. The result is that of torchvision's segmentation models, and so are the names `backbone` and
    `classifier`. In eval mode without gradients the backbone is one op call; the head's convolutions are PyTorch's.

    `mnv2_fused.segmentation_loss` is the loss of these logits, without the pixels of label 255. In training a batch
    needs two images or more: the image pooling leaves one value for each, and PyTorch's BatchNorm raises ValueError
    where that is the only one.

    Args:
        num_classes: 21 for PASCAL VOC, with the background.
        output_stride: 8 or 16, by how much the map is smaller than the image.
        aspp: adds three 3x3 convolutions to the head, of rates 6, 12, 18 for output stride 16 and 12, 24, 36 for 8.
        width_mult, padding, in_channels: of the backbone, as of MobileNetV2.
        dropout: probability of the dropout before the logits.
        backbone: MobileNetV2 or MobileNetV1 (table 7's first rows), or what else makes a MobileNet of their arguments.

    Raises:
        ValueError: output_stride or padding is none of those.
    """

    def __init__(
        self,
        num_classes: int = 21,
        output_stride: int = 16,
        aspp: bool = False,
        *,
        width_mult: float = 1.0,
        padding: str = "symmetric",
        dropout: float = 0.1,
        in_channels: int = 3,
        backbone: Callable[..., MobileNet] = MobileNetV2,
    ) -> None:
        super().__init__()
        if output_stride not in ASPP_RATES:
            raise ValueError(f"output_stride should be 8 or 16, got {output_stride}")
        self.in_channels = in_channels
        self.num_classes = num_classes
        options = dict(width_mult=width_mult, in_channels=in_channels, padding=padding, output_stride=output_stride)
        self.backbone = backbone(**options, features_only=True, out_indices=(4,))
        rates = ASPP_RATES[output_stride] if aspp else ()
        self.classifier = DeepLabHead(self.backbone.num_features, num_classes, rates, dropout)

    @property
    def fused(self) -> bool:
        """Whether backbone and head may run fused; False makes them the composition of their modules."""
        return self.backbone.fused

    @fused.setter
    def fused(self, value: bool) -> None:
        self.backbone.fused = self.classifier.fused = value

    def repack(self) -> None:
        """Packs the weights anew at the next call: for a write that PyTorch does not count (`.data`, a NumPy view)."""
        self.backbone.repack()

    def unfused(self, x: Tensor) -> dict[str, str]:
        """The parts of the backbone that a call with x would now run layer by layer, and why; {} when all is fused."""
        reasons = self.backbone.unfused(x)
        return {f"backbone.{name}".removesuffix("."): reason for name, reason in reasons.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self._logits(x, x.shape[2:])}

    def _logits(self, x: Tensor, size: Sequence[int], *, flip: bool = False) -> Tensor:
        (features,) = self.backbone(x)
        logits = self.classifier(features)
        return _resize(logits.flip(3) if flip else logits, size)

    @torch.no_grad()
    def predict(self, images: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False) -> Tensor:
        """Class probabilities of every pixel, the mean over the scales, and over the mirrored images where `flip`.

        As the reference's predict_labels_multi_scale: the image is resized to int((n - 1) * scale + 1) pixels, the
        logits to those of the image, then comes the softmax. (Logits of a scale below 1 are enlarged in one step where
        the reference takes two, by way of the map of scale 1.) `VOC_SCALES` and `flip` are table 7's.

        Args:
            images: [N, in_channels, H, W].
            scales: one or more, positive.
            flip: also mirrors each image from left to right.

        Returns:
            [N, num_classes, H, W], without gradients; argmax(1) are the labels.

        Raises:
            ValueError: scales is empty or one of them not positive.
            RuntimeError: the model is in training mode.
        """
        if len(scales) == 0 or not all(scale > 0 for scale in scales):
            raise ValueError(f"scales should be one or more positive numbers, got {scales}")
        if self.training:
            raise RuntimeError("predict needs the model in eval mode: call eval() first")
        size = images.shape[2:]
        total = 0
        for scale in scales:
            scaled = [int((n - 1) * scale + 1) for n in size]
            x = images if scaled == list(size) else _resize(images, scaled)
            total = total + self._logits(x, size).softmax(1)
            if flip:
                total = total + self._logits(x.flip(3), size, flip=True).softmax(1)
        return total / (len(scales) * (2 if flip else 1))


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_label: int = IGNORE_LABEL) -> Tensor:
    """The mean cross entropy over the pixels that have a label, 0 where none has: the reference's loss.

    It is computed in float32 at least: a sum over that many pixels is beyond float16.

    Args:
        logits: [N, num_classes, H, W], a model's "out".
        labels: [N, H, W], int64, 0 to num_classes - 1 or `ignore_label`.

    Returns:
        A scalar. (Source: tensorflow/models, research/deeplab/utils/train_utils.py.)
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=ignore_label, reduction="sum")
    return total / (labels != ignore_label).sum().clamp(min=1)
