"""Which checkpoint in an output folder a training goes on from."""

from __future__ import annotations

import logging
import os
import re
import zipfile
from typing import Dict

from ..errors import InputError
from ..io.pth import read_pth
from .checkpointer import LAST_CHECKPOINT

logger = logging.getLogger(__name__)

_PERIODIC = re.compile(r"model_(\d+)\.pth")


def last_checkpoint(folder: str) -> str | None:
    """The file name in `last_checkpoint` of a folder; None where there is none."""
    path = os.path.join(folder, LAST_CHECKPOINT)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()


def find_resumable(folder: str) -> str:
    """The path of the checkpoint that a training in a folder goes on from; "" where there is none.

    It is the one that `last_checkpoint` names. If that can't be read, a warning says why, and the
    newest one that can be read is taken.

    Raises:
        InputError: `last_checkpoint` is there, and no checkpoint can be read.
    """
    tag = os.path.join(folder, LAST_CHECKPOINT)
    name = last_checkpoint(folder)
    if name is None:
        return ""
    problems = []
    if not name:
        problems.append(f"{tag} is empty")
    elif not os.path.isfile(os.path.join(folder, name)):
        problems.append(f"{tag} names {name!r}, which is not there")
    periodic = reversed(periodic_checkpoints(folder).values())
    paths = [os.path.join(folder, name) for name in (name, "model_final.pth")] + list(periodic)
    for path in filter(os.path.isfile, dict.fromkeys(paths)):
        try:
            check_resumable(path)
        except InputError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning(problem)
        if problems:
            logger.warning(f"Going on from {path}, the newest checkpoint that can be read")
        return path
    raise InputError(f"--resume: no checkpoint in {folder} can be read: {'; '.join(problems)}")


def check_resumable(path: str) -> None:
    """Read a whole checkpoint.

    Raises:
        InputError: it can't be read, a bit of it has changed, or no training has written it.
    """
    content = read_pth(path, path)
    if not isinstance(content, dict) or "trainer" not in content:
        raise InputError(f"{path} is no checkpoint of a training")
    # torch.load takes tensors as they are, for example as the zeros of a block that never got to
    # the disk.
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"{path} is damaged: the checksum of {damaged} is wrong")


def periodic_checkpoints(folder: str) -> Dict[int, str]:
    """The paths of model_0000123.pth and so on in a folder, by iteration, which ascends."""
    found = {}
    for name in os.listdir(folder):
        number = _PERIODIC.fullmatch(name)
        if number:
            found[int(number[1])] = os.path.join(folder, name)
    return dict(sorted(found.items()))
