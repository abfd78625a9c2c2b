"""The file of an ablation's tables, and the runs of their rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from detectron2.config import CfgNode

from ..config import read_config
from ..errors import InputError
from ..io.inputs import open_input
from ..io.plain_yaml import MAX_LENGTH, load_plain_yaml

MODES = ("heads", "train")

# Keys without effect on a run's figures, or named beside its config.
IGNORED = ("OUTPUT_DIR", "SEED", "VERSION", "DATALOADER.NUM_WORKERS", "MODEL.DEVICE")


class Row(NamedTuple):
    name: str
    config: str
    opts: Dict[str, Any]


class Table(NamedTuple):
    title: str
    rows: List[Row]
    compare: str
    """above or first: which row each is compared with."""
    x: str
    """What the rows' names are if they are numbers, else empty."""
    published: Dict[str, Dict[str, float]]
    """The paper's mAP in percent, by data set and by row."""


class Network(NamedTuple):
    """A network that is trained first, and that all rows start from."""

    config: str
    opts: Dict[str, Any]


class Run(NamedTuple):
    """One training. Two with the same key are the same, in whichever table they stand."""

    mode: str
    config: str
    opts: Dict[str, Any]
    """All keys that are changed in the config, except for the seed."""
    seed: int
    key: str
    """A hash of all that has an effect: mode, seed, data, network, and the whole config."""


class Spec(NamedTuple):
    """A file of tables, see configs/ablations/digit_scenes.yaml."""

    opts: Dict[str, Any]
    network: Network | None
    train: str
    test: str
    modes: Dict[str, Dict[str, Any]]
    tables: Dict[str, Table]

    def run(self, mode: str, row: Row, seed: int, imports: Sequence[str] = ()) -> Run:
        """A row's run.

        Raises:
            InputError: its config can't be read.
        """
        opts = {**self.opts, **self.modes[mode], **row.opts}
        parts = [mode, seed, self.train, self.test, describe_config(row.config, opts, imports)]
        if self.network:
            own = {**self.opts, **self.network.opts}
            parts.append(describe_config(self.network.config, own, imports))
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return Run(mode, row.config, opts, seed, digest[:16])

    def runs(
        self, mode: str, tables: Sequence[str], seeds: Sequence[int], imports: Sequence[str] = ()
    ) -> Dict[str, List[Run]]:
        """The runs of some tables by their names in messages, each once, seed by seed.

        Raises:
            InputError: the spec has no such mode or table, or see `run`.
        """
        if mode not in self.modes:
            raise InputError(f"--mode {mode}: the spec has {' and '.join(self.modes)}")
        runs: Dict[str, Run] = {}
        names: Dict[str, str] = {}
        for seed in seeds:
            for table, row in self.rows(tables):
                run = self.run(mode, row, seed, imports)
                names.setdefault(run.key, f"{table}: {row.name}, seed {seed}")
                runs.setdefault(run.key, run)
        return {names[key]: run for key, run in runs.items()}

    def rows(self, tables: Sequence[str]):
        """(name of the table, row) of some tables."""
        return [(name, row) for name in tables for row in self.choose([name])[name].rows]

    def choose(self, names: Sequence[str]) -> Dict[str, Table]:
        """Tables by name; all of them for no name.

        Raises:
            InputError: there is no such table.
        """
        unknown = [name for name in names if name not in self.tables]
        if unknown:
            raise InputError(f"--tables {unknown[0]}: must be of {', '.join(self.tables)}")
        return {name: self.tables[name] for name in names or self.tables}


def read_spec(path: str) -> Spec:
    """
    Raises:
        InputError: there is no such file, or it is not a valid file of tables.
    """
    try:
        with open_input(path, encoding="utf-8") as file:
            content = load_plain_yaml(file.read(MAX_LENGTH + 1), f"--spec {path}")
        tables = {name: _read_table(table) for name, table in content["tables"].items()}
        network = content["network"]
        if isinstance(network, str) and network.lower() == "none":
            network = None
        if network is not None:
            network = Network(network["config"], network.get("opts", {}))
        modes = content["modes"]
        if not modes or not set(modes) <= set(MODES):
            raise KeyError(f"modes must be of {' and '.join(MODES)}")
        modes = {mode: opts or {} for mode, opts in modes.items()}
        return Spec(
            content.get("opts") or {}, network, content["train"], content["test"], modes, tables
        )
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--spec {path}: {' '.join(str(error).split())}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"--spec {path}: not a file of tables: {error!r}") from error


def _read_table(table: Dict) -> Table:
    return Table(
        table["title"],
        [
            Row(str(name), row["config"], row.get("opts") or {})
            for name, row in table["rows"].items()
        ],
        table.get("compare", "above"),
        table.get("x", ""),
        table.get("published", {}),
    )


def as_list(opts: Dict[str, Any], output: Path | str) -> List:
    """Keys and values as a config takes them; {output} in a text becomes the folder."""
    return [
        item.format(output=output) if isinstance(item, str) else item
        for pair in opts.items()
        for item in pair
    ]


def describe_config(config: str, opts: Dict[str, Any], imports: Sequence[str] = ()) -> Dict:
    """All keys of a config but IGNORED, so that an edited file is another config."""
    cfg = read_config(config, as_list(opts, "{output}"), imports)
    content = _plain(cfg)
    for key in IGNORED:
        *parents, last = key.split(".")
        node = content
        for name in parents:
            node = node[name]
        node.pop(last, None)
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, CfgNode):
        return {key: _plain(item) for key, item in sorted(value.items())}
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value
