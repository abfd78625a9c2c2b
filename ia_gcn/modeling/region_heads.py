"""The region branch of IA-GCN: regions, their variational weights, rough scores, and their GCN.

B, N, C and D are the numbers of images, regions, labels and feature channels.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from ..errors import InputError
from .graph_conv import GraphConv, graph_layers
from .label_graph import graph_scale, propagate
from .losses import multi_label_bce
from .pooling import MeanROIPooler


class Regions(NamedTuple):
    """Regions of a batch with their scores of the labels, for one draw of their weights.

    An image with fewer than N regions has them first, and zeros where there are none.
    """

    valid: torch.Tensor
    """(B, N) bool, true for a region that is there."""
    weights: torch.Tensor
    """z, (B, N)."""
    scores: torch.Tensor
    """A_I^w, (B, N, C) in [0, 1]: of each weighted region and label."""
    presence: torch.Tensor
    """a, (B, C) in [0, 1]: the highest score of any region; 1 for an image without regions, whose
    LCM is then the statistical one."""


def gaussian_kl(
    mean: torch.Tensor, log_variance: torch.Tensor, prior_mean: float = 0.0
) -> torch.Tensor:
    """KL(N(µ, σ²) ‖ N(µ₀, 1)) = ½ ((µ - µ₀)² + σ² - 1 - log σ²), elementwise (Eq. 14)."""
    return 0.5 * ((mean - prior_mean) ** 2 + log_variance.exp() - 1 - log_variance)


@ROI_HEADS_REGISTRY.register()
class VariationalROIHeads(nn.Module):
    """Features of regions, weighted by what variational inference learns (Eq. 2-3, 7-9, 14).

    A region's weight is z ~ N(zµ, σ²) with zµ = µ₀ + X wµ and log σ² = X wσ, where µ₀ is the
    prior's mean, 0 in the paper: in training z = zµ + σ ε; in evaluation z = zµ, or each of a
    number of draws that are the same for every image. The weighted features X_w = z ⊙ X get their
    rough scores A_I^w = sigmoid(f(X_w)), f a 1×1 convolution, that is a linear layer.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        pooler: nn.Module,
        res5: nn.Module | None = None,
        feature_dim: int,
        num_regions: int,
        num_labels: int,
        variational: bool,
        prior_mean: float = 0.0,
        kl_weight: float = 1.0,
        rough_score_weight: float = 0.0,
        eval_samples: int = 0,
    ):
        """
        Args:
            in_features: names of the feature maps that regions are pooled from.
            pooler: detectron2's ROIPooler.
            res5: a stage of a ResNet, from pooled regions (M, ., h, w) to (M, D, h', w'), which a
                recogniser may also set later; None: they stay as they are. X is their mean over
                height and width.
            feature_dim: D.
            num_regions: N; of more proposals, those of the highest objectness.
            num_labels: C.
            variational: False for z = 1 (the rows without Var_Inf).
            prior_mean: µ₀.
            kl_weight, rough_score_weight: of the losses.
            eval_samples: draws of z in evaluation; 0 for z = zµ.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.pooler = pooler
        self.res5 = res5
        self.num_regions = num_regions
        self.variational = variational
        self.prior_mean = prior_mean
        self.kl_weight = kl_weight
        self.rough_score_weight = rough_score_weight
        if variational:
            self.weight_mean = nn.Linear(feature_dim, 1, bias=False)
            self.weight_log_variance = nn.Linear(feature_dim, 1, bias=False)
            noise = torch.Generator().manual_seed(0)
            noise = torch.randn(eval_samples, num_regions, generator=noise)
            self.register_buffer("eval_noise", noise, persistent=False)
        self.rough_classifier = nn.Linear(feature_dim, num_labels)

    @classmethod
    def from_config(cls, cfg, input_shape: Dict[str, ShapeSpec]):
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        shapes = [input_shape[name] for name in in_features]
        box_head = cfg.MODEL.ROI_BOX_HEAD
        # Without a res5 stage of their own, of the regions only means are needed.
        means_will_do = (
            not cfg.MODEL.REGION_BRANCH.RES5
            and len(shapes) == 1
            and box_head.POOLER_TYPE == "ROIAlignV2"
            and box_head.POOLER_SAMPLING_RATIO > 0
        )
        pooler = (MeanROIPooler if means_will_do else ROIPooler)(
            output_size=box_head.POOLER_RESOLUTION,
            scales=[1 / shape.stride for shape in shapes],
            sampling_ratio=box_head.POOLER_SAMPLING_RATIO,
            pooler_type=box_head.POOLER_TYPE,
        )
        feature_dim = shapes[0].channels
        if cfg.MODEL.REGION_BRANCH.RES5:
            if list(in_features) != ["res4"] or "res5" not in input_shape:
                raise InputError(
                    "MODEL.REGION_BRANCH.RES5 takes MODEL.ROI_HEADS.IN_FEATURES [res4] and a "
                    f"backbone with res5, not {list(in_features)} and {', '.join(input_shape)}"
                )
            feature_dim = input_shape["res5"].channels
        return {
            "in_features": in_features,
            "pooler": pooler,
            "feature_dim": feature_dim,
            "num_regions": cfg.MODEL.REGION_BRANCH.NUM_REGIONS,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "variational": cfg.MODEL.REGION_BRANCH.VARIATIONAL,
            "prior_mean": cfg.MODEL.REGION_BRANCH.PRIOR_MEAN,
            "kl_weight": cfg.MODEL.LOSS.KL_WEIGHT,
            "rough_score_weight": cfg.MODEL.LOSS.ROUGH_SCORE_WEIGHT,
            "eval_samples": cfg.MODEL.REGION_BRANCH.EVAL_SAMPLES,
        }

    def forward(
        self,
        images: ImageList,
        features: Dict[str, torch.Tensor],
        proposals: List[Instances],
        targets: torch.Tensor | None = None,
    ) -> Tuple[List[Regions], Dict[str, torch.Tensor]]:
        """
        Args:
            images: not used; detectron2's ROI heads get them.
            features: of each name in `in_features`, (B, ., H, W).
            proposals: one Instances per image, proposal_boxes sorted by objectness. Those after
                the first N are left alone.
            targets: (B, C) in {1, 0, -1 = ignored}; in training only.
        Returns:
            one Regions per draw of z: one in training and with z = zµ; and in training the losses:
                loss_kl: mean KL of an image's regions, mean over images, times its weight;
                loss_rough_scores: BCE of a, times its weight, where that is not 0.
        """
        return self.weigh_regions(*self.region_features(features, proposals), targets)

    def weigh_regions(
        self, x: torch.Tensor, valid: torch.Tensor, targets: torch.Tensor | None = None
    ) -> Tuple[List[Regions], Dict[str, torch.Tensor]]:
        """What `forward` returns, of X (B, N, D) and (B, N) bool, as `region_features` has them."""
        if not self.variational:
            draws, losses = [valid.to(x.dtype)], {}
        else:
            mean, log_variance = self.weight_distribution(x)
            draws = [z.masked_fill(~valid, 0) for z in self.draw_weights(mean, log_variance)]
            losses = self.kl_loss(mean, log_variance, valid) if self.training else {}
        if self.training:
            regions, presence_logits = self.score(x, valid, draws[0])
            get_event_storage().put_scalar("regions/mean_presence", regions.presence.mean().item())
            if self.rough_score_weight:
                targets = targets.where(valid.any(dim=1, keepdim=True), -1)
                loss = multi_label_bce(presence_logits, targets)
                losses["loss_rough_scores"] = self.rough_score_weight * loss
            return [regions], losses
        return [self.score(x, valid, z)[0] for z in draws], losses

    def region_features(
        self, features: Dict[str, torch.Tensor], proposals: List[Instances]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """X (B, N, D), 0 where there is no region, and which regions are there, (B, N) bool."""
        boxes = [p.proposal_boxes[: self.num_regions] for p in proposals]
        pooled = self.pooler([features[name] for name in self.in_features], boxes)
        counts = torch.tensor([len(b) for b in boxes], device=pooled.device)
        valid = torch.arange(self.num_regions, device=pooled.device) < counts[:, None]
        x = pooled.new_zeros(*valid.shape, self.rough_classifier.in_features)
        if self.res5 is not None:
            pooled = self.res5(pooled)
        return x.index_put((valid,), pooled.mean(dim=(2, 3)).to(x.dtype)), valid

    def weight_distribution(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """zµ and log σ², (B, N) float32 or better, of X (B, N, D) (Eq. 8-9).

        X wσ is read as log σ²: a linear form can be negative, a variance can't.
        """
        mean, log_variance = self.weight_mean(x), self.weight_log_variance(x)
        dtype = torch.promote_types(mean.dtype, torch.float32)
        return self.prior_mean + mean[..., 0].to(dtype), log_variance[..., 0].to(dtype)

    def draw_weights(self, mean: torch.Tensor, log_variance: torch.Tensor) -> List[torch.Tensor]:
        """z (B, N) of each draw: one at random in training, else as the class says."""
        deviation = (0.5 * log_variance).exp()
        if self.training:
            return [mean + deviation * torch.randn_like(mean)]
        if not len(self.eval_noise):
            return [mean]
        return [mean + deviation * noise for noise in self.eval_noise]

    def kl_loss(self, mean, log_variance, valid) -> Dict[str, torch.Tensor]:
        """loss_kl (Eq. 14); |µ|, σ and the KL go to the EventStorage."""
        kl = masked_mean(gaussian_kl(mean, log_variance, self.prior_mean), valid).mean()
        storage = get_event_storage()
        with torch.no_grad():
            deviation = (0.5 * log_variance).exp()
            storage.put_scalar("regions/mean_abs_mu", masked_mean(mean.abs(), valid).mean().item())
            storage.put_scalar("regions/mean_sigma", masked_mean(deviation, valid).mean().item())
            storage.put_scalar("regions/kl", kl.item())
        return {"loss_kl": self.kl_weight * kl}

    def score(
        self, x: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor
    ) -> Tuple[Regions, torch.Tensor]:
        """The Regions of weights z, and the logits of a, -inf for images without regions."""
        weighted = weights[..., None].to(x.dtype) * x
        logits = self.rough_classifier(weighted)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits.masked_fill(~valid[..., None], -torch.inf)
        has_regions = valid.any(dim=1, keepdim=True)
        presence_logits = logits.amax(dim=1).where(has_regions, 0)
        presence = presence_logits.sigmoid().where(has_regions, 1)
        return Regions(valid, weights, logits.sigmoid(), presence), presence_logits


def masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean over the regions (B, N) of an image that are there: (B,); 0 where there is none."""
    return values.masked_fill(~valid, 0).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


