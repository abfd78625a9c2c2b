"""Labels that a model is told: how many, which, and what is left to learn and to measure."""

from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from ia_gcn import add_ia_gcn_config
from ia_gcn.data import MultiLabelDatasetMapper
from ia_gcn.data.build import TrainingSamples
from ia_gcn.data.known_labels import choose_known, draw_known
from ia_gcn.data.test_time_views import DatasetMapperTTA
from ia_gcn.errors import InputError

LABELS = torch.tensor([1.0, 0, -1, 0, 1, 1, 0, 0])


def known(states):
    return (states >= 0).nonzero()[:, 0].tolist()


def assert_true(states):
    """What is known is what the labels say."""
    assert states.shape == LABELS.shape
    assert all(state in (-1, label) for state, label in zip(states.tolist(), LABELS.tolist()))


def test_the_number_of_known_labels_is_uniform_up_to_the_share():
    random = np.random.RandomState(0)
    labels = torch.tensor([1.0, 0, 1, 0, 0])
    drawn = [known(draw_known(labels, 0.75, random)) for _ in range(400)]
    # 0.75 of 5 labels are three.
    counts = Counter(map(len, drawn))
    assert set(counts) == {0, 1, 2, 3}
    assert all(abs(count - 100) < 40 for count in counts.values())
    each = Counter(label for labels in drawn for label in labels)
    assert all(abs(each[label] - 120) < 40 for label in range(5))


def test_a_label_that_is_ignored_stays_unknown():
    random = np.random.RandomState(0)
    for _ in range(50):
        states = draw_known(LABELS, 1.0, random)
        assert_true(states)
        assert states[2] == -1


def test_known_labels_of_a_test_image_follow_from_its_id_and_the_seed():
    labels = torch.zeros(20)
    states = choose_known(labels, 0.5, 7, seed=0)
    assert len(known(states)) == 10
    assert choose_known(labels, 0.5, 7, seed=0).equal(states)
    assert choose_known(labels, 0.5, "7", seed=0).equal(states)
    others = [
        choose_known(labels, 0.5, 8, seed=0),
        choose_known(labels, 0.5, 7, seed=1),
        choose_known(labels, 0.5, "a/7.png", seed=0),
    ]
    assert len({tuple(known(s)) for s in [states, *others]}) == 4
    # Those of a larger share have them all, and more.
    assert set(known(states)) < set(known(choose_known(labels, 0.75, 7, seed=0)))
    # On any machine, with any version of numpy.
    assert known(choose_known(labels, 0.25, 7, seed=0)) == [5, 6, 8, 10, 12]


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (10, 10), (9, 9, 9)).save(path)
    return {"file_name": str(path), "image_id": 7, "labels": [0, 4, 5], "ignored_labels": [2]}


def make_cfg(**keys):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    keys = {"MODEL.LABEL_HEAD.NUM_LABELS": 8, "INPUT.IMAGE_SIZE": (8, 8), **keys}
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def test_in_training_they_follow_from_the_place_in_the_stream(record):
    mapper = MultiLabelDatasetMapper(make_cfg(**{"INPUT.KNOWN_LABELS": 0.75}), is_train=True)
    samples = TrainingSamples([record], mapper, seed=3)
    drawn = [samples[place, 0] for place in range(20)]
    for sample in drawn:
        assert sample["labels"].equal(LABELS)
        assert_true(sample["label_states"])
        assert len(known(sample["label_states"])) <= 6
    assert len({tuple(known(sample["label_states"])) for sample in drawn}) > 10
    assert samples[5, 0]["label_states"].equal(drawn[5]["label_states"])
    # The rest of a sample is as without.
    plain = TrainingSamples([record], MultiLabelDatasetMapper(make_cfg(), is_train=True), seed=3)
    assert samples[4, 0]["image"].equal(plain[4, 0]["image"])
    assert "label_states" not in plain[4, 0]


def test_what_is_known_of_a_test_image_is_not_measured(record):
    cfg = make_cfg(**{"TEST.KNOWN_LABELS": 0.5, "INPUT.KNOWN_LABELS": 0.75})
    sample = MultiLabelDatasetMapper(cfg, is_train=False)(record)
    states = sample["label_states"]
    assert states.equal(choose_known(LABELS, 0.5, 7, seed=0))
    assert sample["labels"].equal(torch.where(states >= 0, -1, LABELS))
    cfg.TEST.KNOWN_LABELS_SEED = 1
    other = MultiLabelDatasetMapper(cfg, is_train=False)(record)["label_states"]
    assert other.equal(choose_known(LABELS, 0.5, 7, seed=1))
    cfg.TEST.KNOWN_LABELS = 0.0
    plain = MultiLabelDatasetMapper(cfg, is_train=False)(record)
    assert "label_states" not in plain
    assert plain["labels"].equal(LABELS)


def test_all_views_of_a_test_image_are_told_the_same(record):
    cfg = make_cfg(**{"TEST.KNOWN_LABELS": 0.5, "TEST.AUG.SCALES": (1.0, 2.0)})
    plain = MultiLabelDatasetMapper(cfg, is_train=False)(record)
    sample = DatasetMapperTTA(cfg)(record)
    assert sample["labels"].equal(plain["labels"])
    for view in sample["views"]:
        assert view["label_states"].equal(plain["label_states"])


def test_states_that_the_data_has_are_left_alone(record):
    record["label_states"] = [1, -1, -1, 0, -1, -1, -1, -1]
    sample = MultiLabelDatasetMapper(make_cfg(), is_train=True)(record)
    assert sample["label_states"] == record["label_states"]
    assert sample["labels"].equal(LABELS)
    sample = MultiLabelDatasetMapper(make_cfg(), is_train=False)(record)
    assert sample["label_states"] == record["label_states"]
    assert sample["labels"].tolist() == [-1, 0, -1, -1, 1, 1, 0, 0]
    views = DatasetMapperTTA(make_cfg())(record)["views"]
    assert views[0]["label_states"] == record["label_states"]


@pytest.mark.parametrize("where", ["in_f1", "everywhere"])
def test_known_labels_cannot_be_measured_as_absent_ones(where):
    cfg = make_cfg(**{"TEST.KNOWN_LABELS": 0.5, "TEST.IGNORED_LABELS": where})
    with pytest.raises(InputError, match=rf"TEST\.IGNORED_LABELS {where}.*TEST\.KNOWN_LABELS"):
        MultiLabelDatasetMapper(cfg, is_train=False)
    MultiLabelDatasetMapper(cfg, is_train=True)
