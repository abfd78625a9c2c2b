"""A training on tar shards: as one on files, cut and resumed to the bit."""

import json

import pytest
import torch
from detectron2.utils import comm

from ia_gcn.engine import Trainer
from ia_gcn.engine.hooks import CountUnreadable
from ia_gcn.engine.metrics_log import TIMES
from tests.helpers.shards import tiny_shards
from tests.helpers.training import Cut, assert_same_state, run


@pytest.fixture
def index(tiny_coco, tmp_path):
    """18 images in shards of three or four."""
    return tiny_shards(tiny_coco(18, "sharded"), tmp_path / "shards")


@pytest.fixture
def cfg_of(make_cfg, index):
    """A function that makes the config of a short run on the shards."""

    def make(name, *opts):
        data = ["DATASETS.CUSTOM.TRAIN", str(index), "DATASETS.CUSTOM.TEST", str(index)]
        order = ["DATALOADER.SHARD_STREAMS", 2, "DATALOADER.SHARD_WINDOW", 2]
        # Neither an epoch nor a shard ends where the run is cut.
        periods = ["SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 5, "SOLVER.MAX_ITER", 12]
        root = ["DATASETS.CUSTOM.IMAGE_ROOT", ""]
        return make_cfg(name, *data, *root, *order, *periods, *opts)

    return make


def metrics(folder):
    """The records of a training's metrics.json, without times."""
    lines = (folder / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{name: x for name, x in r.items() if name not in TIMES} for r in records]


@pytest.mark.parametrize(
    ("cut_at", "workers"),
    [
        (7, (0, 2)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, (0, 0)), (10, (2, 2)))),
    ],
)
def test_a_run_goes_on_to_the_bit(cfg_of, tmp_path, cut_at, workers):
    key = "DATALOADER.NUM_WORKERS"
    uncut = run(cfg_of("uncut"))
    with pytest.raises(Cut):
        run(cfg_of("cut", key, workers[0]), cut_at=cut_at)
    resumed = run(cfg_of("cut", key, workers[1]), resume=True)
    assert resumed.start_iter == (cut_at + 1) // 5 * 5
    assert_same_state(uncut, resumed)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "uncut")


def test_a_missing_shard_is_counted_in_the_metrics(cfg_of, index, tmp_path):
    (index.parent / "000001.tar").unlink()
    opts = ["SOLVER.MAX_ITER", 22, "TEST.EVAL_PERIOD", 0]
    uncut = run(cfg_of("uncut", *opts))
    # The last one has the evaluation alone.
    assert [r.get("unreadable_files") for r in metrics(tmp_path / "uncut")] == [1, 1, None]
    with pytest.raises(Cut):
        run(cfg_of("cut", *opts), cut_at=11)
    resumed = run(cfg_of("cut", *opts), resume=True)
    assert resumed.start_iter == 10
    assert_same_state(uncut, resumed)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "uncut")
    checkpoint = torch.load(tmp_path / "cut" / "model_final.pth", weights_only=True)
    files = checkpoint["trainer"]["hooks"]["CountUnreadable"]["files"]
    assert files == [str(index.parent / "000001.tar")]


def test_without_one_nothing_is_counted(cfg_of, tmp_path):
    run(cfg_of("run"))
    assert not any("unreadable_files" in record for record in metrics(tmp_path / "run"))
    checkpoint = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert "CountUnreadable" not in checkpoint["trainer"]["hooks"]


def test_the_count_is_of_all_processes(monkeypatch):
    """Each process has seen other files."""
    elsewhere = [["b.tar"], [], ["c.tar"]]
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, elsewhere.pop(0)])
    unreadable, counts = {}, []

    class Storage:
        def put_scalar(self, name, value, smoothing_hint):
            counts.append(value)

    hook = CountUnreadable(unreadable)
    hook.trainer = type("trainer", (), {"storage": Storage()})
    for name in ("a.tar", "b.tar", "a.tar"):
        unreadable[name] = "gone"
        hook.after_step()
    assert counts == [2, 2, 3]
    resumed = CountUnreadable({})
    resumed.load_state_dict(hook.state_dict())
    assert resumed.state_dict() == {"files": ["a.tar", "b.tar", "c.tar"]}


def test_the_model_knows_the_labels_of_all_shards(cfg_of, index):
    """The label graph's counts come from the index, before any image is read."""
    trainer = Trainer(cfg_of("run"))
    counts = trainer.label_counts
    for path in index.parent.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert Trainer(cfg_of("again")).label_counts == counts
