"""Logging: the most important messages on the screen, all of them in log.txt."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from ..memory import keep_freed_memory

LOG_FILE = "log.txt"

# The loggers of the log. The screen gets ia_gcn's messages, and warnings or errors of the others.
SCREEN_LEVELS = {"ia_gcn": logging.INFO, "detectron2": logging.WARNING, "fvcore": logging.ERROR}

_ANSI_CODE = re.compile(r"\x1b\[[0-9;]*m")

logger = logging.getLogger(__name__)


def setup_run(cfg: CfgNode, args: argparse.Namespace | None = None, verbose: bool = False) -> None:
    """What detectron2's `default_setup` does, with a quiet screen.

    OUTPUT_DIR gets config.yaml, and log.txt with the environment, the command line and the config;
    the random generators are seeded; freed memory is kept, see KEEP_FREED_MEMORY.

    Args:
        cfg: frozen.
        args: of the command line, for the log.
        verbose: the screen gets the whole log.
    """
    rank = comm.get_rank()
    PathManager.mkdirs(cfg.OUTPUT_DIR)
    setup_logging(cfg.OUTPUT_DIR, verbose)
    logger.debug(f"Process {rank} of {comm.get_world_size()}")
    logger.debug(f"Environment:\n{collect_env_info()}")
    if args is not None:
        logger.debug(f"Command line: {args}")
    logger.debug(f"Config:\n{cfg.dump()}")
    if comm.is_main_process():
        with PathManager.open(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
            file.write(cfg.dump())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    if cfg.KEEP_FREED_MEMORY:
        keep_freed_memory()


def setup_logging(output_dir: str = "", verbose: bool = False) -> None:
    """Send the log to the screen and, with `output_dir`, whole to its log.txt.

    The main process alone writes to the screen; the others have log.txt.rank1 and so on. Handlers
    that the loggers had before are replaced, detectron2's own too.
    """
    handlers = []
    if output_dir:
        rank = comm.get_rank()
        path = os.path.join(output_dir, LOG_FILE + (f".rank{rank}" if rank else ""))
        handlers.append(_LogFile(path, encoding="utf-8"))
        handlers[0].setFormatter(
            _PlainFormatter("[%(asctime)s %(name)s] %(levelname)s: %(message)s", "%m/%d %H:%M:%S")
        )
    for name, level in SCREEN_LEVELS.items():
        named = logging.getLogger(name)
        for old in list(named.handlers):
            named.removeHandler(old)
            old.close()
        named.setLevel(logging.DEBUG)
        named.propagate = False
        for handler in handlers:
            named.addHandler(handler)
        if comm.is_main_process():
            named.addHandler(_Screen(logging.DEBUG if verbose else level, verbose))


class _LogFile(logging.FileHandler):
    """Without logging's stack trace for each line that a full disk has no room for."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _PlainFormatter(logging.Formatter):
    """Without the colours that detectron2 and fvcore give to some words."""

    def format(self, record: logging.LogRecord) -> str:
        return _ANSI_CODE.sub("", super().format(record))


class _Screen(logging.Handler):
    """Standard output, above the progress bar where there is one."""

    def __init__(self, level: int, verbose: bool):
        super().__init__(level)
        self.verbose = verbose
        layout = "[%(asctime)s %(name)s] %(message)s" if verbose else "%(message)s"
        self.setFormatter(_PlainFormatter(layout, "%m/%d %H:%M:%S"))

    def filter(self, record: logging.LogRecord) -> bool:
        # An exception is printed where it is caught.
        return self.verbose or not record.exc_info

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
