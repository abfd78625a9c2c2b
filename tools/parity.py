#!/usr/bin/env python3
"""Compare a model with the code of its authors: the same weights, the same images.

FOLDER is a clone of their repository, whose code is executed: look at it first. Their networks get
random weights, with statistics of batch norms that are not trivial. What they would save is
converted as tools/convert_checkpoint.py does, and read again as tools/predict.py does. Then, in
evaluation, on the same two images:

  logits      in float32: the largest difference, by label, as a share of their deviation;
  gradients   of the BCE, in their parameters, through our converter and model, in float64: the
              largest relative difference of a tensor's. Dropout is off;
  time        of a forward pass, the median of several, in turn.

It prints a row of docs/parity.md for each network; the exit status is 1 if logits differ by more
than 1e-4 of their deviation, or gradients by more than 1e-3.

Examples:
  git clone https://github.com/Alibaba-MIIL/ML_Decoder /tmp/ML_Decoder
  tools/parity.py ml_decoder /tmp/ML_Decoder
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from typing import Callable, Dict, List, NamedTuple, Tuple

import parities
import torch
import torch.nn.functional as F
from parities import Case, randomize
from torch import nn

from ia_gcn import MultiLabelPredictor
from ia_gcn.checkpoint.conversion import CONVERTERS, Request, convert_checkpoint
from ia_gcn.checkpoint.matching import match_tensors
from ia_gcn.checkpoint.source import state_dict_of
from ia_gcn.errors import InputError

COLUMNS = (
    "format, network",
    "repository, commit",
    "replaced to run it",
    "logits",
    "gradients",
    "label order",
    "theirs, ours (s)",
)

LOGITS_TOLERANCE, GRADIENTS_TOLERANCE = 1e-4, 1e-3


class Parity(NamedTuple):
    """How far the two are from each other."""

    logits: float
    """The largest difference, as a share of their deviation."""
    deviation: float
    """Of the authors' logits."""
    gradients: float
    """The largest of a tensor's: norm of the difference as a share of the norm."""
    reordered: bool
    """Whether our model has the labels in another order."""
    seconds: List[float]
    """Of a forward pass: theirs and ours."""

    @property
    def passed(self) -> bool:
        return self.logits <= LOGITS_TOLERANCE and self.gradients <= GRADIENTS_TOLERANCE


def compare(format: str, case: Case, rounds: int = 3) -> Parity:
    """Convert a case's network, and compare the model with it."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (2, 3, case.size, case.size), generator=generator)
    images = images.to(torch.uint8)
    states = [] if case.label_states is None else [case.label_states]
    inputs = [case.prepare(images.float()), *states]
    randomize(case.network, inputs)
    with tempfile.TemporaryDirectory() as folder:
        source, converted = f"{folder}/source.pth", f"{folder}/converted.pth"
        torch.save(case.checkpoint(case.network.state_dict()), source)
        convert_checkpoint(source, format, converted, **case.arguments)
        predictor = MultiLabelPredictor(converted, device="cpu", optimize=False)
    order = [case.labels.index(name) for name in predictor.label_names]
    samples = [{"image": image} for image in images]
    if case.label_states is not None:
        for sample, known in zip(samples, case.label_states):
            sample["label_states"] = known[order]

    theirs, ours = Outputs(case.network), OurOutputs(predictor.model)
    with torch.no_grad():
        expected, found = theirs(*inputs), ours(samples)
        seconds = timed([lambda: theirs(*inputs), lambda: ours(samples)], rounds)
    theirs.double()
    to_float64(predictor)
    inputs = [case.prepare(images.double()), *states]
    deviation = float(expected["logits"].std())
    differences = [
        (found[name] - logits[:, order]).abs().max() / logits.std()
        for name, logits in expected.items()
    ]
    return Parity(
        float(max(differences)),
        deviation,
        compare_gradients(format, case, [theirs, inputs], [ours, samples], order),
        order != sorted(order),
        seconds,
    )


def to_float64(predictor: MultiLabelPredictor) -> None:
    """Its model, with the mean and deviation of pixels as exact as in its config.

    In float32, a ReLU's input near 0 may have another sign than in the authors' network, and then
    all gradients below it differ.
    """
    predictor.model.double()
    keys = predictor.cfg.MODEL
    for name, values in (("pixel_mean", keys.PIXEL_MEAN), ("pixel_std", keys.PIXEL_STD)):
        buffer = getattr(predictor.model, name)
        buffer.copy_(buffer.new_tensor(values).view_as(buffer))


class Outputs(nn.Module):
    """The outputs of the authors' network by name."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> Dict[str, torch.Tensor]:
        outputs = self.network(*inputs)
        return outputs if isinstance(outputs, dict) else {"logits": outputs}


