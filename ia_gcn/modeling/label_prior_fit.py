"""Fitting label priors: from labels alone, and how much they count from logits and labels.

n, C and K are the numbers of images, labels and themes or neighbours.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from scipy.optimize import minimize

from ..errors import InputError
from .label_prior import MOST_LABELS, LabelPrior, PairwisePrior, ThemePrior

# With more than MOST_LABELS labels, each is regressed on so many others. Of the sets without the
# label that have some of these, MOST_ABSENT are drawn, or twice as many as have it.
NUM_NEIGHBORS = 32
MOST_ABSENT = 1000

# What `choose_prior` tries, in order, as long as it gets better.
L2_WEIGHTS = (10.0, 3.0, 1.0, 0.3, 0.1)
NUM_THEMES = (4, 8, 16, 32, 64, 128, 256)
HELD_OUT = 0.2
FEWEST_IMAGES = 10

# Of EM: pseudo-images of the labels' frequencies in each theme, the most steps, and the gain per
# image in nats at which it ends.
THEME_SMOOTHING = 2.0
EM_STEPS = 200
EM_TOLERANCE = 1e-5

# Of L-BFGS.
MOST_STEPS = 200

# Numbers that are held at once: some tens of megabytes.
NUMBERS_AT_ONCE = 8_000_000
# A choice by held-out labels looks at no more entries.
MOST_ENTRIES = 2_000_000
# `calibrate` measures as many images as take so many numbers. It has three values to find.
MOST_NUMBERS = 16_000_000


class LabelSets(NamedTuple):
    """The different sets of labels of some images, whose order does not matter."""

    present: sparse.csr_matrix
    """(n, C) float32, of ones."""
    known: sparse.csr_matrix | None
    """(n, C) float32, ones where a label is known to be present or absent. None: everywhere."""
    counts: np.ndarray
    """(n,) float32, how many images have a set."""

    @classmethod
    def of(cls, present: sparse.spmatrix, known: sparse.spmatrix | None = None) -> LabelSets:
        """Of images, which labels are `present` and, if not all are, which are `known`, (n, C)."""
        parts = [sparse.csr_matrix(p, dtype=np.float32) for p in (present, known) if p is not None]
        for part in parts:
            part.sort_indices()
        images: Dict[Tuple[bytes, ...], List[int]] = {}
        for i in range(present.shape[0]):
            key = tuple(p.indices[p.indptr[i] : p.indptr[i + 1]].tobytes() for p in parts)
            images.setdefault(key, []).append(i)
        keys = sorted(images)
        first = np.array([images[key][0] for key in keys], np.int64)
        counts = np.array([len(images[key]) for key in keys], np.float32)
        return cls(parts[0][first], parts[1][first] if len(parts) > 1 else None, counts)

    @classmethod
    def of_targets(cls, targets: np.ndarray) -> LabelSets:
        """Of targets (n, C) in {1, 0, -1 = unknown}."""
        known = None if (targets >= 0).all() else sparse.csr_matrix(targets >= 0)
        return cls.of(sparse.csr_matrix(targets == 1), known)

    @property
    def num_labels(self) -> int:
        """C."""
        return self.present.shape[1]

    def pick(self, rows: np.ndarray, counts: np.ndarray | None = None) -> LabelSets:
        """Some sets, by indices or a mask, with their counts or others."""
        known = None if self.known is None else self.known[rows]
        return LabelSets(self.present[rows], known, self.counts[rows] if counts is None else counts)

    def split(self, share: float, seed: int = 0) -> Tuple[LabelSets, LabelSets]:
        """Two parts, of which the second has about a share of the images."""
        drawn = np.random.RandomState(seed).binomial(self.counts.astype(np.int64), share)
        parts = self.counts - drawn, drawn.astype(np.float32)
        return tuple(self.pick(part > 0, part[part > 0]) for part in parts)

    def targets(self, columns: np.ndarray | None = None) -> np.ndarray:
        """(n, C) float32 in {1, 0, -1 = unknown}, or some columns of it."""
        parts = [p if columns is None or p is None else p[:, columns] for p in self[:2]]
        present = parts[0].toarray()
        return present if parts[1] is None else np.where(parts[1].toarray() > 0, present, -1)

    def images_of_labels(self) -> Tuple[np.ndarray, np.ndarray]:
        """Of each label, (C,): the images that have it, and those of which it is known."""
        present = self.present.T @ self.counts.astype(np.float64)
        if self.known is None:
            return present, np.full(present.shape, self.counts.sum(dtype=np.float64))
        return present, self.known.T @ self.counts.astype(np.float64)

    def log_odds(self) -> np.ndarray:
        """λ (C,) float32, of the labels' frequencies; half an image is added on both sides."""
        present, known = self.images_of_labels()
        return np.log((present + 0.5) / (known - present + 0.5)).astype(np.float32)


