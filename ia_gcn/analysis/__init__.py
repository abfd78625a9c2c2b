"""How large models are and what an image costs them."""

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
