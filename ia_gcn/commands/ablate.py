"""Compare configs over several seeds: a process per run, paired differences, tables and plots.

A file of tables (configs/ablations/) lists the configs to compare. One network is trained first,
and all rows start from it; with `network: none`, they start from the weights of their own configs,
such as those of a pretrained backbone. Rows are trained in one of two ways:
  heads  on the network's frozen features, computed once: a run takes seconds
  train  everything, on images: the effect of the heads on the network is part of the comparison
Every row's model is built before anything is trained, and a row that can't be run is refused.
Results go to OUTPUT/results.jsonl, a line per run. To continue a run that was cut, or to add seeds
and tables, use the same command again: finished runs are not repeated. A row is identified by all
keys of its config, so that a row whose config file was edited is run again.

Examples:
  list the tables and rows:
    tools/ablate.py list
  IA-GCN's tables, five seeds each, on frozen features:
    tools/ablate.py run --tables parts,branches --seeds 1-5
  the same with everything trained:
    tools/ablate.py run --tables parts,branches --seeds 1-3 --mode train
  tables and plots of what was run:
    tools/ablate.py report
"""

from __future__ import annotations

import argparse
import inspect
import shlex
from pathlib import Path
from typing import List, Sequence

from ..ablation import MODES, as_list, read_spec, report_ablation, run_ablation
from ..ablation.runs import results_file
from .common import add_import_option, make_parser, positive_int, run

SPEC = "configs/ablations/digit_scenes.yaml"


def run_tables(args: argparse.Namespace) -> int:
    """Run the rows of the tables that were not run yet; returns the exit status."""
    spec = read_spec(args.spec)
    tables = list(spec.choose(args.tables))
    runs = spec.runs(args.mode, tables, args.seeds, args.imports)
    failed = run_ablation(
        spec, args.output, runs, jobs=args.jobs, threads=args.threads, imports=args.imports
    )
    print(f"{len(runs) - failed} of {len(runs)} runs are in {results_file(args.output)}")
    return 1 if failed else 0


def report(args: argparse.Namespace) -> None:
    """Print the tables of what was run, and draw them into OUTPUT/plots/."""
    for text in report_ablation(read_spec(args.spec), args.output, args.tables, args.imports):
        print(text)


def list_tables(args: argparse.Namespace) -> None:
    """Print the tables and their rows."""
    for name, table in read_spec(args.spec).choose(args.tables).items():
        print(f"{name}: {table.title}")
        for row in table.rows:
            opts = shlex.join(map(str, as_list(row.opts, args.output)))
            print(f"  {row.name}: {row.config} {opts}".rstrip())


def seeds(text: str) -> List[int]:
    """An argparse type: 1,2,3 or 1-3."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: no seed")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--spec", default=SPEC, help="the file of tables (default %(default)s)")
    common.add_argument(
        "--tables",
        type=lambda text: text.split(","),
        default=[],
        metavar="NAME,...",
        help="default: all of them",
    )
    common.add_argument(
        "--output", type=Path, default=Path("output/ablation"), help="default %(default)s"
    )
    add_import_option(common)
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    for name, function in (("list", list_tables), ("run", run_tables), ("report", report)):
        text = inspect.getdoc(function).partition(";")[0]
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(function=function)
        if function is run_tables:
            command.add_argument("--mode", choices=MODES, default="heads", help="default heads")
            command.add_argument("--seeds", type=seeds, default="1-3", help="default 1-3")
            command.add_argument(
                "--jobs", type=positive_int, default=2, help="runs at once (default 2)"
            )
            command.add_argument(
                "--threads", type=positive_int, default=1, help="of torch, in each run (default 1)"
            )
    args = parser.parse_args(argv)
    return run("ablate", lambda: args.function(args), "the same command continues")
