"""Images in the rows of Parquet files, which pyarrow writes here."""

import os
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.io.images import UnreadableImage, decode_image
from ia_gcn.io.parquet import Columns, ParquetRows, count_rows, read_images

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NUM_ROWS = 50


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """A function that writes columns with so many rows a group, and returns the file's path."""
    folder = tmp_path_factory.mktemp("parquet")

    def save(columns, name="a.parquet", **options):
        path = folder / name
        if not path.exists() or name == "a.parquet":
            pq.write_table(pa.table(columns), path, **options)
        return str(path)

    return save


def contents(rows, *columns):
    images = read_images(rows, Columns(*columns))
    return [(image.name, image.getvalue()) for image in images]


@pytest.mark.parametrize("is_named", [True, False])
@settings(max_examples=15)
@given(st.sampled_from([1, 7, 16, 50]), st.integers(0, NUM_ROWS), st.integers(0, NUM_ROWS))
def test_any_rows_of_any_row_groups(write, is_named, group, start, length):
    stop = min(NUM_ROWS, start + length)
    images = [b"%d" % i for i in range(NUM_ROWS)]
    columns = {"image": images, "other": [0] * NUM_ROWS}
    if is_named:
        columns["file"] = [f"{i}.jpg" for i in range(NUM_ROWS)]
    path = write(columns, f"{group}{is_named}.parquet", row_group_size=group)
    assert count_rows(path, Columns()) == NUM_ROWS
    names = columns.get("file", [f"{path}:{i}" for i in range(NUM_ROWS)])
    expected = list(zip(names, images))[start:stop]
    assert contents(ParquetRows(path, start, stop)) == expected


def test_columns_by_their_names_and_fields_of_structs(write):
    structs = [{"bytes": b"a", "path": "a.jpg"}, None, {"bytes": None, "path": None}]
    path = write({"image": structs, "jpeg": [b"x", b"y", None], "number": [7, 8, None]})
    rows = ParquetRows(path, 0, 3)
    # As Hugging Face's data sets have them; a row without bytes is an empty file.
    assert contents(rows) == [(f"{path}:0", b"a"), (f"{path}:1", b""), (f"{path}:2", b"")]
    assert contents(rows, "image.bytes", "image.path")[0] == ("a.jpg", b"a")
    assert contents(rows, "jpeg", "number") == [
        *(("7", b"x"), ("8", b"y"), (f"{path}:2", b"")),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns("jpg"), "no column jpg: there are image, number (--image-column)"),
        (Columns("image.x"), "no column image.x: there are image, number (--image-column)"),
        (Columns("image", "x"), "no column x: there are image, number (--name-column)"),
        (
            Columns("image", "image"),
            "column image is binary, neither text nor numbers (--name-column)",
        ),
        (Columns("number"), "column number is int64, not bytes of image files (--image-column)"),
    ],
)
def test_columns_that_are_not_there_are_named(write, error_line, columns, message):
    path = write({"image": [b""], "number": [7]})
    assert error_line(count_rows, path, columns) == f"{path}: {message}"


class Payload:
    """Its pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
@pytest.mark.parametrize("column", ["image", "file"])
def test_pickles_of_rays_own_type_are_not_read(tmp_path, error_line, column):
    """Ray registers a type with pyarrow that unpickles each value."""
    pytest.importorskip("ray.data").DataContext.get_current()
    made = tmp_path / "made"
    path = str(tmp_path / "a.parquet")
    pickled = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object"}
    pickled[b"ARROW:extension:metadata"] = b""
    fields = [
        pa.field(name, pa.large_binary(), metadata=pickled if name == column else None)
        for name in ("image", "file")
    ]
    fields[1] = fields[1] if column == "file" else pa.field("file", pa.string())
    value = pickle.dumps(Payload(str(made)))
    other = [b"a"] if column == "file" else ["a"]
    columns = [[value], other] if column == "image" else [other, [value]]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, fields)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields)), path)
    assert f"column {column} is " in error_line(count_rows, path, Columns())
    (image,) = read_images(ParquetRows(path, 0, 1), Columns())
    with pytest.raises(OSError, match=f"column {column} is "):
        image.read()
    assert not made.exists()
    # It would have been made.
    pq.read_table(path).column(column).to_pylist()
    assert made.exists()


def test_what_is_no_parquet_is_an_error(tmp_path, error_line):
    path = tmp_path / "a.parquet"
    assert error_line(count_rows, str(path), Columns()).startswith(f"{path}: ")
    path.write_text("text")
    assert error_line(count_rows, str(path), Columns()).startswith(f"{path}: ")


def test_the_rest_of_a_damaged_file_are_images_that_can_not_be_read(write):
    images = [b"%d" % i * 1000 for i in range(20)]
    path = write({"image": images}, row_group_size=10, compression="none", use_dictionary=False)
    with open(path, "r+b") as file:
        second = pq.read_metadata(path).row_group(1).column(0).data_page_offset
        file.seek(second)
        file.write(b"\xff" * 200)
    found = list(read_images(ParquetRows(path, 5, 20), Columns()))
    assert [image.name for image in found] == [f"{path}:{i}" for i in range(5, 20)]
    assert [image.getvalue() for image in found[:5]] == images[5:10]
    for image in found[5:]:
        with pytest.raises(UnreadableImage, match=r"a\.parquet"):
            decode_image(image, lambda image: None)


def test_a_file_that_has_become_shorter(write):
    path = write({"image": [b"a", b"b"]})
    *found, missing = read_images(ParquetRows(path, 0, 3), Columns())
    assert [image.getvalue() for image in found] == [b"a", b"b"]
    with pytest.raises(OSError, match="has fewer rows than before"):
        missing.read()
