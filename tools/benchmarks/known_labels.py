"""What labels that are known of an image bring: by C-Tran, and by a label prior on other heads."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Dict, Iterator, List

import numpy as np
import torch
from tqdm import tqdm

from ia_gcn.ablation.runs import train_on_features
from ia_gcn.ablation.spec import read_spec
from ia_gcn.ablation.start import Start, run_cfg
from ia_gcn.data.known_labels import choose_known
from ia_gcn.engine.frozen_features import FrozenFeatures, HeadsOnFeatures
from ia_gcn.engine.label_prior import ScoredImages, fit_label_prior
from ia_gcn.errors import InputError
from ia_gcn.evaluation import multi_label_metrics
from ia_gcn.modeling.label_prior_fit import LabelSets, posterior_logits

from .arguments import positive
from .measuring import Table

SPEC = "configs/ablations/digit_scenes.yaml"
SHARES = (0.0, 0.25, 0.5, 0.75)
# Of the training images, to choose the strength of a prior on.
CALIBRATION = 500


def run_known_labels(args) -> Iterator[Table]:
    """mAP of the labels that are not known, with 0, 25, 50 and 75 % of an image's labels known.

    Of heads on the frozen features of an ablation (tools/ablate.py run, with its table `heads`). A
    head that takes known labels is told them; the others get a label prior, which is fitted to the
    labels of the images that the head is trained on. Its strength is chosen on 500 others.
    """
    spec, start = read_spec(SPEC), Start(Path(args.folder))
    if not start.made_with.exists():
        raise InputError(f"{args.folder}: run tools/ablate.py run --tables heads first")
    table = spec.tables["heads"]
    rows = [row for row in table.rows if row.name in args.rows]
    everything, test = (
        FrozenFeatures.load(str(start.features(n))) for n in (spec.train, spec.test)
    )
    train, aside = everything.pick(slice(CALIBRATION, None)), everything.pick(slice(CALIBRATION))
    targets = test.targets.numpy().astype(np.int8)
    figures: Dict[str, List[List[float]]] = {}
    seeds = range(1, args.seeds + 1)
    known = [draw_states(targets, share) for share in SHARES]
    for row in tqdm(rows, "heads", disable=None):
        for seed in seeds:
            run = spec.run("heads", row, seed)
            heads, _ = train_on_features(run_cfg(run, spec, start, start.output), train)
            for name, logits in known_logits(heads, train, aside, test):
                measured = [mean_ap(logits(states), targets, states) for states in known]
                figures.setdefault(f"{row.name}{name}", []).append(measured)
    yield Table(
        f"mAP by the share of an image's labels that is known, {args.seeds} seeds",
        [
            {"name": name, **dict(zip(COLUMNS, map(spread, zip(*values))))}
            for name, values in figures.items()
        ],
    )


COLUMNS = [f"{share:.0%} known" for share in SHARES]


def spread(values) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2f}"


def draw_states(targets: np.ndarray, share: float) -> torch.Tensor:
    """The labels of each image that are known, as TEST.KNOWN_LABELS draws them."""
    rows = [choose_known(torch.from_numpy(t), share, i, seed=0) for i, t in enumerate(targets)]
    return torch.stack(rows)


def mean_ap(logits: torch.Tensor, targets: np.ndarray, states: torch.Tensor) -> float:
    others = np.where(states.numpy() >= 0, -1, targets)
    return multi_label_metrics(logits.double().sigmoid().numpy(), others)["mAP"]


def known_logits(
    heads: HeadsOnFeatures, train: FrozenFeatures, aside: FrozenFeatures, test: FrozenFeatures
):
    """Of a head itself, and with a prior: a suffix of its name, and states (n, C) to logits."""

    def told(states: torch.Tensor) -> torch.Tensor:
        return heads.predict(test._replace(features=test.features._replace(label_states=states)))

    if heads.model.takes_known_labels:
        yield "", told
        return
    logits = heads.predict(test)
    yield "", lambda states: logits
    labels = LabelSets.of_targets(train.targets.numpy())
    scored = ScoredImages(heads.predict(aside), aside.targets.numpy())
    prior = fit_label_prior(labels, scored).prior
    yield ", label prior", lambda states: posterior_logits(prior, logits, states)


def add_known_labels(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "known-labels",
        help="labels that are known: C-Tran, and a label prior on other heads",
        description=inspect.getdoc(run_known_labels),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_known_labels)
    parser.add_argument(
        "--folder", default="output/ablation", help="of the ablation (output/ablation)"
    )
    parser.add_argument("--seeds", type=positive, default=3, help="how many (default 3)")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["Linear", "ML-GCN", "ML-Decoder", "C-Tran"],
        help="of the table heads (Linear, ML-GCN, ML-Decoder and C-Tran)",
    )
