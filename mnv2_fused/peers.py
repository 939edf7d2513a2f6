"""What `mnv2-fused bench` compares: PyTorch run in four ways, and other runtimes that are fed the same folded weights.

For training it is the fused network against PyTorch in four ways.

MobileNetV2's graphs for the other runtimes are written here, operator by operator, from one list of layers: no exporter
or converter comes between, so each computes the same multiply-adds. ONNX files of other networks are torch.onnx's, of
the plain modules. In bfloat16 each rounds the same float32 network itself; in int8 all are given the integers and
scales of one calibration. Images are float32 in every precision, and logits are what a runner gives: turning images
into what it computes with belongs to the call. What is done with a runner is tasks.py.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint

from . import _C, ops
from .mobilenet_v2 import MobileNet, MobileNetV2
from .quantization import Convolution, QuantizedModel, Range, _range_of, quantize

Call = Callable[[Tensor], Any]


class Runner(NamedTuple):
    """One way to run the network, or to train it.

    Attributes:
        name: as `bench` shows it.
        prepare: (model in eval mode, example [N, C, H, W] float32, threads) -> a function of such an x that returns
            what the model does, a tensor or several, as tensors or arrays. The function is made for the example's
            shape, leaves the model as it is, and may set torch's number of threads, which is one for the whole process.
            In int8 the model is a Quantized. Among TRAINERS it is in training mode and is the one to train: the logits
            have gradients to its parameters, and its memory format and `fused` are set as this way wants them. None
            where `unable` says why.
        packages: the distributions that it needs beside torch; empty for PyTorch itself.
        channels_last: the memory format of x that it takes without a conversion.
        recomputes: backward runs the blocks once more, in training mode, and so updates their running statistics again.
        compiles: the first call with a shape compiles for it.
        chains_only: the graph that it is fed can describe a MobileNetV2, and no network with several outputs.
        remark: what a reader of its results should know.
        unable: why this runtime has no part in this precision.
    """

    name: str
    prepare: Callable[[Any, Tensor, int], Call] | None
    packages: tuple[str, ...] = ()
    channels_last: bool = False
    recomputes: bool = False
    compiles: bool = False
    chains_only: bool = False
    remark: str = ""
    unable: str = ""

    def missing(self, model: nn.Module | Quantized) -> str:
        """Why the runner cannot be prepared for the model: packages to get, or that it has no graph; "" if it can."""
        if not self.unable and self.chains_only and not isinstance(model, (MobileNetV2, Quantized)):
            return "is left out: its graph is written here for MobileNetV2 alone"
        return self.unavailable()

    def unavailable(self) -> str:
        """The same for any model."""
        if self.unable:
            return f"is left out: {self.unable}"
        absent = [name for name in self.packages if importlib.util.find_spec(name.replace("-", "_")) is None]
        return f"not installed: pip install {' '.join(absent)}" if absent else ""

    def input(self, x: Tensor) -> Tensor:
        """x in the memory format that the runner likes best."""
        return x.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


# ---- PyTorch


def _fused(model: nn.Module, example: Tensor, threads: int) -> Call:
    torch.set_num_threads(threads)
    with torch.no_grad():
        if reason := model.why_not_fused(example):
            raise RuntimeError(f"the model would not run fused: {reason}")
    return torch.no_grad()(model)


def _fused_int8(model: Quantized, example: Tensor, threads: int) -> Call:
    torch.set_num_threads(threads)
    return torch.no_grad()(model.model)


def _plain(model: nn.Module, threads: int) -> nn.Module:
    torch.set_num_threads(threads)
    plain = copy.deepcopy(model)
    plain.fused = False
    return plain


def _eager(model: nn.Module, example: Tensor, threads: int) -> Call:
    return torch.no_grad()(_plain(model, threads))


def _eager_channels_last(model: nn.Module, example: Tensor, threads: int) -> Call:
    plain = _plain(model, threads).to(memory_format=torch.channels_last)
    return torch.no_grad()(lambda x: plain(x.contiguous(memory_format=torch.channels_last)))


def _compile(model: nn.Module, example: Tensor, threads: int) -> Call:
    import torch._inductor.config
    from torch._inductor.utils import run_and_get_code

    compiled = torch.compile(_plain(model, threads))
    # Dynamo reads the flag too: torch.compile's own `options` would not do. Nothing else is compiled while it is set.
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        _, code = run_and_get_code(compiled, example)
    if any("batch_norm" in text for text in code):  # kernels are named after the operators in them
        raise RuntimeError("torch.compile left a BatchNorm in its code: freezing did not fold it")
    return torch.no_grad()(compiled)


def _compile_channels_last(model: nn.Module, example: Tensor, threads: int) -> Call:
    return _compile(copy.deepcopy(model).to(memory_format=torch.channels_last), example, threads)


def _in_bfloat16(prepare: Callable[[nn.Module, Tensor, int], Call]) -> Callable[[nn.Module, Tensor, int], Call]:
    def prepared(model: nn.Module, example: Tensor, threads: int) -> Call:
        call = prepare(copy.deepcopy(model).bfloat16(), example.bfloat16(), threads)
        return lambda x: call(x.bfloat16())

    return prepared


# ---- PyTorch, training


def _train_fused(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    torch.set_num_threads(threads)
    model.fused = True
    if reasons := model.unfused(example):
        (part, reason), *others = reasons.items()
        more = f" and {len(others)} other parts" if others else ""
        raise RuntimeError(f"the model would not train fused: {reason} ({part or 'the model'}{more})")
    return model


def _train_eager(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    torch.set_num_threads(threads)
    model.fused = False
    return model


def _train_channels_last(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    return _train_eager(model, example, threads).to(memory_format=torch.channels_last)


def _train_checkpointed(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    return checkpointed(_train_channels_last(model, example, threads))


def checkpointed(model: MobileNetV2) -> Call:
    """The model's forward of which only what goes into each block is kept; backward runs the blocks once more."""

    def forward(x: Tensor) -> Tensor:
        first, *blocks, last = model.features
        x = first(x)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return model.forward_head(last(x))

    return forward


