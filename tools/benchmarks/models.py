"""Recognisers: inference, training steps, and inference once it is optimised."""

from __future__ import annotations

import argparse
import copy
import inspect
from functools import partial
from typing import Callable, Dict, Iterator, List

from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from ia_gcn.errors import InputError
from ia_gcn.inference import optimize_for_inference

from .arguments import positive, positive_numbers
from .label_graph import compare_label_graph
from .measuring import Table, measure, measure_memory, timed_rows
from .networks import RESNETS, TRESNETS, Network, Recipe, build_network, infer, train_step

STEPS = {"Inference": infer, "Training step": train_step}


def compare_inference(args) -> Iterator[Table]:
    """A forward pass in evaluation, of each network of a family."""
    for recipes in (RESNETS, TRESNETS):
        yield time_networks(args, "Inference", recipes)


def compare_training(args) -> Iterator[Table]:
    """A training step of each network of a family; RPNs are trained along."""
    for recipes in (RESNETS, TRESNETS):
        yield time_networks(args, "Training step", recipes)


def time_networks(args, what: str, recipes: Dict[str, Recipe]) -> Table:
    """One of STEPS of each network: the times here, the memory in a process each."""
    calls, memory, regions = {}, {}, {}
    settings = (args.batch, args.size, args.opts)
    for name, recipe in tqdm(recipes.items(), "networks", leave=False, disable=None):
        # Also tells what can't be built, before anything else is run.
        network = start(what, recipe, *settings)
        memory[name] = measure_memory(args.threads, prepare_step, what, recipe, *settings)
        if "not_run" not in memory[name]:
            calls[name] = partial(STEPS[what], network)
            regions[name] = watch_regions(network.model)
    rows = timed_rows(measure(calls, args.rounds, what), memory)
    for row in rows:
        counts = regions.get(row["name"])
        if counts:
            row["regions"] = [min(counts), max(counts)]
    return Table(heading(what, network.cfg, args), rows)


def start(what: str, recipe: Recipe, *settings) -> Network:
    """A network in the mode that one of STEPS takes; settings are those of `build_network`."""
    network = build_network(recipe, *settings)
    network.model.train(STEPS[what] is train_step)
    return network


def prepare_step(what: str, recipe: Recipe, *settings) -> Callable:
    """One of STEPS, as a function of nothing."""
    return partial(STEPS[what], start(what, recipe, *settings))


def compare_optimized(args) -> List[Table]:
    """A forward pass of networks as they are trained, and after optimize_for_inference."""
    calls, logits, titles = {}, {}, {}
    for name in ("LinearHead", "IA-GCN"):
        network = build_network(RESNETS[name], args.batch, args.size, args.opts)
        optimized = optimize_for_inference(copy.deepcopy(network.model))
        for form, model in ((name, network.model), (f"{name}, optimised", optimized)):
            calls[form] = partial(infer, network._replace(model=model))
            logits[form] = calls[form]()
        titles[name] = heading(f"Optimised inference of {name}", network.cfg, args)
    seconds = measure(calls, args.rounds, "Optimised inference")
    return [optimized_table(name, title, seconds, logits) for name, title in titles.items()]


def optimized_table(network: str, title: str, seconds, logits) -> Table:
    names = [network, f"{network}, optimised"]
    rows = timed_rows({name: seconds[name] for name in names})
    for row, name in zip(rows, names):
        row["logit_deviation"] = logits[name].std().item()
    rows[1]["max_difference"] = (logits[names[1]] - logits[names[0]]).abs().max().item()
    return Table(title, rows)


def heading(what: str, cfg: CfgNode, args) -> str:
    network = f"ResNet-{cfg.MODEL.RESNETS.DEPTH}"
    if cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        network = cfg.MODEL.TIMM.NAME
    return f"{what}: {network}, {args.batch} × {args.size}×{args.size} pixels"


def watch_regions(model: nn.Module) -> set:
    """A set into which goes how many proposals any image gets from now on."""
    counts = set()
    if hasattr(model, "proposal_generator"):
        model.proposal_generator.register_forward_hook(
            lambda module, inputs, outputs: counts.update(map(len, outputs[0]))
        )
    return counts


COMPARISONS = {
    "inference": compare_inference,
    "training": compare_training,
    "optimized": compare_optimized,
    "label-graph": compare_label_graph,
}


def run_model(args) -> Iterator[Table]:
    """Time recognisers and the label graph, with random images, weights and label statistics.

    inference    a forward pass. ResNets: torchvision's and timm's with a linear head; ours with a
                 linear head, ML-GCN, IA-GCN and two dearer ways to its regions. TResNets: timm's
                 with a linear head; ours with a linear head, and ML-AGCN
    training     a training step of the same, forward, backward and optimizer
    optimized    a forward pass before and after ia_gcn.modeling.optimize_for_inference
    label-graph  IA-GCN's label graph alone, as it is computed here and as its paper writes it,
                 forward and backward

    Of the config keys MODEL.RESNETS, torchvision's and timm's networks heed DEPTH alone.
    """
    names = args.only.split(",")
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise InputError(f"--only {unknown[0]}: must be of {', '.join(COMPARISONS)}")
    if args.size < 64:
        raise InputError(f"--size {args.size}: batch norms need 64 or more")
    for name in names:
        yield from COMPARISONS[name](args)


def add_model(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "model",
        help="recognisers and label graphs",
        description=inspect.getdoc(run_model),
        epilog=MODEL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_model)
    parser.add_argument(
        "--only",
        metavar="NAME,...",
        default=",".join(COMPARISONS),
        help="comparisons to run (default all)",
    )
    parser.add_argument("--batch", type=positive, default=4, help="images in a batch (default 4)")
    parser.add_argument(
        "--size", type=positive, default=448, help="their height and width in pixels (default 448)"
    )
    parser.add_argument(
        "--labels",
        metavar="C,...",
        type=positive_numbers,
        default=[80, 500, 9605],
        help="of label-graph: the numbers of labels (default 80,500,9605)",
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs="*", help="config keys and values, for all networks"
    )


MODEL_EXAMPLES = """
Examples:
  the times of a forward pass, on 8 threads:
    tools/benchmark.py model --only inference --threads 8
  one image at a time, with a smaller network:
    tools/benchmark.py model --batch 1 MODEL.RESNETS.DEPTH 50
  the label graph with 2000 labels:
    tools/benchmark.py model --only label-graph --labels 2000
"""
