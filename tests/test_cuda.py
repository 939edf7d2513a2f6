"""The CUDA kernels: emulated on the CPU wherever there is a C++ compiler, and on the device where there is one."""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulation
import pytest
import torch
from blocks import CONVOLUTIONS, Block, convolutions
from emulation import NETWORK, TOLERANCE, TYPES, Op, dtype_of
from torch import Tensor

from mnv2_fused import MobileNetV2, network, ops


def arguments(block: Block, kind: str) -> tuple[Tensor | None, ...]:
    """As numbers of the kind's dtype; those of a network whose activations stay small."""
    x, *weights = block.tensors()
    return tuple(None if t is None else t.to(dtype_of(kind)) for t in (x, *weights))


def raw(block: Block) -> tuple[object, ...]:
    sides = (block.padding,) * 4 if isinstance(block.padding, int) else block.padding
    return block.stride, block.dilation, sides, block.residual, block.project_relu6


def run(call: Op, block: Block, kind: str) -> Tensor:
    """A block with one kind of numbers."""
    return call("inverted_residual", *arguments(block, kind), *raw(block), kind == "tf32")


def check(call: Op, block: Block, kind: str) -> None:
    y = run(call, block, kind)
    assert y.dtype == dtype_of(kind) and y.is_contiguous(memory_format=torch.channels_last)
    exact = [None if t is None else t.double() for t in arguments(block, kind)]
    truth = ops.inverted_residual_reference(*exact, **block.options)
    error = float((y.double() - truth).norm() / truth.norm())
    assert y.shape == truth.shape and error <= TOLERANCE[kind], f"{block} in {kind}: off by {error:.1e}"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("block", NETWORK, ids=lambda block: block.id)
def test_blocks_of_the_network(call: Op, block: Block, kind: str) -> None:
    check(call, block, kind)


def random_block(seed: int) -> Block:
    r = random.Random(seed)
    in_channels, out_channels = r.choice((3, 8, 12, 16, 24, 25, 40)), r.choice((1, 8, 10, 16, 24, 33, 72))
    expand, dilation, stride = r.random() < 0.8, r.choice((1, 1, 1, 2)), r.choice((1, 2))
    hidden = r.choice((7, 16, 32, 33, 48, 96, 100)) if expand else in_channels
    residual = stride == 1 and r.random() < 0.5
    padding: int | tuple[int, int, int, int] = dilation
    if not residual and r.random() < 0.3:
        padding = tuple(r.randint(0, 3) for _ in range(4))
    height, width = (r.choice((5, 6, 7, 8, 9, 13)) for _ in range(2))
    layout = r.choice(("channels_last", "channels_last", "contiguous", "channel_slice", "crop"))
    return Block(
        in_channels, hidden, in_channels if residual else out_channels, height, width, r.choice((1, 1, 2, 5)),
        stride, dilation, padding, expand, residual, r.random() < 0.2, layout,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(16))
