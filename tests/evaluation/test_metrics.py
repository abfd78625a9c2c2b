import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_score,
    recall_score,
)

from ia_gcn.evaluation.metrics import (
    CONVENTIONS,
    Conventions,
    average_precision,
    multi_label_metrics,
)
from tests.helpers.strategies import predictions

# A mean of nothing or a division by zero must not reach the user as a warning.
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

SUMMARY = ["mAP", "CP", "CR", "CF1", "OP", "OR", "OF1"]
FORMULAS = st.sampled_from(CONVENTIONS["ap"])
ALL_CONVENTIONS = st.builds(
    Conventions,
    FORMULAS,
    st.sampled_from(CONVENTIONS["cf1"]),
    st.booleans(),
    st.sampled_from(CONVENTIONS["ignored"]),
)
THRESHOLDS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0])

quick = settings(max_examples=60)


# A literal version, one loop per sum sign.


def loop_predicted(scores, targets, threshold, top_k, forced):
    """The (image, label) pairs that are predicted."""
    predicted = set()
    for i, row in enumerate(scores.tolist()):
        known = [c for c in range(len(row)) if targets[i, c] != -1]
        known.sort(key=lambda c: (-row[c], c))
        forced_here = forced and top_k is not None
        predicted |= {(i, c) for c in known[:top_k] if forced_here or row[c] >= threshold}
    return predicted


def loop_summary(scores, targets, threshold, top_k, conventions):
    """Eq. 15-17, from 0 to 1."""
    n, n_labels = scores.shape
    predicted = loop_predicted(scores, targets, threshold, top_k, conventions.forced_top_k)
    correct, chosen, present = [0] * n_labels, [0] * n_labels, [0] * n_labels
    for i in range(n):
        for c in range(n_labels):
            is_positive = targets[i, c] == 1
            is_predicted = (i, c) in predicted
            correct[c] += is_positive and is_predicted
            chosen[c] += is_predicted
            present[c] += is_positive

    def ratio(part, whole):
        return part / whole if whole else 0.0

    def f1(p, r):
        return ratio(2 * p * r, p + r)

    occurring = [c for c in range(n_labels) if present[c]]
    cp = ratio(sum(ratio(correct[c], chosen[c]) for c in occurring), len(occurring))
    cr = ratio(sum(ratio(correct[c], present[c]) for c in occurring), len(occurring))
    op, or_ = ratio(sum(correct), sum(chosen)), ratio(sum(correct), sum(present))
    cf1 = f1(cp, cr)
    if conventions.cf1 == "mean_of_labels":
        each = [f1(ratio(correct[c], chosen[c]), correct[c] / present[c]) for c in occurring]
        cf1 = ratio(sum(each), len(each))
    return {"CP": cp, "CR": cr, "CF1": cf1, "OP": op, "OR": or_, "OF1": f1(op, or_)}


def loop_average_precision(scores, targets, formula):
    """One label's AP, from 0 to 1."""
    pairs = [(s, t) for s, t in zip(scores.tolist(), targets.tolist()) if t != -1]
    hits = [s for s, t in pairs if t == 1]
    if not hits:
        return math.nan

    def curve(at):
        retrieved = [t for s, t in pairs if s >= at]
        return sum(retrieved), len(retrieved)

    if formula == "all_points":
        return sum(n_correct / n for n_correct, n in map(curve, hits)) / len(hits)
    points = [curve(at) for at, _ in pairs]
    if formula == "envelope":
        # The area under the highest precision at each recall or more, step by step of recall.
        recalls = sorted({c for c, _ in points})
        area = 0.0
        for before, after in zip([0, *recalls], recalls):
            area += (after - before) * max(c / n for c, n in points if c >= after)
        return area / len(hits)
    total = 0.0
    for i in range(11):
        total += max(c / n for c, n in points if 10 * c >= i * len(hits))
    return total / 11


