"""Weights of other libraries: recognised by their keys, converted both ways, with what belongs to them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import NETS, Net, logits_of, with_statistics

from mnv2_fused import MobileNetV2, convert_state_dict, load_checkpoint
from mnv2_fused.checkpoints import LAYOUTS
from mnv2_fused.weights import WeightsError, load_model

WIDTH = 0.35
SOURCES = [net for net in NETS if net.name not in ("timm features_only", "transformers dilated")]
TRAITS = {"transformers": ("same", 1e-3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
IMAGENET = ("symmetric", 1e-5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def source(net: Net, kind: str = "stand-in") -> nn.Module:
    if kind == "real" and net.real is None:
        pytest.skip(f"{net.name} is a repository and no package: the stand-in alone")
    torch.manual_seed(0)
    return with_statistics((net.real if kind == "real" else net.stand_in)(WIDTH), torch.randn(4, 3, 64, 64))


def ours(num_classes: int = 1000, seed: int = 1) -> MobileNetV2:
    torch.manual_seed(seed)
    return MobileNetV2(num_classes, WIDTH).eval()


def check_same(model: nn.Module, expected: nn.Module, skipped: int = 0) -> None:
    for size in [(64, 64), (63, 50)]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            wanted = logits_of(expected(x))[:, skipped:]
            assert (logits_of(model(x)) - wanted).norm() < 2e-5 * wanted.norm(), size


def traits_of(model: MobileNetV2) -> tuple[Any, ...]:
    return model.padding, model.norm_eps, model.image_mean, model.image_std


# ------------------------------------------------------------------------------------------------------ what is loaded


@pytest.mark.parametrize("kind", ["stand-in", "real"])
@pytest.mark.parametrize("net", SOURCES, ids=lambda net: net.name)
def test_loaded_from_every_library(net: Net, kind: str, tmp_path: Path) -> None:
    """By state dict and by file, into a model of other traits and weights; the outputs are the library's."""
    theirs = source(net, kind)
    classes = 1001 if net.name == "transformers" else 1000
    model = ours(classes)
    found = load_checkpoint(model, theirs.state_dict())
    layout = {"tonylins": "flat", "d-li14": "flat"}.get(net.name, net.name)
    assert found.layout == layout and found.missing_keys == found.unexpected_keys == []
    assert traits_of(model) == TRAITS.get(net.name, IMAGENET)
    check_same(model, theirs)
    save_file({key: value.clone() for key, value in theirs.state_dict().items()}, tmp_path / "a.safetensors")
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.pth")
    for file in ("a.safetensors", "a.pth"):
        loaded = load_model(tmp_path / file)
        assert loaded.num_classes == classes and traits_of(loaded) == traits_of(model)
        assert all(
            torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
        )
        load_checkpoint(again := ours(classes), str(tmp_path / file))
        assert torch.equal(again.classifier[1].weight, model.classifier[1].weight)


def test_the_background_class_is_left_out() -> None:
    theirs = source(SOURCES[2])
    model = ours(1000)
    load_checkpoint(model, theirs.state_dict())
    check_same(model, theirs, skipped=1)
    with pytest.raises(WeightsError, match=r"classifier.1.weight \(1001, 1280\) \(expected \(999, 1280\)\)"):
        load_checkpoint(ours(999), theirs.state_dict())


def test_traits_follow_the_file() -> None:
    """What a model takes from one file it loses with the next, but with torchvision's keys, which are ours too."""
    first, second, model = source(SOURCES[2]), source(SOURCES[1]), ours()
    check = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model(check)
        load_checkpoint(model, first.state_dict())
        check_same(model, first, skipped=1)
        again = MobileNetV2(
            width_mult=WIDTH, padding="same", norm_eps=1e-3, image_mean=(0.5,) * 3, image_std=(0.5,) * 3
        )
        assert load_checkpoint(again.eval(), model.state_dict()).traits is None
        check_same(again, model)
        assert traits_of(again) == TRAITS["transformers"]
        load_checkpoint(model, second.state_dict())
        check_same(model, second)
    assert traits_of(model) == IMAGENET
    with pytest.raises(ValueError, match="padding should be 'symmetric' or 'same', got 'valid'"):
        model.padding = "valid"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_and_back(layout: str) -> None:
    model = ours()
    state_dict = model.state_dict()
    converted = convert_state_dict(state_dict, layout)
    back = convert_state_dict(converted, "torchvision")
    assert all(torch.equal(back[key], state_dict[key]) for key in back)
    assert {key for key in state_dict.keys() - back.keys()} <= {key for key in state_dict if "num_batches" in key}
    if layout != "slim":
        stand_in = {
            "torchvision": lambda: zoo.TorchvisionMobileNetV2(WIDTH),
            "timm": lambda: zoo.TimmMobileNetV2(WIDTH),
            "transformers": lambda: zoo.TransformersMobileNetV2(zoo.Config(WIDTH, tf_padding=False, num_labels=1000)),
            "flat": lambda: zoo.FlatMobileNetV2(WIDTH),
        }[layout]().eval()
        stand_in.load_state_dict(converted)
        if layout != "transformers":  # whose eps is another
            check_same(stand_in, model)
    for other in LAYOUTS:  # from any to any
        assert convert_state_dict(converted, other).keys() == convert_state_dict(back, other).keys()


