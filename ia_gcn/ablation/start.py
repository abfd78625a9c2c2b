"""What all rows of an ablation start from: a network, label embeddings and frozen features."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from torch import nn
from tqdm import tqdm

from ..checkpoint import MultiLabelCheckpointer, build_model, load_model
from ..data import (
    MultiLabelDatasetMapper,
    build_multilabel_test_loader,
    get_label_names,
    get_multilabel_dicts,
)
from ..engine import Trainer, setup_cfg
from ..engine.frozen_features import extract_features
from ..errors import InputError
from ..inference import embed_labels
from ..io.files import write_atomically
from .spec import Run, Spec, as_list, describe_config

# Keys of MODEL that all rows must share if no network is trained first.
SHARED = ("BACKBONE", "RESNETS", "TIMM", "FPN", "WEIGHTS", "PIXEL_MEAN", "PIXEL_STD")


class Start(NamedTuple):
    """The files of an ablation's folder that are made once."""

    output: Path

    @property
    def checkpoint(self) -> Path:
        return self.output / "network" / "model_final.pth"

    @property
    def network(self) -> Path:
        """The tensors of the checkpoint that do not belong to the heads."""
        return self.output / "network" / "network.pth"

    @property
    def label_embeddings(self) -> Path:
        return self.output / "network" / "label_embeddings.npz"

    def features(self, dataset: str) -> Path:
        return self.output / "network" / f"{dataset}.safetensors"

    @property
    def made_with(self) -> Path:
        """What the files were made with, written after them."""
        return self.output / "network" / "made_with.json"


class Needs(NamedTuple):
    """The features that the rows of an ablation need."""

    maps: List[str]
    """Feature maps that their label heads read."""
    regions: int
    """The most regions of an image; 0 for none."""
    label_embeddings: bool
    """Whether some are trained on the network's label embeddings."""


def check_runs(spec: Spec, runs: Dict[str, Run], start: Start, imports: Sequence[str]) -> Needs:
    """Refuse rows that can't be run before anything is trained: each row's model is built once.

    Args:
        runs: by their names in messages.
    Raises:
        InputError: naming the row.
    """
    maps, regions, own_embeddings = [], 0, False
    seen, shared = set(), None
    for name, run in tqdm(runs.items(), "checking the rows", leave=False, disable=None):
        model_of_run = json.dumps(describe_config(run.config, run.opts, imports)["MODEL"])
        if model_of_run in seen:
            continue
        seen.add(model_of_run)
        try:
            cfg = run_cfg(run, spec, start, start.output / "check", imports)
            source = cfg.MODEL.LABEL_EMBEDDINGS.SOURCE
            model = build_random(cfg)
            if model.label_graph is not None and source == str(start.label_embeddings):
                own_embeddings = True
            if spec.network is None and run.mode == "heads":
                network = {key: cfg.MODEL[key] for key in SHARED}, cfg.INPUT
                if shared is not None and network != shared:
                    raise InputError(
                        "network: none: all rows must have the same backbone and INPUT"
                    )
                shared = network
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        maps += [feature for feature in model.in_features if feature not in maps]
        if model.has_regions:
            regions = max(regions, model.roi_heads.num_regions)
    if own_embeddings and spec.network is None:
        raise InputError("network: none: there is no network to make {output}'s label embeddings")
    return Needs(maps, regions, own_embeddings)


