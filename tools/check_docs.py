#!/usr/bin/env python3
"""Check the documentation: that what it names exists, and that its commands run.

Of every Markdown file:
  links    those inside the repository lead to a file, and to a heading in it
  `code`   config keys, and files of configs/, tools/, datasets/ and ia_gcn/, exist
  sh       of each command in a fenced block, the script or `ia-gcn` subcommand, its options (by its
           --help), its configs and its config keys and values exist; keys without effect are found;
           no data is read
  python   a block can be parsed, and what it imports exists
A comment before a block, <!-- check: run -->, asks for the block to be run as well, in a scratch
folder; words after `run` are added to each of its commands. <!-- check: parse --> says that a block
is not run on purpose. The scratch folder has tiny DigitScenes, train.csv, test.csv, photos/ and
photo.jpg, and in output/demo the model of a short training.

Prints what is wrong as a table, and exits with 1 then.

Examples:
  everything:
    tools/check_docs.py
  one file, without running commands:
    tools/check_docs.py docs/data.md --no-run
"""

from __future__ import annotations

import ast
import contextlib
import functools
import glob
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence, Tuple

from detectron2.config import CfgNode, get_cfg
from PIL import Image
from tabulate import tabulate

import ia_gcn_cli
from ia_gcn.commands.common import make_parser, run
from ia_gcn.config import add_ia_gcn_config, read_config
from ia_gcn.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("*.md", "docs/**/*.md", "datasets/*.md")

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- check: (run|parse)(.*?)-->\s*\Z")
KEY = re.compile(
    r"((MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST)\.[A-Z0-9_.]+"
    r"|SEED|OUTPUT_DIR|IMPORTS|KEEP_FREED_MEMORY)\Z"
)
SCRIPT = re.compile(r"(tools|datasets)/\w+\.py")
FILE = re.compile(r"(configs|tools|datasets|ia_gcn)/[\w./{},*-]*\.[\w*]+\Z")


class Block(NamedTuple):
    """A fenced block of a Markdown file."""

    where: str
    language: str
    text: str
    runs: bool
    extra: str
    """Words to add to each command when it is run."""


def fenced_blocks(file: Path) -> Iterator[Block]:
    text = file.read_text()
    for match in FENCE.finditer(text):
        indent, language, body = match.groups()
        mark = MARK.search(text, 0, match.start())
        action, extra = mark.groups() if mark else ("parse", "")
        where = f"{place(file)}:{text.count(chr(10), 0, match.start()) + 1}"
        body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
        yield Block(where, language, body, action == "run", extra.strip())


def place(file: Path) -> str:
    return os.path.relpath(file, ROOT)


