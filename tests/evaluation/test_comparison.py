"""Means, paired differences and images of several trainings, against scipy's own t-test."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from ia_gcn.evaluation.comparison import (
    draw_curve,
    draw_rows,
    mean_and_deviation,
    paired_difference,
)

percents = st.floats(0, 100, allow_nan=False)


@given(st.lists(st.tuples(percents, percents), min_size=2, max_size=12))
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    first, second = (dict(enumerate(values)) for values in zip(*pairs))
    found = paired_difference(first, second)
    differences = [b - a for a, b in pairs]
    assert found.seeds == len(pairs)
    assert found.mean == pytest.approx(statistics.mean(differences), abs=1e-9)
    if np.std(differences) < 1e-6:
        assert found.high - found.low == pytest.approx(0, abs=1e-4)
        return
    interval = stats.ttest_rel(*zip(*[(b, a) for a, b in pairs])).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_only_seeds_that_both_have_are_compared():
    found = paired_difference({1: 10.0, 2: 20.0, 3: 99.0}, {2: 21.0, 1: 13.0, 4: 0.0})
    assert (found.mean, found.seeds) == (2.0, 2)


def test_what_cannot_be_said_is_not_said():
    one = paired_difference({1: 10.0}, {1: 12.5})
    assert str(one) == "+2.50"
    assert math.isnan(one.low)
    assert str(paired_difference({1: 10.0}, {2: 10.0})) == "–"


def test_text():
    assert mean_and_deviation([80.0, 82.0]) == "81.00 ± 1.41"
    assert mean_and_deviation([80.0]) == "80.00"
    assert str(paired_difference({1: 1.0, 2: 1.0}, {1: 3.0, 2: 3.0})) == "+2.00 [+2.00, +2.00]"


def test_images(tmp_path):
    draw_rows({"Base": [80.0, 81.0], "with $ in it": [82.0]}, "title", str(tmp_path / "rows.png"))
    draw_curve({0.2: [80.0, 81.0], 0: [70.0]}, "title", "λ", str(tmp_path / "curve.png"))
    for name in ("rows", "curve"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"))
        assert (pixels < 128).mean() > 0.001
