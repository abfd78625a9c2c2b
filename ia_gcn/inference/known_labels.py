"""Labels that a user knows of an image, and tells the model beside it.

Neither torch nor detectron2 is needed. C is the number of labels.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Dict, List, Mapping, Sequence

import numpy as np

from ..errors import InputError
from ..io.images import ImageSource

if TYPE_CHECKING:
    from .onnx_predictor import OnnxPredictor
    from .predictor import MultiLabelPredictor

KnownLabels = Mapping[str, bool]
"""True for a label that is there, False for one that is not; nothing is known of the others."""


def check_known(
    predictor: MultiLabelPredictor | OnnxPredictor, known: KnownLabels | None, place: str = "known"
) -> None:
    """Refuse what can't be told to a predictor's model. None and an empty mapping are nothing.

    Args:
        place: where it comes from, for the message.
    Raises:
        InputError: it is no mapping from names to bool, the model makes no use of known labels, or
            has no label of a name.
    """
    if not known:
        return
    if not isinstance(known, Mapping):
        raise InputError(f"{place} must be labels with True or False, such as {{'fork': True}}")
    if not predictor.takes_known_labels:
        raise InputError(
            f"{place}: this model makes no use of known labels: a C-Tran or a model with a label "
            "prior does"
        )
    for name, there in known.items():
        if name not in predictor.label_names:
            close = get_close_matches(str(name), predictor.label_names)
            hint = f": did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise InputError(f"{place}: the model has no label {name!r}{hint}")
        if not isinstance(there, (bool, np.bool_)):
            raise InputError(f"{place}: {name!r} must be True or False, not {there!r}")


def with_known(sample: Dict, known: KnownLabels | None, label_names: Sequence[str]) -> Dict:
    """A sample of a predictor's `view`, with label_states (C,) float32 if there is something known.

    Args:
        known: as `check_known` allows it.
        label_names: C names.
    """
    if not known:
        return sample
    states = [float(known[name]) if name in known else -1.0 for name in label_names]
    return {**sample, "label_states": np.array(states, np.float32)}


def make_samples(
    predictor: MultiLabelPredictor | OnnxPredictor,
    images: Sequence[ImageSource],
    known: Sequence[KnownLabels | None] | None,
) -> List[Dict]:
    """What `predict_batch` puts through a predictor's model, of its own arguments.

    Raises:
        InputError: see `check_known`; or the numbers of images and of mappings differ.
    """
    known = [None] * len(images) if known is None else known
    if len(known) != len(images):
        raise InputError(f"known has {len(known)} entries for {len(images)} images")
    for labels in known:
        check_known(predictor, labels)
    names = predictor.label_names
    return [with_known(predictor.view(x), labels, names) for x, labels in zip(images, known)]


def known_labels(sample: Dict, label_names: Sequence[str]) -> Dict[str, bool]:
    """What is known of a sample with or without label_states, in the order of the names."""
    states = np.asarray(sample.get("label_states", ()))
    return {name: bool(state) for name, state in zip(label_names, states) if state >= 0}


def hold_known(sample: Dict, scores: np.ndarray) -> np.ndarray:
    """Scores (C,) with 1 and 0 for the labels that are known of a sample."""
    if "label_states" not in sample:
        return scores
    states = np.asarray(sample["label_states"], scores.dtype)
    return np.where(states >= 0, states, scores)
