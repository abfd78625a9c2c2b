"""Labels that a user knows of an image: what the model is told, and what is said of them."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ia_gcn import MultiLabelPredictor
from ia_gcn.inference import predict_files
from ia_gcn.inference.known_labels import hold_known, known_labels, with_known
from tests.helpers.checkpoints import COLOURS, evaluate, save_checkpoint

NOISE = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)


@pytest.fixture
def c_tran(make_cfg):
    """A predictor of a model that takes known labels."""
    return MultiLabelPredictor(save_checkpoint(make_cfg, config="c_tran")[0], device="cpu")


@torch.no_grad()
def by_the_model(predictor, image, states):
    """The scores of the recogniser itself, which is told the states (C,)."""
    (output,) = predictor.model([{**predictor.view(image), "label_states": torch.tensor(states)}])
    return output["scores"].numpy()


def test_the_model_is_told_what_is_known(c_tran):
    assert c_tran.takes_known_labels
    plain = c_tran(NOISE[0])
    np.testing.assert_allclose(plain.scores, by_the_model(c_tran, NOISE[0], [-1.0, -1, -1]))
    assert plain.known == {}
    prediction = c_tran(NOISE[0], known={"blue": False, "red": True})
    _, green, _ = by_the_model(c_tran, NOISE[0], [1.0, -1, 0])
    np.testing.assert_allclose(prediction.scores, [1, green, 0], atol=1e-6)
    assert abs(green - plain.scores[1]) > 1e-4
    assert prediction.scores.dtype == np.float32
    assert prediction.known == {"red": True, "blue": False}
    assert prediction.above(0.99) == [("red", 1.0)]


def test_each_image_of_a_batch_has_its_own(c_tran):
    known = [{"red": True}, None, {"green": False, "blue": True}]
    batch = c_tran.predict_batch(NOISE, known)
    for image, labels, prediction in zip(NOISE, known, batch):
        expected = c_tran(image, known=labels)
        np.testing.assert_allclose(prediction.scores, expected.scores, atol=1e-6)
        assert prediction.known == (labels or {})
    np.testing.assert_array_equal(c_tran(NOISE[1], known={}).scores, c_tran(NOISE[1]).scores)


def test_all_labels_may_be_known(c_tran):
    known = {"red": False, "green": True, "blue": False}
    assert c_tran(NOISE[0], known=known).scores.tolist() == [0, 1, 0]


def test_files_have_their_own(c_tran, tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, pixels in zip(files, NOISE):
        Image.fromarray(pixels).save(file)
    known = [{"red": True}, None]
    for workers in (0, 2):
        found = list(predict_files(c_tran, files, known=known, batch_size=2, num_workers=workers))
        assert [result.file for result in found] == files
        records = [result.record(threshold=0) for result in found]
        assert [record.get("known") for record in records] == [{"red": True}, None, None]
        for image, labels, result in zip(NOISE, [*known, None], found):
            expected = c_tran(image, known=labels).scores
            np.testing.assert_allclose(result.prediction.scores, expected, atol=1e-6)
    missing = predict_files(c_tran, [str(tmp_path / "none.png")], known=[{"red": True}])
    assert set(next(missing).record()) == {"file", "error"}


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"gren": True}, "known: the model has no label 'gren': did you mean 'green'?"),
        ({"violet": True}, "known: the model has no label 'violet'"),
        ({3: True}, "known: the model has no label 3"),
        ({"green": 1}, "known: 'green' must be True or False, not 1"),
        ({"green": None}, "known: 'green' must be True or False, not None"),
        (["green"], "known must be labels with True or False, such as {'fork': True}"),
        ("green", "known must be labels with True or False, such as {'fork': True}"),
    ],
)
def test_what_can_not_be_known_is_one_line(c_tran, error_line, known, message):
    assert error_line(c_tran, NOISE[0], known) == message
    assert error_line(c_tran.predict_batch, NOISE[:1], [known]) == message
    assert error_line(list, predict_files(c_tran, ["a.png"], known=[known])) == message


def test_as_many_as_images(c_tran, error_line):
    line = error_line(c_tran.predict_batch, NOISE, [{"red": True}])
    assert line == "known has 1 entries for 3 images"


def test_other_models_refuse(make_cfg, error_line):
    predictor = MultiLabelPredictor(save_checkpoint(make_cfg)[0], device="cpu")
    assert not predictor.takes_known_labels
    line = error_line(partial(predictor, known={"red": True}), NOISE[0])
    assert line == (
        "known: this model makes no use of known labels: a C-Tran or a model with a label prior "
        "does"
    )
    # Nothing can be known of any model.
    assert predictor(NOISE[0], known={}).known == {}


def test_a_notebook_marks_them(c_tran):
    html = c_tran(NOISE[0], known={"red": True, "blue": False})._repr_html_()
    assert html.count("(known)") == 2
    assert ">red (known)</td>" in html


def test_any_model_is_measured_on_the_labels_that_are_not_known(make_cfg):
    """With TEST.KNOWN_LABELS the same entries count, whether or not the model makes use of it."""
    targets = {}
    for config in ("ml_gcn", "c_tran"):
        opts = ("TEST.KNOWN_LABELS", 0.5)
        _, cfg, model = save_checkpoint(make_cfg, *opts, config=config)
        with_known_labels, _ = evaluate(cfg, model)
        with np.load(f"{cfg.OUTPUT_DIR}/inference/custom_test/predictions.npz") as file:
            targets[config] = file["targets"]
        plain = cfg.clone()
        plain.defrost()
        plain.TEST.KNOWN_LABELS = 0.0
        scores, _ = evaluate(plain, model)
        assert (np.abs(scores - with_known_labels).max() > 1e-4) == (config == "c_tran")
    np.testing.assert_array_equal(targets["ml_gcn"], targets["c_tran"])
    # One of three labels of each image.
    assert (targets["ml_gcn"] == -1).sum(axis=1).tolist() == [1] * len(targets["ml_gcn"])


@given(st.dictionaries(st.sampled_from(COLOURS), st.booleans()))
def test_states_say_what_is_known(known):
    sample = with_known({"image": 0}, known, COLOURS)
    assert known_labels(sample, COLOURS) == known
    scores = np.array([0.25, 0.5, 0.75], np.float32)
    expected = [float(known.get(name, score)) for name, score in zip(COLOURS, scores)]
    assert hold_known(sample, scores).tolist() == expected
    assert ("label_states" in sample) == bool(known)
