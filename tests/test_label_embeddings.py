"""Label embeddings: GloVe files, and vectors from names alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.data import glove_embeddings, label_embeddings, name_embeddings

VECTORS = {
    "cat": [1, 2, 3],
    "baseball": [0.5, -1, 2],
    "bat": [1.5, 3, 0],
    "baseball_bat": [9, 9, 9],
    "dining": [1, 0, 0],
    "table": [0, 1e-3, -4.5],
    "tv": [7, 7, 7],
}


@pytest.fixture
def glove(tmp_path):
    """A function that writes vectors, and lines before them as they are, and returns the path."""

    def write(vectors, *first_lines):
        path = tmp_path / "glove.txt"
        rows = [f"{word} {' '.join(map(str, vector))}" for word, vector in vectors.items()]
        path.write_text("\n".join([*first_lines, *rows, ""]), encoding="utf-8")
        return str(path)

    return write


def without(*words):
    return {word: vector for word, vector in VECTORS.items() if word not in words}


def mean(*words):
    return np.mean([VECTORS[word] for word in words], axis=0)


# ------------------------------------------------------------------------------------------ GloVe


def test_words_are_found_in_the_labels_order(glove):
    found = glove_embeddings(["tv", "cat"], glove(VECTORS), 3)
    assert found.dtype == np.float32
    assert found.tolist() == [VECTORS["tv"], VECTORS["cat"]]


@pytest.mark.parametrize("label", ["dining table", "dining_table", "dining-table", "dining/table"])
def test_several_words_are_averaged(glove, label):
    found = glove_embeddings([label], glove(VECTORS), 3)
    np.testing.assert_allclose(found, [mean("dining", "table")], rtol=1e-6)


@pytest.mark.parametrize("label", ["baseball bat", "baseball_bat", "Baseball-Bat"])
def test_the_whole_word_comes_first(glove, label):
    assert glove_embeddings([label], glove(VECTORS), 3).tolist() == [VECTORS["baseball_bat"]]
    found = glove_embeddings([label], glove(without("baseball_bat")), 3)
    np.testing.assert_allclose(found, [mean("baseball", "bat")], rtol=1e-6)


def test_labels_are_looked_up_in_lower_case(glove):
    assert glove_embeddings([" CAT"], glove(VECTORS), 3).tolist() == [VECTORS["cat"]]


def test_word2vecs_first_line_is_skipped(glove):
    """Even where its first number is a label."""
    path = glove({**VECTORS, "8": [4, 5, 6]}, "8 3")
    assert glove_embeddings(["8", "cat"], path, 3).tolist() == [[4, 5, 6], VECTORS["cat"]]


def test_the_first_of_two_lines_for_a_word_counts(glove):
    assert glove_embeddings(["cat"], glove(VECTORS, "cat 8 8 8"), 3).tolist() == [[8, 8, 8]]


def test_aliases(glove):
    aliases = ["tvmonitor=TV", "dining table= bat ", "bat=dining table"]
    found = glove_embeddings(["tvmonitor", "dining table", "bat"], glove(VECTORS), 3, aliases)
    expected = [VECTORS["tv"], VECTORS["bat"], mean("dining", "table")]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("alias", ["dog=cat", "cat", "cat=", "cat= ", "=cat", ""])
def test_a_bad_alias_is_refused(glove, error_line, alias):
    message = error_line(glove_embeddings, ["cat"], glove(VECTORS), 3, [alias])
    assert "MODEL.LABEL_EMBEDDINGS.ALIASES" in message
    assert repr(alias) in message


def test_missing_words_are_all_listed_with_what_to_do(glove, error_line):
    path = glove(VECTORS)
    message = error_line(glove_embeddings, ["tvmonitor", "cat", "kite table", "red kite"], path, 3)
    assert path in message
    assert "3 label(s)" in message
    assert "tvmonitor: tvmonitor; kite table: kite; red kite: red, kite" in message
    assert "MODEL.LABEL_EMBEDDINGS.ALIASES \"['tvmonitor=...']\"" in message


def test_another_dimension_names_the_key(glove, error_line):
    message = error_line(glove_embeddings, ["cat"], glove(VECTORS), 300)
    assert "MODEL.LABEL_EMBEDDINGS.DIM" in message
    assert "300" in message
    assert "3 numbers" in message


@pytest.mark.parametrize(
    "line", ["cat 1 x 3", "cat 1 nan 3", "cat 1 2 inf", "cat 1 2", "cat", "cat 1 2 3 4"]
)
def test_a_bad_line_is_named(glove, error_line, line):
    path = glove(without("cat"), "dog 1 2 3", line)
    assert f"{path}, line 2" in error_line(glove_embeddings, ["cat"], path, 3)


@pytest.mark.parametrize(
    "line", ["dog 1 x 3", "dog 1", "at name@domain.com 1 2 3", ". . . 1 2 3", "", "\x85 1 2 3"]
)
def test_lines_of_other_words_may_be_anything(glove, line):
    """Common Crawl's file has words with blanks in them."""
    path = glove(VECTORS, "dog 1 2 3", line)
    assert glove_embeddings(["cat"], path, 3).tolist() == [VECTORS["cat"]]


