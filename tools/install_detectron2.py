#!/usr/bin/env python3
"""Install detectron2 0.6 as pure Python, where there is no official build.

There is no detectron2 wheel on PyPI, and its C++ sources build only against the torch, compiler
and CUDA they were written for. ia_gcn needs none of them: ROIAlign and NMS come from torchvision.
PyPI's source package pb1-detectron2 0.6 has the Python files of detectron2's tag v0.6 to the
letter. This script downloads it, checks its SHA-256, applies the few edits that today's Python,
numpy and Pillow ask for (EDITS below; detectron2's main branch has made them too), packs a wheel
whose version, 0.6+ia.gcn.pure.python, tells it from an official build, and installs that.

A detectron2 that can be imported, official or not, is left alone.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

REQUIREMENT = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
VERSION = "0.6+ia.gcn.pure.python"
DIST_INFO = f"detectron2-{VERSION}.dist-info"


class Edit(NamedTuple):
    """Replace the regular expression `pattern` in `path`, which must match `count` times."""

    path: str
    pattern: str
    replacement: str
    count: int


# numpy 1.24 removed its aliases of the builtins; `np.bool_` and the like are untouched.
NUMPY_ALIAS = r"\bnp\.(bool|int|float|object|str)\b"
NUMPY_ALIAS_COUNTS = {
    "detectron2/data/build.py": 2,
    "detectron2/data/datasets/pascal_voc.py": 1,
    "detectron2/evaluation/pascal_voc_evaluation.py": 2,
    "detectron2/evaluation/sem_seg_evaluation.py": 7,
    "detectron2/structures/masks.py": 3,
    "detectron2/utils/video_visualizer.py": 1,
    "detectron2/utils/visualizer.py": 3,
}
MODEL_ZOO = "detectron2/model_zoo/model_zoo.py"
EDITS = [
    *(Edit(path, NUMPY_ALIAS, r"\1", count) for path, count in NUMPY_ALIAS_COUNTS.items()),
    # Pillow 10 removed this alias.
    Edit("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR", 1),
    # setuptools 82 removed pkg_resources.
    Edit(MODEL_ZOO, r"(?m)^import pkg_resources$", "import importlib.resources", 1),
    Edit(
        MODEL_ZOO,
        r"pkg_resources\.resource_filename\(\s*"
        r'"detectron2\.model_zoo", os\.path\.join\("configs", config_path\)\s*\)',
        'str(importlib.resources.files("detectron2.model_zoo") / "configs" / config_path)',
        1,
    ),
]

# Stands where the compiled extension would. Importing it succeeds, as many detectron2 modules do
# so at their top; using one of its operators says which one is missing.
C_EXTENSION_STUB = '''\
"""Stub for detectron2's compiled extension, which this pure-Python build does not have."""


def get_compiler_version():
    return "none (pure-Python build)"


def get_cuda_version():
    return "none (pure-Python build)"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing_operator(*args, **kwargs):
        raise RuntimeError(
            f"detectron2._C.{name} is a compiled operator, and this is detectron2's pure-Python "
            "build. Install an official build of detectron2 to use it."
        )

    return missing_operator
