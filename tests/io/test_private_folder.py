"""A folder that nobody else can read, and that no process leaves behind for good."""

import multiprocessing
import os
import signal

import pytest

from ia_gcn.io.private_folder import private_folder

fork = multiprocessing.get_context("fork")


def use_and_wait(parent, channel):
    with private_folder("kind_", parent) as folder:
        (folder / "upload").write_text("private")
        channel.send(folder)
        channel.recv()


@pytest.fixture
def start():
    """A function that starts a process with such a folder: (the process, its end, the folder)."""
    started = []

    def run(parent):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=use_and_wait, args=(parent, theirs))
        process.start()
        started.append(process)
        return process, ours, ours.recv()

    yield run
    for process in started:
        process.kill()
        process.join()


def test_it_is_private_and_removed(tmp_path):
    with private_folder("kind_", tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith("kind_")
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "sub").mkdir()
        (folder / "sub" / "upload").write_text("private")
    assert not list(tmp_path.iterdir())


def test_it_is_removed_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), private_folder("kind_", tmp_path):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next(start, tmp_path):
    process, _, left = start(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (left / "upload").exists()
    with private_folder("kind_", tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_a_running_process_keeps_its_own(start, tmp_path):
    process, channel, folder = start(tmp_path)
    with private_folder("kind_", tmp_path) as other:
        assert other != folder
        assert (folder / "upload").exists()
    assert (folder / "upload").exists()
    channel.send("end")
    process.join(60)
    assert not list(tmp_path.iterdir())


def test_nothing_else_is_touched(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("kept")
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "kind_link").symlink_to(elsewhere)
    (parent / "kind_file").write_text("kept")
    (parent / "another").mkdir()
    with private_folder("kind_", parent):
        pass
    assert sorted(path.name for path in parent.iterdir()) == ["another", "kind_file", "kind_link"]
    assert (elsewhere / "precious").exists()


def test_the_parent_is_made(tmp_path):
    with private_folder("kind_", tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
