"""Recognisers without regions: their config, inputs and logits."""

import torch
from detectron2.config import get_cfg

from ia_gcn import add_ia_gcn_config

NUM_LABELS = 5


def make_cfg(backbone, pooling="max", head="LinearHead"):
    """Of a small model; the head is one of the registry, or KGGR."""
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "MultiLabelRecognizer"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.GLOBAL_POOLING.NAME = pooling
    cfg.MODEL.LABEL_HEAD.NAME = "SSGRLHead" if head == "KGGR" else head
    cfg.MODEL.SSGRL.CLASSIFIER_GRAPH = head == "KGGR"
    if head in ("SRNHead", "TDRGHead"):
        cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = NUM_LABELS
    for keys in (cfg.MODEL.ML_DECODER, cfg.MODEL.QUERY2LABEL, cfg.MODEL.TDRG):
        keys.DIM, keys.FFN_DIM = 16, 24
    for keys in (cfg.MODEL.SALGL, cfg.MODEL.SRN, cfg.MODEL.SSGRL):
        keys.HIDDEN_DIM = 16
    cfg.MODEL.SALGL.FFN_DIM = cfg.MODEL.SSGRL.OUTPUT_DIM = 24
    cfg.MODEL.SRN.GRID_SIZE = 3
    return cfg


def make_inputs(sizes, labels=False, seed=0):
    """One dict per image; every image has a colour of its own."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for height, width in sizes:
        colour = torch.randint(0, 200, (3, 1, 1), generator=generator)
        noise = torch.randint(0, 56, (3, height, width), generator=generator)
        inputs.append({"image": (colour + noise).to(torch.uint8)})
        if labels:
            inputs[-1]["labels"] = torch.randint(-1, 2, (NUM_LABELS,), generator=generator).float()
    return inputs


@torch.no_grad()
def logits_of(model, inputs):
    return torch.stack([output["logits"] for output in model.eval()(inputs)])