'''

METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: detectron2 0.6 without its compiled operators, packed by ia_gcn
License: Apache-2.0
Requires-Python: >=3.9
Requires-Dist: Pillow>=7.1
Requires-Dist: matplotlib
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: termcolor>=1.1
Requires-Dist: yacs>=0.1.8
Requires-Dist: tabulate
Requires-Dist: cloudpickle
Requires-Dist: tqdm>4.29.0
Requires-Dist: tensorboard
Requires-Dist: fvcore>=0.1.5,<0.1.6
Requires-Dist: iopath>=0.1.7
Requires-Dist: omegaconf>=2.1
Requires-Dist: hydra-core>=1.1
"""

WHEEL = "Wheel-Version: 1.0\nGenerator: ia_gcn\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


class InstallError(Exception):
    """What went wrong, in one line for the user."""


def download(folder: Path) -> Path:
    """Fetch the source package into `folder` with pip, which knows the user's index and proxies.

    pip checks the hash, then has the package's setup.py tell its metadata; that needs torch, and
    a setuptools more recent than the environment's may be.
    """
    if importlib.util.find_spec("torch") is None:
        raise InstallError("install torch first")
    tools = folder / "tools"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder)]
    try:
        if not has_recent_setuptools():
            run_pip("install", "--target", str(tools), "setuptools")
        run_pip("download", *options, "-r", str(requirements), PYTHONPATH=str(tools))
    except InstallError as error:
        raise InstallError(
            f"could not download {REQUIREMENT}; is there a network? --source takes a file. {error}"
        ) from None
    return next(folder.glob("pb1*.tar.gz"))


def has_recent_setuptools() -> bool:
    """Whether the environment's setuptools makes wheels by itself, as from version 70.1 on."""
    try:
        return importlib.util.find_spec("setuptools.command.bdist_wheel") is not None
    except ModuleNotFoundError:
        return False


def run_pip(command: str, *arguments: str, **environment: str) -> None:
    """Run pip quietly; what it complains of becomes an InstallError of one line."""
    pip = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
    environment = {**os.environ, **environment}
    result = subprocess.run([*pip, *arguments], capture_output=True, text=True, env=environment)
    if result.returncode == 0:
        return
    if "DO NOT MATCH" in result.stderr:
        raise InstallError("what pip found is not the file this script knows (wrong checksum)")
    lines = [line.strip() for line in result.stderr.splitlines()]
    errors = [line[len("error:") :].strip() for line in lines if line.lower().startswith("error:")]
    why = (errors or [line for line in lines if line] or ["no message"])[-1]
    raise InstallError(f"pip {command}: {why}")


def read_package(archive: bytes) -> dict[str, bytes]:
    """Check the source package's SHA-256 and return its detectron2/ files and its LICENSE.

    Returns:
        file contents by path relative to the package's top folder.
    """
    digest = hashlib.sha256(archive).hexdigest()
    if digest != SHA256:
        raise InstallError(f"wrong checksum: expected SHA-256 {SHA256}, got {digest}")
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = member.name.partition("/")[2]
            if member.isfile() and (path == "LICENSE" or path.startswith("detectron2/")):
                files[path] = tar.extractfile(member).read()
    return files


def apply_edits(files: dict[str, bytes], edits: list[Edit] = EDITS) -> dict[str, bytes]:
    """Return `files` with every edit made and the stub of detectron2._C added.

    Raises:
        InstallError: a file is missing, or a pattern does not match as often as it must.
    """
    files = dict(files)
    for edit in edits:
        if edit.path not in files:
            raise InstallError(f"{edit.path} is not in the package")
        text, count = re.subn(edit.pattern, edit.replacement, files[edit.path].decode())
        if count != edit.count:
            raise InstallError(
                f"{edit.path}: expected {edit.count} matches of {edit.pattern!r}, found {count}"
            )
        files[edit.path] = text.encode()
    if "detectron2/_C.py" in files:
        raise InstallError("detectron2/_C.py is already in the package")
    files["detectron2/_C.py"] = C_EXTENSION_STUB.encode()
    return files


def pack_wheel(files: dict[str, bytes], folder: Path) -> Path:
    """Write `files` as a wheel into `folder`; the same files give the same bytes."""
    files = dict(files)
    files[f"{DIST_INFO}/LICENSE"] = files.pop("LICENSE")
    files[f"{DIST_INFO}/METADATA"] = METADATA.encode()
    files[f"{DIST_INFO}/WHEEL"] = WHEEL.encode()
    record = []
    for path, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{path},sha256={digest},{len(content)}")
    record.append(f"{DIST_INFO}/RECORD,,")
    files[f"{DIST_INFO}/RECORD"] = ("\n".join(record) + "\n").encode()
    wheel = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)
    return wheel


def build_wheel(source: Path | None, folder: Path) -> Path:
    """Make the wheel in `folder` from the source package `source`, downloaded where None."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = source or download(Path(scratch))
        try:
            content = archive.read_bytes()
        except OSError as error:
            raise InstallError(f"{archive}: {error.strerror}") from None
        return pack_wheel(apply_edits(read_package(content)), folder)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="the source package, instead of a download")
    parser.add_argument(
        "--wheel-dir", type=Path, help="only build the wheel, in this folder; install nothing"
    )
    args = parser.parse_args()
    try:
        if args.wheel_dir:
            args.wheel_dir.mkdir(parents=True, exist_ok=True)
            print(f"built {build_wheel(args.source, args.wheel_dir)}")
            return 0
        existing = importlib.util.find_spec("detectron2")
        # A folder of that name without code in it has no origin.
        if existing is not None and existing.origin is not None:
            print(f"detectron2 is already installed ({existing.origin}); left alone")
            return 0
        with tempfile.TemporaryDirectory() as folder:
            run_pip("install", str(build_wheel(args.source, Path(folder))))
        print(f"installed detectron2 {VERSION}")
        return 0
    except (InstallError, OSError) as error:
        print(f"install_detectron2: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
