"""Predictor for a trained model, which needs its checkpoint only.

C is the number of labels, n of an image's regions.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any, Callable, ContextManager, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import transforms as T

from ..checkpoint import load_model, read_checkpoint, scored_labels
from ..config import add_ia_gcn_config, read_config
from ..config_values import check_values
from ..data.augmentation import window_of
from ..data.dataset_mapper import build_augmentation, convert_image, read_image
from ..errors import InputError
from ..extensions import check_extensions
from ..io.images import ImageSource, boxes_on_image, image_pixels
from ..io.plain_yaml import load_plain_yaml
from .known_labels import KnownLabels, hold_known, known_labels, make_samples
from .optimize import optimize_for_inference
from .precision import set_precision
from .prediction import PredictedRegions, Prediction


class EvaluationView:
    """From an image to the model's input, as in evaluation; works without the model."""

    def __init__(self, cfg: CfgNode):
        self.image_format = cfg.INPUT.FORMAT
        self.augmentations = T.AugmentationList(build_augmentation(cfg, is_train=False))

    def __call__(self, source: ImageSource) -> Dict:
        """
        Returns:
            image: (3, H, W) uint8 tensor, the test view;
            height, width: of the image, turned as its EXIF says, in pixels;
            window: what `image` shows of it, x0, y0, x1, y1 in its pixels.
        Raises:
            UnreadableImage: a file is missing, truncated, too large, or no image at all.
            InputError: it is none of the things that an `ImageSource` is.
        """
        convert = partial(convert_image, image_format=self.image_format)
        read = partial(read_image, image_format=self.image_format)
        view = T.AugInput(image_pixels(source, convert, read))
        height, width = view.image.shape[:2]
        transforms = self.augmentations(view)
        image = torch.from_numpy(np.ascontiguousarray(view.image.transpose(2, 0, 1)))
        window = window_of(transforms, view.image.shape[:2])
        return {"image": image, "height": height, "width": width, "window": window}