@quick
@given(predictions(), THRESHOLDS, st.none() | st.integers(1, 8), ALL_CONVENTIONS)
def test_equals_the_loops(prediction, threshold, top_k, conventions):
    scores, targets = prediction
    metrics = multi_label_metrics(scores, targets, threshold, top_k, conventions)
    absent = np.where(targets == -1, 0, targets)
    counted = targets if conventions.ignored == "nowhere" else absent
    for key, value in loop_summary(scores, counted, threshold, top_k, conventions).items():
        assert metrics[key] == pytest.approx(100 * value, abs=1e-10), key
    ranked = absent if conventions.ignored == "everywhere" else targets
    columns = zip(scores.T, ranked.T)
    ap = [100 * loop_average_precision(s, t, conventions.ap) for s, t in columns]
    np.testing.assert_allclose(metrics["AP"], ap, rtol=0, atol=1e-10)
    known = [value for value in ap if not math.isnan(value)]
    expected = sum(known) / len(known) if known else math.nan
    assert metrics["mAP"] == pytest.approx(expected, abs=1e-10, nan_ok=True)


@quick
@given(predictions(max_images=40, max_labels=2))
def test_average_precision_equals_sklearn(prediction):
    scores, targets = prediction
    metrics = multi_label_metrics(scores, targets)
    for c, (s, t) in enumerate(zip(scores.T, targets.T)):
        ap = average_precision(s, t)
        np.testing.assert_equal(metrics["AP"][c], ap)
        if (t == 1).any():
            expected = average_precision_score(t[t != -1], s[t != -1])
            assert ap / 100 == pytest.approx(expected, abs=1e-9)
        else:
            assert math.isnan(ap)


@quick
@given(predictions(), THRESHOLDS)
def test_summary_equals_sklearn(prediction, threshold):
    scores, targets = prediction
    metrics = multi_label_metrics(scores, targets, threshold)
    predicted = scores.astype(np.float64) >= threshold
    precision, recall = [], []
    for t, p in zip(targets.T, predicted.T):
        known = t != -1
        if (t == 1).any():
            precision.append(precision_score(t[known], p[known], zero_division=0))
            recall.append(recall_score(t[known], p[known], zero_division=0))
    cp, cr = (np.mean(values) if values else 0.0 for values in (precision, recall))
    assert metrics["CP"] / 100 == pytest.approx(cp, abs=1e-9)
    assert metrics["CR"] / 100 == pytest.approx(cr, abs=1e-9)
    assert metrics["CF1"] / 100 == pytest.approx(2 * cp * cr / (cp + cr or 1), abs=1e-9)

    known = targets != -1
    t, p = targets[known], predicted[known]
    if t.size:
        for key, score in {"OP": precision_score, "OR": recall_score, "OF1": f1_score}.items():
            assert metrics[key] / 100 == pytest.approx(score(t, p, zero_division=0), abs=1e-9)


def test_where_all_labels_occur_equals_sklearn_macro_and_micro():
    rng = np.random.default_rng(0)
    scores = rng.random((300, 20), dtype=np.float32)
    targets = (rng.random((300, 20)) < 0.2).astype(int)
    scores[:, 3] *= 0.4  # a label that is never predicted
    assert targets.any(axis=0).all()
    metrics = multi_label_metrics(scores, targets)

    def percent(score, average):
        return 100 * score(targets, scores >= 0.5, average=average, zero_division=0)

    assert metrics["CP"] == pytest.approx(percent(precision_score, "macro"))
    assert metrics["CR"] == pytest.approx(percent(recall_score, "macro"))
    assert metrics["OP"] == pytest.approx(percent(precision_score, "micro"))
    assert metrics["OR"] == pytest.approx(percent(recall_score, "micro"))
    assert metrics["OF1"] == pytest.approx(percent(f1_score, "micro"))
    assert metrics["mAP"] == pytest.approx(100 * average_precision_score(targets, scores))


@quick
@given(predictions(), st.none() | st.integers(1, 4), ALL_CONVENTIONS, st.data())
def test_order_of_the_images_changes_nothing(prediction, top_k, conventions, data):
    scores, targets = prediction
    order = data.draw(st.permutations(range(len(scores))))
    options = {"top_k": top_k, "conventions": conventions}
    np.testing.assert_equal(
        multi_label_metrics(scores[order], targets[order], **options),
        multi_label_metrics(scores, targets, **options),
    )