def test_slim_names_and_axes() -> None:
    """TensorFlow's: height, width, in, out; of a depthwise convolution height, width, channels, 1."""
    state_dict = ours(1001).state_dict()
    slim = convert_state_dict(state_dict, "slim")
    shapes = {
        "MobilenetV2/Conv/weights": (3, 3, 3, 16),
        "MobilenetV2/expanded_conv/depthwise/depthwise_weights": (3, 3, 16, 1),
        "MobilenetV2/expanded_conv/project/weights": (1, 1, 16, 8),
        "MobilenetV2/expanded_conv_1/expand/weights": (1, 1, 8, 48),
        "MobilenetV2/expanded_conv_16/project/BatchNorm/moving_variance": (112,),
        "MobilenetV2/Conv_1/BatchNorm/gamma": (1280,),
        "MobilenetV2/Logits/Conv2d_1c_1x1/weights": (1, 1, 1280, 1001),
        "MobilenetV2/Logits/Conv2d_1c_1x1/biases": (1001,),
    }
    assert {name: tuple(slim[name].shape) for name in shapes} == shapes and len(slim) == 262
    stem, depthwise = state_dict["features.0.0.weight"], state_dict["features.2.conv.1.0.weight"]
    assert slim["MobilenetV2/Conv/weights"][2, 1, 0, 5] == stem[5, 0, 2, 1]
    assert slim["MobilenetV2/expanded_conv_1/depthwise/depthwise_weights"][2, 1, 7, 0] == depthwise[7, 0, 2, 1]
    assert slim["MobilenetV2/Logits/Conv2d_1c_1x1/weights"][0, 0, 3, 9] == state_dict["classifier.1.weight"][9, 3]


def test_slim_moving_averages_are_preferred(tmp_path: Path) -> None:
    slim = convert_state_dict(source(SOURCES[0]).state_dict(), "slim")
    exported = {"global_step": torch.tensor(5)}
    for name, value in slim.items():
        exported |= {name: torch.zeros_like(value), f"{name}/ExponentialMovingAverage": value}
        exported |= {f"{name}/RMSProp": value, f"{name}/RMSProp_1": value, f"{name}/Momentum": value}
    torch.save(exported, tmp_path / "slim.pt")
    model, expected = ours(), ours()
    assert load_checkpoint(model, tmp_path / "slim.pt").layout == "slim"
    load_checkpoint(expected, slim)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert model.padding == "same" and model.norm_eps == 1e-3


@pytest.mark.parametrize("kind", ["stand-in", "real"])
def test_deeper_networks(kind: str, tmp_path: Path) -> None:
    """timm's mobilenetv2_110d: 22 blocks, its own channels, stem and head of width 1."""
    setting = [
        (1, 16, 1, 1),
        (6, 24, 3, 2),
        (6, 32, 4, 2),
        (6, 72, 5, 2),
        (6, 104, 4, 1),
        (6, 176, 4, 2),
        (6, 352, 1, 1),
    ]
    torch.manual_seed(0)
    if kind == "real":
        theirs = with_statistics(zoo.library("timm").create_model("mobilenetv2_110d"), torch.randn(2, 3, 64, 64))
        state_dict = theirs.state_dict()
    else:
        theirs = MobileNetV2(inverted_residual_setting=setting).eval()
        state_dict = convert_state_dict_of_timm(theirs)
    torch.save(state_dict, tmp_path / "a.pth")
    model = load_model(tmp_path / "a.pth")
    assert model.config["inverted_residual_setting"] == [list(row) for row in setting]
    check_same(model, theirs)


