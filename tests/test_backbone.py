"""MobileNetV2 as a backbone: dilation by output stride, SAME padding, maps from inside, the blocks that heads want."""

from __future__ import annotations

import pytest
import torch

from mnv2_fused import MobileNetV2

pytestmark = pytest.mark.usefixtures("one_thread")


def test_without_an_output_stride_all_strides_are_taken() -> None:
    """Five strided rows after the stem, as torchvision runs them: the image by 64."""
    model = MobileNetV2(inverted_residual_setting=[(1, 8, 1, 2)] * 5, width_mult=0.25).eval()
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 128, 64)).shape[2:] == (2, 1)
    with pytest.raises(ValueError, match="stride should be 1 or 2, got 3"):
        MobileNetV2(inverted_residual_setting=[(1, 8, 1, 2), (1, 8, 1, 3)], output_stride=4)


def test_features_only_says_what_is_fused() -> None:
    model, x = MobileNetV2(features_only=True, width_mult=0.25).eval(), torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        assert model.why_not_fused(x) == "" and model.unfused(x) == {}
    assert model.unfused(x) == {}  # block by block, as gradients are asked for
    model.features[3].conv.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert "hooks" in model.why_not_fused(x) and "features.3" in model.unfused(x)
    with pytest.raises(ValueError, match="features_only=True has no classifier"):
        model.reset_classifier(10)
