"""Networks compiled, exported, packaged and written as ONNX: one op of the weights as they are, or plain layers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import logits_of, with_statistics

from mnv2_fused import DeepLabV3, MobileNetV2, empty_cache, fuse, ops, to_onnx
from mnv2_fused.network import MAX_PACKED, chain

NETWORKS = {
    "ours": lambda: MobileNetV2(width_mult=0.1),
    "same padding": lambda: MobileNetV2(width_mult=0.1, padding="same"),
    "torchvision": lambda: fuse(zoo.TorchvisionMobileNetV2(0.1)),
    "timm": lambda: fuse(zoo.TimmMobileNetV2(0.1)),
    "transformers": lambda: fuse(zoo.TransformersMobileNetV2(zoo.Config(0.1))),
}


def settled(name: str) -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(NETWORKS[name](), torch.randn(4, 3, 64, 64))


def our_ops(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "mnv2_fused" in str(node.target)]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    empty_cache()


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_in_eval_mode(name: str) -> None:
    """One graph with one op for any batch and size, to the bit what the model computes; weights may change."""
    model, graphs = settled(name), []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for size in [(2, 3, 64, 80), (3, 3, 47, 50), (4, 3, 33, 96)]:  # of a square the compiler notes that it is one
            x = torch.randn(size)
            assert torch.equal(logits_of(compiled(x)), logits_of(model(x)))
        assert [our_ops(graph) for graph in graphs] == [["mnv2_fused.chain.default"]]
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.01)
        assert torch.equal(logits_of(compiled(x)), logits_of(model(x)))
    assert len(graphs) == 1


def test_compiled_under_autocast_and_in_bfloat16() -> None:
    model, x = settled("torchvision"), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
            assert y.dtype == torch.bfloat16
            assert (y - model(x)).norm() <= 0.02 * y.norm()  # the images are rounded in another place
        model.bfloat16()
        assert torch.equal(compiled(x.bfloat16()), model(x.bfloat16()))


@pytest.mark.parametrize("change", ["training", "hook", "gradients", "disabled", "fused"])
def test_compiled_as_plain_layers(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a call would not run as one op, it does not when compiled."""
    model, x = settled("ours"), torch.randn(2, 3, 32, 32)
    called: list[int] = []
    if change == "training":
        model.features[3].conv[1][1].train()
    elif change == "hook":
        model.features[3].conv[1][0].register_forward_hook(lambda *_: called.append(1))
    elif change == "disabled":
        monkeypatch.setenv("MNV2_FUSED_DISABLE", "1")
    elif change == "fused":
        model.fused = False
    plain = copy.deepcopy(model)
    plain.fused = False
    with torch.set_grad_enabled(change == "gradients"):
        expected, result = plain(x), torch.compile(model, backend="eager")(x)
    assert (result - expected).norm() < 1e-5 * expected.norm()
    assert result.requires_grad == (change == "gradients") and (change != "hook" or len(called) >= 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_exported_and_loaded(name: str, tmp_path: Path) -> None:
    """For any batch and size, saved and loaded in another process."""
    model, x = settled(name), torch.randn(2, 3, 64, 64)
    n, h, w = (torch.export.Dim(axis, min=1, max=512) for axis in "nhw")
    shapes = ({0: n, 2: h, 3: w},)
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    assert our_ops(program.graph) == ["mnv2_fused.chain.default"]
    other = torch.randn(3, 3, 45, 71)
    with torch.no_grad():
        expected = {"x": logits_of(model(x)), "other": logits_of(model(other))}
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save({"x": x, "other": other, "expected": expected}, tmp_path / "data.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch, mnv2_fused, zoo\n"
        "data = torch.load('data.pt')\n"
        "call = torch.export.load('model.pt2').module()\n"
        "for name in ('x', 'other'):\n"
        "    for _ in range(2):\n"
        "        assert torch.equal(zoo.logits_of(call(data[name])), data['expected'][name])\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_exported_parts() -> None:
    """Of a segmenter, whose head is torch's, blocks are ops."""
    torch.manual_seed(0)
    model, x = DeepLabV3(5, width_mult=0.1).eval(), torch.randn(1, 3, 33, 33)
    program = torch.export.export(model, (x,))
    assert "mnv2_fused.chain.default" in our_ops(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected, found = model(x)["out"], torch.export.load(buffer).module()(x)["out"]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.exhaustive  # a compiler runs for half a minute
@pytest.mark.parametrize("name", ["ours", "same padding"])
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    """A package runs in a process that imports mnv2_fused, and packs the weights once."""
    model, x = settled(name), torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    with torch.no_grad():
        torch.save({"x": x, "expected": model(x)}, tmp_path / "data.pt")
    code = (
        "import torch, mnv2_fused\n"
        "data = torch.load('data.pt')\n"
        f"call = torch._inductor.aoti_load_package({package!r})\n"
        "for n in (2, 1, 2):\n"
        "    assert torch.equal(call(data['x'][:n]), data['expected'][:n])\n"
        "print(len(mnv2_fused.ops.packed_chains))\n"
        "with torch.profiler.profile() as profile:\n"
        "    call(data['x'])\n"
        "print(any(event.name == 'mnv2_fused::pack' for event in profile.events()))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.split()[-2:] == ["1", "False"], ran.stderr


# ---------------------------------------------------------------------------------------------- what the op remembers


def arguments(model: MobileNetV2) -> tuple[list[Tensor | None], list[float], str]:
    program = torch.export.export(model, (torch.randn(1, 3, 32, 32),))
    (node,) = (node for node in program.graph.nodes if "chain" in str(node.target))
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return [None if t is None else state[names[t.name]].detach() for t in node.args[1]], node.args[2], node.args[3]


def test_packed_weights_follow_the_tensors() -> None:
    model, x = settled("ours"), torch.randn(1, 3, 32, 32)
    tensors, eps, layers = arguments(model)
    with torch.no_grad():
        assert torch.equal(chain(x, tensors, eps, layers), model(x))
        copies = [None if t is None else t.clone() for t in tensors]
        assert torch.equal(chain(x, copies, eps, layers), model(x)) and len(ops.packed_chains) == 2
        small = next(t for t in copies if t is not None and t.numel() < 64)
        small.add_(1)  # of which AOTInductor makes copies: told apart by what they hold
        assert not torch.equal(chain(x, copies, eps, layers), model(x)) and len(ops.packed_chains) == 2
        again = [t.clone() if t is not None and t.numel() < 64 else t for t in copies]
        assert torch.equal(chain(x, again, eps, layers), chain(x, copies, eps, layers))
        again[next(i for i, t in enumerate(again) if t is not None and t.numel() < 64)].sub_(1)
        assert not torch.equal(chain(x, again, eps, layers), chain(x, copies, eps, layers))
        for _ in range(MAX_PACKED + 3):
            chain(x, [None if t is None else t.clone() for t in tensors], eps, layers)
        assert len(ops.packed_chains) == MAX_PACKED
        with torch.inference_mode():
            inference = [None if t is None else t.clone() for t in tensors]
            before = chain(x, inference, eps, layers)
            inference[0].mul_(2)
            assert not torch.equal(chain(x, inference, eps, layers), before)
    empty_cache()
    assert len(ops.packed_chains) == 0


@pytest.mark.parametrize("how", ["fused SGD", "fused AdamW", "recalibrated", ".data"])
def test_compiled_weights_follow_training(how: str) -> None:
    """Where PyTorch counts no versions of what was written to."""
    model, x = settled("ours"), torch.randn(4, 3, 32, 32)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    if how == "recalibrated":
        model.fused = False
        with torch.no_grad():
            model.train()(x)
        model.eval().fused = True
        compiled = torch.compile(model, backend="eager")
    elif how == ".data":
        model.features[0][0].weight.data.mul_(3)
        model.repack()
    else:
        kind = torch.optim.SGD if "SGD" in how else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=0.1, fused=True)
        model(x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(x)
        assert (compiled(x) - expected).norm() < 1e-5 * expected.norm()


def test_opcheck() -> None:
    model, x = settled("same padding"), torch.randn(1, 3, 31, 32)
    with torch.no_grad():
        torch.library.opcheck(chain, (x, *arguments(model)))


# --------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx(name: str, tmp_path: Path) -> None:
    """Any batch, and any size where the padding is no question of it; the model stays as it is."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = settled(name)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = logits_of(model(x))
        to_onnx(model, tmp_path / "model.onnx", image_size=64)
        assert torch.equal(logits_of(model(x)), before) and model.why_not_fused(x) == ""
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        sizes = [(3, 3, 64, 64)] + [(2, 3, 80, 51)] * (name in ("ours", "torchvision", "timm"))
        for size in sizes:
            x = torch.randn(size)
            (found,) = session.run(None, {"images": x.numpy()})
            expected = logits_of(model(x))
            assert (torch.from_numpy(found) - expected).norm() < 1e-4 * expected.norm()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_onnx_of_several_maps_and_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model = MobileNetV2(width_mult=0.1, features_only=True)
    to_onnx(model, tmp_path / "maps.onnx", image_size=64)
    session = runtime.InferenceSession(str(tmp_path / "maps.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [f"output_{i}" for i in range(5)] and model.training
    with pytest.raises(ValueError, match="Linear has no convolution"):
        to_onnx(nn.Linear(2, 3), tmp_path / "none.onnx")
    monkeypatch.setattr("mnv2_fused.onnx.TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="output_0 is .* off by"):
        to_onnx(model, tmp_path / "wrong.onnx", image_size=64)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is not installed: pip install 'mnv2_fused\[onnx\]'"):
        to_onnx(model, tmp_path / "none.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["maps.onnx"]
