"""A head from outside the package has all that the package's own have."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ia_gcn import MultiLabelPredictor
from ia_gcn.checkpoint import load_model, read_checkpoint
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.extensions import import_extensions
from tests.helpers.commands import run_process

MY_HEADS = Path(__file__).parent / "helpers" / "my_heads.py"
NAMES = ["red", "green", "blue"]
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.LABEL_HEAD.NAME": "TwoMapHead",
    "MODEL.LABEL_HEAD.IN_FEATURES": ["res4", "res5"],
    "MODEL.RESNETS.OUT_FEATURES": ["res4", "res5"],
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.LOSS.AUX_WEIGHTS": ["res4=0.5"],
    "MODEL.LABEL_HEAD.NUM_LABELS": 3,
    "DATASETS.TRAIN": ["my_images"],
    "DATASETS.TEST": ["my_images"],
    "INPUT.IMAGE_SIZE": [32, 32],
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.MAX_EPOCHS": 0,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_EPOCHS": 0,
    "SOLVER.CHECKPOINT_PERIOD": 3,
    "TEST.EVAL_EPOCHS": 0,
    "TEST.EVAL_PERIOD": 0,
    "TEST.REPORT": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images whose data set my_heads.py registers."""
    from tests.conftest import write_tiny_coco

    return write_tiny_coco(tmp_path_factory.mktemp("own"), 14)


@pytest.fixture
def environment(data, monkeypatch):
    monkeypatch.setenv("MY_DATA", os.pathsep.join([data.json_file, data.image_root]))
    monkeypatch.delitem(__import__("sys").modules, "my_heads", raising=False)


@pytest.fixture
def make_cfg(environment, tmp_path, repository, monkeypatch):
    from ia_gcn.modeling import LABEL_HEAD_REGISTRY

    monkeypatch.chdir(repository)
    monkeypatch.delitem(LABEL_HEAD_REGISTRY._obj_map, "TwoMapHead", raising=False)

    def make(name, **changes):
        options = {**SMALL, "OUTPUT_DIR": str(tmp_path / name), **changes}
        opts = [item for pair in options.items() for item in pair]
        cfg = setup_cfg("configs/DigitScenes/ml_gcn.yaml", opts, imports=[str(MY_HEADS)])
        cfg.freeze()
        return cfg

    return make


def train(cfg, resume=False, until=None):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    if until is not None:
        trainer.max_iter = until
    trainer.train()
    return trainer


def test_it_trains_resumes_to_the_bit_and_predicts(make_cfg, tmp_path, data):
    trainer = train(make_cfg("uncut"))
    assert {"loss_multi_label", "loss_res4", "loss_res5"} <= set(trainer.storage.histories())
    cut = make_cfg("cut")
    train(cut, until=3)
    resumed = train(cut, resume=True)
    found, expected = resumed.model.state_dict(), trainer.model.state_dict()
    assert all(found[name].equal(value) for name, value in expected.items())

    weights = tmp_path / "uncut" / "model_final.pth"
    content = read_checkpoint(str(weights))
    assert "label_graph.embeddings" in content["model"]
    assert "label_graph.pair_counts" not in content["model"]
    predictor = MultiLabelPredictor(weights, device="cpu")
    image = next(Path(data.image_root).iterdir())
    sample = predictor.view(image)
    scores = predictor.predict_views([sample])[0].scores
    known = [{**sample, "label_states": [1.0, -1, -1]}]
    others = predictor.predict_views(known)[0].scores
    assert scores[0] != others[0]
    assert scores[1:].tolist() == others[1:].tolist()


def test_a_checkpoint_says_what_it_needs_and_imports_nothing(make_cfg, tmp_path, monkeypatch):
    import sys

    cfg = make_cfg("run", **{"SOLVER.MAX_ITER": 1})
    train(cfg)
    weights = tmp_path / "run" / "model_final.pth"
    (tmp_path / "run.yaml").write_text(cfg.dump())
    monkeypatch.delitem(sys.modules, "my_heads")
    with pytest.raises(InputError, match=r"add --import .*my_heads\.py"):
        MultiLabelPredictor(weights, device="cpu")
    assert "my_heads" not in sys.modules
    with pytest.raises(InputError, match=r"add --import .*my_heads\.py"):
        setup_cfg(str(tmp_path / "run.yaml"))


