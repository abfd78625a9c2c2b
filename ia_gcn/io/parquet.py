"""Images in Parquet files: their encoded bytes, such as JPEGs', in a column.

It needs pyarrow. Nothing in a Parquet file is unpickled or run.
"""

from __future__ import annotations

import io
from typing import Any, BinaryIO, Iterator, List, NamedTuple, Tuple

from ..errors import InputError
from .inputs import check_regular

# Rows that are in memory at once, and bytes that are read of a column.
ROWS_AT_ONCE, BUFFER = 16, 2**20

# The column with the names of images, where there is one and none is named.
DEFAULT_NAME = "file"


class Columns(NamedTuple):
    """Which columns of a Parquet file are meant; that of a struct's field is struct.field."""

    image: str = "image"
    """The bytes of image files, or a struct with a field of them named bytes."""
    name: str | None = None
    """The images' names; None: DEFAULT_NAME, if there is such a column."""


class ParquetRows(NamedTuple):
    """The rows of a Parquet file from `start` on, up to `stop`."""

    path: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class UnreadableBytes(io.BytesIO):
    """Stands for an image of which nothing could be read: whoever reads it learns why."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason

    def read(self, *args) -> bytes:
        raise OSError(self.reason)


def count_rows(path: str, columns: Columns) -> int:
    """The rows of a Parquet file with images.

    Raises:
        InputError: it can't be read, or has no such columns.
    """
    pyarrow = import_pyarrow()
    try:
        with _open(path) as file:
            _find_columns(file.schema_arrow, columns)
            return file.metadata.num_rows
    except LookupError as error:
        raise InputError(f"{path}: {error.args[0]}") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: {_one_line(error)}") from None


def read_images(rows: ParquetRows, columns: Columns) -> Iterator[BinaryIO]:
    """The images of some rows in order, each as a file with a name.

    One that has none in its row is named PATH:ROW. A row without bytes is an empty file; where the
    Parquet file is damaged, the rest of the rows are `UnreadableBytes`.
    """
    pyarrow, row = import_pyarrow(), rows.start
    try:
        for content, name in _read_rows(rows, columns):
            image = io.BytesIO(content or b"")
            image.name = f"{rows.path}:{row}" if name is None else str(name)
            yield image
            row += 1
        reason = f"{rows.path} has fewer rows than before"
    except (LookupError, OSError, pyarrow.ArrowException) as error:
        reason = _one_line(error)
    for number in range(row, rows.stop):
        image = UnreadableBytes(reason)
        image.name = f"{rows.path}:{number}"
        yield image


def import_pyarrow():
    """
    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f'{error}: Parquet files need pip install -e ".[ray]"') from None
    return pyarrow


def _open(path: str):
    check_regular(path)
    # Not a whole column at once, which may be gigabytes.
    return import_pyarrow().parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)


def _read_rows(rows: ParquetRows, columns: Columns) -> Iterator[Tuple[bytes | None, Any]]:
    """The content of each row's image, and its name if it has one."""
    with _open(rows.path) as file:
        image, name = _find_columns(file.schema_arrow, columns)
        wanted, stop = [image] if name is None else [image, name], 0
        for group in range(file.metadata.num_row_groups):
            start, stop = stop, stop + file.metadata.row_group(group).num_rows
            skip = max(0, rows.start - start)
            left = min(rows.stop, stop) - start - skip
            if left <= 0:
                continue
            # A group at a time: what comes before a damaged one can be read.
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=wanted):
                batch, skip = batch.slice(skip, left), max(0, skip - batch.num_rows)
                contents = _column(batch, image)
                names = [None] * len(contents) if name is None else _column(batch, name)
                yield from zip(contents, names)
                left -= batch.num_rows
                if not left:
                    break


def _find_columns(schema, columns: Columns) -> Tuple[str, str | None]:
    """The columns of images and of names, if there is one; of structs, their fields.

    Raises:
        LookupError: there is no such column; its message says it in a line.
    """
    types = import_pyarrow().types
    kind, image = _type_of(schema, columns.image, "image"), columns.image
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, image = kind.field("bytes").type, f"{image}.bytes"
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise LookupError(f"column {image} is {kind}, not bytes of image files (--image-column)")
    name = columns.name or (DEFAULT_NAME if DEFAULT_NAME in schema.names else None)
    if name is not None:
        kind = _type_of(schema, name, "name")
        # Ray registers a type whose values are pickles: they are no text.
        if not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
            raise LookupError(f"column {name} is {kind}, neither text nor numbers (--name-column)")
    return image, name


def _type_of(schema, column: str, what: str):
    first, *rest = column.split(".")
    try:
        kind = schema.field(first).type
        for field in rest:
            kind = kind.field(field).type
    # Types without fields have none of a name.
    except (AttributeError, KeyError, TypeError):
        found = ", ".join(schema.names)
        raise LookupError(f"no column {column}: there are {found} (--{what}-column)") from None
    return kind


def _column(batch, column: str) -> List:
    pyarrow, (first, *rest) = import_pyarrow(), column.split(".")
    values = batch.column(first)
    return (pyarrow.compute.struct_field(values, rest) if rest else values).to_pylist()


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())
