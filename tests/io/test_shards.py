"""Files in tar shards, local and elsewhere."""

import io
import logging
import os
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
from detectron2.utils.file_io import PathHandler, PathManager
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ia_gcn.data.dataset_mapper import read_image
from ia_gcn.io import shards
from ia_gcn.io.images import UnreadableImage
from ia_gcn.io.shards import (
    Member,
    Shard,
    UnreadableShard,
    copy_shard,
    damaged_shards,
    number_shards,
    parse_member,
    read_member,
)
from tests.helpers.shards import Quiet, served

FILES = {"a.txt": b"alpha", "b.bin": bytes(range(256)) * 7, "empty": b"", "c.txt": b"gamma"}


def write_tar(path, files=FILES):
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def members_of(path, url=None):
    shard = Shard(url or str(path), os.path.getsize(path))
    with tarfile.open(path) as file:
        return {m.name: Member(shard, m.offset_data, m.size, m.name) for m in file}


@pytest.fixture
def tar(tmp_path):
    return write_tar(tmp_path / "000007.tar")


def test_every_file_is_read_as_tarfile_reads_it(tar):
    for name, member in members_of(tar).items():
        assert read_member(member) == FILES[name]
        with PathManager.open(member.path, "rb") as file:
            assert file.read() == FILES[name]
        assert member.path.endswith(f"/{name}")


@given(
    st.text(st.characters(exclude_categories=["C"]), min_size=1),
    st.integers(0, 10**15),
    st.integers(0, 2**30),
    st.from_regex(r"\w+\.\w+", fullmatch=True),
)
def test_a_name_says_where_the_file_is(path, before, length, name):
    member = Member(Shard(path, before + length + 2000), before + 512, length, name)
    assert parse_member(member.path) == member


