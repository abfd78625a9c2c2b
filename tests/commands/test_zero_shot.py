"""TEST.LABELS: labels that a model with a shared readout was not trained on."""

import json

import numpy as np
import pytest
import torch

from ia_gcn import MultiLabelPredictor
from ia_gcn.checkpoint import load_model
from ia_gcn.engine import evaluate_checkpoint, setup_cfg
from ia_gcn.errors import InputError
from tests.helpers.checkpoints import COLOURS, save_checkpoint

SHARED = ("MODEL.ML_DECODER.QUERIES", "words", "MODEL.ML_DECODER.READOUT", "shared")
OTHERS = ["teal", "blue", "pink", "red"]


@pytest.fixture
def labels_file(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(OTHERS))
    return str(path)


@pytest.fixture
def checkpoint(make_cfg):
    """The path of a checkpoint of a model with a shared readout, and its config."""
    path, cfg, _ = save_checkpoint(make_cfg, *SHARED, config="ml_decoder")
    return path, cfg


def scores_of(predictor):
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    return dict(zip(predictor.label_names, predictor(image).scores.tolist()))


def test_a_predictor_scores_other_labels(checkpoint, labels_file):
    path, _ = checkpoint
    trained = MultiLabelPredictor(path, device="cpu")
    others = MultiLabelPredictor(path, device="cpu", opts=["TEST.LABELS", labels_file])
    assert trained.label_names == COLOURS
    assert others.label_names == OTHERS
    expected, found = scores_of(trained), scores_of(others)
    for label in ("blue", "red"):
        assert found[label] == pytest.approx(expected[label], rel=1e-5)
    assert len({round(score, 6) for score in found.values()}) == 4


def test_a_checkpoint_does_not_choose_a_file(make_cfg, labels_file):
    path, _, _ = save_checkpoint(
        make_cfg, *SHARED, config="ml_decoder", saved=("TEST.LABELS", labels_file)
    )
    assert MultiLabelPredictor(path, device="cpu").label_names == COLOURS


def test_evaluation_on_data_with_other_labels(checkpoint, labels_file, tiny_coco, tmp_path):
    path, cfg = checkpoint
    data = tiny_coco(14, "other")
    with open(data.json_file, encoding="utf-8") as file:
        content = json.load(file)
    for category, name in zip(content["categories"], ("red", "teal", "blue")):
        category["name"] = name
    (tmp_path / "other.json").write_text(json.dumps(content))

    def evaluate(*opts):
        changes = ["MODEL.WEIGHTS", path, "DATASETS.CUSTOM.TEST", str(tmp_path / "other.json")]
        changes += ["DATASETS.CUSTOM.TRAIN", "", "OUTPUT_DIR", str(tmp_path / "evaluated")]
        config = tmp_path / "config.yaml"
        config.write_text(cfg.dump())
        evaluated = setup_cfg(str(config), [*changes, *opts], eval_only=True)
        evaluated.freeze()
        return evaluate_checkpoint(evaluated)

    with pytest.raises(InputError, match="has teal"):
        evaluate()
    by_name = ("DATASETS.MATCH_LABELS_BY_NAME", True)
    results = evaluate("TEST.LABELS", labels_file, *by_name)
    assert np.isfinite(results["multi_label"]["mAP"])
    (predictions,) = (tmp_path / "evaluated").glob("inference/*/predictions.npz")
    with np.load(predictions) as found:
        assert found["label_names"].tolist() == ["red", "teal", "blue"]


def test_what_can_not_score_other_labels_is_refused(make_cfg, labels_file, tmp_path):
    group = ("MODEL.ML_DECODER.QUERIES", "words")
    path, _, _ = save_checkpoint(make_cfg, *group, config="ml_decoder")
    with pytest.raises(InputError, match=r"TEST\.LABELS: this model scores the labels"):
        MultiLabelPredictor(path, device="cpu", opts=["TEST.LABELS", labels_file])
    with pytest.raises(InputError, match=r"TEST\.LABELS: .*none\.txt"):
        MultiLabelPredictor(path, device="cpu", opts=["TEST.LABELS", str(tmp_path / "none.txt")])


def test_labels_without_an_embedding_are_named(checkpoint, labels_file, tmp_path):
    path, cfg = checkpoint
    cfg = cfg.clone()
    cfg.defrost()
    vectors = " ".join(["0.1"] * cfg.MODEL.LABEL_EMBEDDINGS.DIM)
    (tmp_path / "glove.txt").write_text(f"red {vectors}\nblue {vectors}\nteal {vectors}\n")
    cfg.MODEL.LABEL_EMBEDDINGS.SOURCE = str(tmp_path / "glove.txt")
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = len(OTHERS)
    cfg.TEST.LABELS = labels_file
    with pytest.raises(InputError, match="pink"):
        load_model(cfg, OTHERS, path=path)


def test_the_rest_of_a_model_is_loaded_as_ever(checkpoint, labels_file):
    path, _ = checkpoint
    trained = MultiLabelPredictor(path, device="cpu", optimize=False)
    opts = ["TEST.LABELS", labels_file]
    others = MultiLabelPredictor(path, device="cpu", optimize=False, opts=opts)
    expected = trained.model.state_dict()
    for name, tensor in others.model.state_dict().items():
        assert name == "label_graph.embeddings" or tensor.equal(expected[name]), name
    assert torch.equal(
        others.model.label_graph.embeddings[[3, 1]], trained.model.label_graph.embeddings[[0, 2]]
    )