class MultiLabelPredictor:
    """Predicts the labels of an image.

        p = MultiLabelPredictor(weights="model.pth")
        p("photo.jpg").above(0.5)  # [("cat", 0.93), ("sofa", 0.71)]

    with labels that are known, of a model that takes them,

        p("photo.jpg", known={"dog": False, "sofa": True})

    or, with a model in memory, such as a `Trainer`'s:

        p = MultiLabelPredictor(
            model=trainer.model, label_names=trainer.label_names, cfg=trainer.cfg
        )

    Images are prepared as in evaluation, and the scores are those of evaluation, of the one test
    view: TEST.AUG, TEST.OPTIMIZE_MODEL and TEST.PRECISION have no effect.

    Attributes:
        cfg: the model's config, frozen.
        label_names: C names.
        view: an `EvaluationView`.
        model: in evaluation mode.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        model: torch.nn.Module | None = None,
        label_names: Sequence[str] | None = None,
        cfg: CfgNode | None = None,
        config_file: str = "",
        opts: Sequence[Any] = (),
        device: str | None = None,
        ema: bool = False,
        optimize: bool = True,
        precision: str = "fp32",
    ):
        """
        Args:
            weights: a checkpoint of `MultiLabelCheckpointer`.
            model: a recogniser to be used as it is and where it is, in place of `weights`; it is
                put into evaluation mode. The arguments after `cfg` have no effect then.
            label_names: of the model's outputs, in order; with `model`.
            cfg: of the model, frozen; with `model`.
            config_file: in place of the config that the checkpoint contains.
            opts: alternating keys and values, which come after the config's own.
            device: of torch, for example cpu; None: a GPU where there is one.
            ema: use the EMA of the weights that the checkpoint contains.
            optimize: see `optimize_for_inference`; the scores are the same within rounding.
            precision: fp32, bf16 or auto, see `set_precision`.
        Raises:
            InputError: the checkpoint or the config can't be used, or do not go together; the
                model needs proposals from a file; there is no such device.
        """
        if weights is None:
            if model is None or label_names is None or cfg is None:
                raise TypeError("MultiLabelPredictor takes weights, or model, label_names and cfg")
            model = getattr(model, "module", model)  # of a DistributedDataParallel
            _check_proposals(cfg, model)
            self.cfg, self.label_names, self.model = cfg, list(label_names), model.eval()
        else:
            self._read(os.fspath(weights), config_file, opts, device, ema)
            if optimize:
                optimize_for_inference(self.model, self.cfg.INPUT.IMAGE_SIZE)
            set_precision(self.model, precision, "precision")
        self.view = EvaluationView(self.cfg)

    def _read(self, weights, config_file, opts, device, ema) -> None:
        content = read_checkpoint(weights)
        trained = _label_names(content, weights)
        cfg = _read_config(content, weights, config_file, opts)
        self.label_names = scored_labels(cfg, trained)
        cfg.MODEL.WEIGHTS = weights
        cfg.MODEL.LABEL_HEAD.NUM_LABELS = len(self.label_names)
        cfg.MODEL.DEVICE = _check_device(device)
        cfg.freeze()
        self.cfg = cfg
        self.model = _load_model(cfg, self.label_names, ema)

    @property
    def has_regions(self) -> bool:
        """Whether the model has a region branch."""
        return self.model.has_regions

    @property
    def takes_known_labels(self) -> bool:
        """Whether labels that are known of an image tell the model of the others."""
        return self.model.takes_known_labels

    def __call__(self, image: ImageSource, known: KnownLabels | None = None) -> Prediction:
        """
        Args:
            image: a file, an open binary file, a Pillow image or an array.
            known: whether labels are there, by their names; their scores are 1 and 0.
        Raises:
            UnreadableImage, InputError: see `EvaluationView`.
            InputError: the model makes no use of known labels, or has no label of a name.
        """
        return self.predict_batch([image], [known])[0]

    def predict_batch(
        self, images: Sequence[ImageSource], known: Sequence[KnownLabels | None] | None = None
    ) -> List[Prediction]:
        """The same for several images, of any sizes, which go through the model at once.

        Args:
            images: B of them.
            known: B mappings; None, or a None among them: nothing is known.
        """
        return self.predict_views(make_samples(self, images, known))

    @torch.no_grad()
    def predict_views(self, samples: Sequence[Dict]) -> List[Prediction]:
        """The same for what `view` made of images.

        Raises:
            InputError: the model's output is not finite.
        """
        if not samples:
            return []
        results = zip(samples, self.model(samples))
        return [self._describe(sample, result) for sample, result in results]

    @contextmanager
    def used_by(self, num_threads: int) -> Iterator[Tuple[Callable | None, ContextManager]]:
        """While so many threads predict at once.

        Yields:
            what each of them calls first, or None, and what it enters for `predict_views`.
        """
        if self.model.device.type != "cpu":
            yield None, Lock()
            return
        total = torch.get_num_threads()
        try:
            each = max(1, total // max(1, num_threads))
            yield partial(torch.set_num_threads, each), nullcontext()
        finally:
            # It is what threads that start later have.
            torch.set_num_threads(total)

    def _describe(self, sample: Dict, result: Dict) -> Prediction:
        scores, regions = _to_numpy(result["scores"]), None
        if "regions" in result:
            found = result["regions"]
            regions = PredictedRegions(
                boxes_on_image(_to_numpy(found.proposal_boxes.tensor), sample),
                _to_numpy(found.weights),
                _to_numpy(found.scores),
            )
        if not all(np.isfinite(values).all() for values in (scores, *(regions or ()))):
            raise InputError(
                f"MODEL.WEIGHTS: the output of {self.cfg.MODEL.WEIGHTS} for an image is not finite"
            )
        scores = hold_known(sample, scores)
        return Prediction(self.label_names, scores, regions, known_labels(sample, self.label_names))


def _label_names(content: Dict[str, Any], weights: str) -> List[str]:
    names = content.get("label_names")
    if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise InputError(
            f"MODEL.WEIGHTS: {weights} has no label names: is it a checkpoint of ia_gcn?"
        )
    return names


def _read_config(
    content: Dict[str, Any], weights: str, config_file: str, opts: Sequence[Any]
) -> CfgNode:
    """The config of a checkpoint's content, or that of the file, and `opts`."""
    if not config_file and not content.get("config"):
        raise InputError(
            f"{weights} has no config: give that of its training as config_file (--config-file)"
        )
    if config_file:
        return read_config(config_file, opts)
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    defaults = cfg.clone()
    source = f"the config in {weights}"
    keys = load_plain_yaml(content["config"], source)
    try:
        cfg.merge_from_other_cfg(CfgNode(keys))
        # Which file is read is the user's choice, and not a checkpoint's.
        cfg.TEST.LABELS = ""
        source = " ".join(map(str, opts))
        cfg.merge_from_list(list(opts))
    except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{source}: {' '.join(str(error).split())}") from None
    check_values(cfg, defaults)
    check_extensions(cfg.IMPORTS)
    return cfg


def _check_device(device: str | None) -> str:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    # torch without CUDA has an assertion for it.
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"device {device}: {str(error).splitlines()[0]}") from None
    return device


def _load_model(cfg: CfgNode, label_names: List[str], ema: bool) -> torch.nn.Module:
    model = load_model(cfg, label_names, ema=ema)
    _check_proposals(cfg, model)
    return model.eval().requires_grad_(False)


def _check_proposals(cfg: CfgNode, model: torch.nn.Module) -> None:
    if model.needs_proposals:
        raise InputError(
            f"MODEL.PROPOSAL_GENERATOR.NAME is {cfg.MODEL.PROPOSAL_GENERATOR.NAME}: this model "
            "needs regions from a file, which a single image does not have"
        )


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
