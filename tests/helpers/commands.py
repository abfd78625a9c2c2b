"""Command lines run in the tests' own process: a new process imports PyTorch for seconds."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import runpy
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Iterator, NamedTuple
from unittest import mock

from detectron2.utils import logger as detectron2_logger

ROOT = Path(__file__).parents[2]


class Outcome(NamedTuple):
    """How a command ended, with the names of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """Of stderr; no stack trace may be there."""
        assert "Traceback" not in self.stderr, self.stderr[-3000:]
        return self.stderr.strip().splitlines()[-1]


def load_script(path: str) -> ModuleType:
    """A new module of a script of the repository, such as tools/predict.py."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_command(name: str) -> ModuleType:
    """The module with the `main` of a command: ia_gcn.commands.NAME, or else tools/NAME.py."""
    module = f"ia_gcn.commands.{name}"
    if importlib.util.find_spec(module):
        return importlib.import_module(module)
    return load_script(f"tools/{name}.py")


def run_script(path: str, *args, cwd: Path = ROOT) -> Outcome:
    """Run a script of the repository as `python path *args` does, in this process."""
    argv = [str(ROOT / path), *map(str, args)]
    # As those of a process, which a command may reconfigure.
    out, err = (TextIOWrapper(BytesIO(), "utf-8", newline="\n") for _ in range(2))
    before = os.getcwd()
    with (
        own_log_handlers(),
        mock.patch.object(sys, "argv", argv),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        os.chdir(cwd)
        try:
            runpy.run_path(argv[0], run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
            if not isinstance(status, int):
                print(status, file=err)
                status = 1
        finally:
            os.chdir(before)
    for stream in (out, err):
        stream.flush()
    return Outcome(status, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def run_process(*command, cwd: Path = ROOT, **env) -> Outcome:
    """Run `python *command` in a process of its own, which sees this copy of the repository.

    env: what is added to the environment; None takes a variable out.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={key: str(value) for key, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@contextmanager
def own_log_handlers() -> Iterator[None]:
    """Logging as in a new process; what a command sets up is gone after it."""
    loggers = [logging.getLogger(name) for name in (None, "detectron2", "fvcore", "ia_gcn")]
    before = [(log.handlers[:], log.level, log.propagate) for log in loggers]
    detectron2_logger._LOG_COUNTER.clear()
    # With a handler of pytest's there, warnings would not go to stderr.
    loggers[0].handlers[:] = []
    try:
        yield
    finally:
        for log, (handlers, level, propagate) in zip(loggers, before):
            for handler in set(log.handlers) - set(handlers):
                handler.close()
            log.handlers[:], log.level, log.propagate = handlers, level, propagate
