"""What fitting a label prior takes, by the number of labels."""

from __future__ import annotations

import argparse
import inspect
from typing import Callable, Iterator

import numpy as np
from scipy import sparse

from ia_gcn.modeling.label_prior_fit import LabelSets, fit_pairwise, fit_themes

from .arguments import positive, positive_numbers
from .measuring import Table, measure_memory

LABELS_PER_IMAGE, THEMES = 4, 200


def run_prior_fit(args) -> Iterator[Table]:
    """Time and memory of fitting label priors to synthetic label sets, by the number of labels.

    The labels' frequencies fall as 1 / rank. Half of an image's labels are of its theme. Of each
    fit, the second in a process of its own is timed; its memory is beyond that of the label sets.
    Choosing a prior takes several fits of each kind, to most of the label sets.
    """
    for num_labels in args.labels:
        rows = []
        for name, fit in (("pairwise", fit_pairwise), ("64 themes", fit_64_themes)):
            found = measure_memory(args.threads, prepare_fit, fit, num_labels, args.images)
            seconds = {"s": f"{found['step_s']:.1f}"} if "step_s" in found else {}
            rows.append({"name": name, **seconds, **found})
        yield Table(f"fits to {args.images} images, {num_labels} labels", rows)


def fit_64_themes(labels: LabelSets):
    return fit_themes(labels, 64)


def prepare_fit(fit: Callable, num_labels: int, images: int) -> Callable:
    labels = LabelSets.of(synthetic_labels(num_labels, images))
    return lambda: fit(labels)


def synthetic_labels(num_labels: int, images: int) -> sparse.csr_matrix:
    """(n, C) ones."""
    random = np.random.RandomState(0)
    frequency = 1 / np.arange(1, num_labels + 1)
    frequency /= frequency.sum()
    of_theme = random.randint(num_labels, size=(THEMES, 12))
    themes = random.randint(THEMES, size=images)
    size = (images, LABELS_PER_IMAGE // 2)
    drawn = np.hstack(
        [
            random.choice(num_labels, size, p=frequency),
            of_theme[themes[:, None], random.randint(12, size=size)],
        ]
    )
    rows = np.repeat(np.arange(images), drawn.shape[1])
    found = sparse.csr_matrix(
        (np.ones(drawn.size, np.float32), (rows, drawn.ravel())), (images, num_labels)
    )
    # A label that is drawn twice is there once.
    found.data[:] = 1
    return found


def add_prior_fit(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "prior-fit",
        help="time and memory of fitting a label prior, by the number of labels",
        description=inspect.getdoc(run_prior_fit),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_prior_fit)
    parser.add_argument(
        "--labels", type=positive_numbers, default=[80, 500, 9605], help="(80,500,9605)"
    )
    parser.add_argument("--images", type=positive, default=100_000, help="(100000)")
