"""Files that could carry code: pickles, proposals, .pth, .npz, safetensors, ONNX and YAML.

Each trial is a file that is drawn from its seed, and the project's own reader on it in a process
with limits. Nothing may run, crash, hang or take more memory than the limit.
"""

from __future__ import annotations

import collections
import functools
import io
import json
import os
import pickle
import random
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from ia_gcn.checkpoint import read_checkpoint
from ia_gcn.checkpoint.source import read_source, state_dict_of
from ia_gcn.checkpoint.source_labels import read_matrix
from ia_gcn.config import read_config
from ia_gcn.data import add_proposals
from ia_gcn.errors import InputError
from ia_gcn.evaluation.predictions import read_predictions
from ia_gcn.inference import OnnxPredictor
from ia_gcn.io.plain_pickle import load_plain_pickle
from ia_gcn.modeling.backbone import read_weights

from . import pickles
from .harness import Limits, Trial, run_in_child

LIMITS = Limits(seconds=30, memory=2**29)

# Files that are read in one process.
AT_ONCE = 50
TOGETHER = Limits(seconds=60, memory=2**29)

# Of an attack that is changed further; the others are long because they repeat themselves.
SHORT = 10_000

# What is written over a part of a file.
EXTREMES = [
    *(b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f"),
    *(struct.pack("<I", 2**31 - 1), struct.pack("<Q", 2**40), struct.pack("<I", 2**20)),
]


class Kind(NamedTuple):
    make: Callable[[random.Random], bytes]
    """The content of a file."""
    suffix: str
    read: Callable[[str], None]
    """Reads such a file as the project does, and looks at all that it read."""


def run(args) -> Iterator[Trial]:
    """Trials of all kinds in turn."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            for start in range(0, args.trials, AT_ONCE):
                numbers = range(start, min(start + AT_ONCE, args.trials))
                for name in args.kinds:
                    yield from try_files(name, [f"{args.seed}/{n}" for n in numbers], Path(folder))
        finally:
            os.chdir(before)


def try_files(kind: str, seeds: List[str], folder: Path) -> Iterator[Trial]:
    """Some files in one process, as a fork takes longer than most of them; each in one of its own
    if that process does not end well.

    Args:
        folder: the working folder.
    """
    make, suffix, read = KINDS[kind]
    path = folder / f"file{suffix}"

    contents = {seed: make(random.Random(f"{kind} {seed}")) for seed in seeds}

    def outcome_of(seed: str) -> str:
        path.write_bytes(contents[seed])
        try:
            read(str(path))
            return "read"
        except InputError:
            return "refused"

    def work() -> str:
        return " ".join(map(outcome_of, seeds))

    names = [f"seed {seed}" for seed in seeds]
    together = run_in_child(kind, names[0], work, folder, TOGETHER)
    outcomes = together.outcome.split()
    if together.is_finding or len(outcomes) < len(seeds):
        for name, seed in zip(names, seeds):
            yield run_in_child(kind, name, functools.partial(outcome_of, seed), folder, LIMITS)
    else:
        seconds = together.seconds / len(seeds)
        for name, outcome in zip(names, outcomes):
            yield Trial(kind, name, outcome, seconds=seconds)


# ------------------------------------------------------------------------------------- any file


def mutate(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Some small changes: bits, bytes, parts that are cut, doubled or of another file."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        place = rng.randrange(len(changed) + 1)
        length = min(int(rng.expovariate(0.1)) + 1, len(changed) - place)
        action = rng.randrange(7)
        if action == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif action == 1 and place < len(changed):
            changed[place] = rng.randrange(256)
        elif action == 2:
            del changed[place : place + length]
        elif action == 3:
            changed[place:place] = changed[place : place + length]
        elif action == 4:
            extreme = rng.choice(EXTREMES)
            changed[place : place + len(extreme)] = extreme
        elif action == 5 and other:
            start = rng.randrange(len(other))
            changed[place:place] = other[start : start + rng.randrange(1, 200)]
        elif action == 6 and rng.random() < 0.2:
            del changed[place:]
    return bytes(changed)


# -------------------------------------------------------------------------------------- pickles

NAMES = [
    *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")),
    *(("collections", "OrderedDict"), ("numpy.core.multiarray", "_reconstruct")),
    *(("numpy.core.multiarray", "scalar"), ("numpy._core.numeric", "_frombuffer")),
    *(("builtins", "bytes"), ("builtins", "getattr"), ("os", "system"), ("builtins", "eval")),
    *(("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage"), ("torch", "Size")),
]
DTYPES = ["f4", "f8", "i8", "b1", "O8", "V16", "U4", "S3", "M8", "c16", "f2", "u1"]
NUMBERS = [0, 1, 2, 3, 4, 16, 255, 256, -1, -2, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**6]


def draw_value(rng: random.Random, depth: int = 0) -> bytes:
    """The opcodes of a value, mostly valid ones."""
    choice = rng.randrange(6 if depth > 4 else 18)

    def several() -> List[bytes]:
        return [draw_value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 5]))]

    if choice == 0:
        return pickles.number(rng.choice(NUMBERS))
    if choice == 1:
        return pickles.text(rng.choice(["a", "latin1", "<", "boxes", "f4", "\ud800", "€" * 9]))
    if choice == 2:
        return pickles.raw(rng.randbytes(rng.choice([0, 1, 4, 8, 16, 32])))
    if choice == 3:
        return rng.choice([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f", b"2", b"0", b"("])
    if choice == 4:
        return pickles.get(rng.randrange(6))
    if choice == 5:
        return pickles.name(*rng.choice(NAMES))
    if choice in (6, 7):
        return pickles.keep(draw_value(rng, depth + 1), rng.randrange(6))
    if choice == 8:
        return pickles.listed(*several())
    if choice == 9:
        items = several()
        return pickles.mapped(*(items if len(items) % 2 == 0 else items[1:]))
    if choice == 10:
        return pickles.group(*several())
    if choice == 11:
        return pickles.dtype(rng.choice(DTYPES))
    if choice in (12, 13):
        size = rng.choice([0, 1, 4, 8, 16])
        data = pickles.raw(rng.randbytes(size))
        return pickles.array(pickles.dtype(rng.choice(DTYPES)), data, rng.choice(NUMBERS))
    if choice in (14, 15):
        return pickles.call(pickles.name(*rng.choice(NAMES)), *several())
    if choice == 16:
        return pickles.build(draw_value(rng, depth + 1), draw_value(rng, depth + 1))
    function = pickles.name(*rng.choice(NAMES))
    return pickles.call(function, pickles.text("touch canary")) + rng.choice([b"", b"0N"])


def proposals(rng: random.Random) -> Dict:
    """A good file's content, for the images 0 and 1."""
    generator = np.random.default_rng(rng.randrange(100))
    kind = rng.choice([np.float32, np.float64, ">f4", np.int16])
    boxes = [generator.uniform(0, 99, (n, 4)).astype(kind) for n in (3, rng.choice([0, 5]))]
    return {
        "ids": [0, 1] if rng.random() < 0.5 else ["0", "1"],
        "boxes": boxes,
        "objectness_logits": [np.linspace(1, 0, len(b)) for b in boxes],
        "bbox_mode": 0,
    }


def zoo(rng: random.Random) -> Dict:
    """What the files of detectron2's model zoo are like."""
    names = ["backbone.stem.conv1.weight", "proposal_generator.rpn_head.conv.weight"]
    tensors = {name: np.ones((2, 3, rng.choice([1, 7])), np.float32) for name in names}
    return {"model": collections.OrderedDict(tensors), "__author__": "somebody", "other": [1.5]}


def make_pickle(rng: random.Random, good: Callable[[random.Random], object] = zoo) -> bytes:
    attacks = list(pickles.attacks().values())
    drawn = rng.random()
    if drawn < 0.35:
        parts = b"".join(draw_value(rng) for _ in range(rng.choice([1, 1, 2, 3])))
        return b"\x80\x04" + parts + pickles.STOP
    if drawn < 0.45:
        return rng.choice(attacks)
    attack = rng.choice([data for data in attacks if len(data) < SHORT])
    whole = pickle.dumps(good(rng), protocol=rng.randrange(6))
    if drawn < 0.6:
        return mutate(attack, rng, whole)
    return mutate(whole, rng, attack) if drawn < 0.98 else whole


def read_pickle(path: str) -> None:
    with open(path, "rb") as file:
        repr(load_plain_pickle(file, path))
    repr(state_dict_of(read_source(path, path), path))


def read_proposals(path: str) -> None:
    records = [{"image_id": image_id} for image_id in (0, 1)]
    add_proposals(records, path)
    repr(records)


# ----------------------------------------------------------------------------------------- .pth


def unzipped(data: bytes) -> Dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(parts: Dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return buffer.getvalue()


@functools.cache
def checkpoint(number: int) -> bytes:
    """A good file, and some with tensors that no model has."""
    weight = torch.arange(12.0).reshape(3, 4)
    odd = [
        *(weight, torch.nn.Parameter(weight), weight.half(), weight.t(), weight.to(torch.int8)),
        *(torch.zeros(1).expand(10**5, 10**5), torch.zeros(3, device="meta"), weight > 1),
        *(weight.to_sparse(), weight.to(torch.complex64), weight / 0, 5, "text", None),
    ]
    state = {"weight": weight, "bias": odd[number % len(odd)]}
    content = {"model": state, "label_names": ["a", "b"], "config": "SEED: 1", "iteration": 3}
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=number % 5 > 0)
    return buffer.getvalue()


def make_pth(rng: random.Random) -> bytes:
    data = checkpoint(rng.randrange(70))
    if not zipfile.is_zipfile(io.BytesIO(data)) or rng.random() < 0.3:
        return mutate(data, rng, make_pickle(rng))
    parts = unzipped(data)
    name = next(name for name in parts if name.endswith("data.pkl"))
    drawn = rng.random()
    if drawn < 0.4:
        parts[name] = mutate(parts[name], rng)
    elif drawn < 0.8:
        parts[name] = make_pickle(rng)
    else:
        other = rng.choice(list(parts))
        parts[other] = mutate(parts[other], rng) * rng.choice([1, 1, 1000])
    return zipped(parts, rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED]))


