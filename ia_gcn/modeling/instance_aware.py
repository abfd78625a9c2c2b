"""IA-GCN: the recogniser with regions and a label graph for every image."""

from __future__ import annotations

from typing import Dict, List, Tuple, Union

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_proposal_generator, build_roi_heads
from detectron2.structures import ImageList, Instances
from torch import nn

from ..errors import InputError
from .label_graph import LabelGraph
from .recognizer import MultiLabelRecognizer
from .region_heads import RegionGCN, Regions


@META_ARCH_REGISTRY.register()
class InstanceAwareRecognizer(MultiLabelRecognizer):
    """IA-GCN: a global branch and a region branch, with a label graph built for every image.

    Regions of a proposal generator → their weighted features' rough scores (VariationalROIHeads)
    → the image-dependent label graph, on which the label head scores the feature of the whole image
    (ŷ_w) and the region GCN the regions' scores (ŷ_r); ŷ_f = λ ŷ_w + (1 - λ) ŷ_r.
    """

    @configurable
    def __init__(
        self,
        *,
        proposal_generator: nn.Module | None,
        freeze_proposals: bool,
        roi_heads: nn.Module,
        image_dependent: bool,
        region_gcn: nn.Module | None,
        individual_regions: bool,
        global_weight: float,
        label_graph: LabelGraph | None = None,
        **kwargs,
    ):
        """
        Args:
            proposal_generator: detectron2's RPN; None: each image comes with its `proposals`.
            freeze_proposals: keep the RPN's weights and ask for no boxes.
            roi_heads: features and proposals to `Regions`, and losses.
            image_dependent: whether the label head gets A_F or A_S.
            region_gcn: `Regions` and a label graph to logits (B, C).
            individual_regions: whether the region GCN gets A_I instead of A_F.
            global_weight: λ in [0, 1]; with 0 there needs to be no label_head, with 1 no
                region_gcn.
            label_graph: A_S for the region GCN; None: that of the label head.
            kwargs: those of MultiLabelRecognizer.
        """
        super().__init__(**kwargs)
        self.proposal_generator = proposal_generator
        self.freeze_proposals = freeze_proposals
        if freeze_proposals and proposal_generator is not None:
            proposal_generator.requires_grad_(False).eval()
        self.roi_heads = roi_heads
        self.image_dependent = image_dependent
        self.region_gcn = region_gcn
        self.individual_regions = individual_regions
        self.global_weight = global_weight
        self.label_graph = label_graph

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        label_graph = getattr(ret["label_head"], "label_graph", None)
        global_weight = cfg.MODEL.FUSION.GLOBAL_WEIGHT
        if not 0 <= global_weight <= 1:
            raise InputError(f"MODEL.FUSION.GLOBAL_WEIGHT must be in [0, 1], not {global_weight}")
        individual = {"individual": True, "image_dependent": False}.get(cfg.MODEL.REGION_GCN.LCM)
        if individual is None:
            raise InputError(
                "MODEL.REGION_GCN.LCM must be individual or image_dependent, not "
                f"{cfg.MODEL.REGION_GCN.LCM!r}"
            )
        if global_weight < 1 and not individual and label_graph is None:
            raise InputError(
                f"MODEL.REGION_GCN.LCM: {cfg.MODEL.LABEL_HEAD.NAME} has no label graph; individual "
                "needs none"
            )
        image_dependent = cfg.MODEL.LABEL_GRAPH.IMAGE_DEPENDENT and label_graph is not None
        # A trained RPN's losses are of use to the backbone all the same.
        rpn_learns = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN" and not cfg.MODEL.RPN.FROZEN
        if global_weight == 1 and not image_dependent and not rpn_learns:
            raise InputError(
                "MODEL.FUSION.GLOBAL_WEIGHT is 1, the label head gets no image-dependent graph "
                "(MODEL.LABEL_GRAPH.IMAGE_DEPENDENT, MODEL.LABEL_HEAD.NAME), and no RPN is "
                "trained: the regions are of no use; MODEL.META_ARCHITECTURE MultiLabelRecognizer "
                "does without them"
            )
        if global_weight == 0:
            ret["label_head"] = None
        shape = ret["backbone"].output_shape()
        return {
            **ret,
            "proposal_generator": build_proposal_generator(cfg, shape),
            "freeze_proposals": cfg.MODEL.RPN.FROZEN,
            "roi_heads": build_roi_heads(cfg, shape),
            "image_dependent": cfg.MODEL.LABEL_GRAPH.IMAGE_DEPENDENT,
            "region_gcn": RegionGCN(cfg) if global_weight < 1 else None,
            "individual_regions": individual,
            "global_weight": global_weight,
            # Without a label head, its graph is the model's own.
            "label_graph": label_graph if global_weight == 0 and not individual else None,
        }

    def forward(
        self, batched_inputs: List[Dict]
    ) -> Union[Dict[str, torch.Tensor], List[Dict[str, torch.Tensor]]]:
        """
        Args:
            batched_inputs: as `MultiLabelRecognizer` takes them, and with
                instances: detectron2's Instances with gt_boxes, in training an RPN;
                proposals: Instances with proposal_boxes, best first by objectness_logits, where
                    there is no RPN.
        Returns:
            in training the losses: loss_multi_label, those of the ROI heads and of the RPN;
            else one dict per image of
                scores: (C,) probabilities of ŷ_f;
                logits: (C,) ŷ_f, the mean of those of all draws of z;
                logits_global, logits_region: (C,) ŷ_w and ŷ_r, of the branches there are;
                presence: (C,) a;
                regions: Instances with proposal_boxes (n, 4) in pixels of the model's input,
                    objectness_logits (n,), weights (n,) z and scores (n, C) A_I^w.
        """
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        x = self.global_feature(features, images)
        proposals, losses = self.propose_regions(images, features, batched_inputs)
        targets = self.targets(batched_inputs) if self.training else None
        draws, region_losses = self.roi_heads(images, features, proposals, targets)
        branches = self.mean_branch_logits(x, draws)
        logits = self.fuse(branches)
        if self.training:
            loss = self.loss(logits, targets)
            return {"loss_multi_label": loss, **region_losses, **losses}
        return self.describe(logits, branches, draws, proposals)

    def propose_regions(
        self, images: ImageList, features: Dict[str, torch.Tensor], batched_inputs: List[Dict]
    ) -> Tuple[List[Instances], Dict[str, torch.Tensor]]:
        """Each image's proposals, best first, and the RPN's losses where it is trained."""
        if self.proposal_generator is None:
            if not all("proposals" in x for x in batched_inputs):
                raise InputError(
                    "MODEL.PROPOSAL_GENERATOR.NAME is PrecomputedProposals, and an image has none: "
                    "MODEL.LOAD_PROPOSALS must be True"
                )
            return [x["proposals"].to(self.device) for x in batched_inputs], {}
        boxes = None
        if self.proposal_generator.training:
            if not all("instances" in x for x in batched_inputs):
                raise InputError(
                    "to train the RPN takes boxes: set INPUT.WITH_BOXES, or MODEL.RPN.FROZEN and "
                    "MODEL.WEIGHTS with a trained RPN"
                )
            boxes = [x["instances"].to(self.device) for x in batched_inputs]
        return self.proposal_generator(images, features, boxes)

    def mean_branch_logits(self, x: torch.Tensor, draws: List[Regions]) -> Dict[str, torch.Tensor]:
        """`branch_logits`, on average over the draws of z."""
        logits = [self.branch_logits(x, regions) for regions in draws]
        return {name: torch.stack([draw[name] for draw in logits]).mean(0) for name in logits[0]}

    def branch_logits(self, x: torch.Tensor, regions: Regions) -> Dict[str, torch.Tensor]:
        """logits_global ŷ_w (Eq. 6) and logits_region ŷ_r (Eq. 10), (B, C) each."""
        logits = {}
        if self.label_head is not None:
            presence = (regions.presence,) if self.image_dependent else ()
            logits["logits_global"] = self.label_head(x, *presence)
        if self.region_gcn is not None:
            logits["logits_region"] = self.region_gcn(regions, self.region_lcm(regions))
        return logits

    def region_lcm(self, regions: Regions) -> torch.Tensor:
        """What the region GCN fuses with a aᵀ: A_S (C, C), or ones for A_I = a aᵀ alone."""
        if self.individual_regions:
            num_labels = regions.presence.shape[1]
            return regions.presence.new_ones(1, 1).expand(num_labels, num_labels)
        label_graph = self.label_graph or self.label_head.label_graph
        label_graph.check_filled()
        return label_graph.lcm

    def fuse(self, logits: Dict[str, torch.Tensor]) -> torch.Tensor:
        """ŷ_f = λ ŷ_w + (1 - λ) ŷ_r (Eq. 11); a branch that is not there has no weight."""
        weights = {"logits_global": self.global_weight, "logits_region": 1 - self.global_weight}
        return sum(weights[name] * value for name, value in logits.items())

    def describe(self, logits, branches, draws, proposals) -> List[Dict]:
        """The dicts that `forward` returns in evaluation."""
        presence, weights, scores = (
            torch.stack([getattr(regions, name) for regions in draws]).mean(dim=0)
            for name in ("presence", "weights", "scores")
        )
        # Of all at once, as elsewhere: a row alone may be rounded otherwise.
        probabilities = logits.sigmoid()
        results = []
        for i, image_proposals in enumerate(proposals):
            regions = image_proposals[: weights.shape[1]]
            regions.weights = weights[i, : len(regions)]
            regions.scores = scores[i, : len(regions)]
            results.append(
                {
                    "scores": probabilities[i],
                    "logits": logits[i],
                    "presence": presence[i],
                    "regions": regions,
                    **{name: value[i] for name, value in branches.items()},
                }
            )
        return results

    def train(self, mode: bool = True):
        super().train(mode)
        # In training mode detectron2's RPN asks for boxes.
        if self.freeze_proposals and self.proposal_generator is not None:
            self.proposal_generator.eval()
        return self