class OurOutputs(nn.Module):
    """A recogniser's logits and auxiliary logits by name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, samples: List[Dict]) -> Dict[str, torch.Tensor]:
        features, _ = self.model.extract_features(samples)
        outputs, _ = self.model.apply_heads(features)
        return {"logits": outputs["logits"], **outputs.get("aux_logits", {})}


def compare_gradients(
    format: str,
    case: Case,
    theirs: Tuple[Outputs, List[torch.Tensor]],
    ours: Tuple[OurOutputs, List[Dict]],
    order: List[int],
) -> float:
    """The largest relative difference of the gradient in a parameter of the authors' network.

    Ours goes through the converter, which is a function of their tensors.

    Args:
        theirs, ours: the module, and what it is given, in float64.
    """
    (network, inputs), (model, samples) = theirs, ours
    trained = {n: p for n, p in case.network.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(2, (len(samples), len(order)), generator=generator).double()
    outputs = network(*inputs)
    gradients = torch.autograd.grad(bce(outputs, targets), trained.values(), allow_unused=True)
    expected = {name: x for name, x in zip(trained, gradients) if x is not None}

    # The parameters themselves, of which our outputs then are functions, too.
    content = case.checkpoint(case.network.state_dict(keep_vars=True))
    arguments = {"config_file": "", "opts": (), "imports": (), "labels": "", "embeddings": ""}
    request = Request("the network", format, **{**arguments, **case.arguments})
    conversion = CONVERTERS[format](state_dict_of(content, request.shown), content, request)
    taken = match_tensors(conversion.tensors, conversion.expected).taken
    tensors = {
        f"model.{name}": x.double() if x.is_floating_point() else x for name, x in taken.items()
    }
    found = torch.func.functional_call(model, tensors, (samples,))
    found = {name: found[name] for name in outputs}
    gradients = torch.autograd.grad(
        bce(found, targets[:, order]), trained.values(), allow_unused=True, materialize_grads=True
    )
    # Of a tensor that has no influence, such as the bias of keys, there is rounding alone.
    least = 1e-6 * max(float(gradient.norm()) for gradient in expected.values())
    differences = [
        float((gradient - expected[name]).norm() / expected[name].norm())
        for name, gradient in zip(trained, gradients)
        if name in expected and expected[name].norm() > least
    ]
    return max(differences)


def bce(outputs: Dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """The sum over the outputs."""
    losses = [F.binary_cross_entropy_with_logits(x, targets) for x in outputs.values()]
    return torch.stack(losses).sum()


def timed(calls: List[Callable], rounds: int) -> List[float]:
    """The median seconds of each call, in turn."""
    seconds = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return list(map(median, seconds))


def commit_of(folder: Path) -> str:
    """The commit that a clone is at, short; "unknown" of another folder."""
    command = ["git", "-C", str(folder), "rev-parse", "--short=10", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def table_row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Returns the exit status."""
    names = sorted(path.stem for path in Path(parities.__file__).parent.glob("[!_]*.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", choices=names, help="of tools/convert_checkpoint.py")
    parser.add_argument("folder", type=Path, help="a clone of the authors' repository")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed (3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        print(f"parity: {args.folder}: no such folder", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    module = importlib.import_module(f"parities.{args.format}")
    where = f"{module.REPOSITORY.removeprefix('https://')} {commit_of(args.folder)}"
    out = sys.stdout
    print(table_row(COLUMNS), table_row(["---"] * len(COLUMNS)), sep="\n", file=out, flush=True)
    passed = True
    try:
        # What the authors' code prints is no part of the table.
        with redirect_stdout(sys.stderr):
            for case in module.cases(args.folder.resolve()):
                parity = compare(args.format, case, args.rounds)
                cells = [
                    f"{args.format}, {case.name}",
                    where,
                    module.REPLACED or "nothing",
                    f"{parity.logits:.1e} of {parity.deviation:.2g}",
                    f"{parity.gradients:.1e}",
                    "put into the data set's" if parity.reordered else "the data set's",
                    ", ".join(f"{seconds:.2f}" for seconds in parity.seconds),
                ]
                print(table_row(cells), file=out, flush=True)
                passed &= parity.passed
    except InputError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
