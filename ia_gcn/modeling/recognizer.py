"""The recogniser: which of C labels are in an image.

B, C and D are the numbers of images, labels and feature channels.
"""

from __future__ import annotations

from typing import Dict, FrozenSet, List, Sequence, Tuple, Union

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import nn

from ..errors import InputError
from .features import ImageFeatures
from .label_graph import LabelGraph
from .label_heads import LabelHead, build_label_head
from .label_prior import LabelPrior, build_label_prior
from .losses import NOT_COUNTED, MultiLabelCriterion
from .pooling import valid_cells


@META_ARCH_REGISTRY.register()
class MultiLabelRecognizer(nn.Module):
    """Backbone → feature maps → label head → one logit per label → criterion, or scores.

    With a label prior, the logits are those of the head and the prior together.

    Attributes:
        label_graph: a `LabelGraph`, or None where no head asks for one.
        label_prior: a `LabelPrior`, or None.
        has_regions: whether there is a region branch.
        network: names of the modules that compute the features, before the heads.
    """

    has_regions = False
    network: Tuple[str, ...] = ("backbone",)

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        label_head: LabelHead | None,
        label_graph: LabelGraph | None,
        criterion: nn.Module,
        num_labels: int,
        context: FrozenSet[str] = frozenset(),
        label_prior: LabelPrior | None = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """
        Args:
            backbone: a detectron2 Backbone.
            label_head: see `LabelHead`; None if only the region branch scores the labels.
            label_graph: see `LabelGraph`; None if no head asks for it.
            criterion: a `MultiLabelCriterion`.
            num_labels: C.
            context: names of the head's further inputs, see `LabelHead`.
            label_prior: see `LabelPrior`; None: the head's logits are the model's.
            pixel_mean, pixel_std: of each channel, in INPUT.FORMAT's order and the image's units.
        """
        super().__init__()
        self.backbone = backbone
        self.label_head = label_head
        self.label_graph = label_graph
        self.criterion = criterion
        self.num_labels = num_labels
        self.context = context
        self.label_prior = label_prior
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg):
        backbone = build_backbone(cfg)
        head = build_label_head(cfg, backbone.output_shape())
        context = cls.available_context(cfg)
        _check_needs(cfg, head.needs - context)
        context &= head.uses | head.needs
        has_prior = bool(cfg.MODEL.LABEL_PRIOR.NAME)
        if cfg.INPUT.KNOWN_LABELS and "label_states" not in context and not has_prior:
            raise InputError(
                f"INPUT.KNOWN_LABELS is {cfg.INPUT.KNOWN_LABELS}, and MODEL.LABEL_HEAD.NAME "
                f"{cfg.MODEL.LABEL_HEAD.NAME} makes no use of labels that are known: set it to 0"
            )
        return {
            "backbone": backbone,
            "label_head": head,
            "label_graph": build_label_graph(cfg, context),
            "criterion": MultiLabelCriterion(cfg),
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "context": context,
            "label_prior": build_label_prior(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @classmethod
    def available_context(cls, cfg: CfgNode) -> FrozenSet[str]:
        """The context that the recogniser of a config can give to a head, see `LabelHead`."""
        return frozenset({"label_embeddings", "label_graph", "label_states", "targets"})

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def in_features(self) -> Tuple[str, ...]:
        """Names of the feature maps that the label head reads."""
        return () if self.label_head is None else self.label_head.in_features

    @property
    def has_unused_parameters(self) -> bool:
        """Whether some parameters may get no gradient in a training step."""
        shapes = self.backbone.output_shape()
        deepest = max(shapes[name].stride for name in self.in_features)
        return any(shape.stride > deepest for shape in shapes.values())

    @property
    def needs_proposals(self) -> bool:
        """Whether an image must come with its regions."""
        return False

    @property
    def has_image_dependent_graph(self) -> bool:
        """Whether the label graph is fused with what each image's regions find, A_F."""
        return False

    @property
    def has_attention(self) -> bool:
        """Whether it says what each label looked at."""
        return self.label_head is not None and self.label_head.has_attention

    @property
    def takes_known_labels(self) -> bool:
        """Whether the label_states of an image have an effect on its scores."""
        return "label_states" in self.context or self.label_prior is not None

    @property
    def parts_to_load(self) -> Tuple[str, ...]:
        """Modules whose weights must be loaded before a training starts."""
        return ()

    def forward(
        self, batched_inputs: List[Dict]
    ) -> Union[Dict[str, torch.Tensor], List[Dict[str, torch.Tensor]]]:
        """
        Args:
            batched_inputs: one dict per image, as `MultiLabelDatasetMapper` makes them:
                image: (3, H, W), uint8 or float, sizes may differ;
                labels: (C,) float in {1, 0, -1 = unknown}; in training only;
                image_index: its place in the training set, for losses that need it;
                label_states: optional, (C,) in {1, 0, -1 = unknown}, for heads that use them; in
                    training, what such a head is told does not count in the losses.
        Returns:
            in training the losses of the criterion, loss_multi_label first; else one dict per
            image of
                scores: (C,) probabilities;
                logits: (C,);
                attention: (C, H, W), of heads that have it.
        """
        features, losses = self.extract_features(batched_inputs)
        if not self.training:
            outputs, _ = self.apply_heads(features)
            return self.describe(outputs, features)
        targets = ignore_known(self.targets(batched_inputs), features.label_states)
        outputs, head_losses = self.apply_heads(features, targets)
        images = None
        if "images" in self.criterion.needs:
            images = torch.tensor([x["image_index"] for x in batched_inputs])
        return {**self.criterion(outputs, targets, images), **head_losses, **losses}

    def extract_features(
        self, batched_inputs: List[Dict], in_features: Sequence[str] | None = None
    ) -> Tuple[ImageFeatures, Dict[str, torch.Tensor]]:
        """The features of the images; and losses of the modules that compute them.

        Args:
            batched_inputs: of `forward`.
            in_features: names of feature maps, if they are not those of the label head.
        """
        images = self.preprocess_image(batched_inputs)
        maps = self.backbone(images.tensor)
        return self.collect_features(maps, images.image_sizes, batched_inputs, in_features), {}

    def collect_features(
        self,
        maps: Dict[str, torch.Tensor],
        image_sizes,
        batched_inputs: Sequence[Dict] = (),
        in_features: Sequence[str] | None = None,
    ) -> ImageFeatures:
        """The feature maps that the label head reads, with their masks and the known labels.

        Args:
            maps: the backbone's.
            image_sizes: B pairs (height, width) in pixels, before padding.
            batched_inputs: of `forward`; without them, no label is known.
            in_features: see `extract_features`.
        """
        shapes = self.backbone.output_shape()
        names = self.in_features if in_features is None else in_features
        maps = {name: maps[name] for name in names}
        masks = {
            name: valid_cells(features, image_sizes, shapes[name].stride)
            for name, features in maps.items()
        }
        states = None
        if self.takes_known_labels and any("label_states" in x for x in batched_inputs):
            unknown = torch.full((self.num_labels,), -1.0)
            states = [torch.as_tensor(x.get("label_states", unknown)) for x in batched_inputs]
            states = torch.stack(states).to(self.device)
        return ImageFeatures(maps, masks, states)

    def apply_heads(
        self, features: ImageFeatures, targets: torch.Tensor | None = None
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """From features to outputs, the same for training, evaluation and export.

        Args:
            features: of B images.
            targets: (B, C) in {1, 0, -1 = ignored}; in training only.
        Returns:
            the outputs, see `LabelHead`, with the label prior's logits if there is one; and losses
            beside those of the criterion.
        """
        outputs, losses = self.score_features(features, targets)
        if self.label_prior is not None:
            logits = self.label_prior(outputs["logits"], features.label_states)
            outputs = {**outputs, "logits": logits}
        return outputs, losses

    def score_features(
        self, features: ImageFeatures, targets: torch.Tensor | None = None
    ) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
        """`apply_heads` without the label prior."""
        return self.apply_label_head(features, targets), {}

    def apply_label_head(
        self,
        features: ImageFeatures,
        targets: torch.Tensor | None = None,
        presence: torch.Tensor | None = None,
    ) -> Dict[str, torch.Tensor]:
        """The label head's outputs, with its context; targets and presence are (B, C)."""
        context = {}
        if "label_graph" in self.context:
            context["label_graph"] = self.label_graph
        if "label_embeddings" in self.context:
            context["label_embeddings"] = self.label_graph.embeddings
        if "label_states" in self.context:
            states = features.label_states
            if states is None:
                (any_map, *_) = features.maps.values()
                states = any_map.new_full((any_map.shape[0], self.num_labels), -1)
            context["label_states"] = states
        if "presence" in self.context:
            context["presence"] = presence
        if "targets" in self.context:
            context["targets"] = targets
        return self.label_head(features.maps, features.masks, **context)

    def describe(
        self, outputs: Dict[str, torch.Tensor], features: ImageFeatures
    ) -> List[Dict[str, torch.Tensor]]:
        """The dicts that `forward` returns in evaluation."""
        # Of the whole batch: a single row may be rounded differently.
        described = {"scores": outputs["logits"].sigmoid()}
        for name in ("logits", "attention"):
            if name in outputs:
                described[name] = outputs[name]
        return [dict(zip(described, values)) for values in zip(*described.values())]

    def fix_classifiers(self) -> None:
        """Compute what is the same for every image once, for a model that is only evaluated."""
        if self.label_head is not None and "presence" not in self.context:
            self.label_head.fix_classifiers(self.label_graph)

    def targets(self, batched_inputs: List[Dict]) -> torch.Tensor:
        """(B, C) in {1, 0, -1 = ignored}."""
        return torch.stack([x["labels"] for x in batched_inputs]).to(self.device)

    def preprocess_image(self, batched_inputs: List[Dict]) -> ImageList:
        """Normalise each image and pad them, with the mean's colour, to one batch."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)


def ignore_known(targets: torch.Tensor, label_states: torch.Tensor | None) -> torch.Tensor:
    """Targets (B, C) that don't count where label_states (B, C) say that the label head knows them.

    Such a label is not unknown: a loss must not take it as absent.
    """
    return targets if label_states is None else targets.masked_fill(label_states >= 0, NOT_COUNTED)


def build_label_graph(cfg: CfgNode, context: FrozenSet[str]) -> LabelGraph | None:
    """The label graph for heads that ask for `context`; None if they ask for nothing of it."""
    if not context & {"label_embeddings", "label_graph"}:
        return None
    return LabelGraph(
        cfg.MODEL.LABEL_HEAD.NUM_LABELS,
        cfg.MODEL.LABEL_EMBEDDINGS.DIM,
        cfg.MODEL.LABEL_GRAPH.THRESHOLD,
        cfg.MODEL.LABEL_GRAPH.REWEIGHT,
        statistics="label_graph" in context,
    )


def _check_needs(cfg: CfgNode, missing: FrozenSet[str]) -> None:
    if missing:
        hint = ""
        if "presence" in missing:
            hint = (
                "; MODEL.META_ARCHITECTURE InstanceAwareRecognizer with "
                "MODEL.LABEL_GRAPH.IMAGE_DEPENDENT True has presence"
            )
        raise InputError(
            f"MODEL.LABEL_HEAD.NAME: {cfg.MODEL.LABEL_HEAD.NAME} needs "
            f"{', '.join(sorted(missing))}, which MODEL.META_ARCHITECTURE "
            f"{cfg.MODEL.META_ARCHITECTURE} does not have here{hint}"
        )