def test_random_blocks(call: Op, seed: int) -> None:
    check(call, random_block(seed), TYPES[seed % 4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", TYPES)
def test_200_random_blocks(call: Op, kind: str) -> None:
    for seed in range(1000, 1200):
        check(call, random_block(seed), kind)


@pytest.mark.parametrize("order", ["backward", "random"])
@pytest.mark.parametrize("kind", TYPES)
def test_threads_in_another_order(emulated: None, order: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comes out however the threads run between two barriers, and whenever copies arrive."""
    blocks = (random_block(3), NETWORK[1], Block(24, 96, 24, 7, 7, residual=True), Block(40, 250, 40, 5, 5, batch=3))
    op = torch.ops.mnv2_emulated.inverted_residual
    for block in blocks:
        tensors = arguments(block, kind)
        monkeypatch.delenv("MNV2_EMULATION_ORDER", raising=False)
        usual = op(*tensors, *raw(block), kind == "tf32")
        monkeypatch.setenv("MNV2_EMULATION_ORDER", order)
        assert torch.equal(op(*tensors, *raw(block), kind == "tf32"), usual), (block, kind)


@pytest.mark.parametrize("pairs", [[], pytest.param(["all"], marks=pytest.mark.exhaustive)], ids=["some", "all"])
def test_nothing_is_touched_outside_the_tensors(emulated: None, pairs: list[str]) -> None:
    """In a process of its own, on tensors that lie against unmapped pages; shared memory always does."""
    script = Path(__file__).with_name("guarded_pages.py")
    done = subprocess.run([sys.executable, script, "emulated", *pairs], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-500:]}\n{done.stderr[-500:]}"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("relu6", [0, 1], ids=["linear", "relu6"])
@pytest.mark.parametrize(("layers", "size"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_a_plan(
    call: Op, layers: list[ops.Layer], size: tuple[int, int], relu6: int, kind: str
) -> None:
    """With and without the ReLU6 after a stem's or a head's convolution: in training its BatchNorm comes first."""
    x, weights, truth = convolutions(layers, size, relu6)
    dtype = dtype_of(kind)
    plan = ops.make_plan([layer._replace(relu6=relu6) for layer in layers], dtype, "cuda", kind == "tf32")
    y = call("network", x.to(dtype), call("pack", weights.to(dtype), plan), plan)
    assert y.dtype == dtype and y.shape == truth.shape
    assert float((y.double() - truth).norm()) <= TOLERANCE[kind] * float(truth.norm())


def test_no_image(call: Op) -> None:
    assert run(call, Block(8, 16, 8, 5, 5, batch=0), "float16").shape == (0, 8, 5, 5)


def trained(model: MobileNetV2, images: Tensor) -> MobileNetV2:
    """In eval mode, with the statistics of these images, and scales and shifts as training leaves them: what an image
    is reaches the logits, and so does what a kernel makes of it."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.uniform_(0.5, 1.5, generator=generator)
        norm.bias.data.normal_(1, 0.3, generator=generator)
        norm.momentum = 1.0
    model.fused = False
    model.train().forward_features(images)
    for norm in norms:
        norm.momentum = 0.1
    model.fused = True
    return model.eval()


MODELS = {  # arguments and the size of the input
    "small": (dict(width_mult=0.35, num_classes=10), (2, 3, 32, 32)),
    "odd sizes": (dict(width_mult=0.35, num_classes=7), (2, 3, 45, 33)),
    "one channel, no classifier": (dict(width_mult=0.5, num_classes=0, in_channels=1), (1, 1, 33, 64)),
    "a stem by itself": (
        dict(inverted_residual_setting=[(6, 16, 1, 2), (6, 24, 2, 2)], num_classes=100),
        (1, 3, 40, 40),
    ),
    "a large map": (dict(inverted_residual_setting=[(1, 8, 1, 1)], num_classes=5, width_mult=0.35), (2, 3, 46, 46)),
}


def usually(name: str, kind: str) -> bool:
    """The first model in every kind of numbers, each of the others in one."""
    place = list(MODELS).index(name)
    return place == 0 or TYPES[place % len(TYPES)] == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if usually(name, kind) else [pytest.mark.exhaustive])
        for name in MODELS
        for kind in TYPES
    ],
)
@torch.no_grad()
def test_models(device: str, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole network, and its features, as one op: any layout of the image, twice with the same result."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", kind == "tf32")
    options, size = MODELS[name]
    torch.manual_seed(0)
    x = torch.randn(size)
    model = trained(MobileNetV2(**options), torch.randn(4, *size[1:]))
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact.fused = eager.fused = False
    model, x = model.to(device, dtype_of(kind)), x.to(dtype_of(kind))

    def check(found: Tensor, truth: Tensor, plain: Tensor) -> None:
        """Layers add to each other's rounding; by more than the tolerance only where eager's does it as well."""
        usual = float((plain.double() - truth).norm() / truth.norm())
        error = float((found.double() - truth).norm() / truth.norm())
        assert found.dtype == x.dtype and error <= max(TOLERANCE[kind], 1.5 * usual), (error, usual)

    # On the CPU eager knows no TF32: float16 has as many digits.
    alike = torch.float16 if kind == "tf32" else dtype_of(kind)
    eager.to(alike)
    truth, plain = exact(x.double()), eager(x.to(alike))
    features = exact.forward_features(x.double()), eager.forward_features(x.to(alike))
    for image in (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, : size[1]]):
        given = image.to(device)
        assert model.why_not_fused(given) == ""
        y = model(given)
        check(y.cpu(), truth, plain)
        assert torch.equal(model(given), y)
        check(model.forward_features(given).cpu(), *features)
    assert float((truth - truth[:1]).norm()) > 0.02 * float(truth.norm()) or len(x) == 1, "all images look alike"
    assert model(x[:0].to(device)).shape == (0, y.shape[1])


