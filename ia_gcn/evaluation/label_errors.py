"""Which labels of a data set are probably wrong: confident learning on out-of-fold probabilities.

By cleanlab (Northcutt, Jiang, Chuang: Confident Learning: Estimating Uncertainty in Dataset Labels,
2021; Thyagarajan et al.: Identifying Incorrect Annotations in Multi-Label Classification Data,
2022). n and C are the numbers of images and labels.
"""

from __future__ import annotations

import csv
import importlib.util
import os
from collections import Counter
from typing import List, Mapping, NamedTuple, Sequence

import numpy as np

from ..errors import InputError
from ..io.files import write_text_atomically
from .html_page import read_thumbnail, render_page
from .label_blocks import count_given

COLUMNS = ("rank", "file", "label", "given", "probability", "score")
# Of the page, which so stays small.
MAX_IMAGES = 100
# The longer side of an image in pixels.
THUMBNAIL_SIZE = 256


class Doubt(NamedTuple):
    """An entry of the label matrix that is probably wrong."""

    image: int
    """Index of the image."""
    label: int
    """Index of the label."""
    given: bool
    """Whether the label is present according to the data set."""
    probability: float
    """That it is, according to the image."""
    score: float
    """Quality of the given label in [0, 1]: the lower, the more doubtful."""
    prior: float | None
    """The probability according to the image's other labels alone, where there is such a model."""


def find_label_errors(
    probabilities: np.ndarray,
    targets: np.ndarray,
    prior_opinion: np.ndarray | None = None,
    min_images: int = 5,
) -> List[Doubt]:
    """The entries that are probably wrong, most doubtful first.

    For each label, cleanlab estimates how many entries are wrong, and the doubts are as many whose
    given label is least likely. It counts against the label's mean probability where it is given as
    present, or absent: a label that is hard to see in all images is not doubted for that alone.

    Args:
        probabilities: (n, C) in [0, 1], by a model that was not trained on the image.
        targets: (n, C) in {1, 0, -1 = unknown}. Unknown entries are left out.
        prior_opinion: (n, C) in [0, 1], what the labels alone say of an entry: its probability
            given the image's other labels. It is shown beside the doubts, and does not change them.
        min_images: a label is judged only if it is present and absent in as many images each.
    Raises:
        InputError: cleanlab is not installed.
    """
    check_cleanlab()
    # An import of seconds.
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    doubts = []
    for label in judged_labels(targets, min_images):
        images = np.flatnonzero(targets[:, label] >= 0)
        given = (targets[images, label] == 1).astype(int)
        present = probabilities[images, label].astype(float)
        # What cleanlab's functions for several labels do for each of them: those take no unknown
        # entries.
        both = np.stack([1 - present, present], axis=1)
        scores = get_label_quality_scores(given, both)
        wrong = find_label_issues(given, both, filter_by="low_self_confidence", n_jobs=1)
        for i in np.flatnonzero(wrong):
            prior = None if prior_opinion is None else float(prior_opinion[images[i], label])
            entry = int(images[i]), int(label), bool(given[i])
            doubts.append(Doubt(*entry, float(present[i]), float(scores[i]), prior))
    return sorted(doubts, key=lambda doubt: (doubt.score, doubt.image, doubt.label))


def check_cleanlab() -> None:
    """
    Raises:
        InputError: cleanlab is not installed.
    """
    if importlib.util.find_spec("cleanlab") is None:
        raise InputError('needs cleanlab: pip install "ia_gcn[clean]" or pip install cleanlab')


def judged_labels(targets: np.ndarray, min_images: int) -> np.ndarray:
    """Indices of the labels that are present and absent in at least `min_images` images each."""
    return np.flatnonzero(np.minimum(*count_given(targets)) >= min_images)


def write_label_errors(
    path: str | os.PathLike[str],
    doubts: Sequence[Doubt],
    file_names: Sequence[str],
    label_names: Sequence[str],
) -> None:
    """Write a CSV with a row for each doubt: rank, file, label, given, probability and score.

    `given` is present or absent. Where the doubts have a `prior`, it is the last column,
    labels_alone.

    Args:
        doubts: as `find_label_errors` returns them.
        file_names, label_names: n and C.
    """
    with_prior = any(doubt.prior is not None for doubt in doubts)
    # File names need not be UTF-8.
    with write_text_atomically(path, errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *["labels_alone"] * with_prior])
        for rank, doubt in enumerate(doubts, start=1):
            entry = file_names[doubt.image], label_names[doubt.label], describe(doubt)
            numbers = [doubt.probability, doubt.score, *[doubt.prior] * with_prior]
            writer.writerow([rank, *entry, *(f"{number:.6f}" for number in numbers)])


def describe(doubt: Doubt) -> str:
    """What the data set says of the entry."""
    return "present" if doubt.given else "absent"


def render_label_errors(
    doubts: Sequence[Doubt],
    targets: np.ndarray,
    file_names: Sequence[str],
    label_names: Sequence[str],
    data_set: str,
    facts: Mapping[str, str],
) -> str:
    """The doubts as an HTML page: how many there are of each label, and images of the first ones.

    It loads nothing from elsewhere. Names of labels and files are escaped.

    Args:
        doubts: as `find_label_errors` returns them.
        targets: (n, C) in {1, 0, -1 = unknown}.
        file_names: n, local or of a kind that PathManager knows. A file that can't be read is named
            without its image.
        label_names: C.
        data_set: its name, for the title.
        facts: about the search, such as {"Checkpoint": path}.
    """
    shown = doubts[:MAX_IMAGES]
    wrong, missed = (
        Counter(doubt.label for doubt in doubts if doubt.given is value) for value in (True, False)
    )
    page = {
        "data_set": data_set,
        "facts": {**facts, "Images": len(targets), "Labels": len(label_names)},
        "entries": int((targets >= 0).sum()),
        "doubts": len(doubts),
        "images": len({doubt.image for doubt in doubts}),
        "labels": [
            (name, present, wrong[i], absent, missed[i])
            for i, (name, present, absent) in enumerate(zip(label_names, *count_given(targets)))
        ],
        "shown": [
            {
                "rank": rank,
                "label": label_names[doubt.label],
                "given": describe(doubt),
                "probability": doubt.probability,
                "prior": doubt.prior,
                "labels": [label_names[i] for i in np.flatnonzero(targets[doubt.image] == 1)],
                "file": file_names[doubt.image],
                "source": read_thumbnail(file_names[doubt.image], THUMBNAIL_SIZE),
            }
            for rank, doubt in enumerate(shown, start=1)
        ],
    }
    return render_page("label_errors.html", page)
