"""Convert another project's weights to a checkpoint of this project.

FORMAT says what SOURCE is:
  torchvision  a ResNet: the backbone
  tresnet      a TResNet-M, -L or -XL, of its authors or of timm: the backbone
  detectron2   a Faster R-CNN of detectron2's model zoo: backbone and RPN of an IA-GCN model
  ml_gcn       the published ML-GCN: the whole model
  asl          the published ASL, on a TResNet: the whole model
  c_tran       C-Tran: the whole model
  csra         CSRA on a ResNet, of its authors or of mmpretrain: the whole model
  ml_decoder   the published ML-Decoder, on a TResNet: the whole model
  query2label  the published Query2Label, on a ResNet or TResNet: the whole model
  add_gcn      the published ADD-GCN: the whole model
  ssgrl        the published SSGRL: the whole model
  salgl        the published SALGL: the whole model
  tdrg         the published TDRG: the whole model
A whole model is saved with its config and its labels, in the order of the data set, and can be
evaluated; the other formats give parts, from which a model is trained. The config keys that the
weights need are printed. Unmatched, misshaped and missing tensors raise an error; with
--allow-partial, the tensors that match are saved.

Of SOURCE, tensors, numbers, strings and containers are read; pickled code is never executed.

Examples:
  ML-GCN's COCO checkpoint, whose labels are sorted by name, with its own label embeddings:
    tools/convert_checkpoint.py coco_checkpoint.pth.tar --format ml_gcn --output ml_gcn.pth \\
        --embeddings coco_glove_word2vec.pkl
  ASL's:
    tools/convert_checkpoint.py MS_COCO_TRresNet_L_448_86.6.pth --format asl --output asl.pth
  evaluate it:
    tools/train_net.py --config-file configs/COCO/asl_tresnet_l.yaml --eval-only \\
        MODEL.WEIGHTS asl.pth
  a Faster R-CNN of the zoo:
    tools/convert_checkpoint.py model_final_298dad.pkl --format detectron2 --output c4.pth \\
        --config-file configs/VOC/ia_gcn_R_101.yaml MODEL.RPN.CONV_DIMS [-1]
"""

from __future__ import annotations

from functools import partial
from typing import Sequence

from ..checkpoint.conversion import CONVERTERS, SUFFIX, convert_checkpoint
from .common import add_import_option, make_parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a .pth file, whatever its name, or .pkl")
    parser.add_argument("--format", required=True, choices=list(CONVERTERS), help="what it is")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=f"write there ({SUFFIX} file)"
    )
    parser.add_argument(
        "--labels",
        default="",
        metavar="LABELS",
        help="of a whole model: coco, voc, or a file with a name a line, in the source's order "
        "(what the file says itself; or by their number, 80 or 20)",
    )
    parser.add_argument(
        "--embeddings",
        default="",
        metavar="FILE",
        help="of ml_gcn and ssgrl, and of ml_decoder if labels share a classifier: a .pkl, .npy or "
        ".npz with a row per label, in the source's order (by name from "
        "MODEL.LABEL_EMBEDDINGS.SOURCE)",
    )
    parser.add_argument(
        "--graph", default="", metavar="FILE", help="of ssgrl: such a file with the label graph"
    )
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the model")
    parser.add_argument(
        "--allow-partial", action="store_true", help="take the tensors that match, if not all do"
    )
    add_import_option(parser)
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between SOURCE and the keys.
    args = parser.parse_intermixed_args(argv)
    report = partial(print, flush=True)
    return run("convert_checkpoint", lambda: convert_checkpoint(**vars(args), report=report))
