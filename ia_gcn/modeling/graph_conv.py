"""Graph convolutions over labels or regions."""

from __future__ import annotations

import math
from typing import Callable, Dict, Iterable, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from .label_graph import propagate_scaled


class GraphConv(nn.Module):
    """Aᵀ (s ⊙ H) W: a graph convolution Â H W (IA-GCN Eq. 5) without activation and outer factor.

    Of Â = diag(s) Aᵀ diag(s) the outer s is missing. A (Leaky)ReLU lets it through, s being
    positive, and `graph_layers` merges it with the inner s of the next layer: of the nodes of every
    image, which take most of the memory, a layer then keeps one copy fewer. No bias.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_dim, out_dim))
        # Published with ML-GCN; its scale goes by the output, not the input dimension.
        bound = 1 / math.sqrt(out_dim)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, nodes: torch.Tensor, lcm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes: H, (C, in_dim) or (B, C, in_dim).
            lcm: A, (C, C) or (B, C, C).
            scale: s, (C,) or (B, C).
        Returns:
            (C, out_dim) or (B, C, out_dim).
        """
        in_dim, out_dim = self.weight.shape
        shared_by_images = nodes.dim() <= scale.dim()
        # The graph is multiplied with the narrower side; shared nodes are multiplied by W once for
        # all images, before the graph.
        if in_dim < out_dim and not shared_by_images:
            return propagate_scaled(nodes, lcm, scale) @ self.weight
        return propagate_scaled(nodes @ self.weight, lcm, scale)

    def scores(self, nodes, x, lcm, scale) -> torch.Tensor:
        """Aᵀ (s ⊙ (H (W x))): the scores of the classifiers Aᵀ (s ⊙ H) W without making them.

        Args:
            nodes: H, (C, in_dim) or (B, C, in_dim).
            x: (B, out_dim).
            lcm, scale: as in `forward`.
        Returns:
            (B, C).
        """
        projected = torch.einsum("...ck,...k->...c", nodes, x @ self.weight.T)
        return propagate_scaled(projected[..., None], lcm, scale)[..., 0]

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