def fit_pairwise(
    labels: LabelSets, l2_weight: float = 1.0, num_neighbors: int | None = None
) -> PairwisePrior:
    """A `PairwisePrior`, each of whose regressions is fitted by itself (pseudo-likelihood).

    A label that is unknown is left out as the one that is regressed, and has its frequency as one
    of the others.

    Args:
        labels: of the training images.
        l2_weight: of half the sum of the squared weights, beside the sum of the images' losses.
        num_neighbors: how many others a label is regressed on, those that tell most of it; 0: all;
            None: all, or NUM_NEIGHBORS where there are more than MOST_LABELS labels.
    """
    if num_neighbors is None:
        num_neighbors = NUM_NEIGHBORS if labels.num_labels > MOST_LABELS else 0
    if num_neighbors:
        return _fit_to_neighbors(labels, l2_weight, num_neighbors)
    prior = PairwisePrior(num_labels=labels.num_labels)
    prior.log_odds.copy_(torch.from_numpy(labels.log_odds()))
    # In float64, where the last steps still count.
    targets = torch.from_numpy(labels.targets()).double()
    inputs = _centred(targets, prior.log_odds.double().sigmoid())
    weights = torch.from_numpy(labels.counts)[:, None] * (targets >= 0).double()
    others = 1 - torch.eye(labels.num_labels)

    def regress(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return inputs @ (weight * others).T + bias

    squares = weights.T @ inputs.square()
    log_odds = prior.log_odds.double()
    weight, bias = _minimize(regress, squares, log_odds, targets, weights, l2_weight)
    prior.weight.data.copy_(weight * others)
    prior.bias.data.copy_(bias)
    return prior.requires_grad_(False)


def _fit_to_neighbors(labels: LabelSets, l2_weight: float, num_neighbors: int) -> PairwisePrior:
    neighbors = strongest_neighbors(labels, num_neighbors)
    prior = PairwisePrior(num_labels=labels.num_labels, num_neighbors=num_neighbors)
    prior.log_odds.copy_(torch.from_numpy(labels.log_odds()))
    prior.neighbors.copy_(torch.from_numpy(neighbors))
    frequency = prior.log_odds.sigmoid()
    for block in _blocks_of_rows(_rows_of_labels(labels, neighbors), num_neighbors):
        longest = max(len(counts) for _, (_, counts) in block)
        inputs = torch.zeros(len(block), longest, num_neighbors)
        targets, weights = torch.zeros(2, len(block), longest)
        for i, (label, (rows, counts)) in enumerate(block):
            # The entries behind these have no weight.
            size = len(rows)
            columns = np.append(neighbors[label], label)
            values = torch.from_numpy(labels.pick(rows).targets(columns))
            inputs[i, :size] = _centred(values[:, :-1], frequency[neighbors[label]])
            targets[i, :size] = values[:, -1]
            weights[i, :size] = torch.from_numpy(counts)

        def regress(weight: torch.Tensor, bias: torch.Tensor, inputs=inputs) -> torch.Tensor:
            return (inputs @ weight[:, :, None] + bias[:, None, None])[:, :, 0]

        places = [label for label, _ in block]
        squares = (weights[:, None] @ inputs.square())[:, 0]
        log_odds = prior.log_odds[places]
        weight, bias = _minimize(regress, squares, log_odds, targets, weights, l2_weight)
        prior.weight.data[places], prior.bias.data[places] = weight, bias
    return prior.requires_grad_(False)


def _rows_of_labels(
    labels: LabelSets, neighbors: np.ndarray
) -> List[Tuple[np.ndarray, np.ndarray]]:
    """Of each label the sets that tell something of its regression, and their weights.

    These are the sets that have the label; of those that don't, some that have a neighbour, with
    the weight of all of these; and one for all the others, which are the same to the regression.
    """
    present, known = labels.present.tocsc(), labels.known
    known = None if known is None else known.tocsc()
    rows = []
    for label in range(labels.num_labels):
        has = _column(present, label)
        is_absent = np.full(present.shape[0], known is None)
        if known is not None:
            is_absent[_column(known, label)] = True
        is_absent[has] = False
        has_neighbor = np.zeros(present.shape[0], bool)
        for neighbor in neighbors[label]:
            has_neighbor[_column(present if known is None else known, neighbor)] = True
        lacks = np.flatnonzero(is_absent & has_neighbor)
        others = np.flatnonzero(is_absent & ~has_neighbor)
        drawn = lacks
        most = max(MOST_ABSENT, 2 * len(has))
        if len(lacks) > most:
            drawn = lacks[np.random.RandomState(label).randint(len(lacks), size=most)]
        scale = labels.counts[lacks].sum() / max(labels.counts[drawn].sum(), 1)
        rest = labels.counts[others].sum(keepdims=True)[: len(others)]
        counts = np.concatenate([labels.counts[has], labels.counts[drawn] * scale, rest])
        rows.append((np.concatenate([has, drawn, others[:1]]), counts))
    return rows


def _column(matrix: sparse.csc_matrix, column: int) -> np.ndarray:
    """The rows in which a column has an entry."""
    return matrix.indices[matrix.indptr[column] : matrix.indptr[column + 1]]


def _blocks_of_rows(
    rows: Sequence[Tuple[np.ndarray, np.ndarray]], num_neighbors: int
) -> Iterator[List[Tuple[int, Tuple[np.ndarray, np.ndarray]]]]:
    """Labels with about as many rows, as many at once as NUMBERS_AT_ONCE allows."""
    order = sorted(enumerate(rows), key=lambda item: -len(item[1][1]))
    while order:
        size = max(1, NUMBERS_AT_ONCE // max(1, len(order[0][1][1]) * num_neighbors))
        yield order[:size]
        order = order[size:]


def strongest_neighbors(labels: LabelSets, count: int) -> np.ndarray:
    """Of each label the others that tell most of it, (C, count) int64, sorted.

    By their mutual information, times the images of which both are known.

    Args:
        count: less than C.
    """
    present, num_labels = labels.present, labels.num_labels
    of_present, of_known = labels.images_of_labels()
    scaled = sparse.diags(labels.counts.astype(np.float64))
    present_t = (present.T @ scaled).tocsr()
    known_t = None if labels.known is None else (labels.known.T @ scaled).tocsr()
    neighbors = np.empty((num_labels, count), np.int64)
    step = max(1, NUMBERS_AT_ONCE // (8 * num_labels))
    for start in range(0, num_labels, step):
        rows = slice(start, start + step)
        both = (present_t[rows] @ present).toarray()
        if known_t is None:
            one, other, total = of_present[rows, None], of_present, of_known
        else:
            one = (present_t[rows] @ labels.known).toarray()
            other = (known_t[rows] @ present).toarray()
            total = (known_t[rows] @ labels.known).toarray()
        information = _mutual_information(both, one, other, total)
        here = np.arange(len(both))
        information[here, here + start] = -1
        strongest = np.argpartition(-information, count - 1, axis=1)[:, :count]
        neighbors[rows] = np.sort(strongest, axis=1)
    return neighbors


def _mutual_information(both, one, other, total) -> np.ndarray:
    """Of two labels, times the images, from the numbers that have both, one and the other."""
    information = np.zeros(np.broadcast_shapes(both.shape, np.shape(total)))
    for joint, first, second in (
        (both, one, other),
        (one - both, one, total - other),
        (other - both, total - one, other),
        (total - one - other + both, total - one, total - other),
    ):
        expected = first * second / np.maximum(total, 1)
        # 0 log 0 = 0.
        ratio = np.divide(joint, expected, out=np.ones_like(information), where=joint > 0.5)
        information += joint * np.log(ratio)
    return information


def _centred(targets: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """y - p, and 0 where a label is unknown."""
    return torch.where(targets >= 0, targets - frequency, 0)


def _minimize(
    regress: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    squares: torch.Tensor,
    log_odds: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    l2_weight: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases of logistic regressions that don't depend on each other, by L-BFGS.

    Args:
        regress: weights and biases to the targets' logits.
        squares: of each weight's input, the weighted sum over the images.
        log_odds: of each regression, which its bias starts from.
        targets: in {1, 0}, or -1, without weight.
        weights: of the images.
        l2_weight: see `fit_pairwise`.
    """
    targets = targets.clamp(min=0)
    # All in the same steps: in units in which the loss is about equally curved.
    chance = log_odds.sigmoid()
    variance = chance * (1 - chance)
    unit = (variance[:, None] * squares + l2_weight).rsqrt()
    bias_unit = (variance * weights.sum() / len(log_odds)).clamp(min=1e-3).rsqrt()
    weight, bias = torch.zeros_like(unit), log_odds / bias_unit
    weight.requires_grad_(), bias.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MOST_STEPS,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        values = weight * unit
        losses = F.binary_cross_entropy_with_logits(
            regress(values, bias * bias_unit), targets, weights, reduction="sum"
        )
        value = losses + l2_weight / 2 * values.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (weight * unit).detach(), (bias * bias_unit).detach()


def fit_themes(labels: LabelSets, num_themes: int, seed: int = 0) -> ThemePrior:
    """A `ThemePrior`, fitted by expectation maximisation.

    Labels that are unknown are left out. Each theme has THEME_SMOOTHING images more than it has, in
    which the labels are as frequent as in all.

    Args:
        labels: of the training images.
        num_themes: K.
        seed: of the themes that it starts from.
    """
    prior = ThemePrior(num_labels=labels.num_labels, num_themes=num_themes)
    prior.log_odds.copy_(torch.from_numpy(labels.log_odds()))
    frequency = prior.log_odds.sigmoid().numpy()
    random = np.random.RandomState(seed)
    themes, likelihood = None, -np.inf
    for _ in range(EM_STEPS):
        before, (themes, likelihood) = likelihood, _em_step(labels, themes, num_themes, random)
        sizes, present, known = themes
        theta = (present + THEME_SMOOTHING * frequency) / (known + THEME_SMOOTHING)
        theta = theta.clip(1e-7, 1 - 1e-7).astype(np.float32)
        log_sizes = np.log((sizes + 1) / (sizes.sum() + num_themes)).astype(np.float32)
        themes = log_sizes, np.log(theta), np.log1p(-theta)
        if likelihood - before < EM_TOLERANCE * labels.counts.sum():
            break
    log_sizes, log_present, log_absent = themes
    prior.theme_logits.data.copy_(torch.from_numpy(log_sizes))
    prior.label_logits.data.copy_(torch.from_numpy(log_present - log_absent))
    return prior.requires_grad_(False)


def _em_step(
    labels: LabelSets,
    themes: Tuple[np.ndarray, np.ndarray, np.ndarray] | None,
    num_themes: int,
    random: np.random.RandomState,
) -> Tuple[Tuple[np.ndarray, np.ndarray, np.ndarray], float]:
    """The images of each theme (K,), those of them that have a label (K, C), and those of which it
    is known (K, C) or (K, 1); and the log-likelihood of all images.

    Args:
        themes: log π (K,), log θ and log (1 - θ) (K, C); None: images are of themes at random.
    """
    sizes = np.zeros(num_themes)
    present = np.zeros((num_themes, labels.num_labels))
    known = np.zeros_like(present) if labels.known is not None else None
    likelihood = -np.inf if themes is None else 0.0
    step = max(1, NUMBERS_AT_ONCE // num_themes)
    for start in range(0, len(labels.counts), step):
        part = labels.pick(slice(start, start + step))
        if themes is None:
            shares = random.dirichlet(np.full(num_themes, 0.5), len(part.counts))
        else:
            log_sizes, log_present, log_absent = themes
            joint = log_sizes + part.present @ (log_present - log_absent).T
            joint += log_absent.sum(axis=1) if known is None else part.known @ log_absent.T
            highest = joint.max(axis=1, keepdims=True)
            shares = np.exp(joint - highest)
            totals = shares.sum(axis=1, keepdims=True)
            shares /= totals
            likelihood += float(part.counts @ (highest + np.log(totals))[:, 0])
        shares = (part.counts[:, None] * shares).astype(np.float32)
        sizes += shares.sum(axis=0)
        present += (part.present.T @ shares).T
        if known is not None:
            known += (part.known.T @ shares).T
    return (sizes, present, sizes[:, None] if known is None else known), likelihood


class Candidate(NamedTuple):
    """A prior that was tried."""

    kind: str
    """PairwisePrior or ThemePrior; "" for the labels' frequencies alone."""
    setting: float
    """The L2 weight, or the number of themes."""
    loss: float
    """BCE of each label given all others, mean over held-out labels, in nats."""


FITS = {"PairwisePrior": (fit_pairwise, L2_WEIGHTS), "ThemePrior": (fit_themes, NUM_THEMES)}


def choose_prior(
    labels: LabelSets, kinds: Sequence[str] = tuple(FITS)
) -> Tuple[LabelPrior, List[Candidate]]:
    """The prior of some kinds that says most of held-out labels, fitted to all of them.

    Args:
        labels: of the training images.
        kinds: PairwisePrior, ThemePrior.
    Returns:
        it, and all that were tried, the labels' frequencies first.
    Raises:
        InputError: there are fewer than FEWEST_IMAGES images, or labels.
    """
    count = int(labels.counts.sum())
    if count < FEWEST_IMAGES or labels.num_labels < 2:
        raise InputError(
            f"a label prior takes {FEWEST_IMAGES} images and 2 labels at least, and there are "
            f"{count} and {labels.num_labels}"
        )
    fitted, held_out = labels.split(HELD_OUT)
    entries = held_out.counts.sum() * labels.num_labels
    if entries > MOST_ENTRIES:
        _, held_out = held_out.split(MOST_ENTRIES / entries)
    candidates = [Candidate("", 0, frequency_loss(fitted, held_out))]
    for kind in kinds:
        fit, settings = FITS[kind]
        best = np.inf
        for setting in settings:
            loss = label_loss(fit(fitted, setting), held_out)
            candidates.append(Candidate(kind, setting, loss))
            if loss > best:
                break
            best = loss
    best = min(candidates[1:], key=lambda candidate: candidate.loss)
    return FITS[best.kind][0](labels, best.setting), candidates


def frequency_loss(labels: LabelSets, held_out: LabelSets) -> float:
    """What `label_loss` is of a prior that knows the labels' frequencies alone."""
    log_odds = labels.log_odds().astype(np.float64)
    present, known = held_out.images_of_labels()
    costs = known * np.logaddexp(0, log_odds) - present * log_odds
    return float(costs.sum() / known.sum())


@torch.no_grad()
def label_loss(prior: LabelPrior, labels: LabelSets) -> float:
    """BCE of each label given all others of its image, mean over known labels, in nats."""
    cost = total = 0.0
    for rows in batches(prior, len(labels.counts)):
        part = labels.pick(rows)
        states = torch.from_numpy(part.targets())
        scores = prior.posterior(prior.log_odds.expand_as(states), states)
        weights = torch.from_numpy(part.counts)[:, None] * (states >= 0)
        cost += float(
            F.binary_cross_entropy_with_logits(
                scores, states.clamp(min=0), weights, reduction="sum"
            )
        )
        total += float(weights.sum())
    return cost / total


def batches(prior: LabelPrior, num_images: int) -> Iterator[slice]:
    """Slices of images that a prior can take at once."""
    size = max(1, NUMBERS_AT_ONCE // prior.numbers_per_image)
    for start in range(0, num_images, size):
        yield slice(start, start + size)


def calibrate(prior: LabelPrior, logits: torch.Tensor, targets: torch.Tensor) -> None:
    """Set a prior's temperature T, offset c and strength α, in [0, 1], to those of least BCE.

    Where α > 0 is no better than T and c alone, α becomes 0, which leaves logits as they are while
    no label is known. T and c are then those of least BCE with half of the labels known.

    Args:
        logits: (n, C), of images that neither the recogniser nor the prior was trained on.
        targets: (n, C) in {1, 0, -1 = ignored}.
    Raises:
        InputError: all of them are ignored.
    """
    if not (targets >= 0).any():
        raise InputError("no label of the images to choose a label prior's strength on is known")
    # Some images at random, whatever their order.
    order = np.random.RandomState(0).permutation(np.lexsort(logits.T.numpy()))
    order = torch.from_numpy(order[: max(1, MOST_NUMBERS // prior.numbers_per_image)])
    logits, targets = logits[order].float(), targets[order].float()
    # In evaluation, logits without a strength come back as they are.
    was_training, hidden = prior.training, prior.hidden_evidence
    prior.train()
    prior.hidden_evidence = 0.0
    limits = [(-2, 4), (-5, 5)]
    alone = _least_cost(prior, logits, targets, None, (0, 0, 0), [*limits, (0, 0)])
    best = _least_cost(prior, logits, targets, None, (*alone.x[:2], 0.5), [*limits, (0, 1)])
    if best.fun >= alone.fun or best.x[2] == 0:
        drawn = torch.rand(targets.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        states = targets.masked_fill(~drawn, -1)
        others = targets.masked_fill(drawn, -1)
        best = _least_cost(prior, logits, others, states, alone.x, [*limits, (0, 0)])
    prior.hidden_evidence = hidden
    prior.train(was_training)
    prior.temperature.fill_(float(np.exp(best.x[0])))
    prior.offset.fill_(float(best.x[1]))
    prior.strength.fill_(float(best.x[2]))


def _least_cost(
    prior: LabelPrior,
    logits: torch.Tensor,
    targets: torch.Tensor,
    states: torch.Tensor | None,
    start: Sequence[float],
    bounds: Sequence[Tuple[float, float]],
):
    """scipy's result for log T, c and α of least BCE."""
    parts = list(batches(prior, len(logits)))
    total = float((targets >= 0).sum())

    def cost(values: np.ndarray) -> Tuple[float, np.ndarray]:
        leaves = [torch.tensor(float(value), requires_grad=True) for value in values]
        log_temperature, offset, strength = leaves
        value, gradient = 0.0, np.zeros(3)
        for part in parts:
            scales = {"temperature": log_temperature.exp(), "offset": offset, "strength": strength}
            known = None if states is None else states[part]
            scores = torch.func.functional_call(prior, scales, (logits[part], known))
            loss = F.binary_cross_entropy_with_logits(
                scores, targets[part].clamp(min=0), (targets[part] >= 0).float(), reduction="sum"
            )
            value += loss.item()
            gradient += [float(g) for g in torch.autograd.grad(loss, leaves)]
        return value / total, gradient / total

    return minimize(cost, start, jac=True, bounds=bounds, tol=1e-7)


def fit_like(prior: LabelPrior, labels: LabelSets) -> LabelPrior:
    """A prior of the kind and size of another one, fitted to labels."""
    if isinstance(prior, ThemePrior):
        return fit_themes(labels, len(prior.theme_logits))
    num_neighbors = 0 if prior.neighbors is None else prior.neighbors.shape[1]
    return fit_pairwise(labels, num_neighbors=num_neighbors)


@torch.no_grad()
def posterior_logits(
    prior: LabelPrior, logits: torch.Tensor, label_states: torch.Tensor | None = None
) -> torch.Tensor:
    """A prior's output for any number of images, (n, C) float32, some at a time."""
    parts = []
    for part in batches(prior, len(logits)):
        parts.append(prior(logits[part], None if label_states is None else label_states[part]))
    return torch.cat(parts)
