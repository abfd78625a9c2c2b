"""What labels say of each other, P(label | other labels), beside what a recogniser sees.

A prior is fitted from labels alone (`label_prior_fit`). A recogniser's logits become evidence: by
how much the image moves a label's log-odds from those of the label's frequency. The two together
are the posterior. B, C and K are the numbers of images, labels and themes.
"""

from __future__ import annotations

from typing import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from torch import nn

from ..errors import InputError

# With more labels, each is regressed on some others alone: there is nothing of C×C.
MOST_LABELS = 400

# Labels that ThemePrior looks at together: it holds B × K × this many numbers at once.
LABELS_AT_ONCE = 1024


def build_label_prior(cfg: CfgNode) -> LabelPrior | None:
    """The prior that MODEL.LABEL_PRIOR.NAME asks for; None if it is empty."""
    keys = cfg.MODEL.LABEL_PRIOR
    if not keys.NAME:
        return None
    prior = {"PairwisePrior": PairwisePrior, "ThemePrior": ThemePrior}[keys.NAME](cfg)
    prior.hidden_evidence = keys.HIDDEN_EVIDENCE
    return prior.requires_grad_(keys.TRAINED)


class LabelPrior(nn.Module):
    """Combines logits with a model of the labels.

    With logits z, temperature T, offset c and λ, the log-odds of each label's frequency, the
    evidence is u = z / T + c - λ, and the posterior's log-odds are λ + u + Δ. Δ is a subclass's
    message: what the other labels of the image say. A label that is known counts with all its
    weight; one that is not counts as far as its evidence goes, with weight α, the strength. With
    α = 0 and nothing known, the logits come back to the bit.

    In training, where it is a layer like others, T = 1, c = 0 and α = 1, and the evidence of some
    labels is hidden at random. On images that it is trained on, a network's evidence is so strong
    that nothing would ask what labels say of each other.

    Attributes:
        log_odds: λ, (C,) float32.
        temperature, offset, strength: T, c and α, scalars, float32.
        hidden_evidence: the share of the evidence that is hidden in training.
    """

    def __init__(self, num_labels: int):
        super().__init__()
        self.register_buffer("log_odds", torch.zeros(num_labels))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("strength", torch.ones(()))
        self.hidden_evidence = 0.0

    @property
    def numbers_per_image(self) -> int:
        """How many numbers `forward` holds at once for an image."""
        return len(self.log_odds)

    def forward(
        self, logits: torch.Tensor, label_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            logits: z, (B, C).
            label_states: (B, C) in {1, 0, -1 = unknown}, labels that are known. What comes out for
                such a label is of its evidence and of the others, as if it were not known.
        Returns:
            the posterior's log-odds, (B, C) float32.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            posterior = self.posterior(logits, label_states)
            if self.training:
                return posterior
            # Not expand(len(logits), 1), which would make the batch a constant of an export.
            moved = (self.strength > 0).expand_as(logits[:, :1])
            if label_states is not None:
                moved = moved | (label_states >= 0).any(dim=1, keepdim=True)
            return torch.where(moved, posterior, logits)

    def posterior(
        self, logits: torch.Tensor, label_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """λ + u + Δ, arguments and shape as those of `forward`."""
        evidence = logits / self.temperature + self.offset - self.log_odds
        if self.training and self.hidden_evidence:
            hidden = torch.rand_like(evidence) < self.hidden_evidence
            evidence = evidence.masked_fill(hidden, 0)
        return self.log_odds + evidence + self.message(evidence, label_states)

    def message(self, evidence: torch.Tensor, label_states: torch.Tensor | None) -> torch.Tensor:
        """Δ (B, C): by how much the other labels of an image move a label's log-odds.

        Args:
            evidence: u, (B, C).
            label_states: of `forward`.
        """
        raise NotImplementedError


class PairwisePrior(LabelPrior):
    """A logistic regression of each label on the others; mean field combines it with evidence.

    With p = σ(λ), the labels' frequencies, the regressions say

        log-odds P(i | the others) = b_i + Σⱼ W_ij (y_j - p_j).

    Where a label is not known, its probability q_j stands for y_j. A fixed number of damped steps
    q ← (q + σ(λ + u + Δ)) / 2 starts at q = σ(λ + u), with

        Δ_i = κ_i (b_i - λ_i) + Σⱼ s_j W_ij (q_j - p_j),

    where the weight s_j is 1 for a label that is known and α else, and κ_i is the mean of the
    other labels' weights. So with all others known Δ is the regression's, whatever α is. To a label
    that is known, only known ones speak: the others' q_j have heard what is known of it.

    Attributes:
        bias: b, (C,) float32.
        weight: W, (C, C), whose diagonal has no effect; or its columns `neighbors`, (C, K).
        neighbors: (C, K) int64, the labels that each label is regressed on; None for all others.
    """

    @configurable
    def __init__(self, *, num_labels: int, num_neighbors: int = 0, num_steps: int = 15):
        """
        Args:
            num_labels: C.
            num_neighbors: K; 0 for all other labels.
            num_steps: of mean field.
        Raises:
            InputError: K is not less than C, or it is 0 and C is above MOST_LABELS.
        """
        if num_neighbors >= num_labels or (not num_neighbors and num_labels > MOST_LABELS):
            raise InputError(
                f"MODEL.LABEL_PRIOR.NUM_NEIGHBORS is {num_neighbors}, with {num_labels} labels: it "
                f"must be less, and not 0 where there are more than {MOST_LABELS}"
            )
        super().__init__(num_labels)
        self.num_steps = num_steps
        self.bias = nn.Parameter(torch.zeros(num_labels))
        self.weight = nn.Parameter(torch.zeros(num_labels, num_neighbors or num_labels))
        neighbors = torch.zeros(num_labels, num_neighbors, dtype=torch.int64)
        self.register_buffer("neighbors", neighbors if num_neighbors else None)

    @classmethod
    def from_config(cls, cfg):
        return {
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "num_neighbors": cfg.MODEL.LABEL_PRIOR.NUM_NEIGHBORS,
            "num_steps": cfg.MODEL.LABEL_PRIOR.STEPS,
        }

    @property
    def numbers_per_image(self) -> int:
        """See `LabelPrior`."""
        return len(self.log_odds) if self.neighbors is None else self.neighbors.numel()

    def message(self, evidence: torch.Tensor, label_states: torch.Tensor | None) -> torch.Tensor:
        """See `LabelPrior.message`."""
        weights = self.strength.expand_as(evidence)
        q = (self.log_odds + evidence).sigmoid()
        known, states = torch.zeros_like(q, dtype=torch.bool), q
        if label_states is not None:
            known, states = label_states >= 0, label_states.to(q.dtype)
            weights = torch.where(known, 1, weights)
        q = torch.where(known, states, q)
        for _ in range(self.num_steps):
            seen = self.log_odds + evidence + self.speak(q, weights)
            q = torch.where(known, states, (q + seen.sigmoid()) / 2)
        if label_states is None:
            return self.speak(q, weights)
        return torch.where(known, self.speak(q, known.to(q.dtype)), self.speak(q, weights))

    def speak(self, q: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Δ (B, C) of probabilities q and weights s, (B, C)."""
        # κ, of one label alone the mean of none.
        others = (weights.sum(dim=1, keepdim=True) - weights) / max(weights.shape[1] - 1, 1)
        constant = others * (self.bias - self.log_odds)
        return constant + self.regress(weights * (q - self.log_odds.sigmoid()))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        neighbors = state_dict.get(f"{prefix}neighbors")
        if neighbors is not None and neighbors.numel():
            lowest, highest = neighbors.min(), neighbors.max()
            if lowest < 0 or highest >= len(self.log_odds):
                raise InputError(f"{prefix}neighbors: there is no label {lowest} or {highest}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def regress(self, values: torch.Tensor) -> torch.Tensor:
        """Σⱼ W_ij x_j, (B, C), of x (B, C)."""
        if self.neighbors is not None:
            # An ONNX file would have a loop over the labels in place of an embedding bag.
            if torch.compiler.is_compiling():
                return (self.weight * values[:, self.neighbors]).sum(dim=2)
            # The same without anything of (B, C, K), in a fraction of the time.
            weights = {"mode": "sum", "per_sample_weights": self.weight}
            return F.embedding_bag(self.neighbors, values.T, **weights).T
        itself = torch.eye(len(self.weight), dtype=torch.bool, device=values.device)
        return values @ self.weight.masked_fill(itself, 0).T


class ThemePrior(LabelPrior):
    """A mixture of K themes, in each of which the labels are independent of each other.

    P(y) = Σ_k π_k Πᵢ θ_ki^yᵢ (1 - θ_ki)^(1 - yᵢ), a multivariate Bernoulli mixture. With evidence,
    label i contributes to the likelihood of theme k the factor

        t_ki = θ_ki exp(α u_i) + 1 - θ_ki, or, where it is known, θ_ki or 1 - θ_ki,

    and Δ_i follows from the themes' probabilities given all labels but i. No iteration is needed:
    with α = 1 it is the exact posterior of the mixture.

    Attributes:
        theme_logits: log π, up to a constant, (K,) float32.
        label_logits: log-odds of θ, (K, C) float32.
    """

    @configurable
    def __init__(self, *, num_labels: int, num_themes: int):
        """
        Args:
            num_labels: C.
            num_themes: K.
        """
        super().__init__(num_labels)
        self.theme_logits = nn.Parameter(torch.zeros(num_themes))
        self.label_logits = nn.Parameter(torch.zeros(num_themes, num_labels))

    @classmethod
    def from_config(cls, cfg):
        return {
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "num_themes": cfg.MODEL.LABEL_PRIOR.NUM_THEMES,
        }

    @property
    def numbers_per_image(self) -> int:
        """See `LabelPrior`."""
        num_themes, num_labels = self.label_logits.shape
        return num_themes * min(num_labels, LABELS_AT_ONCE)

    def message(self, evidence: torch.Tensor, label_states: torch.Tensor | None) -> torch.Tensor:
        """See `LabelPrior.message`."""
        blocks = _label_blocks(self.label_logits, self.strength * evidence, label_states)
        # log Πᵢ t_ki, with Πᵢ (1 - θ_ki) taken out of the product.
        absent = F.logsigmoid(-self.label_logits).sum(dim=1)
        likelihood = self.theme_logits.log_softmax(dim=0) + absent
        likelihood = likelihood + sum(_log_factor(*block).sum(dim=2) for block in blocks)
        messages = []
        for block in blocks:
            # Of all labels but one, for each label.
            others = likelihood[:, :, None] - _log_factor(*block)
            present = (others + block[0]).logsumexp(dim=1)
            messages.append(present - others.logsumexp(dim=1))
        return torch.cat(messages, dim=1) - self.log_odds


def _label_blocks(
    label_logits: torch.Tensor, evidence: torch.Tensor, label_states: torch.Tensor | None
) -> Sequence[Sequence[torch.Tensor | None]]:
    """The arguments of `_log_factor` for LABELS_AT_ONCE labels each."""
    label_logits = label_logits.split(LABELS_AT_ONCE, dim=1)
    evidence = evidence.split(LABELS_AT_ONCE, dim=1)
    if label_states is None:
        return list(zip(label_logits, evidence, [None] * len(evidence)))
    return list(zip(label_logits, evidence, label_states.split(LABELS_AT_ONCE, dim=1)))


def _log_factor(
    label_logits: torch.Tensor, evidence: torch.Tensor, label_states: torch.Tensor | None
) -> torch.Tensor:
    """log (t / (1 - θ)), (B, K, C), see `ThemePrior`, of log-odds (K, C), α u and states (B, C)."""
    factor = F.softplus(label_logits + evidence[:, None])
    if label_states is None:
        return factor
    states = label_states[:, None]
    return torch.where(states >= 0, label_logits * states.to(factor.dtype), factor)
