"""A label head and data sets of a user's own, as --import takes them.

The head reads two feature maps, has auxiliary logits and makes use of labels that are known and of
label embeddings.
"""

import os

import torch
from detectron2.config import configurable
from torch import nn

from ia_gcn.data.datasets.coco import load_multilabel_coco
from ia_gcn.data.datasets.common import register_multilabel
from ia_gcn.modeling import LABEL_HEAD_REGISTRY, LabelHead, head_in_features, masked_mean


@LABEL_HEAD_REGISTRY.register()
class TwoMapHead(LabelHead):
    uses = frozenset({"label_states"})
    needs = frozenset({"label_embeddings"})

    @configurable
    def __init__(self, *, channels, num_labels, embedding_dim):
        super().__init__()
        self.in_features = tuple(channels)
        self.classifiers = nn.ModuleDict(
            {name: nn.Linear(dim, num_labels) for name, dim in channels.items()}
        )
        self.of_embeddings = nn.Linear(embedding_dim, 1)
        # Of labels that are unknown, absent and present.
        self.known = nn.Embedding(3, 1)

    @classmethod
    def from_config(cls, cfg, input_shape):
        names = head_in_features(cfg, input_shape)
        return {
            "channels": {name: input_shape[name].channels for name in names},
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "embedding_dim": cfg.MODEL.LABEL_EMBEDDINGS.DIM,
        }

    def forward(self, features, masks, *, label_states, label_embeddings):
        aux_logits = {
            name: classifier(masked_mean(features[name], masks[name]))
            for name, classifier in self.classifiers.items()
        }
        logits = sum(aux_logits.values()) + self.of_embeddings(label_embeddings)[:, 0]
        logits = logits + self.known((label_states + 1).long())[..., 0]
        return {"logits": logits, "aux_logits": aux_logits}


def load_with_states(json_file, image_root, label_names):
    """Of every second image, the first label is known."""
    dicts = load_multilabel_coco(json_file, image_root, label_names)
    for record in dicts[::2]:
        states = torch.full((len(label_names),), -1.0)
        states[0] = float(0 in record["labels"])
        record["label_states"] = states.tolist()
    return dicts


if "MY_DATA" in os.environ:
    json_file, image_root = os.environ["MY_DATA"].split(os.pathsep)
    names = ["red", "green", "blue"]
    register_multilabel("my_images", lambda: load_with_states(json_file, image_root, names), names)
