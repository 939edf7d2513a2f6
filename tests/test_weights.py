"""Weights files: what fits is loaded exactly, what is hostile or damaged is refused with one line and never run."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mnv2_fused import MobileNetV2, weights
from mnv2_fused.weights import WeightsError, infer_architecture, load_model, random_model, read_state_dict


@pytest.fixture(scope="module")
def state_dict():
    torch.manual_seed(0)
    return MobileNetV2(num_classes=10, width_mult=0.35).state_dict()


def refusal(function, *args, **kwargs):
    with pytest.raises(WeightsError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message


# ---- what is accepted


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pth_is_loaded_exactly(tmp_path, state_dict, wrapper, prefix, legacy):
    content = {prefix + key: value for key, value in state_dict.items()}
    content = {wrapper: content, "epoch": 3} if wrapper else content
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    model = load_model(tmp_path / "a.pth")
    assert not model.training and model.num_classes == 10
    for key, value in model.state_dict().items():
        assert torch.equal(value, state_dict[key]), key


def test_safetensors_without_counters(tmp_path, state_dict):
    """num_batches_tracked, which nothing at inference reads, is often left out."""
    content = {key: value for key, value in state_dict.items() if "num_batches" not in key}
    assert len(content) == 314 - 52
    save_file(content, tmp_path / "a.safetensors")
    for key, value in load_model(tmp_path / "a.safetensors").state_dict().items():
        assert torch.equal(value, state_dict[key]), key


def test_half_precision_files_become_float32(tmp_path, state_dict):
    torch.save(
        {key: value.half() if value.is_floating_point() else value for key, value in state_dict.items()},
        tmp_path / "a.pt",
    )
    weight = load_model(tmp_path / "a.pt").features[0][0].weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state_dict["features.0.0.weight"].half().float())


@pytest.mark.parametrize("width_mult", [0.1, 0.25, 0.35, 0.5, 0.6, 0.75, 1.0, 1.1, 1.3, 1.4, 2.0])
@pytest.mark.parametrize("num_classes, in_channels", [(1, 1), (1001, 3)])
def test_architecture_is_read_off_the_shapes(width_mult, num_classes, in_channels):
    with torch.device("meta"):
        wanted = MobileNetV2(num_classes, width_mult, in_channels=in_channels).state_dict()
        found = infer_architecture(wanted)
        built = MobileNetV2(**found).state_dict()
    assert (found["num_classes"], found["in_channels"]) == (num_classes, in_channels)
    assert {key: value.shape for key, value in built.items()} == {key: value.shape for key, value in wanted.items()}
    if width_mult in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4):
        assert found["width_mult"] == width_mult  # by its published name, where neighbours round to the same channels


# ---- what does not fit


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.pop("features.3.conv.1.0.weight"), ["1 keys missing", "features.3.conv.1.0.weight"]),
        (lambda d: d.update({"head.bias": torch.zeros(3)}), ["1 keys unexpected", "head.bias"]),
        (
            lambda d: d.update({"features.2.conv.1.1.bias": torch.zeros(7)}),
            ["features.2.conv.1.1.bias (7,) (expected (48,))", "width 0.35"],
        ),
        (lambda d: d.update({"classifier.1.bias": torch.zeros(11)}), ["classifier.1.bias (11,) (expected (10,))"]),
        (lambda d: d.update({"features.0.0.weight": torch.zeros(17, 3, 3, 3)}), ["no width multiplier", "(17, 8, 8"]),
        (lambda d: d.update({"features.0.0.weight": torch.tensor(1.0)}), ["features.0.0.weight of rank 4", "()"]),
        (lambda d: d.update({"features.1.conv.1.weight": torch.tensor(1.0)}), ["no width multiplier"]),
        (lambda d: d.update({"classifier.1.weight": torch.zeros(0, 1280)}), ["a row per class", "(0, 1280)"]),
        (
            lambda d: d.update({"features.0.1.bias": torch.zeros(16, dtype=torch.int8)}),
            ["torch.int8", "floating point"],
        ),
        (lambda d: d["features.0.1.bias"].fill_(float("nan")), ["features.0.1.bias", "not finite"]),
        (
            lambda d: d.update({"features.0.1.bias": torch.full((16,), 1e300, dtype=torch.float64)}),
            ["not finite in float32"],
        ),
    ],
)
def test_a_mismatch_names_the_keys(tmp_path, state_dict, change, words):
    changed = {key: value.clone() for key, value in state_dict.items()}
    change(changed)
    torch.save(changed, tmp_path / "a.pth")
    message = refusal(load_model, tmp_path / "a.pth")
    assert all(word in message for word in ["a.pth", *words]), message


def test_another_network_lists_a_few_keys(tmp_path):
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(100)}, tmp_path / "a.pth")
    message = refusal(load_model, tmp_path / "a.pth")
    assert "262 keys missing: features.0.0.weight" in message and "257 more" in message
    assert "100 keys unexpected: layer0.weight" in message and "95 more" in message


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 1}, {"a": [torch.zeros(1)]}, {1: torch.zeros(1)}, 7])
def test_what_is_not_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    assert "expected" in refusal(read_state_dict, tmp_path / "a.pth")


@pytest.mark.parametrize(
    "convert",
    [torch.Tensor.to_sparse, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), lambda t: t.to("meta")],
)
@pytest.mark.filterwarnings("ignore")  # torch announces the end of quantized tensors
def test_unusual_tensors(tmp_path, convert):
    torch.save({"a": convert(torch.ones(3))}, tmp_path / "a.pth")
    assert "a is not a plain dense tensor" in refusal(read_state_dict, tmp_path / "a.pth")


# ---- what is hostile or damaged


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("place", ["alone", "among the tensors"])
def test_code_in_a_pickle_does_not_run(tmp_path, state_dict, writer, place):
    content = Attack(tmp_path / "ran") if place == "alone" else {**state_dict, "x": Attack(tmp_path / "ran")}
    path = tmp_path / "a.pth"
    if writer == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    message = refusal(load_model, path)
    assert "mkdir" in message or writer == "plain pickle"
    assert not (tmp_path / "ran").exists()
    if writer == "zip":
        torch.load(path, weights_only=False)
        assert (tmp_path / "ran").exists(), "the attack itself is broken"


def test_a_whole_pickled_model_is_refused_with_advice(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    message = refusal(load_model, tmp_path / "a.pth")
    assert "torch.nn.modules.linear.Linear" in message and "torch.save(model.state_dict(), FILE)" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(tmp_path, state_dict, suffix):
    path = tmp_path / f"a{suffix}"
    torch.save(state_dict, path) if suffix == ".pth" else save_file(state_dict, path)
    content = path.read_bytes()
    for length in (0, 1, 8, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "damaged" in refusal(load_model, path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_text_is_not_weights(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("<html>404 not found</html>\n" * 50)
    assert path.name in refusal(load_model, path)


def test_what_is_not_a_weights_file(tmp_path):
    assert "no such file" in refusal(load_model, tmp_path / "a.pth")
    (tmp_path / "d.pth").mkdir()
    assert "not a regular file" in refusal(read_state_dict, tmp_path / "d.pth")
    assert "a folder without model.safetensors" in refusal(load_model, tmp_path / "d.pth")
    (tmp_path / "a.onnx").touch()
    assert "expected .pth, .pt, .bin or .safetensors" in refusal(load_model, tmp_path / "a.onnx")


def test_size_limit(tmp_path, state_dict):
    for suffix, save in ((".pth", torch.save), (".safetensors", save_file)):
        path = tmp_path / f"a{suffix}"
        save(state_dict, path)
        size = path.stat().st_size
        assert len(read_state_dict(path, max_bytes=size)) == 314
        assert "at most 1000 are read" in refusal(read_state_dict, path, max_bytes=1000)


def test_a_deflated_archive_counts_unpacked(tmp_path):
    torch.save({"a": torch.zeros(1_000_000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as stored, zipfile.ZipFile(tmp_path / "b.pth", "w") as packed:
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "b.pth").stat().st_size < 50_000
    assert "at most 100000 are read" in refusal(read_state_dict, tmp_path / "b.pth", max_bytes=100_000)


def test_an_expanded_tensor_counts_in_full(tmp_path):
    """Stride 0: a terabyte in a file of one kilobyte, until a model is made to fit it."""
    torch.save({"classifier.1.weight": torch.zeros(1).expand(2**28, 1280)}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 4096
    assert f"tensors of {2**28 * 1280 * 4} bytes" in refusal(load_model, tmp_path / "a.pth")


# ---- the download, from file:// and a closed port in place of the network


@pytest.fixture
def origin(tmp_path, state_dict, monkeypatch):
    path = tmp_path / "origin" / "weights.pth"
    path.parent.mkdir()
    torch.save(state_dict, path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "TORCHVISION_URL", path.as_uri())
    monkeypatch.setattr(weights, "TORCHVISION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


def test_download_is_kept_and_checked_every_time(origin, capfd):
    assert load_model("torchvision").num_classes == 10
    assert capfd.readouterr().out == ""
    origin.unlink()
    cached = weights.torchvision_weights()
    assert load_model("torchvision").num_classes == 10
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    assert "remove the file" in refusal(load_model, "torchvision")


def test_download_of_something_else_is_not_kept(origin, tmp_path):
    origin.write_bytes(b"something else")
    assert "invalid hash" in refusal(load_model, "torchvision")
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


def test_offline(origin, monkeypatch):
    monkeypatch.setattr(weights, "TORCHVISION_URL", "http://127.0.0.1:9/weights.pth")  # nobody listens there
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    message = refusal(load_model, "torchvision")
    assert "cannot download http://127.0.0.1:9/weights.pth" in message and "refused" in message


def test_the_real_address_carries_its_hash():
    assert Path(weights.TORCHVISION_URL).stem.rpartition("-")[2] == weights.TORCHVISION_SHA256


# ---- random weights for the demo


def test_random_model_is_seeded_and_alive():
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    state = torch.random.get_rng_state()
    model, again = random_model(images), random_model(images)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers were used"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not model.training
    model.fused = False
    with torch.inference_mode():
        logits = model(images)
    assert logits.std(1).min() > 0.5 and logits.std(1).max() < 8
    assert len(set(logits.argmax(1).tolist())) > 1, "every picture has the same class"
