"""What labels that are known of an image bring: by C-Tran, and by a label prior on other heads."""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import numpy as np
import torch
from tqdm import tqdm

from ia_gcn.ablation.runs import in_new_process, train_on_features
from ia_gcn.ablation.spec import Row, Spec, read_spec
from ia_gcn.ablation.start import Start, run_cfg
from ia_gcn.data.known_labels import choose_known
from ia_gcn.engine.frozen_features import FrozenFeatures, HeadsOnFeatures
from ia_gcn.engine.label_prior import ScoredImages, fit_label_prior
from ia_gcn.errors import InputError
from ia_gcn.evaluation import multi_label_metrics
from ia_gcn.modeling.label_prior_fit import LabelSets, posterior_logits

from .arguments import positive
from .measuring import Table

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "configs/ablations/digit_scenes.yaml"
SHARES = (0.0, 0.25, 0.5, 0.75)


def run_known_labels(args) -> Iterator[Table]:
    """mAP of the labels that are not known, with 0, 25, 50 and 75 % of an image's labels known.

    Of heads on the frozen features of an ablation (tools/ablate.py run, with its table `heads`), or
    of tools/benchmark.py label-evidence. A head that takes known labels is told them; the others
    get a label prior, which is fitted to the labels of the images that the head is trained on. Its
    strength is chosen on others.
    """
    spec, start = read_spec(str(SPEC)), Start(Path(args.folder).resolve())
    if args.scenes:
        os.environ["DETECTRON2_DATASETS"] = str(start.output / "datasets")
        train_name, test_name = parts_of(args.scenes)
        spec = spec._replace(train=train_name, test=test_name)
    for name in (spec.train, spec.test):
        if not start.features(name).exists():
            first = "benchmark.py label-evidence" if args.scenes else "ablate.py run --tables heads"
            raise InputError(f"{args.folder}: no features of {name}; run tools/{first} first")
    rows = rows_named(spec, args.rows, "heads", "priors")
    # In a process that has not read yet where data sets are.
    figures = in_new_process(measure_rows, spec, start, rows, args.seeds, args.aside, args.threads)
    yield Table(
        f"mAP by the share of an image's labels that is known, {args.seeds} seeds",
        [
            {"name": name, **dict(zip(COLUMNS, map(spread, zip(*values))))}
            for name, values in figures.items()
        ],
    )


def measure_rows(
    spec: Spec, start: Start, rows: List[Row], num_seeds: int, num_aside: int, threads: int
) -> Dict[str, List[List[float]]]:
    """mAP by SHARES of each seed, of each row and of what has a prior."""
    torch.set_num_threads(threads)
    everything, test = (
        FrozenFeatures.load(str(start.features(n))) for n in (spec.train, spec.test)
    )
    train, aside = everything.pick(slice(num_aside, None)), everything.pick(slice(num_aside))
    targets = test.targets.numpy().astype(np.int8)
    known = [draw_states(targets, share) for share in SHARES]
    figures: Dict[str, List[List[float]]] = {}
    for row in tqdm(rows, "heads", disable=None):
        for seed in range(1, num_seeds + 1):
            run = spec.run("heads", row, seed)
            heads, _ = train_on_features(run_cfg(run, spec, start, start.output), train)
            for name, logits in known_logits(heads, train, aside, test):
                measured = [mean_ap(logits(states), targets, states) for states in known]
                figures.setdefault(f"{row.name}{name}", []).append(measured)
    return figures


def rows_named(spec: Spec, names: List[str], *tables: str) -> List[Row]:
    """Rows of some tables, in the order of their names.

    Raises:
        InputError: there is no such row.
    """
    rows = {row.name: row for table in spec.choose(tables).values() for row in table.rows}
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise InputError(f"--rows {unknown[0]}: must be of {', '.join(rows)}")
    return [rows[name] for name in names]


COLUMNS = [f"{share:.0%} known" for share in SHARES]


def parts_of(scenes: str) -> Tuple[str, str]:
    """The data sets that heads are trained on, and measured on."""
    return f"{scenes}_train_b", f"{scenes}_val"


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
    parser.add_argument(
        "--scenes",
        help="of the folder of tools/benchmark.py label-evidence, such as digit_scenes_e0.25_c1.0",
    )
    parser.add_argument(
        "--aside", type=positive, default=500, help="images to choose a prior's strength on (500)"
    )
    parser.add_argument("--seeds", type=positive, default=3, help="how many (default 3)")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["Linear", "ML-GCN", "ML-Decoder", "C-Tran"],
        help="of the tables heads and priors (Linear, ML-GCN, ML-Decoder and C-Tran)",
    )
