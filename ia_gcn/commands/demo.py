"""A page to try a trained model: drop an image, see its labels, regions and label graph.

Needs gradio: pip install gradio. The page is at http://127.0.0.1:7860, and only this machine can
reach it unless --host is given. It loads nothing from other machines. Uploaded images are kept in a
folder that only you can read, and are deleted after an hour and at the end. For an IA-GCN it shows
the figure of tools/visualize_regions.py; for an ML-GCN or ML-AGCN, the statistical label graph of
the image's likeliest labels. For a model that takes known labels, such as C-Tran, a click on a
label says that it is in the image, a second one that it is not: the other labels follow.

Examples:
  tools/demo_app.py --weights output/demo/model_best.pth
  with images to choose from, for all who can reach this machine:
    tools/demo_app.py --weights model.pth --examples photos --host 0.0.0.0
"""

from __future__ import annotations

import os
import signal
import sys
from typing import List, Sequence

from ..data.dataset_mapper import read_image
from ..demo import build_page, launch, own_uploads
from ..demo.page import import_gradio
from ..errors import InputError
from ..extensions import import_extensions
from ..inference import MultiLabelPredictor, find_images
from ..io.images import UnreadableImage
from ..memory import share_freed_memory
from ..processes import STOP_SIGNALS
from .common import add_import_option, make_parser, run


def find_examples(folder: str) -> List[str]:
    """The images in a folder and below; those that can't be read are left out and named.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise InputError(f"--examples {folder}: no such folder")
    readable = []
    for file in find_images(folder):
        try:
            read_image(file)
        except UnreadableImage as error:
            if file != folder:
                print(f"demo_app: --examples: {error}: left out", file=sys.stderr)
        else:
            readable.append(file)
    if not readable:
        raise InputError(f"--examples {folder}: there is no image in this folder")
    return readable


def port(text: str) -> int:
    """An argparse type."""
    if not 0 < int(text) < 2**16:
        raise ValueError
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--weights", required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="instead of the checkpoint's own config"
    )
    parser.add_argument("--port", type=port, default=7860, metavar="N", help="(7860)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (127.0.0.1)"
    )
    parser.add_argument("--examples", metavar="FOLDER", help="of images to choose from")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    add_import_option(parser)
    args = parser.parse_args(argv)

    def work() -> None:
        # gradio makes folders as soon as it is imported.
        with own_uploads():
            import_gradio()
            share_freed_memory()
            import_extensions(args.imports)
            examples = find_examples(args.examples) if args.examples else []
            predictor = MultiLabelPredictor(
                args.weights, config_file=args.config_file, device=args.device
            )
            page = build_page(predictor, examples)
            address = launch(page, args.host, args.port)
            print(f"demo_app: {address} (Ctrl+C ends it)", flush=True)
            page.block_thread()

    # The end of the terminal, too, is to remove what was uploaded; nohup has it ignored.
    return run("demo_app", work, signals=(*STOP_SIGNALS, signal.SIGHUP))
