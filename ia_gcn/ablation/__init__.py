"""Comparing configs over several seeds: tables, runs, paired differences."""

from .report import report_ablation
from .runs import read_results, run_ablation
from .spec import MODES, Row, Run, Spec, Table, as_list, read_spec

__all__ = [
    "MODES",
    "Row",
    "Run",
    "Spec",
    "Table",
    "as_list",
    "read_results",
    "read_spec",
    "report_ablation",
    "run_ablation",
]