def read_pth(path: str) -> None:
    content = read_checkpoint(path)
    for tensor in content["model"].values():
        tensor.isfinite().all()
        repr(tensor)
    repr(state_dict_of(read_source(path, path), path))


# ----------------------------------------------------------------------------------------- .npz


def npy(array: np.ndarray, **header: object) -> bytes:
    """A .npy file, with other things in its header."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    if not header:
        return buffer.getvalue()
    described = {**np.lib.format.header_data_from_array_1_0(array), **header}
    start = io.BytesIO()
    text = repr(described).encode()
    start.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    return start.getvalue() + array.tobytes()


@functools.cache
def zip_bomb() -> bytes:
    """300 MB of zeros."""
    buffer = io.BytesIO()
    start = npy(np.zeros(0, np.int8), shape=(3 * 10**8,))
    file = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED)
    with file, file.open("scores.npy", "w") as part:
        part.write(start)
        for _ in range(300):
            part.write(bytes(10**6))
    return buffer.getvalue()


def make_npz(rng: random.Random) -> bytes:
    if rng.random() < 0.02:
        return zip_bomb()
    scores = np.linspace(0, 1, 6).reshape(2, 3)
    arrays = {
        "image_ids": np.arange(2),
        "scores": scores,
        "targets": (scores > 0.5).astype(np.int8),
        "label_names": np.array(["a", "b", "c"]),
    }
    parts = {f"{name}.npy": npy(array) for name, array in arrays.items()}
    name = rng.choice(list(arrays))
    drawn = rng.random()
    if drawn < 0.3:
        shape = tuple(rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 2, 3])))
        kind = rng.choice(["<f8", "|O", "<U1000000", "|V0", "|S9", "<M8", ">f4", "[('a','<f8')]"])
        parts[f"{name}.npy"] = npy(arrays[name], shape=shape, descr=kind)
    elif drawn < 0.4:
        parts[f"{name}.npy"] = npy(np.array([{}, None]))
    elif drawn < 0.5:
        parts[f"{name}.npy"] = make_pickle(rng)
    elif drawn < 0.7:
        parts[f"{name}.npy"] = mutate(parts[f"{name}.npy"], rng, make_pickle(rng))
    data = zipped(parts, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    return data if drawn < 0.7 else mutate(data, rng, parts[f"{name}.npy"])


def read_npz(path: str) -> None:
    refusals = []
    for read in (read_predictions, lambda path: read_matrix("--embeddings", path, 2)):
        try:
            repr(read(path))
        except InputError as error:
            refusals.append(error)
    if len(refusals) == 2:
        raise refusals[0]


# ---------------------------------------------------------------------------------- safetensors


def make_safetensors(rng: random.Random) -> bytes:
    data = save_safetensors({"a": torch.arange(6.0), "b": torch.zeros(2, 3, dtype=torch.int64)})
    if rng.random() < 0.4:
        return mutate(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    entry = header[rng.choice(["a", "b"])]
    for _ in range(rng.choice([1, 2])):
        key = rng.choice(["dtype", "shape", "data_offsets", "more"])
        entry[key] = rng.choice(
            [
                *("F32", "F64", "BF16", "BOOL", "C64", "X", None, {}, []),
                [rng.choice(NUMBERS) for _ in range(rng.choice([1, 2, 3]))],
            ]
        )
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 100_000
    length = len(text) if rng.random() < 0.8 else rng.choice(NUMBERS) % 2**64
    return struct.pack("<Q", length) + text + rest


def look_at_weights(path: str) -> None:
    for tensor in read_weights(path).values():
        repr(tensor)


# ----------------------------------------------------------------------------------------- ONNX


@functools.cache
def onnx_model() -> bytes:
    """A model of three labels, whose scores are the means of the channels."""
    import onnx
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "weight"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 3, 4, 6])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3]),
            helper.make_tensor("weight", TensorProto.FLOAT, [3], [1, 1, 1]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    preprocessing = {"size": [4, 6], "interpolation": "bilinear", "format": "RGB"}
    metadata = {"label_names": ["a", "b", "c"], "preprocessing": preprocessing, "made_by": {}}
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def draw_json(rng: random.Random, depth: int = 0) -> object:
    choice = rng.randrange(6 if depth > 3 else 9)
    if choice < 6:
        return rng.choice([*NUMBERS, "a", "size", None, True, 1.5, 1e300, "x" * 1000])
    parts = [draw_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return parts if choice < 8 else {str(part)[:20]: part for part in parts}


def make_onnx(rng: random.Random) -> bytes:
    import onnx

    if rng.random() < 0.4:
        return mutate(onnx_model(), rng)
    model = onnx.ModelProto()
    model.ParseFromString(onnx_model())
    entry = rng.choice(list(model.metadata_props))
    drawn = rng.random()
    if drawn < 0.5:
        preprocessing = json.loads(next(p.value for p in model.metadata_props if "size" in p.value))
        preprocessing[rng.choice(list(preprocessing))] = draw_json(rng)
        entry.value = json.dumps(rng.choice([preprocessing, draw_json(rng)]))
    elif drawn < 0.7:
        entry.value = rng.choice(["[" * 100_000, '{"size":' * 50_000, "9" * 9999, "NaN", ""])
    else:
        weight = model.graph.initializer[rng.randrange(2)]
        weight.dims[0] = rng.choice([n for n in NUMBERS if abs(n) < 2**63])
        if rng.random() < 0.5:
            weight.data_location = onnx.TensorProto.EXTERNAL
            location = rng.choice(["/etc/passwd", "../a", "file.onnx", "/dev/zero", "x/../../a"])
            weight.external_data.add(key="location", value=location)
            weight.external_data.add(key="length", value=str(rng.choice(NUMBERS)))
    return model.SerializeToString()


def read_onnx(path: str) -> None:
    repr(OnnxPredictor(path, device="cpu")(np.zeros((9, 9, 3), np.uint8)))


# ----------------------------------------------------------------------------------------- YAML

TAGS = [
    *("!!python/object/apply:os.system [touch canary]", "!!python/name:os.system", "!x y"),
    *("!!python/object/new:subprocess.Popen [[touch, canary]]", "!!binary aGk=", "!!set {a, b}"),
    "!!python/object/apply:builtins.eval [\"open('canary', 'w')\"]",
]


@functools.cache
def configs() -> List[bytes]:
    folder = Path(__file__).parents[2] / "configs"
    return [path.read_bytes() for path in sorted(folder.rglob("*.yaml"))]


def draw_yaml(rng: random.Random, depth: int = 0) -> str:
    """In one line."""
    choice = rng.randrange(6 if depth > 4 else 10)
    if choice < 3:
        value = rng.choice([*NUMBERS, "a", "yes", "1e999", "2020-99-01", "0x" + "f" * 99, "~"])
        return str(value)
    if choice == 3:
        return f"*a{rng.randrange(4)}"
    if choice == 4:
        return rng.choice(TAGS)
    if choice == 5:
        return rng.choice(["'", '"', "[", "}", "|", "%", "\t", "- -", "<<: *a0", "'x: 1'"])
    parts = [draw_yaml(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 10]))]
    anchor = f"&a{rng.randrange(4)} " if choice < 8 else ""
    if choice % 2:
        return f"{anchor}[{', '.join(parts)}]"
    return f"{anchor}{{{', '.join(f'k{i}: {part}' for i, part in enumerate(parts))}}}"


def make_yaml(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate(rng.choice(configs()), rng, rng.choice(configs()))
    keys = ["SEED", "MODEL", "MODEL: {WEIGHTS", "INPUT", "OUTPUT_DIR", "a", "_BASE_", "VERSION"]
    lines = [f"{rng.choice(keys)}: {draw_yaml(rng)}" for _ in range(rng.choice([1, 2, 5]))]
    if rng.random() < 0.2:
        bases = ["file.yaml", "[file.yaml, file.yaml]", "./x/../file.yaml", "/dev/zero", "/", "~"]
        lines.append(f"_BASE_: {rng.choice(bases)}")
    if rng.random() < 0.1:
        growth = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
        lines += ["l0: &l0 x", *growth]
    return "\n".join(lines).encode()


def read_yaml(path: str) -> None:
    repr(read_config(path))


KINDS = {
    "pickle": Kind(make_pickle, ".pkl", read_pickle),
    "proposals": Kind(lambda rng: make_pickle(rng, proposals), ".pkl", read_proposals),
    "pth": Kind(make_pth, ".pth", read_pth),
    "npz": Kind(make_npz, ".npz", read_npz),
    "safetensors": Kind(make_safetensors, ".safetensors", look_at_weights),
    "onnx": Kind(make_onnx, ".onnx", read_onnx),
    "yaml": Kind(make_yaml, ".yaml", read_yaml),
}


def add_code_files(subcommands, common) -> None:
    parser = subcommands.add_parser(
        "code",
        parents=[common],
        help="files that could carry code: pickles, .pth, .npz, safetensors, ONNX, YAML, proposals",
    )
    parser.add_argument("--trials", type=int, default=1000, help="of each kind (default 1000)")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="(default all)"
    )
    parser.set_defaults(run=run)