@pytest.mark.parametrize(
    "name",
    [
        "tar://",
        "tar://a.tar",
        "tar://a.tar/b.png",
        "tar://a.tar/4096:512/b.png",
        "tar:///4096:512+10/b.png",  # no shard
        "tar://a.tar/4096:-512+10/b.png",
        "tar://a.tar/4096:0+10/b.png",  # without a header before
        "tar://a.tar/4096:512+3585/b.png",  # beyond the end
        f"tar://a.tar/{'9' * 18}:512+{2**30 + 1}/b.png",  # too large
        f"tar://a.tar/{'9' * 5000}:512+10/b.png",
        "a.tar/4096:512+10/b.png",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(UnreadableImage):
        parse_member(name)
    if name.startswith("tar://"):
        with pytest.raises(UnreadableImage):
            read_image(name)


def test_images_are_read_by_their_names(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    tar = write_tar(tmp_path / "a.tar", {"x.png": file.getvalue(), "no.png": b"text"})
    members = members_of(tar)
    assert np.array_equal(read_image(members["x.png"].path), pixels)
    with pytest.raises(UnreadableImage, match=r"a\.tar/.*/no\.png") as caught:
        read_image(members["no.png"].path)
    assert not isinstance(caught.value, UnreadableShard)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(1500)


def exchange(path):
    """Another shard of the same size."""
    write_tar(path, {"z.txt": b"delta", **dict(list(FILES.items())[1:])})


def overwrite(path):
    path.write_bytes(bytes(path.stat().st_size))


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (os.remove, "No such file"),
        (truncate, "damaged: 1,500 bytes, of 10,240 in the index"),
        (exchange, r"a\.txt is not where the index says"),
        (overwrite, r"a\.txt is not where the index says"),
        (make_folder, "damaged|Is a directory"),
        (make_pipe, "not a regular file"),
    ],
)
def test_a_shard_that_is_damaged_is_named(tar, damage, reason):
    members = members_of(tar)
    damage(tar)
    with pytest.raises(UnreadableShard, match=reason) as caught:
        read_image(members["a.txt"].path)
    assert caught.value.file_name == str(tar)


def test_damaged_shards_are_found_without_reading_them(tmp_path):
    paths = [write_tar(tmp_path / f"{i}.tar") for i in range(4)]
    names = [member.path for path in paths for member in members_of(path).values()]
    paths[1].unlink()
    truncate(paths[3])
    elsewhere = Member(Shard("https://example.invalid/a.tar", 4096), 512, 3, "a").path
    found = damaged_shards([*names, "loose.png", elsewhere])
    assert set(found) == {str(paths[1]), str(paths[3])}
    assert "No such file" in found[str(paths[1])]


def test_shards_are_numbered_as_they_come(tmp_path):
    first, second = (Shard(path, 9000) for path in ("a.tar", "b.tar"))
    members = [Member(shard, 512, 1, "x").path for shard in (second, first, second)]
    assert number_shards([*members, "loose.png"]) == ([0, 1, 0, -1], [second, first])
    assert number_shards(["a.png", "b.png"]) == ([-1, -1], [])


def test_a_file_in_a_shard_cannot_be_written(tar):
    with pytest.raises(OSError, match="only be read"):
        PathManager.open(members_of(tar)["a.txt"].path, "wb")


# ------------------------------------------------------------------------------------ elsewhere


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of copies, which is empty; nothing is waited for."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "WAITS", (0, 0, 0))
    monkeypatch.setattr(shards, "_failed", {})
    return tmp_path / "cache" / "ia_gcn_shards"


@pytest.fixture
def remote(tmp_path, cache):
    """Five tar files on a server: their folder, its URL, and what was asked for."""
    folder, asked = tmp_path / "remote", Counter()
    folder.mkdir()
    for i in range(5):
        write_tar(folder / f"{i}.tar")
    with served(folder, asked) as url:
        yield folder, url, asked


def members_at(folder, url, number):
    return members_of(folder / f"{number}.tar", f"{url}/{number}.tar")


def test_a_shard_elsewhere_is_copied_once(remote, cache):
    folder, url, asked = remote
    for _ in range(2):
        for name, member in members_at(folder, url, 0).items():
            assert read_member(member) == FILES[name]
    assert asked == {"0.tar": 1}
    (copy,) = cache.glob("*.tar")
    assert copy.read_bytes() == (folder / "0.tar").read_bytes()


def test_what_a_killed_process_had_not_finished_is_removed(remote, cache):
    folder, url, _ = remote
    member = members_at(folder, url, 0)["a.txt"]
    read_member(member)
    (copy,) = cache.glob("*.tar")
    unfinished = copy.rename(cache / f".{copy.name}.123.tmp")
    read_member(member)
    assert copy.exists()
    assert not unfinished.exists()


def test_threads_copy_a_shard_once(remote):
    folder, url, asked = remote
    member = members_at(folder, url, 0)["a.txt"]
    threads = [threading.Thread(target=read_member, args=(member,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == {"0.tar": 1}


def test_those_that_were_not_used_for_longest_go_first(remote, cache, monkeypatch, caplog):
    folder, url, _ = remote
    monkeypatch.setenv("IA_GCN_SHARD_CACHE_GB", "31e-6")  # of 10,240 bytes each, three
    members = [members_at(folder, url, i)["a.txt"] for i in range(5)]
    for i in range(3):
        read_member(members[i])
    for i, path in enumerate(sorted(cache.glob("*.tar"), key=lambda path: path.name[-5:])):
        os.utime(path, (1000 + i, 1000 + i))
    read_member(members[0])
    read_member(members[3])
    assert sorted(path.name[-5:] for path in cache.glob("*.tar")) == ["0.tar", "2.tar", "3.tar"]
    assert not caplog.records
    for member in members:
        assert read_member(member) == FILES["a.txt"]
    assert len(list(cache.glob("*.tar"))) == 3
    # All five at a time are too many.
    assert "IA_GCN_SHARD_CACHE_GB is 3.1e-05: too little" in caplog.text


class Broken(Quiet):
    """Has no 1.tar, ends 2.tar early, lets 3.tar have no end, and is out of order for 4.tar."""

    def do_GET(self):
        name = self.path.lstrip("/")
        if name == "0.tar":
            super().do_GET()
            return
        self.asked[name] += 1
        self.send_response({"1.tar": 404, "4.tar": 503}.get(name, 200))
        self.end_headers()
        content = bytes(5000)
        try:
            for _ in range({"2.tar": 1, "3.tar": 10**6}.get(name, 0)):
                self.wfile.write(content)
        except OSError:
            pass


@pytest.mark.parametrize(
    ("number", "tries", "reason"),
    [
        (1, 1, "404"),
        (2, 4, "not the 10,240 bytes"),
        (3, 4, "not the 10,240 bytes"),
        (4, 4, "503"),
    ],
)
def test_what_cannot_be_copied_is_not_asked_for_again_and_again(
    tmp_path, cache, number, tries, reason, caplog
):
    folder, asked = tmp_path / "remote", Counter()
    folder.mkdir()
    tar = write_tar(folder / f"{number}.tar")
    with served(folder, asked, Broken) as url:
        member = members_of(tar, f"{url}/{number}.tar")["a.txt"]
        for _ in range(3):
            with pytest.raises(UnreadableShard, match=reason) as caught:
                read_image(member.path)
    assert caught.value.file_name == f"{url}/{number}.tar"
    assert asked == {f"{number}.tar": tries}
    assert not list(cache.glob("*.tar"))
    assert not list(cache.glob(".*.tmp"))


def test_one_that_failed_is_tried_again_later(remote, monkeypatch):
    folder, url, _ = remote
    member = members_at(folder, url, 0)["a.txt"]
    (folder / "0.tar").rename(folder / "moved.tar")
    with pytest.raises(UnreadableShard):
        read_member(member)
    (folder / "moved.tar").rename(folder / "0.tar")
    now = shards.time.time()
    monkeypatch.setattr(shards.time, "time", lambda: now + shards.FAILED_FOR)
    assert read_member(member) == FILES["a.txt"]


def test_who_waits_for_a_copy_fails_with_it(tmp_path, cache):
    folder, asked, reasons = tmp_path / "remote", Counter(), []
    folder.mkdir()
    tar = write_tar(folder / "4.tar")

    def fail(member):
        with pytest.raises(UnreadableShard) as caught:
            read_member(member)
        reasons.append(caught.value.reason)

    with served(folder, asked, Broken) as url:
        member = members_of(tar, f"{url}/4.tar")["a.txt"]
        threads = [threading.Thread(target=fail, args=(member,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert asked == {"4.tar": 4}
    assert len(reasons) == 8
    assert len(set(reasons)) == 1


def test_other_processes_ask_again_later_or_in_a_new_run(remote, monkeypatch):
    folder, url, asked = remote
    member = members_at(folder, url, 0)["a.txt"]
    (folder / "0.tar").rename(folder / "moved.tar")
    for _ in range(3):
        # Another process of this run.
        shards._failed.clear()
        with pytest.raises(UnreadableShard, match="404"):
            read_member(member)
    assert asked == {"0.tar": 1}
    (folder / "moved.tar").rename(folder / "0.tar")
    shards._failed.clear()
    monkeypatch.setattr(shards, "_started", shards.time.time() + 1)
    assert read_member(member) == FILES["a.txt"]
    assert asked == {"0.tar": 2}


def test_a_file_that_is_not_there_is_asked_for_once(cache, monkeypatch):
    asked = []

    class Nothing(Elsewhere):
        def _open(self, path, mode="r", buffering=-1, **kwargs):
            asked.append(path)
            raise FileNotFoundError(2, "No such file or directory")

    handlers = {**PathManager._path_handlers, "elsewhere://": Nothing()}
    monkeypatch.setattr(PathManager, "_path_handlers", handlers)
    with pytest.raises(OSError, match="No such file"):
        copy_shard(Shard("elsewhere://gone.tar", 10240))
    assert len(asked) == 1


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_copy_that_is_removed_before_it_is_open_is_made_again(remote, monkeypatch, times):
    folder, url, asked = remote
    member, honest, left = members_at(folder, url, 0)["a.txt"], shards.find_shard, [times]

    def remove(shard):
        path = honest(shard)
        if left[0]:
            left[0] -= 1
            os.remove(path)
        return path

    monkeypatch.setattr(shards, "find_shard", remove)
    if times < 3:
        assert read_member(member) == FILES["a.txt"]
        assert asked == {"0.tar": times + 1}
    else:
        with pytest.raises(UnreadableShard, match="No such file"):
            read_member(member)


def test_a_copy_of_another_size_is_made_anew(remote, cache):
    folder, url, _ = remote
    read_member(members_at(folder, url, 0)["a.txt"])
    write_tar(folder / "0.tar", {"d.txt": bytes(30_000)})
    assert len(read_member(members_at(folder, url, 0)["d.txt"])) == 30_000
    assert len(list(cache.glob("*.tar"))) == 1


class Elsewhere(PathHandler):
    def _get_supported_prefixes(self):
        return ["elsewhere://"]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        if "gone" in path:
            raise RuntimeError("of a library that has errors of its own")
        return open(path.removeprefix("elsewhere://"), mode)


def test_handlers_of_path_manager_are_used(tar, cache, monkeypatch):
    handlers = {**PathManager._path_handlers, "elsewhere://": Elsewhere()}
    monkeypatch.setattr(PathManager, "_path_handlers", handlers)
    members = members_of(tar, f"elsewhere://{tar}")
    assert read_member(members["b.bin"]) == FILES["b.bin"]
    gone = Shard("elsewhere://gone.tar", 10240)
    with pytest.raises(OSError, match="errors of its own"):
        copy_shard(gone)


@pytest.mark.parametrize(
    "url", ["pipe:touch witness", "pipe://touch witness", "file:///etc/passwd"]
)
def test_no_command_is_run(tmp_path, cache, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableShard):
        read_member(Member(Shard(url, 10240), 512, 5, "a.txt"))
    assert not (tmp_path / "witness").exists()


def test_the_limit_must_be_a_number(remote, monkeypatch):
    folder, url, _ = remote
    monkeypatch.setenv("IA_GCN_SHARD_CACHE_GB", "much")
    with pytest.raises(UnreadableShard, match="IA_GCN_SHARD_CACHE_GB is not a number: 'much'"):
        read_member(members_at(folder, url, 0)["a.txt"])


def test_nothing_is_logged_of_a_copy(remote, caplog):
    folder, url, _ = remote
    with caplog.at_level(logging.INFO):
        read_member(members_at(folder, url, 0)["a.txt"])
    assert not [record for record in caplog.records if record.name.startswith("ia_gcn")]
