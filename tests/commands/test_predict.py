"""tools/predict.py: on every kind of input, what it writes and draws; and the loop behind it."""

import argparse
import csv
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ia_gcn import MultiLabelPredictor
from ia_gcn.commands import predict
from ia_gcn.inference import EvaluationView, find_images, predict_files
from ia_gcn.inference.files import map_ahead
from ia_gcn.visualization import draw_label_bars
from tests.helpers.checkpoints import COLOURS, change, evaluate, save_checkpoint
from tests.helpers.commands import ROOT
from tests.helpers.images import UNREADABLE

COMMAND = "predict"


@pytest.fixture
def make_checkpoint(make_cfg):
    """`save_checkpoint` with its first argument."""
    return partial(save_checkpoint, make_cfg)


@pytest.fixture
def photos(tmp_path):
    """A folder with images of all sizes, a text and a folder: its path."""
    rng = np.random.default_rng(0)
    names = ["b.png", "a.JPG", "sub/deep/c.webp", "sub/a.jpg", "a [1].png"]
    for i, name in enumerate(names):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + 9 * i, 70 - 8 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def below(folder, *names):
    return [str(folder / name) for name in names]


def records(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def files_of(text):
    return [record["file"] for record in records(text)]


def expected_labels(prediction, threshold=0.5):
    """By a plain loop: {label: probability}, the highest first."""
    pairs = sorted(zip(prediction.scores.tolist(), prediction.labels), reverse=True)
    return {name: score for score, name in pairs if score >= threshold}


def labels_of(record):
    return {label["label"]: label["probability"] for label in record["labels"]}


# ------------------------------------------------------------------------------------- the command


def test_the_command_says_what_evaluation_says(main, make_checkpoint, tmp_path):
    """In batches, read by threads; a missing file among the others."""
    weights, cfg, model = make_checkpoint()
    scores, files = evaluate(cfg, model)
    missing = str(tmp_path / "missing.jpg")
    status, out, err = main(
        *("--weights", weights, "--batch-size", "3", "--device", "cpu"),
        *("--num-workers", "2", "--threshold", "0", *files[:5], missing, *files[5:]),
    )
    assert status == 1
    assert err.splitlines()[-1] == "predict: 15 images, 1 could not be read"
    found = records(out)
    assert [record["file"] for record in found] == [*files[:5], missing, *files[5:]]
    assert set(found.pop(5)) == {"file", "error"}
    for record, row in zip(found, scores):
        assert set(record) == {"file", "labels"}
        values = [label["probability"] for label in record["labels"]]
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose([labels_of(record)[name] for name in COLOURS], row, atol=2e-6)


def test_every_kind_of_input(main, make_checkpoint, photos, monkeypatch):
    weights, *_ = make_checkpoint()
    monkeypatch.chdir(photos.parent)

    def files_for(*inputs, stdin=b""):
        status, out, err = main("--weights", weights, *inputs, stdin=stdin)
        assert status == 0, err
        assert err.splitlines()[-1].endswith("images, 0 could not be read")
        return files_of(out)

    everything = ["a [1].png", "a.JPG", "b.png", "sub/a.jpg", "sub/deep/c.webp"]
    assert files_for("photos/b.png") == ["photos/b.png"]
    assert files_for("photos") == [f"photos/{name}" for name in everything]
    assert files_for("photos/sub", "photos/b.png", "photos/sub") == [
        *("photos/sub/a.jpg", "photos/sub/deep/c.webp", "photos/b.png"),
        *("photos/sub/a.jpg", "photos/sub/deep/c.webp"),
    ]
    assert files_for("photos/*.png") == ["photos/a [1].png", "photos/b.png"]
    assert files_for("photos/**/*.jpg") == ["photos/sub/a.jpg"]
    assert files_for("photos/s*") == ["photos/sub/a.jpg", "photos/sub/deep/c.webp"]
    # A file of that name comes before what it would match as a pattern.
    assert files_for("photos/a [1].png") == ["photos/a [1].png"]
    listed = b"photos/sub/a.jpg\r\n\nphotos/b.png\nphotos/a [1].png"
    assert files_for("photos/a.JPG", "-", "photos/b.png", stdin=listed) == [
        *("photos/a.JPG", "photos/sub/a.jpg", "photos/b.png", "photos/a [1].png", "photos/b.png"),
    ]
    assert files_for("-") == []


def test_options_may_stand_between_the_inputs(main, make_checkpoint, photos):
    weights, *_ = make_checkpoint()
    first, second = below(photos, "b.png", "a.JPG")
    status, out, _ = main(first, "--weights", weights, second, "--top-k", 1, "--threshold", 0)
    assert status == 0
    assert [len(record["labels"]) for record in records(out)] == [1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_name_that_is_no_text(main, make_checkpoint, photos):
    weights, *_ = make_checkpoint()
    name = os.fsencode(photos) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        Image.new("RGB", (9, 9)).save(file, "png")
    status, out, _ = main("--weights", weights, "-", stdin=name + b"\n")
    assert status == 0
    assert [os.fsencode(file) for file in files_of(out)] == [name]


def test_what_can_not_be_read_is_a_record_and_the_rest_goes_on(main, make_checkpoint, tmp_path):
    weights, *_ = make_checkpoint()
    folder = tmp_path / "broken"
    folder.mkdir()
    inputs = []
    for name, write in UNREADABLE.items():
        write(folder / name)
        Image.new("RGB", (9, 9)).save(folder / f"good {name}.png")
        inputs += below(folder, name, f"good {name}.png")
    inputs += [str(folder / "no*match"), f"{folder}/http:", "https://example.org/a.jpg"]
    listed = "\n".join(inputs).encode()
    status, out, err = main("--weights", weights, "-", "--batch-size", 4, stdin=listed)
    assert status == 1
    assert files_of(out) == inputs
    count = len(UNREADABLE)
    assert err.splitlines()[-1] == f"predict: {2 * count + 3} images, {count + 3} could not be read"
    found = records(out)
    errors = [record.get("error") for record in found]
    assert all(errors[0 : 2 * count : 2])
    assert not any(errors[1 : 2 * count : 2])
    assert all(errors[-3:])
    reason = next(record["error"] for record in found if record["file"].endswith("folder.png"))
    assert reason == "there is no image in this folder"
    assert found[-1]["error"] == "URLs are not downloaded"


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_regular_file_in_a_folder_is_not_waited_for(
    main, make_checkpoint, photos, monkeypatch, kind
):
    weights, *_ = make_checkpoint()
    monkeypatch.chdir(photos)
    if kind == "pipe":
        os.mkfifo("0.png")
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind("0.png")
    status, out, _ = main("--weights", weights, ".")
    assert status == 1
    first, *others = records(out)
    assert first == {
        "file": "./0.png",
        "error": "OSError: [Errno 22] not a regular file: './0.png'",
    }
    assert others
    assert not any("error" in record for record in others)


def test_an_image_on_standard_input_is_one(main, make_checkpoint, photos):
    weights, *_ = make_checkpoint()
    drawn = photos.parent / "drawn"
    for name in ("b.png", "a.JPG", "sub/deep/c.webp"):
        content = (photos / name).read_bytes()
        options = ["--weights", weights, "--threshold", 0, "--draw", drawn]
        status, out, err = main(*options, "-", stdin=content)
        assert (status, err.splitlines()[-1]) == (0, "predict: 1 images, 0 could not be read")
        (record,) = records(out)
        assert record["file"] == "-"
        (expected,) = records(main(*options, photos / name)[1])
        assert record["labels"] == expected["labels"]
        assert (drawn / "-.png").read_bytes() == (drawn / f"{Path(name).stem}.png").read_bytes()
    status, out, _ = main("--weights", weights, "-", stdin=b"no image\0")
    assert status == 1
    assert records(out)[0]["error"].startswith("UnidentifiedImageError")


def test_urls_are_refused(main, tmp_path):
    """Before anything is loaded."""
    url = "HTTPS://example.org/photo.jpg"
    line = fails(main("--weights", tmp_path / "none.pth", url))
    assert line.startswith(f"predict: {url}: URLs are not downloaded; pipe the image instead: ")


def test_modules_of_a_users_own_are_imported(main, make_checkpoint, photos, tmp_path):
    weights, *_ = make_checkpoint()
    (tmp_path / "my_own_part.py").write_text("raise ValueError('imported')")
    options = ["--import", tmp_path / "my_own_part.py", "--weights", weights]
    assert fails(main(photos, *options)).endswith("my_own_part.py: ValueError: imported")


# ------------------------------------------------------------------------------------ known labels


def test_labels_that_are_known(main, make_checkpoint, photos):
    """Of all images and of each, with a line of the list in place of --known."""
    weights, *_ = make_checkpoint(config="c_tran")
    p = MultiLabelPredictor(weights)
    files = below(photos, "b.png", "a.JPG", "sub/a.jpg")
    listed = [
        {"file": files[0], "known": {"green": True, "red": True}},
        {"file": files[1]},
    ]
    stdin = "\n".join([*map(json.dumps, listed), files[2], ""]).encode()
    options = ["--known", "red=no", "--known", "blue=yes", "--threshold", 0]
    status, out, err = main("--weights", weights, files[1], "-", *options, stdin=stdin)
    assert status == 0, err
    told = {"red": False, "blue": True}
    expected = [
        *((files[1], told), (files[0], {"red": True, "green": True, "blue": True})),
        *((files[1], told), (files[2], told)),
    ]
    found = records(out)
    assert len(found) == len(expected)
    for record, (file, known) in zip(found, expected):
        assert list(record) == ["file", "known", "labels"]
        assert (record["file"], record["known"]) == (file, known)
        scores = dict(zip(COLOURS, p(file, known).scores.tolist()))
        assert labels_of(record) == pytest.approx(scores, abs=1e-6)
        assert {name: labels_of(record)[name] for name in known} == known
    # In CSV a known label is as any other.
    _, out, _ = main("--weights", weights, files[0], "--known", "green=yes", "--format", "csv")
    assert f"{files[0]},green,1.0," in out.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_name_that_is_no_text_is_escaped_in_json(main, make_checkpoint, photos):
    weights, *_ = make_checkpoint(config="c_tran")
    name = os.fsencode(photos) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        Image.new("RGB", (9, 9)).save(file, "png")
    line = json.dumps({"file": os.fsdecode(name), "known": {"red": True}}).encode()
    _, out, _ = main("--weights", weights, "-", stdin=line)
    # The file and known of a record are such a line.
    (record,) = records(out)
    assert (os.fsencode(record["file"]), record["known"]) == (name, {"red": True})


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"{}", b"{red}.png", b'{"known": {"red": true}}', b'{"file": 3}', b'{"file": ""}'),
        *(
            b'{"file": "a\\u0000.png"}',
            b'{"file": "\\ud800.png"}',
            b'{"file": "a", "known": ["red"]}',
        ),
        *(b'{"file": "a", "knwon": {}}', b'{"file": "\xff"}', b'{"file": ' + b"[" * 100_000),
    ],
)
def test_a_line_that_is_not_of_its_form_is_named(main, tmp_path, line):
    stdin = b"a.png\n\n" + line + b"\n"
    message = fails(main("--weights", tmp_path / "none.pth", "-", stdin=stdin))
    assert message.startswith("predict: standard input, line 3 begins with { and is not ")


