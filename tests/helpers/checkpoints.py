"""Checkpoints of models with random weights, and what evaluation says of them."""

import os
import re

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


@torch.no_grad()
def randomize(network, seed=0):
    """Norms, their statistics and biases that are not the defaults."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.0, generator=generator)
    return network.eval()


def original_layout(state):
    """timm's TResNet as its authors' code has it, with inplace-ABN; its head is the same.

    A block that halves the image blurs behind its 3×3, which then lies a level deeper.
    """
    generator = torch.Generator().manual_seed(0)
    original = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("bn.weight"):
            sign = torch.randint(2, tensor.shape, generator=generator) * 2 - 1
            tensor = (tensor - 1e-5) * sign
        deeper = re.match(r"body\.(layer2\.0\.conv1|layer[34]\.0\.conv2)\.", name)
        name = name.replace(".conv.", ".0.0." if deeper else ".0.")
        name = name.replace(".bn.", ".0.1." if deeper else ".1.")
        original[name] = tensor
    original["body.layer2.0.conv1.1.op.filt"] = torch.ones(128, 1, 3, 3) / 9
    return original
