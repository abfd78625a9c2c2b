"""What the tests of several losses draw from and compare with."""

import math

import numpy as np
import torch
from detectron2.config import get_cfg
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ia_gcn import add_ia_gcn_config
from ia_gcn.modeling import build_multi_label_loss

quick = settings(max_examples=60)
HALVES_AND_SINGLE = [torch.float16, torch.bfloat16, torch.float32]
EXTREMES = [0, 1e-3, 1, 3, 10, 17, 20, 50, 88, 95, 103, 110, 1e3, 1e4]


@st.composite
def batches(draw, values=(1, 0, -1, -2), max_images=5, max_labels=5):
    """Logits, and targets of some values, (B, C) in float64."""
    shape = draw(st.tuples(st.integers(1, max_images), st.integers(1, max_labels)))
    # Where the logarithm of a sigmoid can be taken as it is written.
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-8, 8)))
    targets = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from(values)))
    return torch.from_numpy(logits), torch.from_numpy(targets)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def sum_over_entries(cost, logits, targets):
    """cost(logit, target, place of the label), added up one entry at a time."""
    return sum(
        cost(x, y, c)
        for row, labels in zip(logits.tolist(), targets.tolist())
        for c, (x, y) in enumerate(zip(row, labels))
    )


def loss_from_config(name, num_labels=3, **keys):
    """The loss of a config with this MODEL.LOSS.NAME; `__` in a key stands for a dot."""
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.LOSS.NAME, cfg.MODEL.LABEL_HEAD.NUM_LABELS = name, num_labels
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.LOSS.{key.replace('__', '.')}", value])
    return build_multi_label_loss(cfg)
