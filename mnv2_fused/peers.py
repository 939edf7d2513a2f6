"""What `mnv2-fused bench` compares: PyTorch run in four ways, and other runtimes that are fed the same folded weights.

For training it is the fused network against PyTorch in four ways.

MobileNetV2's graphs for the other runtimes are written here, operator by operator, from one list of layers: no exporter
or converter comes between, so each computes the same multiply-adds, in float32. ONNX files of other networks are
torch.onnx's, of the plain modules. What is done with a runner is tasks.py.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils.checkpoint import checkpoint

from .mobilenet_v2 import MobileNetV2

Call = Callable[[Tensor], Any]


class Runner(NamedTuple):
    """One way to run the network, or to train it.

    Attributes:
        name: as `bench` shows it.
        prepare: (model in eval mode, example [N, C, H, W] float32, threads) -> a function of such an x that returns
            what the model does, a tensor or several, as tensors or arrays. The function is made for the example's
            shape, leaves the model as it is, and may set torch's number of threads, which is one for the whole process.
            Among TRAINERS the model is in training mode and is the one to train: the logits have gradients to its
            parameters, and its memory format and `fused` are set as this way wants them.
        packages: the distributions that it needs beside torch; empty for PyTorch itself.
        channels_last: the memory format of x that it takes without a conversion.
        recomputes: backward runs the blocks once more, in training mode, and so updates their running statistics again.
        compiles: the first call with a shape compiles for it.
        chains_only: the graph that it is fed can describe a MobileNetV2, and no network with several outputs.
        remark: what a reader of its results should know.
    """

    name: str
    prepare: Callable[[nn.Module, Tensor, int], Call]
    packages: tuple[str, ...] = ()
    channels_last: bool = False
    recomputes: bool = False
    compiles: bool = False
    chains_only: bool = False
    remark: str = ""

    def missing(self, model: nn.Module) -> str:
        """Why the runner cannot be prepared for the model: packages to get, or that it has no graph; "" if it can."""
        if self.chains_only and not isinstance(model, MobileNetV2):
            return "is left out: its graph is written here for MobileNetV2 alone"
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


# ---- PyTorch, training


def _train_fused(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    torch.set_num_threads(threads)
    model.fused = True
    if reasons := model.unfused(example):
        raise RuntimeError(f"the model would not train fused: {reasons}")
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
    """A convolution with its BatchNorm folded in, in float32.

    weight [C_out, C_in / groups, k, k], bias [C_out]; padding k // 2 on every side; then ReLU6 if `relu6`, or the
    output of the layer of index `residual` is added.
    """

    weight: np.ndarray
    bias: np.ndarray
    stride: int
    groups: int
    relu6: bool
    residual: int | None

    @property
    def kernel_size(self) -> int:
        return self.weight.shape[-1]


class Network(NamedTuple):
    """The layers, each fed by the one before; then the mean over the pixels and a linear layer [classes, features]."""

    layers: list[Layer]
    weight: np.ndarray
    bias: np.ndarray


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


def _numpy(x: Tensor) -> np.ndarray:
    return x.contiguous().numpy()


# ---- ONNX Runtime and OpenVINO


def onnx_file(model: nn.Module, example: Tensor) -> bytes:
    """The ONNX file (opset 17) of a model, for an input "x" like the example."""
    if isinstance(model, MobileNetV2):
        return onnx_model(describe(model), tuple(example.shape))
    plain, file = _plain(model, torch.get_num_threads()).eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and of the exporter that is to come
        # In eval mode it folds the BatchNorms; the newer exporter wants a package more.
        torch.onnx.export(plain, (example,), file, input_names=["x"], dynamo=False, opset_version=17)
    return file.getvalue()


def onnx_model(network: Network, shape: tuple[int, ...]) -> bytes:
    """An ONNX file (opset 17) for inputs of this shape [N, C, H, W]."""
    from onnx import TensorProto, helper, numpy_helper

    zero_and_six = {"zero": np.float32(0), "six": np.float32(6)}
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in zero_and_six.items()]
    nodes = []

    def add(op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    x, outputs = "x", []
    for i, layer in enumerate(network.layers):
        k, parameters = layer.kernel_size, [constant(f"w{i}", layer.weight), constant(f"b{i}", layer.bias)]
        geometry = dict(kernel_shape=[k, k], strides=[layer.stride] * 2, pads=[k // 2] * 4, group=layer.groups)
        x = add("Conv", [x, *parameters], f"conv{i}", **geometry)
        if layer.relu6:
            x = add("Clip", [x, "zero", "six"], f"relu{i}")
        if layer.residual is not None:
            x = add("Add", [x, outputs[layer.residual]], f"add{i}")
        outputs.append(x)
    x = add("Flatten", [add("GlobalAveragePool", [x], "pooled")], "features")
    add("Gemm", [x, constant("w", network.weight), constant("b", network.bias)], "logits", transB=1)

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


def _onnxruntime(model: nn.Module, example: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_file(model, example), options, providers=["CPUExecutionProvider"])
    return lambda x: _single(session.run(None, {"x": _numpy(x)}))


def _openvino(model: nn.Module, example: Tensor, threads: int) -> Call:
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the CPU has that
    }
    compiled = core.compile_model(core.read_model(onnx_file(model, example)), "CPU", options)
    request = compiled.create_infer_request()
    # Results stay in its memory until the next call: a copy of a segmenter's takes a millisecond.
    return lambda x: _single([*request.infer({0: _numpy(x)}, share_inputs=True, share_outputs=True).values()])


# ---- LiteRT


def tflite_model(network: Network, shape: tuple[int, ...]) -> bytes:
    """A .tflite file for inputs [N, H, W, C], given their shape as [N, C, H, W].

    Stride 2 comes after an explicit padding by one pixel on every side: TensorFlow's own SAME is (0, 1) at even sizes.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    codes, options_of = schema.BuiltinOperator, schema.BuiltinOptions
    buffers, tensors, operators, used = [schema.BufferT()], [], [], []  # buffer 0 is empty by the format's rule

    def tensor(shape: list[int], value: np.ndarray | None = None) -> int:
        if value is not None:
            buffers.append(schema.BufferT(data=np.frombuffer(value.tobytes(), np.uint8)))
        kind = schema.TensorType.INT32 if value is not None and value.dtype == np.int32 else schema.TensorType.FLOAT32
        buffer = len(buffers) - 1 if value is not None else 0
        tensors.append(schema.TensorT(shape=shape, type=kind, buffer=buffer, name=f"t{len(tensors)}"))
        return len(tensors) - 1

    def constant(value: np.ndarray) -> int:
        return tensor(list(value.shape), value)

    def add(name: str, inputs: list[int], shape: list[int], kind: str, **options: Any) -> int:
        code = getattr(codes, name)
        if code not in used:
            used.append(code)
        output = tensor(shape)
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
    source = x = tensor([batch, height, width, channels])
    outputs = []
    for layer in network.layers:
        k, depthwise, weight = layer.kernel_size, layer.groups > 1, layer.weight
        padding = schema.Padding.SAME
        if k > 1 and layer.stride > 1:
            pads = constant(np.array([[0, 0], [k // 2] * 2, [k // 2] * 2, [0, 0]], np.int32))
            padded = [batch, height + 2 * (k // 2), width + 2 * (k // 2), channels]
            x, padding = add("PAD", [x, pads], padded, "PadOptions"), schema.Padding.VALID
        height, width = (-(-size // layer.stride) for size in (height, width))
        channels = len(layer.bias)
        inputs = [x, constant(weight.transpose(1, 2, 3, 0) if depthwise else weight.transpose(0, 2, 3, 1))]
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
        x = add(name, [*inputs, constant(layer.bias)], result_shape, kind, **options)
        if layer.residual is not None:
            x = add("ADD", [x, outputs[layer.residual]], result_shape, "AddOptions")
        outputs.append(x)
    pixels = constant(np.array([1, 2], np.int32))
    x = add("MEAN", [x, pixels], [batch, channels], "ReducerOptions")
    inputs = [x, constant(network.weight), constant(network.bias)]
    x = add("FULLY_CONNECTED", inputs, [batch, len(network.bias)], "FullyConnectedOptions")

    # The deprecated field is the one that readers use for codes below 127, which all of these are.
    operator_codes = [schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code) for code in used]
    graph = schema.SubGraphT(tensors=tensors, inputs=[source], outputs=[x], operators=operators, name="main")
    content = schema.ModelT(version=3, operatorCodes=operator_codes, subgraphs=[graph], buffers=buffers)
    builder = flatbuffers.Builder(sum(b.data.nbytes for b in buffers[1:]) + (1 << 20))
    builder.Finish(content.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _litert(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    from ai_edge_litert.interpreter import Interpreter

    source = tflite_model(describe(model), tuple(example.shape))
    interpreter = Interpreter(model_content=source, num_threads=threads)
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


def _ncnn(model: MobileNetV2, example: Tensor, threads: int) -> Call:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
        setattr(net.opt, f"use_{option}", False)
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