def check_prose(file: Path) -> Iterator[str]:
    """Links that lead nowhere; config keys and files that do not exist."""
    text = FENCE.sub("", file.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = file.parent / path if path else file
        if not re.match("[a-z]+:", target) and not linked.exists():
            yield f"link to {target}: no such file"
        elif anchor and linked.suffix == ".md" and anchor not in anchors(linked):
            yield f"link to {target}: no such heading"
    for word in " ".join(re.findall(r"`([^`\n]+)`", text)).split():
        if KEY.match(word) and not has_key(word):
            yield f"{word}: no such config key"
        elif FILE.match(word):
            yield from (f"{path}: no such file" for path in braces(word) if not matches(path))


def anchors(file: Path) -> List[str]:
    """The anchors that GitHub gives to a file's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def braces(text: str) -> List[str]:
    """The words that a{b,c}d stands for in a shell."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    parts = (text[: match.start()] + part + text[match.end() :] for part in match[1].split(","))
    return [word for part in parts for word in braces(part)]


def matches(pattern: str) -> List[str]:
    """The repository's files of a shell's pattern, in which $name stands for anything."""
    patterns = braces(re.sub(r"\$\w+", "*", pattern))
    return [path for one in patterns for path in glob.glob(str(ROOT / one))]


def commands(script: str) -> Iterator[List[str]]:
    """The words of each command of a script; loops and pipes are taken apart."""
    for line in script.replace("\\\n", " ").split("\n"):
        for part in re.split(r";|&&|\|", line):
            words = shlex.split(part, comments=True)
            while words and words[0] in ("do", "done", "."):
                words = words[1:]
            if words and words[0] != "for":
                yield words


def check_command(words: Sequence[str]) -> Iterator[str]:
    """What a command names that does not exist."""
    if words[0] == "make":
        made = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        yield from (f"make {word}: no such target" for word in words[1:] if word not in made)
        return
    # After python or torchrun; other programs are not of this project.
    starts = [i for i, word in enumerate(words) if word == "ia-gcn" or SCRIPT.match(word)]
    if not starts:
        return
    program, *arguments = words[starts[0] :]
    if program == "ia-gcn":
        name, *arguments = arguments or ["--help"]
        if name.startswith("-"):
            return
        if name not in ia_gcn_cli.COMMANDS:
            yield f"ia-gcn {name}: no such command"
            return
        program = f"ia-gcn {name}"
    elif not matches(program):
        yield f"{program}: no such file"
        return
    options = help_of(program)
    if arguments and re.search(rf"^    {re.escape(arguments[0])}\b", options, re.MULTILINE):
        options += help_of(program, arguments[0])
    for word in arguments:
        if word.startswith("--") and not re.search(rf"(?<![\w-]){word}(?![\w-])", options):
            yield f"{program} {word}: no such option"
    # ia-gcn's need not start with configs/; commands before have made what is in output/.
    named = [word for word in arguments if word.endswith(".yaml") or word.startswith("configs/")]
    named = [word for word in named if not word.startswith("output/")]
    yield from (f"{word}: no such file" for word in named if not configs(word))
    settings = [pair for pair in zip(arguments, arguments[1:]) if KEY.match(pair[0])]
    for config_file in [path for word in named for path in configs(word)] or [""]:
        if "/ablations/" not in config_file:
            yield from check_config(config_file, settings)


def configs(pattern: str) -> List[str]:
    """The config files that a shell's pattern stands for, in configs/ or by a path."""
    return matches(pattern) or matches(f"configs/{pattern}")


def check_config(config_file: str, settings: Sequence[Tuple[str, str]]) -> Iterator[str]:
    """Why a config file, or keys and values that come after it, can't be used."""
    try:
        defaults = read_config(config_file) if any("$" in value for _, value in settings) else None
        opts = []
        for key, value in settings:
            # A shell's variable stands for a value of the key's own type.
            opts += [key, str(value_of(defaults, key)) if "$" in value else value]
        read_config(config_file, opts)
    except (InputError, KeyError) as error:
        yield f"{config_file} {settings}: {error}"


def default_cfg() -> CfgNode:
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    return cfg


def value_of(cfg: CfgNode, key: str):
    """The value of a dotted key.

    Raises:
        KeyError: there is no such key.
    """
    return functools.reduce(lambda node, name: node[name], key.split("."), cfg)


@functools.lru_cache(None)
def has_key(key: str) -> bool:
    try:
        value_of(default_cfg(), key)
    except (KeyError, TypeError):
        return False
    return True


@functools.lru_cache(None)
def help_of(program: str, *arguments: str) -> str:
    """What a script, or `ia-gcn NAME`, prints with --help; in this process, which has imported
    most of it."""
    output, argv = io.StringIO(), sys.argv
    try:
        sys.argv = [program, *arguments, "--help"]
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            if program.startswith("ia-gcn "):
                ia_gcn_cli.main([program.split()[1], *arguments, "--help"])
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
    finally:
        sys.argv = argv
    return output.getvalue()


def check_python(code: str) -> Iterator[str]:
    """A block's syntax error, or what it imports that does not exist."""
    try:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                lacking = (n.name for n in node.names if not hasattr(module, n.name))
                yield from (f"{node.module} has no {name}" for name in lacking)
    except (ImportError, SyntaxError) as error:
        yield str(error)


def check_block(block: Block) -> Iterator[str]:
    if block.language == "sh":
        for words in commands(block.text):
            yield from check_command(words)
    elif block.language == "python":
        yield from check_python(block.text)


def run_block(block: Block, scratch: Path) -> Iterator[str]:
    """Run a block's commands in turn; why the first one failed that did."""
    print(f"running {block.where}", file=sys.stderr, flush=True)
    if block.language == "python":
        (scratch / "block.py").write_text(block.text)
        lines = ["python block.py"]
    else:
        lines = [f"{shlex.join(words)} {block.extra}" for words in commands(block.text)]
    try:
        run_lines(lines, scratch)
    except InputError as error:
        yield str(error)


def run_lines(lines: Sequence[str], scratch: Path) -> None:
    """
    Raises:
        InputError: one failed, with what it said last.
    """
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DETECTRON2_DATASETS": str(scratch / "datasets"),
    }
    options = {"shell": True, "capture_output": True, "text": True}
    for line in lines:
        done = subprocess.run(line, cwd=scratch, env=environment, **options)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            raise InputError(f"{line}: {said[-1]}")


def prepare(scratch: Path) -> None:
    """Make what the module's docstring says that the scratch folder has."""
    for name in ("configs", "tools"):
        (scratch / name).symlink_to(ROOT / name)
    (scratch / "datasets").mkdir()
    for script in (ROOT / "datasets").glob("*.py"):
        (scratch / "datasets" / script.name).symlink_to(script)
    config = "--config-file configs/DigitScenes/demo.yaml"
    lines = [
        "datasets/prepare_digit_scenes.py --train 48 --val 12",
        f"tools/train_net.py {config} SOLVER.MAX_EPOCHS 1 OUTPUT_DIR output/demo",
    ]
    run_lines(lines, scratch)
    (scratch / "photos").symlink_to(scratch / "datasets/digit_scenes/val")
    names = sorted(photo.name for photo in (scratch / "photos").glob("*.png"))
    Image.open(scratch / "photos" / names[0]).save(scratch / "photo.jpg")
    rows = [f"{name},{'cat;dog' if i % 2 else 'dog'}\n" for i, name in enumerate(names)]
    for file in ("train.csv", "test.csv"):
        (scratch / file).write_text("".join(rows))


def check(files: Sequence[Path], run_blocks: bool) -> List[Tuple[str, str]]:
    """Where something is wrong in Markdown files, and what."""
    blocks = [block for file in files for block in fenced_blocks(file)]
    wrong = [(place(file), what) for file in files for what in check_prose(file)]
    wrong += [(block.where, what) for block in blocks for what in check_block(block)]
    # A block that stands in two files is run once.
    to_run = {(block.text, block.extra): block for block in blocks if block.runs and run_blocks}
    if to_run:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            for block in to_run.values():
                wrong += [(block.where, what) for what in run_block(block, Path(folder))]
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("files", metavar="FILE", nargs="*", type=Path, help="these alone")
    parser.add_argument("--no-run", action="store_true", help="run no commands")
    args = parser.parse_args(argv)

    def work() -> int:
        files = args.files or sorted(file for name in FOLDERS for file in ROOT.glob(name))
        wrong = check([file.resolve() for file in files], not args.no_run)
        if wrong:
            print(tabulate(wrong, ["where", "what is wrong"], tablefmt="plain"))
        print(f"{len(files)} files: {len(wrong)} failures")
        return int(bool(wrong))

    return run("check_docs", work)


if __name__ == "__main__":
    sys.exit(main())
