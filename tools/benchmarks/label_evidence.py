"""When a label graph is worth its cost: by what images and labels say, and how many there are.

On DigitScenes with knobs (datasets/prepare_digit_scenes.py --evidence --correlation), whose labels'
exact chances are known: what the best that could be made of labels gains is in the tables, too.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure
from scipy.optimize import minimize
from tqdm import tqdm

from ia_gcn.ablation.runs import in_new_process, train_on_features
from ia_gcn.ablation.spec import Row, Spec, as_list, read_spec
from ia_gcn.ablation.start import Start, feature_loader, train_network, write_label_embeddings
from ia_gcn.checkpoint import MultiLabelCheckpointer, build_model
from ia_gcn.data import get_label_names, get_multilabel_dicts
from ia_gcn.engine import setup_cfg
from ia_gcn.engine.frozen_features import FrozenFeatures, extract_features
from ia_gcn.engine.label_prior import ScoredImages, fit_label_prior
from ia_gcn.evaluation import multi_label_metrics
from ia_gcn.io.files import append_line, read_lines
from ia_gcn.modeling.label_prior_fit import LabelSets, posterior_logits
from ia_gcn.visualization.style import save_png

from .arguments import positive, positive_numbers
from .known_labels import ROOT, SPEC, parts_of, rows_named, spread
from .measuring import Table

# What the label graphs are compared with, and what is fitted to its logits.
BASELINE, PRIOR, EXACT, CEILING = "Linear", "label prior", "exact prior", "true other labels"
# A linear head whose training images' labels are independent, and what is fitted to its logits.
INDEPENDENT = "Linear, independent labels"
INDEPENDENT_PRIOR, INDEPENDENT_EXACT = f"{INDEPENDENT}, {PRIOR}", f"{INDEPENDENT}, {EXACT}"

# Label graphs that are trained as usual, and a prior that is trained with known labels.
GRAPHS = ("ML-GCN", "ML-AGCN, whitened features", "IA-GCN")
KNOWN = "Linear, themes, labels known"

# Of the figure's colours, in points of mAP.
MOST = 20


class Cell(NamedTuple):
    """One training of each row."""

    evidence: float
    correlation: float
    images: int
    seed: int

    @property
    def scenes(self) -> str:
        return scenes_name(self.evidence, self.correlation)


def scenes_name(evidence: float, correlation: float) -> str:
    return f"digit_scenes_e{evidence}_c{correlation}"


def run_label_evidence(args) -> Iterator[Table]:
    """mAP of label heads over evidence, correlation and the number of training images.

    A network is trained on scenes of all levels of evidence whose labels are independent. Of each
    cell, heads are trained on its features of other scenes, for as many steps whatever the number
    of images. Beside them: a label prior on the linear head's logits, fitted to the labels of the
    same images; the posterior of the scenes' exact prior; and the exact chance given the true other
    labels, the ceiling of all that labels say. What all three need of the logits' scale is chosen
    on images set aside. A linear head learns from its images what their labels say of each other:
    so the priors are also fitted to one whose images' labels are independent, as to a model that
    comes from elsewhere. Runs that are there are not run again.
    """
    folder = Path(args.folder).resolve()
    # Read when a process imports ia_gcn: each part of the work has one of its own.
    os.environ["DETECTRON2_DATASETS"] = str(folder / "datasets")
    rows_named(read_spec(str(SPEC)), args.rows, "graphs")
    levels = list(itertools.product(args.evidence, args.correlation))
    for evidence, correlation in tqdm(levels, "scenes", disable=None):
        make_scenes(evidence, correlation, args, folder)
    in_new_process(make_network, args.evidence, args.epochs, folder)
    for evidence, correlation in tqdm(levels, "features", disable=None):
        in_new_process(make_features, scenes_name(evidence, correlation), folder)
    seeds = range(1, args.seeds + 1)
    cells = list(itertools.product(args.evidence, args.correlation, args.images, seeds))
    done = read_results(folder)
    todo = {}
    for cell in itertools.starmap(Cell, cells):
        wanted = [BASELINE, *[INDEPENDENT] * (cell.correlation > 0), *args.rows]
        if missing := [row for row in wanted if row not in done.get(cell, {})]:
            todo[cell] = missing
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit=" cells") as progress:
        settings = folder, args.steps, args.aside
        futures = {
            pool.submit(in_new_process, run_cell, cell, rows, *settings): cell
            for cell, rows in todo.items()
        }
        for future in as_completed(futures):
            result = {**futures[future]._asdict(), "mAP": future.result()}
            append_line(results_file(folder), json.dumps(result))
            progress.update()
    results = {cell: maps for cell, maps in read_results(folder).items() if cell in cells}
    for images in args.images:
        yield make_table(results, images)
    path = str(folder / "label_evidence.png")
    save_png(draw_map(results), path, dpi=150)
    print(path, file=sys.stderr)


def make_scenes(evidence: float, correlation: float, args, folder: Path) -> None:
    """The scenes of a level, where they are not there yet."""
    command = [
        sys.executable,
        ROOT / "datasets/prepare_digit_scenes.py",
        "--root",
        folder / "datasets",
    ]
    command += ["--evidence", evidence, "--correlation", correlation]
    # The last three eighths of the training scenes are for heads.
    command += ["--train", -(-8 * (max(args.images) + args.aside) // 3), "--val", args.val]
    (folder / "datasets").mkdir(parents=True, exist_ok=True)
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def network_opts(spec: Spec) -> Dict:
    return {**spec.opts, **spec.network.opts}


def make_network(evidence: List[float], epochs: int, folder: Path) -> None:
    """Train the network, and compute its label embeddings, where they are not there yet."""
    start, spec = Start(folder), read_spec(str(SPEC))
    if start.label_embeddings.exists():
        return
    opts = {
        **network_opts(spec),
        "DATASETS.TRAIN": [f"{scenes_name(e, 0.0)}_train_a" for e in evidence],
        "DATASETS.TEST": [f"{scenes_name(evidence[0], 0.0)}_val"],
        "SOLVER.MAX_EPOCHS": epochs,
        "TEST.EVAL_EPOCHS": epochs,
        "OUTPUT_DIR": str(start.checkpoint.parent),
    }
    start.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    path = start.checkpoint.parent / "stdout.txt"
    with open(path, "a") as log, redirect_stdout(log), redirect_stderr(log):
        cfg = setup_cfg(str(ROOT / spec.network.config), as_list(opts, folder))
        train_network(cfg)
        write_label_embeddings(cfg, cfg.DATASETS.TRAIN[0], start)


def make_features(scenes: str, folder: Path) -> None:
    """The network's features of a cell's scenes, where they are not there yet."""
    start, spec = Start(folder), read_spec(str(SPEC))
    names = [name for name in parts_of(scenes) if not start.features(name).exists()]
    if not names:
        return
    opts = {**network_opts(spec), "DATASETS.TRAIN": names, "DATASETS.TEST": []}
    cfg = setup_cfg(str(ROOT / spec.network.config), as_list(opts, folder))
    model = build_model(cfg)
    MultiLabelCheckpointer(model, label_names=get_label_names(names)).load(str(start.checkpoint))
    for name in names:
        extract_features(model, feature_loader(cfg, name), ["res5"]).save(str(start.features(name)))


def run_cell(
    cell: Cell, rows: List[str], folder: Path, steps: int, num_aside: int
) -> Dict[str, float]:
    """mAP of rows in percent and, with the linear head, of what is made of its logits."""
    torch.set_num_threads(1)
    start, spec = Start(folder), read_spec(str(SPEC))
    train_name, test_name = parts_of(cell.scenes)
    everything, test = (
        FrozenFeatures.load(str(start.features(n))) for n in (train_name, test_name)
    )
    train, aside = everything.pick(slice(cell.images)), everything.pick(slice(-num_aside, None))
    dicts = get_multilabel_dicts([train_name])[: cell.images]
    targets = test.targets.numpy().astype(np.int8)
    found = {}
    path = folder / "datasets" / cell.scenes / "prior.npz"
    if INDEPENDENT in rows:
        name, _ = parts_of(scenes_name(cell.evidence, 0.0))
        others = FrozenFeatures.load(str(start.features(name))).pick(slice(cell.images))
        cfg = row_cfg(
            rows_named(spec, [BASELINE], "graphs")[0], spec, cell.seed, name, steps, folder
        )
        heads, _ = train_on_features(cfg, others, get_multilabel_dicts([name])[: cell.images])
        # Labels are as frequent as they are in the cell's training images.
        here, there = (LabelSets.of_targets(x.targets.numpy()).log_odds() for x in (train, others))
        shift = torch.from_numpy(here - there)
        logits, aside_logits = (heads.predict(images) + shift for images in (test, aside))
        found[INDEPENDENT] = mean_ap(logits.double().sigmoid().numpy(), targets)
        scored = ScoredImages(aside_logits, aside.targets.numpy())
        worth = with_labels(train.targets.numpy(), scored, logits, targets, path)
        found.update({INDEPENDENT_PRIOR: worth[PRIOR], INDEPENDENT_EXACT: worth[EXACT]})
    for row in rows_named(spec, [row for row in rows if row != INDEPENDENT], "graphs"):
        cfg = row_cfg(row, spec, cell.seed, train_name, steps, folder)
        heads, _ = train_on_features(cfg, train, dicts)
        logits = heads.predict(test)
        found[row.name] = mean_ap(logits.double().sigmoid().numpy(), targets)
        if row.name == BASELINE:
            scored = ScoredImages(heads.predict(aside), aside.targets.numpy())
            found.update(with_labels(train.targets.numpy(), scored, logits, targets, path))
    return found


def row_cfg(
    row: Row, spec: Spec, seed: int, train_name: str, steps: int, folder: Path, **loss
) -> CfgNode:
    """The config of a head that is trained on frozen features for so many steps.

    Args:
        loss: keys below MODEL.LOSS.
    """
    opts = {
        **spec.opts,
        **spec.modes["heads"],
        **row.opts,
        **{f"MODEL.LOSS.{key}": value for key, value in loss.items()},
        "SEED": seed,
        "DATASETS.TRAIN": [train_name],
        "DATASETS.TEST": [train_name],
        "SOLVER.MAX_EPOCHS": 0,
        "SOLVER.MAX_ITER": steps,
        "OUTPUT_DIR": str(folder / "runs"),
    }
    return setup_cfg(str(ROOT / row.config), as_list(opts, folder))


def mean_ap(scores: np.ndarray, targets: np.ndarray) -> float:
    return multi_label_metrics(scores, targets)["mAP"]


def with_labels(
    train: np.ndarray,
    scored: ScoredImages,
    logits: torch.Tensor,
    targets: np.ndarray,
    exact_prior: Path,
) -> Dict[str, float]:
    """mAP with the fitted and the exact prior, and with the true other labels."""
    prior = fit_label_prior(LabelSets.of_targets(train), scored).prior
    fitted = posterior_logits(prior, logits).double().sigmoid().numpy()
    with np.load(exact_prior) as exact:
        sets, chances = exact["label_sets"], exact["probabilities"]
    result = {PRIOR: mean_ap(fitted, targets)}
    for name, others in ((EXACT, False), (CEILING, True)):
        scale = best_scale(sets, chances, scored, others)
        known = targets if others else None
        found = exact_posterior(sets, chances, logits.double().numpy(), scale, known)
        result[name] = mean_ap(1 / (1 + np.exp(-found)), targets)
    return result


def exact_posterior(
    sets: np.ndarray,
    chances: np.ndarray,
    logits: np.ndarray,
    scale: Tuple[float, float],
    targets: np.ndarray | None,
) -> np.ndarray:
    """Log-odds of each label, (n, C), given its evidence and that of all others, or their truth.

    Args:
        sets, chances: all sets of labels (S, C) bool, and their chances (S,).
        logits: z, (n, C).
        scale: log T and c of the evidence z / T + c - λ, with λ of the labels' frequencies.
        targets: (n, C) in {1, 0}: the truth; None: evidence alone.
    """
    frequency = chances @ sets
    log_odds = np.log(frequency) - np.log1p(-frequency)
    evidence = logits / np.exp(scale[0]) + scale[1] - log_odds
    if targets is None:
        # Of each set, Σ of its labels' evidence.
        joint = evidence @ sets.T + np.log(chances)
        joint = np.exp(joint - joint.max(axis=1, keepdims=True))
        present = joint @ sets
        absent = joint.sum(axis=1, keepdims=True) - present
        return np.log(np.maximum(present, 1e-300)) - np.log(np.maximum(absent, 1e-300))
    places = {tuple(row): i for i, row in enumerate(sets.tolist())}
    result = np.empty(logits.shape)
    for i, row in enumerate(targets > 0):
        for label in range(len(row)):
            both = [[*row[:label], value, *row[label + 1 :]] for value in (True, False)]
            one, other = (chances[places[tuple(map(bool, values))]] for values in both)
            result[i, label] = np.log(one) - np.log(other)
    return evidence + result


def best_scale(sets, chances, scored: ScoredImages, others: bool) -> Tuple[float, float]:
    """log T and c of least BCE on images that are set aside."""
    logits, targets = scored.logits.double().numpy(), scored.targets
    prior = exact_posterior(sets, chances, 0 * logits, (0.0, 0.0), targets) if others else None

    def cost(scale) -> float:
        found = exact_posterior(sets, chances, logits, scale, None)
        if others:
            # What is known does not depend on the scale.
            found = prior + logits / np.exp(scale[0]) + scale[1]
        return float((np.logaddexp(0, found) - targets * found).mean())

    return tuple(minimize(cost, (0.0, 0.0), method="Nelder-Mead").x)


def results_file(folder: Path) -> Path:
    return folder / "results.jsonl"


def read_results(folder: Path) -> Dict[Cell, Dict[str, float]]:
    path = results_file(folder)
    results: Dict[Cell, Dict[str, float]] = {}
    for line in map(json.loads, read_lines(path)) if path.exists() else ():
        cell = Cell(*(line[name] for name in Cell._fields))
        results.setdefault(cell, {}).update(line["mAP"])
    return results


def make_table(results: Dict[Cell, Dict[str, float]], images: int) -> Table:
    """A row for each level of evidence and correlation: the linear head, and what is above it."""
    rows = []
    names = dict.fromkeys(name for maps in results.values() for name in maps)
    levels = sorted({cell[:2] for cell in results}, key=lambda level: (-level[0], level[1]))
    for level in levels:
        maps = [m for cell, m in results.items() if cell[:2] == level and cell.images == images]
        gains = {
            name: spread([m[name] - m[BASELINE] * (name != BASELINE) for m in maps if name in m])
            for name in names
            if any(name in m for m in maps)
        }
        rows.append({"name": f"evidence {level[0]:g}, correlation {level[1]:g}", **gains})
    return Table(
        f"mAP of the linear head and what is gained over it, {images} training images", rows
    )


def draw_map(results: Dict[Cell, Dict[str, float]]) -> Figure:
    """What is gained over a linear head: by label graphs, priors, and the true labels."""
    sizes = sorted({cell.images for cell in results})
    evidence = sorted({cell.evidence for cell in results}, reverse=True)
    correlation = sorted({cell.correlation for cell in results})
    kinds = {
        "the best of ML-GCN,\nML-AGCN and IA-GCN": lambda m: (
            max((m[graph] for graph in GRAPHS if graph in m), default=np.nan) - m[BASELINE]
        ),
        "a prior that is trained\nwith known labels": lambda m: m.get(KNOWN, np.nan) - m[BASELINE],
        "a label prior on a head\nthat saw independent labels": lambda m: (
            m[INDEPENDENT_PRIOR] - m[INDEPENDENT] if INDEPENDENT in m else 0.0
        ),
        "the true other labels": lambda m: m[CEILING] - m[BASELINE],
    }
    figure = Figure(figsize=(3 * len(kinds) + 0.6, 2.6 * len(sizes) + 0.4), layout="constrained")
    panels = figure.subplots(len(sizes), len(kinds), squeeze=False)
    for (row, images), (column, (title, get)) in itertools.product(
        enumerate(sizes), enumerate(kinds.items())
    ):
        gains = np.zeros((len(evidence), len(correlation)))
        for i, j in np.ndindex(gains.shape):
            place = evidence[i], correlation[j], images
            found = [get(m) for cell, m in results.items() if cell[:3] == place]
            gains[i, j] = np.mean(found)
        axes = panels[row, column]
        image = axes.imshow(gains, cmap="RdBu", vmin=-MOST, vmax=MOST)
        for (i, j), gain in np.ndenumerate(gains):
            colour = "white" if abs(gain) > 0.6 * MOST else "black"
            axes.text(j, i, f"{gain:+.1f}", ha="center", va="center", color=colour, size=8)
        axes.set(xticks=range(len(correlation)), xticklabels=[f"{r:g}" for r in correlation])
        axes.set(yticks=range(len(evidence)), yticklabels=[f"{e:g}" for e in evidence])
        if row == 0:
            axes.set_title(title, size=10)
        if row == len(sizes) - 1:
            axes.set_xlabel("what labels say of each other")
        if column == 0:
            axes.set_ylabel(f"{images} images\nwhat an image says")
    figure.colorbar(image, ax=panels, label="points of mAP gained", fraction=0.02)
    return figure


def shares(text: str) -> List[float]:
    """An argparse type: numbers in [0, 1] with commas between them."""
    found = [float(number) for number in text.split(",")]
    if not all(0 <= number <= 1 for number in found):
        raise argparse.ArgumentTypeError(f"{text}: not all are in [0, 1]")
    return found


def add_label_evidence(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "label-evidence",
        help="when a label graph is worth its cost (hours)",
        description=inspect.getdoc(run_label_evidence),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_label_evidence)
    parser.add_argument("--folder", default="output/label_evidence", help="(%(default)s)")
    parser.add_argument("--evidence", type=shares, default=[1.0, 0.5, 0.25], help="(1,0.5,0.25)")
    parser.add_argument("--correlation", type=shares, default=[0.0, 0.5, 1.0], help="(0,0.5,1)")
    parser.add_argument(
        "--images", type=positive_numbers, default=[300, 2500], help="to train on (300,2500)"
    )
    parser.add_argument("--seeds", type=positive, default=3, help="how many (3)")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[row.name for row in read_spec(str(SPEC)).tables["graphs"].rows][1:],
        help="of the table graphs in configs/ablations/digit_scenes.yaml, beside the linear head",
    )
    parser.add_argument("--steps", type=positive, default=900, help="of a head's training (900)")
    parser.add_argument("--epochs", type=positive, default=7, help="of the network's (7)")
    parser.add_argument("--aside", type=positive, default=500, help="images to choose on (500)")
    parser.add_argument("--val", type=positive, default=2000, help="images to measure on (2000)")
    parser.add_argument("--jobs", type=positive, default=2, help="at once (2)")