def _train_compile(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    return torch.compile(_train_channels_last(model, example, threads))


# ---- One description for all other runtimes


class Layer(NamedTuple):
    """A convolution with its BatchNorm folded in.

    weight [C_out, C_in / groups, k, k], bias [C_out]; padding k // 2 on every side; then ReLU6 if `relu6`, or the
    output of the layer of index `residual` is added. Both are float32; or in int8 and int32, and stand for themselves
    times `scale` and times `scale` and the scale of what goes in.

    Attributes:
        scale: float32 [C_out] of int8 weights; None in float32.
        rounded: how the result is, in 8 bits; None in float32.
        summand: the same of what `residual` is added to, for runtimes that round in between.
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: int
    groups: int
    relu6: bool
    residual: int | None
    scale: np.ndarray | None = None
    rounded: Range | None = None
    summand: Range | None = None

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]


class Network(NamedTuple):
    """The layers, each fed by the one before; then the mean over the pixels and a linear layer [classes, features].

    Attributes:
        weight, bias, scale: of the linear layer, as of a Layer.
        image, mean, logits: how these are rounded to 8 bits, the last for runtimes that can do no other; None in
            float32.
    """

    layers: list[Layer]
    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None = None
    image: Range | None = None
    mean: Range | None = None
    logits: Range | None = None


def describe(model: MobileNetV2) -> Network:
    """The network of `model` with its BatchNorms folded, computed in float64."""
    layers: list[Layer] = []

    def add(conv: nn.Conv2d, norm: nn.BatchNorm2d, relu6: bool, residual: int | None = None) -> None:
        tensors = (conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        folded = fuse_conv_bn_weights(*(t.detach().double() if isinstance(t, Tensor) else t for t in tensors))
        weight, bias = (t.detach().float().numpy() for t in folded)
        layers.append(Layer(weight, bias, conv.stride[0], conv.groups, relu6, residual))

    first, *blocks, last = model.features
    add(first[0], first[1], True)
    for block in blocks:
        entry = len(layers) - 1
        *inner, project, norm = block.conv
        for conv, inner_norm, _ in inner:
            add(conv, inner_norm, True)
        add(project, norm, False, entry if block.use_res_connect else None)
    add(last[0], last[1], True)
    linear = model.classifier[-1]
    return Network(layers, *(t.detach().float().numpy() for t in (linear.weight, linear.bias)))


class Quantized(NamedTuple):
    """What int8 runners are given: one calibration for all.

    Attributes:
        model: the fused one, whose integers and scales are everybody's.
        summands: ranges that it does without, in the order of its blocks that have a shortcut: of what comes out of the
            projection before the shortcut is added.
        logits: their range, for a runtime that gives them in 8 bits.
    """

    model: QuantizedModel
    summands: tuple[Range, ...]
    logits: Range


def quantized(model: MobileNet, images: Tensor) -> Quantized:
    """The model in int8, calibrated on images [N, C, H, W]; ranges beside those of the fused model are all values'."""
    extremes: dict[nn.Module, tuple[float, float]] = {}

    def see(module: nn.Module, _: tuple[Tensor], y: Tensor) -> None:
        extremes[module] = min(float(y.min()), 0.0), max(float(y.max()), 0.0)

    plain = copy.deepcopy(model)
    plain.fused = False
    blocks = [module for module in plain.modules() if getattr(module, "use_res_connect", False)]
    for module in (*(block.conv[-1] for block in blocks), plain.classifier):
        module.register_forward_hook(see)
    with torch.no_grad():
        plain(images)
    *summands, logits = (_range_of(*extremes[module]) for module in (*(b.conv[-1] for b in blocks), plain.classifier))
    return Quantized(quantize(model, [images]), tuple(summands), logits)


def describe_quantized(quantized: Quantized) -> Network:
    """The same network of int8 weights, their scales for each channel, and int32 biases without zero points in them."""
    model, layers, summands = quantized.model, [], iter(quantized.summands)
    x = model.image

    def integers(c: Convolution, output_scale: float) -> dict[str, np.ndarray]:
        bias = c.bias + x.zero_point * c.weight.flatten(1).sum(1, dtype=torch.int32)
        scale = c.multiplier.double() * output_scale / x.scale
        return dict(weight=c.weight.numpy(), bias=bias.numpy(), scale=scale.float().numpy())

    for q in model.layers:
        entry = len(layers) - 1
        if q.layer.kind == ops.LINEAR:
            linear = integers(*q.convolutions, 1.0)
            return Network(layers, **linear, image=model.image, mean=x, logits=quantized.logits)
        if q.layer.kind == ops.POOL:
            x = q.ranges[0]
        for c, y in zip(q.convolutions, q.ranges, strict=False):  # of the mean there is a range alone
            last, k = c is q.convolutions[-1], c.weight.shape[2]
            added = bool(q.layer.residual and last)
            layers.append(
                Layer(
                    **integers(c, y.scale),
                    stride=q.layer.stride if k > 1 else 1,
                    groups=len(c.weight) if k > 1 and q.layer.kind == ops.BLOCK else 1,
                    relu6=bool(q.layer.relu6 or not last),
                    residual=entry if added else None,
                    rounded=y,
                    summand=next(summands) if added else None,
                )
            )
            x = y
    raise ValueError("a network without a classifier has no int8 graph here")


def _describe(model: MobileNetV2 | Quantized) -> Network:
    return describe_quantized(model) if isinstance(model, Quantized) else describe(model)


def _numpy(x: Tensor) -> np.ndarray:
    return x.contiguous().numpy()


# ---- PyTorch, int8


def _bias(layer: Layer | Network, given: Range) -> Tensor:
    """In float32, as PyTorch's integer operators take it."""
    return torch.from_numpy(layer.bias * layer.scale * np.float32(given.scale)).float()


def _eager_int8(model: Quantized, example: Tensor, threads: int) -> Call:
    """The operators on quantised tensors, which are channels_last; oneDNN's are the fastest of its three engines."""
    torch.set_num_threads(threads)
    network, quantized, calls = describe_quantized(model), torch.ops.quantized, []

    def weight(layer: Layer | Network) -> Tensor:
        scale = torch.from_numpy(layer.scale)
        real = torch.from_numpy(layer.weight) * scale.view(-1, *[1] * (layer.weight.ndim - 1))
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a successor that is torchao
            return torch.quantize_per_channel(real, scale.double(), zeros, 0, torch.qint8)

    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "onednn"
    try:
        given = network.image
        for layer in network.layers:
            pads, convolution = layer.kernel_size // 2, quantized.conv2d_relu if layer.relu6 else quantized.conv2d
            packed = quantized.conv2d_prepack(
                weight(layer), _bias(layer, given), [layer.stride] * 2, [pads] * 2, [1, 1], layer.groups
            )
            output = layer.summand or layer.rounded
            calls.append((convolution, packed, output, layer.residual, layer.rounded))
            given = layer.rounded
        linear = quantized.linear_prepack(weight(network), _bias(network, network.mean))
    finally:
        torch.backends.quantized.engine = engine

    def call(x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        x = torch.quantize_per_tensor(x, network.image.scale, network.image.zero_point, torch.quint8)
        for convolution, packed, output, residual, rounded in calls:
            x = convolution(x, packed, output.scale, output.zero_point)
            if residual is not None:
                x = quantized.add(x, outputs[residual], rounded.scale, rounded.zero_point)
            outputs.append(x)
        x = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return quantized.linear(x, linear, network.logits.scale, network.logits.zero_point).dequantize()

    return torch.no_grad()(call)


class _Rounded(nn.Module):
    """A network of float32 operators between roundings, of which torch.compile makes integer operators."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed  # noqa: F401  (makes the operators below known)

        self.network, self.ops = network, torch.ops.quantized_decomposed
        given = [network.image, *(layer.rounded for layer in network.layers[:-1]), network.mean]
        for i, (layer, x) in enumerate(zip((*network.layers, network), given, strict=True)):
            self.register_buffer(f"weight{i}", torch.from_numpy(layer.weight))
            self.register_buffer(f"scale{i}", torch.from_numpy(layer.scale))
            self.register_buffer(f"zero{i}", torch.zeros(len(layer.scale), dtype=torch.int64))
            self.register_buffer(f"bias{i}", _bias(layer, x))

    def _round(self, x: Tensor, r: Range) -> Tensor:
        how = r.scale, r.zero_point, 0, 255, torch.uint8
        return self.ops.dequantize_per_tensor(self.ops.quantize_per_tensor(x, *how), *how)

    def _parameters_of(self, i: int) -> tuple[Tensor, Tensor]:
        weight, scale, zero, bias = (getattr(self, f"{name}{i}") for name in ("weight", "scale", "zero", "bias"))
        return self.ops.dequantize_per_channel(weight, scale, zero, 0, -127, 127, torch.int8), bias

    def forward(self, x: Tensor) -> Tensor:
        x, outputs = self._round(x, self.network.image), []
        for i, layer in enumerate(self.network.layers):
            padding = layer.kernel_size // 2
            x = nn.functional.conv2d(x, *self._parameters_of(i), layer.stride, padding, 1, layer.groups)
            x = nn.functional.relu6(x) if layer.relu6 else x
            x = x if layer.residual is None else x + outputs[layer.residual]
            x = self._round(x, layer.rounded)
            outputs.append(x)
        x = self._round(x.mean((2, 3)), self.network.mean)
        return nn.functional.linear(x, *self._parameters_of(len(outputs)))


def _compile_int8(model: Quantized, example: Tensor, threads: int) -> Call:
    import torch._inductor.config
    from torch._inductor.utils import run_and_get_code

    torch.set_num_threads(threads)
    network = describe_quantized(model)
    compiled = torch.compile(_Rounded(network).eval())
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        _, code = run_and_get_code(compiled, example)
    if sum(len(re.findall(r"onednn\.qconv\w*\.", text)) for text in code) < len(network.layers):
        raise RuntimeError("torch.compile left convolutions in float32")
    return torch.no_grad()(compiled)


# ---- ONNX Runtime and OpenVINO


def onnx_file(model: nn.Module | Quantized, example: Tensor, summands: bool = True) -> bytes:
    """The ONNX file (opset 17) of a model, for an input "x" like the example; `summands` as of onnx_model."""
    if isinstance(model, (MobileNetV2, Quantized)):
        return onnx_model(_describe(model), tuple(example.shape), summands)
    plain, file = _plain(model, torch.get_num_threads()).eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of the exporter that is to come
        # In eval mode it folds the BatchNorms; the newer exporter wants a package more.
        torch.onnx.export(plain, (example,), file, input_names=["x"], dynamo=False, opset_version=17)
    return file.getvalue()


def onnx_model(network: Network, shape: tuple[int, ...], summands: bool = True) -> bytes:
    """An ONNX file (opset 17) for inputs of this shape [N, C, H, W].

    In int8 it is the float32 graph with a QuantizeLinear and a DequantizeLinear behind every tensor and a
    DequantizeLinear behind every weight, from which runtimes make their integer operators. Activations are unsigned:
    with signed ones ONNX Runtime takes 1.7 times as long on x86, and OpenVINO as long.

    Args:
        summands: in int8 what a shortcut is added to is rounded before the addition too. ONNX Runtime has integer
            additions only so; OpenVINO is 1% faster without.
    """
    from onnx import TensorProto, helper, numpy_helper

    constants, nodes = [], []
    integers = network.image is not None

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def rounded(x: str, r: Range | None) -> str:
        if r is None:
            return x
        how = [constant(f"{x}.scale", np.float32(r.scale)), constant(f"{x}.zero", np.uint8(r.zero_point))]
        return add("DequantizeLinear", [add("QuantizeLinear", [x, *how], f"{x}.q"), *how], f"{x}.rounded")

    def parameters(layer: Layer | Network, name: str, given: Range | None) -> list[str]:
        weight, bias = constant(f"{name}.weight", layer.weight), constant(f"{name}.bias", layer.bias)
        if layer.scale is None:
            return [weight, bias]
        scales = layer.scale, layer.scale * np.float32(given.scale)
        return [
            add("DequantizeLinear", [x, constant(f"{x}.scale", scale), zero], f"{x}.real", axis=0)
            for x, scale, zero in (
                (weight, scales[0], constant(f"{weight}.zero", np.zeros(len(layer.bias), np.int8))),
                (bias, scales[1], constant(f"{bias}.zero", np.zeros(len(layer.bias), np.int32))),
            )
        ]

    limits = [] if integers else [constant("zero", np.float32(0)), constant("six", np.float32(6))]
    x, given, outputs = rounded("x", network.image), network.image, []
    for i, layer in enumerate(network.layers):
        k = layer.kernel_size
        geometry = dict(kernel_shape=[k, k], strides=[layer.stride] * 2, pads=[k // 2] * 4, group=layer.groups)
        x = add("Conv", [x, *parameters(layer, f"conv{i}", given)], f"conv{i}", **geometry)
        if layer.relu6 and not integers:  # of bytes that saturate at 0 and at 6 or below it is a part
            x = add("Clip", [x, *limits], f"relu{i}")
        if layer.residual is not None:
            x = add("Add", [rounded(x, layer.summand if summands else None), outputs[layer.residual]], f"add{i}")
        x, given = rounded(x, layer.rounded), layer.rounded
        outputs.append(x)
    x = rounded(add("GlobalAveragePool", [x], "pooled"), network.mean)
    x = rounded(add("Flatten", [x], "features"), network.mean)
    add("Gemm", [x, *parameters(network, "linear", network.mean)], "logits", transB=1)

    float32 = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "mobilenet_v2",
        [helper.make_tensor_value_info("x", float32, shape)],
        [helper.make_tensor_value_info("logits", float32, [shape[0], len(network.bias)])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def _single(outputs: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    return outputs[0] if len(outputs) == 1 else outputs


def _onnxruntime(model: nn.Module | Quantized, example: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    file = onnx_file(model, example)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: _single(session.run(None, {"x": _numpy(x)}))


def _openvino(model: nn.Module | Quantized, example: Tensor, threads: int, precision: str = "f32") -> Call:
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,  # its default is bfloat16 where the CPU has that
    }
    compiled = core.compile_model(core.read_model(onnx_file(model, example, summands=False)), "CPU", options)
    request = compiled.create_infer_request()
    # Results stay in its memory until the next call: a copy of a segmenter's takes a millisecond.
    return lambda x: _single([*request.infer({0: _numpy(x)}, share_inputs=True, share_outputs=True).values()])


# ---- LiteRT


def tflite_model(network: Network, shape: tuple[int, ...]) -> bytes:
    """A .tflite file for float32 inputs [N, H, W, C], given their shape as [N, C, H, W].

    Stride 2 comes after an explicit padding by one pixel on every side: TensorFlow's own SAME is (0, 1) at even sizes.
    In int8, whose bytes are signed there, images are quantised and logits dequantised by the first and last operator.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    codes, options_of, types = schema.BuiltinOperator, schema.BuiltinOptions, schema.TensorType
    buffers, tensors, operators, used = [schema.BufferT()], [], [], []  # buffer 0 is empty by the format's rule
    kinds = {"float32": types.FLOAT32, "int8": types.INT8, "int32": types.INT32}

    def tensor(shape: list[int], kind: int, buffer: int = 0, **quantization: Any) -> int:
        how = schema.QuantizationParametersT(**quantization) if quantization else None
        name = f"t{len(tensors)}"
        tensors.append(schema.TensorT(shape=shape, type=kind, buffer=buffer, name=name, quantization=how))
        return len(tensors) - 1

    def activation(shape: list[int], r: Range | None) -> int:
        if r is None:
            return tensor(shape, types.FLOAT32)
        return tensor(shape, types.INT8, scale=[r.scale], zeroPoint=[r.zero_point - 128])

    def constant(value: np.ndarray, scale: np.ndarray | None = None, axis: int = 0) -> int:
        buffers.append(schema.BufferT(data=np.frombuffer(value.tobytes(), np.uint8)))
        how = {}
        if scale is not None:
            how = dict(scale=scale.tolist(), zeroPoint=[0] * len(scale), quantizedDimension=axis)
        return tensor(list(value.shape), kinds[str(value.dtype)], len(buffers) - 1, **how)

    def parameters(layer: Layer | Network, weight: np.ndarray, given: Range | None, axis: int = 0) -> list[int]:
        if layer.scale is None:
            return [constant(weight), constant(layer.bias)]
        return [constant(weight, layer.scale, axis), constant(layer.bias, layer.scale * np.float32(given.scale))]

    def add(
        name: str, inputs: list[int], shape: list[int], kind: str, rounded: Range | None = None, **options: Any
    ) -> int:
        code = getattr(codes, name)
        if code not in used:
            used.append(code)
        output = activation(shape, rounded)
        operators.append(
            schema.OperatorT(
                opcodeIndex=used.index(code),
                inputs=inputs,
                outputs=[output],
                builtinOptionsType=getattr(options_of, kind),
                builtinOptions=getattr(schema, kind + "T")(**options),
            )
        )
        return output

    batch, channels, height, width = shape
    source = x = activation([batch, height, width, channels], None)
    given = network.image
    if given is not None:
        x = add("QUANTIZE", [x], [batch, height, width, channels], "QuantizeOptions", given)
    outputs = []
    for layer in network.layers:
        k, depthwise, weight = layer.kernel_size, layer.groups > 1, layer.weight
        padding = schema.Padding.SAME
        if k > 1 and layer.stride > 1:
            pads = constant(np.array([[0, 0], [k // 2] * 2, [k // 2] * 2, [0, 0]], np.int32))
            padded = [batch, height + 2 * (k // 2), width + 2 * (k // 2), channels]
            x, padding = add("PAD", [x, pads], padded, "PadOptions", given), schema.Padding.VALID
        height, width = (-(-size // layer.stride) for size in (height, width))
        channels = len(layer.bias)
        arranged = weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1)
        options = dict(
            padding=padding,
            strideW=layer.stride,
            strideH=layer.stride,
            fusedActivationFunction=getattr(schema.ActivationFunctionType, "RELU6" if layer.relu6 else "NONE"),
        )
        name, kind = ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise else ("CONV_2D", "Conv2DOptions")
        if depthwise:
            options["depthMultiplier"] = 1
        result_shape = [batch, height, width, channels]
        inputs = [x, *parameters(layer, arranged, given, 3 if depthwise else 0)]
        x = add(name, inputs, result_shape, kind, layer.summand or layer.rounded, **options)
        if layer.residual is not None:
            x = add("ADD", [x, outputs[layer.residual]], result_shape, "AddOptions", layer.rounded)
        outputs.append(x)
        given = layer.rounded
    pixels = constant(np.array([1, 2], np.int32))
    x = add("MEAN", [x, pixels], [batch, channels], "ReducerOptions", network.mean)
    inputs = [x, *parameters(network, network.weight, network.mean)]
    x = add("FULLY_CONNECTED", inputs, [batch, len(network.bias)], "FullyConnectedOptions", network.logits)
    if network.logits is not None:
        x = add("DEQUANTIZE", [x], [batch, len(network.bias)], "DequantizeOptions")

    # The deprecated field is the one that readers use for codes below 127, which all of these are.
    operator_codes = [schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=3) for code in used]
    graph = schema.SubGraphT(tensors=tensors, inputs=[source], outputs=[x], operators=operators, name="main")
    content = schema.ModelT(version=3, operatorCodes=operator_codes, subgraphs=[graph], buffers=buffers)
    builder = flatbuffers.Builder(sum(b.data.nbytes for b in buffers[1:]) + (1 << 20))
    builder.Finish(content.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _litert(model: MobileNetV2 | Quantized, example: Tensor, threads: int) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    content = tflite_model(_describe(model), tuple(example.shape))
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    # XNNPACK takes operators over as one node: it must lead from the input to the output, or this is not LiteRT's best.
    delegates = [op for op in interpreter._get_ops_details() if op["op_name"] == "DELEGATE"]
    if not any(source["index"] in op["inputs"] and result["index"] in op["outputs"] for op in delegates):
        raise RuntimeError("LiteRT did not hand the whole network to XNNPACK")

    def call(x: Tensor) -> np.ndarray:
        interpreter.set_tensor(source["index"], _numpy(x.permute(0, 2, 3, 1)))
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

    return call


# ---- ncnn


def ncnn_model(network: Network) -> tuple[str, bytes]:
    """The texts of the .param file and of the .bin file. A blob has one reader in ncnn: a residual needs a Split."""
    lines: list[str] = []
    weights: list[bytes] = []
    float32 = bytes(4)  # the tag before each weight, but not before a bias

    def add(kind: str, inputs: list[str], outputs: list[str], *options: str) -> str:
        words = [kind, f"layer{len(lines)}", str(len(inputs)), str(len(outputs)), *inputs, *outputs, *options]
        lines.append(" ".join(words))
        return outputs[0]

    x = add("Input", [], ["x"])
    reused = {layer.residual for layer in network.layers}
    blobs = 1
    for i, layer in enumerate(network.layers):
        k, channels = layer.kernel_size, len(layer.bias)
        options = [f"0={channels}", f"1={k}", f"3={layer.stride}", f"4={k // 2}", "5=1", f"6={layer.weight.size}"]
        if layer.groups > 1:
            options.append(f"7={layer.groups}")
        if layer.relu6:
            options += ["9=3", "-23310=2,0.0,6.0"]  # activation 3 clips, to these two
        weights += [float32, layer.weight.tobytes(), layer.bias.tobytes()]
        kind = "ConvolutionDepthWise" if layer.groups > 1 else "Convolution"
        x, blobs = add(kind, [x], [f"conv{i}"], *options), blobs + 1
        if layer.residual is not None:
            x, blobs = add("BinaryOp", [x, f"shortcut{layer.residual}"], [f"add{i}"], "0=0"), blobs + 1
        if i in reused:
            x, blobs = add("Split", [x], [f"main{i}", f"shortcut{i}"]), blobs + 2
    x = add("Pooling", [x], ["features"], "0=1", "4=1")
    add("InnerProduct", [x], ["logits"], f"0={len(network.bias)}", "1=1", f"2={network.weight.size}")
    weights += [float32, network.weight.tobytes(), network.bias.tobytes()]
    return "\n".join(["7767517", f"{len(lines)} {blobs + 2}", *lines, ""]), b"".join(weights)


def _ncnn(model: MobileNetV2, example: Tensor, threads: int, bfloat16: bool = False) -> Call:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic"):
        setattr(net.opt, f"use_{option}", False)
    for option in ("bf16_packed", "bf16_storage"):
        setattr(net.opt, f"use_{option}", bfloat16)
    param, weights = ncnn_model(describe(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.bin")
        path.write_bytes(weights)
        if net.load_param_mem(param) or net.load_model(str(path)):
            raise RuntimeError("ncnn could not load the network written for it")

    def one(image: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("x", ncnn.Mat(image))
        status, logits = extractor.extract("logits")
        if status:
            raise RuntimeError(f"ncnn failed with status {status}")
        return np.array(logits)

    return lambda x: np.stack([one(image) for image in _numpy(x)])  # ncnn knows no batch


RUNNERS: tuple[Runner, ...] = (
    Runner("fused", _fused),
    Runner("eager", _eager),
    Runner("eager channels_last", _eager_channels_last, channels_last=True),
    Runner("torch.compile", _compile),
    Runner("onnxruntime", _onnxruntime, ("onnx", "onnxruntime")),
    Runner("openvino", _openvino, ("onnx", "openvino")),
    Runner("litert", _litert, ("ai-edge-litert",), channels_last=True, chains_only=True),
    Runner("ncnn", _ncnn, ("ncnn",), chains_only=True),
)

# By the precision that they compute in; names and their order are the same in each.
RUNNERS_IN: dict[str, tuple[Runner, ...]] = {
    "float32": RUNNERS,
    "bfloat16": (
        Runner("fused", _in_bfloat16(_fused)),
        Runner("eager", _in_bfloat16(_eager)),
        Runner("eager channels_last", _in_bfloat16(_eager_channels_last), channels_last=True),
        Runner("torch.compile", _in_bfloat16(_compile_channels_last), channels_last=True),
        Runner("onnxruntime", None, ("onnx", "onnxruntime"), unable="it has no bfloat16 convolutions on the CPU"),
        Runner("openvino", partial(_openvino, precision="bf16"), ("onnx", "openvino"))
        if _C.cpu_features()["avx512f"]
        else Runner("openvino", None, ("onnx", "openvino"), unable="without AVX-512 it computes in float32"),
        Runner("litert", None, ("ai-edge-litert",), unable="XNNPACK has no bfloat16 convolutions"),
        Runner("ncnn", partial(_ncnn, bfloat16=True), ("ncnn",), chains_only=True),
    ),
    "int8": (
        Runner("fused", _fused_int8),
        Runner("eager", None, unable="PyTorch's quantised tensors are channels_last"),
        Runner("eager channels_last", _eager_int8, channels_last=True),
        Runner("torch.compile", _compile_int8, channels_last=True),
        Runner("onnxruntime", _onnxruntime, ("onnx", "onnxruntime")),
        Runner("openvino", _openvino, ("onnx", "openvino")),
        Runner("litert", _litert, ("ai-edge-litert",), channels_last=True),
        Runner("ncnn", None, ("ncnn",), unable="its int8 tools are not in its Python package"),
    ),
}

TRAINERS: tuple[Runner, ...] = (
    Runner("fused", _train_fused, channels_last=True),
    Runner("eager", _train_eager),
    Runner("eager channels_last", _train_channels_last, channels_last=True),
    Runner(
        "checkpointed",
        _train_checkpointed,
        channels_last=True,
        recomputes=True,
        remark="eager channels_last that keeps the blocks' inputs only; running statistics are updated twice a step",
    ),
    Runner("torch.compile", _train_compile, channels_last=True, compiles=True),
)
