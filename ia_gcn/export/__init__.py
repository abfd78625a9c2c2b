from .recognizers import describe, exportable, to_onnx, top_proposals, trace

__all__ = ["describe", "exportable", "to_onnx", "top_proposals", "trace"]
