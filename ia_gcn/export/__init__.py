from .export import export_model
from .exported import ExportedModel, describe
from .onnx import to_onnx, write_onnx
from .quantization import Int8Difference, compare_logits, export_int8, quantize_onnx
from .recognizers import exportable, top_proposals
from .torch_export import trace, write_torch_export

__all__ = [
    "ExportedModel",
    "Int8Difference",
    "compare_logits",
    "describe",
    "export_int8",
    "export_model",
    "exportable",
    "quantize_onnx",
    "to_onnx",
    "top_proposals",
    "trace",
    "write_onnx",
    "write_torch_export",
]
