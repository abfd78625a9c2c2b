"""Evaluate a checkpoint: `ia_gcn.commands.train` with --eval-only."""

from __future__ import annotations

import sys
from typing import Sequence

from . import train


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return train.main(["--eval-only", *argv])