def test_a_file_whose_name_begins_as_json(main, make_checkpoint, photos, monkeypatch):
    weights, *_ = make_checkpoint()
    monkeypatch.chdir(photos)
    os.rename("b.png", "{b}.png")
    assert files_of(main("--weights", weights, "-", stdin=b"./{b}.png")[1]) == ["./{b}.png"]
    assert files_of(main("--weights", weights, "{b}.png")[1]) == ["{b}.png"]


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"gren": True}, ": the model has no label 'gren': did you mean 'green'?"),
        ({"red": None}, ": 'red' must be True or False, not None"),
        ({"red": 1}, ": 'red' must be True or False, not 1"),
    ],
)
def test_what_can_not_be_known_is_refused_before_the_first_image(
    main, make_checkpoint, photos, known, message
):
    weights, *_ = make_checkpoint(config="c_tran")
    image = str(photos / "b.png")
    stdin = f"{image}\n{json.dumps({'file': image, 'known': known})}".encode()
    line = fails(main("--weights", weights, "-", stdin=stdin))
    assert line == f"predict: standard input, line 2{message}"
    line = fails(main("--weights", weights, image, "--known", "gren=no"))
    assert line == "predict: --known: the model has no label 'gren': did you mean 'green'?"


def test_a_model_without_known_labels_refuses_them(main, make_checkpoint, photos):
    weights, *_ = make_checkpoint()
    line = fails(main("--weights", weights, photos / "b.png", "--known", "red=yes"))
    assert line.startswith("predict: --known: this model makes no use of known labels: a C-Tran")


