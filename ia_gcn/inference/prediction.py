"""A model's prediction for an image, without torch and detectron2.

C is the number of labels, n of an image's regions.
"""

from __future__ import annotations

from html import escape
from types import MappingProxyType
from typing import List, Mapping, NamedTuple, Tuple

import numpy as np

# Labels that a notebook shows, and the colours of a bar from a probability of 0.5 on and below.
SHOWN_LABELS = 10
LIKELY, UNLIKELY = "#1a7f37", "#8c959f"


class PredictedRegions(NamedTuple):
    """The regions that IA-GCN looked at in an image, the best by objectness first."""

    boxes: np.ndarray
    """(n, 4) float32 of x0, y0, x1, y1 in the image's pixels, turned as its EXIF says."""
    weights: np.ndarray
    """z, (n,) float32 of any sign."""
    scores: np.ndarray
    """A_I^w, (n, C) float32 in [0, 1]."""


class Prediction(NamedTuple):
    """A model's prediction for an image."""

    labels: List[str]
    """C names."""
    scores: np.ndarray
    """(C,) float32 probabilities; 1 or 0 for a label that was known."""
    regions: PredictedRegions | None
    """None of a model without a region branch."""
    known: Mapping[str, bool] = MappingProxyType({})
    """What the model was told: whether these labels are there."""

    def above(
        self, threshold: float | np.ndarray = 0.5, top_k: int | None = None
    ) -> List[Tuple[str, float]]:
        """Labels with their probabilities, the highest first.

        Args:
            threshold: the least probability; (C,) for one of each label.
            top_k: no more labels than this.
        """
        order = np.argsort(-self.scores, kind="stable")
        # In float64, as evaluation compares them.
        chosen = order[(self.scores.astype(np.float64) >= threshold)[order]][:top_k]
        return [(self.labels[i], float(self.scores[i])) for i in chosen]

    def _repr_html_(self) -> str:
        """HTML for notebooks: the SHOWN_LABELS likeliest labels as bars.

        It loads nothing and runs no script; names of labels are escaped.
        """
        shown = self.above(threshold=0, top_k=SHOWN_LABELS)
        rows = "".join(
            f'<tr><td style="text-align:left">{escape(name)}'
            f"{' (known)' if name in self.known else ''}</td>"
            f'<td style="width:16em"><div style="width:{share:.1%};min-width:1px;height:1em;'
            f'background:{LIKELY if share >= 0.5 else UNLIKELY}"></div></td>'
            f"<td>{share:.1%}</td></tr>"
            for name, share in shown
        )
        caption = f"{len(shown)} of {len(self.labels)} labels"
        if self.regions is not None:
            caption += f", by {len(self.regions.boxes)} regions"
        return f"<table><caption>{caption}</caption>{rows}</table>"
