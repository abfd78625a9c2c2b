"""Label embeddings: GloVe files, means over images, vectors from names alone; their norms."""

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from ia_gcn.data import glove_embeddings, label_embeddings, name_embeddings
from ia_gcn.data.label_embeddings import image_embeddings, normalize_embeddings

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


# -------------------------------------------------------------------------------------- images

ROWS = {"cat": [0.5, 0.25, 2], "ねこ": [1, -1, 0], "dining table": [1e-3, 0, 7], "": [3, 3, 3]}


@pytest.fixture
def npz(tmp_path):
    """A function that writes a file of images' means, with changes, and returns its path."""

    def write(**changes):
        content = {
            "embeddings": np.array(list(ROWS.values()), np.float32),
            "label_names": np.array(list(ROWS)),
            "kind": "scores",
            **changes,
        }
        path = tmp_path / "label_embeddings.npz"
        np.savez(path, **{name: value for name, value in content.items() if value is not None})
        return str(path)

    return write


@pytest.mark.parametrize("names", [list(ROWS), list(ROWS)[::-1], ["dining table"], ["", "cat"]])
def test_labels_are_matched_by_name(npz, names):
    found = image_embeddings(names, npz(), 3)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array([ROWS[name] for name in names], np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8])
def test_other_numbers_become_float32(npz, dtype):
    path = npz(embeddings=np.arange(12, dtype=dtype).reshape(4, 3))
    found = image_embeddings(["cat", ""], path, 3)
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 1, 2], [9, 10, 11]]


def test_missing_labels_are_all_named(npz, error_line):
    path = npz()
    message = error_line(image_embeddings, ["Cat", "cat", "dining_table"], path, 3)
    assert message == f"{path} lacks 2 label(s): Cat, dining_table"


def test_another_dimension_says_what_to_set(npz, error_line):
    path = npz()
    message = error_line(image_embeddings, ["cat"], path, 300)
    assert path in message
    assert "300" in message
    assert "set MODEL.LABEL_EMBEDDINGS.DIM 3" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused(npz, error_line, bad):
    """Of the labels that are asked for."""
    path = npz(embeddings=np.array([[1, 2, 3], [1, bad, 3], [1, 2, 3], [bad, 2, 3]]))
    message = error_line(image_embeddings, ["ねこ", "cat"], path, 3)
    assert path in message
    assert message.endswith("not finite: ねこ")
    assert image_embeddings(["cat"], path, 3).tolist() == [[1, 2, 3]]


def test_a_missing_npz_names_the_tool(tmp_path, error_line):
    path = str(tmp_path / "none.npz")
    message = error_line(image_embeddings, ["cat"], path, 3)
    assert f"MODEL.LABEL_EMBEDDINGS.SOURCE: {path}" in message
    assert "tools/build_label_embeddings.py" in message


def test_a_folder_is_refused(tmp_path, error_line):
    assert str(tmp_path) in error_line(image_embeddings, ["cat"], str(tmp_path), 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"embeddings": None},
        {"label_names": None},
        {"embeddings": np.zeros(4)},
        {"embeddings": np.zeros((4, 3, 1))},
        {"embeddings": np.zeros((3, 3))},
        {"embeddings": np.float32(1)},
        {"embeddings": np.zeros((4, 3), complex)},
        {"embeddings": np.zeros((4, 3), bool)},
        {"embeddings": np.full((4, 3), "1")},
        {"embeddings": np.zeros((4, 3), object)},
        {"label_names": np.array(list(ROWS))[:, None]},
        {"label_names": np.array("cat")},
        {"label_names": np.arange(4)},
        {"label_names": np.array([b"a", b"b", b"c", b"cat"])},
        {"label_names": np.array(list(ROWS), object)},
        {"label_names": np.array(["cat", "dog", "cow", "cat"])},
    ],
)
def test_other_content_is_refused(npz, error_line, changes):
    path = npz(**changes)
    assert path in error_line(image_embeddings, ["cat"], path, 3)


def npy_bytes():
    file = io.BytesIO()
    np.save(file, np.zeros((4, 3)))
    return file.getvalue()