@given(st.dictionaries(st.text(), st.booleans()), st.text(min_size=1))
def test_a_line_says_what_it_said(known, name):
    name = name.replace("\0", "_")
    line = json.dumps({"file": name, "known": known}).encode()
    assert predict.read_line(line, "here") == (name, known, "here")


@given(st.text(), st.booleans())
def test_a_known_label_may_have_any_name(name, there):
    text = f"{name}={'yes' if there else 'no'}"
    if name:
        assert predict.known_label(text) == (name, there)
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            predict.known_label(text)


# --------------------------------------------------------------------------------------- the loop


def test_records_of_a_folder_by_the_package_alone(make_checkpoint, photos):
    """Files as names, paths and open files; with threads and without."""
    p = MultiLabelPredictor(make_checkpoint()[0])
    files = find_images(str(photos))
    with open(files[0], "rb") as opened:
        sources = [opened, Path(files[1]), *files[2:], str(photos / "gone.png")]
        for workers in (0, 3):
            results = list(predict_files(p, sources, batch_size=2, num_workers=workers))
            assert [result.file for result in results] == [*files, str(photos / "gone.png")]
            for file, result in zip(files, results):
                np.testing.assert_allclose(result.prediction.scores, p(file).scores, atol=1e-6)
                labels = labels_of(result.record(threshold=0.3, top_k=2))
                expected = list(expected_labels(p(file), 0.3).items())[:2]
                assert labels == pytest.approx(dict(expected), abs=1e-6)
            assert results[-1].prediction is None
            assert set(results[-1].record()) == {"file", "error"}


