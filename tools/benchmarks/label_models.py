"""Which model of the labels says most of those that are not known?"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import time
from typing import Callable, Dict, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ia_gcn.data import get_label_names, label_matrices
from ia_gcn.data.build import load_multilabel_dicts
from ia_gcn.data.datasets.custom import file_label_names, load_multilabel_file
from ia_gcn.errors import InputError
from ia_gcn.modeling.label_prior_fit import LabelSets, calibrate, choose_prior, posterior_logits

from .arguments import positive_numbers
from .known_labels import draw_states, mean_ap
from .measuring import Table

HELD_OUT, CALIBRATION, DRAWS = 3000, 1000, 3
# A pass over all held-out images for each label would take long.
WITH_ALL_OTHERS = 1000
MASKED_STEPS, CHOICES = 6000, 40
# Of the evidence: the distance of its two Gaussians, in deviations.
DISTANCE = 2.2
ALONE, THEMES, PAIRS, MASKED = "frequencies alone", "themes", "pairwise", "masked label model"
KINDS = {THEMES: "ThemePrior", PAIRS: "PairwisePrior"}


def run_label_models(args) -> Iterator[Table]:
    """What models of the labels alone say of labels that are not known, on label sets not fitted.

    BCE in nats of each label given all others. And mAP of the labels that are not known, for
    simulated images: Gaussian evidence of each label, independent given the labels. The masked
    label model is a network that is trained to tell hidden labels from the others and from such
    evidence; the steps of its training are chosen on a tenth of the label sets.
    """
    targets = read_targets(args.labels)
    order = np.random.RandomState(0).permutation(len(targets))
    held_out, rest = targets[order[:HELD_OUT]], targets[order[HELD_OUT:]]
    aside, rest = rest[:CALIBRATION], rest[CALIBRATION:]
    for count in args.images:
        if count > len(rest):
            raise InputError(f"{args.labels}: {len(rest)} images are left to fit, not {count}")
        labels = LabelSets.of_targets(rest[:count])
        log_odds = torch.from_numpy(labels.log_odds())
        rows = []
        for name in tqdm((ALONE, PAIRS, THEMES, MASKED), f"{count} images", disable=None):
            start = time.perf_counter()
            if name in KINDS:
                prior, _ = choose_prior(labels, [KINDS[name]])
                calibrate(prior, *map(torch.from_numpy, simulate(aside, log_odds.numpy(), 0)))
                model = prior_model(prior.eval())
            elif name == MASKED:
                model = masked_model(train_masked(rest[:count], log_odds, MASKED_STEPS), log_odds)
            else:
                model = lambda logits, states: logits  # noqa: E731
            seconds = time.perf_counter() - start
            row = measure(model, held_out, log_odds)
            rows.append({"name": name, **row, "fitted in s": f"{seconds:.0f}"})
        yield Table(f"models of the labels, fitted to {count} images", rows)


def read_targets(source: str) -> np.ndarray:
    """(n, C) int8 of 1 and 0, of a registered data set or a file of DATASETS.CUSTOM."""
    if os.path.exists(source):
        names = file_label_names(source)
        dicts = load_multilabel_file(source, "", names)
    else:
        dicts, names = load_multilabel_dicts(source), get_label_names([source])
    present, known = label_matrices(dicts, len(names))
    if known is not None:
        raise InputError(f"{source}: has unknown labels, which can't be measured")
    return present.toarray().astype(np.int8)


def simulate(targets: np.ndarray, log_odds: np.ndarray, seed: int):
    """Logits λ + u (n, C) float32 of evidence u, and the targets."""
    random = np.random.RandomState(seed)
    seen = random.randn(*targets.shape) + DISTANCE * (targets - 0.5)
    return (log_odds + DISTANCE * seen).astype(np.float32), targets


def measure(model: Callable, targets: np.ndarray, log_odds: torch.Tensor) -> Dict[str, str]:
    """BCE given all others, and mAP with none, half, and all other labels known."""
    truth = torch.from_numpy(targets)
    some = truth[:WITH_ALL_OTHERS]
    found = others(model, log_odds.expand(len(some), -1), some)
    nats = F.binary_cross_entropy_with_logits(found, some.float())
    maps: Dict[str, list] = {"none known": [], "half known": [], "all others known": []}
    unknown = torch.full_like(truth, -1)
    for seed in range(1, DRAWS + 1):
        logits = torch.from_numpy(simulate(targets, log_odds.numpy(), seed)[0])
        half = draw_states(targets, 0.5)
        maps["none known"].append(mean_ap(model(logits, unknown), targets, unknown))
        maps["half known"].append(mean_ap(model(logits, half), targets, half))
        found = others(model, logits[: len(some)], some)
        maps["all others known"].append(mean_ap(found, targets[: len(some)], unknown[: len(some)]))
    means = {name: f"{np.mean(values):.2f}" for name, values in maps.items()}
    return {"nats": f"{nats:.4f}", **means}


def others(model: Callable, logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Each label's posterior with all other labels known, (n, C)."""
    result = torch.empty_like(logits)
    for label in range(logits.shape[1]):
        states = truth.clone()
        states[:, label] = -1
        result[:, label] = model(logits, states)[:, label]
    return result


