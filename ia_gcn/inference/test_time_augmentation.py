"""The mean of a model's logits over several views of each image."""

from __future__ import annotations

from typing import Dict, List

import torch
from torch import nn


class MultiLabelTTA(nn.Module):
    """A model's mean over the views of each image.

    The mean is of the logits, as the models themselves take it over branches and draws: no view is
    cut off where its probability nears 0 or 1. Of a single view it is that view's logits.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: in evaluation mode, list of dicts to list of dicts with logits (C,).
        """
        super().__init__()
        self.model = model

    def forward(self, batched_inputs: List[Dict]) -> List[Dict[str, torch.Tensor]]:
        """
        Args:
            batched_inputs: one dict per image, as `DatasetMapperTTA` makes them, with the same
                number of views each.
        Returns:
            one dict per image of
                scores: (C,) probabilities;
                logits: (C,).
        """
        # One view of all images at a time: these have the same size, and need no padding.
        views = zip(*(image["views"] for image in batched_inputs))
        logits = [torch.stack([out["logits"] for out in self.model(list(view))]) for view in views]
        mean = torch.stack(logits).mean(dim=0)
        return [{"scores": row, "logits": logit} for row, logit in zip(mean.sigmoid(), mean)]
