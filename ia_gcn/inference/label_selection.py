"""A model's outputs for some of its labels, or in another order."""

from __future__ import annotations

from typing import Dict, List, Sequence

import torch
from torch import nn


class SelectLabels(nn.Module):
    """Returns a model's scores and logits of the chosen labels, and no other outputs."""

    def __init__(self, model: nn.Module, chosen: Sequence[int]):
        """
        Args:
            model: in evaluation mode, list of dicts to list of dicts with scores and logits (C,).
            chosen: c indices of its labels, in the order that is wanted.
        """
        super().__init__()
        self.model = model
        self.chosen = list(chosen)

    def forward(self, batched_inputs: List[Dict]) -> List[Dict[str, torch.Tensor]]:
        """
        Args:
            batched_inputs: of the model; label_states, where there are some, of the chosen labels.
        Returns:
            one dict per image of
                scores: (c,) probabilities;
                logits: (c,).
        """
        return [
            {name: output[name][self.chosen] for name in ("scores", "logits")}
            for output in self.model(list(map(self._with_all_states, batched_inputs)))
        ]

    def _with_all_states(self, image: Dict) -> Dict:
        """Of labels that are not chosen, nothing is known."""
        if "label_states" not in image:
            return image
        states = torch.full((self.model.num_labels,), -1.0)
        states[self.chosen] = torch.as_tensor(image["label_states"]).float()
        return {**image, "label_states": states}
