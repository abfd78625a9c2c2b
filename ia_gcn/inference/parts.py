"""Predictions for many images in parts: what is in a part, and the folder of results.

A part is so many images in a row of the input. What its rows are depends on nothing but them and
the job, so that a part that was lost is made again as it was. C is the number of labels.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple, Union

import numpy as np

from ..errors import InputError
from ..io.files import remove_unfinished, write_atomically, write_text_atomically
from ..io.parquet import Columns, ParquetRows, count_rows, import_pyarrow, read_images
from .files import FilePrediction, find_images

FORMAT = "ia_gcn predictions, version 1"
# A name that begins so is left out where a folder is read as a data set.
JOB_FILE = "_job.json"
METADATA = b"ia_gcn"
PARQUET, INDEX = ".parquet", ".jsonl"
BLOCK = 2**20

# The name of a file with an image, or rows of a Parquet file.
Source = Union[str, ParquetRows]


class Job(NamedTuple):
    """All that decides what is predicted of an image, whoever does it."""

    weights: str
    """A checkpoint or a .onnx file."""
    label_names: Tuple[str, ...]
    """C names of the model's labels."""
    thresholds: Tuple[float, ...]
    """The least probability of each label."""
    top_k: int | None = None
    """No more labels than this for an image."""
    with_scores: bool = False
    """Whether the probabilities of all labels are written, too."""
    config_file: str = ""
    """In place of the checkpoint's own config."""
    precision: str = "fp32"
    """Of the backbone, fp32 or bf16."""
    imports: Tuple[str, ...] = ()
    """Modules for `import_extensions`."""
    columns: Columns = Columns()
    """Of Parquet files."""
    batch_size: int = 16
    """Images that go through the model at once."""
    part_size: int = 4096
    """Images of a part."""


# ------------------------------------------------------------------------------------------- parts


def find_sources(name: str, columns: Columns) -> List[Source]:
    """What an INPUT stands for: the Parquet files below a folder, whose other files are left out
    then; the images of tar shards, of their index.jsonl; or what `find_images` finds.

    Raises:
        InputError: it is a URL, or a Parquet file or an index can't be used.
    """
    if name.endswith(INDEX):
        # The only thing here that needs detectron2.
        from ..data.datasets.shards import load_multilabel_shards, shard_label_names

        records = load_multilabel_shards(name, "", shard_label_names(name))
        return [record["file_name"] for record in records]
    return [
        ParquetRows(path, 0, count_rows(path, columns)) if path.endswith(PARQUET) else path
        for path in _parquet_below(name) or find_images(name)
    ]


def _parquet_below(folder: str) -> List[str]:
    """Sorted, without what is hidden or begins with _, as others read such folders."""
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(PARQUET) and not name.startswith((".", "_"))
    )


def count_images(sources: Iterable[Source]) -> int:
    return sum(x.num_rows if isinstance(x, ParquetRows) else 1 for x in sources)


def split_sources(sources: Iterable[Source], size: int) -> Iterator[List[Source]]:
    """The same images in the same order, in parts of `size` images; the last may have fewer."""
    part, room = [], size
    for source in sources:
        while isinstance(source, ParquetRows) and source.num_rows > room:
            middle = source.start + room
            yield [*part, source._replace(stop=middle)]
            part, room, source = [], size, source._replace(start=middle)
        part.append(source)
        room -= count_images([source])
        if not room:
            yield part
            part, room = [], size
    if part:
        yield part


def encode_part(sources: Sequence[Source]) -> str:
    """A part as JSON; names of files that are not text have escapes."""
    return json.dumps(sources)


def decode_part(text: str) -> List[Source]:
    return [x if isinstance(x, str) else ParquetRows(*x) for x in json.loads(text)]


def open_sources(sources: Iterable[Source], columns: Columns) -> Iterator[str | BinaryIO]:
    """Each image in order, as `predict_files` takes it."""
    for source in sources:
        if isinstance(source, ParquetRows):
            yield from read_images(source, columns)
        else:
            yield source


# ------------------------------------------------------------------------------------------ results


