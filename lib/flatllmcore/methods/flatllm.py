"""The published method: head-wise PCA of values and output, Nyström channels of the MLP (arXiv 2505.23966).

One pass of the dense layer: moments of each value head and of the MLP's activations, then both are solved. With pruned
Q and K the same PCA leaves two factors of each.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.attention_pca import headwise_pca, project_heads, project_output
from ..core.mlp_nystrom import few_tokens_jitter, reconstruct_down_projection, select_channels
from ..core.moments import add_head_moments, add_moment, mirror_lower_triangle
from ..core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from ..engine.method import Solution, Sums
from ..utils.dimensions import Kept, ModelDimensions
from ..utils.layer_utils import DecoderModule

logger = logging.getLogger(__name__)

VALUES = "self_attn.v_proj.output"
QUERIES, KEYS = "self_attn.q_proj.output", "self_attn.k_proj.output"
CHANNELS = "mlp.down_proj.input"
TOKENS = "tokens"


class FlatLLM:
    """FLAT-LLM as published; Q and K stay whole unless the allocation prunes them."""

    name = "flatllm"

    def allocate(
        self, selector: ImportancePreservingRankSelector, scores: Sequence[float], keep_ratio: float
    ) -> RankAllocation:
        """Return the ranks of Importance-Preserving Rank Selection."""
        return selector.allocate(scores, keep_ratio)

    def check_calibration(self, dimensions: ModelDimensions, tokens: int) -> None:
        """Warn where the tokens are too few for the MLP to be solved exactly."""
        jitter = few_tokens_jitter(tokens, dimensions.intermediate_size)
        if jitter:
            logger.warning(
                "%d calibration tokens are few for %d MLP channels: the MLP is solved with %.3f of each channel's "
                "energy added; give more tokens",
                tokens,
                dimensions.intermediate_size,
                jitter,
            )

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> list["FlatLLMStep"]:
        """Return one step for the whole layer."""
        return [] if dimensions.is_whole(kept) else [FlatLLMStep(dimensions, kept)]


@dataclass(frozen=True)
class FlatLLMStep:
    """Statistics of a dense layer's own activations, and the layer's new weights from them."""

    dimensions: ModelDimensions
    kept: Kept

    part = ""

    @property
    def heads(self) -> dict[str, int]:
        """The taps whose moments are taken head by head, and how many heads each has."""
        sizes = self.dimensions
        queries_and_keys = {QUERIES: sizes.num_heads, KEYS: sizes.num_kv_heads}
        return {VALUES: sizes.num_kv_heads} | ({} if self.kept.query_key_rank is None else queries_and_keys)

    @property
    def taps(self) -> list[str]:
        """What is looked at."""
        return [*self.heads, CHANNELS]

    def zeros(self, layer: DecoderModule) -> Sums:
        """Return the moments ``Σ v vᵀ`` of each head, (G or H, d, d), and ``Σ z zᵀ`` of the MLP, (F, F)."""
        width, channels = self.dimensions.head_dim, self.dimensions.intermediate_size
        shapes = {tap: (count, width, width) for tap, count in self.heads.items()}
        device = layer.mlp.down_proj.weight.device
        return {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in (shapes | {CHANNELS: (channels, channels), TOKENS: ()}).items()
        }

    def add(self, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch's moments; of the MLP's the lower triangle alone."""
        for tap in self.heads:
            add_head_moments(sums[tap], seen[tap])
        add_moment(sums[CHANNELS], seen[CHANNELS])
        sums[TOKENS] += len(seen[CHANNELS])

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the layer's new weights; a rank or width that is the whole one leaves its part as it is."""
        eigenvalues, directions = headwise_pca(sums[VALUES])
        weights: dict[str, Tensor] = {}
        if self.kept.value_rank < self.dimensions.head_dim:
            weights |= _compress_values(layer.self_attn, directions[..., : self.kept.value_rank])
        if self.kept.query_key_rank is not None:
            for tap in (QUERIES, KEYS):
                weights |= _factor(layer, tap, sums[tap], self.kept.query_key_rank)
        if self.kept.mlp_width < self.dimensions.intermediate_size:
            mirror_lower_triangle(sums[CHANNELS])
            weights |= _compress_mlp(layer.mlp, sums[CHANNELS], self.kept.mlp_width, int(sums[TOKENS]))
        return Solution(weights, eigenvalues)


def _compress_values(attention: DecoderModule, bases: Tensor) -> dict[str, Tensor]:
    weights = {
        "self_attn.v_proj.weight": project_heads(attention.v_proj.weight, bases),
        "self_attn.o_proj.weight": project_output(attention.o_proj.weight, bases),
    }
    if attention.v_proj.bias is not None:
        weights["self_attn.v_proj.bias"] = project_heads(attention.v_proj.bias, bases)
    return weights


def _factor(layer: DecoderModule, tap: str, moment: Tensor, rank: int) -> dict[str, Tensor]:
    """Return the two factors of ``q_proj`` or ``k_proj``, between whose products the rotary embedding stands."""
    name = tap.removesuffix(".output")
    projection = layer.get_submodule(name)
    bases = headwise_pca(moment, name)[1][..., :rank]  # (H or G, d, r)
    weights = {f"{name}.up": bases, f"{name}.down.weight": project_heads(projection.weight, bases)}
    if projection.bias is not None:
        weights[f"{name}.down.bias"] = project_heads(projection.bias, bases)
    return weights


def _compress_mlp(mlp: DecoderModule, moment: Tensor, width: int, tokens: int) -> dict[str, Tensor]:
    kept = select_channels(moment, width)
    jitter = few_tokens_jitter(tokens, len(moment))
    weights = {"mlp.down_proj.weight": reconstruct_down_projection(mlp.down_proj.weight, moment, kept, jitter=jitter)}
    for name, projection in (("gate_proj", mlp.gate_proj), ("up_proj", mlp.up_proj)):
        weights[f"mlp.{name}.weight"] = projection.weight[kept]
        if projection.bias is not None:
            weights[f"mlp.{name}.bias"] = projection.bias[kept]
    return weights
