"""Models as torch.export files."""

from __future__ import annotations

import json
from typing import Any, Dict

import numpy as np
import torch

from ..errors import InputError
from ..inference.onnx_predictor import ImageView
from .exported import ExportedModel
from .recognizers import ExportableRecognizer


def write_torch_export(
    recognizer: ExportableRecognizer, content: Dict[str, Any], path: str
) -> ExportedModel:
    """Write a file for torch.export.load and read it again.

    Args:
        recognizer: of `exportable`.
        content: of `describe`; goes into the extra file metadata.json.
        path: of the file, .pt2.
    Raises:
        InputError: see `trace`.
    """
    metadata = json.dumps(content, ensure_ascii=False)
    torch.export.save(trace(recognizer), path, extra_files={"metadata.json": metadata})
    stored = {"metadata.json": ""}
    module = torch.export.load(path, extra_files=stored).module()
    view = ImageView(json.loads(stored["metadata.json"])["preprocessing"])

    def run(images: np.ndarray, label_states: np.ndarray) -> np.ndarray:
        tensors = (torch.from_numpy(images), torch.from_numpy(label_states))
        return module(*tensors[: len(recognizer.inputs)])["logits"].numpy()

    return ExportedModel(view, run)


def trace(recognizer: ExportableRecognizer) -> torch.export.ExportedProgram:
    """The program of a recogniser, for images (B, 3, H, W) uint8 of its size, and, if it takes
    them, label_states (B, C) int8.

    Raises:
        InputError: torch can't export its backbone.
    """
    # An example batch of one image would fix the batch size to one.
    batch = 2 if recognizer.dynamic_batch else 1
    examples = {
        "images": torch.zeros(batch, 3, *recognizer.image_size, dtype=torch.uint8),
        "label_states": torch.full((batch, recognizer.model.num_labels), -1, dtype=torch.int8),
    }
    examples = {name: examples[name] for name in recognizer.inputs}
    shapes = None
    if recognizer.dynamic_batch:
        batch_dim = torch.export.Dim("batch")
        shapes = {name: {0: batch_dim} for name in examples}
    try:
        with torch.no_grad():
            return torch.export.export(
                recognizer, tuple(examples.values()), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:  # a backbone may do anything that it does not support
        raise InputError(f"torch.export can't take this model: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
