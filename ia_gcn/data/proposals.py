"""Region proposals from a file, as detectron2's PrecomputedProposals takes them."""

from __future__ import annotations

from typing import Dict, Sequence

import numpy as np
from detectron2.structures import BoxMode

from ..errors import InputError
from ..io.inputs import open_input
from ..io.plain_pickle import load_plain_pickle

# Detectron 1's names for them.
OLD_NAMES = {"ids": "indexes", "objectness_logits": "scores"}


def add_proposals(dataset_dicts: Sequence[Dict], file_name: str) -> None:
    """Give each image its proposals, best first, under detectron2's names for them.

    Args:
        dataset_dicts: dicts of a data set, which get proposal_boxes (n, 4), the
            proposal_objectness_logits (n,) and their proposal_bbox_mode.
        file_name: a pickled dict in detectron2's format: ids (the image_ids), boxes (an n×4 array
            for each) and objectness_logits (n numbers for each), and bbox_mode where it is not
            XYXY_ABS. Only plain data and numpy arrays are read.
    Raises:
        InputError: the file can't be read, is no such dict, or lacks an image.
    """
    try:
        with open_input(file_name, "rb") as file:
            content = load_plain_pickle(file, f"proposals {file_name}")
    except OSError as error:
        raise InputError(f"proposals {file_name}: {error.strerror or error}") from None
    try:
        ids, all_logits = (content.get(k, content.get(old)) for k, old in OLD_NAMES.items())
        places = {str(image_id): i for i, image_id in enumerate(ids)}
        all_boxes, mode = content["boxes"], BoxMode(content.get("bbox_mode", BoxMode.XYXY_ABS))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"proposals {file_name}: not in detectron2's format: {error}") from None
    for record in dataset_dicts:
        image_id = record["image_id"]
        try:
            place = places[str(image_id)]
            boxes = np.asarray(all_boxes[place], np.float32).reshape(-1, 4)
            logits = np.asarray(all_logits[place], np.float32).reshape(len(boxes))
            if not (np.isfinite(boxes).all() and np.isfinite(logits).all()):
                raise ValueError("not all numbers are finite")
        except KeyError:
            raise InputError(f"proposals {file_name}: no image {image_id!r}") from None
        except (IndexError, TypeError, ValueError) as error:
            raise InputError(f"proposals {file_name}: image {image_id!r}: {error}") from None
        best_first = np.argsort(-logits, kind="stable")
        record["proposal_boxes"] = boxes[best_first]
        record["proposal_objectness_logits"] = logits[best_first]
        record["proposal_bbox_mode"] = mode
