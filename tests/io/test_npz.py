"""Files of arrays by others."""

import io
import mmap
import struct
import zipfile

import numpy as np
import pytest

from ia_gcn.io.npz import Columns, read_npz, write_npz


def test_arrays_are_read_by_name():
    file = io.BytesIO()
    arrays = {"a": np.zeros((200, 300)), "b": np.array(["x", "ä"]), "c": np.arange(3)}
    np.savez_compressed(file, **arrays)
    assert list(read_npz(file, ["c", "a"])) == ["c", "a"]
    found = read_npz(file)
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_a_zip_bomb_is_not_unpacked():
    file = io.BytesIO()
    np.savez_compressed(file, a=np.zeros(10**8, np.int8))
    with pytest.raises(ValueError, match="its arrays are of"):
        read_npz(file)


@pytest.mark.parametrize("code", [0x110000, 2**32 - 1, 0xD800, 0xDFFF])
def test_codes_of_no_character_are_refused(code):
    file = io.BytesIO()
    np.savez(file, a=np.array([[ord("a"), code]], np.uint32).view("U2"))
    with pytest.raises(ValueError, match="a is no text"):
        read_npz(file)


def test_pickled_arrays_are_refused():
    file = io.BytesIO()
    np.savez(file, a=np.array([{}]))
    with pytest.raises(ValueError, match="allow_pickle"):
        read_npz(file)


@pytest.mark.parametrize("shape", [(10**15,), (2**32, 2**32), (-1,), (10**9, 0)])
def test_shapes_beyond_the_file_are_refused(shape):
    array = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(array, header)
    array.write(bytes(80))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("a.npy", array.getvalue())
    if 0 in shape:
        assert read_npz(file)["a"].size == 0
    else:
        with pytest.raises((ValueError, MemoryError)):
            read_npz(file)


# ------------------------------------------------------------------------------- in the file


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def write(path, matrix, **arrays):
    """A file with a matrix `a` in three blocks of columns."""
    blocks = np.array_split(matrix.T, 3)
    with open(path, "wb") as file:
        write_npz(file, {"a": Columns(matrix.dtype, matrix.shape, blocks)}, arrays)


def read(path, **settings):
    with open(path, "rb") as file:
        return read_npz(file, **settings)


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (300, 2)])
def test_a_matrix_that_comes_column_by_column_is_mapped(tmp_path, dtype, shape):
    matrix = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    names = np.array(["x", "ä"])
    write(tmp_path / "a.npz", matrix, b=names)
    # As any other .npz file.
    with np.load(tmp_path / "a.npz") as found:
        np.testing.assert_array_equal(found["a"], matrix)
        np.testing.assert_array_equal(found["b"], names)
    found = read(tmp_path / "a.npz", map_from=1)
    np.testing.assert_array_equal(found["a"], matrix)
    assert found["a"].dtype == dtype
    assert is_mapped(found["a"])
    assert not found["a"].flags.writeable
    assert found["b"].tolist() == ["x", "ä"]
    # By default, and where it is small, it is in memory.
    assert not is_mapped(read(tmp_path / "a.npz")["a"])
    assert not is_mapped(read(tmp_path / "a.npz", map_from=10**4)["a"])


@pytest.mark.parametrize("order", ["C", "F"])
def test_what_numpy_writes_is_mapped_column_by_column_and_not_compressed(tmp_path, order):
    """Of rows after rows, a few columns at a time would take the whole file each."""
    matrix = np.asarray(np.random.default_rng(0).random((20, 30)), order=order)
    np.savez(tmp_path / "plain.npz", x=np.arange(3), a=matrix, b=np.array(["text"] * 99))
    np.savez_compressed(tmp_path / "small.npz", a=matrix)
    found = read(tmp_path / "plain.npz", map_from=200)
    np.testing.assert_array_equal(found["a"], matrix)
    assert [is_mapped(found[name]) for name in "xab"] == [False, order == "F", False]
    compressed = read(tmp_path / "small.npz", map_from=200)["a"]
    np.testing.assert_array_equal(compressed, matrix)
    assert not is_mapped(compressed)


class WithoutDescriptor:
    """What a handler of PathManager may return, with what zipfile needs."""

    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell
        self.seekable = file.seekable


@pytest.mark.parametrize("wrap", [WithoutDescriptor, lambda file: io.BytesIO(file.read())])
def test_what_is_no_file_of_the_system_is_read(tmp_path, wrap):
    matrix = np.random.default_rng(0).random((20, 30))
    write(tmp_path / "a.npz", matrix)
    with open(tmp_path / "a.npz", "rb") as file:
        found = read_npz(wrap(file), map_from=1)["a"]
    np.testing.assert_array_equal(found, matrix)
    assert not is_mapped(found)


def test_a_matrix_of_nothing_is_read(tmp_path):
    write(tmp_path / "a.npz", np.zeros((0, 4), np.float32))
    assert read(tmp_path / "a.npz", map_from=0)["a"].shape == (0, 4)


def test_damage_is_found_before_it_is_mapped(tmp_path):
    path = tmp_path / "a.npz"
    write(path, np.ones((50, 60)))
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        read(path, map_from=1)


@pytest.mark.parametrize("shape", [(10**15,), (2**32, 2**32), (-1, -10), (3,), (), (11,)])
def test_a_shape_that_is_not_that_of_the_data_is_not_mapped(tmp_path, shape):
    array = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": True, "shape": shape}
    np.lib.format.write_array_header_1_0(array, header)
    array.write(bytes(80))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as content:
        content.writestr("a.npy", array.getvalue())
    try:
        found = read(tmp_path / "a.npz", map_from=1)["a"]
    except (ValueError, MemoryError):
        return
    assert not is_mapped(found)
    assert found.nbytes <= 80


def test_an_entry_that_points_elsewhere_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    write(path, np.ones((50, 60)))
    content = bytearray(path.read_bytes())
    # The offset of its header, in the directory at the end.
    place = content.rindex(b"PK\x01\x02") + 42
    content[place : place + 4] = struct.pack("<I", 2**30)
    path.write_bytes(content)
    with pytest.raises((zipfile.BadZipFile, OSError, ValueError)):
        read(path, map_from=1)
