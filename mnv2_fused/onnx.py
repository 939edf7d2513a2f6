"""To ONNX, for runtimes that know none of our ops: the plain modules, and proof that a runtime computes the same."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .fusion import unfuse
from .network import Conv2dSame

TOLERANCE = 1e-4  # relative, in norm: two runtimes that add in float32 in other orders


class _Flat(nn.Module):
    """A network whose result is its tensors, as a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in pytree.tree_leaves(self.model(images)) if isinstance(leaf, Tensor))


def to_onnx(model: nn.Module, path: str | os.PathLike, *, image_size: int = 224, opset: int = 17) -> None:
    """Writes a network of this library, or one that `fuse` has changed, as ONNX, and checks it with ONNX Runtime.

    The file holds plain convolutions in float32 and eval mode, one input "images" [N, C, H, W] and outputs "output_0"
    and on, in the order in which the model returns its tensors. The number of images is free, and so is their size,
    except where the padding depends on it (padding="same", networks from TensorFlow) or a layer wants one: then it is
    fixed to `image_size`.
    The file appears whole, or not at all; the model is left as it is.

    Args:
        model: takes images [N, C, H, W] alone; in any mode, dtype or device.
        image_size: height and width of what it is traced and checked with.
        opset: of ONNX.

    Raises:
        ImportError: onnx or onnxruntime is not installed (`pip install 'mnv2_fused[onnx]'`).
        ValueError: the model has no convolution.
        RuntimeError: the file computes something else than the model.
    """
    try:
        import onnx  # noqa: F401  (what torch.onnx.export writes with)
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'mnv2_fused[onnx]'") from error
    plain = _plain(model)
    first = next((module for module in plain.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"to_onnx() takes a network of images, and {type(model).__name__} has no convolution")
    fixed = any(isinstance(module, Conv2dSame) or _pads_itself(module) for module in plain.modules())
    other = torch.rand(1, first.in_channels, image_size + 33, image_size)
    try:
        with torch.no_grad():
            plain(other)
    except RuntimeError:  # a linear layer, say, for maps of one size
        fixed = True
    images = torch.rand(2, first.in_channels, image_size, image_size)
    free = {0: "N"} if fixed else {0: "N", 2: "H", 3: "W"}
    flat = _Flat(plain).eval()
    with torch.no_grad():
        expected = flat(images)
    names = [f"output_{i}" for i in range(len(expected))]
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder, torch.no_grad():
        written = Path(folder, "model.onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this exporter is the old one (the new one wants another package)
            torch.onnx.export(
                flat, (images,), written, input_names=["images"], output_names=names, opset_version=opset,
                dynamic_axes={"images": free} | {name: {0: "N"} for name in names}, dynamo=False,
            )  # fmt: skip
        session = onnxruntime.InferenceSession(str(written), providers=["CPUExecutionProvider"])
        for given in (images, images[:1], *([] if fixed else [other])):
            right, found = flat(given), session.run(None, {"images": given.numpy()})
            for name, a, b in zip(names, right, found, strict=True):
                off = float((torch.from_numpy(b) - a).norm() / a.norm().clamp(min=1e-12))
                if a.shape != b.shape or not off < TOLERANCE:
                    raise RuntimeError(
                        f"{path}: {name} is {list(b.shape)}, off by {off:.1e}, where {list(a.shape)} was expected"
                    )
        os.replace(written, path)


def _plain(model: nn.Module) -> Any:
    copied = unfuse(copy.deepcopy(model)).cpu().float().eval()
    for module in copied.modules():
        if hasattr(module, "fused"):
            module.fused = False
    return copied


def _pads_itself(module: nn.Module) -> bool:
    """transformers' layers, whose forward pads by the size of the image."""
    return bool(getattr(getattr(module, "config", None), "tf_padding", False))
