"""Models as ONNX files."""

from __future__ import annotations

import json
from typing import Any, Dict, Sequence

import numpy as np
import torch

from ..errors import InputError
from ..inference import OnnxPredictor
from .exported import ExportedModel
from .recognizers import ExportableRecognizer
from .torch_export import first_line, trace

# The oldest version that torch.onnx supports.
OLDEST_OPSET = 18


def write_onnx(
    recognizer: ExportableRecognizer, content: Dict[str, Any], path: str, opset: int | None = None
) -> ExportedModel:
    """Write a file for `OnnxPredictor` and read it again.

    Args:
        recognizer: of `exportable`.
        content: of `describe`; goes into the metadata, each entry as JSON.
        path: of the file, .onnx.
        opset: see `to_onnx`.
    Raises:
        InputError: see `trace` and `to_onnx`; there is no onnxruntime.
    """
    onnx = to_onnx(trace(recognizer), recognizer.inputs, recognizer.outputs, opset)
    for key, value in content.items():
        onnx.model.metadata_props[key] = json.dumps(value, ensure_ascii=False)
    onnx.save(path, external_data=False)
    reader = OnnxPredictor(path, device="cpu")

    def run(images: np.ndarray, label_states: np.ndarray) -> np.ndarray:
        return reader.run(images, label_states)["logits"]

    return ExportedModel(reader.view, run)


def to_onnx(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int | None = None,
) -> torch.onnx.ONNXProgram:
    """A program of `trace` as ONNX.

    Args:
        inputs: names of what it takes.
        outputs: names of what it returns.
        opset: version of ONNX's operators, at least 18; None: torch's choice.
    Raises:
        InputError: torch can't convert it, there is no such version, or onnx or onnxscript is
            missing.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}: pip install {error.name}") from None
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"--opset must be {OLDEST_OPSET} to {newest}, not {opset}")
    einsum = torch.ops.aten.einsum.default
    try:
        # ONNX's own einsum cannot broadcast a shared graph over a batch.
        program = program.run_decompositions(
            {einsum: torch.export.default_decompositions()[einsum]}
        )
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    except Exception as error:  # as above
        raise InputError(f"torch.onnx can't take this model: {first_line(error)}") from error
    made = converted.model.opset_imports[""]
    # torch falls back to another version if it does not support this one.
    if opset not in (None, made):
        raise InputError(f"--opset {opset}: torch.onnx made {made} of this model")
    return converted