def test_it_is_exported(make_cfg, tmp_path, data):
    from ia_gcn.export import exportable

    cfg = make_cfg("run", **{"SOLVER.MAX_ITER": 2})
    train(cfg)
    model = load_model(cfg, NAMES, path=str(tmp_path / "run" / "model_final.pth"))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    program = torch.export.export(exportable(model, (32, 32)), (images,), strict=False)
    with torch.no_grad():
        expected = torch.stack([out["logits"] for out in model([{"image": x} for x in images])])
    torch.testing.assert_close(program.module()(images)["logits"], expected)


def test_modules_that_cannot_be_imported_are_named(tmp_path):
    (tmp_path / "broken_head.py").write_text("1 / 0")
    (tmp_path / "json.py").write_text("")
    for module, message in [
        (tmp_path / "none.py", "no such file"),
        (tmp_path / "broken_head.py", "ZeroDivisionError"),
        (tmp_path / "json.py", "there is another module named json"),
        ("no_such_package.heads", "ModuleNotFoundError"),
    ]:
        with pytest.raises(InputError, match=message):
            import_extensions([str(module)])


@pytest.mark.slow
def test_two_processes_evaluate_what_they_trained(make_cfg, tmp_path, data):
    make_cfg("unused")  # registers the data set here, too
    options = {**SMALL, "OUTPUT_DIR": tmp_path / "two"}
    opts = [str(item) for pair in options.items() for item in pair]
    command = ("tools/train_net.py", "--config-file", "configs/DigitScenes/ml_gcn.yaml")
    command += ("--import", MY_HEADS)
    where = {"MY_DATA": os.environ["MY_DATA"]}
    result = run_process(*command, "--num-gpus", "2", *opts, **where)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = ("MODEL.WEIGHTS", tmp_path / "two" / "model_final.pth")
    metrics = []
    for processes in (1, 2):
        output = tmp_path / f"evaluation{processes}"
        again = [*opts, *weights, "OUTPUT_DIR", output]
        result = run_process(*command, "--num-gpus", processes, "--eval-only", *again, **where)
        assert result.returncode == 0, result.stderr[-3000:]
        metrics.append(json.loads((output / "inference/my_images/metrics.json").read_text()))
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_it_is_a_row_of_an_ablation_without_a_network(make_cfg, tmp_path):
    from ia_gcn.commands.ablate import main

    make_cfg("unused")
    rows = {
        name: {"config": "configs/DigitScenes/ml_gcn.yaml", "opts": opts}
        for name, opts in [
            ("own", {}),
            ("linear", {"MODEL.LABEL_HEAD.NAME": "LinearHead", "MODEL.LABEL_HEAD.IN_FEATURES": []}),
        ]
    }
    left_out = ("DATASETS.", "SOLVER.CHECKPOINT_", "TEST.EVAL_")
    opts = {key: value for key, value in SMALL.items() if not key.startswith(left_out)}
    rows["linear"]["opts"]["MODEL.LOSS.AUX_WEIGHTS"] = []
    spec = {
        "network": None,
        "train": "my_images",
        "test": "my_images",
        "opts": opts,
        "modes": {"heads": {}},
        "tables": {"heads": {"title": "Heads", "rows": rows}},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    where = ["--spec", str(tmp_path / "spec.yaml"), "--output", str(tmp_path / "ablation")]
    own = ["--import", str(MY_HEADS)]
    assert main(["run", *where, *own, "--seeds", "1,2", "--jobs", "1"]) == 0
    lines = (tmp_path / "ablation" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all(np.isfinite(json.loads(line)["mAP"]) for line in lines)
    assert main(["report", *where, *own]) == 0
