"""Write a trained model as one file that runs without ia_gcn and detectron2: ONNX or torch.export.

The input is `images`, (B, 3, H, W) uint8 at INPUT.IMAGE_SIZE in INPUT.FORMAT; the normalisation is
part of the model. A model that takes known labels, such as C-Tran, has a second one,
`label_states`, (B, C) int8: 1 for a label that is known to be there, 0 not to be there, -1 for one
that is unknown. The outputs are
  scores (B, C): probabilities; and logits (B, C)
and of a model with a region branch, on a batch of one, for N regions, best first by objectness
  boxes (N, 4): x0, y0, x1, y1 in pixels of the input; weights (N,); region_scores (N, C);
  valid (N,): which regions were found, the first ones; the others are zeros.
Of a model without one, a batch may have any number of images.

Before saving, the file is read again and run, by onnxruntime or torch, on image files, with its own
preprocessing: its logits must equal the model's within 1e-4, or there is no file. Label names,
preprocessing and origin are in ONNX's metadata as JSON, by the names label_names, preprocessing and
made_by, and label_states says what these are where there are some; with torch.export, all of it is
in the extra file metadata.json.

With --int8, the backbone of an ONNX file computes in int8: a smaller file, which is sooner on
most CPUs. IMAGE is a file, a folder or a pattern, as for tools/predict.py; a few hundred images
such as the model will get. Four fifths of them calibrate, which means that they say what range of
values each layer needs; logits of the others are compared with those in float32. Their difference
is printed; if they correlate by less than 0.95 over the images, there is no file.

ONNX needs pip install 'ia_gcn[export]'. tools/predict.py runs an ONNX file with onnxruntime,
without torch and detectron2. torch.export.load unpickles what a file contains: only load files that
you trust; for a model with regions, import torchvision before.

Examples:
  ONNX, checked on two photos that come with scikit-learn:
    tools/export_model.py --weights output/demo/model_best.pth --format onnx --output demo.onnx
  torch.export, checked on images of your own:
    tools/export_model.py --weights model.pth --format torch_export --output model.pt2 \\
        --check a.jpg b.jpg
  ONNX in int8, calibrated on the images of a folder:
    tools/export_model.py --weights model.pth --format onnx --output int8.onnx --int8 train/
"""

from __future__ import annotations

import argparse
from typing import Sequence

from ..export import export_int8, export_model
from ..export.export import WRITERS
from ..extensions import import_extensions
from ..inference import MultiLabelPredictor, find_images
from .common import add_import_option, make_parser, run


def export(args: argparse.Namespace) -> None:
    import_extensions(args.imports)
    predictor = MultiLabelPredictor(args.weights, config_file=args.config_file, device="cpu")
    options = {} if args.opset is None else {"opset": args.opset}
    if args.int8:
        images = [file for name in args.int8 for file in find_images(name)]
        found = export_int8(predictor, args.output, images, check=args.check, **options)
        print(
            f"{args.output}: on images that did not calibrate it, its logits differ from the "
            f"model's by {found.mean:.2g} on average, {found.max:.2g} at most, and correlate with "
            f"them by {found.correlation:.4f}"
        )
    else:
        found = export_model(predictor, args.output, args.format, check=args.check, **options)
        print(f"{args.output}: its logits equal the model's within {found:.1e}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
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
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="compare on these files (scikit-learn's sample photos)",
    )
    parser.add_argument(
        "--int8",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="ONNX in int8, calibrated and compared on these files, folders or patterns",
    )
    add_import_option(parser)
    args = parser.parse_args(argv)
    if args.opset is not None and args.format != "onnx":
        parser.error("--opset: only ONNX has operator sets")
    if args.int8 and args.format != "onnx":
        parser.error("--int8: only with --format onnx")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; invalid user input is reported in one line."""
    args = parse_arguments(argv)
    return run("export", lambda: export(args))
