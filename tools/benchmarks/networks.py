"""Networks of random weights: the recognisers here, and those of other libraries."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import timm
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from timm.loss import AsymmetricLossMultiLabel
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError

from .label_graph import fill_sparsely

CONFIGS = Path(__file__).parents[2] / "configs" / "COCO"

BOXES_PER_IMAGE = 7


class Network(NamedTuple):
    """A model and what it is run on."""

    cfg: CfgNode
    model: nn.Module
    collate: Callable[[List[Dict]], Any]
    """From what `random_batch` returns to what `logits` and `loss` take."""
    logits: Callable[[nn.Module, Any], torch.Tensor]
    """(B, C), of the model in evaluation mode."""
    loss: Callable[[nn.Module, Any], torch.Tensor]
    """A scalar, of the model in training mode."""
    optimizer: torch.optim.Optimizer
    batch: Any = None
    """Made by `collate`."""


class Recipe(NamedTuple):
    """How a network is made."""

    config_file: str
    """In configs/COCO."""
    opts: Tuple[str, ...] = ()
    peer: Callable[[CfgNode], nn.Module] | None = None
    """Makes another library's network for the config, to be used in place of ours."""


class Peer(nn.Module):
    """Another library's classifier, with what its user would put around it."""

    def __init__(self, network: nn.Module, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 to logits (B, C)."""
        return self.network((images - self.mean) / self.std)


def torchvision_resnet(cfg: CfgNode) -> nn.Module:
    make = getattr(torchvision.models, f"resnet{cfg.MODEL.RESNETS.DEPTH}")
    network = make(num_classes=cfg.MODEL.LABEL_HEAD.NUM_LABELS)
    network.avgpool = nn.AdaptiveMaxPool2d(1)
    return network


def timm_resnet(cfg: CfgNode) -> nn.Module:
    name, num_labels = f"resnet{cfg.MODEL.RESNETS.DEPTH}", cfg.MODEL.LABEL_HEAD.NUM_LABELS
    return timm.create_model(name, num_classes=num_labels, global_pool="max")


def timm_network(cfg: CfgNode) -> nn.Module:
    return timm.create_model(cfg.MODEL.TIMM.NAME, num_classes=cfg.MODEL.LABEL_HEAD.NUM_LABELS)


# By the name of a row; of each family, the first is what the others are compared with.
RESNETS = {
    "torchvision": Recipe("resnet101.yaml", peer=torchvision_resnet),
    "timm": Recipe("resnet101.yaml", peer=timm_resnet),
    "LinearHead": Recipe("resnet101.yaml"),
    "ML-GCN": Recipe("ml_gcn_R_101.yaml"),
    "IA-GCN": Recipe("ia_gcn_R_101.yaml"),
    "IA-GCN, the zoo's RPN head": Recipe("ia_gcn_R_101.yaml", ("MODEL.RPN.CONV_DIMS", "[-1]")),
    "IA-GCN, res5 on every region": Recipe(
        "ia_gcn_R_101.yaml",
        (
            *("MODEL.REGION_BRANCH.RES5", "True"),
            *("MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "14"),
            *("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", "0"),
        ),
    ),
}
TRESNETS = {
    "timm": Recipe("asl_tresnet_m.yaml", peer=timm_network),
    "LinearHead": Recipe("asl_tresnet_m.yaml"),
    "ML-AGCN": Recipe("ml_agcn_2l.yaml"),
}


def build_network(recipe: Recipe, batch: int, size: int, opts: List[str]) -> Network:
    """A network whose weights are random, in evaluation mode, and what it is run on.

    Args:
        batch: images.
        size: their height and width in pixels.
        opts: config keys and values. A recipe's own go before them: a row is what its name says.
    Raises:
        InputError: a key is unknown, or the logits are not finite.
    """
    opts = [*opts, *recipe.opts, "MODEL.DEVICE", "cpu", "MODEL.TIMM.PRETRAINED", "False"]
    # So low that the weights stay what they are: their values make no difference to the times.
    opts += ["SOLVER.BASE_LR", "1e-9"]
    cfg = setup_cfg(str(CONFIGS / recipe.config_file), opts)
    torch.manual_seed(0)
    network = build_peer(recipe.peer, cfg) if recipe.peer else build_recogniser(cfg)
    inputs = random_batch(batch, size, cfg.MODEL.LABEL_HEAD.NUM_LABELS)
    calibrate(network._replace(batch=network.collate(inputs[:1])))
    return network._replace(batch=network.collate(inputs))


def build_recogniser(cfg: CfgNode) -> Network:
    """The network of a config."""
    model = Trainer.build_model(cfg)
    if model.label_graph is not None:
        fill_sparsely(model.label_graph)
    optimizer = Trainer.build_optimizer(cfg, model)
    return Network(cfg, model, list, recogniser_logits, recogniser_loss, optimizer)


def recogniser_logits(model: nn.Module, inputs: List[Dict]) -> torch.Tensor:
    return torch.stack([output["logits"] for output in model(inputs)])


def recogniser_loss(model: nn.Module, inputs: List[Dict]) -> torch.Tensor:
    with EventStorage():
        return sum(model(inputs).values())


def build_peer(make: Callable[[CfgNode], nn.Module], cfg: CfgNode) -> Network:
    """Another library's network, with the loss and the optimizer that a config asks for."""
    model = Peer(make(cfg), cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    solver, loss = cfg.SOLVER, cfg.MODEL.LOSS
    settings = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), momentum=solver.MOMENTUM, **settings)
    else:
        optimizer = getattr(torch.optim, solver.OPTIMIZER)(model.parameters(), **settings)
    criterion = nn.BCEWithLogitsLoss()
    if loss.NAME == "AsymmetricLoss":
        criterion = AsymmetricLossMultiLabel(
            gamma_neg=loss.GAMMA_NEG,
            gamma_pos=loss.GAMMA_POS,
            clip=loss.CLIP,
            disable_torch_grad_focal_loss=not loss.FOCUSING_GRADIENT,
        )
    return Network(cfg, model, peer_batch, peer_logits, partial(peer_loss, criterion), optimizer)


