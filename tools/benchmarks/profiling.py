"""Where a training step of IA-GCN goes."""

from __future__ import annotations

import argparse
import inspect
import os
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Dict, Iterator, List

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm

from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError

from .arguments import positive
from .measuring import Table, measure, timed_rows
from .networks import CONFIGS, Network, Recipe, build_network, train_step

# By the name of a row: a module of InstanceAwareRecognizer. What lies in two of them counts for the
# inner one.
PARTS = {
    "backbone": "backbone",
    "pooling to x": "label_head.pooling",
    "RPN head": "proposal_generator.rpn_head",
    "anchors, matching, NMS and losses of the RPN": "proposal_generator",
    "ROIAlign": "roi_heads.pooler",
    "rough scores of the regions": "roi_heads.rough_classifier",
    "label GCN": "label_head",
    "region GCN": "region_gcn",
    "loss of the labels": "criterion",
}
PREFIX = "part: "
OPTIMIZER = "optimizer"
REST = "the rest"


@contextmanager
def named_parts(model: nn.Module) -> Iterator[None]:
    """Have the profiler record when the forward passes of PARTS begin and end."""
    with ExitStack() as stack:
        for name, path in PARTS.items():
            try:
                module = model.get_submodule(path)
            except AttributeError:
                # A config without it.
                continue
            ranges: List = []
            begin = partial(begin_range, ranges, PREFIX + name)
            end = partial(end_range, ranges)
            for hook in (
                module.register_forward_pre_hook(begin),
                module.register_forward_hook(end),
            ):
                stack.callback(hook.remove)
        yield


def begin_range(ranges: List, name: str, *module_and_inputs) -> None:
    ranges.append(record_function(name).__enter__())


def end_range(ranges: List, *module_and_outputs) -> None:
    ranges.pop().__exit__(None, None, None)


def profile_step(network: Network) -> Dict[str, Dict[str, float]]:
    """Seconds of one training step, {"forward": ..., "backward": ...} by part."""
    with (
        named_parts(network.model),
        profile(activities=[ProfilerActivity.CPU]) as found,
        record_function(PREFIX + REST),
    ):
        train_step(network)
    return seconds_by_part(found.events())


def seconds_by_part(events) -> Dict[str, Dict[str, float]]:
    """What `profile_step` returns, of the profiler's events.

    A step of the backward pass counts for the part whose forward pass made it: both bear the number
    of that step. Gradients are added up right after the step that they come from.
    """
    # An event begins before those in it.
    events = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
    seconds: Dict[str, Dict[str, float]] = {}
    makers: Dict[int, str] = {}
    open_parts: List = []
    open_backward, last = None, REST

    def add(part: str, direction: str, duration: float) -> None:
        row = seconds.setdefault(part, {"forward": 0.0, "backward": 0.0})
        row[direction] += duration * 1e-6

    for event in events:
        time = event.time_range
        while open_parts and open_parts[-1].time_range.end <= time.start:
            open_parts.pop()
        part = part_name(open_parts[-1].name) if open_parts else REST
        duration = time.elapsed_us()
        named = part_name(event.name)
        if named:
            add(named, "forward", duration)
            if open_parts:
                add(part, "forward", -duration)
            open_parts.append(event)
        elif event.name.startswith("autograd::engine::evaluate_function"):
            if open_backward and time.start < open_backward.end:
                # A step within a step is of the same part.
                continue
            open_backward = time
            last = makers.get(event.sequence_nr, last)
            add(last, "backward", duration)
            add(part, "forward", -duration)
        elif event.sequence_nr >= 0 and not (open_backward and time.start < open_backward.end):
            # Operations that make no step have the number of the next that does, and come before.
            makers[event.sequence_nr] = part
    return seconds


def part_name(event: str) -> str | None:
    """The part that an event of this name is the forward pass of, if it is one's."""
    if event.startswith(PREFIX):
        return event[len(PREFIX) :]
    # torch's own records of step and zero_grad.
    return OPTIMIZER if event.startswith("Optimizer.") else None


def profile_table(args, title: str, network: Network) -> Table:
    """Medians over the rounds, by part."""
    train_step(network)
    rounds = [
        profile_step(network) for _ in tqdm(range(args.rounds), title, leave=False, disable=None)
    ]
    names = [name for name in (*PARTS, OPTIMIZER, REST) if name in rounds[0]]
    rows = []
    for name in names:
        forward, backward = (
            median(seconds[name][direction] for seconds in rounds)
            for direction in ("forward", "backward")
        )
        rows.append({"name": name, "forward_s": forward, "backward_s": backward})
    total = sum(row["forward_s"] + row["backward_s"] for row in rows)
    for row in rows:
        row["share"] = (row["forward_s"] + row["backward_s"]) / total
    return Table(title, rows)


def run_profile(args) -> Iterator[Table]:
    """Print where the time of an IA-GCN's training step goes, with random images and weights.

    One table has the seconds of each part, forward and backward, by torch's profiler; another has
    the time of whole steps, without the profiler.
    """
    # The profiler's own remarks, to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cfg = setup_cfg(args.config_file, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "InstanceAwareRecognizer":
        raise InputError(f"{args.config_file}: not an InstanceAwareRecognizer")
    if min(cfg.INPUT.IMAGE_SIZE) != max(cfg.INPUT.IMAGE_SIZE):
        raise InputError(f"INPUT.IMAGE_SIZE must be a square, not {cfg.INPUT.IMAGE_SIZE}")
    size = cfg.INPUT.IMAGE_SIZE[0]
    recipe = Recipe(os.path.abspath(args.config_file))
    heading = f"{args.config_file}, {args.batch} × {size}×{size} pixels"
    network = build_network(recipe, args.batch, size, args.opts)
    network.model.train()
    yield profile_table(args, f"Parts of a training step: {heading}", network)
    calls = {"training step": partial(train_step, network)}
    yield Table(f"Training step: {heading}", timed_rows(measure(calls, args.rounds, "steps")))


def add_profile(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "profile",
        help="where a training step goes",
        description=inspect.getdoc(run_profile),
        epilog=PROFILE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_profile)
    default = os.path.relpath(CONFIGS / "ia_gcn_R_101.yaml")
    parser.add_argument("--config-file", default=default, help="default %(default)s")
    parser.add_argument("--batch", type=positive, default=4, help="images in a batch (default 4)")
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")


PROFILE_EXAMPLES = """
Examples:
  IA-GCN on ResNet-101:
    tools/benchmark.py profile
  the demo's network:
    tools/benchmark.py profile --config-file configs/DigitScenes/ia_gcn_plus.yaml --batch 16
"""
