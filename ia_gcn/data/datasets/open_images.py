"""Open Images: image-level labels of its own CSVs, see datasets/prepare_open_images.py.

A label of an image is present, absent or, as nearly all of them are, unknown. n is the number of
images, C of labels.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from array import array
from collections import Counter
from functools import partial
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
from tqdm import tqdm

from ...errors import InputError
from ...io.files import write_atomically
from ...io.inputs import open_input
from ...io.npz import read_npz
from ...label_names import check_label_name
from .common import excerpt, join_inside, read_label_file, register_multilabel

# What is said of a label of an image, as bits: a machine found it; people, asked, said that it is
# absent, or present; somebody drew a box around it.
MACHINE, ABSENT, PRESENT, BOX = 1, 2, 4, 8
BITS = 4
LINES_PER_UPDATE = 2**16


def register_open_images(root: str) -> None:
    """open_images_train, open_images_val and open_images_test."""
    folder = os.path.join(root, "open_images")
    label_file = os.path.join(folder, "labels.txt")
    for split in ("train", "val", "test"):
        known_labels = os.path.join(folder, f"annotations/{split}.npz")
        register_multilabel(
            f"open_images_{split}",
            partial(load_open_images, known_labels, folder, label_file),
            label_file=label_file,
            image_root=folder,
        )


class KnownLabels(NamedTuple):
    """What is known of n images, in the order of their ids; as few bytes as there are labels."""

    image_ids: np.ndarray
    """(n,) uint64, which Open Images writes as 16 hexadecimal digits."""
    present: np.ndarray
    """(number of present entries,) int32: label indices, image after image."""
    present_ends: np.ndarray
    """(n,) int64: where an image's part of `present` ends and the next one's begins."""
    absent: np.ndarray
    absent_ends: np.ndarray
    """The same of the labels that are known to be absent."""

    def pick(self, chosen: np.ndarray) -> KnownLabels:
        """Those of some images, a boolean array (n,)."""
        present = _pick_rows(self.present, self.present_ends, chosen)
        return KnownLabels(
            self.image_ids[chosen], *present, *_pick_rows(self.absent, self.absent_ends, chosen)
        )


def _pick_rows(
    values: np.ndarray, ends: np.ndarray, chosen: np.ndarray
) -> Tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(ends, prepend=0)
    return values[np.repeat(chosen, lengths)], np.cumsum(lengths[chosen])


# --------------------------------------------------------------------------- Open Images' own files


def read_classes(trainable: str, descriptions: str) -> Dict[str, str]:
    """The names of the labels by their MID, in the order of the list.

    Args:
        trainable: a list with a MID a line, such as oidv7-classes-trainable.txt.
        descriptions: a CSV with LabelName,DisplayName. A name that several of the MIDs have gets
            the MID behind it; a MID without a name is its own.
    Raises:
        InputError: naming the file and what is wrong.
    """
    mids = read_label_file(trainable)
    names = {mid: mid for mid in mids}
    for line, row in _rows(descriptions):
        if len(row) < 2:
            raise InputError(f"{descriptions}, line {line}: not LabelName,DisplayName")
        if row[0] in names and row[1].strip():
            check_label_name(row[1], f"{descriptions}, line {line}")
            names[row[0]] = row[1].strip()
    times = Counter(names.values())
    return {mid: name if times[name] == 1 else f"{name} ({mid})" for mid, name in names.items()}


def read_label_csv(
    path: str, index: Dict[str, int], judge: Callable[[float], int]
) -> Tuple[np.ndarray, np.ndarray]:
    """What a CSV with the columns ImageID, LabelName and Confidence says, a line at a time.

    Args:
        path: of image-level labels, or of boxes.
        index: indices of the labels by MID; lines of other ones are skipped.
        judge: `by_people`, `by_machine` or `by_box`.
    Returns:
        the image ids, uint64, and index · 16 + what is said, int32, of each line that says
        anything.
    Raises:
        InputError: naming the file and the line.
    """
    # Of the few confidences that there are.
    judged: Dict[str, int] = {}
    image_ids, codes = array("Q"), array("i")
    rows = _rows(path)
    _, header = next(rows, (0, []))
    try:
        columns = [header.index(name) for name in ("ImageID", "LabelName", "Confidence")]
    except ValueError:
        raise InputError(f"{path}: no columns ImageID, LabelName, Confidence") from None
    image, label, confidence = columns
    for line, row in rows:
        try:
            number = index.get(row[label])
            if number is None:
                continue
            said = judged.get(row[confidence])
            if said is None:
                said = judged[row[confidence]] = judge(float(row[confidence]))
            if said:
                if len(row[image]) != 16:
                    raise ValueError
                image_ids.append(int(row[image], 16))
                codes.append(number << BITS | said)
        except (LookupError, ValueError, OverflowError):
            raise InputError(
                f"{path}, line {line}: not a label of an image: {excerpt(row)}"
            ) from None
    return np.array(image_ids, np.uint64), np.array(codes, np.int32)


def by_people(confidence: float) -> int:
    """Of labels that people have verified: 1 or 0."""
    return {1.0: PRESENT, 0.0: ABSENT}[confidence]


def by_machine(confidence: float, threshold: float) -> int:
    """Of labels that a machine has found: with at least this confidence, in [0, 1]."""
    if not 0 <= confidence <= 1:
        raise ValueError
    return MACHINE if confidence >= threshold else 0


def by_box(confidence: float) -> int:
    """Of boxes, which have 1."""
    return {1.0: BOX}[confidence]


def _rows(path: str) -> Iterator[Tuple[int, List[str]]]:
    """A CSV's rows, each behind its line's number; without a terminal, no progress bar."""
    try:
        with open_input(path, "rb") as raw:
            size = raw.seek(0, os.SEEK_END)
            raw.seek(0)
            text = io.TextIOWrapper(raw, "utf-8-sig", newline="")
            reader = csv.reader(text)
            name = os.path.basename(path)
            with tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=None) as progress:
                for row in reader:
                    if not reader.line_num % LINES_PER_UPDATE:
                        progress.update(raw.tell() - progress.n)
                    yield reader.line_num, row
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not CSV in UTF-8: {error}") from None


def settle(image_ids: np.ndarray, codes: np.ndarray) -> KnownLabels:
    """What all lines together say.

    A box counts for more than what people said when they were asked, and that for more than a
    machine. Where people contradict each other, the label is unknown.

    Args:
        image_ids, codes: of any number of files, in any order, see `read_label_csv`.
    Returns:
        images of which something is known.
    """
    order = np.lexsort((codes, image_ids))
    image_ids, labels, said = image_ids[order], codes[order] >> BITS, codes[order] % (1 << BITS)
    entries = _first_of_each(image_ids, labels)
    if len(entries):
        image_ids, labels = image_ids[entries], labels[entries]
        said = np.bitwise_or.reduceat(said, entries)
    asked = said & (PRESENT | ABSENT)
    present = (said >= BOX) | (asked == PRESENT) | (said == MACHINE)
    absent = (said < BOX) & (asked == ABSENT)
    known = present | absent
    image_ids, labels, present = image_ids[known], labels[known], present[known]
    image_ids, lengths = np.unique(image_ids, return_counts=True)
    ends = np.cumsum(lengths)
    present_ends = np.append(0, np.cumsum(present))[ends]
    absent_ends = ends - present_ends
    return KnownLabels(image_ids, labels[present], present_ends, labels[~present], absent_ends)


def _first_of_each(*columns: np.ndarray) -> np.ndarray:
    """Indices at which sorted columns of equal length have another value than before."""
    changed = np.zeros(len(columns[0]), bool)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(changed)


# ------------------------------------------------------------------------------- the prepared files


def write_open_images(
    path: str,
    known: KnownLabels,
    folders: Sequence[str],
    folder_of_image: np.ndarray,
    label_names: Sequence[str],
    settings: Dict,
) -> None:
    """Write what `load_open_images` reads.

    Args:
        folders: of images, relative to the image root.
        folder_of_image: (n,) uint8, indices in `folders`.
        label_names: C.
        settings: what it was made with, as JSON knows it.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with write_atomically(path) as file:
        np.savez_compressed(
            file,
            **known._asdict(),
            folders=np.array(folders),
            folder_of_image=folder_of_image,
            labels=_hash(label_names),
            settings=json.dumps(settings, sort_keys=True),
        )


