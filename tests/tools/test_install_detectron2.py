import base64
import csv
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, load_script

SCRIPT = "tools/install_detectron2.py"
WHEEL_NAME = "detectron2-0.6+ia.gcn.pure.python-py3-none-any.whl"
DIST_INFO = "detectron2-0.6+ia.gcn.pure.python.dist-info"

ALIASES = ["bool", "int", "float", "object", "str"]
# Looks like the aliases, and is still in numpy.
NUMPY_KEPT = "kept = np.bool_(1), np.int64(1), np.float32(1), np.str_('np'), np.integer, xnp.int\n"


def numpy_user(names):
    lines = [f"a{i} = np.zeros(3, dtype={name})  # µ\n" for i, name in enumerate(names)]
    return "import numpy as np\n\n" + NUMPY_KEPT + "".join(lines)


def file_pairs(alias_counts):
    """The text of each file that is edited, by path: as it comes, and as it has to become."""
    pairs = {}
    for path, count in alias_counts.items():
        names = [ALIASES[i % len(ALIASES)] for i in range(count)]
        pairs[path] = numpy_user([f"np.{name}" for name in names]), numpy_user(names)
    pairs["detectron2/data/transforms/transform.py"] = (
        "def resize(interp=Image.LINEAR, other=Image.LINEAR_):\n    pass\n",
        "def resize(interp=Image.BILINEAR, other=Image.LINEAR_):\n    pass\n",
    )
    pairs["detectron2/model_zoo/model_zoo.py"] = (
        "import os\nimport pkg_resources\nimport torch\n\n\n"
        "def get_config_file(config_path):\n"
        "    cfg_file = pkg_resources.resource_filename(\n"
        '        "detectron2.model_zoo", os.path.join("configs", config_path)\n'
        "    )\n"
        "    return cfg_file\n",
        "import os\nimport importlib.resources\nimport torch\n\n\n"
        "def get_config_file(config_path):\n"
        '    cfg_file = str(importlib.resources.files("detectron2.model_zoo")'
        ' / "configs" / config_path)\n'
        "    return cfg_file\n",
    )
    return pairs


UNTOUCHED = {
    "detectron2/__init__.py": b'__version__ = "0.6"\n',
    "detectron2/layers/mask_ops.py": b"np.bool and Image.LINEAR, in a file that no edit names\r\n",
    "detectron2/model_zoo/configs/Base.yaml": b"\xff\x00 not text\n",
}
OUTSIDE = {
    "setup.py": b"raise SystemExit('nobody runs this')\n",
    "PKG-INFO": b"Name: pb1-detectron2\n",
    "projects/detectron2/README.md": b"",
}


@pytest.fixture
def installer():
    """The script as a module, a new one for each test."""
    return load_script(SCRIPT)


@pytest.fixture
def package(installer):
    """A small source package: file contents by path."""
    edited = {path: old for path, (old, _) in file_pairs(installer.NUMPY_ALIAS_COUNTS).items()}
    contents = {path: text.encode() for path, text in edited.items()}
    return {**contents, **UNTOUCHED, **OUTSIDE, "LICENSE": b"a licence\n"}


def pack_source(package):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        folder = tarfile.TarInfo("pb1-detectron2-0.6/detectron2")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for path, content in package.items():
            member = tarfile.TarInfo(f"pb1-detectron2-0.6/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def build(installer, tmp_path, monkeypatch):
    """Build the wheel of a source package in a folder of tmp_path."""

    def build(package, folder="wheels"):
        source = tmp_path / "pb1-detectron2-0.6.tar.gz"
        source.write_bytes(pack_source(package))
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        monkeypatch.setattr(installer, "SHA256", digest)
        (tmp_path / folder).mkdir()
        return installer.build_wheel(source, tmp_path / folder)

    return build


def read_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names}


def run_script(*args, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / SCRIPT), *map(str, args)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def assert_fails_in_one_line(result, pattern):
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.match(rf"install_detectron2: .*{pattern}", line), line


# What is in the wheel.


def test_the_edits_are_made_and_nothing_else(installer, package, build):
    contents = read_wheel(build(package))
    expected = {path: new for path, (_, new) in file_pairs(installer.NUMPY_ALIAS_COUNTS).items()}
    assert {edit.path for edit in installer.EDITS} == set(expected)
    for path, text in expected.items():
        assert contents.pop(path).decode() == text, path
    for path, content in UNTOUCHED.items():
        assert contents.pop(path) == content, path
    assert contents.pop(f"{DIST_INFO}/LICENSE") == b"a licence\n"
    assert set(contents) == {
        "detectron2/_C.py",
        f"{DIST_INFO}/METADATA",
        f"{DIST_INFO}/WHEEL",
        f"{DIST_INFO}/RECORD",
    }