def test_threads_work_ahead(make_checkpoint, photos, monkeypatch):
    """Until the first batch is taken, each thread has done one, and one of them another one."""
    p = MultiLabelPredictor(make_checkpoint()[0])
    started, readers = threading.Semaphore(0), set()
    view = EvaluationView.__call__

    def read(self, source):
        readers.add(threading.current_thread())
        started.release()
        return view(self, source)

    monkeypatch.setattr(EvaluationView, "__call__", read)
    results = predict_files(p, [photos / "b.png"] * 20, batch_size=3, num_workers=2)
    next(results)
    for _ in range(9):
        assert started.acquire(timeout=60)
    assert not started.acquire(timeout=0.2)
    assert len(list(results)) == 19
    assert len(readers) == 2
    assert threading.main_thread() not in readers


@pytest.mark.parametrize(
    ("num_files", "workers", "expected"),
    [
        # Where there are enough files, as many as were asked for; and what is left.
        (9, 2, [4, 4, 1]),
        # Too few for that: each thread gets some.
        (7, 3, [3, 3, 1]),
        (2, 3, [1, 1]),
        (7, 0, [4, 3]),
        (0, 3, []),
    ],
)
def test_batches_of_files(make_checkpoint, photos, monkeypatch, num_files, workers, expected):
    p = MultiLabelPredictor(make_checkpoint()[0])
    sizes, predict_views = [], p.predict_views
    monkeypatch.setattr(
        p, "predict_views", lambda samples: sizes.append(len(samples)) or predict_views(samples)
    )
    files = [photos / "b.png"] * num_files
    assert len(list(predict_files(p, iter(files), batch_size=4, num_workers=workers))) == num_files
    assert sorted(sizes, reverse=True) == expected


def test_threads_share_those_of_torch(make_checkpoint, photos, monkeypatch):
    p = MultiLabelPredictor(make_checkpoint()[0])
    before, found, predict_views = torch.get_num_threads(), [], p.predict_views

    def count(samples):
        found.append(torch.get_num_threads())
        return predict_views(samples)

    monkeypatch.setattr(p, "predict_views", count)
    try:
        torch.set_num_threads(6)
        list(predict_files(p, [photos / "b.png"] * 8, batch_size=2, num_workers=3))
        assert found == [2, 2, 2, 2]
        assert torch.get_num_threads() == 6
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found[-1] == 6
    finally:
        torch.set_num_threads(before)