def prior_model(prior) -> Callable:
    return torch.no_grad()(lambda logits, states: posterior_logits(prior, logits, states))


class MaskedLabelModel(nn.Module):
    """Evidence and the states of known labels to what the others add to the evidence, (B, C)."""

    def __init__(self, num_labels: int, width: int = 512, depth: int = 2):
        super().__init__()
        self.first = nn.Linear(3 * num_labels, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1),
                nn.Linear(width, width),
            )
            for _ in range(depth)
        )  # fmt: skip
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_labels))

    def forward(self, evidence: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        unseen = evidence.masked_fill(states >= 0, 0).clamp(-10, 10) / 5
        x = self.first(torch.cat([(states == 1).float(), (states == 0).float(), unseen], dim=1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def masked_model(network: MaskedLabelModel, log_odds: torch.Tensor) -> Callable:
    @torch.no_grad()
    def model(logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        parts = zip(logits.split(2000), states.split(2000))
        return torch.cat([part + network(part - log_odds, s) for part, s in parts])

    return model


def train_masked(targets: np.ndarray, log_odds: torch.Tensor, steps: int) -> MaskedLabelModel:
    """With any share of labels known and evidence of any distance; the best step's network."""
    torch.manual_seed(0)
    everything = torch.from_numpy(targets.astype(np.float32))
    held_out, truth = everything.split([len(targets) // 10, len(targets) - len(targets) // 10])
    network = MaskedLabelModel(targets.shape[1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    generator = torch.Generator().manual_seed(0)
    best, best_state = math.inf, None
    for step in tqdm(range(1, steps + 1), "masked", leave=False, disable=None):
        batch = truth[torch.randint(len(truth), (256,), generator=generator)]
        loss = masked_loss(network.train(), batch, log_odds, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // CHOICES) == 0:
            with torch.no_grad():
                fixed = torch.Generator().manual_seed(1)
                cost = float(masked_loss(network.eval(), held_out, log_odds, fixed))
            if cost < best:
                best, best_state = cost, {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(best_state)
    return network.eval()


def masked_loss(network, truth: torch.Tensor, log_odds: torch.Tensor, generator) -> torch.Tensor:
    """BCE of the labels that are hidden, a random share of each image's."""
    share = torch.rand(len(truth), 1, generator=generator)
    hidden = torch.rand(truth.shape, generator=generator) < share
    # A third of the images says nothing.
    distance = 3 * torch.rand(len(truth), 1, generator=generator)
    distance = distance * (torch.rand(len(truth), 1, generator=generator) > 1 / 3)
    noise = torch.randn(truth.shape, generator=generator)
    evidence = distance * (noise + distance * (truth - 0.5))
    states = truth.masked_fill(hidden, -1)
    posterior = log_odds + evidence + network(evidence, states)
    return F.binary_cross_entropy_with_logits(posterior[hidden], truth[hidden])


def add_label_models(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "label-models",
        help="models of the labels alone: pairs, themes, a masked label model",
        description=inspect.getdoc(run_label_models),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_label_models)
    parser.add_argument("labels", help="a registered data set, or a .csv or .json")
    parser.add_argument(
        "--images", type=positive_numbers, default=[2000, 20000], help="to fit (2000,20000)"
    )
