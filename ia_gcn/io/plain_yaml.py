"""Reading YAML of others within limits."""

from __future__ import annotations

from typing import Any, Dict

import yaml

from ..errors import InputError

# Characters; a config with all keys has 12,000, and 20,000 labels have some hundred thousand.
MAX_LENGTH = 2**20

# Scalars and containers, each as often as an alias names it.
MAX_NODES = 200_000

# Containers inside each other; a config has five.
MAX_DEPTH = 50

# Of a number that is a key: more of them could have the same hash.
MAX_KEY_LENGTH = 20


def load_plain_yaml(text: Any, name: str) -> Dict:
    """The keys and values of a YAML text, of YAML's own types only.

    Args:
        text: a string; anything else is refused.
        name: of the file, for messages.
    Raises:
        InputError: it is no YAML, is no mapping, names a class, or is too long or deep, if need be
            after all aliases.
    """
    if not isinstance(text, str) or len(text) > MAX_LENGTH:
        raise InputError(f"{name}: not a text of at most {MAX_LENGTH} characters")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is not None and _weigh(node, {}) > MAX_NODES:
                raise ValueError(f"more than {MAX_NODES} values, with its aliases")
            content = loader.construct_document(node) if node is not None else None
        finally:
            loader.dispose()
        if not isinstance(content, dict):
            raise ValueError("no keys with values")
        return content
    except RecursionError:
        raise InputError(f"{name}: containers in each other, too deeply") from None
    except Exception as error:  # beside YAMLError, those of dates and numbers
        raise InputError(f"{name}: {' '.join(str(error).split())[:300]}") from None


def _weigh(node: yaml.Node, known: Dict[int, int | None], depth: int = 0) -> int:
    """How many nodes a node is of, as `ia_gcn.io.plain_pickle` counts what a pickle is of."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    weight = known.get(id(node), 0)
    if weight is None or depth >= MAX_DEPTH:
        raise ValueError("containers in each other, too deeply")
    if not weight:
        known[id(node)] = None
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                text = key.tag.endswith((":str", ":merge", ":value"))
                if not text and len(str(key.value)) > MAX_KEY_LENGTH:
                    raise ValueError("a key that is no text")
            parts = [part for pair in node.value for part in pair]
        weight = 1 + sum(_weigh(part, known, depth + 1) for part in parts)
        known[id(node)] = weight
    return weight
