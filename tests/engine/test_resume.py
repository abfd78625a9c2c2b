"""A training that is cut anywhere and resumed leaves what an uncut one leaves."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import time
from contextlib import suppress

import pytest
import torch
from detectron2.engine import HookBase

from ia_gcn.commands.train import main as train
from ia_gcn.engine import Trainer, sole_training
from ia_gcn.engine.metrics_log import TIMES
from ia_gcn.engine.output_lock import evaluation_in
from tests.helpers.commands import own_log_handlers
from tests.helpers.training import Cut, run


def metrics(folder):
    """The records of a training's metrics.json, without times."""
    lines = (folder / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{name: x for name, x in r.items() if name not in TIMES} for r in records]


@pytest.fixture
def evaluated(monkeypatch):
    """A list that gets the iteration of each evaluation that is completed."""

    def evaluate(self):
        results = honest(self)
        iterations.append(self.iter)
        return results

    iterations, honest = [], Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return iterations


def best_of(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)["iteration"]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("*.pth"))


def forge_map(monkeypatch, by_iteration):
    """Let evaluations find the mAP of a list, by how many iterations are done."""

    def test_and_forge(self):
        results = honest(self)
        done = min(self.iter + 1, self.max_iter)
        results["multi_label"]["mAP"] = float(by_iteration[done])
        return results

    honest = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", test_and_forge)


def cut_in_evaluation(monkeypatch, number):
    """Let the training end during its n-th evaluation, from 1."""
    honest, count = Trainer.test, []

    def test(cls, *args):
        count.append(1)
        if len(count) == number:
            raise Cut
        return honest(*args)

    monkeypatch.setattr(Trainer, "test", classmethod(test))


# The best model


def test_a_resumed_run_keeps_a_best_model_found_where_it_was_cut(make_cfg, monkeypatch, tmp_path):
    forge_map(monkeypatch, [0, 0, 90, 0, 80, 0, 70, 60])
    cfg = make_cfg("run", "SOLVER.CHECKPOINT_PERIOD", 2)
    with pytest.raises(Cut):
        run(cfg, cut_at=2)  # after the checkpoint and the evaluation of two iterations
    run(cfg, resume=True)
    assert best_of(tmp_path / "run") == 1


def test_the_last_checkpoint_knows_of_the_last_evaluation(make_cfg, monkeypatch, tmp_path):
    # A training that is made longer must not replace it by something worse.
    forge_map(monkeypatch, [0, 0, 10, 0, 10, 0, 10, 90, 80, 0, 70])
    run(make_cfg("run"))
    run(make_cfg("run", "SOLVER.MAX_ITER", 9), resume=True)
    assert best_of(tmp_path / "run") == 7


# Evaluations


def test_an_evaluation_that_was_cut_is_made_up_for(make_cfg, monkeypatch, evaluated):
    cfg = make_cfg("run", "SOLVER.CHECKPOINT_PERIOD", 2)
    with monkeypatch.context() as patch:
        cut_in_evaluation(patch, 2)
        with pytest.raises(Cut):
            run(cfg)
    assert evaluated == [1]
    run(cfg, resume=True)
    assert evaluated == [1, 3, 5, 7]


class SaveBeforeEvaluation(HookBase):
    """Saves as versions before did: then a checkpoint owes the evaluation of its iteration."""

    def after_step(self):
        if self.trainer.iter == 19:
            self.trainer.checkpointer.save("model_0000019", iteration=19)
            raise Cut


@pytest.mark.slow
@pytest.mark.parametrize("has_state", [True, False])
def test_an_evaluation_that_a_checkpoint_owes_comes_first(make_cfg, tmp_path, evaluated, has_state):
    opts = ("SOLVER.MAX_ITER", 23, "TEST.EVAL_PERIOD", 20, "SOLVER.CHECKPOINT_PERIOD", 100)
    run(make_cfg("uncut", *opts))
    cfg, folder = make_cfg("cut", *opts), tmp_path / "cut"
    trainer = Trainer(cfg)
    trainer.register_hooks([SaveBeforeEvaluation()])
    trainer._hooks.insert(trainer._hooks.index(trainer._eval_hook), trainer._hooks.pop())
    with pytest.raises(Cut):
        trainer.train()
    if not has_state:
        path = folder / "model_0000019.pth"
        checkpoint = torch.load(path, weights_only=True)
        for name in ("EvalHook", "KeepMetrics"):
            del checkpoint["trainer"]["hooks"][name]
        torch.save(checkpoint, path)
    evaluated.clear()
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == 20
    assert evaluated == [19, 23]
    assert best_of(folder) == best_of(tmp_path / "uncut")
    if has_state:
        assert metrics(folder) == metrics(tmp_path / "uncut")


