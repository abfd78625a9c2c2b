"""Out-of-fold probabilities against scikit-learn, and what they may and may not depend on."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.engine.out_of_fold import (
    STRENGTHS,
    assign_folds,
    fit_linear,
    load_network,
    out_of_fold_probabilities,
    predict_linear,
    standardize,
    training_vectors,
)

LABELS = 3


def draw(n=150, channels=4, seed=0):
    """Vectors, and targets that depend on them, a fifth of which is unknown."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, channels, generator=generator) * 3 + 1
    noise = torch.randn(n, LABELS, generator=generator)
    targets = (vectors[:, :LABELS] - 1 + 2 * noise > 1).float()
    return vectors, targets.masked_fill(torch.rand(n, LABELS, generator=generator) < 0.2, -1)


def sklearn_probabilities(vectors, targets, test, strength):
    """(len(test), C): of logistic regressions, each on the images in which the label is known."""
    columns = []
    for target in targets.T:
        known = target >= 0
        # λ/2 ‖w‖² beside the mean loss, as scikit-learn writes it.
        model = LogisticRegression(C=1 / (strength * known.sum()), tol=1e-8, max_iter=10_000)
        model.fit(vectors[known], target[known])
        columns.append(model.predict_proba(test)[:, 1])
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("strength", [1.0, 0.03, 0.001])
def test_the_classifiers_are_scikit_learns(strength):
    vectors, targets = draw()
    found = fit_linear(standardize(vectors), targets, strength, torch.zeros(LABELS, 5))
    x = StandardScaler().fit_transform(vectors.double().numpy())
    expected = sklearn_probabilities(x, targets.numpy(), x, strength)
    probabilities = predict_linear(standardize(vectors), found).sigmoid().numpy()
    np.testing.assert_allclose(probabilities, expected, atol=2e-3)


def test_each_image_is_predicted_by_those_that_have_not_seen_it():
    vectors, targets = draw()
    folds = torch.arange(len(targets)) % 5
    found = out_of_fold_probabilities(vectors, targets, folds).numpy()
    x, y = StandardScaler().fit_transform(vectors.double().numpy()), targets.numpy()
    losses, all_probabilities = [], []
    for strength in STRENGTHS:
        probabilities = np.empty_like(y)
        for fold in range(5):
            held_out = folds.numpy() == fold
            probabilities[held_out] = sklearn_probabilities(
                x[~held_out], y[~held_out], x[held_out], strength
            )
        losses.append(log_loss(y[y >= 0], probabilities[y >= 0]))
        all_probabilities.append(probabilities)
    np.testing.assert_allclose(found, all_probabilities[int(np.argmin(losses))], atol=5e-3)


def test_a_wrong_label_does_not_change_its_own_probability():
    """But for the choice of λ, which these data make clearly."""
    vectors, targets = draw()
    folds = torch.arange(len(targets)) % 5
    before = out_of_fold_probabilities(vectors, targets, folds)
    image = int((targets[:, 0] == 1).nonzero()[0])
    targets[image, 0] = 0
    after = out_of_fold_probabilities(vectors, targets, folds)
    assert after[image, 0] == pytest.approx(before[image, 0].item(), abs=1e-6)
    others = folds != folds[image]
    assert not torch.allclose(after[others, 0], before[others, 0], atol=1e-5)


def test_nothing_to_learn_from_is_no_crash():
    """A constant channel, a label that is present nowhere, one that is known nowhere."""
    vectors, targets = draw()
    vectors[:, 0] = 7.0
    targets[:, 0] = 0
    targets[:, 1] = -1
    found = out_of_fold_probabilities(vectors, targets, torch.arange(len(targets)) % 2)
    assert found.isfinite().all()
    assert (found[:, 0] < 0.1).all()


def test_images_of_one_name_are_in_one_fold():
    targets = torch.ones(20, 1)
    names = [f"{i // 2}.jpg" for i in range(20)]
    folds = assign_folds(names, targets, 5, 0)
    assert torch.equal(folds[::2], folds[1::2])
    assert sorted(folds.unique().tolist()) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------- networks


def save_weights(cfg, path, names):
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    if model.label_graph is not None:
        counts = np.eye(len(names), dtype=int) * 4
        model.label_graph.fill(counts.diagonal(), counts, model.label_graph.embeddings)
    MultiLabelCheckpointer(model, str(path.parent), label_names=names).save(path.stem)
    return model


@pytest.mark.parametrize("config", ["ml_gcn", "ia_gcn"])
def test_the_vectors_are_the_heads_features_in_the_order_of_names(make_cfg, tmp_path, config):
    cfg = make_cfg("run", config=config)
    names = ["red", "green", "blue"]
    model = save_weights(cfg, tmp_path / "weights.pth", names).eval()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    found = training_vectors(cfg)
    assert found.file_names == sorted(found.file_names)
    assert len(found.file_names) == 14
    heads = []
    hook = model.label_head.register_forward_pre_hook(lambda _, args: heads.append(args))
    loader = Trainer.build_test_loader(cfg, cfg.DATASETS.TRAIN[0])
    with torch.no_grad():
        for batch in loader:
            model(batch)
    hook.remove()
    expected = [model.label_head.image_features(*args[:2]).detach() for args in heads]
    torch.testing.assert_close(found.vectors, torch.cat(expected))
    again = training_vectors(cfg)
    assert torch.equal(found.vectors, again.vectors)


def test_a_network_at_random_is_refused(make_cfg, tmp_path, error_line):
    cfg = make_cfg("run")
    names = ["red", "green", "blue"]
    assert "MODEL.WEIGHTS is empty" in error_line(load_network, cfg, names)
    model = Trainer.build_model(cfg)
    head_alone = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    torch.save({"model": head_alone, "label_names": names}, tmp_path / "head.pth")
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(tmp_path / "head.pth")
    assert "lacks" in error_line(load_network, cfg, names)


def test_a_backbone_alone_is_enough_and_other_labels_take_transfer(make_cfg, tmp_path, error_line):
    cfg = make_cfg("run").clone()
    cfg.defrost()
    model = Trainer.build_model(cfg)
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    path = tmp_path / "backbone.pth"
    torch.save(backbone, path)
    cfg.MODEL.WEIGHTS = str(path)
    names = ["red", "green", "blue"]
    loaded = load_network(cfg, names).backbone.state_dict()
    torch.testing.assert_close(loaded, model.backbone.state_dict())
    save_weights(cfg, tmp_path / "other.pth", ["cat", "dog", "cow"])
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    assert "cat" in error_line(load_network, cfg, names)
    cfg.MODEL.TRANSFER = True
    load_network(cfg, names)


def test_a_timm_network_has_its_own_weights(make_cfg):
    cfg = setup_cfg(
        "configs/Custom/small.yaml",
        ["MODEL.DEVICE", "cpu", "MODEL.TIMM.PRETRAINED", False, "DATASETS.TEST", "()"],
    )
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = 3
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        load_network(cfg, ["red", "green", "blue"])
