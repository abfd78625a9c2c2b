"""Label embeddings H⁽⁰⁾: from a file in GloVe's text format, or from the labels' names alone."""

from __future__ import annotations

import hashlib
import re
from typing import Dict, List, Sequence

import numpy as np
from detectron2.utils.file_io import PathManager

from ..errors import InputError

# The spread of the entries of 300-dimensional GloVe vectors for the COCO labels, so that a GCN
# starts at the same scale with either source.
NAME_EMBEDDING_STD = 0.38


def label_embeddings(
    label_names: Sequence[str], source: str, dim: int, aliases: Sequence[str] = ()
) -> np.ndarray:
    """Embeddings of C labels, as MODEL.LABEL_EMBEDDINGS asks for.

    Args:
        label_names: C names.
        source: "names", or the path of a file in GloVe's text format.
        dim: d.
        aliases: "label=words" each, see `glove_embeddings`.
    Returns:
        (C, d) float32.
    Raises:
        InputError: naming the key or the file, see `glove_embeddings`.
    """
    if source == "names":
        return name_embeddings(label_names, dim)
    return glove_embeddings(label_names, source, dim, aliases)


def name_embeddings(label_names: Sequence[str], dim: int) -> np.ndarray:
    """A random vector per label, seeded by its name: (C, d) float32.

    Such vectors are nearly orthogonal, so they say which label is which and nothing else: what the
    GCN then knows of the labels' relations comes from the label graph alone. They take any number
    of labels, need no file, and a label keeps its vector wherever it stands in the list.
    """
    rows = []
    for name in label_names:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        rows.append(np.random.default_rng(seed).standard_normal(dim) * NAME_EMBEDDING_STD)
    return np.array(rows, dtype=np.float32)


def glove_embeddings(
    label_names: Sequence[str], path: str, dim: int, aliases: Sequence[str] = ()
) -> np.ndarray:
    """Embeddings from a file in GloVe's text format: a word and d numbers per line.

    A label is looked up in lower case, first as one word with `_` for what separates its parts
    (baseball_bat), then as the mean of its words' vectors.

    Args:
        label_names: C names.
        path: the file; a first line with two numbers, as word2vec's tools write it, is skipped.
        dim: d.
        aliases: "label=words": look up the words in the label's place.
    Returns:
        (C, d) float32.
    Raises:
        InputError: no such file, a line without d numbers, a word that the file lacks, or an
            alias for a label that is not there.
    """
    phrases = _phrases(label_names, aliases)
    parts = {phrase: re.split(r"[\s_\-/]+", phrase) for phrase in phrases.values()}
    wholes = {phrase: "_".join(words) for phrase, words in parts.items()}
    wanted = {*wholes.values(), *(word for words in parts.values() for word in words)}
    vectors = _read_vectors(path, wanted, dim)

    missing = {}
    rows = []
    for name in label_names:
        phrase = phrases[name]
        if wholes[phrase] in vectors:
            rows.append(vectors[wholes[phrase]])
            continue
        unknown = [word for word in parts[phrase] if word not in vectors]
        if unknown:
            missing[name] = unknown
        else:
            rows.append(np.mean([vectors[word] for word in parts[phrase]], axis=0))
    if missing:
        listed = "; ".join(f"{name}: {', '.join(words)}" for name, words in missing.items())
        example = next(iter(missing))
        raise InputError(
            f"{path} lacks words of {len(missing)} label(s) ({listed}); name words that it has "
            f"with MODEL.LABEL_EMBEDDINGS.ALIASES \"['{example}=...']\""
        )
    return np.array(rows, dtype=np.float32)


def _phrases(label_names: Sequence[str], aliases: Sequence[str]) -> Dict[str, str]:
    """What to look up for each label, in lower case."""
    phrases = {name: name for name in label_names}
    for alias in aliases:
        name, separator, words = alias.partition("=")
        if name not in phrases or not separator or not words.strip():
            raise InputError(
                f"MODEL.LABEL_EMBEDDINGS.ALIASES: {alias!r} is not label=words for a label of "
                "the data set"
            )
        phrases[name] = words
    return {name: phrase.strip().lower() for name, phrase in phrases.items()}


def _read_vectors(path: str, wanted, dim: int) -> Dict[str, np.ndarray]:
    """The vectors of the `wanted` words; the file is read once, line by line."""
    vectors: Dict[str, np.ndarray] = {}
    try:
        with PathManager.open(path, "r", encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                word, *fields = line.split() or [""]
                if word not in wanted or word in vectors or _is_header(number, line):
                    continue
                if len(fields) > dim and not _is_number(fields[0]):
                    continue  # a token with a blank in it, of which `word` is the first part
                vectors[word] = _parse_vector(fields, dim, f"{path}, line {number}")
    except OSError as error:
        raise InputError(f"MODEL.LABEL_EMBEDDINGS.SOURCE: {path}: {error.strerror}") from None
    return vectors


def _is_header(number: int, line: str) -> bool:
    fields: List[str] = line.split()
    return number == 1 and len(fields) == 2 and all(field.isdigit() for field in fields)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _parse_vector(fields: List[str], dim: int, where: str) -> np.ndarray:
    try:
        vector = np.array(fields, dtype=np.float32)
    except ValueError:
        raise InputError(f"{where}: not a word and {dim} numbers") from None
    if len(vector) != dim:
        raise InputError(
            f"{where}: {len(vector)} numbers where MODEL.LABEL_EMBEDDINGS.DIM says {dim}"
        )
    if not np.isfinite(vector).all():
        raise InputError(f"{where}: a number is not finite")
    return vector
