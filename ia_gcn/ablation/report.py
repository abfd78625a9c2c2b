"""The tables and plots of an ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Sequence, Tuple

import numpy as np
from tabulate import tabulate

from ..errors import InputError
from ..evaluation.comparison import draw_curve, draw_rows, mean_and_deviation, paired_difference
from .runs import MEASURES, read_results
from .spec import Row, Spec, Table

# A table's rows, each with its results by seed.
Rows = List[Tuple[Row, Dict[int, Dict]]]


def report_ablation(
    spec: Spec, output: Path, tables: Sequence[str], imports: Sequence[str] = ()
) -> List[str]:
    """The tables of what was run, as Markdown, drawn into OUTPUT/plots/ too.

    Raises:
        InputError: no two rows of a table were run.
    """
    results = read_results(output)
    plots = output / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    texts = []
    for name, table in spec.choose(tables).items():
        for mode in spec.modes:
            rows = [(row, row_results(spec, mode, row, results, imports)) for row in table.rows]
            rows = [(row, found) for row, found in rows if found]
            # A single row compares nothing.
            if len(rows) > 1:
                texts.append(f"### {table.title} ({mode})\n\n{markdown(rows, table)}\n")
                draw(rows, table, str(plots / f"{name}_{mode}.png"))
    if not texts:
        raise InputError(f"{output}: no two rows of a table were run")
    return texts


def row_results(
    spec: Spec, mode: str, row: Row, results: Dict[str, Dict], imports: Sequence[str]
) -> Dict[int, Dict]:
    """A row's results by seed."""
    # Only results that may be the row's: computing a run's key means reading its config.
    seeds = {found["seed"] for found in results.values() if found["config"] == row.config}
    keys = {seed: spec.run(mode, row, seed, imports).key for seed in sorted(seeds)}
    return {seed: results[key] for seed, key in keys.items() if key in results}


def markdown(rows: Rows, table: Table) -> str:
    """Means and deviations of each row, and the paired difference of its mAP to another row."""
    maps = [{seed: result["mAP"] for seed, result in found.items()} for _, found in rows]
    shown = [key for key in REGION_FIGURES if any(mean_of(found, key) for _, found in rows)]
    grid = []
    for place, (row, found) in enumerate(rows):
        others = maps[max(place - 1, 0) if table.compare == "above" else 0]
        difference = paired_difference(others, maps[place]) if place else "–"
        values = list(found.values())
        grid.append(
            [
                row.name,
                *(figures.get(row.name, "–") for figures in table.published.values()),
                *(mean_and_deviation([value[measure] for value in values]) for measure in MEASURES),
                difference,
                mean_and_deviation([value["train"]["mAP"] for value in values]),
                *(mean_of(found, key) or "–" for key in shown),
                len(values),
            ]
        )
    to = "the row above" if table.compare == "above" else rows[0][0].name
    headers = ["", *(f"published {name}" for name in table.published), *MEASURES]
    headers += [f"mAP against {to}", "mAP in training"]
    headers += [*(REGION_FIGURES[key] for key in shown), "seeds"]
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(grid, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


# A vertical bar would end the cell.
REGION_FIGURES = {"mean_abs_mu": r"\|µ\|", "mean_sigma": "σ", "kl": "KL", "mean_presence": "mean a"}


def mean_of(found: Dict[int, Dict], key: str) -> str:
    """Of one of REGION_FIGURES; empty where there is none."""
    values = [result["regions"][key] for result in found.values() if key in result["regions"]]
    return f"{np.mean(values):.3g}" if values else ""


def draw(rows: Rows, table: Table, path: str) -> None:
    values = {row.name: [result["mAP"] for result in found.values()] for row, found in rows}
    if table.x:
        numbers = {float(name): points for name, points in values.items()}
        draw_curve(numbers, table.title, table.x, path)
    else:
        draw_rows(values, table.title, path)