def made_with(path: str) -> Dict:
    """The settings of a file of `write_open_images`; nothing where there is none."""
    try:
        with open_input(path, "rb") as file:
            return json.loads(str(read_npz(file, ["settings"])["settings"]))
    except Exception:  # Missing or damaged: it is made anew.
        return {}


def load_open_images(path: str, image_root: str, label_file: str) -> List[Dict]:
    """Data set dicts of a prepared split, with `absent_labels`, in the order of the ids.

    Args:
        path: of the .npz.
        image_root: the folder of its folders.
        label_file: labels.txt.
    Raises:
        InputError: a file is missing or damaged, or the labels are others.
    """
    label_names = read_label_file(label_file)
    names = [*KnownLabels._fields, "folders", "folder_of_image", "labels"]
    try:
        with open_input(path, "rb") as file:
            content = read_npz(file, names)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; run datasets/prepare_open_images.py") from None
    except Exception as error:
        raise InputError(f"{path}: not of datasets/prepare_open_images.py: {error}") from None
    if str(content["labels"]) != _hash(label_names):
        raise InputError(f"{path}: not of {label_file}; run datasets/prepare_open_images.py again")
    known = KnownLabels(*(content[name] for name in KnownLabels._fields))
    folders, folder_of_image = content["folders"], content["folder_of_image"]
    if not _is_sound(known, folders, folder_of_image, len(label_names)):
        raise InputError(f"{path}: damaged; run datasets/prepare_open_images.py again")
    folders = [join_inside(image_root, str(folder), path) for folder in folders]
    # One object per label, which all images share.
    shared = list(range(len(label_names)))

    def rows(values: np.ndarray, ends: np.ndarray) -> Iterator[List[int]]:
        for start, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
            yield [shared[label] for label in values[start:end].tolist()]

    images = zip(
        known.image_ids.tolist(),
        folder_of_image.tolist(),
        rows(known.present, known.present_ends),
        rows(known.absent, known.absent_ends),
    )
    return [
        {
            "file_name": os.path.join(folders[folder], file_name(image_id)),
            "image_id": f"{image_id:016x}",
            "labels": present,
            "absent_labels": absent,
        }
        for image_id, folder, present, absent in images
    ]


def file_name(image_id: int) -> str:
    """The name of an image's file."""
    return f"{image_id:016x}.jpg"


def _hash(label_names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(label_names).encode()).hexdigest()


def _is_sound(
    known: KnownLabels, folders: np.ndarray, folder_of_image: np.ndarray, num_labels: int
) -> bool:
    rows = (known.present, known.present_ends), (known.absent, known.absent_ends)
    arrays = (known.image_ids, folder_of_image, *rows[0], *rows[1])
    if not all(array.ndim == 1 and array.dtype.kind in "iu" for array in arrays):
        return False
    if known.image_ids.dtype.kind != "u" or folders.ndim != 1:
        return False
    if len({len(known.image_ids), len(folder_of_image), *(len(ends) for _, ends in rows)}) > 1:
        return False
    return _below(folder_of_image, len(folders)) and all(
        _below(values, num_labels)
        and (np.diff(ends, prepend=0) >= 0).all()
        and (ends[-1] if len(ends) else 0) == len(values)
        for values, ends in rows
    )


def _below(values: np.ndarray, limit: int) -> bool:
    return not len(values) or (values.min() >= 0 and values.max() < limit)
