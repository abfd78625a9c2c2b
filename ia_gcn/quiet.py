"""Silencing other libraries: warnings that a user of ia_gcn can't act on, and what they would send.

Each warning is named by its text. The package imports this first, so it holds for what is imported
after it, for data loaders' workers and for every process of a training.
"""

from __future__ import annotations

import logging
import os
import warnings

WARNINGS = (
    # fvcore, imported by detectron2, compiles its focal loss.
    (r"`torch\.jit\.script` is deprecated", FutureWarning),
    # detectron2's anchors.
    (r"torch\.meshgrid: in an upcoming release", UserWarning),
    # detectron2's gathering of objects from all processes.
    (r"TypedStorage is deprecated", UserWarning),
)

LOGGERS = (
    # A machine without a GPU may have CUDA's compiler.
    "torch.utils.cpp_extension",
    # It ends the other processes after one failed, which has said why.
    "torch.multiprocessing.spawn",
)

# Usage figures for their makers. huggingface_hub, through which timm downloads weights, reads its
# variable when it is imported; gradio's client knows no other switch than this one.
TELEMETRY = {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"}


def silence_other_libraries() -> None:
    """Leave these warnings out, unless Python was asked for warnings with -W, and send nothing,
    unless the environment asks for it."""
    for name, value in TELEMETRY.items():
        os.environ.setdefault(name, value)
    for message, category in WARNINGS:
        # Appended: a filter of the user's own comes first.
        warnings.filterwarnings("ignore", message, category, append=True)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


silence_other_libraries()
