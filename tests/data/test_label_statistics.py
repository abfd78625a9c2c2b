"""Label counts and pair counts, and the file that keeps them."""

import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn.data import (
    cached_label_statistics,
    count_labels,
    count_states,
    label_matrices,
    summarize_label_graph,
)
from ia_gcn.data import label_statistics as module
from ia_gcn.data.dataset_mapper import target_vector
from ia_gcn.modeling.label_graph import statistical_lcm

NUM_LABELS = 6
label_lists = st.lists(st.lists(st.integers(0, NUM_LABELS - 1), max_size=8), max_size=20)

quick = settings(max_examples=60)


def as_dicts(label_lists):
    return [{"labels": labels} for labels in label_lists]


@quick
@given(label_lists)
def test_counts_are_those_of_plain_loops(lists):
    label_counts, pair_counts = count_labels(as_dicts(lists), NUM_LABELS)
    for i in range(NUM_LABELS):
        assert label_counts[i] == sum(i in labels for labels in lists)
        for j in range(NUM_LABELS):
            assert pair_counts[i, j] == sum(i in labels and j in labels for labels in lists)
    for counts, dtype, dims in ((label_counts, np.int64, 1), (pair_counts, np.int32, 2)):
        assert isinstance(counts, np.ndarray)
        assert counts.dtype == dtype
        assert counts.shape == (NUM_LABELS,) * dims


@quick
@given(label_lists, st.randoms(use_true_random=False))
def test_neither_order_nor_repeated_labels_matter(lists, random):
    expected = count_labels(as_dicts(lists), NUM_LABELS)
    shuffled = [random.sample(labels + labels[:2], len(labels + labels[:2])) for labels in lists]
    random.shuffle(shuffled)
    found = count_labels(as_dicts(shuffled), NUM_LABELS)
    assert np.array_equal(found.label_counts, expected.label_counts)
    assert np.array_equal(found.pair_counts, expected.pair_counts)


@quick
@given(label_lists, label_lists)
def test_counts_of_two_data_sets_add_up(first, second):
    both = count_labels(as_dicts(first + second), NUM_LABELS)
    parts = [count_labels(as_dicts(lists), NUM_LABELS) for lists in (first, second)]
    assert np.array_equal(both.pair_counts, parts[0].pair_counts + parts[1].pair_counts)


def test_ignored_labels_do_not_count():
    dicts = [{"labels": [0], "ignored_labels": [1]}, {"labels": [1], "ignored_labels": []}]
    assert count_labels(dicts, 2).label_counts.tolist() == [1, 1]
    assert count_labels(dicts, 2).pair_counts.tolist() == [[1, 0], [0, 1]]


# ---------------------------------------------------------------------------------- unknown labels

known_states = st.lists(st.sampled_from([1, 0, -1]), min_size=NUM_LABELS, max_size=NUM_LABELS)
# Each image's states, and whether it is one with holes; of the others, -1 is ignored.
states_of_images = st.lists(st.tuples(known_states, st.booleans()), max_size=12)


def as_dict(states, with_holes):
    found = {s: [i for i, state in enumerate(states) if state == s] for s in (1, 0, -1)}
    if with_holes:
        return {"labels": found[1], "absent_labels": found[0]}
    return {"labels": found[1], "ignored_labels": found[-1]}


@quick
@given(states_of_images)
def test_pairs_are_those_of_images_in_which_both_labels_are_known(images):
    dicts = [as_dict(*image) for image in images]
    label_counts, pair_counts = count_labels(dicts, NUM_LABELS)
    for i in range(NUM_LABELS):
        shows_i = [(states, holes) for states, holes in images if states[i] == 1]
        assert label_counts[i] == len(shows_i)
        for j in range(NUM_LABELS):
            known = [states[j] for states, holes in shows_i if not holes or states[j] != -1]
            expected = known.count(1) * len(shows_i) / len(known) if known else 0
            assert abs(pair_counts[i, j] - expected) <= 0.5


@quick
@given(states_of_images)
def test_states_are_counted(images):
    present, absent, unknown = count_states([as_dict(*image) for image in images], NUM_LABELS)
    for i in range(NUM_LABELS):
        states = [states[i] for states, _ in images]
        assert (present[i], absent[i], unknown[i]) == tuple(map(states.count, (1, 0, -1)))


