"""What the commands print, each in a process of its own: what is meant, and nothing else."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.conftest import write_tiny_coco
from tests.helpers.commands import ROOT, run_process

pytestmark = pytest.mark.slow

CONFIG = ("--config-file", "configs/DigitScenes/ia_gcn_plus.yaml")


def line(pattern: str) -> str:
    return f"{pattern}\n"


def lines(pattern: str) -> str:
    """One or more."""
    return f"(?:{pattern}\n)+"


def rows(*names: str) -> str:
    return "".join(rf"  {name} +\S.*\n" for name in names)


def results() -> str:
    tables = "\n".join([lines(r"\|.*\|")] * 3)
    return line("custom_test, 21 images, in percent:") + tables


def assert_screen(text: str, *patterns: str) -> None:
    # On a slow machine, an evaluation takes long enough to show its progress.
    text = re.sub(r"(?m)^evaluation on custom_test: batch \d+/\d+, .*\n", "", text)
    assert re.fullmatch("".join(patterns), text), text


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """A short training with an RPN, loader workers and an evaluation on the way."""
    folder = tmp_path_factory.mktemp("training")
    data = write_tiny_coco(folder / "tiny", 21)
    keys = {
        "DATASETS.CUSTOM.TRAIN": data.json_file,
        "DATASETS.CUSTOM.TEST": data.json_file,
        "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
        "DATALOADER.NUM_WORKERS": 64,
        "INPUT.IMAGE_SIZE": (64, 64),
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_EPOCHS": 2,
        "SOLVER.CHECKPOINT_EPOCHS": 0,
        "TEST.EVAL_EPOCHS": 1,
    }
    options = [str(item) for pair in keys.items() for item in pair]
    outcome = run_process("tools/train_net.py", *CONFIG, *options, "OUTPUT_DIR", folder / "run")
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return outcome, options, folder / "run"


def test_a_training(training):
    outcome, _, folder = training
    assert outcome.stderr == ""
    progress = r"iteration \d+/12, ETA .*, epoch .*/2, total_loss .*, lr \S+"
    assert_screen(
        outcome.stdout,
        line("Training"),
        rows("model", "weights", "data", "tested on", "schedule", "device", "output"),
        lines(progress),
        line(r"iteration 6: mAP .*, CF1 .*, OF1 .* \(custom_test\)"),
        lines(rf"{progress}, mAP \S+"),
        results(),
        line("Written"),
        line(rf"  checkpoints +{folder}/model_final.pth, {folder}/model_best.pth \(mAP .*\)"),
        line(f"  results +{folder}/inference/custom_test"),
        line(f"  report +{folder}/inference/custom_test/report.html"),
        line(f"  log +{folder}/log.txt"),
    )


def test_the_log_has_the_dumps_and_no_colours(training):
    text = (training[2] / "log.txt").read_text()
    for content in ("PyTorch ", "ROUGH_SCORE_WEIGHT: 1.0", "(backbone): ResNet(", "total_loss:"):
        assert content in text
    assert "\x1b" not in text


def test_an_evaluation(training):
    _, options, folder = training
    weights = ("MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", folder / "evaluation")
    outcome = run_process("tools/train_net.py", *CONFIG, "--eval-only", *options, *weights)
    assert outcome.stderr == ""
    assert_screen(
        outcome.stdout,
        line("Evaluation"),
        rows("model", "weights", "data", "device", "output"),
        results(),
        line("Written"),
        line(f"  results +{folder}/evaluation/inference/custom_test"),
        line(f"  report +{folder}/evaluation/inference/custom_test/report.html"),
        line(f"  log +{folder}/evaluation/log.txt"),
    )


def test_two_processes(training, tmp_path):
    """Both import what the user asks for."""
    _, options, folder = training
    module = tmp_path / "of_my_own.py"
    module.write_text(
        "import os, pathlib\npathlib.Path(__file__).with_name(f'{os.getpid()}.seen').touch()\n"
    )
    short = ("SOLVER.MAX_EPOCHS", 0, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", folder / "two")
    flags = ("--num-gpus", 2, "--import", module)
    outcome = run_process("tools/train_net.py", *CONFIG, *flags, *options, *short)
    assert len(list(tmp_path.glob("*.seen"))) == 2
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.count("Training") == 1
    assert "2 processes" in outcome.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("MODEL.LABEL_HEAD.NAME", "NoSuchHead"), "NoSuchHead"),
        (("SOLVER.BASE_LR", 1e9, "SOLVER.OPTIMIZER", "SGD"), "training diverged in iteration"),
    ],
)
def test_several_processes_say_once_what_is_wrong(training, changes, message):
    _, options, folder = training
    changes = (*changes, "OUTPUT_DIR", folder / "wrong")
    outcome = run_process("tools/train_net.py", *CONFIG, "--num-gpus", 2, *options, *changes)
    assert outcome.returncode == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.startswith("train: ")
    assert message in outcome.stderr
    assert "Traceback" not in outcome.stdout


def test_prediction_and_export(training, tmp_path):
    _, _, folder = training
    weights = ("--weights", folder / "model_final.pth")
    images = folder.parent / "tiny/images"
    table = tmp_path / "p.csv"
    outcome = run_process("tools/predict.py", *weights, images, "--output", table)
    assert outcome.returncode == 0
    assert (outcome.stdout, len(outcome.stderr.splitlines())) == ("", 1)
    output = tmp_path / "model.onnx"
    outcome = run_process(
        *("tools/export_model.py", *weights, "--format", "onnx", "--output", output)
    )
    assert outcome.returncode == 0
    assert (outcome.stderr, len(outcome.stdout.splitlines())) == ("", 1)


def test_ctrl_c(training):
    """As from the keyboard: every process of the group gets it."""
    _, options, folder = training
    long = ("SOLVER.MAX_EPOCHS", "0", "SOLVER.MAX_ITER", "100000", "TEST.EVAL_EPOCHS", "0")
    command = ("tools/train_net.py", *CONFIG, "--num-gpus", "2", *options, *long)
    process = subprocess.Popen(
        [sys.executable, *command, "OUTPUT_DIR", str(folder / "long")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("iteration"):
            break
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith("train: stopped by SIGINT after iteration ")
    assert len(list((folder / "long").glob("model_*.pth"))) == 1
    assert "Traceback" not in error
