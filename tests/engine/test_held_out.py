"""Held-out images: evaluated again by the same config, and never measured if they were seen."""

import csv
import logging

import numpy as np
import pytest

from ia_gcn.checkpoint import MultiLabelCheckpointer, load_model
from ia_gcn.engine import Trainer, setup_cfg
from tests.conftest import write_tiny_coco

CONFIG = "configs/Custom/small.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, repository):
    """A short training on own images: (its options, its OUTPUT_DIR, its trainer)."""
    folder = tmp_path_factory.mktemp("held_out")
    data = write_tiny_coco(folder / "data", 21)
    options = {
        "MODEL.DEVICE": "cpu",
        "MODEL.TIMM.NAME": "test_resnet",
        "MODEL.TIMM.PRETRAINED": False,
        "DATASETS.CUSTOM.TRAIN": data.json_file,
        "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.IMAGE_SIZE": (32, 32),
        "SOLVER.MAX_EPOCHS": 1,
        "OUTPUT_DIR": str(folder / "run"),
    }
    cfg = read(options, repository)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return options, folder / "run", trainer


def flat(options):
    return [part for pair in options.items() for part in pair]


def read(options, repository, **kwargs):
    return setup_cfg(str(repository / CONFIG), flat(options), **kwargs)


def test_what_was_held_out_is_listed_and_evaluated(trained):
    _, output, trainer = trained
    with open(output / "split.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "part"]
    assert sorted(name for name, _ in rows) == [f"{i:06d}.png" for i in range(1, 22)]
    held_out = {name for name, part in rows if part == "custom_test"}
    assert {part for _, part in rows} == {"custom_train", "custom_test"}
    trained_on = {d["file_name"].rsplit("/")[-1] for d in trainer.data_loader.dataset}
    assert trained_on == {name for name, _ in rows} - held_out
    with np.load(output / "inference/custom_test/predictions.npz") as predictions:
        assert {f"{i:06d}.png" for i in predictions["image_ids"]} == held_out


def test_the_same_config_evaluates_the_same_images(trained, repository, tmp_path):
    options, output, _ = trained
    weights = {"MODEL.WEIGHTS": str(output / "model_final.pth"), "OUTPUT_DIR": str(tmp_path)}
    cfg = read({**options, **weights, "SEED": 7}, repository, eval_only=True)
    model = load_model(cfg, ["red", "green", "blue"])
    Trainer.test(cfg, model)
    found, expected = (
        dict(np.load(folder / "inference/custom_test/predictions.npz"))
        for folder in (tmp_path, output)
    )
    assert np.array_equal(found["image_ids"], expected["image_ids"])
    assert found["scores"] == pytest.approx(expected["scores"], abs=1e-6)
    # A training that is resumed finds its share, too, and so does its config.yaml.
    read(options, repository, resume=True)
    config = output / "config.yaml"
    config.write_text(cfg.dump())
    setup_cfg(str(config))


@pytest.mark.parametrize(
    "changes",
    [
        {"DATASETS.CUSTOM.HOLD_OUT": 0.4},
        {"DATASETS.CUSTOM.HOLD_OUT_SEED": 1},
        {"DATASETS.CUSTOM.TRAIN": "more.json"},
    ],
)
def test_images_that_a_checkpoint_may_have_seen_are_not_measured(
    trained, repository, error_line, tiny_coco, changes
):
    options, output, _ = trained
    if "DATASETS.CUSTOM.TRAIN" in changes:
        changes = {"DATASETS.CUSTOM.TRAIN": tiny_coco(25).json_file}
    evaluation = {**options, **changes, "MODEL.WEIGHTS": str(output / "model_final.pth")}

    def evaluate():
        read(evaluation, repository, eval_only=True)

    def resume():
        read({**options, **changes}, repository, resume=True)

    for call in (evaluate, resume):
        message = error_line(call)
        assert "model_final.pth may have been trained on the images" in message
        assert "DATASETS.CUSTOM.TEST" in message


def test_a_checkpoint_that_was_trained_on_all_images_is_not_measured_on_some(
    trained, repository, error_line, tmp_path
):
    options, _, trainer = trained
    model = trainer.checkpointer.model
    labels = trainer.checkpointer.label_names
    cfg = read({**options, "DATASETS.CUSTOM.HOLD_OUT": 0.0}, repository)
    for name, config in (("all", cfg.dump()), ("bare", ""), ("odd", "[1, 2]")):
        MultiLabelCheckpointer(model, str(tmp_path), label_names=labels, config=config).save(name)
        evaluation = {**options, "MODEL.WEIGHTS": str(tmp_path / f"{name}.pth")}
        message = error_line(lambda keys=evaluation: read(keys, repository, eval_only=True))
        assert f"{name}.pth may have been trained on the images" in message


def test_a_file_of_the_users_choice_is_measured(trained, repository):
    options, output, _ = trained
    keys = {**options, "DATASETS.CUSTOM.TEST": options["DATASETS.CUSTOM.TRAIN"]}
    weights = {"MODEL.WEIGHTS": str(output / "model_final.pth")}
    cfg = read({**keys, **weights}, repository, eval_only=True)
    assert (cfg.DATASETS.TEST, cfg.DATASETS.CUSTOM.SPLIT) == (("custom_test",), "")


def test_a_new_training_from_a_checkpoint_of_the_same_file_is_warned(trained, repository, caplog):
    options, output, _ = trained
    start = {**options, "MODEL.WEIGHTS": str(output / "model_final.pth")}
    with caplog.at_level(logging.WARNING, logger="ia_gcn"):
        read(start, repository)
        assert "may have seen" not in caplog.text
        read({**start, "DATASETS.CUSTOM.HOLD_OUT": 0.4}, repository)
        assert "may have seen" in caplog.text


def test_a_config_that_was_written_for_other_images_is_refused(trained, repository, error_line):
    options, *_ = trained
    config = {**options, "DATASETS.CUSTOM.SPLIT": "0123456789abcdef"}
    assert "has changed" in error_line(lambda: read(config, repository))
