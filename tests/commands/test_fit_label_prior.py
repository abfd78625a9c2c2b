"""tools/fit_label_prior.py, and a model with the prior that it adds."""

import numpy as np
import pytest

from ia_gcn import MultiLabelPredictor
from ia_gcn.checkpoint import read_checkpoint
from ia_gcn.engine import evaluate_checkpoint, setup_cfg
from ia_gcn.evaluation import multi_label_metrics, read_predictions
from ia_gcn.export import export_model
from ia_gcn.inference import OnnxPredictor
from tests.commands.test_label_headroom import draw, write
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.commands import load_command


def run(capsys, *argv):
    status = load_command("fit_label_prior").main(list(map(str, argv)))
    return status, capsys.readouterr()


@pytest.fixture
def trained(make_cfg):
    path, cfg, _ = save_checkpoint(make_cfg)
    return path, cfg


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (60, 50, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["pairwise", "themes"])
def test_a_checkpoint_with_a_prior_is_complete(trained, tmp_path, capsys, kind):
    path, _ = trained
    output = str(tmp_path / "with_prior.pth")
    status, printed = run(
        capsys, "--weights", path, "--output", output, "--device", "cpu", "--kind", kind
    )
    assert status == 0, printed.err
    assert kind in printed.out
    assert "These images are of the training set" in printed.out
    before, after = (MultiLabelPredictor(p, device="cpu") for p in (path, output))
    prior = after.model.label_prior
    assert before.model.label_prior is None
    # Now a known label moves the others.
    known = after(image(), known={"red": True})
    assert known.known == {"red": True}
    assert not np.allclose(after(image()).scores[1:], known.scores[1:])
    prior.strength.fill_(0.0)
    np.testing.assert_array_equal(before(image()).scores, after(image()).scores)
    # It starts from nothing but the weights.
    content = read_checkpoint(output)
    assert sorted(content) == ["config", "label_counts", "label_names", "model"]
    assert "DEVICE: cuda" in content["config"]

    config = output.replace(".pth", ".yaml")
    assert config in printed.out
    cfg = setup_cfg(config, ["OUTPUT_DIR", str(tmp_path / "out")], eval_only=True)
    cfg.freeze()
    results = evaluate_checkpoint(cfg)["multi_label"]
    predictions = read_predictions(str(tmp_path / "out/inference/custom_test/predictions.npz"))
    assert results["mAP"] == pytest.approx(
        multi_label_metrics(predictions.scores, predictions.targets)["mAP"]
    )

    # Fitted again, the prior is replaced.
    again = str(tmp_path / "again.pth")
    status, printed = run(capsys, "--weights", output, "--output", again, "--device", "cpu")
    assert status == 0, printed.err


def test_the_config_without_the_prior_is_refused(trained, tmp_path, capsys):
    path, cfg = trained
    output = str(tmp_path / "p.pth")
    assert run(capsys, "--weights", path, "--output", output, "--device", "cpu")[0] == 0
    config = tmp_path / "plain.yaml"
    config.write_text(cfg.dump())
    status = load_command("train_net").main(
        ["--eval-only", "--config-file", str(config), "MODEL.WEIGHTS", output]
    )
    assert status == 1
    assert "has a label prior: use the config" in capsys.readouterr().err


def test_a_training_with_a_prior_needs_trained(make_cfg):
    from ia_gcn.engine import Trainer
    from ia_gcn.errors import InputError

    with pytest.raises(InputError, match=r"MODEL\.LABEL_PRIOR\.TRAINED True"):
        Trainer(make_cfg("a", "MODEL.LABEL_PRIOR.NAME", "ThemePrior"))


@pytest.mark.parametrize("kind", [pytest.param("pairwise", marks=pytest.mark.slow), "themes"])
def test_exported_with_its_prior(trained, tmp_path, capsys, kind):
    path, _ = trained
    output = str(tmp_path / "p.pth")
    assert (
        run(capsys, "--weights", path, "--output", output, "--device", "cpu", "--kind", kind)[0]
        == 0
    )
    predictor = MultiLabelPredictor(output, device="cpu")
    predictor.model.label_prior.strength.fill_(0.7)
    export_model(predictor, str(tmp_path / "p.onnx"), "onnx")
    exported = OnnxPredictor(str(tmp_path / "p.onnx"))
    for known in (None, {"green": True}, {"green": False, "blue": True}):
        np.testing.assert_allclose(
            exported(image(), known=known).scores, predictor(image(), known=known).scores, atol=1e-5
        )


def test_calibrated_on_a_data_set(trained, tmp_path, capsys, tiny_coco):
    path, _ = trained
    data = tiny_coco(21, "other")
    status, printed = run(
        capsys,
        *("--weights", path, "--output", tmp_path / "p.pth", "--device", "cpu"),
        *("--calibrate-on", "custom_test", "DATASETS.CUSTOM.TEST", data.json_file),
        *("DATASETS.CUSTOM.TEST_IMAGE_ROOT", data.image_root),
    )
    assert status == 0, printed.err
    assert "mAP of the 21 images" in printed.out
    assert "of the training set" not in printed.out


def test_predictions_of_anybody_s_model(tmp_path, capsys):
    calibration = write(tmp_path / "val.npz", *draw(800, 2), first_id=1000)
    test = write(tmp_path / "test.npz", *draw(500, 1))
    output = tmp_path / "with.npz"
    status, printed = run(capsys, "--predictions", calibration, "--apply", test, "--output", output)
    assert status == 0, printed.err
    before, after = read_predictions(test), read_predictions(str(output))
    assert (before.targets == after.targets).all()
    assert (before.image_ids == after.image_ids).all()
    maps = [multi_label_metrics(p.scores, p.targets)["mAP"] for p in (before, after)]
    assert maps[1] > maps[0] + 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--weights", "none.pth", "--output", "a.pth"], "none.pth"),
        (["--predictions", "none.npz", "--apply", "b.npz", "--output", "c.npz"], "none.npz"),
    ],
)
def test_files_that_are_not_there(capsys, argv, message):
    status, printed = run(capsys, *argv)
    assert status == 1
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["--weights", "a.pth", "--output", "a.onnx"],
        ["--predictions", "a.npz", "--output", "b.npz"],
        ["--predictions", "a.npz", "--apply", "b.npz", "--output", "b.pth"],
        ["--weights", "a.pth", "--predictions", "a.npz", "--output", "b.npz"],
        ["--weights", "a.pth", "--output", "b.pth", "--labels-from", "a.npz"],
        ["--weights", "a.pth", "--output", "b.pth", "--calibrate-on", "a", "--share", "0.1"],
        ["--predictions", "a.npz", "--apply", "b.npz", "--output", "c.npz", "--ema"],
        ["--predictions", "a.npz", "--apply", "b.npz", "--output", "c.npz", "TEST.EMA", "True"],
    ],
)
def test_options_that_do_not_go_together(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        run(capsys, *argv)
    assert stop.value.code == 2
