"""What each loss makes of labels that are partly unknown, by how many are known."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from ia_gcn.ablation.runs import in_new_process, train_on_features
from ia_gcn.ablation.spec import read_spec
from ia_gcn.ablation.start import Start
from ia_gcn.data import get_multilabel_dicts
from ia_gcn.data.dataset_mapper import target_vector
from ia_gcn.data.hidden_labels import hide_labels, keep_of_each_image, keep_one_positive
from ia_gcn.engine.frozen_features import FrozenFeatures
from ia_gcn.engine.label_prior import ScoredImages, fit_label_prior
from ia_gcn.errors import InputError
from ia_gcn.evaluation.comparison import confidence_reach
from ia_gcn.io.files import append_line, read_lines
from ia_gcn.modeling.label_prior_fit import LabelSets, posterior_logits
from ia_gcn.visualization.style import save_png

from .arguments import positive
from .known_labels import SPEC, parts_of, rows_named
from .label_evidence import BASELINE, mean_ap, row_cfg, scenes_name, shares
from .measuring import Table

# What becomes of unknown labels. The first is the loss that the prior's logits are of.
LOSSES: Dict[str, Dict] = {
    "ignored (BCE)": {"NAME": "MultiLabelBCE"},
    "absent (AN)": {"NAME": "AssumeNegativeLoss"},
    "absent, weighted (WAN)": {"NAME": "AssumeNegativeLoss", "ASSUME_NEGATIVE.UNKNOWN_WEIGHT": 0.0},
    "absent, smoothed (AN-LS)": {"NAME": "AssumeNegativeLoss", "ASSUME_NEGATIVE.SMOOTHING": 0.1},
    # Their number is given, as in the paper.
    "expected number (EPR)": {"NAME": "ExpectedPositiveLoss"},
    "large losses rejected (LL-R)": {"NAME": "LargeLoss", "LARGE_LOSS.SCHEME": "LL-R"},
    "corrected (LL-Ct)": {"NAME": "LargeLoss", "LARGE_LOSS.SCHEME": "LL-Ct"},
    "corrected for good (LL-Cp)": {"NAME": "LargeLoss", "LARGE_LOSS.SCHEME": "LL-Cp"},
    "Hill": {"NAME": "HillLoss"},
    "SPLC": {"NAME": "SPLCLoss"},
    # γ- and the clip are the paper's; K and η, of 9,600 labels there, would ignore all of 10.
    "selective (CSL)": {
        "NAME": "SelectiveLoss",
        "GAMMA_NEG": 1.0,
        "CLIP": 0.0,
        "SELECTIVE.TOP_K": 1,
        "SELECTIVE.PRIOR_THRESHOLD": 1.0,
    },
    "distribution-balanced": {"NAME": "DistributionBalancedLoss"},
}
PRIOR = "ignored (BCE), label prior"
SINGLE = "one positive"


class Cell(NamedTuple):
    """One training with each loss."""

    evidence: float
    known: float
    """The share of each image's labels; 0: one that is present, and no other."""
    seed: int


def column(known: float) -> str:
    return f"{known:.0%} known" if known else SINGLE


def run_partial_labels(args) -> Iterator[Table]:
    """mAP of each loss by the share of an image's labels that is known in training.

    Linear heads on the frozen features of tools/benchmark.py label-evidence: of scenes that are
    easy and hard to read. Which labels are hidden is drawn anew for each seed; all labels of the
    images that are measured are known. The last row has a label prior on the first row's logits,
    fitted to the same partial labels and calibrated on images of the training set with as few.
    """
    folder = Path(args.folder).resolve()
    os.environ["DETECTRON2_DATASETS"] = str(folder / "datasets")
    for evidence in args.evidence:
        for part in parts_of(scenes_name(evidence, args.correlation)):
            if not Start(folder).features(part).exists():
                raise InputError(
                    f"{folder}: has no features of {part}; run tools/benchmark.py label-evidence "
                    "first"
                )
    path = folder / f"partial_labels_c{args.correlation:g}.jsonl"
    seeds = range(1, args.seeds + 1)
    cells = [Cell(*cell) for cell in itertools.product(args.evidence, args.known, seeds)]
    done = read_results(path)
    todo = [cell for cell in cells if cell not in done]
    settings = folder, args.correlation, args.images, args.aside, args.steps
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit=" cells") as progress:
        futures = {pool.submit(in_new_process, run_cell, c, *settings): c for c in todo}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            result = {**futures[future]._asdict(), "mAP": future.result()}
            append_line(path, json.dumps(result))
            progress.update()
    for evidence in args.evidence:
        found = {
            known: [done[Cell(evidence, known, seed)] for seed in seeds] for known in args.known
        }
        rows = [
            {"name": name, **{column(known): interval(maps, name) for known, maps in found.items()}}
            for name in [*LOSSES, PRIOR]
        ]
        yield Table(f"mAP by known labels, evidence {evidence:g}, {args.seeds} seeds", rows)
    picture = str(path.with_suffix(".png"))
    save_png(draw(done, args.evidence, args.known, seeds), picture, dpi=150)
    print(picture, file=sys.stderr)


