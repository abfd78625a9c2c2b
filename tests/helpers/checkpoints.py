"""Checkpoints of models with random weights, and what evaluation says of them."""

import os

import numpy as np
import torch

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.data import get_multilabel_dicts
from ia_gcn.engine import Trainer, fill_label_graph

COLOURS = ["red", "green", "blue"]


def save_checkpoint(make_cfg, *opts, config="ml_gcn", saved=()):
    """Save a model at random: (path of its checkpoint, its config, itself).

    `saved` are keys and values that the checkpoint's config has instead.
    """
    cfg = make_cfg("run", "INPUT.IMAGE_SIZE", (96, 64), *opts, config=config)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    fill_label_graph(cfg, model, get_multilabel_dicts(cfg.DATASETS.TRAIN), COLOURS)
    carried = cfg.clone()
    carried.defrost()
    carried.merge_from_list(list(saved))
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    checkpointer = MultiLabelCheckpointer(
        model, cfg.OUTPUT_DIR, label_names=COLOURS, config=carried.dump()
    )
    checkpointer.save("model")
    return os.path.join(cfg.OUTPUT_DIR, "model.pth"), cfg, model.eval()


def evaluate(cfg, model):
    """The scores of predictions.npz, (14, 3), and the files of their images."""
    Trainer.test(cfg, model)
    path = os.path.join(cfg.OUTPUT_DIR, "inference", "custom_test", "predictions.npz")
    with np.load(path) as predictions:
        folder = cfg.DATASETS.CUSTOM.IMAGE_ROOT
        files = [os.path.join(folder, f"{i:06d}.png") for i in predictions["image_ids"]]
        return predictions["scores"], files


def change(path, **entries):
    """Overwrite entries of a checkpoint; None takes one out."""
    content = torch.load(path, weights_only=True)
    content.update(entries)
    torch.save({key: value for key, value in content.items() if value is not None}, path)
