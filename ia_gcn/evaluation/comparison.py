"""Comparing trainings over several seeds: means, deviations, paired differences, images."""

from __future__ import annotations

from typing import Mapping, NamedTuple, Sequence

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from ..visualization.style import save_png

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """Of two configurations by the seeds that both were run with."""

    mean: float
    low: float
    high: float
    """The ends of the confidence interval of the mean; NaN with one seed."""
    seeds: int

    def __str__(self) -> str:
        if not self.seeds:
            return "–"
        if self.seeds == 1:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Mean ± standard deviation of a sample (n - 1), with two decimals; one value has none."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """second - first, seed by seed, with Student's 95 % confidence interval of the mean.

    What both share by the seed, such as the order of the images, cancels in the difference.

    Args:
        first, second: a figure by seed.
    """
    seeds = sorted(first.keys() & second.keys())
    differences = np.array([second[seed] - first[seed] for seed in seeds])
    if len(seeds) < 2:
        mean = float(differences.mean()) if len(seeds) else float("nan")
        return Difference(mean, float("nan"), float("nan"), len(seeds))
    mean, reach = float(differences.mean()), confidence_reach(differences)
    return Difference(mean, mean - reach, mean + reach, len(seeds))


def draw_rows(rows: Mapping[str, Sequence[float]], title: str, path: str) -> None:
    """A PNG of a table: each row's mAP in percent, their mean and its confidence interval.

    Args:
        rows: values by the row's name, at least one each; from top to bottom.
        path: of the PNG.
    """
    figure = Figure(figsize=(7, 1 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, values in enumerate(rows.values()):
        axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.35, markersize=4)
        axes.errorbar(np.mean(values), place, xerr=confidence_reach(values), fmt="|k", capsize=3)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="mAP (%)")
    axes.set_title(title, size=10)
    axes.grid(axis="x", alpha=0.3)
    save_png(figure, path, dpi=120)


def draw_curve(points: Mapping[float, Sequence[float]], title: str, x: str, path: str) -> None:
    """A PNG of mAP in percent against a number that was varied, with confidence intervals.

    Args:
        points: values by the number, at least one each.
        x: what the number is.
        path: of the PNG.
    """
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    numbers = sorted(points)
    for number in numbers:
        values = points[number]
        axes.plot([number] * len(values), values, "o", color="tab:blue", alpha=0.35, markersize=4)
    means = [np.mean(points[number]) for number in numbers]
    reaches = [confidence_reach(points[number]) for number in numbers]
    axes.errorbar(numbers, means, yerr=reaches, fmt="-k", capsize=3)
    axes.set(xlabel=x, ylabel="mAP (%)")
    axes.set_title(title, size=10)
    axes.grid(alpha=0.3)
    save_png(figure, path, dpi=120)


def confidence_reach(values: Sequence[float]) -> float:
    """Half of the confidence interval of a mean; 0 where there is one value."""
    if len(values) < 2:
        return 0.0
    return stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * float(stats.sem(values))
