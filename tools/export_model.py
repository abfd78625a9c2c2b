#!/usr/bin/env python3
"""Write a trained model as one file that runs without ia_gcn and detectron2: ONNX or torch.export.

The input is `images`, (B, 3, H, W) uint8 at INPUT.IMAGE_SIZE in INPUT.FORMAT; the normalisation is
part of the model. Its outputs are
  scores (B, C): probabilities; and logits (B, C)
and of a model with a region branch, on a batch of one, for N regions, best first by objectness
  boxes (N, 4): x0, y0, x1, y1 in pixels of the input; weights (N,); region_scores (N, C);
  valid (N,): which regions were found, the first ones; the others are zeros.
Of a model without one, a batch may have any number of images.

What was written is read again and run, by onnxruntime or torch, on images: its logits have to be
the model's within 1e-4, or there is no file. Label names, preprocessing and what made it are in
ONNX's metadata as JSON, by the names label_names, preprocessing and made_by; of torch.export they
are in the extra file metadata.json.

It takes torch 2.6 or later, and ONNX the packages of pip install 'ia_gcn[export]'. tools/predict.py
runs an ONNX file, with onnxruntime and without torch and detectron2. torch.export.load unpickles
what a file asks it to: load no stranger's; with a region branch, import torchvision before.

Examples:
  ONNX, checked on two photos that come with scikit-learn:
    tools/export_model.py --weights output/demo/model_best.pth --format onnx --output demo.onnx
  torch.export, checked on images of your own:
    tools/export_model.py --weights model.pth --format torch_export --output model.pt2 \\
        --check a.jpg b.jpg
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager
from typing import Callable, Dict, Iterator, List, Sequence

import numpy as np
import torch
from sklearn.datasets import load_sample_images

from ia_gcn import MultiLabelPredictor
from ia_gcn.data import UnreadableImage
from ia_gcn.errors import InputError
from ia_gcn.export import describe, exportable, to_onnx, trace
from ia_gcn.inference import OnnxPredictor

# Largest difference of a logit.
TOLERANCE = 1e-4
# By format.
ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2"}


def export(args: argparse.Namespace) -> float:
    """Returns the largest difference of a logit from the model's."""
    if not args.output.endswith(ENDINGS[args.format]):
        raise InputError(f"--output {args.output}: the name must end in {ENDINGS[args.format]}")
    predictor = MultiLabelPredictor(args.weights, config_file=args.config_file, device="cpu")
    images = args.check or load_sample_images().images
    samples = [predictor.view(image) for image in images]
    content = describe(predictor.cfg, predictor.label_names)
    recognizer = exportable(predictor.model, predictor.cfg.INPUT.IMAGE_SIZE)

    folder = os.path.dirname(args.output) or "."
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as temporary:
        path = os.path.join(temporary, f"model{ENDINGS[args.format]}")
        run = WRITERS[args.format](recognizer, content, args.opset, path)
        difference = compare(predictor, recognizer.dynamic_batch, samples, run)
        if not difference <= TOLERANCE:
            raise InputError(
                f"{args.output} is not written: its logits differ from the model's by up to "
                f"{difference:.1e}, more than {TOLERANCE:.0e}"
            )
        os.replace(path, args.output)
    return difference


def write_onnx(recognizer, content: Dict, opset: int | None, path: str) -> Callable:
    """Write the file, and return what runs it: images (B, 3, H, W) to logits (B, C), arrays."""
    onnx = to_onnx(trace(recognizer), recognizer.outputs, opset)
    for key, value in content.items():
        onnx.model.metadata_props[key] = json.dumps(value, ensure_ascii=False)
    onnx.save(path, external_data=False)
    reader = OnnxPredictor(path, device="cpu")
    return lambda images: reader.run(images)["logits"]


def write_torch_export(recognizer, content: Dict, opset: None, path: str) -> Callable:
    """The same."""
    metadata = json.dumps(content, ensure_ascii=False)
    torch.export.save(trace(recognizer), path, extra_files={"metadata.json": metadata})
    module = torch.export.load(path).module()
    return lambda images: module(torch.from_numpy(images))["logits"].numpy()


WRITERS = {"onnx": write_onnx, "torch_export": write_torch_export}


@torch.no_grad()
def compare(
    predictor: MultiLabelPredictor, any_batch: bool, samples: Sequence[Dict], run: Callable
) -> float:
    """The largest difference between logits of `run` and of the predictor's model; NaN for NaN."""
    expected = [predictor.model([sample])[0]["logits"].numpy() for sample in samples]
    images = np.stack([sample["image"].numpy() for sample in samples])
    found: List[np.ndarray] = [run(images[i : i + 1])[0] for i in range(len(images))]
    if any_batch:
        expected, found = expected + expected, found + list(run(images))
    return float(np.abs(np.subtract(found, expected)).max())


@contextmanager
def silence() -> Iterator[None]:
    """What torch and onnxscript warn of and log, down to their stack traces, is for themselves."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="instead of the checkpoint's own config"
    )
    parser.add_argument("--format", required=True, choices=WRITERS)
    parser.add_argument("--output", required=True, metavar="FILE", help="a .onnx or a .pt2 file")
    parser.add_argument(
        "--opset", type=int, metavar="N", help="of ONNX's operators, from 18 on (torch's choice)"
    )
    parser.add_argument(
        "--check", nargs="+", metavar="IMAGE", help="compare on these (scikit-learn's samples)"
    )
    args = parser.parse_args()
    if args.opset is not None and args.format != "onnx":
        parser.error("--opset: only ONNX has operator sets")
    return args


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    args = parse_arguments()
    try:
        with silence():
            difference = export(args)
    except (InputError, OSError, UnreadableImage) as error:
        print(f"export_model: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: its logits are the model's within {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
