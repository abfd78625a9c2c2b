"""Types of command line arguments."""

from __future__ import annotations

import argparse
from typing import List


def positive(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def positive_numbers(text: str) -> List[int]:
    """An argparse type: numbers with commas between them."""
    return [positive(number) for number in text.split(",")]