def convert_state_dict_of_timm(model: MobileNetV2) -> dict[str, Tensor]:
    """Under timm's keys, by hand: its stages are not the paper's."""
    converted, index = {}, 1
    for stage, (t, _, n, _) in enumerate(model.config["inverted_residual_setting"]):
        for within in range(n):
            names = (
                ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
                if t > 1
                else ["conv_dw", "bn1", "conv_pw", "bn2"]
            )
            places = ["0.0", "0.1", "1.0", "1.1", "2", "3"] if t > 1 else ["0.0", "0.1", "1", "2"]
            for name, place in zip(names, places, strict=True):
                for key, value in model.features[index].conv.get_submodule(place).state_dict().items():
                    converted[f"blocks.{stage}.{within}.{name}.{key}"] = value
            index += 1
    apart = {"conv_stem": model.features[0][0], "bn1": model.features[0][1], "classifier": model.classifier[1]}
    apart |= {"conv_head": model.features[-1][0], "bn2": model.features[-1][1]}
    return converted | {
        f"{name}.{key}": value for name, part in apart.items() for key, value in part.state_dict().items()
    }


def test_without_a_classifier() -> None:
    """A model that has none leaves it out, as does one of maps alone what comes after them."""
    theirs = source(SOURCES[1])
    model = MobileNetV2(0, WIDTH).eval()
    load_checkpoint(model, theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.global_pool(theirs.bn2(theirs.conv_head(theirs.blocks(theirs.bn1(theirs.conv_stem(x))))))
        assert (model(x) - expected).norm() < 2e-5 * expected.norm()
        maps = MobileNetV2(width_mult=WIDTH, features_only=True, out_indices=(1, 2)).eval()
        load_checkpoint(maps, theirs.state_dict())
        expected = theirs.blocks[:3](theirs.bn1(theirs.conv_stem(x)))
        assert (maps(x)[-1] - expected).norm() < 2e-5 * expected.norm()
    backbone = source(SOURCES[2]).mobilenet_v2.state_dict()  # without the prefix, and without a classifier
    assert load_checkpoint(MobileNetV2(0, WIDTH), backbone).layout == "transformers"
    with pytest.raises(WeightsError, match="2 keys missing: classifier.weight, classifier.bias"):
        load_checkpoint(ours(), backbone)


def test_averages_and_wrappers(tmp_path: Path) -> None:
    """As torch.optim.swa_utils, DataParallel and torch.compile name their keys."""
    theirs = source(SOURCES[1])
    averaged = torch.optim.swa_utils.AveragedModel(theirs).state_dict()
    wrapped = {f"module._orig_mod.{key}": value for key, value in theirs.state_dict().items()}
    for state_dict in (averaged, wrapped):
        torch.save(state_dict, tmp_path / "a.pth")
        check_same(load_model(tmp_path / "a.pth"), theirs)


# --------------------------------------------------------------------------------------------------- what does not fit


def refusal(model: nn.Module, given: Any, **options: Any) -> str:
    before = copy.deepcopy(model.state_dict())
    traits = traits_of(model)
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(model, given, **options)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert traits_of(model) == traits
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize("name", ["timm", "transformers", "tonylins"])
def test_a_mismatch_lists_the_keys_of_the_library(name: str) -> None:
    state_dict = source(next(net for net in NETS if net.name == name)).state_dict()
    key = {
        "timm": "blocks.3.1.conv_dw.weight",
        "transformers": "mobilenet_v2.layer.7.conv_3x3.normalization.weight",
        "tonylins": "features.5.conv.4.running_var",
    }[name]
    less = {k: v for k, v in state_dict.items() if k != key}
    assert f"1 keys missing: {key}" in refusal(ours(), less)
    message = refusal(ours(), state_dict | {"extra.weight": torch.zeros(1)})
    assert message == "the state dict: does not fit this model: 1 keys unexpected: extra.weight"
    assert "shapes that do not fit this model: " in refusal(ours(), state_dict | {key: torch.zeros(1, 2)})
    assert f"{key} holds values that are not finite" in refusal(
        ours(), state_dict | {key: torch.full_like(state_dict[key], float("nan"))}
    )
    assert "shapes that do not fit" in refusal(MobileNetV2(width_mult=0.5), state_dict)
    model = ours(1001 if name == "transformers" else 1000)
    found = load_checkpoint(model, less | {"extra.weight": torch.zeros(1)}, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([key], ["extra.weight"])
    assert "shapes" in refusal(model, state_dict | {key: torch.zeros(1, 2)}, strict=False)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: {"state_dict": d, "epoch": 3}, ""),
        (lambda d: {f"module.{key}": value for key, value in d.items()}, ""),
        (lambda d: {key: value.numpy() for key, value in d.items()}, "expected tensors by name, found ndarray"),
        (lambda d: {key: value.to("meta") for key, value in d.items()}, "is not a plain dense tensor"),
        (
            lambda d: d | {"features.0.1.bias": torch.zeros(16, dtype=torch.int8)},
            "is torch.int8, expected torch.float32",
        ),
        (lambda d: d | {"features.0.1.bias": torch.zeros(16, dtype=torch.complex64)}, "is torch.complex64, expected"),
        (
            lambda d: d | {"features.0.1.bias": torch.full((16,), 1e300, dtype=torch.float64)},
            "finite in torch.float32",
        ),
    ],
    ids=range(7),
)
def test_state_dicts_as_people_have_them(change: Callable[[dict], dict], words: str) -> None:
    state_dict = source(SOURCES[0]).state_dict()
    if words:
        assert words in refusal(ours(), change(dict(state_dict)))
    else:
        load_checkpoint(ours(), change(dict(state_dict)))