def read_results(path: Path) -> Dict[Cell, Dict[str, float]]:
    lines = map(json.loads, read_lines(path)) if path.exists() else ()
    return {Cell(*(line[name] for name in Cell._fields)): line["mAP"] for line in lines}


def run_cell(
    cell: Cell, folder: Path, correlation: float, images: int, num_aside: int, steps: int
) -> Dict[str, float]:
    """mAP of each loss in percent, and of the label prior where one can be fitted."""
    torch.set_num_threads(1)
    start, spec = Start(folder), read_spec(str(SPEC))
    (row,) = rows_named(spec, [BASELINE], "graphs")
    train_name, test_name = parts_of(scenes_name(cell.evidence, correlation))
    everything, test = (
        FrozenFeatures.load(str(start.features(n))) for n in (train_name, test_name)
    )
    number = float((everything.targets == 1).sum(dim=1).double().mean())
    num_labels = everything.targets.shape[1]
    keep = keep_of_each_image(cell.known) if cell.known else keep_one_positive()
    dicts = hide_labels(get_multilabel_dicts([train_name]), num_labels, keep, cell.seed)
    hidden = everything._replace(targets=torch.stack([target_vector(d, num_labels) for d in dicts]))
    train, aside = hidden.pick(slice(images)), hidden.pick(slice(-num_aside, None))
    targets = test.targets.numpy().astype(np.int8)
    found = {}
    for name, loss in LOSSES.items():
        if loss["NAME"] == "ExpectedPositiveLoss":
            loss = {**loss, "EXPECTED_POSITIVE.NUM_LABELS": number}
        cfg = row_cfg(row, spec, cell.seed, train_name, steps, folder, **loss)
        heads, _ = train_on_features(cfg, train, dicts[:images])
        logits = heads.predict(test)
        found[name] = mean_ap(logits.double().sigmoid().numpy(), targets)
        if name == next(iter(LOSSES)):
            scored = ScoredImages(heads.predict(aside), aside.targets.numpy())
            try:
                prior = fit_label_prior(LabelSets.of_targets(train.targets.numpy()), scored).prior
            except InputError as error:
                print(f"{cell}: no prior: {error}", file=sys.stderr)
                continue
            posterior = posterior_logits(prior, logits).double().sigmoid().numpy()
            found[PRIOR] = mean_ap(posterior, targets)
    return found


def interval(maps: List[Dict[str, float]], name: str) -> str:
    """Mean ± half of its 95 % confidence interval."""
    values = [found[name] for found in maps if name in found]
    return f"{np.mean(values):.1f} ± {confidence_reach(values):.1f}" if values else "–"


def draw(done: Dict[Cell, Dict[str, float]], evidence, known, seeds) -> Figure:
    """mAP by what is known, a panel for each level of evidence and a line for each loss."""
    figure = Figure(figsize=(4.2 * len(evidence) + 2.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(evidence), squeeze=False)[0]
    for axes, level in zip(panels, evidence):
        for place, name in enumerate([*LOSSES, PRIOR]):
            values = [
                [
                    done[cell][name]
                    for cell in (Cell(level, k, s) for s in seeds)
                    if name in done[cell]
                ]
                for k in known
            ]
            means = [np.mean(v) if v else np.nan for v in values]
            reaches = [confidence_reach(v) if v else np.nan for v in values]
            style = {"marker": "osv^D<>"[place % 7], "ms": 4, "lw": 2.5 if name == PRIOR else 1}
            axes.errorbar(range(len(known)), means, reaches, label=name, capsize=2, **style)
        axes.set(xticks=range(len(known)), xticklabels=map(column, known))
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_title(f"evidence {level:g}", size=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mAP (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    return figure


def add_partial_labels(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "partial-labels",
        help="losses for labels that are partly unknown",
        description=inspect.getdoc(run_partial_labels),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_partial_labels)
    parser.add_argument(
        "--folder", default="output/label_evidence", help="of label-evidence (%(default)s)"
    )
    parser.add_argument("--evidence", type=shares, default=[1.0, 0.25], help="(1,0.25)")
    parser.add_argument("--correlation", type=float, default=1.0, help="(1)")
    parser.add_argument(
        "--known",
        type=shares,
        default=[1.0, 0.5, 0.2, 0.1, 0.0],
        help="shares; 0: one label that is present (1,0.5,0.2,0.1,0)",
    )
    parser.add_argument("--images", type=positive, default=2500, help="to train on (2500)")
    parser.add_argument("--seeds", type=positive, default=5, help="how many (5)")
    parser.add_argument("--steps", type=positive, default=900, help="of a training (900)")
    parser.add_argument("--aside", type=positive, default=500, help="images to choose on (500)")
    parser.add_argument("--jobs", type=positive, default=2, help="at once (2)")