def prepare(
    spec: Spec, runs: Dict[str, Run], start: Start, needs: Needs, imports: Sequence[str]
) -> None:
    """Train the network, and compute label embeddings and features, if they do not exist yet.

    Raises:
        InputError: the files that are there were made with another network, or the network has no
            such maps or regions.
    """
    heads = any(run.mode == "heads" for run in runs.values())
    made_with = {"maps": sorted(needs.maps), "regions": bool(needs.regions)} if heads else {}
    if spec.network:
        opts = {**spec.opts, **spec.network.opts}
        content = json.dumps(describe_config(spec.network.config, opts, imports))
        made_with["network"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    found = json.loads(start.made_with.read_text()) if start.made_with.exists() else {}
    if found and found.get("network") != made_with.get("network"):
        raise InputError(
            f"{start.made_with.parent}: made with another network: remove it, or give another "
            "--output"
        )
    if spec.network and not start.checkpoint.exists():
        train_network(network_cfg(spec, start, imports))
    if needs.label_embeddings and not start.label_embeddings.exists():
        write_label_embeddings(network_cfg(spec, start, imports), spec.train, start)
    complete = set(made_with.get("maps", ())) <= set(found.get("maps", ()))
    complete &= found.get("regions", False) >= made_with.get("regions", False)
    if not complete or not found:
        make_cfg = network_cfg if spec.network else partial(feature_cfg, runs)
        cfg = make_cfg(spec, start, imports)
        start.network.parent.mkdir(parents=True, exist_ok=True)
        write_features(cfg, spec, start, needs if heads else None)
        with write_atomically(start.made_with) as file:
            file.write(json.dumps(made_with).encode())


def network_cfg(spec: Spec, start: Start, imports: Sequence[str]) -> CfgNode:
    opts = as_list({**spec.opts, **spec.network.opts}, start.output)
    opts += ["OUTPUT_DIR", str(start.checkpoint.parent)]
    return setup_cfg(spec.network.config, opts, imports=imports)


def feature_cfg(runs: Dict[str, Run], spec: Spec, start: Start, imports: Sequence[str]) -> CfgNode:
    """The config of the row whose model computes all features: one with regions, if any."""
    folder = start.checkpoint.parent
    cfgs = [run_cfg(run, spec, start, folder, imports) for run in runs.values()]
    return next((cfg for cfg in cfgs if build_random(cfg).has_regions), cfgs[0])


def run_cfg(
    run: Run, spec: Spec, start: Start, folder: Path, imports: Sequence[str] = ()
) -> CfgNode:
    """The config of a run, with the data of the spec and the weights that it starts from."""
    opts = as_list(run.opts, start.output)
    opts += ["SEED", run.seed, "OUTPUT_DIR", str(folder)]
    opts += ["DATASETS.TRAIN", [spec.train], "DATASETS.TEST", [spec.test, spec.train]]
    # One evaluation, at the end.
    opts += ["TEST.EVAL_EPOCHS", 0, "SOLVER.CHECKPOINT_EPOCHS", 1]
    if spec.network:
        opts += ["MODEL.WEIGHTS", str(start.network)]
    return setup_cfg(run.config, opts, imports=imports)


def build_random(cfg: CfgNode) -> nn.Module:
    """A config's model with random weights: its names and shapes are looked at."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = cfg.MODEL.TIMM.WEIGHTS_FILE = ""
    cfg.MODEL.TIMM.PRETRAINED = False
    return build_model(cfg)


def train_network(cfg: CfgNode) -> None:
    """Train the network that all rows start from; resumes an interrupted training."""
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    setup_logger(cfg.OUTPUT_DIR, name="ia_gcn")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def write_label_embeddings(cfg: CfgNode, dataset: str, start: Start) -> None:
    """The mean scores that the network gives to the images of each label."""
    names = get_label_names([dataset])
    model = load_model(cfg, names, path=str(start.checkpoint))
    batches = feature_loader(cfg, dataset, drop_unlabelled=True)
    embeddings, _ = embed_labels(model, batches, "scores")
    with write_atomically(start.label_embeddings) as file:
        np.savez(file, embeddings=embeddings, label_names=np.array(names), kind="scores")


def write_features(cfg: CfgNode, spec: Spec, start: Start, needs: Needs | None) -> None:
    """Features of the training and test images, where rows need them; the network without heads.

    Raises:
        InputError: the network has not the maps or regions that rows ask for.
    """
    names = get_label_names([spec.train, spec.test])
    model = build_model(cfg)
    weights = str(start.checkpoint) if spec.network else cfg.MODEL.WEIGHTS
    if weights:
        MultiLabelCheckpointer(model, label_names=names).load(weights)
    if needs is not None:
        check_network(model, needs)
        for dataset in (spec.train, spec.test):
            progress = tqdm(feature_loader(cfg, dataset), f"features of {dataset}", disable=None)
            found = extract_features(model, progress, needs.maps)
            found.save(str(start.features(dataset)))
    state = model.state_dict()
    kept = {name: state[name] for name in state if name.startswith(model.network)}
    with write_atomically(start.network) as file:
        torch.save({"model": kept, "label_names": names}, file)


def check_network(model: nn.Module, needs: Needs) -> None:
    """
    Raises:
        InputError: the network has not the maps or regions that rows ask for.
    """
    shapes = model.backbone.output_shape()
    missing = [name for name in needs.maps if name not in shapes]
    if missing:
        raise InputError(
            f"network: rows read {', '.join(missing)}; its backbone has {', '.join(shapes)} "
            "(MODEL.RESNETS.OUT_FEATURES)"
        )
    available = model.roi_heads.num_regions if model.has_regions else 0
    if available < needs.regions:
        raise InputError(
            f"network: a row looks at {needs.regions} regions, and the network finds {available} "
            "(MODEL.META_ARCHITECTURE, MODEL.REGION_BRANCH.NUM_REGIONS)"
        )


def feature_loader(cfg: CfgNode, dataset: str, drop_unlabelled: bool = False):
    """All images of a data set in the test view."""
    return build_multilabel_test_loader(
        dataset=get_multilabel_dicts([dataset], drop_unlabelled=drop_unlabelled),
        mapper=MultiLabelDatasetMapper(cfg, is_train=False),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_unreadable=0,
    )