def peer_batch(inputs: List[Dict]) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W) and targets (B, C), as torch's DataLoader hands them out."""
    return torch.stack([x["image"] for x in inputs]), torch.stack([x["labels"] for x in inputs])


def peer_logits(model: nn.Module, batch) -> torch.Tensor:
    images, _ = batch
    return model(images)


def peer_loss(criterion: nn.Module, model: nn.Module, batch) -> torch.Tensor:
    images, targets = batch
    return criterion(model(images), targets)


def random_batch(batch: int, size: int, num_labels: int) -> List[Dict]:
    """What `MultiLabelRecognizer` takes: images of noise, with labels and boxes."""
    generator = torch.Generator().manual_seed(0)
    uniform = partial(torch.rand, generator=generator)
    inputs = []
    for _ in range(batch):
        boxes = random_boxes(BOXES_PER_IMAGE, size, generator)
        inputs.append(
            {
                "image": (256 * uniform(3, size, size)).to(torch.uint8),
                "labels": (uniform(num_labels) < 0.04).float(),
                "instances": Instances((size, size), gt_boxes=boxes),
            }
        )
    return inputs


def random_boxes(number: int, size: int, generator: torch.Generator) -> Boxes:
    """Boxes of a tenth to a half of an image's height and width, which are `size` pixels."""
    sides = size * (0.1 + 0.4 * torch.rand(number, 2, generator=generator))
    corners = (size - sides) * torch.rand(number, 2, generator=generator)
    return Boxes(torch.cat([corners, corners + sides], dim=1))


def calibrate(network: Network) -> None:
    """Make a network of random weights behave like a trained one, and put it in evaluation mode.

    Its batch norms take on the statistics of its batch, and its residual blocks a small weight.

    As it starts out, its activations overflow, and rounding errors grow 10⁴-fold on their way
    through a hundred layers; a trained block changes little of what it is added to.
    """
    model = network.model.eval()
    for module in model.modules():
        if isinstance(module, BottleneckBlock):
            nn.init.constant_(module.conv3.norm.weight, 0.2)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    infer(network)
    for norm, momentum in zip(norms, momenta):
        norm.eval().momentum = momentum
    if not infer(network).isfinite().all():
        raise InputError(f"{network.cfg.OUTPUT_DIR}: the logits of random weights are not finite")


@torch.no_grad()
def infer(network: Network) -> torch.Tensor:
    """Logits, (B, C)."""
    return network.logits(network.model, network.batch)


def train_step(network: Network, bf16: bool = False) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = network.loss(network.model, network.batch)
    if not loss.isfinite():
        raise FloatingPointError("the loss of a training step is not finite")
    loss.backward()
    network.optimizer.step()
    # Now rather than before the next step: that is another network's.
    network.optimizer.zero_grad()
