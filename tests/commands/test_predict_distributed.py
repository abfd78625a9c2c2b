"""tools/predict_distributed.py: on a Ray cluster of several processes, some of which are lost."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from ia_gcn.commands import predict
from ia_gcn.errors import InputError
from ia_gcn.inference import find_images
from ia_gcn.inference.distributed import PartPredictor, Share, joined_cluster
from ia_gcn.inference.parts import Job, split_sources
from tests.helpers.checkpoints import COLOURS, save_checkpoint
from tests.helpers.commands import ROOT

COMMAND = "predict_distributed"

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
PART, BATCH = 4, 2


@pytest.fixture
def weights(make_cfg):
    return save_checkpoint(make_cfg)[0]


@pytest.fixture
def photos(tiny_coco):
    """A folder of 14 images and one that can't be read: four parts."""
    folder = Path(tiny_coco(14, "photos").image_root)
    (folder / "000007.txt.png").write_text("no image")
    return folder


@pytest.fixture
def predict_into(main, weights, photos, tmp_path):
    """A function that predicts the photos into a folder: its path, and what `main` returned."""

    def call(name, *options, inputs=None):
        out = tmp_path / name
        sizes = ("--images-per-part", PART, "--batch-size", BATCH)
        result = main(inputs or photos, "--weights", weights, "--output", out, *sizes, *options)
        return out, *result

    return call


@pytest.fixture
def right(weights, photos):
    """The files that are to be there, made one after the other in this process."""
    job = Job(weights, tuple(COLOURS), (0.5,) * 3, batch_size=BATCH, part_size=PART)
    worker = PartPredictor(job, Share(1, 1, 0), None)
    return [worker.predict(part) for part in split_sources(find_images(str(photos)), PART)]


def parts(folder):
    return sorted(folder.glob("*.parquet"))


def contents(folder):
    return [path.read_bytes() for path in parts(folder)]


def fails(result):
    """The one line of a command that was refused."""
    *_, status, out, err = result
    assert (status, out) == (1, "")
    (line,) = err.splitlines()
    return line


# ------------------------------------------------------------------------------------- without Ray


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)


def test_without_ray_it_says_what_to_install(no_ray, predict_into):
    assert 'this needs pip install -e ".[ray]"' in fails(predict_into("out"))


def test_what_can_not_be_used_is_said_before_ray_starts(no_ray, predict_into, tmp_path, main):
    (tmp_path / "empty").mkdir()
    arguments = ("--weights", "gone.pth", "--output", tmp_path / "out")
    assert "gone.pth" in fails(main(tmp_path / "a.jpg", *arguments))
    assert "URLs are not downloaded" in fails(main("https://example.org/a.jpg", *arguments))
    assert "a.parquet" in fails(main(tmp_path / "a.parquet", *arguments))
    assert fails(main("-", *arguments)).endswith("there are no images")
    known = json.dumps({"file": "a.jpg", "known": {"red": True}}).encode()
    message = fails(main("-", *arguments, stdin=known))
    assert message.endswith("line 1: known labels are for tools/predict.py")
    message = fails(main("-", *arguments, stdin=b"\x89PNG\0"))
    assert message.endswith("a single image is for tools/predict.py")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [("--workers", "0"), ("--cpus-per-worker", "0"), ("--gpus-per-worker", "-1")]
)
def test_shares_that_are_none_are_refused(main, tmp_path, option):
    with pytest.raises(SystemExit):
        main("a.jpg", "--weights", "a.pth", "--output", tmp_path, *option)


