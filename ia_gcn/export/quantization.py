"""ONNX files whose backbone computes in int8, by onnxruntime's static quantisation.

B and C are the numbers of images and labels.
"""

from __future__ import annotations

import ast
import json
import os
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from ..inference import MultiLabelPredictor, OnnxPredictor
from .export import ENDINGS, complete_file, example_states, export_model, silence

# Every so many of the images are kept from calibration, and the file is checked on them.
HOLD_OUT_EVERY = 5
LEAST_IMAGES = 2 * HOLD_OUT_EVERY
# Below it, more than a tenth of the logits' variance over images is error of the quantisation
# (1 - 0.95²).
LEAST_CORRELATION = 0.95
# torch writes the modules that a node comes from into its metadata: a list of their names as text.
SCOPES, BACKBONE = "pkg.torch.onnx.name_scopes", "model.backbone"


class Int8Difference(NamedTuple):
    """How far int8 logits are from a model's own, over images and labels."""

    mean: float
    """Of the absolute differences."""
    max: float
    """The largest absolute difference."""
    correlation: float
    """Of what an image's logits are beyond their label's mean over the images; NaN where one of
    the two models has the same logits for all images."""


@silence()
def export_int8(
    predictor: MultiLabelPredictor,
    output: str,
    images: Sequence[str],
    *,
    check: Sequence[str] = (),
    **options,
) -> Int8Difference:
    """Write a model as an ONNX file whose backbone computes in int8.

    The model is exported and checked in float32 first, see `export_model`. Of the images, every
    HOLD_OUT_EVERY-th is kept for the comparison of logits, and the others calibrate.

    Args:
        predictor: on the CPU.
        output: the file, .onnx.
        images: files such as the model will get, a few hundred.
        check, options: of `export_model`.
    Returns:
        how far the logits of the images that were kept are from those in float32.
    Raises:
        InputError: see `export_model` and `quantize_onnx`; there are fewer than LEAST_IMAGES
            images; or the logits correlate by less than LEAST_CORRELATION, and there is no file.
        UnreadableImage: an image can't be read.
    """
    if len(images) < LEAST_IMAGES:
        raise InputError(
            f"--int8: {len(images)} images; at least {LEAST_IMAGES} are needed, and a few hundred "
            "are better"
        )
    kept = images[::HOLD_OUT_EVERY]
    calibration = [image for i, image in enumerate(images) if i % HOLD_OUT_EVERY]
    with complete_file(output, ENDINGS["onnx"]) as path:
        exact_path = os.path.join(os.path.dirname(path), "float32.onnx")
        export_model(predictor, exact_path, "onnx", check=check, **options)
        quantize_onnx(exact_path, path, calibration)
        exact, quantized = (OnnxPredictor(p, device="cpu") for p in (exact_path, path))
        difference = compare_logits(file_logits(quantized, kept), file_logits(exact, kept))
        if not difference.correlation >= LEAST_CORRELATION:
            raise InputError(
                f"{output} is not written: in int8, logits correlate with the model's by "
                f"{difference.correlation:.3f} only, less than {LEAST_CORRELATION}"
            )
    return difference


def quantize_onnx(source: str, output: str, images: Sequence[str]) -> None:
    """Write an exported model with the convolutions and products of its backbone in int8.

    Weights have a scale per channel and 7 bits: processors without VNNI add two products in 16
    bits, which 8 bits would overflow. Activations have 8 bits, from the smallest to the largest
    value that the images have caused. The normalisation of the input and the heads stay float32.

    Args:
        source: a file of `export_model`.
        output: the file, .onnx.
        images: files to calibrate with.
    Raises:
        InputError: the backbone has nothing to be quantised; onnx or onnxruntime is missing.
        UnreadableImage: an image can't be read.
    """
    try:
        import onnx
        from onnxruntime import __version__, quantization
    except ImportError as error:
        raise InputError(f"int8 needs {error.name}: pip install {error.name}") from None
    nodes = backbone_nodes(onnx.load(source))
    if not nodes:
        raise InputError("int8: this model's backbone has no convolution or product to quantise")
    quantization.quantize_static(
        source,
        output,
        calibration_inputs(OnnxPredictor(source, device="cpu"), images),
        per_channel=True,
        reduce_range=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_quantize=nodes,
    )
    describe_int8(output, {"onnxruntime": __version__, "calibration_images": len(images)})


def backbone_nodes(model) -> List[str]:
    """Names of the nodes of an ONNX model that torch made of the module model.backbone."""
    return [
        node.name
        for node in model.graph.node
        for entry in node.metadata_props
        if entry.key == SCOPES and BACKBONE in ast.literal_eval(entry.value)
    ]


def calibration_inputs(predictor: OnnxPredictor, images: Sequence[str]):
    """A reader for onnxruntime: the model's input for one image after the other, nothing known."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            # Without a terminal, no bar.
            self.images = iter(tqdm(images, "calibration", unit=" images", disable=None))

        def get_next(self) -> Dict[str, np.ndarray] | None:
            image = next(self.images, None)
            if image is None:
                return None
            return predictor.inputs(predictor.view(image)["image"][None])

    return Reader()


def describe_int8(path: str, description: Dict[str, Any]) -> None:
    """Add how a file was quantised to its metadata, as made_by's entry int8."""
    import onnx

    model = onnx.load(path)
    (made_by,) = (entry for entry in model.metadata_props if entry.key == "made_by")
    made_by.value = json.dumps({**json.loads(made_by.value), "int8": description})
    onnx.save(model, path)


def file_logits(predictor: OnnxPredictor, files: Sequence[str]) -> np.ndarray:
    """Logits (B, C) of B files, with the label states of `example_states`."""
    states = example_states(len(files), len(predictor.label_names))
    return np.concatenate(
        [
            predictor.run(predictor.view(file)["image"][None], states[i : i + 1])["logits"]
            for i, file in enumerate(files)
        ]
    )


def compare_logits(found: np.ndarray, expected: np.ndarray) -> Int8Difference:
    """Compare int8 logits (B, C) with others (B, C)."""
    differences = np.abs(found - expected)
    found, expected = (logits - logits.mean(axis=0) for logits in (found, expected))
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(found) * np.linalg.norm(expected)
        correlation = np.sum(found * expected) / norms
    return Int8Difference(float(differences.mean()), float(differences.max()), float(correlation))
