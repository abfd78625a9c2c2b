"""Images in tar shards, as files with names of their own.

tar://SHARD/SIZE:OFFSET+LENGTH/NAME is the file NAME of the tar file SHARD: its LENGTH bytes from
OFFSET on. The shard must have SIZE bytes, and just before the offset tar's header with that name
and length, so that neither a damaged shard nor another one gives an image with wrong labels.

Whatever opens files by detectron2's PathManager can read them. A shard elsewhere (https://, or a
prefix that a handler of PathManager knows) is copied to a folder of limited size first.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tarfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Dict, Iterable, List, NamedTuple, Tuple

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir

from .files import remove_unfinished, write_atomically, write_text_atomically
from .images import UnreadableImage
from .inputs import check_regular, open_input

logger = logging.getLogger(__name__)

PREFIX = "tar://"
# In bytes: of a header in a tar file, and the most of an image.
HEADER, MAX_LENGTH = tarfile.BLOCKSIZE, 2**30
PLACE = re.compile(r"(\d{1,18}):(\d{1,18})\+(\d{1,18})")

# The environment variable with the most that copies of shards may take, and its default.
CACHE_GB, DEFAULT_CACHE_GB = "IA_GCN_SHARD_CACHE_GB", 50.0
# Seconds: without an answer; before a copy is tried again; until one that failed is tried again;
# a copy that was used since then should not have to go.
TIMEOUT, WAITS, FAILED_FOR, IN_USE = 60, (1, 5, 25), 600, 30
# How often a copy that was removed meanwhile is made again at once.
REOPENED = 2
COPY_BYTES = 2**20


class UnreadableShard(UnreadableImage):
    """A shard that is missing or damaged, and with it all of its images; `file_name` is its."""


class Shard(NamedTuple):
    """A tar file, local or of a kind that PathManager knows."""

    path: str
    size: int
    """In bytes, as its index says."""


class Member(NamedTuple):
    """A file in a shard: `length` bytes from `offset` on."""

    shard: Shard
    offset: int
    length: int
    name: str

    @property
    def path(self) -> str:
        """The name by which PathManager opens it, see `parse_member`."""
        place = f"{self.shard.size}:{self.offset}+{self.length}"
        return f"{PREFIX}{self.shard.path}/{place}/{self.name}"

    def fits(self) -> bool:
        """Whether it is inside of the shard and no longer than MAX_LENGTH."""
        return HEADER <= self.offset <= self.shard.size - self.length and (
            0 <= self.length <= MAX_LENGTH
        )


def is_member(file_name: str) -> bool:
    """Whether a file name is that of an image in a shard."""
    return file_name.startswith(PREFIX)


def parse_member(file_name: str) -> Member:
    """The `Member` whose `path` is a file name.

    Raises:
        UnreadableImage: there is none, or it would be longer than MAX_LENGTH.
    """
    path, _, rest = file_name.removeprefix(PREFIX).rpartition("/")
    path, _, place = path.rpartition("/")
    match = PLACE.fullmatch(place)
    if not is_member(file_name) or not path or not match:
        raise UnreadableImage(file_name, f"not {PREFIX}SHARD/SIZE:OFFSET+LENGTH/NAME")
    size, offset, length = map(int, match.groups())
    member = Member(Shard(path, size), offset, length, rest)
    if not member.fits():
        raise UnreadableImage(file_name, "outside of the shard, or too large")
    return member


def read_member(member: Member) -> bytes:
    """
    Raises:
        UnreadableShard: the shard is not there or not the one that is meant.
    """
    shard = member.shard
    try:
        with open_shard(shard) as file:
            file.seek(member.offset - HEADER)
            header, content = file.read(HEADER), file.read(member.length)
    except OSError as error:
        raise UnreadableShard(shard.path, error.strerror or str(error)) from error
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        found = tarfile.TarInfo()
    if (found.name, found.size, len(content)) != (member.name, member.length, member.length):
        raise UnreadableShard(shard.path, f"{member.name} is not where the index says")
    return content


def open_shard(shard: Shard) -> BinaryIO:
    """
    Raises:
        OSError: see `find_shard`.
    """
    # Another process may remove a copy before it is open; once open, it can be read.
    for _ in range(REOPENED if is_remote(shard.path) else 0):
        with suppress(FileNotFoundError):
            return open(find_shard(shard), "rb")
    return open(find_shard(shard), "rb")


def find_shard(shard: Shard) -> str:
    """The path of a shard on this machine, to which a remote one is copied.

    Raises:
        OSError: it can't be had, or has another size.
    """
    path = copy_shard(shard) if is_remote(shard.path) else shard.path
    check_regular(path)
    size = os.stat(path).st_size
    if size != shard.size:
        raise OSError(f"damaged: {size:,} bytes, of {shard.size:,} in the index")
    return path


def damaged_shards(file_names: Iterable[str]) -> Dict[str, str]:
    """Why, by path, for each local shard of some images that is missing or has another size.

    Args:
        file_names: also of images that are in no shard.
    """
    shards = {parse_member(name).shard for name in file_names if is_member(name)}
    problems = {}
    for shard in sorted(shards):
        try:
            if not is_remote(shard.path):
                find_shard(shard)
        except OSError as error:
            problems[shard.path] = error.strerror or str(error)
    return problems


def number_shards(file_names: Iterable[str]) -> Tuple[List[int], List[Shard]]:
    """The number of each image's shard, -1 for an image that is in none; and the shards."""
    numbers: Dict[Shard, int] = {}
    of_image = [
        numbers.setdefault(parse_member(name).shard, len(numbers)) if is_member(name) else -1
        for name in file_names
    ]
    return of_image, list(numbers)