def test_our_folders_say_what_belongs_to_the_weights(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = MobileNetV2(width_mult=WIDTH, padding="same", norm_eps=1e-3, image_mean=(0.1,) * 3).eval()
    model.save_pretrained(tmp_path)
    for loaded in (load_model(tmp_path), ours()):
        load_checkpoint(loaded, tmp_path)
        assert traits_of(loaded) == traits_of(model)
        check_same(loaded, model)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert "keys missing" in refusal(ours(), {"a": torch.zeros(1)})
    assert "expected a state dict" in refusal(ours(), {})
    assert "no such file" in refusal(ours(), tmp_path / "none.pth")
    assert "a folder without model.safetensors or pytorch_model.bin" in refusal(ours(), tmp_path)
    with pytest.raises(TypeError, match="fills a mnv2_fused.MobileNetV2, got TimmMobileNetV2; convert_state_dict"):
        load_checkpoint(zoo.TimmMobileNetV2(WIDTH), ours().state_dict())
    with pytest.raises(ValueError, match="layout should be one of torchvision, timm, .* got 'keras'"):
        convert_state_dict(ours().state_dict(), "keras")
    with pytest.raises(ValueError, match="keys of none of the layouts"):
        convert_state_dict({"a": torch.zeros(1)}, "timm")
    with pytest.raises(ValueError, match="1 keys that no MobileNetV2 has: extra"):
        convert_state_dict(ours().state_dict() | {"extra": torch.zeros(1)}, "timm")


# ------------------------------------------------------------------------------------------------------------- folders


def folder_of(path: Path, state_dict: dict[str, Tensor], **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file({key: value.clone().contiguous() for key, value in state_dict.items()}, path / "model.safetensors")
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_folders_say_what_belongs_to_the_weights(tmp_path: Path) -> None:
    theirs = zoo.TransformersMobileNetV2(zoo.Config(WIDTH, tf_padding=False))
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.01
    with_statistics(theirs, torch.randn(4, 3, 64, 64))
    config = dict(tf_padding=False, layer_norm_eps=0.01, num_labels=1001)
    preprocessor = dict(image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 2])
    folder = folder_of(tmp_path, theirs.state_dict(), config=config, preprocessor_config=preprocessor)
    for model in (load_model(folder), MobileNetV2(1001, WIDTH, padding="same").eval()):
        load_checkpoint(model, folder)
        assert traits_of(model) == ("symmetric", 0.01, (0.1, 0.2, 0.3), (1, 1, 2))
        check_same(model, theirs)
    timm = dict(architecture="mobilenetv2_035", num_classes=1000, pretrained_cfg=dict(mean=[0.5] * 3, std=[0.25] * 3))
    model = load_model(folder_of(tmp_path / "timm", source(SOURCES[1]).state_dict(), config=timm))
    assert traits_of(model) == ("symmetric", 1e-5, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    "config, words",
    [
        ("{", "config.json: damaged"),
        ("[1]", "config.json: damaged (list where an object was expected)"),
        ("[" * 100_000, "config.json: damaged"),
        ("\xff\xfe", "config.json: damaged"),
        (" " * (2 << 20), "config.json: damaged (larger than 1 MiB)"),
        ({"hidden_act": "relu"}, "its configuration has hidden_act 'relu'; weights of 'relu6' are read"),
        ({"output_stride": 8}, "its configuration has output_stride 8; weights of 32 are read"),
        ({"model_args": {"pad_type": "same"}}, "its configuration has pad_type 'same'"),
        ({"width_mult": 0.35, "padding": "odd"}, "padding of its configuration is 'odd'"),
        ({"layer_norm_eps": "small"}, "norm_eps of its configuration is 'small'"),
        ({"layer_norm_eps": -1}, "norm_eps of its configuration is -1"),
        ({"pretrained_cfg": {"mean": [0.5, None, 0.5]}}, "image_mean of its configuration is [0.5, None, 0.5]"),
        ({"pretrained_cfg": {"std": 0.5}}, "image_std of its configuration is 0.5"),
    ],
    ids=range(13),
)
def test_damaged_folders(config: Any, words: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ours().state_dict())
    content = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert words in refusal(ours(), folder)


# ----------------------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize(
    "options",
    [
        dict(num_classes=10, width_mult=0.35),
        dict(width_mult=0.5, padding="same", norm_eps=1e-3, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, dropout=0.0),
        dict(inverted_residual_setting=[[1, 8, 1, 1], [6, 16, 2, 2]], num_classes=0, in_channels=1, output_stride=2),
        dict(width_mult=0.35, features_only=True, out_indices=(1, 3)),
        dict(width_mult=0.35, bottleneck_activation="relu6", shortcut="none", round_nearest=4),
    ],
    ids=range(5),
)
def test_save_and_load_pretrained(options: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    model = MobileNetV2(**options).eval()
    assert MobileNetV2(**model.config).config == model.config
    model.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    loaded = MobileNetV2.from_pretrained(tmp_path)
    assert type(loaded) is MobileNetV2 and not loaded.training and loaded.config == model.config
    x = torch.randn(1, options.get("in_channels", 3), 40, 40)
    with torch.no_grad():
        assert torch.equal(logits_of(loaded(x)), logits_of(model(x)))


def test_the_configuration_is_that_of_now(tmp_path: Path) -> None:
    """Not of the arguments alone: other weights brought others, and the classifier was replaced."""
    pytest.importorskip("huggingface_hub")
    model = ours()
    theirs = source(SOURCES[2])
    load_checkpoint(model, theirs.state_dict())
    model.reset_classifier(7)
    model.save_pretrained(tmp_path)
    loaded = MobileNetV2.from_pretrained(tmp_path)
    assert loaded.num_classes == 7 and traits_of(loaded) == TRAITS["transformers"]
    with torch.no_grad():
        assert torch.equal(loaded(x := torch.randn(1, 3, 32, 32)), model(x))


def test_from_pretrained_of_other_libraries(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    theirs = source(SOURCES[2])
    folder = folder_of(tmp_path, theirs.state_dict(), config=dict(tf_padding=True, layer_norm_eps=0.001))
    model = MobileNetV2.from_pretrained(folder)
    assert model.num_classes == 1001
    check_same(model, theirs)
    folder_of(tmp_path, source(SOURCES[0]).state_dict(), config=dict(width_mult=0.5))
    with pytest.raises(WeightsError, match="shapes that do not fit"):
        MobileNetV2.from_pretrained(tmp_path)
    folder_of(tmp_path, source(SOURCES[0]).state_dict(), config=dict(width_mult=0.35, padding="odd"))
    with pytest.raises(WeightsError, match="padding of its configuration is 'odd'"):
        MobileNetV2.from_pretrained(tmp_path)


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be sent, without a network."""
    mixin = pytest.importorskip("huggingface_hub.hub_mixin")
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            sent.update(repo_id=repo_id, files={path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
            return "commit"

    monkeypatch.setattr(mixin, "HfApi", Api)
    assert ours(10).push_to_hub("someone/something") == "commit"
    assert sent["repo_id"] == "someone/something"
    assert json.loads(sent["files"]["config.json"])["num_classes"] == 10
    assert b"mnv2_fused" in sent["files"]["README.md"] and len(sent["files"]["model.safetensors"]) > 1 << 20


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.save_pretrained("folder"),
        lambda model: model.push_to_hub("someone/something"),
        lambda model: type(model).from_pretrained("someone/something"),
    ],
)
def test_without_huggingface_hub(call: Callable[[Any], Any], tmp_path: Path) -> None:
    """In a process that cannot import it."""
    import inspect
    import subprocess
    import sys

    line = inspect.getsource(call).strip().rstrip(",").partition("lambda model: ")[2]
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "import mnv2_fused\nmodel = mnv2_fused.MobileNetV2(width_mult=0.35)\n"
        f"try:\n    {line}\nexcept ImportError as error:\n    print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.strip() == "huggingface_hub is not installed: pip install 'mnv2_fused[hub]'", ran.stderr
