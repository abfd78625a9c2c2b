"""What the HTML pages have in common: one file each, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from functools import partial
from pathlib import Path
from typing import Any, Mapping

import jinja2
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..io.images import UnreadableImage, decode_image, upright_8_bit

FOLDER = Path(__file__).parent / "report_page"


def render_page(template: str, content: Mapping[str, Any]) -> str:
    """A page of report_page/, with its style and script. What is in `content` is escaped.

    Args:
        template: name of its file.
        content: what the template shows, by the names that it uses.
    """
    style, script = ((FOLDER / name).read_text("utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER, "utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    return environment.get_template(template).render(
        content, style=style, script=script, script_hash=_hash(script)
    )


def read_thumbnail(file_name: str, size: int) -> str | None:
    """An image as a small JPEG in a data URI; None where it can't be read.

    Args:
        file_name: local or of a kind that PathManager knows.
        size: the longer side in pixels.
    """

    def shrink(image: Image.Image) -> Image.Image:
        # A JPEG is decoded at the smallest size that is enough, from an eighth of its own on.
        image.draft("RGB", (size, size))
        image = upright_8_bit(image).convert("RGB")
        image.thumbnail((size, size))
        return image

    try:
        image = decode_image(file_name, shrink, partial(PathManager.open, mode="rb"))
    except UnreadableImage:
        return None
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _hash(script: str) -> str:
    """The hash of the page's own script; its security policy allows no other one."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _figure(value: float, decimals: int = 2) -> str:
    """A number in a table; a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.{decimals}f}"