class TarHandler(PathHandler):
    """PathManager's, for the names of images in shards: to read alone."""

    def _get_supported_prefixes(self):
        return [PREFIX]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        if mode != "rb":
            raise OSError(f"{path}: a file in a shard can only be read, as bytes")
        return io.BytesIO(read_member(parse_member(path)))


PathManager.register_handler(TarHandler())


# ----------------------------------------------------------------------------------- other machines


def is_remote(path: str) -> bool:
    return "://" in path


def open_remote(path: str) -> BinaryIO:
    """A stream of a file that is elsewhere.

    Raises:
        Exception: of any kind, as PathManager's handlers have: it can't be had.
    """
    if path.startswith(("http://", "https://")):
        # iopath's handler would keep a copy for good, and wait without end.
        return urllib.request.urlopen(path, timeout=TIMEOUT)
    return open_input(path, "rb")


# Of this process: until when, and why, a shard is not asked for again.
_failed: Dict[Shard, Tuple[float, str]] = {}
# What failed before may have been mended for this run. Loader processes have their parent's.
_started = time.time()


def copy_shard(shard: Shard) -> str:
    """The path of a local copy of a remote shard, which is made where there is none.

    All processes of a machine share the copies. They are in a folder of iopath's cache
    ($FVCORE_CACHE). Where they take more than $IA_GCN_SHARD_CACHE_GB, those that were not used for
    longest are removed.

    Raises:
        OSError: it can't be had, not at the fourth try either, or has another size. For some
            minutes it is not tried again then, nor by the others that have begun by then.
    """
    name = hashlib.sha256(shard.path.encode()).hexdigest()[:16]
    path = Path(get_cache_dir()) / "ia_gcn_shards" / f"{name}-{os.path.basename(shard.path)}"
    if _is_copied(path, shard):
        return str(path)
    until, reason = _failed.get(shard, (0.0, ""))
    if time.time() < until:
        raise OSError(reason)
    try:
        # Locks are files of their own, and stay.
        with file_lock(str(path)):
            if not _is_copied(path, shard):
                _make_copy(shard, path)
    except Exception as error:
        reason = _reason(error)
        _failed[shard] = time.time() + FAILED_FOR, reason
        raise OSError(reason) from error
    return str(path)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _make_copy(shard: Shard, path: Path) -> None:
    """Copy a shard; whoever waits for the lock meanwhile fails with this one, if it does.

    Raises:
        Exception: see `open_remote`; or an OSError, as it failed a short while ago.
    """
    # Of this shard, whose last failure it has; another one of the name has another size.
    failure = path.with_name(f"{path.name}.{shard.size}.failed")
    with suppress(FileNotFoundError):
        if failure.stat().st_mtime > max(_started, time.time() - FAILED_FOR):
            raise OSError(failure.read_text(errors="replace"))
    # Of a process that was killed.
    remove_unfinished(path.parent, path.name)
    try:
        _make_room(path.parent, shard.size)
        _copy(shard, path)
    except Exception as error:
        # The disk may be full.
        with suppress(OSError), write_text_atomically(failure, "replace") as file:
            file.write(_reason(error))
        raise
    failure.unlink(missing_ok=True)


def _is_copied(path: Path, shard: Shard) -> bool:
    """Whether it is; it then counts as used now."""
    try:
        os.utime(path)
        return path.stat().st_size == shard.size
    except FileNotFoundError:
        return False


def _copy(shard: Shard, path: Path) -> None:
    for wait in (*WAITS, None):
        try:
            with open_remote(shard.path) as source, write_atomically(path) as file:
                left = shard.size
                while left >= 0 and (block := source.read(COPY_BYTES)):
                    file.write(block)
                    left -= len(block)
                if left:
                    raise OSError(f"not the {shard.size:,} bytes that are in the index")
            return
        except Exception as error:
            is_refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if wait is None or is_refused or isinstance(error, FileNotFoundError):
                raise
            logger.debug(f"{shard.path}: {error}; the next try is in {wait} s")
            time.sleep(wait)


def _make_room(folder: Path, size: int) -> None:
    """Remove copies until one of a size fits in."""
    copies = []
    for path in folder.glob("*.tar"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        copies.append((status.st_mtime, status.st_size, path))
    room = cache_gigabytes() * 1e9 - size - sum(size for _, size, _ in copies)
    for used, copy_size, path in sorted(copies):
        if room >= 0:
            return
        if time.time() - used < IN_USE:
            logger.warning(
                f"{CACHE_GB} is {cache_gigabytes():g}: too little for the shards that are in use "
                "at a time, which are copied again and again; set a lower DATALOADER.SHARD_WINDOW "
                "or more GB"
            )
        path.unlink(missing_ok=True)
        room += copy_size


def cache_gigabytes() -> float:
    """
    Raises:
        OSError: the environment variable is not a number.
    """
    try:
        return float(os.environ.get(CACHE_GB, DEFAULT_CACHE_GB))
    except ValueError:
        raise OSError(f"${CACHE_GB} is not a number: {os.environ[CACHE_GB]!r}") from None
