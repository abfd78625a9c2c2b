"""IA-GCN: the recogniser with regions and a label graph for every image.

B, C, N and K are the numbers of images, labels, regions and of channels of a region's feature.
"""

from __future__ import annotations

import copy
from typing import Dict, FrozenSet, List, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.structures import ImageList, Instances
from torch import nn

from ..errors import InputError
from .features import ImageFeatures
from .recognizer import MultiLabelRecognizer, build_label_graph
from .region_heads import RegionGCN, Regions


@META_ARCH_REGISTRY.register()
class InstanceAwareRecognizer(MultiLabelRecognizer):
    """IA-GCN: a global branch and a region branch, with a label graph built for every image.

    Regions of a proposal generator → their weighted features' rough scores (VariationalROIHeads)
    → presence a, and with it the image-dependent label graph, on which the label head scores the
    whole image (ŷ_w) and the region GCN the regions' scores (ŷ_r); ŷ_f = λ ŷ_w + (1 - λ) ŷ_r.
    """

    has_regions = True
    network = ("backbone", "proposal_generator")
    has_unused_parameters = True  # where no image of a process has a region

    @configurable
    def __init__(
        self,
        *,
        proposal_generator: nn.Module | None,
        freeze_proposals: bool,
        roi_heads: nn.Module,
        region_gcn: nn.Module | None,
        individual_regions: bool,
        global_weight: float,
        **kwargs,
    ):
        """
        Args:
            proposal_generator: detectron2's RPN; None: each image comes with its `proposals`.
            freeze_proposals: keep the RPN's weights and ask for no boxes.
            roi_heads: features and proposals to `Regions`, and losses; see VariationalROIHeads.
            region_gcn: `Regions` and a label graph to logits (B, C).
            individual_regions: whether the region GCN gets A_I instead of A_F.
            global_weight: λ in [0, 1]; with 0 there needs to be no label_head, with 1 no
                region_gcn.
            kwargs: those of MultiLabelRecognizer.
        """
        super().__init__(**kwargs)
        self.proposal_generator = proposal_generator
        self.freeze_proposals = freeze_proposals
        if freeze_proposals and proposal_generator is not None:
            proposal_generator.requires_grad_(False).eval()
        self.roi_heads = roi_heads
        self.region_gcn = region_gcn
        self.individual_regions = individual_regions
        self.global_weight = global_weight

    @classmethod
    def from_config(cls, cfg):
        ret = super().from_config(cfg)
        global_weight = cfg.MODEL.FUSION.GLOBAL_WEIGHT
        if not 0 <= global_weight <= 1:
            raise InputError(f"MODEL.FUSION.GLOBAL_WEIGHT must be in [0, 1], not {global_weight}")
        individual = {"individual": True, "image_dependent": False}.get(cfg.MODEL.REGION_GCN.LCM)
        if individual is None:
            raise InputError(
                "MODEL.REGION_GCN.LCM must be individual or image_dependent, not "
                f"{cfg.MODEL.REGION_GCN.LCM!r}"
            )
        # The losses of a trained RPN still train the backbone.
        rpn_learns = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "RPN" and not cfg.MODEL.RPN.FROZEN
        if global_weight == 1 and "presence" not in ret["context"] and not rpn_learns:
            raise InputError(
                "MODEL.FUSION.GLOBAL_WEIGHT is 1, the label head makes no use of the regions "
                "(MODEL.LABEL_GRAPH.IMAGE_DEPENDENT, MODEL.LABEL_HEAD.NAME), and no RPN is "
                "trained: the regions have no effect; use MODEL.META_ARCHITECTURE "
                "MultiLabelRecognizer instead"
            )
        _check_roi_heads(cfg.MODEL.ROI_HEADS.NAME)
        if global_weight == 0:
            ret["label_head"], ret["context"] = None, frozenset()
        fuses_graph = global_weight < 1 and not individual
        graph_users = ret["context"] | ({"label_graph"} if fuses_graph else set())
        shape = ret["backbone"].output_shape()
        proposal_generator = build_proposal_generator(cfg, shape)
        roi_heads = build_roi_heads(cfg, shape)
        if cfg.MODEL.REGION_BRANCH.RES5:
            # It starts as the backbone's own and is trained apart from it.
            roi_heads.res5 = copy.deepcopy(ret["backbone"].res5)
        return {
            **ret,
            "label_graph": build_label_graph(cfg, graph_users),
            "proposal_generator": proposal_generator,
            "freeze_proposals": cfg.MODEL.RPN.FROZEN,
            "roi_heads": roi_heads,
            "region_gcn": RegionGCN(cfg) if global_weight < 1 else None,
            "individual_regions": individual,
            "global_weight": global_weight,
        }

    @classmethod
    def available_context(cls, cfg) -> FrozenSet[str]:
        presence = {"presence"} if cfg.MODEL.LABEL_GRAPH.IMAGE_DEPENDENT else set()
        return super().available_context(cfg) | presence

    @property
    def parts_to_load(self) -> Tuple[str, ...]:
        frozen = self.freeze_proposals and self.proposal_generator is not None
        return ("proposal_generator.",) if frozen else ()

    @property
    def has_image_dependent_graph(self) -> bool:
        """Whether the label graph is fused with a of each image, A_F = A_S ⊙ a aᵀ."""
        in_label_head = {"label_graph", "presence"} <= self.context
        in_region_gcn = self.region_gcn is not None and not self.individual_regions
        return in_label_head or in_region_gcn

    @property
    def needs_proposals(self) -> bool:
        """Whether an image must come with its regions, as there is no RPN."""
        return self.proposal_generator is None

    def forward(self, batched_inputs: List[Dict]):
        """
        Args:
            batched_inputs: as `MultiLabelRecognizer` takes them, and with
                instances: detectron2's Instances with gt_boxes, in training an RPN;
                proposals: Instances with proposal_boxes, best first by objectness_logits, where
                    there is no RPN.
        Returns:
            in training the losses: those of the criterion, of the ROI heads and of the RPN;
            else one dict per image of what `MultiLabelRecognizer` returns, of ŷ_f, and
                logits_global, logits_region: (C,) ŷ_w and ŷ_r, of the branches there are;
                presence: (C,) a;
                regions: Instances with proposal_boxes (n, 4) in pixels of the model's input,
                    objectness_logits (n,), weights (n,) z and scores (n, C) A_I^w.
            All are means over the draws of z.
        """
        return super().forward(batched_inputs)

    def extract_features(
        self, batched_inputs: List[Dict], in_features: Sequence[str] | None = None
    ) -> Tuple[ImageFeatures, Dict[str, torch.Tensor]]:
        """As `MultiLabelRecognizer` does, with regions; the losses are those of a trained RPN."""
        images = self.preprocess_image(batched_inputs)
        maps = self.backbone(images.tensor)
        proposals, losses = self.propose_regions(images, maps, batched_inputs)
        features = self.collect_features(maps, images.image_sizes, batched_inputs, in_features)
        regions, valid = self.roi_heads.region_features(maps, proposals)
        return features._replace(regions=regions, valid=valid, proposals=proposals), losses

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
                    "training the RPN needs boxes: set INPUT.WITH_BOXES, or MODEL.RPN.FROZEN and "
                    "MODEL.WEIGHTS with a trained RPN"
                )
            boxes = [x["instances"].to(self.device) for x in batched_inputs]
        return self.proposal_generator(images, features, boxes)

    def score_features(
        self, features: ImageFeatures, targets: torch.Tensor | None = None
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """As `MultiLabelRecognizer` does; the outputs are means over the draws of z.

        Returns:
            the outputs, and with them logits_global and logits_region (B, C), presence (B, C),
            region_weights (B, N) and region_scores (B, N, C); and the ROI heads' losses.
        """
        num_regions = self.roi_heads.num_regions
        draws, losses = self.roi_heads.weigh_regions(
            features.regions[:, :num_regions], features.valid[:, :num_regions], targets
        )
        outputs = _mean_outputs(
            [self.apply_branches(features, regions, targets) for regions in draws]
        )
        outputs["logits"] = self.fuse(outputs)
        return outputs, losses

    def apply_branches(
        self, features: ImageFeatures, regions: Regions, targets: torch.Tensor | None = None
    ) -> Dict:
        """The outputs of both branches for one draw of z: ŷ_w (Eq. 6) and ŷ_r (Eq. 10), and a."""
        outputs = {}
        if self.label_head is not None:
            outputs = self.apply_label_head(features, targets, regions.presence)
            outputs["logits_global"] = outputs.pop("logits")
        if self.region_gcn is not None:
            outputs["logits_region"] = self.region_gcn(regions, self.region_lcm(regions))
        return {
            **outputs,
            "presence": regions.presence,
            "region_weights": regions.weights,
            "region_scores": regions.scores,
        }

    def region_lcm(self, regions: Regions) -> torch.Tensor:
        """The matrix that the region GCN fuses with a aᵀ: A_S (C, C), or ones for A_I = a aᵀ."""
        if self.individual_regions:
            num_labels = regions.presence.shape[1]
            return regions.presence.new_ones(1, 1).expand(num_labels, num_labels)
        self.label_graph.check_filled()
        return self.label_graph.lcm

    def fuse(self, outputs: Dict[str, torch.Tensor]) -> torch.Tensor:
        """ŷ_f = λ ŷ_w + (1 - λ) ŷ_r (Eq. 11); a branch that is not there has no weight."""
        weights = {"logits_global": self.global_weight, "logits_region": 1 - self.global_weight}
        return sum(weight * outputs[name] for name, weight in weights.items() if name in outputs)

    def describe(self, outputs: Dict, features: ImageFeatures) -> List[Dict]:
        """The dicts that `forward` returns in evaluation."""
        described = super().describe(outputs, features)
        for i, (image, proposals) in enumerate(zip(described, features.proposals)):
            for name in ("logits_global", "logits_region", "presence"):
                if name in outputs:
                    image[name] = outputs[name][i]
            image["regions"] = regions = proposals[: outputs["region_weights"].shape[1]]
            regions.weights = outputs["region_weights"][i, : len(regions)]
            regions.scores = outputs["region_scores"][i, : len(regions)]
        return described

    def train(self, mode: bool = True):
        super().train(mode)
        # In training mode detectron2's RPN asks for boxes.
        if self.freeze_proposals and self.proposal_generator is not None:
            self.proposal_generator.eval()
        return self


def _mean_outputs(draws: List[Dict]) -> Dict:
    """The mean of each tensor over the draws of z, also of those in a dict of outputs."""
    return {
        name: _mean_outputs([draw[name] for draw in draws])
        if isinstance(value, dict)
        else torch.stack([draw[name] for draw in draws]).mean(dim=0)
        for name, value in draws[0].items()
    }


def _check_roi_heads(name: str) -> None:
    roi_heads = ROI_HEADS_REGISTRY.get(name)
    parts = ("region_features", "weigh_regions")
    lacking = [part for part in parts if not hasattr(roi_heads, part)]
    if lacking:
        raise InputError(
            f"MODEL.ROI_HEADS.NAME: {name} has no {' and no '.join(lacking)}, which "
            "InstanceAwareRecognizer needs; VariationalROIHeads has both"
        )