def test_a_gpu_does_one_batch_at_a_time(make_checkpoint):
    p = MultiLabelPredictor(make_checkpoint()[0])
    p.model = SimpleNamespace(device=torch.device("cuda"))
    with p.used_by(4) as (start_thread, turn):
        assert start_thread is None
        with turn:
            assert not turn.acquire(blocking=False)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_map_ahead_is_the_built_in_map(workers):
    assert list(map_ahead(str, range(20), workers, 4)) == list(map(str, range(20)))
    results = map_ahead(lambda x: 1 // x, [1, 0, 1], workers, 4)
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_a_loop_that_is_left_ends_its_threads():
    before, done = set(threading.enumerate()), []
    results = map_ahead(done.append, itertools.count(), 2, 5)
    next(results)
    results.close()
    # As many as it may be ahead, and what the threads had begun; and no thread is left.
    assert len(done) <= 6
    assert set(threading.enumerate()) <= before


# ------------------------------------------------------------------------------------- what it says


def test_thresholds(main, make_checkpoint, photos, tmp_path):
    weights, *_ = make_checkpoint()
    p = MultiLabelPredictor(weights)
    files = below(photos, "b.png", "a.JPG", "sub/a.jpg", "sub/deep/c.webp")
    predictions = p.predict_batch(files)
    red, green, blue = np.median([x.scores for x in predictions], axis=0).tolist()
    shown = []

    def labels_with(*options):
        status, out, err = main("--weights", weights, *files, *options)
        assert status == 0, err
        found = [labels_of(record) for record in records(out)]
        shown.append([sorted(labels) for labels in found])
        return found

    def check(found, *thresholds):
        for labels, x in zip(found, predictions):
            pairs = zip(COLOURS, x.scores.tolist(), thresholds)
            expected = {name: score for name, score, least in pairs if score >= least}
            assert labels == pytest.approx(expected, abs=1e-6)

    check(labels_with(), 0.5, 0.5, 0.5)
    check(labels_with("--threshold", green), green, green, green)
    table = tmp_path / "thresholds.csv"
    table.write_text(f"\ufefflabel,threshold\nblue,{blue}\nred,{red}\n")
    check(labels_with("--thresholds", table, "--threshold", 1), red, 1, blue)
    table.write_text(f"blue,{blue}\n\ngreen,0\n")
    check(labels_with("--thresholds", table), 0.5, 0, blue)
    # As evaluate_predictions.py writes them: with more columns, and none for a label never seen.
    table.write_text(f"label,threshold,precision,positives\nblue,{blue},90.1,4\nred,,,0\n")
    check(labels_with("--thresholds", table), 0.5, 0.5, blue)
    mapping = tmp_path / "thresholds.json"
    mapping.write_text(json.dumps({"green": green, "red": 0}))
    check(labels_with("--thresholds", mapping), 0, green, 0.5)
    # They did make a difference.
    assert len({str(labels) for labels in shown}) >= 4

    for k in (1, 2, 9):
        for labels, x in zip(labels_with("--top-k", k, "--threshold", 0.45), predictions):
            expected = list(expected_labels(x, 0.45).items())[:k]
            assert list(labels.items()) == [(n, pytest.approx(s, abs=1e-6)) for n, s in expected]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "cat,0.5\n", "no label 'cat'"),
        ("t.csv", "red,high\n", "high"),
        ("t.csv", "red,1.5\n", "1.5"),
        ("t.csv", "red\n", "t.csv"),
        ("t.json", '{"red": NaN}', "nan"),
        ("t.json", '{"red": null}', "t.json"),
        ("t.json", "[1, 2]", "t.json"),
        ("t.json", "{", "t.json"),
        ("none.csv", None, "No such file"),
    ],
)
def test_thresholds_that_can_not_be_used(main, make_checkpoint, photos, name, text, message):
    weights, *_ = make_checkpoint()
    path = photos / name
    if text is not None:
        path.write_text(text)
    line = fails(main("--weights", weights, photos, "--thresholds", path))
    assert f"--thresholds {path}: " in line
    assert message in line


