"""Weights from untrusted files into our networks: nothing in the file is executed, size and shapes are checked."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from .deeplab import DeepLabV3
from .mobilenet_v2 import (
    HEAD_CHANNELS,
    INVERTED_RESIDUAL_SETTING,
    STEM_CHANNELS,
    MobileNet,
    MobileNetV2,
    make_divisible,
)
from .ssdlite import SSDLite

Model = TypeVar("Model", bound=nn.Module)

MAX_BYTES = 2 << 30

TORCHVISION_URL = "https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth"  # MobileNet_V2_Weights.IMAGENET1K_V2
TORCHVISION_SHA256 = "7ebf99e0"  # the prefix in the name, as everywhere in torchvision
TIMEOUT = 20.0  # seconds without an answer; a firewall that drops packets would otherwise hold us for minutes

# Published widths first: several widths can round to the same channels, and these are the names people know.
WIDTHS = (1.0, 1.4, 1.3, 0.75, 0.5, 0.35, 0.25, *(percent / 100 for percent in range(5, 401)))


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one line that names the file and the reason."""


def read_state_dict(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Tensors by name from a .pth / .pt file (`weights_only`) or a .safetensors file, on the CPU.

    A state dict inside {"state_dict": ...} or {"model": ...} is taken out, the prefix "module." of DataParallel
    removed. Raises WeightsError for a file that is missing, larger than `max_bytes` (also once unpacked), damaged, or
    holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix not in (".pth", ".pt", ".safetensors"):
        raise WeightsError(f"{path}: unknown kind of weights; expected .pth, .pt or .safetensors")
    size = path.stat().st_size
    if size <= max_bytes and suffix != ".safetensors" and zipfile.is_zipfile(path):
        size = _unpacked_size(path)
    if size > max_bytes:
        raise WeightsError(f"{path}: {size} bytes of weights; at most {max_bytes} are read")
    try:
        if suffix == ".safetensors":
            content = safetensors.torch.load_file(path, device="cpu")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on pickle protocols; what matters is an exception
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file makes both readers raise nearly anything
        raise WeightsError(f"{path}: {_refusal(error)}") from error
    state_dict = _state_dict_in(content, path)
    size = sum(value.numel() * value.element_size() for value in state_dict.values())
    if size > max_bytes:  # a tensor of stride 0 is small in the file and in memory, until a model is made to fit it
        raise WeightsError(f"{path}: tensors of {size} bytes; at most {max_bytes} are read")
    return state_dict


def _unpacked_size(path: Path) -> int:
    # torch writes its archives uncompressed, yet reads deflated ones: a small file could unpack to any size.
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise WeightsError(f"{path}: damaged archive ({error})") from error


def _refusal(error: Exception) -> str:
    message = str(error)
    if found := re.search(r"GLOBAL (\S+)", message):
        return (
            f"refused, it holds more than tensors ({found[1]}) and loading it could run code; "
            "save only the state dict: torch.save(model.state_dict(), FILE)"
        )
    if found := re.search(r"WeightsUnpickler error: *(.+)", message):
        message = found[1]
    elif message.startswith("Weights only load failed"):  # two lines of advice to load it unsafely, then the reason
        message = message.partition("\n\n")[2]
    lines = message.strip().splitlines()
    return f"damaged or not a weights file ({lines[0].strip() if lines else type(error).__name__})"


def _state_dict_in(content: object, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path}: expected a state dict (tensors by name), found {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected tensors by name, found {type(value).__name__} at {key!r}")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise WeightsError(f"{path}: {key} is not a plain dense tensor")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def torchvision_weights() -> Path:
    """The file of torchvision's MobileNetV2 weights (IMAGENET1K_V2), downloaded into torch's hub folder when missing.

    Its SHA-256 is checked on every call, not only after the download. Raises WeightsError, also without a network.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / TORCHVISION_URL.rpartition("/")[2]
    if not path.exists():
        timeout = socket.getdefaulttimeout()
        try:
            socket.setdefaulttimeout(TIMEOUT)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not load_state_dict_from_url: that announces the download on stdout, in the middle of someone's JSON.
            torch.hub.download_url_to_file(TORCHVISION_URL, str(path), TORCHVISION_SHA256, sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors; RuntimeError: a wrong hash
            reason = getattr(error, "reason", error)
            raise WeightsError(
                f"cannot download {TORCHVISION_URL} ({reason}); get it where there is a network and give its file"
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(TORCHVISION_SHA256):
        raise WeightsError(
            f"{path}: SHA-256 is {digest[:16]}..., expected {TORCHVISION_SHA256}...; remove the file and try again"
        )
    return path


def infer_architecture(state_dict: Mapping[str, Tensor]) -> dict[str, int | float]:
    """`num_classes`, `width_mult` and `in_channels` for MobileNetV2(...) to have exactly these keys and shapes.

    Raises WeightsError that lists the keys (missing, unexpected, of another shape) when there is no such network.
    """
    _check_keys(state_dict)
    stem, classifier = state_dict["features.0.0.weight"], state_dict["classifier.1.weight"]
    if stem.ndim != 4 or classifier.ndim != 2 or classifier.shape[0] == 0:
        raise WeightsError(
            "expected features.0.0.weight of rank 4 and classifier.1.weight of rank 2 with a row per class, "
            f"got shapes {tuple(stem.shape)} and {tuple(classifier.shape)}"
        )
    found = {"num_classes": classifier.shape[0], "in_channels": stem.shape[1]}
    channels = (stem.shape[0], *_stage_channels(state_dict), classifier.shape[1])
    for width_mult in WIDTHS:
        if channels == _channels(width_mult):
            found["width_mult"] = width_mult
            break
    else:
        raise WeightsError(f"no width multiplier gives the channels {channels} (stem, stages, features)")
    with torch.device("meta"):
        expected = MobileNetV2(**found).state_dict()
    _check_shapes(state_dict, expected, found["width_mult"])
    return found


def _check_shapes(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], width_mult: float) -> None:
    mismatched = [
        f"{key} {tuple(value.shape)} (expected {tuple(expected[key].shape)})"
        for key, value in state_dict.items()
        if value.shape != expected[key].shape
    ]
    if mismatched:
        raise WeightsError(f"shapes that do not fit width {width_mult}: {_listing(mismatched)}")


def _check_keys(
    state_dict: Mapping[str, Tensor],
    make: Callable[[], nn.Module] = MobileNetV2,
    what: str = "MobileNetV2 in torchvision's layout",
) -> None:
    with torch.device("meta"):
        expected = make().state_dict()
    # PyTorch itself fills in this counter, which many files leave out; inference does not use it.
    missing = [key for key in expected if key not in state_dict and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state_dict if key not in expected]
    problems = [f"{len(missing)} keys missing: {_listing(missing)}"] if missing else []
    problems += [f"{len(unexpected)} keys unexpected: {_listing(unexpected)}"] if unexpected else []
    problems += [
        f"{key} is {value.dtype}, expected floating point"
        for key, value in state_dict.items()
        if not value.is_floating_point() and not key.endswith("num_batches_tracked")
    ][:1]
    if problems:
        raise WeightsError(f"not {what}: " + "; ".join(problems))


def _listing(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _stage_channels(state_dict: Mapping[str, Tensor]) -> list[int]:
    index, channels = 1, []
    for t, _, n, _ in INVERTED_RESIDUAL_SETTING:
        project = state_dict[f"features.{index}.conv.{1 if t == 1 else 2}.weight"]
        channels.append(project.shape[0] if project.ndim else 0)
        index += n
    return channels


def _channels(width_mult: float) -> tuple[int, ...]:
    narrow = [STEM_CHANNELS, *(c for _, c, _, _ in INVERTED_RESIDUAL_SETTING)]
    return (*(make_divisible(c * width_mult, 8) for c in narrow), make_divisible(HEAD_CHANNELS * max(1, width_mult), 8))


def random_model(
    images: Tensor,
    seed: int = 0,
    *,
    network: Callable[..., Model] = MobileNetV2,
    shift: float = 0.0,
    **kwargs: Any,
) -> Model:
    """network(**kwargs) of seeded random weights, in eval mode, with ordinary activations on what is like `images`.

    As initialised, the running statistics are 0 and 1: no fold to speak of, signals that fade from block to block, and
    logits that are all the same. Here BatchNorm gets random scales and shifts and the statistics of `images`, float32
    (N, 3, H, W), and a classifier is centred and scaled, so that pictures differ in their first classes.

    Args:
        network: makes the model, which is called with `images` alone, in training mode too, and has the attribute
            `fused`.
        shift: the mean of the BatchNorms' shifts. With 0 every ReLU6 cuts half of its input away, and errors grow from
            layer to layer as they do in no trained network: rounding to bfloat16 makes up to 40% of the logits, to int8
            any. With 1 it cuts a sixth, and rounding makes 5% and 10% to 15%.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = network(**kwargs).train()
        model.fused = False  # one seed gives the same weights on every machine, whatever kernel it has
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(shift, 0.3)
            norm.momentum = 1.0  # the running statistics become those of the one batch below
        model.forward_features(images) if isinstance(model, MobileNet) else model(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
        if isinstance(model, MobileNet):
            features = model.forward_head(model.forward_features(images), pre_logits=True)
            mean = features.mean(0)
            linear = model.classifier[-1]
            linear.weight.normal_(std=2 / (features - mean).norm(dim=1).mean().item())  # logits of deviation 2
            linear.bias.copy_(-linear.weight @ mean)
        model.fused = True
    return model


def load_model(weights: str | os.PathLike) -> MobileNetV2:
    """The MobileNetV2, float32 and in eval mode, that `weights` fits: a file, or the word "torchvision".

    Number of classes and width are read off the shapes. Raises WeightsError.
    """
    path = torchvision_weights() if str(weights) == "torchvision" else Path(weights)
    state_dict = read_state_dict(path)
    try:
        model = MobileNetV2(**infer_architecture(state_dict))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    return _filled(model, state_dict, path)


def _filled(model: nn.Module, state_dict: Mapping[str, Tensor], path: Path) -> Any:
    model.load_state_dict(state_dict)
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise WeightsError(f"{path}: {key} holds values that are not finite in float32")
    return model.eval()


def load_detector(path: str | os.PathLike, size: tuple[int, int] = (320, 320)) -> SSDLite:
    """The SSDLite, float32 and in eval mode, whose state dict is in the file; `size` is not in it.

    Classes, width and the arrangement of anchors are read off the shapes. Raises WeightsError.
    """
    return _load_on_backbone(path, _detectors, partial(SSDLite, size=size), "an SSDLite")


def load_segmenter(path: str | os.PathLike, output_stride: int = 16) -> DeepLabV3:
    """The DeepLabV3, float32 and in eval mode, whose state dict is in the file; its output stride is not in it.

    Classes, width and whether it has ASPP are read off the shapes. Raises WeightsError.
    """
    return _load_on_backbone(path, _segmenters, partial(DeepLabV3, output_stride=output_stride), "a DeepLabV3")


def _detectors(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    counts = [state_dict[f"head.{name}_head.0.conv.1.bias"].numel() for name in ("regression", "classification")]
    anchors = counts[0] // 4
    if anchors not in (3, 6) or counts[1] % anchors:
        raise WeightsError(f"{counts} outputs of the first heads are those of no arrangement of anchors")
    return {"num_classes": counts[1] // anchors, "anchors": "paper" if anchors == 3 else "torchvision"}


def _segmenters(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    with torch.device("meta"):
        plain = DeepLabV3().state_dict()
    return {"num_classes": state_dict["classifier.logits.weight"].shape[0], "aspp": len(state_dict) > len(plain)}


def _load_on_backbone(
    path: str | os.PathLike,
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]],
    make: Callable[..., nn.Module],
    what: str,
) -> Any:
    path = Path(path)
    state_dict = read_state_dict(path)
    try:
        try:
            found = infer(state_dict)
            backbone = {key.removeprefix("backbone."): value for key, value in state_dict.items()}
            channels = (backbone["features.0.0.weight"].shape[0], *_stage_channels(backbone))
        except (KeyError, IndexError, ValueError) as error:
            if isinstance(error, WeightsError):
                raise
            _check_keys(state_dict, make, what)
            raise WeightsError(f"not {what}") from error
        widths = [width for width in WIDTHS if _channels(width)[:-1] == channels]
        if not widths:
            raise WeightsError(f"no width multiplier gives the channels {channels} (stem, stages)")
        for width in widths:  # the layers beside the backbone may tell widths of the same channels apart
            with torch.device("meta"):
                expected = make(width_mult=width, **found).state_dict()
            if all(key in expected and expected[key].shape == value.shape for key, value in state_dict.items()):
                break
        else:
            width = widths[0]
        make = partial(make, width_mult=width, **found)
        _check_keys(state_dict, make, what)
        with torch.device("meta"):
            _check_shapes(state_dict, make().state_dict(), width)
    except ValueError as error:  # of ours, or a network's own: no class but the background
        raise WeightsError(f"{path}: {error}") from None
    return _filled(make(), state_dict, path)
