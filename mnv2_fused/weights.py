"""Weights from untrusted files into our networks: nothing in the file is executed, size and shapes are checked.

Keys of other libraries are read by checkpoints.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from .checkpoints import REPEATS, Checkpoint, Traits, recognise
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
    """Tensors by name from a .pth / .pt / .bin file (`weights_only`) or a .safetensors file, on the CPU.

    A state dict inside {"state_dict": ...} or {"model": ...} is taken out, and the prefixes "module." of DataParallel
    and "_orig_mod." of torch.compile are removed. Raises WeightsError for a file that is missing, larger than
    `max_bytes` (also once unpacked), damaged, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix not in (".pth", ".pt", ".bin", ".safetensors"):
        raise WeightsError(f"{path}: unknown kind of weights; expected .pth, .pt, .bin or .safetensors")
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


def _state_dict_in(content: object, path: Path | str) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path}: expected a state dict (tensors by name), found {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: expected tensors by name, found {type(value).__name__} at {key!r}")
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            raise WeightsError(f"{path}: {key} is not a plain dense tensor")
    content = {key: value for key, value in content.items() if key != "n_averaged"}  # of swa_utils.AveragedModel
    for prefix in ("module.", "_orig_mod."):  # of DataParallel and of torch.compile
        if content and all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


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


def infer_architecture(state_dict: Mapping[str, Tensor], repeats: tuple[int, ...] = REPEATS) -> dict[str, Any]:
    """Arguments for MobileNetV2(...) to have exactly these keys and shapes; `repeats` are the blocks by stage.

    `num_classes`, `in_channels` and `width_mult`, or where there are other numbers of blocks than the paper's (as in
    timm's mobilenetv2_110d) `inverted_residual_setting`. Raises WeightsError that lists the keys (missing, unexpected,
    of another shape) when there is no such network.
    """
    return _infer(Checkpoint(dict(state_dict), "torchvision", repeats, None, {}))


def _infer(checkpoint: Checkpoint) -> dict[str, Any]:
    state_dict, repeats = checkpoint.state_dict, checkpoint.repeats
    if repeats == REPEATS:
        _check_keys(state_dict, names=checkpoint.names)
    else:
        rows = [(t, c, n, s) for (t, c, _, s), n in zip(INVERTED_RESIDUAL_SETTING, repeats, strict=False)]
        if len(repeats) != len(INVERTED_RESIDUAL_SETTING):
            raise WeightsError(
                f"{len(repeats)} stages of blocks, where MobileNetV2 has {len(INVERTED_RESIDUAL_SETTING)}"
            )
        _check_keys(state_dict, partial(MobileNetV2, inverted_residual_setting=rows), names=checkpoint.names)
    stem, classifier = state_dict["features.0.0.weight"], state_dict["classifier.1.weight"]
    if stem.ndim != 4 or classifier.ndim != 2 or classifier.shape[0] == 0:
        raise WeightsError(
            "expected features.0.0.weight of rank 4 and classifier.1.weight of rank 2 with a row per class, "
            f"got shapes {tuple(stem.shape)} and {tuple(classifier.shape)}"
        )
    found: dict[str, Any] = {"num_classes": classifier.shape[0], "in_channels": stem.shape[1]}
    stages = _stage_channels(state_dict, repeats)
    channels = (stem.shape[0], *stages, classifier.shape[1])
    widths = [width for width in WIDTHS if channels == _channels(width)]
    if widths and repeats == REPEATS:
        found["width_mult"] = widths[0]
    elif repeats != REPEATS and channels[0] == STEM_CHANNELS and all(c > 0 and c % 8 == 0 for c in stages):
        setting = zip(INVERTED_RESIDUAL_SETTING, stages, repeats, strict=True)
        found["inverted_residual_setting"] = [(t, c, n, s) for (t, _, _, s), c, n in setting]
    else:
        raise WeightsError(f"no width multiplier gives the channels {channels} (stem, stages, features)")
    with torch.device("meta"):
        expected = MobileNetV2(**found).state_dict()
    _check_shapes(state_dict, expected, f"width {found.get('width_mult', 1.0)}")
    return found


def _check_shapes(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    mismatched = [
        f"{key} {tuple(value.shape)} (expected {tuple(expected[key].shape)})"
        for key, value in state_dict.items()
        if value.shape != expected[key].shape
    ]
    if mismatched:
        raise WeightsError(f"shapes that do not fit {what}: {_listing(mismatched)}")


def _check_keys(
    state_dict: Mapping[str, Tensor],
    make: Callable[[], nn.Module] = MobileNetV2,
    what: str = "MobileNetV2",
    names: Mapping[str, str] | None = None,
) -> None:
    with torch.device("meta"):
        expected = make().state_dict()
    names = names or {}
    missing = [names.get(key, key) for key in _missing(state_dict, expected)]
    unexpected = [key for key in state_dict if key not in expected]
    problems = _mismatch(missing, unexpected)
    problems += [
        f"{key} is {value.dtype}, expected floating point"
        for key, value in state_dict.items()
        if not value.is_floating_point() and not key.endswith("num_batches_tracked")
    ][:1]
    if problems:
        raise WeightsError(f"not {what}: " + "; ".join(problems))


def _missing(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    # PyTorch itself fills in this counter, which many files leave out; inference does not use it.
    return [key for key in expected if key not in state_dict and not key.endswith("num_batches_tracked")]


def _mismatch(missing: list[str], unexpected: list[str]) -> list[str]:
    kinds = ((missing, "missing"), (unexpected, "unexpected"))
    return [f"{len(keys)} keys {what}: {_listing(keys)}" for keys, what in kinds if keys]


def _listing(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _stage_channels(state_dict: Mapping[str, Tensor], repeats: tuple[int, ...] = REPEATS) -> list[int]:
    index, channels = 1, []
    for (t, _, _, _), n in zip(INVERTED_RESIDUAL_SETTING, repeats, strict=True):
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

    Keys are those of torchvision, timm, transformers, slim or flat (checkpoints.py), or a folder in which timm or
    transformers have saved a model. Number of classes and width are read off the shapes; padding, eps and image
    normalisation are those of the library, or what a folder says. Raises WeightsError.
    """
    path = torchvision_weights() if str(weights) == "torchvision" else Path(weights)
    checkpoint = _read_checkpoint(path)
    try:
        model = MobileNetV2(**_infer(checkpoint))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    _adopt(model, checkpoint.traits)
    return _filled(model, checkpoint.state_dict, path)


class Loaded(NamedTuple):
    """What `load_checkpoint` found."""

    layout: str
    traits: Traits | None  # None: nothing says what they are
    missing_keys: list[str]  # of the model, by the names of the layout; with strict=False
    unexpected_keys: list[str]


def load_checkpoint(
    model: MobileNetV2, source: str | os.PathLike | Mapping[str, Tensor], *, strict: bool = True
) -> Loaded:
    """Loads weights of any library into a MobileNetV2, with what belongs to them.

    The library is recognised by the keys: torchvision, timm, transformers, TensorFlow's slim (its names and order of
    axes; moving averages are preferred) or the flat one of tonylins and d-li14. The model takes their padding, eps and
    image normalisation (`model.padding`, `norm_eps`, `image_mean`, `image_std`): weights from TensorFlow, which those
    of transformers are, want SAME padding, an eps of 0.001 and images in -1 to 1. Torchvision's keys are this library's
    too: with these, outside a folder that says more, the model keeps what it has. Of TensorFlow's 1001 classes, a model
    with 1000 gets all but the first, the background. A model without a classifier, or with features_only, leaves out
    what it does not have. For the other direction see `convert_state_dict`.

    Args:
        model: of the shapes of the weights.
        source: a state dict; a .safetensors, .pth, .pt or .bin file; or a folder in which transformers, timm or this
            library have saved a model, whose config.json and preprocessor_config.json then say what belongs to it.
        strict: False loads what fits and tells of the rest.

    Raises:
        WeightsError: a file that cannot be read or that holds more than tensors; keys of no layout; keys that are
            missing or too many; shapes that differ; numbers that are not finite. The model is as before then.
        TypeError: model is no MobileNetV2 of this library.
    """
    if not isinstance(model, MobileNetV2):
        raise TypeError(
            f"load_checkpoint() fills a mnv2_fused.MobileNetV2, got {type(model).__name__}; "
            "convert_state_dict(state_dict, layout) gives the keys of other libraries"
        )
    if isinstance(source, Mapping):
        where = "the state dict"
        checkpoint = _recognised(_state_dict_in(source, where))
    else:
        where, checkpoint = str(source), _read_checkpoint(Path(source))
    try:
        return _fill(model, checkpoint, strict)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from None


def load_folder(
    make: Callable[..., MobileNetV2], folder: str | os.PathLike, arguments: Mapping[str, Any], *, strict: bool = True
) -> MobileNetV2:
    """The model, in eval mode, in a folder of `save_pretrained`, of this library's model or one of LAYOUTS.

    `arguments` of ours are what its config.json says, and what the caller wants otherwise. Raises WeightsError.
    """
    folder = Path(folder)
    checkpoint = _read_checkpoint(folder)
    own = _json(folder / "config.json")
    try:
        if "width_mult" in own:
            model = make(**arguments)
            checkpoint = checkpoint._replace(traits=None)  # which the arguments are
        else:
            model = make(**_infer(checkpoint))
        _fill(model, checkpoint, strict)
    except ValueError as error:  # of ours, or a network's own: a configuration that makes none
        raise WeightsError(f"{folder}: {error}") from None
    return model.eval()


def _fill(model: MobileNetV2, checkpoint: Checkpoint, strict: bool) -> Loaded:
    tensors, expected = dict(checkpoint.state_dict), model.state_dict()
    if not model.num_classes:
        tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
    elif (
        (traits := checkpoint.traits)
        and traits.background
        and len(tensors.get("classifier.1.weight", ())) == model.num_classes + 1 == 1001
    ):
        tensors |= {key: tensors[key][1:] for key in ("classifier.1.weight", "classifier.1.bias") if key in tensors}
    if model._maps is not None:  # its features end with the last map
        index = re.compile(r"features\.(\d+)\.")
        left_out = [key for key in tensors if (found := index.match(key)) and int(found[1]) >= len(model.features)]
        tensors = {key: value for key, value in tensors.items() if key not in left_out}
    missing = [checkpoint.names.get(key, key) for key in _missing(tensors, expected)]
    unexpected = [checkpoint.names.get(key, key) for key in tensors if key not in expected]
    if strict and (problems := _mismatch(missing, unexpected)):
        raise WeightsError("does not fit this model: " + "; ".join(problems))
    tensors = {key: value for key, value in tensors.items() if key in expected}
    _check_shapes(tensors, expected, "this model")
    for key, value in tensors.items():
        name, wanted = checkpoint.names.get(key, key), expected[key].dtype
        if value.is_floating_point() != wanted.is_floating_point:
            raise WeightsError(f"{name} is {value.dtype}, expected {wanted}")
        if not value.to(wanted).isfinite().all():
            raise WeightsError(f"{name} holds values that are not finite in {wanted}")
    model.load_state_dict(tensors, strict=False)
    _adopt(model, checkpoint.traits)
    return Loaded(checkpoint.layout, checkpoint.traits, missing, unexpected)


def _adopt(model: MobileNetV2, traits: Traits | None) -> None:
    if traits is None:
        return
    model.padding, model.norm_eps = traits.padding, traits.norm_eps
    model.image_mean, model.image_std = traits.image_mean, traits.image_std


def _recognised(state_dict: Mapping[str, Tensor]) -> Checkpoint:
    checkpoint = recognise(state_dict)
    if checkpoint is None:
        _check_keys(state_dict)
        raise WeightsError("keys of no known layout")
    return checkpoint


def _read_checkpoint(path: Path) -> Checkpoint:
    if not path.is_dir():
        state_dict = read_state_dict(path)
        try:
            return _recognised(state_dict)
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from None
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{path}: a folder without {' or '.join(names)}")
    checkpoint = _read_checkpoint(file)
    return checkpoint._replace(traits=_traits_in(path, checkpoint.traits))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("larger than 1 MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} where an object was expected")
    except (ValueError, RecursionError, OSError) as error:
        raise WeightsError(f"{path}: damaged ({error})") from None
    return content


def _traits_in(folder: Path, traits: Traits | None) -> Traits | None:
    """What the files beside the weights say, of this library, timm or transformers (two files).

    WeightsError where they say that the network is another one than MobileNetV2 as published.
    """
    config, images = _json(folder / "config.json"), _json(folder / "preprocessor_config.json")
    timm, options = (
        {} if not isinstance(found := config.get(key), dict) else found for key in ("pretrained_cfg", "model_args")
    )
    if "width_mult" in config:
        found = {name: config.get(name) for name in Traits._fields[:4]}
        traits = traits or Traits()
    else:
        others = {"hidden_act": "relu6", "output_stride": 32, "expand_ratio": 6, "first_layer_is_expansion": True}
        others |= {"act_layer": "relu6", "pad_type": ""}
        for name, usual in others.items():
            value = options.get(name, config.get(name, usual))
            if value != usual:
                raise WeightsError(f"{folder}: its configuration has {name} {value!r}; weights of {usual!r} are read")
        found = {
            "norm_eps": options.get("bn_eps", config.get("layer_norm_eps")),
            "image_mean": images.get("image_mean", timm.get("mean")),
            "image_std": images.get("image_std", timm.get("std")),
        }
        if isinstance(config.get("tf_padding"), bool):
            found["padding"] = "same" if config["tf_padding"] else "symmetric"
    for name, value in found.items():
        if value is None:
            continue
        if name == "padding":
            fits = value in ("same", "symmetric")
        else:
            numbers = [value] if name == "norm_eps" else value
            fits = isinstance(numbers, list) and 0 < len(numbers) <= 64
            fits = fits and all(type(n) in (int, float) and 0 <= n < 1e3 for n in numbers)
        if not fits:
            raise WeightsError(f"{folder}: {name} of its configuration is {value!r}, not what such a thing may be")
        traits = (traits or Traits())._replace(**{name: tuple(value) if isinstance(value, list) else value})
    return traits


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
            _check_shapes(state_dict, make().state_dict(), f"width {width}")
    except ValueError as error:  # of ours, or a network's own: no class but the background
        raise WeightsError(f"{path}: {error}") from None
    return _filled(make(), state_dict, path)
