"""A page to try a trained model on images."""

from .description import Description, describe_image, describe_model
from .page import build_page, launch, own_uploads

__all__ = ["Description", "build_page", "describe_image", "describe_model", "launch", "own_uploads"]
