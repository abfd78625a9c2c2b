"""Files that are written: complete ones or none, and nothing else in the package writes any."""

from __future__ import annotations

import ast
import errno
import os
import stat
import threading

import pytest

from ia_gcn.io.files import (
    append_bytes,
    append_line,
    read_lines,
    remove_unfinished,
    write_atomically,
    write_text_atomically,
)
from tests.helpers.commands import ROOT


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full when a file is flushed to it."""

    def fail(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


def write_text(path, text, error=None):
    with write_text_atomically(path) as file:
        file.write(text)
        if error:
            raise error


def test_a_file_is_replaced_once_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with write_atomically(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_after_an_error_there_is_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError):
        write_text(path, "half of", KeyError())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_what_was_there_and_names_the_file(tmp_path, full_disk):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_text(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_text_is_utf_8_with_its_own_line_breaks(tmp_path):
    path = tmp_path / "file"
    with write_text_atomically(path, errors="backslashreplace") as file:
        file.write("é\n\r\n\udcff")
    assert path.read_bytes() == "é\n\r\n".encode() + b"\\udcff"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    for content in (b"first", b"second"):
        with write_atomically(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_bytes() == content


def test_what_is_no_file_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    with write_atomically(path) as file:
        file.write(b"content")
    reader.join(60)
    assert found == [b"content"]
    assert stat.S_ISFIFO(path.stat().st_mode)


# ----------------------------------------------------------------------------------- lines


def test_lines_are_added(tmp_path):
    path = tmp_path / "lines"
    for line in ("one", "zwö"):
        append_line(path, line)
    assert read_lines(path) == ["one", "zwö"]
    assert path.read_bytes() == "one\nzwö\n".encode()


@pytest.mark.parametrize("length", range(1, len("zwö\n".encode())))
def test_a_torn_line_is_dropped(tmp_path, length):
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + "zwö\n".encode()[:length])
    assert read_lines(path) == ["one"]
    append_line(path, "three")
    assert read_lines(path) == ["one", "three"]


def test_a_line_on_a_full_disk_leaves_the_others(tmp_path, full_disk):
    path = tmp_path / "lines"
    path.write_bytes(b"one\n")
    with pytest.raises(OSError, match="No space left on device") as caught:
        append_line(path, "two")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"one\n"


def test_bytes_are_added_where_they_are_said_to_begin(tmp_path):
    path = tmp_path / "bytes"
    assert append_bytes(path, memoryview(b"one")) == 0
    assert append_bytes(path, memoryview(b"three")) == 3
    assert path.read_bytes() == b"onethree"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_bytes_on_a_full_disk_name_the_file():
    with pytest.raises(OSError, match="No space left on device") as caught:
        append_bytes("/dev/full", memoryview(bytes(10)))
    assert caught.value.filename == "/dev/full"


def test_what_a_killed_process_leaves_is_removed(tmp_path):
    for name in (".scores.abc.tmp", ".mine.v1.tmp"):
        (tmp_path / name).mkdir()
    for name in (".scores.abc.tmp/matrices", ".metrics.json.1.tmp", "kept.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".link.1.tmp").symlink_to(tmp_path / "elsewhere")
    remove_unfinished(tmp_path, "*.jsonl")
    assert (tmp_path / ".metrics.json.1.tmp").exists()
    remove_unfinished(tmp_path, "metrics.*")
    assert not (tmp_path / ".metrics.json.1.tmp").exists()
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.v1.tmp", "elsewhere", "kept.tmp"]


# --------------------------------------------------------------------------- the package

# Names of functions that write a file, or move one.
WRITERS = {
    *("write_text", "write_bytes", "savefig", "save", "savez", "savez_compressed", "save_file"),
    *(
        "dump",
        "to_csv",
        "tofile",
        "imwrite",
        "FileHandler",
        "replace",
        "rename",
        "copyfile",
        "move",
    ),
}
# Of os and shutil alone; strings have a replace, too.
MOVERS = {"replace", "rename", "copyfile", "move"}
# By file and function: what these do is no file's last state, or goes elsewhere.
ALLOWED = {
    ("io/files.py", "replace"): "write_atomically itself",
    ("io/files.py", "open"): "write_atomically itself",
    ("ablation/runs.py", "open"): "the log of a run",
    ("commands/predict_distributed.py", "open"): "the null device",
    ("inference/distributed.py", "open"): "the null device",
    ("ablation/start.py", "save"): "FrozenFeatures.save, which writes atomically",
    ("engine/logs.py", "FileHandler"): "the log",
    ("evaluation/html_page.py", "save"): "into memory",
    ("export/onnx.py", "save"): "into a folder of export_model's, which copies it",
    ("export/quantization.py", "save"): "into a folder of export_int8's, which copies it",
    ("export/torch_export.py", "save"): "into a folder of export_model's, which copies it",
    ("io/npz.py", "open"): "in a file that is open",
    ("visualization/style.py", "savefig"): "into memory, or a file that is open",
    ("engine/hooks.py", "save"): "the checkpointer's, which does so",
}


def find_writes(source: str):
    """(name, line) of the calls that write a file, but in `with write_atomically(...)`."""
    inside = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any(
            isinstance(item.context_expr, ast.Call)
            and name_of(item.context_expr).startswith("write_")
            for item in node.items
        ):
            inside.update(map(id, ast.walk(node)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in inside and writes(node):
            yield name_of(node), node.lineno


def name_of(call: ast.expr) -> str:
    """Of the function; "" if it is no call."""
    function = getattr(call, "func", None)
    return getattr(function, "attr", getattr(function, "id", ""))


def writes(call: ast.Call) -> bool:
    name = name_of(call)
    if name == "open":
        modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "mode")]
        return any(
            isinstance(mode, ast.Constant) and set("wax+") & set(str(mode.value)) for mode in modes
        )
    if name in MOVERS:
        return getattr(getattr(call.func, "value", None), "id", "") in ("os", "shutil")
    # cfg.dump() returns a text; json.dump(..., file) writes one.
    return name in WRITERS and not (name == "dump" and not call.args)


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')",
        "with open(path, mode='ab') as file: pass",
        "PathManager.open(path, 'wb')",
        "Path(path).write_text('')",
        "figure.savefig(path)",
        "torch.save({}, path)",
        "json.dump({}, file)",
        "os.replace(a, b)",
    ],
)
def test_the_search_finds_writes(code):
    assert list(find_writes(code))
    assert not list(find_writes(f"with write_atomically(path) as file:\n    {code}"))


def test_the_search_lets_reads_pass():
    assert not list(find_writes("open(path); open(path, 'rb'); 'a'.replace('a', 'b'); cfg.dump()"))


def test_nothing_in_the_package_writes_files_but_through_these_functions():
    package = ROOT / "ia_gcn"
    found = [
        f"{path.relative_to(package)}:{line}: {name}"
        for path in sorted(package.rglob("*.py"))
        for name, line in find_writes(path.read_text(encoding="utf-8"))
        if (path.relative_to(package).as_posix(), name) not in ALLOWED
    ]
    assert not found
