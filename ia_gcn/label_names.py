"""Checking and comparing label names."""

from __future__ import annotations

import re
from typing import Sequence

from .errors import InputError

# Control characters, line separators and lone surrogates: what can't be part of a line of text.
NOT_PRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def check_label_name(name, place: str) -> None:
    """Refuse what can't be the name of a label.

    Args:
        place: where the name comes from, such as a file and a line, for the message.
    Raises:
        InputError: it is not text, is empty or blank, or has a control character, a line separator
            or a lone surrogate.
    """
    if not isinstance(name, str) or not name.strip() or NOT_PRINTABLE.search(name):
        shown = repr(name) if isinstance(name, str) and len(name) < 200 else "that"
        raise InputError(f"{place}: {shown} can't be the name of a label")


def describe_mismatch(labels: Sequence[str], expected: Sequence[str]) -> str:
    """How two lists of label names differ, as a phrase that follows the name of the first one."""
    known, wanted = set(labels), set(expected)
    extra = [label for label in labels if label not in wanted]
    missing = [label for label in expected if label not in known]
    if not extra and not missing:
        return "has the same labels in another order"
    differences = [
        f"{word} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for word, names in (("has", extra), ("lacks", missing))
        if names
    ]
    return f"has other labels ({len(labels)} against {len(expected)}; {'; '.join(differences)})"