@quick
@given(predictions(), st.data())
def test_order_of_the_labels_permutes_the_average_precisions(prediction, data):
    scores, targets = prediction
    order = data.draw(st.permutations(range(scores.shape[1])))
    metrics = multi_label_metrics(scores, targets)
    permuted = multi_label_metrics(scores[:, order], targets[:, order])
    np.testing.assert_array_equal(permuted["AP"], metrics["AP"][order])
    for key in SUMMARY:
        assert permuted[key] == pytest.approx(metrics[key], abs=1e-10, nan_ok=True), key


@quick
@given(predictions(), st.none() | st.integers(1, 4), FORMULAS, st.booleans(), st.data())
def test_the_score_of_an_ignored_entry_changes_nothing(prediction, top_k, formula, forced, data):
    scores, targets = prediction
    other = scores.copy()
    other[targets == -1] = data.draw(st.sampled_from([0, 0.5, 1]))
    options = {"top_k": top_k, "conventions": Conventions(formula, forced_top_k=forced)}
    np.testing.assert_equal(
        multi_label_metrics(other, targets, threshold=0.0, **options),
        multi_label_metrics(scores, targets, threshold=0.0, **options),
    )


@quick
@given(predictions())
def test_a_label_without_positives_only_lowers_overall_precision(prediction):
    scores, targets = prediction
    more = multi_label_metrics(
        np.hstack([scores, np.ones_like(scores[:, :1])]),
        np.hstack([targets, np.zeros_like(targets[:, :1])]),
    )
    metrics = multi_label_metrics(scores, targets)
    assert math.isnan(more["AP"][-1])
    np.testing.assert_array_equal(more["AP"][:-1], metrics["AP"])
    for key in ["mAP", "CP", "CR", "CF1", "OR"]:
        np.testing.assert_equal(more[key], metrics[key])
    assert more["OP"] < metrics["OP"] or metrics["OP"] == 0


@quick
@given(predictions(ignored=False), st.sampled_from([bool, np.int8, np.uint8, np.float32]))
def test_types_of_scores_and_targets_do_not_matter(prediction, dtype):
    scores, targets = prediction
    np.testing.assert_equal(
        multi_label_metrics(scores, targets.astype(dtype), threshold=0.7),
        multi_label_metrics(scores.astype(np.float64), targets, threshold=0.7),
    )


def test_types_of_the_results():
    metrics = multi_label_metrics(np.ones((2, 3), np.float32), np.ones((2, 3), bool))
    assert list(metrics) == [*SUMMARY, "AP"]
    assert all(type(metrics[key]) is float for key in SUMMARY)
    assert metrics["AP"].dtype == np.float64
    assert all(metrics[key] == 100 for key in SUMMARY)
    assert type(average_precision(np.ones(2, np.float32), np.ones(2, bool))) is float


def test_the_arguments_are_left_alone():
    scores = np.array([[0.2, 0.9]], np.float32)
    targets = np.array([[-1, 1]])
    multi_label_metrics(scores, targets, top_k=1)
    np.testing.assert_array_equal(scores, np.array([[0.2, 0.9]], np.float32))
    np.testing.assert_array_equal(targets, [[-1, 1]])


def test_by_hand():
    scores = np.array([[0.9, 0.6, 0.1], [0.8, 0.6, 0.2], [0.4, 0.7, 0.3]])
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, -1, 0]])
    metrics = multi_label_metrics(scores, targets)
    # Label 0: 1/1, then 2/3. Label 1: the positive is tied with a negative. Label 2: no positive.
    np.testing.assert_allclose(metrics["AP"], [100 * 5 / 6, 50, np.nan])
    assert metrics["mAP"] == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)
    assert metrics["CP"] == pytest.approx(50)
    assert metrics["CR"] == pytest.approx(75)
    assert metrics["CF1"] == pytest.approx(60)
    assert metrics["OP"] == pytest.approx(50)
    assert metrics["OR"] == pytest.approx(100 * 2 / 3)
    assert metrics["OF1"] == pytest.approx(100 * 4 / 7)


def test_top_k_of_equal_scores_are_the_first_labels():
    scores = np.full((1, 4), 0.6)
    metrics = multi_label_metrics(scores, np.array([[1, -1, 1, 0]]), top_k=2)
    assert (metrics["OP"], metrics["OR"]) == (100, 100)
    metrics = multi_label_metrics(scores, np.array([[0, 0, 1, 1]]), top_k=2)
    assert (metrics["OP"], metrics["OR"]) == (0, 0)