def test_wheel_is_consistent(package, build):
    wheel = build(package)
    assert wheel.name == WHEEL_NAME
    contents = read_wheel(wheel)

    metadata = Parser().parsestr(contents[f"{DIST_INFO}/METADATA"].decode())
    assert f"{metadata['Name']}-{metadata['Version']}.dist-info" == DIST_INFO
    assert metadata.get_payload() == ""
    tags = Parser().parsestr(contents[f"{DIST_INFO}/WHEEL"].decode())
    assert (tags["Wheel-Version"], tags["Root-Is-Purelib"]) == ("1.0", "true")
    assert WHEEL_NAME.endswith(f"-{tags['Tag']}.whl")

    record = list(csv.reader(contents[f"{DIST_INFO}/RECORD"].decode().splitlines()))
    assert sorted(path for path, _, _ in record) == sorted(contents)
    for path, digest, size in record:
        if path == f"{DIST_INFO}/RECORD":
            assert (digest, size) == ("", "")
            continue
        sha256 = hashlib.sha256(contents[path]).digest()
        assert digest == "sha256=" + base64.urlsafe_b64encode(sha256).decode().rstrip("=")
        assert int(size) == len(contents[path])


def test_same_source_gives_the_same_bytes(package, build):
    first, second = build(package, "first"), build(package, "second")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_pip_installs_the_wheel(package, build, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-index", "--no-compile", "--target", str(tmp_path / "site")]
    subprocess.run([*command, str(build(package))], check=True, timeout=60)
    code = (
        "import importlib.metadata, detectron2, detectron2._C\n"
        "print(importlib.metadata.version('detectron2'), detectron2.__file__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    version, file = result.stdout.split(maxsplit=1)
    assert version == "0.6+ia.gcn.pure.python"
    assert Path(file.strip()) == tmp_path / "site" / "detectron2" / "__init__.py"


# A package that is not as expected.


@pytest.mark.parametrize(("old", "new", "found"), [("np.int)", "int)", 6), ("a0 =", "np.str =", 8)])
def test_wrong_number_of_matches(installer, package, build, old, new, found):
    path = "detectron2/evaluation/sem_seg_evaluation.py"
    text = package[path].decode()
    assert old in text
    package[path] = text.replace(old, new, 1).encode()
    with pytest.raises(
        installer.InstallError, match=rf"^{path}: expected 7 matches of .*, found {found}$"
    ):
        build(package)


@pytest.mark.parametrize("path", ["detectron2/data/build.py", "detectron2/model_zoo/model_zoo.py"])
def test_missing_file(installer, package, build, path):
    del package[path]
    with pytest.raises(installer.InstallError, match=f"^{path} is not in the package$"):
        build(package)


def test_a_compiled_extension_is_not_overwritten(installer, package, build):
    package["detectron2/_C.py"] = b""
    with pytest.raises(installer.InstallError, match=r"_C\.py is already in the package"):
        build(package)


# The command line.


def test_wrong_checksum(package, tmp_path):
    source = tmp_path / "source.tar.gz"
    source.write_bytes(pack_source(package))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    result = run_script("--source", source, "--wheel-dir", tmp_path / "wheels")
    assert_fails_in_one_line(result, f"wrong checksum: .* got {digest}")
    assert list((tmp_path / "wheels").iterdir()) == []


def test_missing_source(tmp_path):
    result = run_script("--source", tmp_path / "none.tar.gz", "--wheel-dir", tmp_path)
    assert_fails_in_one_line(result, "none.tar.gz: No such file")


OFFLINE = {
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_CONFIG_FILE": os.devnull,
}


def test_no_network(tmp_path):
    result = run_script("--wheel-dir", tmp_path, **OFFLINE)
    assert_fails_in_one_line(result, r"could not download pb1-detectron2==0\.6; .*--source")


def test_another_file_of_the_same_name_is_not_run(package, tmp_path):
    marker = tmp_path / "marker"
    package["setup.py"] = f"open({str(marker)!r}, 'w')\n".encode()
    (tmp_path / "pb1-detectron2-0.6.tar.gz").write_bytes(pack_source(package))
    result = run_script("--wheel-dir", tmp_path, **{**OFFLINE, "PIP_FIND_LINKS": str(tmp_path)})
    assert_fails_in_one_line(result, "is not the file this script knows")
    assert not marker.exists()


def test_existing_install_is_left_alone(tmp_path):
    existing = tmp_path / "site" / "detectron2" / "__init__.py"
    existing.parent.mkdir(parents=True)
    existing.write_text("raise ImportError('need not be imported to be found')\n")
    result = run_script(PYTHONPATH=str(tmp_path / "site"), **OFFLINE)
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout == f"detectron2 is already installed ({existing}); left alone\n"


# The stub of detectron2._C.


@pytest.fixture
def stub(installer, tmp_path):
    path = tmp_path / "_C.py"
    path.write_text(installer.C_EXTENSION_STUB)
    spec = importlib.util.spec_from_file_location("stub", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stub_names_the_missing_operator(stub):
    operator = stub.nms_rotated
    with pytest.raises(RuntimeError, match=r"detectron2\._C\.nms_rotated is a compiled operator"):
        operator(1, 2, threshold=0.5)


def test_stub_has_no_dunder_attributes_of_its_own(stub):
    assert not hasattr(stub, "__path__")
    assert not hasattr(stub, "__wrapped__")


def test_stub_answers_what_collect_env_asks(stub):
    assert "pure-Python" in stub.get_compiler_version()
    assert "pure-Python" in stub.get_cuda_version()
