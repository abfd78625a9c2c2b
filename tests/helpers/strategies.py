"""Hypothesis strategies that several test files draw from."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


@st.composite
def predictions(draw, ignored=True, max_images=12, max_labels=6):
    """Scores and targets (n, C). Half of the scores are from a coarse grid, so they often tie."""
    shape = draw(st.tuples(st.integers(0, max_images), st.integers(1, max_labels)))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    width = 8 * np.dtype(dtype).itemsize
    coarse = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 1.0]).map(dtype)
    fine = st.floats(0, 1, width=width)
    scores = draw(hnp.arrays(dtype, shape, elements=draw(st.sampled_from([coarse, fine]))))
    values = [1, 0, -1] if ignored else [1, 0]
    targets = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from(values)))
    return scores, targets
