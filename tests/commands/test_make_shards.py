"""tools/make_shards.py: run as a user would."""

import importlib.util

import pytest

from tests.helpers.commands import run_script
from tests.helpers.shards import read_lines

COMMAND = "make_shards"


@pytest.fixture
def custom(tiny_coco):
    """The opts of a data set of 14 images."""
    data = tiny_coco(14)
    return [
        *("DATASETS.CUSTOM.TRAIN", data.json_file, "DATASETS.CUSTOM.IMAGE_ROOT", data.image_root)
    ]


def test_the_command(tmp_path, custom):
    out = tmp_path / "out"
    arguments = ("custom_train", out, "--shard-size", "1KB", *custom)
    result = run_script("tools/make_shards.py", *arguments)
    assert result.returncode == 0, result.stderr
    first, *images = read_lines(out / "index.jsonl")
    number = len(first["shards"])
    assert number == len(list(out.glob("*.tar"))) > 1
    assert len(images) == 14
    assert first["label_names"] == ["red", "green", "blue"]
    line = f"{out / 'index.jsonl'}: 14 images in {number} shards, 0.00 GB\n"
    assert result.stdout == line

    result = run_script("tools/make_shards.py", "--check", out / "index.jsonl")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{out / 'index.jsonl'}: all {number} shards are whole\n"


def test_a_shard_has_256_megabytes_unless_it_is_said(main, tmp_path, custom):
    status, out, _ = main("custom_train", tmp_path / "out", *custom)
    assert status == 0
    assert "14 images in 1 shards" in out


def test_damaged_shards_are_named(main, tmp_path, custom):
    out = tmp_path / "out"
    main("custom_train", out, "--shard-size", "1K", *custom)
    (out / "000000.tar").write_bytes(b"")
    index = (out / "index.jsonl").rename(tmp_path / "moved.jsonl")
    status, _, err = main("--check", index, "DATASETS.CUSTOM.IMAGE_ROOT", out)
    assert status == 1
    assert err.startswith("make_shards: 1 of 2 shards are missing or damaged: ")
    assert "000000.tar (damaged: " in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "out"), "'nothing' is not registered"),
        (("--check", "train.csv"), "--check train.csv: not an index"),
        (("--check", "gone.jsonl"), "gone.jsonl: No such file or directory"),
    ],
)
def test_errors_are_one_line(main, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = main(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("make_shards: ")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [(), ("name",), ("name", "out", "--shard-size", "0"), ("name", "out", "--shard-size", "many")],
)
def test_wrong_arguments_are_refused(main, capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        main(*arguments)
    assert "usage: " in capsys.readouterr().err


def test_missing_images_are_named_before_anything_is_written(main, tmp_path, tiny_coco):
    data = tiny_coco(5, "gaps")
    (tmp_path / "gaps/images/000003.png").unlink()
    opts = ["DATASETS.CUSTOM.TRAIN", data.json_file, "DATASETS.CUSTOM.IMAGE_ROOT", data.image_root]
    status, _, err = main("custom_train", tmp_path / "out", *opts)
    assert status == 1
    assert "1 of 5 images are missing: " in err
    assert not (tmp_path / "out").exists()


def test_without_webdataset(main, tmp_path, custom, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = main("custom_train", tmp_path / "out", *custom)
    assert status == 1
    assert 'pip install "ia_gcn[shards]"' in err


def test_help_has_examples(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    out = capsys.readouterr().out
    for part in ("--shard-size", "--check", "custom_train shards/train", "index.jsonl"):
        assert part in out
