"""Modules of a user's own: heads, losses and data sets that register themselves on import."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Sequence, Tuple

from .errors import InputError


def import_extensions(modules: Sequence[str]) -> None:
    """Import each module once, so that its heads, losses and data sets are registered.

    Args:
        modules: names such as my_package.heads, or paths of .py files.
    Raises:
        InputError: there is no such module or file, a file's name is that of another module, or
            the import raises an error.
    """
    for module in modules:
        try:
            if module.endswith(".py"):
                _import_file(Path(module))
            else:
                importlib.import_module(module)
        except InputError:
            raise
        except Exception as error:  # the code of a user may raise anything
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"--import {module}: {' '.join(reason.split())}") from error


def merge_extensions(*lists: Sequence[str]) -> Tuple[str, ...]:
    """Several lists as one, each module once, under the name that comes first."""
    modules = {}
    for module in itertools.chain(*lists):
        modules.setdefault(_module_name(module), module)
    return tuple(modules.values())


def check_extensions(needed: Sequence[str]) -> None:
    """Refuse a config that needs modules which were not imported.

    A config, and with it a checkpoint, only names them: it never imports anything.

    Args:
        needed: the config's IMPORTS.
    Raises:
        InputError: naming the modules for --import.
    """
    missing = [module for module in needed if _module_name(module) not in sys.modules]
    if missing:
        wanted = " ".join(f"--import {module}" for module in missing)
        raise InputError(f"IMPORTS: the config needs code of your own: add {wanted}")


def _module_name(module: str) -> str:
    return Path(module).stem if module.endswith(".py") else module


def _import_file(path: Path) -> None:
    name = path.stem
    if not path.is_file():
        raise InputError(f"--import {path}: no such file")
    if name in sys.modules:
        known = getattr(sys.modules[name], "__file__", None)
        if known is None or not path.samefile(known):
            raise InputError(
                f"--import {path}: there is another module named {name}; rename the file"
            )
        return
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
