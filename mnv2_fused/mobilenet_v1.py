"""MobileNetV1 (Howard et al., arXiv:1704.04861) on MobileNetV2's op: blocks without expansion, ReLU6 at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .mobilenet_v2 import MobileNet

# Table 1 of the paper: output channels and stride of each depthwise separable convolution. The last has stride 1, as
# the table's sizes and the reference have it (tensorflow/models, research/slim/nets/mobilenet_v1.py), not 2 as its row.
SEPARABLE_SETTING: tuple[tuple[int, int], ...] = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
STEM_CHANNELS = 32
MIN_CHANNELS = 8


class MobileNetV1(MobileNet):
    """MobileNetV1: images [N, in_channels, H, W] -> logits [N, num_classes], any H, W >= 1.

    13 depthwise separable convolutions, each an `InvertedResidual` with expand_ratio 1, a ReLU6 after the 1x1 as in the
    reference (the paper has ReLU) and no shortcut. In eval mode without gradients the whole network is one op call, in
    training a block is one: see MobileNet. 4 231 976 parameters and 568.7 million multiply-adds at 224x224.

    Args:
        num_classes: width of the classifier; 0 leaves it out, the result is then the pooled features [N, num_features].
        width_mult: factor on every width (the paper's alpha), rounded down, at least 8 channels, as the reference's
            depth_multiplier.
        in_channels: channels of the image.
        dropout: probability of the dropout before the classifier.
        output_stride, padding, features_only, out_indices: as of MobileNetV2. The maps have 64, 128, 256, 512 and 1024
            channels.

    Raises:
        ValueError: width_mult is not positive; output_stride, padding or out_indices are none of those.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        in_channels: int = 3,
        dropout: float = 0.001,
        *,
        output_stride: int | None = None,
        padding: str = "symmetric",
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        if not width_mult > 0:
            raise ValueError(f"width_mult should be positive, got {width_mult}")

        def width(channels: int) -> int:
            return max(int(channels * width_mult), MIN_CHANNELS)

        options = dict(expand_ratio=1, activation="relu6", shortcut=False)
        super().__init__(
            width(STEM_CHANNELS),
            [(width(channels), stride, options) for channels, stride in SEPARABLE_SETTING],
            None,
            num_classes=num_classes,
            dropout=dropout,
            in_channels=in_channels,
            output_stride=output_stride,
            padding=padding,
            features_only=features_only,
            out_indices=out_indices,
        )


def mobilenet_v1(**kwargs: Any) -> MobileNetV1:
    """`MobileNetV1(**kwargs)`, by the name under which model zoos list it."""
    return MobileNetV1(**kwargs)
