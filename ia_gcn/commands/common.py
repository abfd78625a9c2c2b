"""Functions that the command lines share: their parser, and errors as one line."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Callable, Sequence

from ..processes import EXPECTED_ERRORS, STOP_SIGNALS, on_stop_signals


def make_parser(doc: str, **kwargs) -> argparse.ArgumentParser:
    """A parser whose help is a command's docstring as it is written.

    Args:
        doc: of the module.
        kwargs: of argparse.ArgumentParser.
    """
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
    )


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """--import, for `ia_gcn.extensions.import_extensions`, as `imports`."""
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        default=[],
        # Not several at once: the config's keys that follow would be taken for modules.
        action="append",
        help="a module or .py file of your own, which registers heads, losses or data sets; may be "
        "given several times",
    )


def positive_int(text: str) -> int:
    """An argparse type."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """An argparse type."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return int(text)


def probability(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return float(text)


def run(
    name: str,
    work: Callable[[], int | None],
    go_on: str = "",
    signals: Sequence[int] = STOP_SIGNALS,
) -> int:
    """Call `work` and return an exit status; invalid user input is printed as one line.

    Args:
        name: of the command, for the line.
        work: returns an exit status, or None for 0.
        go_on: after one of the signals, what the line says of how to go on.
        signals: end `work` in an orderly way; Ctrl-C and SIGTERM.
    """
    try:
        with on_stop_signals(signals=signals):
            return work() or 0
    except EXPECTED_ERRORS as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"{name}: {str(stop) or 'interrupted'}{go_on and '; '}{go_on}", file=sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)
