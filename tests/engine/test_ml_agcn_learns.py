"""ML-AGCN learns DigitScenes, by command lines as a user would type them, in about a minute."""

import json

import numpy as np
import pytest

from ia_gcn.data.datasets import DIGIT_LABELS
from tests.helpers.commands import run_process

SCENES = 3000


def run(root, *command):
    result = run_process(*command, DETECTRON2_DATASETS=root)
    assert result.returncode == 0, result.stderr[-3000:]


def perfect_class_means(annotations):
    """(C, C): the mean scores of a network that makes no mistake, P(j|i)."""
    content = json.loads(annotations.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    rows = {image["id"]: row for row, image in enumerate(content["images"])}
    present = np.zeros((len(rows), len(DIGIT_LABELS)))
    for annotation in content["annotations"]:
        label = DIGIT_LABELS.index(names[annotation["category_id"]])
        present[rows[annotation["image_id"]], label] = 1
    return present.T @ present / present.sum(axis=0)[:, None], present.mean()


@pytest.mark.slow
def test_ml_agcn_learns_digit_scenes(tmp_path):
    run(
        *(tmp_path, "datasets/prepare_digit_scenes.py"),
        *("--train", SCENES, "--val", 300, "--root", tmp_path),
    )
    annotations = tmp_path / "digit_scenes/annotations/train.json"
    embeddings, share_present = perfect_class_means(annotations)
    source = tmp_path / "label_embeddings.npz"
    np.savez(source, embeddings=embeddings.astype(np.float32), label_names=DIGIT_LABELS)
    run(
        *(tmp_path, "tools/train_net.py"),
        *("--config-file", "configs/DigitScenes/ml_agcn.yaml"),
        *("MODEL.DEVICE", "cpu", "MODEL.LABEL_EMBEDDINGS.SOURCE", source),
        *("SOLVER.MAX_EPOCHS", 6, "TEST.EVAL_EPOCHS", 0, "OUTPUT_DIR", tmp_path / "run"),
    )
    for folder in ("run", "run/ema"):
        path = tmp_path / folder / "inference/digit_scenes_val/metrics.json"
        # It was 50; scores of chance have the share of present labels, 28.
        assert json.loads(path.read_text())["mAP"] >= 40 > 120 * share_present
