"""A label prior that is trained along with the model."""

import pytest
import torch

from ia_gcn.engine import Trainer
from tests.helpers.training import Cut, assert_same_state, run

PRIORS = {
    "pairwise": ("MODEL.LABEL_PRIOR.NAME", "PairwisePrior"),
    "themes": ("MODEL.LABEL_PRIOR.NAME", "ThemePrior", "MODEL.LABEL_PRIOR.NUM_THEMES", 3),
}


@pytest.mark.parametrize("kind", [pytest.param("pairwise", marks=pytest.mark.slow), "themes"])
def test_it_starts_from_a_fit_and_resumes_to_the_bit(make_cfg, kind):
    opts = (*PRIORS[kind], "MODEL.LABEL_PRIOR.TRAINED", True)
    whole = run(make_cfg("whole", *opts))
    with pytest.raises(Cut):
        run(make_cfg("cut", *opts), cut_at=4)
    resumed = run(make_cfg("cut", *opts), resume=True)
    assert_same_state(whole, resumed)
    start = Trainer(make_cfg("start", *opts)).model.label_prior
    for before, after in zip(start.parameters(), whole.model.label_prior.parameters()):
        assert before.abs().sum() > 0
        assert not torch.equal(before, after)
    assert (start.strength, start.temperature, start.offset) == (1, 1, 0)
    # The labels' frequencies are the training set's.
    torch.testing.assert_close(start.log_odds, whole.model.label_prior.log_odds)


def test_known_labels_can_be_trained_with(make_cfg):
    opts = (*PRIORS["themes"], "MODEL.LABEL_PRIOR.TRAINED", True, "INPUT.KNOWN_LABELS", 0.5)
    assert run(make_cfg("known", *opts)).model.takes_known_labels
