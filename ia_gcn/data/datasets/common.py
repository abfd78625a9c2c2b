"""Functions that all data set loaders share."""

from __future__ import annotations

import posixpath
import reprlib
from typing import Callable, Dict, Iterable, List, Sequence, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import InputError
from ...io.inputs import open_input
from ...label_names import NOT_PRINTABLE, check_label_name

_excerpts = reprlib.Repr()
_excerpts.maxstring = _excerpts.maxother = 120


def excerpt(value) -> str:
    """A value of an annotation file for a message: its repr, cut where it is long or nested."""
    return _excerpts.repr(value)


def join_inside(root: str, file_name, source: str) -> str:
    """`root`/`file_name`, where the file name comes from the annotation file `source`.

    Raises:
        InputError: the name is not a line of text, is absolute, or leads out of the root.
    """
    if not isinstance(file_name, str) or not file_name or NOT_PRINTABLE.search(file_name):
        raise InputError(f"{source}: {excerpt(file_name)} is not a file name")
    normal = posixpath.normpath(file_name.replace("\\", "/"))
    if posixpath.isabs(normal) or normal.split("/")[0] == ".." or normal[1:2] == ":":
        raise InputError(f"{source}: the file name {file_name!r} leads out of the image root")
    return posixpath.join(root, normal)


def check_id(value, kind: str, source: str) -> None:
    """Refuse what can't be an id.

    Args:
        kind: of what, such as image.
        source: the annotation file.
    Raises:
        InputError: it is neither an integer nor a line of text.
    """
    # Evaluation stores image ids as 64-bit integers or as text.
    if type(value) is int and abs(value) < 2**63:
        return
    if not isinstance(value, str) or NOT_PRINTABLE.search(value):
        raise InputError(
            f"{source}: {kind} id {excerpt(value)} is neither an integer nor a line of text"
        )


def check_files_differ(files: Iterable[Tuple[str, str]], source: str) -> None:
    """Refuse an annotation file that has the same image twice.

    Args:
        files: of each image what the file calls it, such as line 3, and what `join_inside`
            returned, so that a.jpg and ./a.jpg are the same; links are not followed.
        source: the annotation file.
    Raises:
        InputError: naming both.
    """
    places: Dict[str, str] = {}
    for place, file_name in files:
        first = places.setdefault(file_name, place)
        if first != place:
            raise InputError(f"{source}: {first} and {place} are the same file, {file_name}")


def register_multilabel(
    name: str,
    load: Callable[[], List[Dict]],
    label_names: Sequence[str] | None = None,
    **metadata,
) -> None:
    """Register a data set with detectron2's two catalogs; nothing is read before it is asked for.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        load: returns the data set's dicts, see `MultiLabelDatasetMapper`.
        label_names: in the order of the model's outputs; kept as the metadata's `thing_classes`.
            None: `get_label_names` reads them from the metadata's `label_file`.
        metadata: further entries, such as json_file and image_root.
    """
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="multi_label", **metadata)
    if label_names is not None:
        MetadataCatalog.get(name).thing_classes = list(label_names)


def read_label_file(label_file: str) -> List[str]:
    """The label names of a labels.txt, one a line.

    Raises:
        InputError: the file is not there or can't be read, is empty, names a label twice, or a
            line can't be the name of one.
    """
    try:
        with open_input(label_file, encoding="utf-8-sig") as file:
            lines = {n: line.strip() for n, line in enumerate(file, start=1) if line.strip()}
    except FileNotFoundError:
        raise InputError(f"{label_file}: no such file; see datasets/README.md") from None
    except OSError as error:
        raise InputError(f"{label_file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{label_file}: not text") from None
    for number, label in lines.items():
        check_label_name(label, f"{label_file}, line {number}")
    labels = list(lines.values())
    if not labels or len(set(labels)) < len(labels):
        raise InputError(f"{label_file}: empty, or names a label twice")
    return labels
