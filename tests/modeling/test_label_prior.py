import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ia_gcn.errors import InputError
from ia_gcn.modeling import PairwisePrior, ThemePrior
from ia_gcn.modeling import label_prior_fit as fit
from ia_gcn.modeling.label_prior_fit import LabelSets

KINDS = ["pairwise", "neighbors", "themes"]


def make_prior(kind, num_labels=5, seed=0, **scales):
    """A prior of random numbers, in evaluation."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "themes":
        prior = ThemePrior(num_labels=num_labels, num_themes=3)
    else:
        neighbors = 2 if kind == "neighbors" else 0
        prior = PairwisePrior(num_labels=num_labels, num_neighbors=neighbors, num_steps=60)
        if neighbors:
            others = [[(i + 1) % num_labels, (i + 3) % num_labels] for i in range(num_labels)]
            prior.neighbors.copy_(torch.tensor(others))
    prior.requires_grad_(False)
    for parameter in prior.parameters():
        parameter.copy_(0.7 * randn(*parameter.shape))
    prior.log_odds.copy_(0.5 * randn(num_labels) - 1)
    for name, value in scales.items():
        getattr(prior, name).fill_(value)
    return prior.eval()


def dense_weight(prior):
    """W, (C, C) float64 with zeros on its diagonal."""
    num_labels = len(prior.log_odds)
    weight = np.zeros((num_labels, num_labels))
    for i in range(num_labels):
        columns = range(num_labels) if prior.neighbors is None else prior.neighbors[i].tolist()
        for k, j in enumerate(columns):
            weight[i, j] += float(prior.weight[i, k]) * (i != j)
    return weight


def random_logits(count=4, num_labels=5, seed=1):
    return 2 * torch.randn(count, num_labels, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_without_strength_the_logits_come_back_to_the_bit(kind, temperature):
    prior = make_prior(kind, strength=0.0, temperature=temperature, offset=0.3)
    logits = random_logits()
    unknown = torch.full_like(logits, -1)
    assert torch.equal(prior(logits), logits)
    assert torch.equal(prior(logits, unknown), logits)
    # What is known of one image changes it alone.
    states = unknown.clone()
    states[2, 3] = 1
    scores = prior(logits, states)
    assert torch.equal(scores[[0, 1, 3]], logits[[0, 1, 3]])
    assert not torch.allclose(scores[2], logits[2])


@pytest.mark.parametrize("kind", ["pairwise", "neighbors"])
def test_mean_field_ends_at_the_fixed_point_by_enumeration(kind):
    """Each q has the log-odds that are expected of its label over all 2^C sets of labels that Q,
    the independent labels of probabilities q, can draw."""
    num_labels = 6
    prior = make_prior(kind, num_labels)
    logits = random_logits(1, num_labels)
    posterior = prior(logits).double().numpy()[0]
    q = sigmoid(posterior)
    weight, frequency = dense_weight(prior), sigmoid(prior.log_odds.double().numpy())
    expected = logits.double().numpy()[0].copy() - prior.log_odds.double().numpy()
    for labels in itertools.product([0, 1], repeat=num_labels):
        y = np.array(labels)
        probability = np.prod(np.where(y, q, 1 - q))
        expected += probability * (prior.bias.double().numpy() + weight @ (y - frequency))
    np.testing.assert_allclose(posterior, expected, atol=1e-5)


def test_with_symmetric_weights_mean_field_is_a_minimum_of_the_divergence_from_the_posterior():
    num_labels = 5
    prior = make_prior("pairwise", num_labels)
    prior.weight.copy_((prior.weight + prior.weight.T) / 2)
    logits = random_logits(1, num_labels, seed=3)
    weight, frequency = dense_weight(prior), sigmoid(prior.log_odds.double().numpy())
    field = logits.double().numpy()[0] - prior.log_odds.double().numpy()
    field = field + prior.bias.double().numpy() - weight @ frequency
    sets = np.array(list(itertools.product([0, 1], repeat=num_labels)))
    energy = sets @ field + np.einsum("si,ij,sj->s", sets, weight, sets) / 2
    log_posterior = energy - np.log(np.exp(energy).sum())

    def divergence(q):
        log_q = np.where(sets, np.log(q), np.log1p(-q)).sum(axis=1)
        return (np.exp(log_q) * (log_q - log_posterior)).sum()

    q = sigmoid(prior(logits).double().numpy()[0])
    for i in range(num_labels):
        for step in (-1e-3, 1e-3):
            moved = q.copy()
            moved[i] += step
            assert divergence(moved) > divergence(q)


@pytest.mark.parametrize("kind", ["pairwise", "neighbors"])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_with_all_others_known_the_regression_speaks(kind, strength):
    prior = make_prior(kind, strength=strength, temperature=2.0, offset=0.5)
    logits = random_logits()
    states = (random_logits(seed=7) > 0).float()
    weight, log_odds = dense_weight(prior), prior.log_odds.double().numpy()
    evidence = logits.double().numpy() / 2 + 0.5 - log_odds
    y = states.double().numpy()
    scores = prior(logits, states).double().numpy()
    # What is known of the label itself says nothing to it, so with others of weight 1 it is exact.
    expected = evidence + prior.bias.double().numpy() + (y - sigmoid(log_odds)) @ weight.T
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("holes", [False, True])
def test_what_is_known_of_a_label_does_not_move_itself(holes):
    for kind in KINDS:
        prior = make_prior(kind)
        logits = random_logits()
        states = (random_logits(seed=7) > 0).float()
        if holes:
            # What is known of label 2 reaches the unknown ones, and must not come back.
            states[:, [0, 4]] = -1
        other = states.clone()
        other[:, 2] = 1 - other[:, 2]
        scores, changed = prior(logits, states), prior(logits, other)
        torch.testing.assert_close(scores[:, 2], changed[:, 2])
        assert not torch.allclose(scores, changed)


def enumerate_mixture(prior, logits, states):
    """log-odds of each label by adding up all sets of labels, (C,) float64; with α = 1."""
    pi = prior.theme_logits.double().softmax(0).numpy()
    theta = sigmoid(prior.label_logits.double().numpy())
    log_odds = prior.log_odds.double().numpy()
    evidence = logits.double().numpy() - log_odds
    num_labels = len(log_odds)
    result = []
    for i in range(num_labels):
        totals = np.zeros(2)
        for labels in itertools.product([0, 1], repeat=num_labels):
            y = np.array(labels)
            if any(s >= 0 and j != i and y[j] != s for j, s in enumerate(states)):
                continue
            # Known labels have no evidence beside what is known; the label itself has its own.
            counted = np.array([j == i or s < 0 for j, s in enumerate(states)])
            likelihood = np.exp((y * evidence)[counted].sum())
            prior_of_set = pi @ np.prod(np.where(y, theta, 1 - theta), axis=1)
            totals[y[i]] += prior_of_set * likelihood
        result.append(np.log(totals[1]) - np.log(totals[0]))
    return np.array(result)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.lists(st.sampled_from([-1, 0, 1]), min_size=5, max_size=5))
def test_the_mixture_s_posterior_is_exact(seed, states):
    prior = make_prior("themes", seed=seed)
    logits = random_logits(1, seed=seed)
    expected = enumerate_mixture(prior, logits[0], states)
    scores = prior(logits, torch.tensor([states], dtype=torch.int8))
    np.testing.assert_allclose(scores.double().numpy()[0], expected, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_s_scores_do_not_depend_on_its_batch(kind):
    prior = make_prior(kind, strength=0.6)
    logits = random_logits(6)
    states = torch.randint(-1, 2, logits.shape, generator=torch.Generator().manual_seed(0))
    together = prior(logits, states)
    for i in range(6):
        torch.testing.assert_close(prior(logits[i : i + 1], states[i : i + 1])[0], together[i])


def test_labels_are_taken_in_blocks_with_the_same_result(monkeypatch):
    prior = make_prior("themes", 7)
    logits, states = random_logits(3, 7), torch.tensor([[1, -1, 0, -1, -1, 1, -1]]).expand(3, 7)
    whole = prior(logits, states)
    monkeypatch.setattr("ia_gcn.modeling.label_prior.LABELS_AT_ONCE", 3)
    torch.testing.assert_close(prior(logits, states), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_in_training_evidence_is_hidden_and_gradients_flow(kind):
    prior = make_prior(kind).train().requires_grad_(True)
    logits = random_logits(64).requires_grad_()
    prior.hidden_evidence = 0.5
    torch.manual_seed(0)
    prior(logits).square().sum().backward()
    # All parameters learn, and so does the network.
    assert all(p.grad.abs().sum() > 0 for p in prior.parameters())
    assert (logits.grad.abs().sum(dim=1) > 0).float().mean() > 0.9
    first = prior(logits)
    assert not torch.allclose(first, prior(logits))
    prior.hidden_evidence = 0.0
    torch.testing.assert_close(prior(logits), prior(logits))


def draw_sets(count, seed=0):
    """Labels of two themes, (count, 6), and one label that is independent."""
    random = np.random.RandomState(seed)
    theme = random.randint(2, size=count)
    chances = np.array([[0.7, 0.7, 0.7, 0.1, 0.1, 0.3], [0.1, 0.1, 0.1, 0.6, 0.6, 0.3]])
    return (random.rand(count, 6) < chances[theme]).astype(np.int64)


def test_sets_of_labels_count_images_whatever_their_order():
    targets = np.array([[1, 0, -1], [0, 0, 1], [1, 0, -1], [0, 1, 0], [0, 0, 1], [1, 0, -1]])
    sets = LabelSets.of_targets(targets)
    again = LabelSets.of_targets(targets[::-1])
    assert sets.counts.tolist() == again.counts.tolist()
    assert sets.counts.sum() == 6
    np.testing.assert_array_equal(sets.targets(), again.targets())
    rows = np.repeat(sets.targets(), sets.counts.astype(int), axis=0)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, targets))
    present, known = sets.images_of_labels()
    assert present.tolist() == [3, 1, 2]
    assert known.tolist() == [6, 6, 3]
    first, second = sets.split(0.5)
    assert first.counts.sum() + second.counts.sum() == 6


@pytest.mark.parametrize("l2_weight", [0.3, 3.0])
def test_regressions_are_scikit_learn_s(l2_weight):
    targets = draw_sets(500)
    sets = LabelSets.of_targets(targets)
    prior = fit.fit_pairwise(sets, l2_weight)
    frequency = sigmoid(sets.log_odds().astype(np.float64))
    inputs = targets - frequency
    for i in range(6):
        others = [j for j in range(6) if j != i]
        model = LogisticRegression(C=1 / l2_weight, solver="newton-cholesky")
        model.fit(inputs[:, others], targets[:, i])
        np.testing.assert_allclose(prior.weight[i, others], model.coef_[0], atol=2e-3)
        np.testing.assert_allclose(prior.bias[i], model.intercept_[0], atol=2e-3)
        assert prior.weight[i, i] == 0


def test_unknown_labels_are_left_out_of_a_regression():
    targets = draw_sets(500)
    hidden = np.random.RandomState(1).rand(*targets.shape) < 0.3
    holed = np.where(hidden, -1, targets)
    sets = LabelSets.of_targets(holed)
    prior = fit.fit_pairwise(sets, 1.0)
    frequency = sigmoid(sets.log_odds().astype(np.float64))
    inputs = np.where(hidden, 0, targets - frequency)
    rows = ~hidden[:, 0]
    model = LogisticRegression(C=1.0, solver="newton-cholesky")
    model.fit(inputs[rows][:, 1:], targets[rows, 0])
    np.testing.assert_allclose(prior.weight[0, 1:], model.coef_[0], atol=2e-3)


@pytest.mark.parametrize("hidden", [0.0, 0.2])
def test_neighbors_are_those_of_the_most_mutual_information(hidden):
    targets = draw_sets(2000)
    drawn = np.random.RandomState(2).rand(*targets.shape) < hidden
    targets = np.where(drawn, -1, targets)
    neighbors = fit.strongest_neighbors(LabelSets.of_targets(targets), 2)
    for i in range(6):
        scores = np.full(6, -1.0)
        for j in set(range(6)) - {i}:
            both = (targets[:, i] >= 0) & (targets[:, j] >= 0)
            a, b = targets[both, i], targets[both, j]
            scores[j] = 0
            for x, y in itertools.product([0, 1], repeat=2):
                n = ((a == x) & (b == y)).sum()
                if n:
                    expected = (a == x).sum() * (b == y).sum() / both.sum()
                    scores[j] += n * np.log(n / expected)
        assert neighbors[i].tolist() == sorted(np.argsort(-scores)[:2].tolist())


def test_with_many_labels_the_neighbors_regression_is_that_of_all_rows(monkeypatch):
    """Sets without the label and its neighbours are one row with their weight."""
    targets = draw_sets(800)
    sets = LabelSets.of_targets(targets)
    monkeypatch.setattr(fit, "NUMBERS_AT_ONCE", 500)
    prior = fit.fit_pairwise(sets, 1.0, num_neighbors=2)
    frequency = sigmoid(sets.log_odds().astype(np.float64))
    for i in range(6):
        columns = prior.neighbors[i].tolist()
        model = LogisticRegression(C=1.0, solver="newton-cholesky")
        model.fit((targets - frequency)[:, columns], targets[:, i])
        np.testing.assert_allclose(prior.weight[i], model.coef_[0], atol=2e-3)
        np.testing.assert_allclose(prior.bias[i], model.intercept_[0], atol=2e-3)


def mixture_likelihood(prior, targets):
    """Of each image, a plain loop in float64."""
    pi = prior.theme_logits.double().softmax(0).numpy()
    theta = sigmoid(prior.label_logits.double().numpy())
    total = 0
    for row in targets:
        known = row >= 0
        factors = np.where(row[known], theta[:, known], 1 - theta[:, known])
        total += np.log(pi @ np.prod(factors, axis=1))
    return total / len(targets)


@pytest.mark.parametrize("hidden", [0.0, 0.3])
def test_themes_are_found(hidden):
    targets, held_out = draw_sets(3000), draw_sets(1000, seed=5)
    drawn = np.random.RandomState(2).rand(*targets.shape) < hidden
    prior = fit.fit_themes(LabelSets.of_targets(np.where(drawn, -1, targets)), 2)
    theta = sigmoid(prior.label_logits.numpy())
    theta = theta[np.argsort(-theta[:, 0])]
    expected = [[0.7, 0.7, 0.7, 0.1, 0.1, 0.3], [0.1, 0.1, 0.1, 0.6, 0.6, 0.3]]
    np.testing.assert_allclose(theta, expected, atol=0.06)
    true = ThemePrior(num_labels=6, num_themes=2).requires_grad_(False)
    true.label_logits.copy_(torch.logit(torch.tensor(expected)))
    difference = mixture_likelihood(true, held_out) - mixture_likelihood(prior, held_out)
    assert difference < 0.01


def test_the_loss_of_labels_given_the_others_by_hand():
    prior = make_prior("pairwise", 6)
    targets = np.where(np.random.RandomState(0).rand(50, 6) < 0.2, -1, draw_sets(50))
    assert float(prior.strength) == 1
    weight, frequency = dense_weight(prior), sigmoid(prior.log_odds.double().numpy())
    cost = count = 0
    for row in targets:
        for i in range(6):
            if row[i] < 0:
                continue
            kappa = np.mean([row[j] >= 0 for j in range(6) if j != i])
            centred = np.where(row >= 0, row - frequency, 0)
            z = float(prior.log_odds[i]) + weight[i] @ centred
            z += kappa * (float(prior.bias[i]) - float(prior.log_odds[i]))
            cost += np.logaddexp(0, z) - row[i] * z
            count += 1
    np.testing.assert_allclose(
        fit.label_loss(prior, LabelSets.of_targets(targets)), cost / count, rtol=1e-5
    )


def test_of_two_labels_that_are_equal_one_alone_says_nothing_of_itself():
    """One of both is known in each image: ln 2 nats are open."""
    random = np.random.RandomState(0)
    both = np.repeat(random.randint(2, size=(400, 1)), 2, axis=1)
    targets = np.where(np.eye(2)[random.randint(2, size=400)] > 0, -1, both)
    prior = fit.fit_pairwise(LabelSets.of_targets(both), 0.1).eval()
    assert fit.label_loss(prior, LabelSets.of_targets(targets)) == pytest.approx(
        np.log(2), rel=0.02
    )


def test_rare_labels_regressions_converge():
    random = np.random.RandomState(0)
    theme = random.randint(8, size=6000)
    chances = np.where(np.arange(24) % 8 == theme[:, None], 0.4, 0.01) * (0.85 ** np.arange(24))
    targets = (random.rand(6000, 24) < chances).astype(np.int64)
    sets = LabelSets.of_targets(targets)
    prior = fit.fit_pairwise(sets, 0.3)
    inputs = targets - sigmoid(sets.log_odds().astype(np.float64))
    for i in np.argsort(targets.sum(axis=0))[[0, 1, -1]]:
        others = [j for j in range(24) if j != i]
        model = LogisticRegression(C=1 / 0.3, solver="newton-cholesky", tol=1e-8)
        model.fit(inputs[:, others], targets[:, i])
        np.testing.assert_allclose(prior.weight[i, others], model.coef_[0], atol=0.02)


def test_too_little_to_fit_or_to_choose_on():
    with pytest.raises(InputError, match="takes 10 images and 2 labels at least"):
        fit.choose_prior(LabelSets.of_targets(draw_sets(9)))
    prior = make_prior("themes", 6)
    with pytest.raises(InputError, match="is known"):
        fit.calibrate(prior, random_logits(9, 6), torch.full((9, 6), -1))


@pytest.mark.slow
def test_an_exported_prior_of_neighbors_is_the_same_without_a_loop_over_labels():
    prior, logits = make_prior("neighbors"), random_logits()
    program = torch.export.export(prior, (logits,), strict=False)
    assert "embedding_bag" not in str(program.graph)
    torch.testing.assert_close(program.module()(logits), prior(logits))


@pytest.mark.parametrize(("num_labels", "num_neighbors"), [(5, 5), (5, 9), (401, 0)])
def test_numbers_of_neighbors_that_can_t_be(num_labels, num_neighbors):
    with pytest.raises(InputError, match=r"MODEL\.LABEL_PRIOR\.NUM_NEIGHBORS"):
        PairwisePrior(num_labels=num_labels, num_neighbors=num_neighbors)


def test_neighbors_of_a_file_are_labels():
    prior = make_prior("neighbors")
    state = {**prior.state_dict(), "neighbors": prior.neighbors + 4}
    with pytest.raises(InputError, match="neighbors: there is no label"):
        prior.load_state_dict(state)


def test_calibration_does_not_depend_on_the_order_of_images(monkeypatch):
    monkeypatch.setattr(fit, "MOST_NUMBERS", 2_000)
    targets, others = draw_sets(2000), draw_sets(600, seed=9)
    others = others[np.lexsort(others.T)]
    logits = torch.from_numpy(np.random.RandomState(0).randn(600, 6) + 2 * others - 2).float()
    found = []
    for order in (slice(None), np.arange(600)[::-1].copy()):
        prior = fit.fit_themes(LabelSets.of_targets(targets), 2)
        fit.calibrate(prior, logits[order], torch.from_numpy(others[order]))
        found.append([float(prior.temperature), float(prior.offset), float(prior.strength)])
    assert found[0] == found[1]


def test_a_prior_is_chosen_by_what_it_says_of_held_out_labels():
    sets = LabelSets.of_targets(draw_sets(2000))
    prior, candidates = fit.choose_prior(sets)
    assert isinstance(prior, ThemePrior)
    frequencies, *others = candidates
    assert frequencies.kind == ""
    assert min(c.loss for c in others) < frequencies.loss - 0.05
    prior, candidates = fit.choose_prior(sets, ["PairwisePrior"])
    assert isinstance(prior, PairwisePrior)
    assert {c.kind for c in candidates} == {"", "PairwisePrior"}


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_calibration_finds_the_scale_of_the_evidence(scale):
    """Of Gaussian evidence for independent draws of the mixture, that is z = λ + u."""
    targets = draw_sets(4000)
    prior = fit.fit_themes(LabelSets.of_targets(targets), 2)
    others = draw_sets(2000, seed=9)
    noise = np.random.RandomState(0).randn(*others.shape)
    evidence = 1.2 * (noise + 1.2 * others - 0.6)
    logits = torch.from_numpy(scale * (evidence + prior.log_odds.numpy())).float()
    fit.calibrate(prior, logits, torch.from_numpy(others))
    assert float(prior.temperature) == pytest.approx(scale, rel=0.1)
    assert float(prior.strength) > 0.8
    assert abs(float(prior.offset)) < 0.2


def test_a_prior_that_gains_nothing_has_no_strength_and_is_there_for_known_labels():
    prior = fit.fit_themes(LabelSets.of_targets(draw_sets(3000)), 2).eval()
    # Images whose labels are as frequent, and have nothing to do with each other.
    random = np.random.RandomState(0)
    others = np.stack([random.permutation(column) for column in draw_sets(1500, seed=9).T], axis=1)
    evidence = 1.2 * (random.randn(*others.shape) + 1.2 * others - 0.6)
    logits = torch.from_numpy(evidence + prior.log_odds.numpy()).float()
    fit.calibrate(prior, logits, torch.from_numpy(others))
    assert float(prior.strength) == 0
    assert torch.equal(prior(logits), logits)
    states = torch.full_like(logits, -1)
    states[:, 0] = 1
    assert (prior(logits, states)[:, 1] > logits[:, 1]).all()


def test_no_warning_of_a_label_that_never_or_always_occurs():
    targets = draw_sets(300)
    targets[:, 0], targets[:, 1] = 0, 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sets = LabelSets.of_targets(targets)
        for prior in (fit.fit_pairwise(sets), fit.fit_themes(sets, 4)):
            scores = prior.eval()(random_logits(5, 6))
            assert scores.isfinite().all()
