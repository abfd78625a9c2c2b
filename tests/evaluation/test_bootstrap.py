import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ia_gcn.evaluation import average_precision
from ia_gcn.evaluation.bootstrap import Interval, draw_resamples, resampled_ap, resampled_map


@given(st.integers(0, 10_000), st.integers(2, 12), st.booleans())
def test_ap_of_a_resample_is_that_of_its_images(seed, count, ties):
    random = np.random.RandomState(seed)
    scores = random.randint(4, size=count) / 4 if ties else random.rand(count)
    targets = random.randint(-1, 2, size=count)
    resamples = draw_resamples(count, 5, seed)
    found = resampled_ap(np.where(targets < 0, -np.inf, scores), targets == 1, resamples)
    for counts, ap in zip(resamples, found):
        drawn = np.repeat(np.arange(count), counts)
        expected = average_precision(scores[drawn], targets[drawn])
        np.testing.assert_allclose(ap, expected, equal_nan=True)


def test_map_is_the_mean_over_labels_with_a_positive(monkeypatch):
    random = np.random.RandomState(0)
    scores, targets = random.rand(30, 4), (random.rand(30, 4) < [0.5, 0.3, 0.03, 0]).astype(int)
    resamples = draw_resamples(30, 8)
    expected = np.nanmean(
        [resampled_ap(s, t == 1, resamples) for s, t in zip(scores.T, targets.T)], axis=0
    )
    np.testing.assert_allclose(resampled_map(scores, targets, resamples), expected)
    # Whatever the number of resamples that are looked at together.
    monkeypatch.setattr("ia_gcn.evaluation.bootstrap.NUMBERS_AT_ONCE", 70)
    np.testing.assert_allclose(resampled_map(scores, targets, resamples), expected)
    some = resampled_map(scores, targets, resamples, [1])
    np.testing.assert_allclose(some, resampled_ap(scores[:, 1], targets[:, 1] == 1, resamples))


def test_a_resample_has_as_many_images():
    resamples = draw_resamples(50, 20)
    assert (resamples.sum(axis=1) == 50).all()
    assert (resamples == draw_resamples(50, 20)).all()


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """Of 300 data sets, about 95 % have an interval that the true value is in."""
    random = np.random.RandomState(0)
    population_scores = random.rand(20_000)
    population = random.rand(20_000) < population_scores
    true = average_precision(population_scores, population.astype(int))
    inside = 0
    for seed in range(300):
        drawn = random.randint(20_000, size=200)
        scores, positive = population_scores[drawn], population[drawn]
        resampled = resampled_ap(scores, positive, draw_resamples(200, 100, seed))
        interval = Interval.of(average_precision(scores, positive.astype(int)), resampled)
        inside += interval.low <= true <= interval.high
    assert inside / 300 == pytest.approx(0.95, abs=0.06)
