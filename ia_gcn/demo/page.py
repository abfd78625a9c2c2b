"""The page itself: gradio's components, and serving them."""

from __future__ import annotations

import html
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Sequence

from ..errors import InputError
from ..inference import MultiLabelPredictor
from ..io.images import UnreadableImage
from ..io.private_folder import private_folder
from .description import describe_image, describe_model, figure_title

if TYPE_CHECKING:
    import gradio

TITLE = "Labels in an image"
# gradio's, of the folder where it keeps uploads.
UPLOADS = "GRADIO_TEMP_DIR"
# In seconds: how often uploaded images are deleted, and from which age on.
CLEAN_UP = (3600, 3600)
# A wide screen has the examples below the image and beside the result; a narrow one, at the end.
CSS = """
#content { display: grid; grid-template: "image result" auto "examples result" 1fr
  "figure figure" auto / minmax(0, 1fr) minmax(0, 1fr); }
#image { grid-area: image } #result { grid-area: result }
#figure { grid-area: figure } #examples { grid-area: examples }
@media (max-width: 640px) {
  #content { grid-template: "image" "result" "figure" "examples" / minmax(0, 1fr); }
}
/* gradio puts the title and the buttons of an image on it. */
#figure img { padding-top: 2.5rem }
"""


def build_page(predictor: MultiLabelPredictor, examples: Sequence[str] = ()) -> gradio.Blocks:
    """The page, and its API for programs at /describe.

    Args:
        predictor: of the model.
        examples: files of images to choose from, which can be read.
    Raises:
        InputError: gradio is not installed.
    """
    gr = import_gradio()
    names = predictor.label_names

    def run(
        image: Dict | None,
        threshold: float,
        present: Sequence[str] = (),
        absent: Sequence[str] = (),
    ):
        file = image and image["path"]
        if not file:
            return None, None
        # Through gradio, a program can name any file of this machine.
        if not Path(file).resolve().is_relative_to(uploads):
            raise gr.Error("this image was not uploaded here", print_exception=False)
        try:
            known = known_of(present, absent)
            labels, figure = describe_image(predictor, file, threshold, known)
        except UnreadableImage as error:
            # Do not show where gradio stored the file, nor what it made of its name.
            name = os.path.basename(str(image.get("orig_name") or file))
            message = f"{name}: {error.reason.replace(file, name)}"
        except InputError as error:
            message = str(error)
        else:
            return dict(labels) or f"none of {len(names)} at {threshold:.0%}", figure
        # gradio shows it as HTML.
        raise gr.Error(html.escape(message), print_exception=False)

    model = os.path.basename(predictor.cfg.MODEL.WEIGHTS)
    with gr.Blocks(
        title=f"{model}: {TITLE}", analytics_enabled=False, delete_cache=CLEAN_UP
    ) as page:
        gr.HTML(heading(model, describe_model(predictor)))
        with gr.Column(elem_id="content"):
            with gr.Column(elem_id="image"):
                image = gr.Image(
                    sources=["upload", "clipboard"],
                    label="Image",
                    buttons=["fullscreen"],
                )
                uploads = Path(image.GRADIO_CACHE).resolve()
                threshold = gr.Slider(
                    0, 1, predictor.cfg.TEST.THRESHOLD, step=0.01, label="Least probability"
                )
            with gr.Column(elem_id="result"):
                labels = gr.Label(label="Labels", show_heading=False)
                known = add_known(labels, names) if predictor.takes_known_labels else []
            title = figure_title(predictor)
            figure = gr.Image(
                label=title,
                visible=bool(title),
                elem_id="figure",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            if examples:
                with gr.Column(elem_id="examples"):
                    gr.Examples(list(examples), image, cache_examples=False)
        if known:
            # What is known of one image is not known of the next one.
            image.change(None, None, known, js="() => [[], []]")
        gr.on(
            [image.change, threshold.release, *(labels.change for labels in known)],
            run,
            [image, threshold, *known],
            [labels, figure],
            api_name="describe",
            # gradio would read the file, fail with a stack trace, and convert what it can read.
            preprocess=False,
            # matplotlib, which draws the figures, is not made for several threads.
            concurrency_limit=1,
            # Of what changes while the model runs, the last change is not lost.
            trigger_mode="always_last",
        )
    return page


def add_known(labels: gradio.Label, names: List[str]) -> List[gradio.Dropdown]:
    """Add the lists of labels that are known to be in the image, and not to be in it.

    A click on a label puts it into the first list, from there into the second one, and from there
    out of it.
    """
    gr = import_gradio()

    def click(present, absent, event):
        name = event.value
        if name in present:
            return [x for x in present if x != name], [*absent, name]
        if name in absent:
            return present, [x for x in absent if x != name]
        return [*present, name], absent

    # By its type, gradio knows which argument is the click; here a name would be text to it.
    click.__annotations__ = {"event": gr.SelectData}
    known = [
        gr.Dropdown(names, value=[], multiselect=True, label=f"Known {where} the image", info=info)
        for where, info in [("in", "Click on a label above, or choose"), ("not in", None)]
    ]
    labels.select(click, known, known, api_visibility="private")
    return known


def known_of(present: Sequence[str], absent: Sequence[str]) -> Dict[str, bool]:
    """The labels of the two lists as a predictor takes them.

    Raises:
        InputError: one is in both.
    """
    both = sorted(set(present) & set(absent))
    if both:
        raise InputError(f"{both[0]}: known to be in the image, or not in it?")
    return {**dict.fromkeys(present, True), **dict.fromkeys(absent, False)}


@contextmanager
def own_uploads() -> Iterator[None]:
    """Pages that are built meanwhile keep uploads in a folder that only this user can read.

    It is in the folder that GRADIO_TEMP_DIR names, or else in the system's for temporary files, and
    is removed at the end; so are those that pages left behind whose process was killed.

    Raises:
        OSError: it can't be made.
    """
    before = os.environ.get(UPLOADS)
    with private_folder("ia_gcn_demo_", before) as folder:
        os.environ[UPLOADS] = str(folder)
        try:
            yield
        finally:
            if before is None:
                del os.environ[UPLOADS]
            else:
                os.environ[UPLOADS] = before


def heading(model: str, lines: Sequence[str]) -> str:
    """The title, the model's name and lines about it, as HTML."""
    about = "<br>".join(map(html.escape, lines))
    return f"<h1>{TITLE}</h1><p><b>{html.escape(model)}</b><br>{about}</p>"


def import_gradio():
    """The module.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise InputError(
            f'{error}: the page needs pip install "ia_gcn[demo]" or pip install gradio'
        ) from None
    return gradio


def launch(page: gradio.Blocks, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serve a page from other threads, until it is closed.

    Args:
        page: see `build_page`.
        host: the address to listen on.
        port: the port.
    Returns:
        the page's address.
    Raises:
        InputError: the address or the port can't be used.
    """
    # gradio reports every failure as a port in use.
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}") from None
    # gradio requests its own page, which must not go through a proxy.
    os.environ.update(NO_PROXY="*", no_proxy="*")
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        # Otherwise the browser would keep uploaded images.
        run_history=False,
        footer_links=[],
        css=CSS,
        prevent_thread_lock=True,
        quiet=True,
    )
    return address
