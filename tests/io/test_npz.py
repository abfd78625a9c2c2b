"""Files of arrays by others."""

import io
import zipfile

import numpy as np
import pytest

from ia_gcn.io.npz import read_npz


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