def test_csv(main, make_checkpoint, photos, tmp_path):
    weights, *_ = make_checkpoint()
    change(weights, label_names=["red, or so", 'it\'s "green"', "蓝"])
    files = [str(photos), str(tmp_path / "gone.png")]
    output = tmp_path / "deep" / "labels.CSV"
    least = np.median(
        [
            x.scores
            for x in MultiLabelPredictor(weights).predict_batch(
                below(photos, "b.png", "a.JPG", "sub/a.jpg")
            )
        ]
    )
    options = ["--weights", weights, *files, "--threshold", least]
    status, out, _ = main(*options, "--output", output)
    assert (status, out) == (1, "")
    with open(output, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "label", "probability", "error"]
    status, out, _ = main(*options)
    expected = []
    for record in records(out):
        pairs = labels_of(record).items() if "labels" in record else ()
        expected += [[record["file"], name, str(share), ""] for name, share in pairs]
        if not pairs:
            expected.append([record["file"], "", "", record.get("error", "")])
    assert rows == expected
    assert rows[-1][3].startswith("FileNotFoundError")
    assert main(*options, "--format", "csv")[1] == output.read_text(encoding="utf-8")
    # An image without a label has a line of its own.
    _, out, _ = main("--weights", weights, photos / "b.png", "--format", "csv", "--threshold", 1)
    assert out.splitlines()[1:] == [f"{photos / 'b.png'},,,"]


def test_regions(main, make_checkpoint, photos, tmp_path):
    weights, *_ = make_checkpoint(config="ia_gcn_plus")
    output = tmp_path / "found.jsonl"
    status, out, err = main("--weights", weights, photos, "--regions", "--output", output)
    assert (status, out) == (0, ""), err
    found = records(output.read_text(encoding="utf-8"))
    assert len(found) == 5
    p = MultiLabelPredictor(weights)
    for record in found:
        prediction = p(record["file"])
        assert labels_of(record) == pytest.approx(expected_labels(prediction), abs=1e-6)
        boxes, weights_, scores = prediction.regions
        assert len(record["regions"]) == len(boxes) > 5
        for region, box, weight, row in zip(record["regions"], boxes, weights_, scores):
            assert set(region) == {"box", "weight", "label", "probability"}
            np.testing.assert_allclose(region["box"], box, atol=0.006)
            assert region["weight"] == pytest.approx(float(weight), abs=1e-5)
            assert region["label"] == COLOURS[max(range(3), key=row.__getitem__)]
            assert region["probability"] == pytest.approx(max(row.tolist()), abs=1e-6)
    _, out, _ = main("--weights", weights, photos)
    assert all("regions" not in record for record in records(out))


def test_a_cut_run_has_the_records_of_what_it_finished(main, make_checkpoint, photos, monkeypatch):
    weights, *_ = make_checkpoint()
    predict_views = MultiLabelPredictor.predict_views
    seen = []

    def cut(self, samples):
        # The file is put in place once.
        seen.append((photos / "out.jsonl").exists())
        if len(seen) == 3:
            raise KeyboardInterrupt
        return predict_views(self, samples)

    monkeypatch.setattr(MultiLabelPredictor, "predict_views", cut)
    files = below(photos, "b.png", "a.JPG", "sub/a.jpg", "sub/deep/c.webp")
    options = ["--batch-size", 1, "--num-workers", 0, "--output", photos / "out.jsonl"]
    status, _, err = main("--weights", weights, *files, *options)
    assert (status, err.splitlines()[-1]) == (130, "predict: interrupted")
    assert seen == [False, False, False]
    assert files_of((photos / "out.jsonl").read_text()) == files[:2]


# ------------------------------------------------------------------------------------------ drawing


