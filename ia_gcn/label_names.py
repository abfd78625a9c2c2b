"""Comparing lists of label names."""

from __future__ import annotations

from typing import Sequence


def describe_mismatch(labels: Sequence[str], expected: Sequence[str]) -> str:
    """How two lists of label names differ, as a phrase that follows the name of the first one."""
    extra = [label for label in labels if label not in expected]
    missing = [label for label in expected if label not in labels]
    if not extra and not missing:
        return "has the same labels in another order"
    differences = [
        f"{word} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
        for word, names in (("has", extra), ("lacks", missing))
        if names
    ]
    return f"has other labels ({len(labels)} against {len(expected)}; {'; '.join(differences)})"