def test_top_k_still_asks_for_the_threshold():
    scores = np.array([[0.4, 0.6, 0.3]])
    assert multi_label_metrics(scores, np.ones((1, 3)), top_k=2)["OR"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_threshold_is_not_rounded_to_the_scores(dtype):
    scores = np.array([[0.7, 0.3]], dtype)
    expected = scores.astype(np.float64) >= [0.7, 0.3]
    for c, threshold in enumerate([0.7, 0.3]):
        one = multi_label_metrics(scores[:, [c]], np.ones((1, 1)), threshold)
        assert one["OR"] == 100 * expected[0, c]


def test_eleven_point_recall_levels_are_exact():
    # Ten positives, the first three found at once: precision is 1 up to a recall of 3/10 and not
    # beyond, though 0.1 * 3 > 3 / 10 in floating point.
    scores = np.array([0.9] * 3 + [0.8] * 90 + [0.7] * 7)
    targets = np.array([1] * 3 + [0] * 90 + [1] * 7)
    ap = average_precision(scores, targets, "eleven_points")
    assert ap == pytest.approx(100 * (4 * 1 + 7 * 0.1) / 11)


@pytest.mark.parametrize("field", CONVENTIONS)
def test_unknown_conventions_are_refused(field):
    with pytest.raises(ValueError, match=field):
        multi_label_metrics(*EXAMPLE, conventions=Conventions()._replace(**{field: "other"}))


# Two images, three labels: one that is ignored and scores high, and one below the threshold.
EXAMPLE = np.array([[0.9, 0.4, 0.6], [0.2, 0.3, 0.8]]), np.array([[-1, 1, 0], [1, 0, 1]])


def test_conventions_by_hand():
    def found(**fields):
        return multi_label_metrics(*EXAMPLE, top_k=2, conventions=Conventions(**fields))

    # Predicted: label 2 in both images, rightly in one.
    assert found()["OP"] == 50
    # And label 0 of the first image.
    assert found(ignored="in_f1")["OP"] == pytest.approx(100 / 3)
    assert found(ignored="in_f1")["AP"][0] == found()["AP"][0] == 100
    assert found(ignored="everywhere")["AP"][0] == 50
    # Labels 2 and 1 of the first image, 2 and 1 of the second.
    assert found(forced_top_k=True)["OP"] == 50
    assert found(forced_top_k=True)["OR"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("top_k", [None, 3])
def test_known_labels_count_in_f1_as_in_c_trans_code(top_k):
    """AP of the labels that were not told; F1 of all, with scikit-learn as there."""
    rng = np.random.default_rng(0)
    scores, truth = rng.random((200, 8)), rng.integers(0, 2, (200, 8))
    told = rng.random((200, 8)) < 0.5
    targets, known = np.where(told, -1, truth), np.where(told, truth, -1)
    conventions = Conventions(known_in_f1=True)
    found = multi_label_metrics(scores, targets, 0.5, top_k, conventions, known)
    for c in range(8):
        asked = ~told[:, c]
        expected = average_precision_score(truth[asked, c], scores[asked, c])
        assert found["AP"][c] == pytest.approx(100 * expected)
    predicted = scores >= 0.5
    if top_k:
        predicted &= scores >= np.sort(scores)[:, -top_k, None]
    for name, average in (("C", "macro"), ("O", "micro")):
        p = 100 * precision_score(truth, predicted, average=average)
        r = 100 * recall_score(truth, predicted, average=average)
        values = {"P": p, "R": r, "F1": 2 * p * r / (p + r)}
        assert {k: found[name + k] for k in values} == pytest.approx(values)
    # Without the convention they have no effect, and the convention has none without them.
    plain = multi_label_metrics(scores, targets, 0.5, top_k)
    for other in [
        multi_label_metrics(scores, targets, 0.5, top_k, known=known),
        multi_label_metrics(scores, targets, 0.5, top_k, conventions),
    ]:
        assert all(np.array_equal(other[key], value) for key, value in plain.items())


def test_a_label_whose_positives_were_all_told_is_left_out_of_map():
    targets = np.array([[-1, 0], [0, 1], [0, -1]])
    known = np.array([[1, -1], [-1, -1], [-1, 1]])
    scores = np.array([[0.9, 0.1], [0.2, 0.7], [0.3, 0.6]])
    conventions = Conventions(known_in_f1=True)
    found = multi_label_metrics(scores, targets, conventions=conventions, known=known)
    np.testing.assert_array_equal(found["AP"], [np.nan, 100])
    assert found["mAP"] == 100
    assert (found["CR"], found["OR"]) == (100, 100)


def test_cf1_by_hand():
    # Precision and recall are 1 and 1/2 of the first label, 1/2 and 1 of the second.
    arrays = np.array([[0.9, 0.9], [0.1, 0.9]]), np.array([[1, 1], [1, 0]])
    assert multi_label_metrics(*arrays)["CF1"] == pytest.approx(75)
    conventions = Conventions(cf1="mean_of_labels")
    assert multi_label_metrics(*arrays, conventions=conventions)["CF1"] == pytest.approx(200 / 3)


def test_the_envelope_is_above_all_points():
    scores, targets = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 1])
    # Precision 1, 2/3 and 3/4 at the positives; the second takes the third's.
    assert average_precision(scores, targets) == pytest.approx(100 * (1 + 2 / 3 + 3 / 4) / 3)
    envelope = average_precision(scores, targets, "envelope")
    assert envelope == pytest.approx(100 * (1 + 3 / 4 + 3 / 4) / 3)


