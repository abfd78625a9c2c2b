#!/usr/bin/env python3
"""Try to break ia_gcn: damaged and hostile files, kills, full disks, lost hosts, long runs.

Everything is drawn from --seed, and bounded by --seconds. Each trial is a line of JSON in --output;
in the end there is a table of what came of them. The exit status is 1 if anything came out as it
should not have.

Examples:
  what a subcommand takes:
    tools/torture.py images --help
  a hundred trainings that are killed and resumed:
    tools/torture.py kill --runs 100
  a training and the demo page, whose memory must not grow in two hours:
    tools/torture.py soak --minutes 120
  trainings whose disk, processes or clock fail:
    tools/torture.py faults --rounds 5
  trainings over several hosts, which are network namespaces (as root, on Linux):
    tools/torture.py hosts
  files that could carry code, 10,000 of each kind:
    tools/torture.py code --trials 10000
  damaged images, and annotations of data sets:
    tools/torture.py images --trials 10000
    tools/torture.py annotations --trials 10000
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Iterator

from tortures.annotations import add_annotations
from tortures.code_files import add_code_files
from tortures.faults import add_faults
from tortures.harness import Log, Trial
from tortures.hosts import add_hosts
from tortures.images import add_images
from tortures.kill import add_kill
from tortures.soak import add_soak


def common_options() -> argparse.ArgumentParser:
    """What every subcommand takes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default 0)")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="no trial starts after them (default 3600)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/torture"),
        help="folder for WHAT.jsonl (default output/torture)",
    )
    return parser


def until(trials: Iterator[Trial], seconds: float) -> Iterator[Trial]:
    """The trials that start within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        trial = next(trials, None)
        if trial is None:
            return
        yield trial


def main(argv=None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(metavar="WHAT", dest="what", required=True)
    for add in (
        add_kill,
        add_soak,
        add_faults,
        add_hosts,
        add_code_files,
        add_annotations,
        add_images,
    ):
        add(subcommands, common_options())
    args = parser.parse_args(argv)
    log = Log(args.output / f"{args.what}.jsonl")
    log.record(until(args.run(args), args.seconds))
    print(log.table())
    print(f"{len(log.findings)} findings; every trial: {log.path}")
    return 1 if log.findings else 0


if __name__ == "__main__":
    sys.exit(main())