@pytest.mark.parametrize("name", ["none.txt", ""])
def test_a_missing_file_is_named(tmp_path, error_line, name):
    path = str(tmp_path / name)
    message = error_line(glove_embeddings, ["cat"], path, 3)
    assert path in message
    assert "MODEL.LABEL_EMBEDDINGS.SOURCE" in message


def test_a_file_that_is_not_text(tmp_path, error_line):
    path = tmp_path / "glove.zip"
    path.write_bytes(bytes(range(256)) * 20)
    assert str(path) in error_line(glove_embeddings, ["cat"], str(path), 3)


words = st.text("abcdefgh", min_size=1, max_size=6)
numbers = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60)
@given(st.dictionaries(words, st.lists(numbers, min_size=4, max_size=4), min_size=1), st.data())
def test_any_vectors_are_read_back(tmp_path_factory, vectors, data):
    path = tmp_path_factory.getbasetemp() / "vectors.txt"
    path.write_text("".join(f"{w} {' '.join(map(repr, v))}\n" for w, v in vectors.items()))
    labels = data.draw(st.lists(st.sampled_from(sorted(vectors)), min_size=1, unique=True))
    found = glove_embeddings(labels, str(path), 4)
    assert found.tolist() == [vectors[label] for label in labels]


# ------------------------------------------------------------------------------------ names alone

LABELS = [f"label {i}" for i in range(200)]


def test_a_name_has_its_vector_in_any_list():
    rows = dict(zip(LABELS, name_embeddings(LABELS, 300)))
    for names in (LABELS[::-1], LABELS[5:9], ["another", *LABELS[:3]]):
        for name, vector in zip(names, name_embeddings(names, 300)):
            assert name not in rows or np.array_equal(rows[name], vector)


@pytest.mark.parametrize("dim", [1, 50, 300])
def test_shape_and_type(dim):
    found = name_embeddings(["cat", "ねこ", ""], dim)
    assert found.shape == (3, dim)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert len(np.unique(found, axis=0)) == 3


def test_different_names_are_nearly_orthogonal():
    found = name_embeddings(LABELS, 300)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    cosines = found @ found.T - np.eye(len(LABELS))
    # Of 300 dimensions, a cosine's standard deviation is 1/√300 = 0.06.
    assert np.abs(cosines).max() < 0.35
    assert 0.05 < cosines.std() < 0.065


def test_the_spread_is_gloves():
    found = name_embeddings(LABELS, 300)
    assert abs(found.mean()) < 0.01
    np.testing.assert_allclose(found.std(), 0.38, atol=0.01)


def test_the_source_decides(glove):
    path = glove(VECTORS)
    assert np.array_equal(label_embeddings(["cat"], "names", 3), name_embeddings(["cat"], 3))
    assert label_embeddings(["dog"], path, 3, ["dog=cat"]).tolist() == [VECTORS["cat"]]
