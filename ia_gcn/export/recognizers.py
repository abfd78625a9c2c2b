"""Models in a form that torch.export and ONNX can convert: from tensors of fixed sizes to tensors.

B, C and N are the numbers of images, labels and regions.
"""

from __future__ import annotations

import copy
from typing import Dict, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes
from torch import nn
from torchvision.ops import nms

from ..errors import InputError
from ..modeling import ImageFeatures, MultiLabelRecognizer, VariationalROIHeads


def exportable(model: MultiLabelRecognizer, image_size: Sequence[int]) -> ExportableRecognizer:
    """The form of a model that can be exported; the model itself stays as it is.

    Args:
        model: with its weights, and a label graph that is filled.
        image_size: height and width of its input, INPUT.IMAGE_SIZE.
    Raises:
        InputError: the model has a part that has no such form.
    """
    kind = ExportableInstanceAwareRecognizer if model.has_regions else ExportableRecognizer
    return kind(model, image_size).eval().requires_grad_(False)


class ExportableRecognizer(nn.Module):
    """A recogniser in evaluation, on a batch of images of one size.

    Attributes:
        inputs: names of what forward takes, in order.
        outputs: names of what forward returns, in order.
        dynamic_batch: whether a batch may have any number of images, rather than one.
    """

    outputs = ("scores", "logits")
    dynamic_batch = True

    def __init__(self, model: MultiLabelRecognizer, image_size: Sequence[int]):
        super().__init__()
        self.model = model = copy.deepcopy(model).eval()
        self.inputs = ("images", "label_states") if model.takes_known_labels else ("images",)
        self.image_size = height, width = tuple(image_size)
        # As ImageList.from_tensors pads a batch of this size.
        multiple = max(1, model.backbone.size_divisibility)
        self.padding = (0, -width % multiple, 0, -height % multiple)
        model.fix_classifiers()
        if model.label_graph is not None:
            # It looks at its values, which a trace has none of, but only once.
            model.label_graph.check_filled()

    def forward(
        self, images: torch.Tensor, label_states: torch.Tensor | None = None
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            images: (B, 3, H, W) uint8, in INPUT.FORMAT's order of channels.
            label_states: (B, C) in {1, 0, -1 = unknown}, of any type, for models that take known
                labels; None: nothing is known.
        Returns:
            scores: (B, C) probabilities;
            logits: (B, C).
        """
        features = self.collect_features(self.feature_maps(images), label_states)
        outputs, _ = self.model.apply_heads(features)
        return {"scores": outputs["logits"].sigmoid(), "logits": outputs["logits"]}

    def collect_features(
        self, maps: Dict[str, torch.Tensor], label_states: torch.Tensor | None
    ) -> ImageFeatures:
        """The model's, of the backbone's maps and `forward`'s label_states."""
        features = self.model.collect_features(maps, [self.image_size])
        if label_states is None:
            return features
        return features._replace(label_states=label_states.float())

    def feature_maps(self, images: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The backbone's."""
        images = (images - self.model.pixel_mean) / self.model.pixel_std
        return self.model.backbone(F.pad(images, self.padding) if any(self.padding) else images)


class ExportableInstanceAwareRecognizer(ExportableRecognizer):
    """A recogniser with regions in evaluation, with its RPN, on one image of a fixed size."""

    outputs = ("scores", "logits", "boxes", "weights", "region_scores", "valid")
    dynamic_batch = False

    def __init__(self, model: MultiLabelRecognizer, image_size: Sequence[int]):
        """
        Raises:
            InputError: the proposals are not detectron2's RPN's, or the regions not pooled by
                VariationalROIHeads with ROIAlign.
        """
        refuse_other_than("MODEL.PROPOSAL_GENERATOR.NAME", model.proposal_generator, RPN)
        refuse_other_than("MODEL.ROI_HEADS.NAME", model.roi_heads, VariationalROIHeads)
        for pooler in model.roi_heads.pooler.level_poolers:
            refuse_other_than("MODEL.ROI_BOX_HEAD.POOLER_TYPE", pooler, ROIAlign)
        super().__init__(model, image_size)

    def forward(
        self, images: torch.Tensor, label_states: torch.Tensor | None = None
    ) -> Dict[str, torch.Tensor]:
        """
        Args:
            images: (1, 3, H, W) uint8, in INPUT.FORMAT's order of channels.
            label_states: (1, C), as above.
        Returns:
            scores: (1, C) probabilities of ŷ_f;
            logits: (1, C) ŷ_f;
            boxes: (N, 4) x0, y0, x1, y1 in pixels of the model's input, best first by objectness;
            weights: (N,) z;
            region_scores: (N, C) A_I^w;
            valid: (N,) bool, which regions are there: the first ones; the others are zeros.
        """
        maps = self.feature_maps(images)
        boxes, valid = self.propose_regions(maps)
        regions = self.region_features(maps, boxes, valid)
        features = self.collect_features(maps, label_states)
        outputs, _ = self.model.apply_heads(
            features._replace(regions=regions[None], valid=valid[None])
        )
        return {
            "scores": outputs["logits"].sigmoid(),
            "logits": outputs["logits"],
            "boxes": boxes,
            "weights": outputs["region_weights"][0],
            "region_scores": outputs["region_scores"][0],
            "valid": valid,
        }

    def propose_regions(
        self, features: Dict[str, torch.Tensor]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """What detectron2's RPN.forward proposes: boxes (N, 4), and which are there, (N,) bool."""
        rpn = self.model.proposal_generator
        features = [features[name] for name in rpn.in_features]
        logits, deltas = rpn.rpn_head(features)
        # (1, A, H, W) to (1, HWA), and (1, 4A, H, W) to (1, HWA, 4).
        logits = [level.permute(0, 2, 3, 1).flatten(1) for level in logits]
        deltas = [
            level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in deltas
        ]
        proposals = rpn._decode_proposals(rpn.anchor_generator(features), deltas)
        return top_proposals(
            [level[0] for level in proposals],
            [level[0] for level in logits],
            self.image_size,
            nms_thresh=rpn.nms_thresh,
            pre_nms_topk=rpn.pre_nms_topk[False],
            post_nms_topk=rpn.post_nms_topk[False],
            min_box_size=rpn.min_box_size,
            num_regions=self.model.roi_heads.num_regions,
        )

    def region_features(
        self, features: Dict[str, torch.Tensor], boxes: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """X (N, D), 0 where there is no region."""
        heads, pooler = self.model.roi_heads, self.model.roi_heads.pooler
        # The index of the image comes first.
        rois = F.pad(boxes, (1, 0))
        levels = [
            pool(features[name], rois)
            for name, pool in zip(heads.in_features, pooler.level_poolers)
        ]
        pooled = levels[0]
        if len(levels) > 1:
            assigned = assign_boxes_to_levels(
                [Boxes(boxes)],
                pooler.min_level,
                pooler.max_level,
                pooler.canonical_box_size,
                pooler.canonical_level,
            )
            # All from all levels, as how many belong to one is not fixed.
            for i, level in enumerate(levels[1:], start=1):
                pooled = torch.where((assigned == i)[:, None, None, None], level, pooled)
        if heads.res5 is not None:
            pooled = heads.res5(pooled)
        return pooled.mean(dim=(2, 3)).masked_fill(~valid[:, None], 0)


def top_proposals(
    proposals: List[torch.Tensor],
    logits: List[torch.Tensor],
    image_size: Sequence[int],
    *,
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    num_regions: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """What detectron2's find_top_rpn_proposals finds in one image, in tensors of fixed sizes.

    A box is not removed: its logit becomes -inf, which sorts it behind all others.

    Args:
        proposals: of each feature map, (K, 4), decoded.
        logits: of each feature map, (K,).
        image_size: height and width.
        nms_thresh, pre_nms_topk, post_nms_topk, min_box_size: as there, in evaluation.
        num_regions: N; no more of them are returned.
    Returns:
        boxes (N, 4), best first by their logits, and which are there, (N,) bool; zeros behind them.
    """
    height, width = image_size
    found_boxes, found_logits = [], []
    for level_boxes, level_logits in zip(proposals, logits):
        scores, order = level_logits.sort(descending=True)
        scores, boxes = scores[:pre_nms_topk], level_boxes[order[:pre_nms_topk]]
        usable = boxes.isfinite().all(dim=1) & scores.isfinite()
        x0, x1 = boxes[:, 0].clamp(0, width), boxes[:, 2].clamp(0, width)
        y0, y1 = boxes[:, 1].clamp(0, height), boxes[:, 3].clamp(0, height)
        usable = usable & (x1 - x0 > min_box_size) & (y1 - y0 > min_box_size)
        boxes = torch.stack([x0, y0, x1, y1], dim=1).masked_fill(~usable[:, None], 0)
        scores = scores.masked_fill(~usable, -torch.inf)
        kept = torch.zeros_like(usable).index_fill(0, nms(boxes, scores, nms_thresh), True)
        found_boxes.append(boxes)
        found_logits.append(scores.masked_fill(~kept, -torch.inf))
    scores, order = torch.cat(found_logits).sort(descending=True)
    count = min(num_regions, post_nms_topk, len(order))
    valid = scores[:count] > -torch.inf
    boxes = torch.cat(found_boxes)[order[:count]].masked_fill(~valid[:, None], 0)
    missing = num_regions - count
    return F.pad(boxes, (0, 0, 0, missing)), F.pad(valid, (0, missing))


def refuse_other_than(key: str, part: nn.Module | None, kind: type) -> None:
    if type(part) is not kind:
        raise InputError(f"{key}: a {type(part).__name__} can't be exported, but {kind.__name__}")
