"""Writing a trained model as one file with the same outputs."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from typing import Iterator, Sequence

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from ..errors import InputError
from ..inference import MultiLabelPredictor
from ..io.files import write_atomically
from .exported import ExportedModel, describe
from .onnx import write_onnx
from .recognizers import exportable
from .torch_export import write_torch_export

# Largest difference of a logit.
TOLERANCE = 1e-4
# By format.
WRITERS = {"onnx": write_onnx, "torch_export": write_torch_export}
ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2"}


@contextmanager
def silence() -> Iterator[None]:
    """Silence warnings and logs of torch and onnxscript that are meant for their developers."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@silence()
def export_model(
    predictor: MultiLabelPredictor,
    output: str,
    format: str,
    *,
    check: Sequence[str] = (),
    **options,
) -> float:
    """Write a model as a file, which is saved only after it was read again and checked.

    Args:
        predictor: on the CPU.
        output: the file; its name ends as ENDINGS says.
        format: onnx or torch_export.
        check: files of images on which the logits are compared, with known labels too if the
            model takes them; without any, scikit-learn's two sample photos.
        options: opset of `write_onnx`.
    Returns:
        the largest difference of a logit from the model's.
    Raises:
        InputError: the model can't be exported, or its logits differ by more than TOLERANCE.
        UnreadableImage: one of `check` can't be read.
    """
    with complete_file(output, ENDINGS[format]) as path:
        content = describe(predictor.cfg, predictor.label_names, predictor.takes_known_labels)
        recognizer = exportable(predictor.model, predictor.cfg.INPUT.IMAGE_SIZE)
        files = check or load_sample_images().filenames
        states = example_states(len(files), len(predictor.label_names))
        expected = evaluate_files(predictor, files, states)
        exported = WRITERS[format](recognizer, content, path, **options)
        difference = largest_difference(exported, files, states, expected, recognizer.dynamic_batch)
        if not difference <= TOLERANCE:
            raise InputError(
                f"{output} is not written: its logits differ from the model's by up to "
                f"{difference:.1e}, more than {TOLERANCE:.0e}"
            )
    return difference


@contextmanager
def complete_file(output: str, ending: str) -> Iterator[str]:
    """A name to write to, of a file that becomes `output` once all went well.

    It is in a temporary folder beside `output`, whose parent is made if needed.

    Raises:
        InputError: the name of `output` does not end so.
    """
    if not output.endswith(ending):
        raise InputError(f"--output {output}: the name must end in {ending}")
    folder = os.path.dirname(output) or "."
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        path = os.path.join(temporary, f"model{ending}")
        yield path
        with open(path, "rb") as source, write_atomically(output) as file:
            shutil.copyfileobj(source, file)


def example_states(num_images: int, num_labels: int) -> np.ndarray:
    """label_states (B, C) int8, by turns unknown, absent and present along labels and images."""
    return (np.add.outer(np.arange(num_images), np.arange(num_labels)) % 3 - 1).astype(np.int8)


@torch.no_grad()
def evaluate_files(
    predictor: MultiLabelPredictor, files: Sequence[str], label_states: np.ndarray
) -> np.ndarray:
    """Logits (B, C) of B files, by the predictor's view and model, with label_states (B, C).

    Raises:
        UnreadableImage: a file can't be read.
    """
    outputs = [
        predictor.model([{**predictor.view(file), "label_states": states}])[0]
        for file, states in zip(files, label_states)
    ]
    return torch.stack([output["logits"] for output in outputs]).numpy()


def largest_difference(
    exported: ExportedModel,
    files: Sequence[str],
    label_states: np.ndarray,
    expected: np.ndarray,
    any_batch: bool,
) -> float:
    """Between the logits of an exported model, by its own view of B files, and others.

    Args:
        label_states: (B, C) int8.
        expected: (B, C).
        any_batch: compare one batch of all files too, beside each by itself.
    Returns:
        the difference; NaN where a logit is.
    """
    images = np.stack([exported.view(file)["image"] for file in files])
    each = (slice(i, i + 1) for i in range(len(images)))
    found = np.concatenate([exported.run(images[i], label_states[i]) for i in each])
    differences = [np.abs(found - expected)]
    if any_batch:
        differences.append(np.abs(exported.run(images, label_states) - expected))
    return float(np.max(differences))
