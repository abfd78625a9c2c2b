"""tools/train_net.py, run as a user would."""

import json

import pytest

from tests.helpers.commands import run_script

CONFIG = ["--config-file", "configs/DigitScenes/ml_gcn.yaml"]


def train_net(*args):
    return run_script("tools/train_net.py", *args)


@pytest.fixture
def options(tiny_coco, tmp_path):
    """Command-line options for tiny images of coloured rectangles, with the changes given."""
    train, test = tiny_coco(42, "train"), tiny_coco(21, "test")

    def make(**changes):
        values = {
            "DATASETS.CUSTOM.TRAIN": train.json_file,
            "DATASETS.CUSTOM.TEST": test.json_file,
            "DATASETS.CUSTOM.IMAGE_ROOT": train.image_root,
            "DATASETS.CUSTOM.TEST_IMAGE_ROOT": test.image_root,
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.IMAGE_SIZE": "(32, 32)",
            "SOLVER.MAX_EPOCHS": 30,
            "SOLVER.CHECKPOINT_EPOCHS": 10,
            "TEST.EVAL_EPOCHS": 10,
            "OUTPUT_DIR": tmp_path / "run",
        }
        values.update(changes)
        return [item for pair in values.items() for item in pair]

    return make


def read_metrics(folder):
    return json.loads((folder / "inference/custom_test/metrics.json").read_text())


@pytest.mark.slow
def test_it_learns_and_an_evaluation_of_the_checkpoint_says_the_same(options, tmp_path):
    result = train_net(*CONFIG, *options())
    assert result.returncode == 0, result.stderr[-3000:]
    trained = read_metrics(tmp_path / "run")
    # Chance is 57: a label is in four of seven images.
    assert trained["mAP"] >= 95
    assert trained["frequency"]["counted"] == "training"
    assert "mAP" in result.stdout
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model_final.pth", "model_best.pth", "metrics.json", "config.yaml"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)

    weights = tmp_path / "run/model_final.pth"
    again = options(**{"OUTPUT_DIR": tmp_path / "again", "DATASETS.CUSTOM.TRAIN": ""})
    result = train_net(*CONFIG, "--eval-only", *again, "MODEL.WEIGHTS", weights)
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_metrics(tmp_path / "again") == trained

    reordered = {"DATASETS.CUSTOM.LABELS": "('blue','red','green')"}
    again = options(**reordered, OUTPUT_DIR=tmp_path / "other")
    result = train_net(*CONFIG, "--eval-only", *again, "MODEL.WEIGHTS", weights)
    assert result.returncode == 1
    assert "same labels in another order than" in result.last_line


@pytest.mark.parametrize(
    ("args", "changes", "message"),
    [
        (["--config-file", "no/such.yaml"], {}, "no/such.yaml: no such file"),
        (CONFIG, {"SOLVER.NO_SUCH_KEY": 1}, "SOLVER.NO_SUCH_KEY"),
        (CONFIG, {"SOLVER.BASE_LR": "fast"}, "fast"),
        (CONFIG, {"MODEL.LABEL_HEAD.NAME": "NoSuchHead"}, "NoSuchHead"),
        (CONFIG, {"DATASETS.CUSTOM.TRAIN": "no/such.json"}, "no/such.json"),
        ([*CONFIG, "--eval-only"], {}, "MODEL.WEIGHTS is empty"),
        ([*CONFIG, "--eval-only"], {"MODEL.WEIGHTS": "no/such.pth"}, "no/such.pth"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(options, args, changes, message):
    result = train_net(*args, *options(**changes))
    assert result.returncode == 1
    assert result.last_line.startswith("train: ")
    assert message in result.last_line


@pytest.mark.parametrize(("split", "total"), [("train", 42), ("test", 21)])
def test_missing_images_are_named_before_training_starts(options, tmp_path, split, total):
    for number in (3, 8):
        (tmp_path / f"{split}/images/{number:06d}.png").unlink()
    result = train_net(*CONFIG, *options())
    assert result.returncode == 1
    message = result.last_line
    assert f"2 of {total} images are missing" in message
    assert "000003.png" in message
    assert "000008.png" in message
    assert "Training" not in result.stdout


@pytest.mark.slow
def test_unreadable_images_are_skipped_up_to_a_limit(options, tmp_path):
    for number in (3, 8, 9):
        (tmp_path / f"test/images/{number:06d}.png").write_bytes(b"\x89PNG\r\n truncated")
    short = {"SOLVER.MAX_EPOCHS": 1}
    result = train_net(*CONFIG, *options(**short, **{"DATASETS.MAX_UNREADABLE": 3}))
    assert result.returncode == 0, result.stderr[-3000:]
    assert read_metrics(tmp_path / "run")["images"] == 18
    assert result.stdout.count("Skipped an unreadable image") == 3
    result = train_net(*CONFIG, *options(**short, **{"DATASETS.MAX_UNREADABLE": 2}))
    assert result.returncode == 1
    assert "DATASETS.MAX_UNREADABLE = 2" in result.stderr
    assert "000009.png" in result.stderr


def test_an_empty_data_set_is_refused(options, tmp_path):
    empty = tmp_path / "empty.csv"
    empty.write_text("file,labels\n")
    result = train_net(*CONFIG, *options(**{"DATASETS.CUSTOM.TRAIN": empty}))
    assert result.returncode == 1
    assert "empty" in result.last_line


def test_verbose_shows_the_log_and_config_keys_may_follow_an_import(options, tmp_path):
    module = tmp_path / "module_of_a_user.py"
    module.write_text("")
    short = options(**{"SOLVER.MAX_EPOCHS": 1, "TEST.EVAL_EPOCHS": 0})
    result = train_net(*CONFIG, "--verbose", "--import", module, *short)
    assert result.returncode == 0, result.stderr[-3000:]
    log = (tmp_path / "run/log.txt").read_text()
    for content in ("PyTorch", "(backbone): ResNet(", "Start inference on", "MAX_EPOCHS: 1"):
        assert content in log
        assert content in result.stdout
    assert f"IMPORTS:\n- {module}" in (tmp_path / "run/config.yaml").read_text()


def test_help_teaches():
    result = train_net("--help")
    assert result.returncode == 0
    for word in ("--resume", "--eval-only MODEL.WEIGHTS", "DATASETS.CUSTOM.TRAIN", "torchrun"):
        assert word in result.stdout