@quick
@given(states_of_images)
def test_matrices_have_the_states_of_every_image(images):
    dicts = [as_dict(*image) for image in images]
    present, known = label_matrices(dicts, NUM_LABELS)
    states = np.array([states for states, _ in images]).reshape(-1, NUM_LABELS)
    np.testing.assert_array_equal(present.toarray(), states == 1)
    assert (known is None) == all(-1 not in record and not holes for record, holes in images)
    if known is not None:
        np.testing.assert_array_equal(known.toarray(), states >= 0)
        assert known.dtype == np.float32
        assert known.nnz == (states >= 0).sum()
    np.testing.assert_array_equal(
        [target_vector(record, NUM_LABELS).tolist() for record in dicts], images and states
    )


@pytest.mark.parametrize("count", [count_labels, count_states, label_matrices])
def test_images_are_looked_at_once_and_not_kept(count):
    """They may come from a generator, as from disk; memory is for the labels alone."""

    def load():
        for i in range(2000):
            yield {"labels": [i % 3], "absent_labels": [4], "file_name": "x" * 10000 + str(i)}

    tracemalloc.start()
    count(load(), NUM_LABELS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6


def test_unknown_labels_hide_no_correlation():
    """Half of the labels are unknown, at random: P(j|i) stays what it was."""
    rng = np.random.default_rng(0)
    first = rng.random(4000) < 0.3
    second = np.where(first, rng.random(4000) < 0.8, rng.random(4000) < 0.1)
    dicts = []
    for states in np.stack([first, second], axis=1).astype(int):
        states[rng.random(2) < 0.5] = -1
        dicts.append(as_dict(states.tolist(), True))
    label_counts, pair_counts = count_labels(dicts, 2)
    assert pair_counts[0, 1] / label_counts[0] == pytest.approx(0.8, abs=0.05)


# ------------------------------------------------------------------------------------ the summary


@quick
@given(
    label_lists.map(as_dicts) | states_of_images.map(lambda images: [as_dict(*i) for i in images]),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.integers(1, 8),
    st.integers(1, 2 * NUM_LABELS),
)
def test_the_summary_is_that_of_the_whole_matrices(dicts, threshold, max_shown, pairs_at_once):
    label_counts, pair_counts = count_labels(dicts, NUM_LABELS)
    conditional = pair_counts / label_counts.clip(min=1)[:, None]
    lcm = statistical_lcm(pair_counts, label_counts, threshold, 0.25)
    edges = (lcm > 0) & ~np.eye(NUM_LABELS, dtype=bool)

    with mock.patch.object(module, "PAIRS_AT_ONCE", pairs_at_once):
        found = summarize_label_graph(dicts, NUM_LABELS, threshold, 0.25, max_shown)
    assert np.array_equal(found.label_counts, label_counts)
    assert np.array_equal(found.edges_out, edges.sum(axis=1))
    assert np.array_equal(found.edges_in, edges.sum(axis=0))
    shown = found.shown
    assert len(shown) == min(max_shown, NUM_LABELS)
    assert list(shown) == sorted(set(shown))
    assert min(label_counts[shown]) >= max(np.delete(label_counts, shown), default=0)
    assert found.conditional == pytest.approx(conditional[np.ix_(shown, shown)])
    assert found.lcm == pytest.approx(lcm[np.ix_(shown, shown)])


def test_the_summary_of_many_labels_takes_no_matrix_of_all_pairs():
    """Of 8,000 labels, which would be 512 MB."""
    dicts = as_dicts([[i, (i + 1) % 8_000] for i in range(8_000)])
    tracemalloc.start()
    found = summarize_label_graph(dicts, 8_000, 0.5, 0.25, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Each label is in two images, with a neighbour in each.
    assert set(found.edges_out) == set(found.edges_in) == {2}
    assert peak < 150e6


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_the_summary_takes_a_threshold_from_0_to_1(threshold):
    with pytest.raises(ValueError, match="threshold"):
        summarize_label_graph([{"labels": [0]}], 1, threshold, 0.25, 1)


# --------------------------------------------------------------------------------------- the file

NAMES = ["cat", "dog", "cow"]
DICTS = as_dicts([[0, 1], [0], [], [2, 0]])


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "label_statistics.npz")


@pytest.fixture
def count_calls(monkeypatch):
    """A list that grows with every counting."""
    calls = []

    def count(*args):
        calls.append(args)
        return count_labels(*args)

    monkeypatch.setattr(module, "count_labels", count)
    return calls


def test_the_file_is_for_other_tools_too(path):
    statistics = cached_label_statistics(DICTS, NAMES, path)
    assert statistics.label_counts.tolist() == [3, 1, 1]
    with np.load(path, allow_pickle=False) as file:
        assert file["label_names"].tolist() == NAMES
        assert np.array_equal(file["label_counts"], statistics.label_counts)
        assert np.array_equal(file["pair_counts"], statistics.pair_counts)


def test_the_file_is_read_again(path, count_calls):
    cached_label_statistics(DICTS, NAMES, path)
    with np.load(path) as file:
        content = dict(file)
    content["label_counts"] += 100
    np.savez(path, **content)
    statistics = cached_label_statistics(DICTS, NAMES, path)
    assert statistics.label_counts.tolist() == [103, 101, 101]
    assert len(count_calls) == 1


def test_another_order_of_the_images_is_the_same_data(path, count_calls):
    cached_label_statistics(DICTS, NAMES, path)
    cached_label_statistics(DICTS[::-1], NAMES, path)
    assert len(count_calls) == 1


@pytest.mark.parametrize(
    ("dicts", "names"),
    [
        (as_dicts([[0, 1], [0], [], [2, 1]]), NAMES),
        (as_dicts([[0, 1], [0], [2, 0]]), NAMES),
        (as_dicts([[0, 1], [0], [], [2], [0]]), NAMES),
        (as_dicts([[0], [1, 0], [], [], [2, 0]]), NAMES),
        (DICTS, ["dog", "cat", "cow"]),
        (DICTS, ["cat", "dog", "cow", "emu"]),
        (DICTS, ["cat", "dogcow", ""]),
        ([*DICTS[:2], {"labels": [], "absent_labels": []}, DICTS[3]], NAMES),
    ],
)
def test_other_data_is_counted_anew(path, count_calls, dicts, names):
    cached_label_statistics(DICTS, NAMES, path)
    found = cached_label_statistics(dicts, names, path)
    expected = count_labels(dicts, len(names))
    assert np.array_equal(found.pair_counts, expected.pair_counts)
    assert len(count_calls) == 2
    with np.load(path) as file:
        assert file["label_names"].tolist() == names
        assert np.array_equal(file["pair_counts"], expected.pair_counts)


def npy_bytes(path):
    np.save(path, np.zeros(3))
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("garbage", ["empty", "text", "cut", "damaged", "npy", "pickle"])
def test_a_damaged_file_is_written_anew(path, tmp_path, garbage):
    """A run that was killed while it wrote, or that writes just now, leaves any of the first."""
    expected = cached_label_statistics(DICTS, NAMES, path)
    with open(path, "rb") as file:
        good = file.read()
    middle = good.index(b"label_counts.npy") + 40  # in that entry's compressed bytes
    content = {
        "empty": b"",
        "text": b"hello\n",
        "cut": good[: len(good) // 2],
        "damaged": good[:middle] + b"\xff" * 20 + good[middle + 20 :],
        "npy": npy_bytes(tmp_path / "array.npy"),
        "pickle": b"\x80\x04N.",
    }[garbage]
    with open(path, "wb") as file:
        file.write(content)
    found = cached_label_statistics(DICTS, NAMES, path)
    assert np.array_equal(found.pair_counts, expected.pair_counts)
    with np.load(path) as file:
        assert np.array_equal(file["label_counts"], expected.label_counts)


def test_only_the_main_process_writes(path, monkeypatch):
    monkeypatch.setattr(module.comm, "is_main_process", lambda: False)
    assert cached_label_statistics(DICTS, NAMES, path).label_counts.tolist() == [3, 1, 1]
    with pytest.raises(FileNotFoundError):
        np.load(path)
