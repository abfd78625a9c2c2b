#!/usr/bin/env python3
"""A page to try a trained model: drop an image, see its labels, regions and label graph.

Needs gradio: pip install gradio. The page is at http://127.0.0.1:7860, for this machine alone
unless --host says else, and asks nothing of any other; what was dropped is deleted at the end. For
an IA-GCN it shows what tools/visualize_regions.py draws; for an ML-GCN or ML-AGCN, the statistical
label graph of the image's likeliest labels.

Examples:
  tools/demo_app.py --weights output/demo/model_best.pth
  with images to choose from, for everybody who reaches this machine:
    tools/demo_app.py --weights model.pth --examples photos --host 0.0.0.0
"""

from __future__ import annotations

import argparse
import html
import io
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from PIL import Image
from predict import images_below
from visualize_regions import recognize

from ia_gcn import MultiLabelPredictor
from ia_gcn.data import UnreadableImage
from ia_gcn.errors import InputError
from ia_gcn.inference import Prediction
from ia_gcn.modeling import LabelGraph
from ia_gcn.visualization import draw_recognition, plot_label_graph
from ia_gcn.visualization.regions import MAX_LABELS

if TYPE_CHECKING:
    import gradio

# Drawn of an image, the best by objectness.
MAX_REGIONS = 10
# In seconds; how often, and from what age on, the images that were dropped are deleted.
CLEAN_UP = (3600, 3600)
# gradio puts the title and the buttons of an image on it.
CSS = "#figure img { padding-top: 2.5rem }"


class Description(NamedTuple):
    """What the page shows of an image."""

    labels: List[Tuple[str, float]]
    """Those from the threshold on with their probabilities, the highest first."""
    figure: Image.Image | None
    """RGB, of the regions and the label graph; None of a model without a label graph."""


def describe(predictor: MultiLabelPredictor, image: str, threshold: float) -> Description:
    """
    Args:
        image: a file.
        threshold: the least probability of a label.
    Raises:
        UnreadableImage: the file is no image.
        InputError: what the model says is not finite.
    """
    model = predictor.model
    graph = model.label_graph
    if model.has_regions:
        sample = predictor.view(image)
        # None of the labels is known to be there.
        sample["labels"] = torch.zeros(len(predictor.label_names))
        recognition = recognize(model, lambda record: sample, {"file_name": image})
        scores = recognition.scores["fused"]
        if not np.isfinite(scores).all():
            raise InputError("what the model says of the image is not finite")
        content = io.BytesIO()
        draw_recognition(recognition, predictor.label_names, threshold, MAX_REGIONS, content)
        figure = read_png(content)
    else:
        scores = predictor(image).scores
        figure = draw_graph(graph, scores, predictor.label_names) if graph is not None else None
    return Description(Prediction(predictor.label_names, scores, None).above(threshold), figure)


def draw_graph(graph: LabelGraph, scores: np.ndarray, label_names: List[str]) -> Image.Image:
    """P(j|i) and the statistical LCM of the labels with the highest of the scores (C,)."""
    shown = np.argsort(-scores, kind="stable")[:MAX_LABELS]
    part = np.ix_(shown, shown)
    counts, pairs, lcm = (
        to_numpy(values) for values in (graph.label_counts, graph.pair_counts, graph.lcm)
    )
    conditional = pairs / np.maximum(counts, 1)[:, None]
    content = io.BytesIO()
    plot_label_graph(conditional[part], lcm[part], [label_names[i] for i in shown], content)
    return read_png(content)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def read_png(content: io.BytesIO) -> Image.Image:
    with Image.open(content) as image:
        return image.convert("RGB")


def build_page(predictor: MultiLabelPredictor, examples: List[str]) -> gradio.Blocks:
    """The page, also to be asked by programs, at /describe."""
    gr = import_gradio()
    names = predictor.label_names

    def run(image: Dict | None, threshold: float):
        file = image and image["path"]
        if not file:
            return None, None
        # gradio lets a program name any file of this machine.
        if not Path(file).resolve().is_relative_to(uploads):
            raise gr.Error("this image was not dropped here", print_exception=False)
        try:
            labels, figure = describe(predictor, file, threshold)
        except UnreadableImage as error:
            # Where gradio put the file is nobody's business.
            name = Path(file).name
            message = f"{name}: {error.reason.replace(file, name)}"
        except InputError as error:
            message = str(error)
        else:
            return dict(labels) or f"none of {len(names)} at {threshold:.0%}", figure
        # gradio takes it for HTML.
        raise gr.Error(html.escape(message), print_exception=False)

    with gr.Blocks(title="ia_gcn", analytics_enabled=False, delete_cache=CLEAN_UP) as page:
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    sources=["upload", "clipboard"],
                    label="Image",
                    buttons=["fullscreen"],
                )
                uploads = Path(image.GRADIO_CACHE).resolve()
                threshold = gr.Slider(
                    0, 1, predictor.cfg.TEST.THRESHOLD, step=0.01, label="Least probability"
                )
                if examples:
                    gr.Examples(examples, image, cache_examples=False)
            labels = gr.Label(label="Labels", show_heading=False)
        title = figure_title(predictor)
        figure = gr.Image(
            label=title,
            visible=bool(title),
            elem_id="figure",
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
        )
        gr.on(
            [image.change, threshold.release],
            run,
            [image, threshold],
            [labels, figure],
            api_name="describe",
            # gradio would read the file, fail with a stack trace, and convert what it can read.
            preprocess=False,
        )
    return page


def figure_title(predictor: MultiLabelPredictor) -> str:
    """Of what `describe` draws; "" if it draws nothing."""
    if predictor.model.has_regions:
        return "Regions, scores and label graph of this image"
    if predictor.model.label_graph is not None:
        return "Label graph of the training set, of this image's likeliest labels"
    return ""


def import_gradio():
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise InputError(
            f'{error}: the page needs pip install "ia_gcn[demo]" or pip install gradio'
        ) from None
    return gradio


def launch(page: gradio.Blocks, host: str, port: int) -> str:
    """Serve a page from other threads, until it is closed: its address."""
    # gradio says of any failure that the port is taken.
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}") from None
    # gradio asks its own page whether it is there, which a proxy would not know.
    os.environ.update(NO_PROXY="*", no_proxy="*")
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        # The browser would keep what was dropped.
        run_history=False,
        footer_links=[],
        css=CSS,
        prevent_thread_lock=True,
        quiet=True,
    )
    return address


def find_examples(folder: str) -> List[str]:
    if not os.path.isdir(folder):
        raise InputError(f"--examples {folder}: no such folder")
    files = images_below(folder)
    if not files:
        raise InputError(f"--examples {folder}: there is no image in this folder")
    return files


def port(text: str) -> int:
    if not 0 < int(text) < 2**16:
        raise ValueError
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return parser.parse_args()


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    args = parse_arguments()
    try:
        import_gradio()
        examples = find_examples(args.examples) if args.examples else []
        predictor = MultiLabelPredictor(
            args.weights, config_file=args.config_file, device=args.device
        )
        page = build_page(predictor, examples)
        print(f"demo_app: {launch(page, args.host, args.port)} (Ctrl+C ends it)", flush=True)
        page.block_thread()
    except (InputError, OSError) as error:
        print(f"demo_app: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
