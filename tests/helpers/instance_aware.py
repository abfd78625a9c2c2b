"""Small recognisers of configs/DigitScenes/ia_gcn.yaml, their options and inputs."""

import itertools

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ia_gcn.engine import setup_cfg
from tests.helpers.commands import ROOT
from tests.helpers.heads import fill

NUM_LABELS, NUM_REGIONS, SIZE = 10, 6, (64, 64)
FROZEN = {"MODEL.RPN.FROZEN": True}
# The rows of the papers' tables beside the whole.
STATISTICAL = {"MODEL.LABEL_GRAPH.IMAGE_DEPENDENT": False}
INDIVIDUAL = {"MODEL.REGION_GCN.LCM": "individual"}
GLOBAL_ALONE = {"MODEL.FUSION.GLOBAL_WEIGHT": 1.0}
REGIONS_ON_FUSED_GRAPH = {"MODEL.FUSION.GLOBAL_WEIGHT": 0.0}
REGIONS_ALONE = {**REGIONS_ON_FUSED_GRAPH, **INDIVIDUAL}
OVER_REGIONS = {"MODEL.REGION_GCN.READING": "regions"}
DRAWS = {"MODEL.REGION_BRANCH.EVAL_SAMPLES": 3}


def make_cfg(options=()):
    """configs/DigitScenes/ia_gcn.yaml, made small, with options."""
    small = {
        "MODEL.DEVICE": "cpu",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
        "MODEL.RPN.CONV_DIMS": [8],
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": NUM_REGIONS + 3,
        "MODEL.RPN.POST_NMS_TOPK_TEST": NUM_REGIONS + 3,
        "MODEL.REGION_BRANCH.NUM_REGIONS": NUM_REGIONS,
        "MODEL.LABEL_EMBEDDINGS.DIM": 12,
        "MODEL.LABEL_GCN.HIDDEN_DIMS": [16],
        "MODEL.REGION_GCN.HIDDEN_DIMS": [5, 8],
        **dict(options),
    }
    config_file = ROOT / "configs" / "DigitScenes" / "ia_gcn.yaml"
    return setup_cfg(str(config_file), list(itertools.chain(*small.items())))


def make_model(options=(), dtype=torch.float64, seed=0):
    """A model of `make_cfg` with a label graph of random statistics."""
    torch.manual_seed(seed)
    model = build_model(make_cfg(options))
    if model.label_graph is not None:
        fill(model.label_graph)
    # Else objectness and boxes are all but the same everywhere, and z is near µ₀.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rpn_head" in name or "roi_heads.weight" in name:
                parameter.mul_(20)
    model.to(dtype)
    if dtype == torch.float64 and getattr(model, "proposal_generator", None) is not None:
        # detectron2's RPN takes boxes in float32, and torchvision's NMS its scores as well.
        rpn = model.proposal_generator
        rpn.anchor_generator.float()
        rpn.rpn_head.register_forward_hook(
            lambda module, args, out: [[level.float() for level in kind] for kind in out]
        )
    return model


def make_proposals(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 30
    sizes = 10 + torch.rand(count, 2, generator=generator) * 20
    proposals = Instances(SIZE)
    proposals.proposal_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
    proposals.objectness_logits = torch.arange(count, 0, -1.0)
    return proposals


def make_inputs(batch=3, seed=0, counts=None, boxes=True):
    """Images with labels and boxes, and with `counts` proposals where those are given."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for i in range(batch):
        colour = torch.randint(0, 200, (3, 1, 1), generator=generator)
        noise = torch.randint(0, 56, (3, *SIZE), generator=generator)
        labels = torch.randint(-1, 2, (NUM_LABELS,), generator=generator).float()
        inputs.append({"image": (colour + noise).to(torch.uint8), "labels": labels})
        if boxes:
            instances = Instances(SIZE)
            instances.gt_boxes = make_proposals(2, seed=50 + i).proposal_boxes
            inputs[-1]["instances"] = instances
        if counts is not None:
            inputs[-1]["proposals"] = make_proposals(counts[i], seed=i)
    return inputs