def test_no_evaluation_follows_a_last_iteration_that_failed(make_cfg, tmp_path, evaluated):
    with pytest.raises(Cut):
        run(make_cfg("run"), cut_at=6)
    assert evaluated == [1, 3, 5]
    assert best_of(tmp_path / "run") < 6


# metrics.json


@pytest.mark.parametrize(
    "cut_at", [19, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 2, 20, 31, 44))]
)
def test_the_metrics_are_those_of_an_uncut_run(make_cfg, tmp_path, cut_at):
    opts = ("SOLVER.MAX_ITER", 45, "TEST.EVAL_PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 10)
    uncut = tmp_path / "uncut"
    run(make_cfg("uncut", *opts))
    cfg = make_cfg("cut", *opts)
    with pytest.raises(Cut):
        run(cfg, cut_at=cut_at)
    resumed = run(cfg, resume=True)
    assert resumed.start_iter == (45 if cut_at == 44 else (cut_at + 1) // 10 * 10)
    assert metrics(tmp_path / "cut") == metrics(uncut)
    assert sorted(r["iteration"] for r in metrics(uncut)) == [19, 39, 43, 44, 45]
    # Once more, with nothing left to do.
    run(cfg, resume=True)
    assert metrics(tmp_path / "cut") == metrics(uncut)


@pytest.mark.parametrize(
    "head",
    [
        *("aam", "csra", "srn", "rnn_attention", "cnn_rnn", "add_gcn", "tdrg", "salgl", "ssgrl"),
        *("kggr", "c_tran", "query2label", "ml_decoder"),
    ],
)
@pytest.mark.slow
def test_each_head_goes_on_to_the_bit(make_cfg, tmp_path, head):
    # Of 32×32 pixels, SSGRL would see a single cell.
    opts = ("INPUT.IMAGE_SIZE", (96, 96), "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    cfg = make_cfg("run", *opts, config=head)
    run(cfg)
    expected = contents(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(Cut):
        run(cfg, cut_at=2)
    assert run(cfg, resume=True).start_iter == 2
    assert_same(contents(tmp_path / "run"), expected)


@pytest.mark.slow
def test_a_run_that_got_to_no_checkpoint_begins_the_file_anew(make_cfg, tmp_path):
    opts = ("SOLVER.MAX_ITER", 22, "SOLVER.CHECKPOINT_PERIOD", 100)
    run(make_cfg("uncut", *opts))
    with pytest.raises(Cut):
        run(make_cfg("cut", *opts), cut_at=20)
    assert metrics(tmp_path / "cut")
    run(make_cfg("cut", *opts), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "uncut")


@pytest.mark.slow
def test_half_a_line_at_the_end_is_gone(make_cfg, tmp_path):
    opts = ("SOLVER.MAX_ITER", 22, "SOLVER.CHECKPOINT_PERIOD", 20)
    run(make_cfg("uncut", *opts))
    with pytest.raises(Cut):
        run(make_cfg("cut", *opts), cut_at=20)
    with open(tmp_path / "cut" / "metrics.json", "a") as file:
        file.write('{"iteration": 21, "total_lo')
    run(make_cfg("cut", *opts), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "uncut")


def test_a_run_that_is_not_resumed_goes_on_with_the_file(make_cfg, tmp_path):
    cfg = make_cfg("run", "TEST.EVAL_PERIOD", 0)
    run(cfg)
    with open(tmp_path / "run" / "metrics.json", "a") as file:
        file.write('{"iteration": 2')
    run(cfg)
    assert [r["iteration"] for r in metrics(tmp_path / "run")] == [6, 7] * 2


# The end of a training


def contents(folder):
    """What a resumed run has to leave again: the checkpoints, and what was measured."""
    read = {name: torch.load(folder / name, weights_only=True) for name in checkpoints(folder)}
    files = {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("metrics.json")
        if path.parent != folder
    }
    return read, files, metrics(folder)


def assert_same(found, expected, where=""):
    """To the bit; of nested containers with tensors."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["evaluation", "truncated", "missing", "not named"])
def test_the_end_of_a_training_is_completed(make_cfg, monkeypatch, tmp_path, cut):
    # Where it is cut must not show in the config.
    cfg, folder = make_cfg("run"), tmp_path / "run"
    run(cfg)
    expected = contents(folder)
    if cut == "evaluation":
        for path in folder.iterdir():
            if path.is_file():
                path.unlink()
        with monkeypatch.context() as patch:
            cut_in_evaluation(patch, 4)
            with pytest.raises(Cut):
                run(cfg)
        assert metrics(folder) != expected[2]
    elif cut == "truncated":
        with open(folder / "model_final.pth", "r+b") as file:
            file.truncate(1000)
    elif cut == "missing":
        (folder / "model_final.pth").unlink()
    else:
        (folder / "last_checkpoint").write_text("model_0000005.pth")
    run(cfg, resume=True)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert_same(contents(folder), expected)


def test_a_finished_training_can_be_resumed_again(make_cfg, tmp_path):
    cfg = make_cfg("run")
    run(cfg)
    expected = contents(tmp_path / "run")
    trainer = run(cfg, resume=True)
    assert_same(contents(tmp_path / "run"), expected)
    assert trainer._last_eval_results["multi_label"]["mAP"] == expected[2][-1]["multi_label/mAP"]


def test_a_training_does_not_end_before_its_checkpoint(make_cfg, error_line):
    run(make_cfg("run"))
    line = error_line(run, make_cfg("run", "SOLVER.MAX_ITER", 5), True)
    assert line.startswith("SOLVER.MAX_ITER: the training ends after 5 iterations, and ")


# Which checkpoint


def cut_run(make_cfg, *opts):
    cfg = make_cfg("run", "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0, *opts)
    with pytest.raises(Cut):
        run(cfg, cut_at=4)
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"", "last_checkpoint is empty"),
        (b"\0" * 17, r"last_checkpoint names '\x00\x00"),
        (b"\xff\xfe", "last_checkpoint names "),
        (b"model_0000123.pth", "last_checkpoint names 'model_0000123.pth', which is not there"),
        (b"model_0000003.pth", "model_0000003.pth: not a .pth file"),
        (b"model_best.pth", "model_best.pth is no checkpoint of a training"),
    ],
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(make_cfg, tmp_path, caplog, name, message):
    cfg, folder = cut_run(make_cfg, "SOLVER.MAX_ITER", 6), tmp_path / "run"
    (folder / "last_checkpoint").write_bytes(name)
    (folder / "model_0000003.pth").write_bytes(b"half of one")
    torch.save({"model": {}, "iteration": 3}, folder / "model_best.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 2
    assert message in caplog.text
    assert f"Going on from {folder / 'model_0000001.pth'}" in caplog.text
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"


def test_a_checkpoint_with_a_wrong_bit_is_not_whole(make_cfg, tmp_path, caplog):
    cfg, path = cut_run(make_cfg), tmp_path / "run" / "model_0000003.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 2
    assert f"{path} is damaged: the checksum of " in caplog.text


def test_a_whole_checkpoint_is_no_reason_to_warn(make_cfg, caplog):
    cfg = cut_run(make_cfg)
    caplog.clear()
    trainer = Trainer(cfg)
    trainer.resume_or_load(True)
    assert trainer.start_iter == 4
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_without_a_whole_checkpoint_nothing_is_resumed(make_cfg, tmp_path, error_line):
    cfg, folder = cut_run(make_cfg), tmp_path / "run"
    for path in folder.glob("*.pth"):
        path.write_bytes(b"")
    line = error_line(run, cfg, True)
    assert line.startswith(f"--resume: no checkpoint in {folder} can be read: ")
    assert "model_0000001.pth" in line
    assert "model_0000003.pth" in line


def test_the_last_three_periodic_checkpoints_stay_after_resumes_too(make_cfg, tmp_path):
    opts = ("SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 0, "SOLVER.MAX_ITER", 9)
    cfg, folder = make_cfg("run", *opts), tmp_path / "run"
    for cut_at in (2, 4, 5):
        with pytest.raises(Cut):
            run(cfg, resume=True, cut_at=cut_at)
        kept = checkpoints(folder)
        assert kept == [f"model_{i:07d}.pth" for i in range(cut_at - 2, cut_at + 1)]
    # One of a run that was given up, and one that an older version left.
    for i in (7, 0):
        (folder / f"model_{i:07d}.pth").write_bytes((folder / "model_0000003.pth").read_bytes())
    run(cfg, resume=True)
    assert checkpoints(folder) == [f"model_{i:07d}.pth" for i in (6, 7, 8)] + ["model_final.pth"]


# A disk that is full


@pytest.fixture
def file_size_limit():
    """A function after which writing more than so many bytes to a file fails."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def test_a_full_disk_leaves_the_checkpoint_that_was_there(make_cfg, tmp_path, file_size_limit):
    cfg, folder = cut_run(make_cfg), tmp_path / "run"
    path = folder / "model_0000003.pth"
    before = path.read_bytes()
    trainer = Trainer(cfg)
    file_size_limit(10_000)
    with pytest.raises(OSError, match=r"File too large: .*model_0000003\.pth") as caught:
        trainer.checkpointer.save("model_0000003")
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert (folder / "last_checkpoint").read_text() == "model_0000003.pth"
    assert not list(folder.glob(".*.tmp"))


def test_what_a_killed_run_had_not_finished_is_removed(make_cfg, tmp_path):
    folders = [tmp_path / "run" / name for name in ("", "inference/custom_test")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".model_final.pth.1234.tmp").write_bytes(b"half")
        (folder / ".mine.tmp").write_bytes(b"not ours")
    run(make_cfg("run", "SOLVER.MAX_ITER", 1))
    for folder in folders:
        assert [path.name for path in folder.glob(".*.tmp")] == [".mine.tmp"]


# Two trainings in one folder, or an evaluation


@pytest.fixture
def held_elsewhere():
    """A function that has another process train (or evaluate) in a folder, and returns its id.

    That process has a child, as a loader's worker is one, which lives on until the test ends.
    """
    children, pipes = [], []

    def hold(folder, use=sole_training):
        ready, reports = os.pipe()
        waits, ends = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ends)
            with use(str(folder)):
                if os.fork():
                    os.write(reports, b"x")
                os.read(waits, 1)  # until the test ends
                os._exit(0)
        os.close(waits)
        children.append(child)
        pipes.extend((ready, reports, ends))
        assert os.read(ready, 2) == b"x"
        return child

    yield hold
    for pipe in pipes:
        os.close(pipe)
    for child in children:
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def test_a_second_training_in_a_folder_is_refused(make_cfg, tmp_path, held_elsewhere, error_line):
    folder = tmp_path / "run"
    process = held_elsewhere(folder)
    line = error_line(run, make_cfg("run"))
    assert line.startswith(f"OUTPUT_DIR: a training is running in {folder} (process {process} on ")
    run(make_cfg("other", "SOLVER.MAX_ITER", 1))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    run(make_cfg("run", "SOLVER.MAX_ITER", 1))
    assert "model_final.pth" in checkpoints(folder)


def is_locked(folder):
    """Whether another process can't train in a folder."""
    child = os.fork()
    if child == 0:
        with open(folder / ".lock", "r+") as file, suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
            os._exit(0)
        os._exit(1)
    return bool(os.waitpid(child, 0)[1])


def test_unfinished_files_of_an_evaluation_stay_until_it_ends(tmp_path, held_elsewhere):
    files = [tmp_path / name for name in (".a.pth.1.tmp", "inference/custom_test/.b.json.1.tmp")]
    files[1].parent.mkdir(parents=True)
    for file in files:
        file.write_text("half")
    evaluations = [held_elsewhere(tmp_path, evaluation_in) for _ in range(2)]
    for process in evaluations:
        with sole_training(str(tmp_path)):
            assert all(file.exists() for file in files)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    with sole_training(str(tmp_path)):
        assert not any(file.exists() for file in files)


def test_an_evaluation_can_start_beside_a_training(tmp_path, held_elsewhere):
    with sole_training(str(tmp_path)):
        held_elsewhere(tmp_path, evaluation_in)
        with evaluation_in(str(tmp_path)):
            pass
        assert is_locked(tmp_path)


def test_a_job_that_torchrun_started_again_waits_for_the_one_before(
    tmp_path, held_elsewhere, monkeypatch
):
    process = held_elsewhere(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    ended = []

    def sleep(seconds):
        os.kill(process, signal.SIGKILL)
        ended.append(os.waitpid(process, 0))

    monkeypatch.setattr(time, "sleep", sleep)
    with sole_training(str(tmp_path)):
        assert ended


def test_the_command_refuses_it_before_it_writes_there(tmp_path, held_elsewhere, capsys, tiny_coco):
    folder = tmp_path / "run"
    held_elsewhere(folder)
    data = tiny_coco(7)
    with own_log_handlers():
        status = train(
            [
                *("--config-file", "configs/DigitScenes/ml_gcn.yaml"),
                *("OUTPUT_DIR", str(folder)),
                *("DATASETS.CUSTOM.TRAIN", data.json_file),
                *("DATASETS.CUSTOM.TEST", data.json_file),
                *("DATASETS.CUSTOM.IMAGE_ROOT", data.image_root),
            ]
        )
    assert status == 1
    assert capsys.readouterr().err.startswith("train: OUTPUT_DIR: a training is running in ")
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, error_line):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    line = error_line(sole_training(str(folder)).__enter__)
    assert line == f"OUTPUT_DIR: {folder}: Not a directory"


def test_a_block_within_another_one_is_of_the_same_training(tmp_path):
    with sole_training(str(tmp_path)):
        with sole_training(str(tmp_path)):
            assert is_locked(tmp_path)
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