def zip_bytes():
    """A zip whose members have the right names and are no arrays."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("embeddings", "label_names"):
            archive.writestr(f"{name}.npy", b"hello")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "flipped", "npy", "zip", "pickle"])
def test_a_damaged_file_is_refused(npz, error_line, kind):
    path = npz()
    with open(path, "rb") as file:
        good = file.read()
    middle = good.index(np.float32([0.5, 0.25, 2]).tobytes())
    content = {
        "empty": b"",
        "text": b"cat 1 2 3\n",
        "cut": good[: len(good) // 2],
        "flipped": good[:middle] + b"\xff" * 4 + good[middle + 4 :],
        "npy": npy_bytes(),
        "zip": zip_bytes(),
        "pickle": b"\x80\x04N.",
    }[kind]
    with open(path, "wb") as file:
        file.write(content)
    assert path in error_line(image_embeddings, ["cat"], path, 3)


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


def test_images_are_a_source_too(npz):
    """GloVe's aliases, which a config may have, are none of its."""
    path = npz()
    found = label_embeddings(["ねこ", "cat"], path, 3, ["tvmonitor=tv"])
    assert found.tolist() == [ROWS["ねこ"], ROWS["cat"]]


# ------------------------------------------------------------------------------------------ norms

NORMS = ["none", "standardize", "whiten"]
# Fewer labels than dimensions, as many, more.
SHAPES = [(2, 5), (6, 20), (6, 6), (6, 5), (30, 4), (7, 1)]


def random_embeddings(shape, seed=0):
    """Dimensions of different means and spreads that go with one another."""
    rng = np.random.default_rng(seed)
    _, d = shape
    mixed = rng.normal(size=shape) @ rng.normal(size=(d, d)) + 5 * rng.normal(size=d)
    return (mixed * rng.uniform(0.1, 10, d)).astype(np.float32)


