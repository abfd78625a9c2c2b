from .export import export_model
from .exported import ExportedModel, describe
from .onnx import to_onnx, write_onnx
from .recognizers import exportable, top_proposals
from .torch_export import trace, write_torch_export

__all__ = [
    "ExportedModel",
    "describe",
    "export_model",
    "exportable",
    "to_onnx",
    "top_proposals",
    "trace",
    "write_onnx",
    "write_torch_export",
]