# --------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine with two CPUs, however many there are, which the commands join;
    or that of $RAY_ADDRESS, which must have as many."""
    ray = pytest.importorskip("ray")
    monkeypatch = pytest.MonkeyPatch()
    if "RAY_ADDRESS" not in os.environ:
        monkeypatch.setattr(ray, "init", partial(ray.init, num_cpus=2, num_gpus=0))
    with ExitStack() as stack:
        for tries_left in (3, 2, 1, 0):
            try:
                stack.enter_context(joined_cluster(None))
                break
            # Where much else runs, Ray's own limit of 30 s for its start may be too short.
            except InputError:
                if not tries_left:
                    raise
        monkeypatch.undo()
        yield


@pytest.mark.slow
def test_the_rows_are_the_records_of_predict_whoever_makes_them(
    cluster, predict_into, right, photos, weights, tmp_path
):
    two, status, out, err = predict_into("two", "--workers", 2, "--cpus-per-worker", 1)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == "predict-distributed: 15 images, 1 could not be read"
    assert [path.name for path in parts(two)] == [f"part-0000{i}.parquet" for i in range(4)]
    assert contents(two) == right
    records = tmp_path / "labels.jsonl"
    options = ["--batch-size", BATCH, "--num-workers", 1, "--output", records]
    assert predict.main([str(x) for x in (photos, "--weights", weights, *options)]) == 1
    rows = [row for path in parts(two) for row in pq.read_table(path).to_pylist()]
    for row, line in zip(rows, records.read_text().splitlines(), strict=True):
        record = json.loads(line)
        labels = record.get("labels")
        assert (row["file"], row["error"]) == (record["file"], record.get("error"))
        assert row["labels"] == (labels and [x["label"] for x in labels])
        found = row["probabilities"] and [round(x, 6) for x in row["probabilities"]]
        assert found == (labels and [x["probability"] for x in labels])

    # By one worker it goes on with what is missing, and with nothing else.
    before = {path: path.stat().st_mtime_ns for path in parts(two)}
    for path in parts(two)[1:3]:
        path.unlink()
    _, status, _, err = predict_into("two", "--workers", 1)
    assert (status, contents(two)) == (1, right)
    assert err.splitlines()[-1] == "predict-distributed: 15 images, 1 could not be read"
    kept = {path for path, time in before.items() if path.stat().st_mtime_ns == time}
    assert kept == {parts(two)[0], parts(two)[3]}


@pytest.mark.slow
def test_more_than_fits_is_refused_and_not_waited_for(cluster, predict_into):
    message = fails(predict_into("out", "--workers", 3, "--cpus-per-worker", 1))
    assert "2 fit into the cluster and not 3" in message
    assert "1 GPUs each, 0 fit" in fails(predict_into("out", "--gpus-per-worker", 1))


KILLER = """
import os, signal, sys
from pathlib import Path
from ia_gcn.inference import EvaluationView

view = EvaluationView.__call__

def read_or_die(self, source):
    if str(source).endswith("000006.png") and not Path({mark!r}).exists():
        if {once}:
            Path({mark!r}).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return view(self, source)

# In Ray's workers alone.
if "default_worker" in sys.argv[0]:
    EvaluationView.__call__ = read_or_die
"""


@pytest.fixture
def write_killer(tmp_path):
    """A function that writes a module for --import: a worker that reads an image is killed."""

    def write(name, once):
        path = tmp_path / f"{name}.py"
        path.write_text(KILLER.format(mark=str(tmp_path / f"{name}.mark"), once=once))
        return path

    return write


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_its_part_made_again(
    cluster, predict_into, right, write_killer
):
    options = ["--workers", 2, "--cpus-per-worker", 1]
    out, status, _, err = predict_into(
        "out", *options, "--import", write_killer("killed_once", True)
    )
    assert status == 1
    assert err.splitlines()[-1].endswith("; 1 parts were made again, as their workers were lost")
    assert contents(out) == right


@pytest.mark.slow
def test_an_image_that_ends_every_worker_does_not_go_on_for_ever(
    cluster, predict_into, write_killer
):
    message = fails(predict_into("out", "--import", write_killer("killed_always", False)))
    assert "000005.png and what follows: each of 3 workers that read it was lost" in message


@pytest.mark.slow
def test_the_command_by_itself_is_quiet_and_is_interrupted_in_order(
    weights, photos, tmp_path, write_killer
):
    """A cluster of its own, which is gone afterwards; Ctrl-C once there is a part."""
    pytest.importorskip("ray")
    out = tmp_path / "out"
    files = find_images(str(photos)) * 40
    command = [sys.executable, "tools/predict_distributed.py", "-", "--weights", weights]
    command += ["--output", str(out), "--images-per-part", "4", "--workers", "1"]
    start = partial(
        subprocess.Popen,
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process = start()
    process.stdin.write("\n".join(files))
    process.stdin.close()
    while not parts(out) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.stdout.read(), process.stderr.read()
    assert (process.wait(), stdout) == (128 + signal.SIGINT, "")
    assert stderr == "predict-distributed: interrupted; the same command goes on\n"
    assert 0 < len(parts(out)) < 150
    stdout, stderr = start().communicate("\n".join(files))
    assert (stdout, stderr) == ("", "predict-distributed: 600 images, 40 could not be read\n")
    assert len(parts(out)) == 150
