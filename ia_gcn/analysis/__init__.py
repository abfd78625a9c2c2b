"""Sizes of models, and operations and time per image."""

from .model_size import (
    ModelSize,
    analyze_model,
    count_multiply_adds,
    count_parameters,
    time_forward,
)

__all__ = [
    "ModelSize",
    "analyze_model",
    "count_multiply_adds",
    "count_parameters",
    "time_forward",
]
