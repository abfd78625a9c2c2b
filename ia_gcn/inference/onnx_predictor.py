"""Predictor for models that tools/export_model.py wrote, without torch and detectron2.

C is the number of labels.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, ContextManager, Dict, Iterator, List, Sequence, Tuple

import numpy as np
from PIL import Image

from ..errors import InputError
from ..io.images import (
    ImageSource,
    boxes_on_image,
    convert_file,
    convert_image,
    decode_image,
    image_pixels,
)
from .known_labels import KnownLabels, hold_known, known_labels, make_samples
from .prediction import PredictedRegions, Prediction

# Of a model's input, or of what it is cut out of; larger ones are taken for damage.
MAX_PIXELS = 2**26


class ImageView:
    """From an image to the input of an exported model; works without the model.

    The pixels are those of evaluation, bit for bit.
    """

    def __init__(self, preprocessing: Dict[str, Any]):
        """
        Args:
            preprocessing: as `ia_gcn.export.describe` returns it.
        Raises:
            LookupError, TypeError, ValueError: it is anything else.
        """
        height, width = _sides(preprocessing, "size")
        self.size = width, height
        # Where there is no centre crop; files of older versions have neither.
        preprocessing = {"resize": [height, width], "crop": [0, 0], **preprocessing}
        whole_height, whole_width = _sides(preprocessing, "resize")
        self.resized = whole_width, whole_height
        top, left = preprocessing["crop"]
        self.box = left, top, left + width, top + height
        within = 0 <= top <= whole_height - height and 0 <= left <= whole_width - width
        if not (type(top) is type(left) is int and within):
            raise ValueError("crop must be a row and a column inside of resize")
        self.interpolation = Image.Resampling[preprocessing["interpolation"].upper()]
        image_format = preprocessing["format"]
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"format {image_format!r}")
        self.convert = partial(convert_image, image_format=image_format)
        convert = partial(convert_file, image_format=image_format)
        self.read = partial(decode_image, convert=convert)

    def __call__(self, source: ImageSource) -> Dict:
        """
        Returns:
            image: (3, H, W) uint8 array, of the model's size;
            height, width: of the image, turned as its EXIF says, in pixels;
            window: what `image` shows of it, x0, y0, x1, y1 in its pixels.
        Raises:
            UnreadableImage: a file is missing, truncated, too large, or no image at all.
            InputError: it is none of the things that an `ImageSource` is.
        """
        pixels = image_pixels(source, self.convert, self.read)
        resized = Image.fromarray(pixels).resize(self.resized, self.interpolation)
        view = np.asarray(resized.crop(self.box)).transpose(2, 0, 1)
        height, width = pixels.shape[:2]
        window = np.array(self.box) * ([width, height] * 2) / (self.resized * 2)
        return {"image": view, "height": height, "width": width, "window": window}


def _sides(preprocessing: Dict[str, Any], name: str) -> Tuple[int, int]:
    """Two numbers of pixels, height and width."""
    height, width = preprocessing[name]
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise ValueError(f"{name} must be two numbers of pixels")
    if height * width > MAX_PIXELS:
        raise ValueError(f"{name} {height}×{width}: more than {MAX_PIXELS} pixels")
    return height, width


class OnnxPredictor:
    """Predicts the labels of an image, as `MultiLabelPredictor` does.

    Attributes:
        label_names: C names.
        metadata: what tools/export_model.py wrote into the file: label_names, preprocessing and
            made_by.
        view: an `ImageView`.
        has_regions: whether the model has a region branch.
        takes_known_labels: whether labels that are known of an image tell it of the others: whether
            it has the input label_states.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        *,
        device: str | None = None,
        threads: int | None = None,
    ):
        """
        Args:
            weights: the .onnx file.
            device: cpu or cuda; None: a GPU where onnxruntime finds one.
            threads: of onnxruntime, for a batch; None: one a processor core.
        Raises:
            InputError: the file can't be used, there is no onnxruntime, or no such device.
        """
        self.path = os.fspath(weights)
        self.session = _start_session(self.path, device, threads)
        try:
            stored = self.session.get_modelmeta().custom_metadata_map
            self.metadata = {
                key: json.loads(stored[key]) for key in ("label_names", "preprocessing", "made_by")
            }
            self.view = ImageView(self.metadata["preprocessing"])
            names = self.metadata["label_names"]
            if type(names) is not list or not all(type(name) is str for name in names):
                raise ValueError("label_names must be a list of names")
            self.label_names: List[str] = names
            inputs = {value.name: value for value in self.session.get_inputs()}
            outputs = {value.name: value.shape for value in self.session.get_outputs()}
            if outputs["scores"][1] != len(names):
                raise ValueError("label_names")
            if inputs["images"].shape[1:] != [3, *self.view.size[::-1]]:
                raise ValueError("size")
            if inputs["images"].type != "tensor(uint8)":
                raise ValueError("images must be uint8")
            self.takes_known_labels = "label_states" in inputs
            if self.takes_known_labels:
                states = inputs["label_states"]
                if (states.type, states.shape[1:]) != ("tensor(int8)", [len(names)]):
                    raise ValueError("label_states must be int8, one of each label")
        # A RecursionError is of JSON that is nested deeply.
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.path} was not written by tools/export_model.py: {repr(error)[:200]} in its "
                "metadata"
            ) from None
        self.outputs = list(outputs)
        self.has_regions = "boxes" in self.outputs

    def __call__(self, image: ImageSource, known: KnownLabels | None = None) -> Prediction:
        """
        Args:
            image: a file, an open binary file, a Pillow image or an array.
            known: whether labels are there, by their names; their scores are 1 and 0.
        Raises:
            UnreadableImage, InputError: see `ImageView`.
            InputError: the model makes no use of known labels, or has no label of a name.
        """
        return self.predict_batch([image], [known])[0]

    def predict_batch(
        self, images: Sequence[ImageSource], known: Sequence[KnownLabels | None] | None = None
    ) -> List[Prediction]:
        """The same for several images, of any sizes.

        Args:
            images: B of them.
            known: B mappings; None, or a None among them: nothing is known.
        """
        return self.predict_views(make_samples(self, images, known))

    def predict_views(self, samples: Sequence[Dict]) -> List[Prediction]:
        """The same for what `view` made of images.

        Raises:
            InputError: the model's output is not finite.
        """
        predictions = []
        # With a region branch, a batch is one image.
        size = 1 if self.has_regions else max(1, len(samples))
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            images = np.stack([sample["image"] for sample in batch])
            unknown = np.full(len(self.label_names), -1)
            states = np.stack([sample.get("label_states", unknown) for sample in batch])
            outputs = self.run(images, states)
            for sample, scores in zip(batch, outputs["scores"]):
                predictions.append(self._describe(sample, scores, outputs))
        return predictions

    @contextmanager
    def used_by(self, num_threads: int) -> Iterator[Tuple[None, ContextManager]]:
        """As `MultiLabelPredictor.used_by`: onnxruntime has threads of its own for a batch."""
        yield None, Lock()

    def run(
        self, images: np.ndarray, label_states: np.ndarray | None = None
    ) -> Dict[str, np.ndarray]:
        """The model's outputs by name.

        Args:
            images: (B, 3, H, W) uint8.
            label_states: (B, C) in {1, 0, -1 = unknown}, which have no effect on a model that does
                not take known labels; None: nothing is known.
        Raises:
            InputError: onnxruntime can't run the model on them.
        """
        try:
            values = self.session.run(None, self.inputs(images, label_states))
        except Exception as error:  # its exceptions have no common class but this
            reason = " ".join(str(error).split())[:500]
            raise InputError(f"{self.path}: onnxruntime can't run it: {reason}") from None
        return dict(zip(self.outputs, values))

    def inputs(
        self, images: np.ndarray, label_states: np.ndarray | None = None
    ) -> Dict[str, np.ndarray]:
        """What the model takes by name, of the arguments of `run`."""
        if not self.takes_known_labels:
            return {"images": images}
        if label_states is None:
            label_states = np.full((len(images), len(self.label_names)), -1)
        return {"images": images, "label_states": np.asarray(label_states, np.int8)}

    def _describe(self, sample: Dict, scores: np.ndarray, outputs: Dict) -> Prediction:
        regions = None
        if self.has_regions:
            valid = outputs["valid"]
            regions = PredictedRegions(
                boxes_on_image(outputs["boxes"][valid], sample),
                outputs["weights"][valid],
                outputs["region_scores"][valid],
            )
        if not all(np.isfinite(values).all() for values in (scores, *(regions or ()))):
            raise InputError(f"the output of {self.path} for an image is not finite")
        scores = hold_known(sample, scores)
        return Prediction(self.label_names, scores, regions, known_labels(sample, self.label_names))


def _start_session(path: str, device: str | None, threads: int | None):
    """An onnxruntime session of a file."""
    try:
        import onnxruntime
    except ImportError:
        raise InputError(f"{path}: running it needs onnxruntime: pip install onnxruntime") from None
    kinds = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
    wanted = list(kinds) if device is None else [device]
    available = onnxruntime.get_available_providers()
    providers = [kinds[kind] for kind in wanted if kinds.get(kind) in available]
    if not providers:
        raise InputError(f"device {device}: onnxruntime has {', '.join(available)} here")
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file")
    options = onnxruntime.SessionOptions()
    # 0: one a core.
    options.intra_op_num_threads = threads or 0
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # its exceptions have no common class but this
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not a model that onnxruntime can run: {reason}") from None