class RegionGCN(nn.Module):
    """ŷ_r: a GCN over the regions' scores of the labels, and a linear layer (Eq. 10).

    Â_F A_I^w W, as printed, multiplies a (C, C) by an (N, C). Two readings make sense of it:

    labels: the nodes are the C labels, each with its scores in the N regions, H⁽⁰⁾ = (A_I^w)ᵀ, on
        the graph Â_F. Column k is the region of the k-th highest objectness. Each label's score is
        read from its own node by its own row of the linear layer.
    regions: the nodes are the N regions, as the paper's prose has it, H⁽⁰⁾ = A_I^w, on the affinity
        R = A_I^w Â_F (A_I^w)ᵀ, normalised. The linear layer scores each region, and the highest
        counts, as in Eq. 3.

    Either has a ReLU after each of its layers, also after the last, which the linear layer follows.
    """

    READINGS = ("labels", "regions")

    @configurable
    def __init__(
        self, *, reading: str, num_labels: int, num_regions: int, hidden_dims: Sequence[int]
    ):
        """
        Args:
            reading: labels or regions.
            num_labels, num_regions: C and N.
            hidden_dims: output dimensions of the graph convolutions, at least one.
        """
        super().__init__()
        if reading not in self.READINGS:
            raise InputError(f"MODEL.REGION_GCN.READING must be labels or regions, not {reading!r}")
        self.reading = reading
        dims = [num_regions if reading == "labels" else num_labels, *hidden_dims]
        self.layers = nn.ModuleList(
            GraphConv(in_dim, out_dim) for in_dim, out_dim in zip(dims, dims[1:])
        )
        self.classifier = nn.Linear(dims[-1], num_labels)

    @classmethod
    def from_config(cls, cfg):
        return {
            "reading": cfg.MODEL.REGION_GCN.READING,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "num_regions": cfg.MODEL.REGION_BRANCH.NUM_REGIONS,
            "hidden_dims": cfg.MODEL.REGION_GCN.HIDDEN_DIMS,
        }

    def forward(self, regions: Regions, lcm: torch.Tensor) -> torch.Tensor:
        """
        Args:
            regions: of B images.
            lcm: A_S (C, C), to be fused with each image's a aᵀ; all ones for A_I = a aᵀ alone.
        Returns:
            logits, (B, C); the linear layer's bias for an image without regions.
        """
        scale = graph_scale(lcm, regions.presence)
        if self.reading == "labels":
            nodes = self._hidden_nodes(regions.scores.mT, lcm, scale)
            logits = torch.einsum("bcd,cd->bc", nodes, self.classifier.weight)
            return logits + self.classifier.bias
        affinity = region_affinity(regions.scores, lcm, scale)
        nodes = self._hidden_nodes(regions.scores, affinity, graph_scale(affinity))
        logits = self.classifier(nodes).masked_fill(~regions.valid[..., None], -torch.inf)
        has_regions = regions.valid.any(dim=1, keepdim=True)
        return logits.amax(dim=1).where(has_regions, self.classifier.bias)

    def _hidden_nodes(self, nodes, lcm, scale):
        nodes, _ = graph_layers(self.layers, nodes, lcm, scale)
        return scale[..., None] * nodes


def region_affinity(scores: torch.Tensor, lcm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """R = A_I^w Â_F (A_I^w)ᵀ with Â_F = diag(s) Aᵀ diag(s): the affinity of regions.

    Args:
        scores: A_I^w, (B, N, C).
        lcm, scale: A (C, C) and s (B, C).
    Returns:
        (B, N, N).
    """
    return scores @ propagate(scores.mT, lcm, scale)