@pytest.mark.parametrize("source", ["names", "glove", "npz"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_source_is_normalized(glove, npz, source, norm):
    path = {"names": "names", "glove": glove({**VECTORS, "": [1] * 3}), "npz": npz()}[source]
    names = ["cat", "dining table"]
    plain = label_embeddings(names, path, 3)
    found = label_embeddings(names, path, 3, (), norm)
    assert np.array_equal(found, normalize_embeddings(plain, norm))
    assert np.array_equal(found, plain) == (norm == "none")


@pytest.mark.parametrize("norm", ["l2", "None", "", "Whiten"])
def test_an_unknown_norm_names_the_key(error_line, norm):
    message = error_line(label_embeddings, ["cat"], "names", 3, (), norm)
    assert "MODEL.LABEL_EMBEDDINGS.NORM" in message
    assert repr(norm) in message


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_goes_in_stays_as_it_was(norm, shape):
    embeddings = random_embeddings(shape)
    before = embeddings.copy()
    found = normalize_embeddings(embeddings, norm)
    assert found.dtype == np.float32
    assert found.shape == shape
    assert np.array_equal(embeddings, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_standardize_is_scikit_learns_over_the_root_of_d(shape):
    embeddings = random_embeddings(shape)
    expected = StandardScaler().fit_transform(embeddings.astype(np.float64)) / shape[1] ** 0.5
    found = normalize_embeddings(embeddings, "standardize")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert (found**2).sum(axis=1).mean() == pytest.approx(1)


def test_a_constant_dimension_becomes_0():
    embeddings = random_embeddings((6, 4))
    # The mean of six of these is another number in float64.
    embeddings[:, 1] = 1e6 / 3
    embeddings[:, 2] = 0
    found = normalize_embeddings(embeddings, "standardize")
    assert not found[:, 1:3].any()
    np.testing.assert_allclose(found[:, [0, 3]].std(axis=0), 0.5, rtol=1e-5)
    whitened = normalize_embeddings(embeddings, "whiten")
    np.testing.assert_allclose(whitened[:, 1:3], 0, atol=1e-6)
    expected = normalize_embeddings(embeddings[:, [0, 3]], "whiten")
    np.testing.assert_allclose(whitened[:, [0, 3]], expected, atol=1e-6)


def unit_rows(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_whiten_is_scikit_learns_pca_turned_back(shape):
    embeddings = random_embeddings(shape).astype(np.float64)
    pca = PCA(min(shape[0] - 1, shape[1]), whiten=True, svd_solver="full").fit(embeddings)
    expected = unit_rows(pca.transform(embeddings) @ pca.components_)
    found = normalize_embeddings(embeddings.astype(np.float32), "whiten")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_whiten_is_the_inverse_root_of_the_covariance():
    """In plain loops, and another decomposition."""
    embeddings = random_embeddings((30, 4)).astype(np.float64)
    means = [sum(row[k] for row in embeddings) / 30 for k in range(4)]
    covariance = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            for row in embeddings:
                covariance[i, j] += (row[i] - means[i]) * (row[j] - means[j]) / 30
    values, vectors = np.linalg.eigh(covariance)
    inverse_root = vectors @ np.diag(values**-0.5) @ vectors.T
    white = (embeddings - means) @ inverse_root
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(4), atol=1e-9)
    found = normalize_embeddings(embeddings.astype(np.float32), "whiten")
    np.testing.assert_allclose(found, unit_rows(white), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 5), (6, 20), (6, 6), (6, 5)])
def test_whitened_rows_of_full_rank_are_all_as_far_apart(shape):
    found = normalize_embeddings(random_embeddings(shape), "whiten").astype(np.float64)
    count = shape[0]
    expected = np.full((count, count), -1 / (count - 1))
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=0), 0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 20), (30, 4)])
def test_what_is_white_stays_as_it_is(shape):
    """Dimensions are not mixed more than it takes."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(np.hstack([np.ones((shape[0], 1)), rng.normal(size=shape)]))
    white = left[:, 1:]  # orthonormal, and orthogonal to 1
    white = np.hstack([white, np.zeros((shape[0], shape[1] - white.shape[1]))])
    found = normalize_embeddings((3 * white + 7).astype(np.float32), "whiten")
    np.testing.assert_allclose(found, unit_rows(white), atol=1e-5)


@pytest.mark.parametrize("offset", [0, 1e3])
@pytest.mark.parametrize("shape", [(6, 20), (30, 4)])
def test_a_label_at_the_mean_is_0_and_changes_no_other(shape, offset):
    """As that of a label without images, in float32."""
    embeddings = random_embeddings(shape) + np.float32(offset)
    mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
    found = normalize_embeddings(np.vstack([embeddings, mean]), "whiten")
    assert not found[-1].any()
    expected = normalize_embeddings(embeddings, "whiten")
    np.testing.assert_allclose(found[:-1], expected, atol=1e-4)


def test_directions_that_are_rounding_are_left_out():
    embeddings = random_embeddings((30, 4)).astype(np.float64)
    embeddings[:, 3] = embeddings[:, 0] + embeddings[:, 1]
    rounded = embeddings.astype(np.float32)
    assert np.linalg.matrix_rank(rounded.astype(np.float64)) == 4
    pca = PCA(3, whiten=True, svd_solver="full").fit(embeddings)
    expected = unit_rows(pca.transform(embeddings) @ pca.components_)
    np.testing.assert_allclose(normalize_embeddings(rounded, "whiten"), expected, atol=1e-4)


def test_a_row_in_no_direction_that_is_kept_is_0():
    embeddings = np.float32([[1, 0], [-1, 0], [0, 1e-9], [0, -1e-9]])
    found = normalize_embeddings(embeddings, "whiten")
    np.testing.assert_allclose(found, [[1, 0], [-1, 0], [0, 0], [0, 0]], atol=1e-7)


@pytest.mark.parametrize("norm", ["standardize", "whiten"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 3)])
def test_one_label_or_all_alike_are_0(norm, shape):
    embeddings = np.tile(random_embeddings((1, shape[1])), (shape[0], 1))
    assert not normalize_embeddings(embeddings, norm).any()


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6))
# Of nearly every rank, and never within rounding of one.
whole_numbers = arrays(np.float32, shapes, elements=st.integers(-3, 3).map(float))
any_numbers = arrays(
    np.float32, shapes, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@settings(max_examples=100)
@given(whole_numbers, st.sampled_from(NORMS), st.randoms(use_true_random=False))
def test_rows_change_places_with_the_labels(embeddings, norm, random):
    order = list(range(len(embeddings)))
    random.shuffle(order)
    expected = normalize_embeddings(embeddings, norm)[order]
    found = normalize_embeddings(embeddings[order], norm)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(max_examples=100)
@given(whole_numbers, st.integers(-100, 100), st.integers(-50, 50))
def test_neither_scale_nor_origin_matters_to_whiten(embeddings, power, origin):
    moved = (embeddings + np.float32(origin)) * np.float32(2.0**power)  # exact in float32
    expected = normalize_embeddings(embeddings, "whiten")
    np.testing.assert_allclose(normalize_embeddings(moved, "whiten"), expected, atol=1e-5)


@settings(max_examples=200)
@given(any_numbers)
def test_any_numbers_give_finite_ones(embeddings):
    standardized = normalize_embeddings(embeddings, "standardize").astype(np.float64)
    target = embeddings.shape[1] ** -0.5
    for column in standardized.T:
        assert column.mean() == pytest.approx(0, abs=1e-5)
        assert column.std() == pytest.approx(target, rel=1e-4) or not column.any()
    whitened = normalize_embeddings(embeddings, "whiten").astype(np.float64)
    for row in whitened:
        assert np.linalg.norm(row) == pytest.approx(1, rel=1e-5) or not row.any()
