"""From a data set dict to what `MultiLabelRecognizer` takes."""

from __future__ import annotations

from functools import partial
from typing import BinaryIO, Dict, List, NamedTuple, Set

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import InputError
from ..io import images
from .augmentation import (
    Cutout,
    MultiScaleCrop,
    RandAugment,
    RandomResizedCrop,
    Warp,
    centre_view,
    interpolation_of,
    window_of,
)
from .known_labels import choose_known, draw_known

# Of a data set dict, what becomes its target vector.
LABEL_KEYS = ("labels", "absent_labels", "ignored_labels")


class MultiLabelDatasetMapper:
    """Reads an image, takes its training or test view, and makes its target vector.

    A data set dict has detectron2's `file_name` and `image_id`, and
        labels: indices of the labels that are present;
        absent_labels: indices of those that are known to be absent. Where the key is missing, all
            are that are not named here; where it is there, what is not named is unknown;
        ignored_labels: indices of those that are neither present nor absent (may be missing);
        annotations: boxes in detectron2's form (may be missing);
        proposal_boxes and its companions, as `add_proposals` gives them (may be missing);
        label_states: (C,) in {1, 0, -1 = unknown}, labels that are known (may be missing).
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: List[T.Augmentation],
        image_format: str,
        num_labels: int,
        with_boxes: bool,
        proposal_topk: int = 0,
        min_proposal_size: float = 0,
        known_labels: float = 0,
        known_labels_seed: int = 0,
    ):
        """
        Args:
            augmentations: applied in order, to the image and its boxes.
            image_format: as detectron2's `read_image` takes it, such as RGB.
            num_labels: C.
            with_boxes: whether training samples get `instances`.
            proposal_topk: the most `proposals` of an image that comes with some.
            min_proposal_size: leave out those with a side of no more pixels, after augmentation.
            known_labels: share of the labels that are known, in training the largest one; 0: only
                those of the dict's label_states.
            known_labels_seed: of `choose_known`, for test images.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.num_labels = num_labels
        self.with_boxes = with_boxes
        self.proposal_topk = proposal_topk
        self.min_proposal_size = min_proposal_size
        self.known_labels = known_labels
        self.known_labels_seed = known_labels_seed

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        if not is_train and cfg.TEST.KNOWN_LABELS and cfg.TEST.IGNORED_LABELS != "nowhere":
            raise InputError(
                f"TEST.IGNORED_LABELS {cfg.TEST.IGNORED_LABELS} would measure the labels that are "
                "known (TEST.KNOWN_LABELS) as absent ones: set it to nowhere"
            )
        return {
            "is_train": is_train,
            "augmentations": build_augmentation(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "with_boxes": cfg.INPUT.WITH_BOXES,
            "proposal_topk": (
                cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN
                if is_train
                else cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
            ),
            "min_proposal_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "known_labels": (cfg.INPUT if is_train else cfg.TEST).KNOWN_LABELS,
            "known_labels_seed": cfg.TEST.KNOWN_LABELS_SEED,
        }

    def __call__(self, dataset_dict: Dict) -> Dict:
        """
        Returns:
            the dict without its labels and annotations, and with
                image: (3, H, W) uint8 tensor, after augmentation;
                height, width: of the image before augmentation, in pixels;
                window: of a test image, what of it `image` shows, see `window_of`;
                labels: (C,) float32 tensor in {1, 0, -1 = ignored or unknown};
                label_states: (C,) in {1, 0, -1 = unknown}, where the dict has them, or known_labels
                    is not 0; for a test image, `labels` are ignored where they are known;
                instances: detectron2's Instances with gt_boxes and gt_classes, where asked for;
                proposals: Instances with proposal_boxes and objectness_logits, best first, where
                    the dict has some.
        Raises:
            UnreadableImage: the file is missing, truncated, too large, or no image at all.
        """
        sample = {
            key: value
            for key, value in dataset_dict.items()
            if key not in (*LABEL_KEYS, "annotations")
        }
        image = read_image(sample["file_name"], self.image_format)
        sample["height"], sample["width"] = image.shape[:2]

        view = T.AugInput(image)
        transforms = self.augmentations(view)
        sample["image"] = torch.from_numpy(np.ascontiguousarray(view.image.transpose(2, 0, 1)))
        self.add_labels(sample, dataset_dict)
        image_size = view.image.shape[:2]
        if not self.is_train:
            sample["window"] = window_of(transforms, image_size)
        utils.transform_proposals(
            sample,
            image_size,
            transforms,
            proposal_topk=self.proposal_topk,
            min_box_size=self.min_proposal_size,
        )
        if self.is_train and self.with_boxes:
            # Only boxes: masks and keypoints of a detection data set are not used.
            annotations = [
                utils.transform_instance_annotations(
                    {key: box[key] for key in ("bbox", "bbox_mode", "category_id")},
                    transforms,
                    image_size,
                )
                for box in dataset_dict.get("annotations", [])
                if not box.get("iscrowd", 0)
            ]
            instances = utils.annotations_to_instances(annotations, image_size)
            sample["instances"] = utils.filter_empty_instances(instances)
        return sample

    def add_labels(self, sample: Dict, dataset_dict: Dict) -> None:
        """Give a sample its `labels`, and its `label_states` if they are to be drawn.

        What a model is told is not measured: known labels of a test image are ignored.
        """
        labels = target_vector(dataset_dict, self.num_labels)
        if self.known_labels and self.is_train:
            sample["label_states"] = draw_known(labels, self.known_labels)
        elif self.known_labels:
            sample["label_states"] = choose_known(
                labels, self.known_labels, sample["image_id"], self.known_labels_seed
            )
        if "label_states" in sample and not self.is_train:
            labels = labels.masked_fill(torch.as_tensor(sample["label_states"]) >= 0, -1)
        sample["labels"] = labels


def read_image(file: str | BinaryIO, image_format: str = "RGB") -> np.ndarray:
    """Decode an image as detectron2's `read_image` does, and 16-bit greys as well.

    Args:
        file: its name, local or of a kind that PathManager knows; or a binary file that is open.
        image_format: RGB, BGR or another of detectron2's `read_image`.
    Returns:
        (H, W, 3) uint8, turned as its EXIF orientation says.
    Raises:
        UnreadableImage: the file is missing, truncated, too large, or no image at all.
    """
    convert = images.convert_file if image_format in ("RGB", "BGR") else convert_image
    convert = partial(convert, image_format=image_format)
    return images.decode_image(file, convert, partial(PathManager.open, mode="rb"))


def convert_image(image: Image.Image, image_format: str = "RGB") -> np.ndarray:
    """What `read_image` returns, of an image that Pillow has opened."""
    if image_format in ("RGB", "BGR"):
        return images.convert_image(image, image_format)
    return utils.convert_PIL_to_numpy(images.upright_8_bit(image), image_format)


class ImageLabels(NamedTuple):
    """What is known of the labels of an image; each label is in one of the sets at most."""

    present: Set[int]
    absent: Set[int] | None
    """Those that are known to be absent, where all others are unknown. None: all others are."""
    ignored: Set[int]


def label_sets(dataset_dict: Dict) -> ImageLabels:
    """The labels of a data set dict: one that is named twice is rather present than ignored, and
    rather ignored than absent.
    """
    present = set(dataset_dict["labels"])
    ignored = set(dataset_dict.get("ignored_labels", ())) - present
    absent = None
    if "absent_labels" in dataset_dict:
        absent = set(dataset_dict["absent_labels"]) - ignored - present
    return ImageLabels(present, absent, ignored)


def target_vector(dataset_dict: Dict, num_labels: int) -> torch.Tensor:
    """(C,) float32: 1 for labels that are present, 0 for absent ones, and -1 for those that are
    ignored or unknown, see `label_sets`.
    """
    labels = label_sets(dataset_dict)
    if labels.absent is None:
        target = torch.zeros(num_labels)
        target[list(labels.ignored)] = -1
    else:
        target = torch.full((num_labels,), -1.0)
        target[list(labels.absent)] = 0
    target[list(labels.present)] = 1
    return target


def build_augmentation(cfg, is_train: bool) -> List[T.Augmentation]:
    """Training view: MultiScaleCrop or RandomResizedCrop, flip, Cutout and RandAugment, if INPUT
    enables them; test view: `centre_view`.

    Training views take `Warp`, which is faster than the test view's Resize.

    Raises:
        InputError: a key is out of range, or RandAugment is used with boxes or proposals.
    """
    size, interpolation = tuple(cfg.INPUT.IMAGE_SIZE), interpolation_of(cfg)
    if not is_train:
        return centre_view(size, cfg.INPUT.CENTER_CROP, interpolation)
    crop, least_area = cfg.INPUT.MULTI_SCALE_CROP, cfg.INPUT.RANDOM_RESIZED_CROP
    if crop.ENABLED and least_area:
        raise InputError(
            "INPUT.RANDOM_RESIZED_CROP takes the place of INPUT.MULTI_SCALE_CROP: set the latter's "
            "ENABLED to False"
        )
    if crop.ENABLED:
        scales = crop.SCALES, crop.MAX_DISTORT
        augmentations = [MultiScaleCrop(size, *scales, interpolation, crop.BASE)]
    elif least_area:
        augmentations = [RandomResizedCrop(size, least_area, interpolation)]
    else:
        augmentations = [Warp(size, interpolation)]
    if cfg.INPUT.RANDOM_FLIP != "none":
        augmentations.append(
            T.RandomFlip(
                horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
            )
        )
    if cfg.INPUT.CUTOUT:
        augmentations.append(Cutout(cfg.INPUT.CUTOUT))
    if cfg.INPUT.RAND_AUGMENT_OPS:
        if cfg.INPUT.WITH_BOXES or cfg.MODEL.LOAD_PROPOSALS:
            raise InputError(
                "INPUT.RAND_AUGMENT_OPS does not transform boxes: set INPUT.WITH_BOXES and "
                "MODEL.LOAD_PROPOSALS to False"
            )
        augmentations.append(
            RandAugment(
                cfg.INPUT.RAND_AUGMENT_OPS, cfg.INPUT.RAND_AUGMENT_MAGNITUDE, cfg.INPUT.FORMAT
            )
        )
    return augmentations