def graph_layers(
    layers: Iterable[GraphConv],
    nodes: torch.Tensor,
    lcm: torch.Tensor,
    scale: torch.Tensor,
    negative_slope: float = 0.0,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """H ← f(Â H W) for each layer in turn, f a LeakyReLU, but for a factor.

    Args:
        layers: L of them.
        nodes, lcm, scale: H⁽⁰⁾, A and s, as `GraphConv` takes them.
        negative_slope: of f; 0 for a ReLU.
    Returns:
        G with H⁽ᴸ⁾ = s ⊙ G, or H⁽⁰⁾ itself if there is no layer;
        the factor with which G enters another layer: s ⊙ s, or s.
    """
    factor = scale
    for layer in layers:
        # A layer's output is not used elsewhere: overwriting it in place saves memory.
        nodes = F.leaky_relu(layer(nodes, lcm, factor), negative_slope, inplace=True)
        factor = scale * scale
    return nodes, factor


class AdaptiveGraphConv(nn.Module):
    """A F W_A + B F W_B + C F W_C: a layer on label graphs that are learned (ML-AGCN Eq. 3-7).

    A is given; B, of attention, and C, of similarity, follow from the labels' features F. The
    published sizes say that there is a W for each graph; Eq. 3 is printed with one for all,
    (A + B + C) F W. No activation, no bias.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        graphs: str = "ABC",
        weights: str = "per_graph",
        attention_slope: float = 0.2,
        similarity_norm: str = "row",
    ):
        """
        Args:
            graphs: which of A, B and C there are, in that order, at least one.
            weights: per_graph or shared.
            attention_slope: of the LeakyReLU in Eq. 4.
            similarity_norm: row or none, see `similarity_graph`.
        """
        super().__init__()
        if graphs not in ("A", "B", "C", "AB", "AC", "BC", "ABC"):
            raise InputError(f"MODEL.ADAPTIVE_GCN.GRAPHS must be A, AB or the like, not {graphs!r}")
        if weights not in ("per_graph", "shared"):
            raise InputError(
                f"MODEL.ADAPTIVE_GCN.WEIGHTS must be per_graph or shared, not {weights!r}"
            )
        if similarity_norm not in ("row", "none"):
            raise InputError(
                f"MODEL.ADAPTIVE_GCN.SIMILARITY_NORM must be row or none, not {similarity_norm!r}"
            )
        self.graphs = graphs
        self.attention_slope = attention_slope
        self.similarity_norm = similarity_norm
        names = graphs if weights == "per_graph" else ["shared"]
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(in_dim, out_dim)) for name in names}
        )
        # The length of a node's vector does not depend on the number of labels.
        bound = math.sqrt(3 / out_dim)
        for weight in self.weights.values():
            nn.init.uniform_(weight, -bound, bound)
        if "B" in graphs:
            # The coefficients a of Eq. 4, for the label that looks and for the one looked at.
            self.attention = nn.Parameter(torch.empty(2, out_dim))
            nn.init.xavier_uniform_(self.attention)

    def weight(self, graph: str) -> torch.Tensor:
        """W (in_dim, out_dim) of A, B or C."""
        return self.weights["shared" if "shared" in self.weights else graph]

    def topology(self, nodes: torch.Tensor, statistical: torch.Tensor) -> Dict[str, torch.Tensor]:
        """The graphs that F makes, (C, C) each by name.

        Args:
            nodes: F, (C, in_dim).
            statistical: A, (C, C), normalised.
        """
        graphs = {}
        if "A" in self.graphs:
            graphs["A"] = statistical
        if "B" in self.graphs:
            looking, looked_at = self.attention @ (nodes @ self.weight("B")).T
            graphs["B"] = attention_graph(looking, looked_at, self.attention_slope)
        if "C" in self.graphs:
            graphs["C"] = similarity_graph(nodes, self.similarity_norm)
        return graphs

    def forward(
        self,
        nodes: torch.Tensor,
        topology: Dict[str, torch.Tensor],
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            nodes: F, (C, in_dim) or (B, C, in_dim).
            topology: of `topology`.
            scale: r, (B, C): every graph G becomes diag(r) G diag(r). None: it stays as it is.
        Returns:
            (C, out_dim) or (B, C, out_dim).
        """
        if scale is None:
            return self._mix(topology, lambda weight: nodes @ weight)
        scale = scale[..., None]
        return scale * self._mix(topology, lambda weight: scale * (nodes @ weight))

    def scores(self, nodes, x, topology, scale) -> torch.Tensor:
        """The scores (B, C) of what `forward` returns as classifiers for x (B, out_dim).

        No classifiers are made: Σ G (F W_G) x = Σ G (F (W_G x)).
        """
        scale = scale[..., None]
        mixed = self._mix(
            topology,
            lambda weight: scale * torch.einsum("...ck,...k->...c", nodes, x @ weight.T)[..., None],
        )
        return (scale * mixed)[..., 0]

    def _mix(self, topology, transform: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Σ G transform(W_G), where transform(W) is (..., C, K)."""
        if "shared" in self.weights:
            topology = {"shared": sum(topology.values())}
        # An einsum of a (C, C) with a (B, C, K) is one matrix product; matmul's gradient is B×C×C.
        return sum(
            torch.einsum("ij,...jk->...ik", graph, transform(self.weights[name]))
            for name, graph in topology.items()
        )


def attention_graph(
    looking: torch.Tensor, looked_at: torch.Tensor, negative_slope: float
) -> torch.Tensor:
    """B: the attention of each label to every label, with more weight on itself (ML-AGCN Eq. 4-6).

    α = softmax over j of LeakyReLU(uᵢ + vⱼ), where aᵀ (W fᵢ ‖ W fⱼ) = uᵢ + vⱼ; B = α + diag(the
    largest of each row).

    Args:
        looking, looked_at: u and v, (C,).
    Returns:
        (C, C); the rows of α sum to 1.
    """
    scores = F.leaky_relu(looking[:, None] + looked_at, negative_slope)
    attention = scores.softmax(dim=1)
    return attention + attention.amax(dim=1).diag()


def similarity_graph(nodes: torch.Tensor, norm: str) -> torch.Tensor:
    """C: the cosine of the angle between each two labels' features (ML-AGCN Eq. 7).

    As printed, the rows of similar features sum to nearly the number of labels, and the logits are
    larger by that factor at the start.

    Args:
        nodes: F, (C, K). A vector of zeros has a similarity of 0 to all, also to itself.
        norm: row, so that a row's absolute values sum to 1; or none.
    Returns:
        (C, C).
    """
    directions = _unit_rows(nodes, 2)
    similarity = directions @ directions.T
    return similarity if norm == "none" else _unit_rows(similarity, 1)


def _unit_rows(rows: torch.Tensor, p: int) -> torch.Tensor:
    """Rows divided by their p-norm; those of zeros stay, and have no gradient."""
    sizes = rows.norm(p, dim=1, keepdim=True)
    return torch.where(sizes > 0, rows / torch.where(sizes > 0, sizes, 1), 0)
