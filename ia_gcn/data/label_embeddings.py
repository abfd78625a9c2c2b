"""Label embeddings H⁽⁰⁾: from a GloVe file, a network's outputs, or the labels' names."""

from __future__ import annotations

import hashlib
import re
from typing import Dict, List, Sequence, Tuple

import numpy as np

from ..errors import InputError
from ..io.inputs import open_input
from ..io.npz import read_npz

# The spread of the entries of 300-dimensional GloVe vectors for the COCO labels, so that a GCN
# starts at the same scale with either source.
NAME_EMBEDDING_STD = 0.38

# ε: a smaller relative difference of float32 numbers is rounding.
ROUNDING = float(np.finfo(np.float32).eps)


def label_embeddings(
    label_names: Sequence[str],
    source: str,
    dim: int,
    aliases: Sequence[str] = (),
    norm: str = "none",
) -> np.ndarray:
    """Embeddings of C labels, as MODEL.LABEL_EMBEDDINGS asks for.

    Args:
        label_names: C names.
        source: "names", or the path of a file: .npz as `image_embeddings` reads it, else in GloVe's
            text format.
        dim: d.
        aliases: "label=words" each, see `glove_embeddings`; no effect on other sources.
        norm: see `normalize_embeddings`.
    Returns:
        (C, d) float32.
    Raises:
        InputError: naming the key or the file, see `image_embeddings`, `glove_embeddings` and
            `normalize_embeddings`.
    """
    if source == "names":
        embeddings = name_embeddings(label_names, dim)
    elif source.endswith(".npz"):
        embeddings = image_embeddings(label_names, source, dim)
    else:
        embeddings = glove_embeddings(label_names, source, dim, aliases)
    return normalize_embeddings(embeddings, norm)


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


def image_embeddings(label_names: Sequence[str], path: str, dim: int) -> np.ndarray:
    """Embeddings from a file of tools/build_label_embeddings.py.

    Args:
        label_names: C names; each is looked up as it is, so the file may have more labels, in any
            order.
        path: an .npz file with embeddings (n, d), numbers, and label_names (n,), strings.
        dim: d.
    Returns:
        (C, d) float32.
    Raises:
        InputError: there is no such file, it is damaged or holds something else, its d is another,
            it lacks a label, or a label's numbers are not finite.
    """
    rows, names = _read_npz(path)
    if rows.shape[1] != dim:
        raise InputError(
            f"{path} has {rows.shape[1]} numbers per label where MODEL.LABEL_EMBEDDINGS.DIM says "
            f"{dim}; set MODEL.LABEL_EMBEDDINGS.DIM {rows.shape[1]}"
        )
    places = {name: place for place, name in enumerate(names)}
    missing = [name for name in label_names if name not in places]
    if missing:
        raise InputError(f"{path} lacks {len(missing)} label(s): {', '.join(missing)}")
    embeddings = rows[[places[name] for name in label_names]]
    bad = [name for name, row in zip(label_names, embeddings) if not np.isfinite(row).all()]
    if bad:
        raise InputError(f"{path}: numbers of {len(bad)} label(s) are not finite: {', '.join(bad)}")
    return embeddings


