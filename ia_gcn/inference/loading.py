"""The predictor of a file, whichever kind of model is in it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import InputError
from ..memory import keep_freed_memory
from .onnx_predictor import OnnxPredictor

if TYPE_CHECKING:
    from .predictor import MultiLabelPredictor


def load_predictor(
    weights: str,
    *,
    config_file: str = "",
    device: str | None = None,
    threads: int | None = None,
    precision: str = "fp32",
) -> MultiLabelPredictor | OnnxPredictor:
    """The `MultiLabelPredictor` of a checkpoint, or the `OnnxPredictor` of a .onnx file.

    The process keeps the memory that it frees, where the config of a checkpoint says so
    (KEEP_FREED_MEMORY).

    Args:
        weights: the file.
        config_file: in place of the config that a checkpoint contains.
        device: cpu, cuda, ...; None: a GPU where there is one.
        threads: of this process, for a batch; None: as torch or onnxruntime has it.
        precision: of a checkpoint's backbone, see `set_precision`; a .onnx file has its own.
    Raises:
        InputError: the file, the config or the device can't be used, or what it needs is missing.
    """
    if weights.endswith(".onnx"):
        if config_file:
            raise InputError(
                f"--config-file: has no effect on {weights}, which has a config of its own"
            )
        if precision != "fp32":
            raise InputError(f"--precision: has no effect on {weights}, which has its own")
        return OnnxPredictor(weights, device=device, threads=threads)
    if not (find_spec("torch") and find_spec("detectron2")):
        raise InputError(f"--weights {weights} needs torch and detectron2; a .onnx file does not")
    import torch

    from .predictor import MultiLabelPredictor

    if threads:
        torch.set_num_threads(threads)
    predictor = MultiLabelPredictor(
        weights, config_file=config_file, device=device, precision=precision
    )
    if predictor.cfg.KEEP_FREED_MEMORY:
        keep_freed_memory()
    return predictor