@torch.no_grad()
def test_a_model_follows_its_weights_autocast_and_tf32(emulated_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 32, 32)
    model = trained(MobileNetV2(width_mult=0.35, num_classes=4), torch.randn(4, 3, 32, 32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    exact = model(x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not torch.equal(model(x), exact)
    monkeypatch.setattr(network, "is_autocast_enabled", lambda device: device == "cuda")
    monkeypatch.setattr(network, "get_autocast_dtype", lambda device: torch.bfloat16)
    y = model(x)  # weights rounded once, after the BatchNorms are folded in
    assert y.dtype == torch.bfloat16 and torch.equal(model(x.bfloat16()), y)
    for other in (copy.deepcopy(model).bfloat16()(x.bfloat16()), exact):
        assert float((y.float() - other.float()).norm()) < 0.1 * float(exact.norm())
    monkeypatch.undo()
    model.classifier[1].bias += 1
    monkeypatch.setattr(ops, "device_type", lambda x: "cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert torch.allclose(model(x), exact + 1)
    assert "no kernel for torch.float64" in model.double().why_not_fused(x.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.double), "x must be float16, bfloat16 or float32"),
        (dict(stride=3), "stride must be 1 to 2, got 3"),
        (dict(dilation=4), "the output would be empty"),
        (dict(weight=torch.half), "expand_weight must have the dtype of x"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(emulated: None, change: dict[str, object], message: str) -> None:
    x, we, *rest = Block(8, 16, 8, 5, 5).tensors()
    x, we = x.to(change.get("x", x.dtype)), we.to(change.get("weight", we.dtype))
    stride, dilation = change.get("stride", 1), change.get("dilation", 1)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mnv2_emulated.inverted_residual(x, we, *rest, stride, dilation, (1, 1, 1, 1), False, False)


def test_a_cuda_tensor_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops._C, "build_report", lambda: {"cuda": "", "no_cuda": "no nvcc was found"})
    ops.no_cuda.cache_clear()
    assert ops.why_no_cuda() == "mnv2_fused was built without CUDA: no nvcc was found"
    monkeypatch.undo()
    ops.no_cuda.cache_clear()


def test_what_a_device_says_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, where there is no device, or one for which nothing was compiled."""
    if not ops.no_cuda() and not torch.cuda.is_available():
        assert "mnv2_fused was built for sm_80, sm_90, the device says: " in ops.no_cuda(7)
    elif torch.cuda.is_available():
        assert ops.no_cuda(torch.cuda.current_device()) == ""


def test_tiles_of_a_large_device(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that an H100 takes."""
    monkeypatch.setenv("MNV2_EMULATION_PROCESSORS", "132")
    op = torch.ops.mnv2_emulated.inverted_residual
    for block in NETWORK:
        tensors = arguments(block, "float16")
        exact = [None if t is None else t.double() for t in tensors]
        truth = ops.inverted_residual_reference(*exact, **block.options)
        y = op(*tensors, *raw(block), False)
        assert float((y.double() - truth).norm() / truth.norm()) <= TOLERANCE["float16"], block


def test_compiled(emulated_device: None) -> None:
    """Training without a graph break, as on a GPU; with the same gradients."""
    torch.manual_seed(0)
    setting = [(1, 8, 1, 1), (6, 8, 2, 1)]
    model, x = MobileNetV2(inverted_residual_setting=setting, dropout=0.0), torch.randn(2, 3, 9, 9)
    gradients = []
    for run in (model, torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)):
        run(x).square().sum().backward()
        gradients.append([p.grad for p in run.parameters()])
    for compiled, eager in zip(*gradients, strict=True):
        assert torch.allclose(compiled, eager, rtol=1e-3, atol=1e-4)


def test_a_replica_of_data_parallel_runs_unfused() -> None:
    """It shares what is packed with its original, and has no parameters of its own."""
    model = MobileNetV2(width_mult=0.35, num_classes=4).eval()
    model._is_replica = True
    with torch.no_grad():
        assert model.why_not_fused(torch.randn(1, 3, 32, 32)) == "a replica of nn.DataParallel"


def test_tf32_by_either_of_torchs_ways(emulated_device: None) -> None:
    x = torch.zeros(1, 1, 1, 1)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert ops.uses_tf32(x) == (precision == "tf32")
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ops_fakes_beside_float32_parameters(emulated_device: None, dtype: torch.dtype) -> None:
    """What torch.compile is told of shapes, dtypes and strides is so."""
    x, w = torch.randn(2, 3, 9, 9).to(dtype), torch.randn(8, 3, 3, 3)
    stage = (w, None, torch.ones(8), torch.zeros(8), None, None, 1e-5)
    test_utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mnv2_fused.conv_bn_relu6, (x, *stage, [2, 2], [1, 1], ""), test_utils=test_utils)
    x, (_, we, _, wd, _, wp, _) = torch.randn(2, 8, 9, 9).to(dtype), Block(8, 16, 8, 9, 9).tensors()
    norm = [(t, None, torch.ones(n), torch.zeros(n), None, None, 1e-5) for t, n in ((we, 16), (wd, 16), (wp, 8))]
    arguments = (x, *(value for stage in norm for value in stage), 1, 1, [1, 1, 1, 1], True, False, "")
    torch.library.opcheck(torch.ops.mnv2_fused.block_train, arguments, test_utils=test_utils)


@pytest.fixture(params=["device"])
def gpu(request: pytest.FixtureRequest) -> None:
    if reason := ops.why_no_cuda():
        pytest.skip(f"no GPU: {reason}")


def small_model() -> tuple[MobileNetV2, Tensor]:
    torch.manual_seed(0)
    return trained(MobileNetV2(width_mult=0.35, num_classes=10), torch.randn(4, 3, 32, 32)), torch.randn(2, 3, 32, 32)


def step_of(model: MobileNetV2, x: Tensor) -> list[Tensor]:
    """The gradients of a step of training."""
    return list(torch.autograd.grad(model.train()(x).square().sum(), list(model.parameters())))


@torch.no_grad()
def test_a_second_stream(gpu: None) -> None:
    """All of it runs on the current stream: elsewhere it would not wait for what this one still has to do."""
    model, x = small_model()
    model, x = model.cuda(), x.cuda()
    expected, late, aside = model(x), torch.zeros_like(x), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        late.copy_(x)
        y = model(late)
    torch.cuda.current_stream().wait_stream(aside)
    assert torch.equal(y, expected)


def test_a_step_of_training_on_a_second_stream(gpu: None) -> None:
    model, x = small_model()
    model, x = model.cuda(), x.cuda()
    expected, late, aside = step_of(copy.deepcopy(model), x), torch.zeros_like(x), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        gradients = step_of(model, late)
    torch.cuda.current_stream().wait_stream(aside)
    for found, truth in zip(gradients, expected, strict=True):
        assert torch.equal(found, truth)


@torch.no_grad()
def test_captured_in_a_graph(gpu: None) -> None:
    model, x = small_model()
    model, x = model.cuda(), x.cuda()
    expected, image = model(x), torch.zeros_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(image)
    image.copy_(x)
    graph.replay()
    assert torch.equal(y, expected)


@torch.no_grad()
def test_a_second_device(gpu: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    model, x = small_model()
    expected = model.cuda(0)(x.cuda(0))
    assert torch.equal(model.cuda(1)(x.cuda(1)).cpu(), expected.cpu())


@pytest.mark.parametrize("moved", range(6))
def test_tensors_on_different_devices_are_named(gpu: None, moved: int) -> None:
    x, *weights = Block(8, 16, 8, 5, 5).tensors()
    names = ("expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias")
    elsewhere = [w if i == moved else w.cuda() for i, w in enumerate(weights)]
    with pytest.raises(RuntimeError, match=f"{names[moved]} must be on the device of x"):
        ops.inverted_residual(x.cuda(), *elsewhere, padding=1)


@torch.inference_mode()
def test_inference_mode_and_autocast(gpu: None) -> None:
    model, x = small_model()
    exact = model(x)
    model, x = model.cuda(), x.cuda()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            assert model.why_not_fused(x) == ""
            y = model(x)
        assert y.dtype == dtype and float((y.cpu().float() - exact).norm() / exact.norm()) < 0.05


KINDS = [f"{kind}{part}" for part in ("", "_training") for kind in ("half", "bfloat16", "tf32", "single")]
QUICK = {("half", "90"), ("half_training", "90")}  # the others take a minute each


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        pytest.param(kind, arch, marks=[] if (kind, arch) in QUICK else [pytest.mark.exhaustive])
        for kind in [*KINDS, "algebra"]
        for arch in ("80", "90")
    ],
)
def test_no_instance_spills_and_none_has_arrays_in_memory(kind: str, arch: str, tmp_path: Path) -> None:
    """As ptxas reports it."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}")
    if not nvcc:
        pytest.skip("no nvcc")
    source, target = emulation.ROOT / f"csrc/cuda/{kind}.cu", tmp_path / "kernels"
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", source, "-o", target]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= 10 and set(frames) == {("0", "0", "0")}, report