@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (3, 0)])
def test_empty(shape):
    metrics = multi_label_metrics(np.zeros(shape), np.zeros(shape, int), top_k=2)
    np.testing.assert_array_equal(metrics["AP"], np.full(shape[1], np.nan))
    assert math.isnan(metrics["mAP"])
    assert all(metrics[key] == 0 for key in SUMMARY[1:])
    assert math.isnan(average_precision(np.zeros(0), np.zeros(0)))


HALVES = np.full((2, 3), 0.5)
ZEROS = np.zeros((2, 3), int)


def replaced(array, value):
    array = array.astype(float)
    array[1, 2] = value
    return array


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (HALVES, ZEROS[:1], "2-D and of the same shape"),
        (HALVES, ZEROS.T, "2-D and of the same shape"),
        (HALVES[0], ZEROS[0], "2-D and of the same shape"),
        (HALVES[None], ZEROS[None], "2-D and of the same shape"),
        (replaced(HALVES, np.nan), ZEROS, "finite and in .* got nan"),
        (replaced(HALVES, np.inf), ZEROS, "finite and in .* got inf"),
        (replaced(HALVES, -np.inf), ZEROS, "finite and in .* got -inf"),
        (replaced(HALVES, 1.5), ZEROS, "finite and in .* got 1.5"),
        (replaced(HALVES, -0.25), ZEROS, "finite and in .* got -0.25"),
        # Ignoring an entry does not excuse a NaN, which tells of a broken model.
        (replaced(HALVES, np.nan), ZEROS - 1, "finite and in .* got nan"),
        (HALVES, replaced(ZEROS, 2), "1, 0 or -1, got 2"),
        (HALVES, replaced(ZEROS, -2), "1, 0 or -1, got -2"),
        (HALVES, replaced(ZEROS, 0.5), "1, 0 or -1, got 0.5"),
        (HALVES, replaced(ZEROS, np.nan), "1, 0 or -1, got nan"),
        (HALVES, ZEROS.astype(np.uint8) - np.uint8(1), "1, 0 or -1, got 255"),
        (HALVES.astype(str), ZEROS, "real numbers"),
        (HALVES, ZEROS.astype(complex), "real numbers"),
    ],
)
def test_refusals(scores, targets, message):
    with pytest.raises(ValueError, match=message) as error:
        multi_label_metrics(scores, targets)
    assert "\n" not in str(error.value)


def test_average_precision_refuses_the_same():
    with pytest.raises(ValueError, match="1-D and of the same shape"):
        average_precision(HALVES, ZEROS)
    with pytest.raises(ValueError, match="finite and in"):
        average_precision(np.array([2.0]), np.array([1]))
    with pytest.raises(ValueError, match="1, 0 or -1"):
        average_precision(np.array([0.5]), np.array([2]))


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_below_one_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        multi_label_metrics(HALVES, ZEROS, top_k=top_k)