def normalize_embeddings(embeddings: np.ndarray, norm: str) -> np.ndarray:
    """Embeddings as MODEL.LABEL_EMBEDDINGS.NORM asks for.

    X (C, d) are the embeddings less their mean over the labels, and r ≤ min(C - 1, d) its rank. A
    label, or a dimension, that differs from the mean by the rounding of float32 alone is at the
    mean; singular values of X below that, 1.2e-7 of the largest, are 0.

    Args:
        embeddings: (C, d) float32, finite.
        norm:
            none: as they are.
            standardize: each dimension, over the labels, has mean 0 and deviation 1/√d (dividing by
                C); one that is the same for all labels becomes 0. Where there is none such, the
                rows' squared lengths are 1 on average.
            whiten: X = U S Vᵀ becomes U Vᵀ (ZCA), whose covariance is V Vᵀ / C: no direction that X
                takes is stronger than another or goes with it. Each row is then scaled to length 1;
                that of a label at the mean is 0. Where r is C - 1, all rows had one length before,
                and the cosine of any two is -1/(C - 1). Where it is less, their lengths differed,
                and once they are scaled the covariance is another.
    Returns:
        (C, d) float32, whose rows change places with the labels; 0 where C is 1 and norm not none.
    Raises:
        InputError: there is no such norm.
    """
    if norm == "none":
        return embeddings
    if norm == "standardize":
        return _standardize(embeddings.astype(np.float64)).astype(np.float32)
    if norm == "whiten":
        return _whiten(embeddings.astype(np.float64)).astype(np.float32)
    raise InputError(
        f"MODEL.LABEL_EMBEDDINGS.NORM must be none, standardize or whiten, not {norm!r}"
    )


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
        with open_input(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                word, *fields = line.split() or [""]
                if word not in wanted or word in vectors or _is_header(number, line):
                    continue
                if len(fields) > dim and not _is_number(fields[0]):
                    continue  # a token that contains a blank; `word` is its first part
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


def _read_npz(path: str) -> Tuple[np.ndarray, List[str]]:
    """Embeddings (n, d) float32 and n names."""
    try:
        with open_input(path, "rb") as file:
            rows, names = read_npz(file, ("embeddings", "label_names")).values()
    except FileNotFoundError:
        raise InputError(
            f"MODEL.LABEL_EMBEDDINGS.SOURCE: {path}: no such file; "
            "tools/build_label_embeddings.py makes one"
        ) from None
    except OSError as error:
        raise InputError(
            f"MODEL.LABEL_EMBEDDINGS.SOURCE: {path}: {error.strerror or error}"
        ) from None
    # numpy and zipfile raise nearly anything: BadZipFile, zlib.error, ValueError, MemoryError, ...
    except Exception:
        raise InputError(
            f"MODEL.LABEL_EMBEDDINGS.SOURCE: {path} is damaged, or was not made by "
            "tools/build_label_embeddings.py"
        ) from None
    if (
        rows.ndim != 2
        or rows.dtype.kind not in "fiu"
        or names.dtype.kind != "U"
        or names.shape != rows.shape[:1]
    ):
        raise InputError(
            f"MODEL.LABEL_EMBEDDINGS.SOURCE: {path} must have embeddings (n, d), numbers, and "
            f"label_names (n,), strings, not {rows.shape} {rows.dtype} and {names.shape} "
            f"{names.dtype}"
        )
    names = names.tolist()
    if len(set(names)) < len(names):
        raise InputError(f"MODEL.LABEL_EMBEDDINGS.SOURCE: {path} names a label twice")
    # Numbers beyond float32's range become infinite, and are reported for the labels in use.
    with np.errstate(over="ignore"):
        return rows.astype(np.float32), names


def _standardize(embeddings: np.ndarray) -> np.ndarray:
    centred = _centre(embeddings)
    deviations = centred.std(axis=0)
    return centred / np.where(deviations > 0, deviations, 1) / np.sqrt(embeddings.shape[1])


def _whiten(embeddings: np.ndarray) -> np.ndarray:
    left, strengths, right = np.linalg.svd(_centre(embeddings), full_matrices=False)
    least = ROUNDING * strengths.max(initial=0)
    kept = strengths > least
    left, strengths, right = left[:, kept], strengths[kept], right[kept]
    # Unlike U alone (PCA), U Vᵀ does not depend on the signs and the order that an SVD chooses, and
    # its dimensions are those of the embeddings.
    whitened = left @ right
    # Where X's row is 0, U's has only rounding errors.
    at_mean = np.linalg.norm(left * strengths, axis=1) <= least
    lengths = np.linalg.norm(whitened, axis=1, keepdims=True)
    return np.divide(whitened, lengths, out=np.zeros_like(whitened), where=~at_mean[:, None])


def _centre(embeddings: np.ndarray) -> np.ndarray:
    """X (C, d) float64, exactly 0 for a label at the mean and in a dimension that is constant."""
    centred = embeddings - embeddings.mean(axis=0)
    rounding = np.abs(centred) <= ROUNDING * np.abs(embeddings).max(axis=0)
    centred[:, rounding.all(axis=0)] = 0
    moved = ~rounding.all(axis=1, keepdims=True)
    centred *= moved
    # Otherwise the rounding of the mean would be one more direction to whiten.
    return centred - moved * (centred.sum(axis=0) / max(moved.sum(), 1))