def test_drawings(main, make_checkpoint, photos, tmp_path):
    weights, *_ = make_checkpoint()
    Image.new("RGB", (3000, 1000), (9, 99, 200)).save(photos / "wide.png")
    (photos / "cut.png").write_bytes(b"no image")
    folder = tmp_path / "drawn"
    options = ["--draw", folder, "--batch-size", 2, "--num-workers", 1]
    status, _, err = main("--weights", weights, photos, *options, "--threshold", 0)
    assert status == 1, err
    # Of the two called a, and of the one that can't be read, in order.
    names = ["a [1].png", "a.png", "a_2.png", "b.png", "c.png", "wide.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Image.open(photos / "b.png") as image:
        pixels = np.asarray(image)
    for name in names:
        with Image.open(folder / name) as image:
            assert image.format == "PNG"
            assert 240 <= image.width <= 800
            drawn = np.asarray(image)
        lines = drawn[-66:]
        assert len(np.unique(lines.reshape(-1, 3), axis=0)) > 10
        assert [(line != 255).any() for line in np.split(lines, 3)] == [True] * 3
        if name == "b.png":
            left = (240 - pixels.shape[1]) // 2
            np.testing.assert_array_equal(drawn[:20, left : left + 70], pixels)


def test_a_drawing_of_any_labels(tmp_path):
    pixels = np.zeros((1, 1, 3), np.uint8)
    many = [(f"label\n{i}", 1 - i / 100) for i in range(100)]
    for labels, lines in [([], 1), ([("猫 " * 90, 1.0)], 1), (many, 20)]:
        draw_label_bars(pixels, labels, str(tmp_path / "x.png"))
        with Image.open(tmp_path / "x.png") as image:
            assert image.size == (240, 1 + 22 * lines)


def test_the_bar_is_as_long_as_a_label_is_probable(tmp_path):
    pixels = np.zeros((10, 400, 3), np.uint8)
    draw_label_bars(pixels, [("a", 0.75), ("b", 0.25)], str(tmp_path / "x.png"))
    with Image.open(tmp_path / "x.png") as image:
        # The topmost row of each line, above the letters.
        rows = np.asarray(image)[[11, 33]]
    assert ((rows != 255).any(axis=2).sum(axis=1)).tolist() == [301, 101]


def test_names_of_drawings_differ():
    files = ["x/a.jpg", "y/A.png", "a_2.png", "a.gif", "b", "a.jpg"]
    names = [os.path.basename(path) for path in predict.drawing_paths("d", files)]
    assert names[0] == "a.png"
    assert names[4] == "b.png"
    assert len({name.lower() for name in names}) == len(files)
    many = predict.drawing_paths("d", ["a.jpg"] * 20000)
    assert len(set(many)) == 20000


# ------------------------------------------------------------------------------------------- errors


def fails(result):
    """The one line that a failed command says."""
    status, out, err = result
    assert status == 1
    assert not out
    line = err.strip().splitlines()[-1]
    assert line.startswith("predict: ")
    return line


def test_errors_are_one_line(main, make_checkpoint, photos, tmp_path):
    weights, *_ = make_checkpoint()
    assert "gone.pth" in fails(main("--weights", tmp_path / "gone.pth", photos))
    image = photos / "b.png"
    options = ["--weights", weights, image]
    assert "has no region branch" in fails(main(*options, "--regions"))
    assert "gone.yaml" in fails(main(*options, "--config-file", tmp_path / "gone.yaml"))
    assert "device abacus" in fails(main(*options, "--device", "abacus"))
    assert str(photos) in fails(main(*options, "--output", photos))

    before = image.read_bytes()
    assert "would be lost" in fails(main(*options, "--output", image))
    assert "would be lost" in fails(main(*options, "--draw", photos / "sub" / ".."))
    assert image.read_bytes() == before

    change(weights, config=None)
    assert "--config-file" in fails(main(*options))


def test_a_config_file(main, make_checkpoint, photos, tmp_path):
    weights, cfg, _ = make_checkpoint()
    before = main("--weights", weights, photos, "--threshold", 0)
    change(weights, config=None)
    (tmp_path / "model.yaml").write_text(cfg.dump())
    after = main(
        *("--weights", weights, photos, "--threshold", 0),
        *("--config-file", tmp_path / "model.yaml"),
    )
    assert after == before
    assert after[0] == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--threshold", "1.5"],
        ["--threshold", "nan"],
        ["--top-k", "0"],
        ["--batch-size", "0"],
        ["--num-workers", "-1"],
        ["--known", "red"],
        ["--known", "red=maybe"],
        ["--known", "red=yes", "--known", "red=no"],
        ["--format", "xml"],
        ["--regions", "--format", "csv"],
        ["--regions", "--output", "x.csv"],
    ],
)
def test_options_out_of_range(main, capsys, options):
    with pytest.raises(SystemExit) as caught:
        main("--weights", "model.pth", "a.jpg", *options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_help_has_examples(main, capsys):
    with pytest.raises(SystemExit):
        main("--help")
    assert "tools/predict.py --weights model.pth - --threshold 0\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_in_silence(make_checkpoint, photos):
    """As users start it: the tool, in a process of its own."""
    weights, *_ = make_checkpoint()
    command = [
        sys.executable,
        ROOT / "tools/predict.py",
        "--weights",
        weights,
        *[photos / "b.png"] * 40,
    ]
    with subprocess.Popen(
        [*command, "--batch-size", "1", "--num-workers", "0", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        (record,) = records(process.stdout.readline())
        assert record["file"] == str(photos / "b.png")
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert "predict: " not in err
    assert "Exception ignored" not in err
