"""MobileNetV2 for PyTorch whose inverted residuals run as one op that never writes the expanded tensor to memory."""

__version__ = "0.1.0"

from .checkpoints import convert_state_dict
from .deeplab import DeepLabV3, segmentation_loss
from .fusion import FuseReport, fuse, unfuse
from .mobilenet_v1 import MobileNetV1, mobilenet_v1
from .mobilenet_v2 import InvertedResidual, MobileNetV2, mobilenet_v2
from .onnx import to_onnx
from .ops import empty_cache, inverted_residual, kernels, selected_kernel
from .quantization import QuantizedModel, prepare_qat, quantize
from .ssdlite import SSDLite
from .weights import load_checkpoint

__all__ = [
    "DeepLabV3",
    "FuseReport",
    "InvertedResidual",
    "MobileNetV1",
    "MobileNetV2",
    "QuantizedModel",
    "SSDLite",
    "convert_state_dict",
    "empty_cache",
    "fuse",
    "inverted_residual",
    "kernels",
    "load_checkpoint",
    "mobilenet_v1",
    "mobilenet_v2",
    "prepare_qat",
    "quantize",
    "segmentation_loss",
    "selected_kernel",
    "to_onnx",
    "unfuse",
]