def describe_job(job: Job, parts: Sequence[str], num_images: int) -> Dict[str, Any]:
    """For JOB_FILE: what has to be the same for parts to go together.

    The input is told by its names, and the model by the content of its files. Where these are, and
    the names of what is imported, may change.

    Args:
        parts: of `encode_part`.
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return {
        "format": FORMAT,
        "images": num_images,
        "parts": len(parts),
        "part size": job.part_size,
        "input": digest.hexdigest(),
        "columns": list(job.columns),
        "weights": _hash_file(job.weights),
        "config file": _hash_file(job.config_file) if job.config_file else None,
        "precision": job.precision,
        "batch size": job.batch_size,
        "thresholds": list(job.thresholds),
        "top k": job.top_k,
        "scores": job.with_scores,
    }


def _hash_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class ResultFolder:
    """A folder of Parquet files, part-00000.parquet and so on, each complete."""

    def __init__(self, path: str, description: Dict[str, Any]):
        """Make the folder, or go on in it.

        Args:
            description: of `describe_job`.
        Raises:
            InputError: it has results of another job, or other files.
        """
        self.path = Path(path)
        self.num_parts = description["parts"]
        self.path.mkdir(parents=True, exist_ok=True)
        job_file = self.path / JOB_FILE
        if job_file.exists():
            _check_same(job_file, description)
        elif any(name.suffix == PARQUET for name in self.path.iterdir()):
            raise InputError(f"--output {path}: has Parquet files, and no {JOB_FILE} of theirs")
        else:
            with write_text_atomically(job_file) as file:
                file.write(json.dumps(description, indent=1) + "\n")
        remove_unfinished(self.path)

    def part_file(self, number: int) -> Path:
        return self.path / f"part-{number:05}{PARQUET}"

    def missing(self) -> List[int]:
        """The numbers of the parts that are not there yet."""
        return [i for i in range(self.num_parts) if not self.part_file(i).exists()]

    def write(self, number: int, content: bytes) -> None:
        with write_atomically(self.part_file(number)) as file:
            file.write(content)

    def unreadable(self, number: int) -> int:
        """How many images of a part that is there could not be read."""
        metadata = import_pyarrow().parquet.read_metadata(self.part_file(number)).metadata
        return json.loads(metadata[METADATA])["unreadable"]


def _check_same(job_file: Path, description: Dict[str, Any]) -> None:
    try:
        found = dict(json.loads(job_file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{job_file}: {error}") from None
    other = [key for key, value in description.items() if found.get(key) != value]
    if other:
        raise InputError(
            f"--output {job_file.parent}: has predictions of another job ({', '.join(other)}); "
            "name another folder, or remove this one"
        )


def encode_results(results: Sequence[FilePrediction], job: Job) -> bytes:
    """A Parquet file with a row for each result.

    Its columns: file; labels and probabilities, two lists with the highest probability first, and
    both null where the image could not be read; error, why that was so, or null; of a job with
    scores, also the list of the probabilities of all labels. Its schema's metadata have, under
    METADATA, a JSON with made_by, weights, label_names and unreadable, the number of such rows.
    """
    from .. import __version__

    pa = import_pyarrow()
    threshold = np.array(job.thresholds)
    above = [
        None if result.prediction is None else result.prediction.above(threshold, job.top_k)
        for result in results
    ]
    probabilities = pa.list_(pa.float32())
    columns = {
        "file": pa.array([_text(x.file) for x in results], pa.string()),
        "labels": pa.array([_parts_of(x, 0) for x in above], pa.list_(pa.string())),
        "probabilities": pa.array([_parts_of(x, 1) for x in above], probabilities),
        "error": pa.array([x.error and _text(x.error) for x in results], pa.string()),
    }
    if job.with_scores:
        scores = [None if x.prediction is None else x.prediction.scores for x in results]
        columns["scores"] = pa.array(scores, probabilities)
    about = {
        "made_by": f"ia_gcn {__version__}",
        "weights": os.path.basename(job.weights),
        "label_names": job.label_names,
        "unreadable": sum(x.error is not None for x in results),
    }
    table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(about)})
    buffer = pa.BufferOutputStream()
    pa.parquet.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


def _text(name: str) -> str:
    """With escapes for what is no text: names of files need not be, strings of Parquet must."""
    return name.encode("utf-8", "backslashreplace").decode()


def _parts_of(labels: List[Tuple[str, float]] | None, index: int) -> List | None:
    return None if labels is None else [label[index] for label in labels]
