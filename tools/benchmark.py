#!/usr/bin/env python3
"""Measure what the parts of ia_gcn cost, on this machine's CPU.

Everything compared is run in turn, A, B, C, A, B, C, ..., after a round that isn't counted, so that
what else the machine does falls on all alike. The tables are Markdown: median, shortest and longest
time, the ratio of the medians to the first row's, and the memory at the peak of a process that does
nothing else. What takes more than 60% of the available memory is not run.

Examples:
  all comparisons of models and label graphs (minutes):
    tools/benchmark.py model
  all label heads on the same feature maps:
    tools/benchmark.py heads
  where a training step of IA-GCN goes:
    tools/benchmark.py profile
  the evaluator beside scikit-learn and torchmetrics:
    tools/benchmark.py evaluator
  how IA-GCN's cost grows with labels, regions and batch:
    tools/benchmark.py scaling
  data loading beside torchvision's (a minute):
    tools/benchmark.py loading
  reading from tar shards beside loose files:
    tools/benchmark.py shards
  training and prediction with the settings for CPUs:
    tools/benchmark.py cpu
  serving on one core: PyTorch, ONNX Runtime and int8, latency and mAP:
    tools/benchmark.py serving --weights output/demo/model_best.pth
  prediction by several processes (Ray Data) beside one:
    tools/benchmark.py distributed-prediction
  how many of labels that were flipped on purpose are found:
    tools/benchmark.py label-errors --config-file ... --weights ...
  what labels that are known bring, by C-Tran and by a label prior:
    tools/benchmark.py known-labels
  when a label graph is worth its cost, by what images and labels say (hours):
    tools/benchmark.py label-evidence
  losses for labels that are partly unknown, on the same scenes:
    tools/benchmark.py partial-labels
  models of the labels alone: pairs, themes, a masked label model:
    tools/benchmark.py label-models coco_2014_train_multilabel
  time and memory of fitting a label prior:
    tools/benchmark.py prior-fit
  all that a user does with 80 to 50,000 labels, from annotations to ONNX (an hour):
    tools/benchmark.py label-space
  what a subcommand takes:
    tools/benchmark.py model --help
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Dict

import torch
from benchmarks.arguments import positive
from benchmarks.cpu import add_cpu
from benchmarks.distributed import add_distributed
from benchmarks.evaluator import add_evaluator
from benchmarks.heads import add_heads
from benchmarks.known_labels import add_known_labels
from benchmarks.label_errors import add_label_errors
from benchmarks.label_evidence import add_label_evidence
from benchmarks.label_models import add_label_models
from benchmarks.label_space import add_label_space
from benchmarks.loading import add_loading
from benchmarks.measuring import describe_machine, markdown
from benchmarks.models import add_model
from benchmarks.partial_labels import add_partial_labels
from benchmarks.prior_fit import add_prior_fit
from benchmarks.profiling import add_profile
from benchmarks.scaling import add_scaling
from benchmarks.serving import add_serving
from benchmarks.shards import add_shards

from ia_gcn.errors import InputError
from ia_gcn.io.files import write_text_atomically


def common_options() -> argparse.ArgumentParser:
    """What every subcommand takes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--rounds", type=positive, default=5, help="how often each is timed (%(default)s)"
    )
    parser.add_argument("--threads", type=positive, default=2, help="of torch (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write the tables as JSON, too")
    return parser


def report(args) -> None:
    """Print the tables of `args.run` as they come; in the end, write them to --output."""
    torch.set_num_threads(args.threads)
    settings = {
        key: value for key, value in vars(args).items() if key not in ("run", "output", "threads")
    }
    document = {"machine": describe_machine(), "settings": settings, "tables": []}
    if args.output:
        # What can't be written is said before the hours of measuring.
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "a"):
            pass
    for name in ("machine", "settings"):
        print(f"{name}: {describe_settings(document[name])}", end="\n\n", flush=True)
    for table in args.run(args):
        print(markdown(table), end="\n\n", flush=True)
        document["tables"].append(table._asdict())
    if args.output:
        text = json.dumps(document, indent=1, ensure_ascii=False)
        with write_text_atomically(args.output) as file:
            file.write(text + "\n")


def describe_settings(settings: Dict) -> str:
    """What is set, in a line."""
    texts = {
        key: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for key, value in settings.items()
    }
    return ", ".join(f"{key} {text}" for key, text in texts.items() if text)


def main() -> int:
    """Returns the exit status; invalid user input is reported in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(metavar="WHAT", required=True)
    adds = (add_model, add_heads, add_profile, add_evaluator, add_scaling, add_loading, add_cpu)
    adds += (add_label_errors, add_known_labels, add_label_evidence, add_partial_labels)
    adds += (add_label_models, add_prior_fit, add_shards)
    adds += (add_serving, add_distributed, add_label_space)
    for add in adds:
        add(subcommands, common_options())
    args = parser.parse_args()
    try:
        report(args)
    except (InputError, FloatingPointError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
