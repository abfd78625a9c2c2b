"""Several views of each image for evaluation: at several sizes, and mirrored."""

from __future__ import annotations

from typing import Dict, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from PIL import Image

from ..errors import InputError
from .augmentation import centre_view, interpolation_of
from .dataset_mapper import LABEL_KEYS, MultiLabelDatasetMapper, read_image

PROPOSAL_KEYS = ("proposal_boxes", "proposal_objectness_logits", "proposal_bbox_mode")


class DatasetMapperTTA(MultiLabelDatasetMapper):
    """Reads an image once and makes the views that `MultiLabelTTA` takes.

    Every view is resized from the image itself, as enlarging the plain test view would add no
    detail. Proposals from a file are scaled and mirrored with it.
    """

    @configurable
    def __init__(
        self,
        *,
        image_size: Tuple[int, int],
        center_crop: float,
        interpolation: Image.Resampling,
        scales: Sequence[float],
        flip: bool,
        **kwargs,
    ):
        """
        Args:
            image_size: height and width of a view at scale 1, in pixels.
            center_crop: share of each side of the image that a view keeps.
            interpolation: Pillow's, bilinear or bicubic.
            scales: at least one positive factor of image_size.
            flip: whether each size has a mirrored view too.
            kwargs: those of MultiLabelDatasetMapper but for is_train.
        """
        super().__init__(is_train=False, **kwargs)
        self.views = []
        for scale in scales:
            height, width = (max(1, round(scale * side)) for side in image_size)
            view = centre_view((height, width), center_crop, interpolation)
            self.views.append(T.AugmentationList(view))
            if flip:
                self.views.append(T.AugmentationList([*view, T.HFlipTransform(width)]))

    @classmethod
    def from_config(cls, cfg):
        scales = cfg.TEST.AUG.SCALES
        if not scales or not all(isinstance(s, (int, float)) and 0 < s <= 16 for s in scales):
            raise InputError(f"TEST.AUG.SCALES must be numbers above 0, up to 16, not {scales}")
        ret = super().from_config(cfg, is_train=False)
        del ret["is_train"]
        return {
            **ret,
            "image_size": tuple(cfg.INPUT.IMAGE_SIZE),
            "center_crop": cfg.INPUT.CENTER_CROP,
            "interpolation": interpolation_of(cfg),
            "scales": scales,
            "flip": cfg.TEST.AUG.FLIP,
        }

    def __call__(self, dataset_dict: Dict) -> Dict:
        """
        Returns:
            what MultiLabelDatasetMapper does, but for image and proposals, which are in
                views: a dict with image, and proposals where there are some, of each view.
        Raises:
            UnreadableImage: the file is missing, truncated, too large, or no image at all.
        """
        image = read_image(dataset_dict["file_name"], self.image_format)
        left_out = (*LABEL_KEYS, "annotations", *PROPOSAL_KEYS)
        sample = {key: value for key, value in dataset_dict.items() if key not in left_out}
        sample["height"], sample["width"] = image.shape[:2]
        self.add_labels(sample, dataset_dict)
        proposals = {key: dataset_dict[key] for key in PROPOSAL_KEYS if key in dataset_dict}
        states = {key: sample[key] for key in ("label_states",) if key in sample}
        more = {**proposals, **states}
        sample["views"] = [self._view(image, view, more) for view in self.views]
        return sample

    def _view(self, image: np.ndarray, augmentations: T.AugmentationList, proposals: Dict) -> Dict:
        view = T.AugInput(image)
        transforms = augmentations(view)
        pixels = np.ascontiguousarray(view.image.transpose(2, 0, 1))
        sample = {"image": torch.from_numpy(pixels), **proposals}
        utils.transform_proposals(
            sample,
            view.image.shape[:2],
            transforms,
            proposal_topk=self.proposal_topk,
            min_box_size=self.min_proposal_size,
        )
        return sample
