"""The published method: head-wise PCA of values and output, Nyström channels of the MLP (arXiv 2505.23966).

One pass of the dense layer: moments of each value head and of the MLP's activations, then both are solved. With pruned
Q and K the same PCA leaves two factors of each.
"""

from collections.abc import Mapping

from torch import Tensor

from ..core.attention_pca import heads_projected, headwise_pca, project_output
from ..core.mlp_nystrom import channels_kept, few_tokens_jitter, reconstruct_down_projection, select_channels
from ..core.moments import add_head_moments, add_moment, mirror_lower_triangle
from ..engine.protocols import CHANNELS, KEYS, QUERIES, TOKENS, Method, Solution, Step, Sums
from ..utils.dimensions import Kept, ModelDimensions
from ..utils.layer_utils import DecoderModule

VALUES = "self_attn.v_proj.output"


class FlatLLM(Method):
    """FLAT-LLM as published; Q and K stay whole unless the allocation prunes them."""

    name = "flatllm"
    importance_method = "angular"
    follows_dense = False

    def words(self, prune_qk: bool) -> str:
        """Return what is done to a layer, for the model card."""
        pruned = "query, key, value and output" if prune_qk else "value and output"
        return f"{pruned} projections by head-wise PCA, MLPs by Nyström approximation"

    def steps(self, dimensions: ModelDimensions, kept: Kept) -> list[Step]:
        """Return one step for the whole layer."""
        return [] if dimensions.is_whole(kept) else [FlatLLMStep(dimensions, kept)]


class FlatLLMStep(Step):
    """Statistics of a dense layer's own activations, and the layer's new weights from them."""

    @property
    def heads(self) -> dict[str, int]:
        """The taps whose moments are taken head by head, and how many heads each has."""
        heads, kv_heads = self.dimensions.num_heads, self.dimensions.num_kv_heads
        values = {VALUES: kv_heads} if self.leaves.value_rank < self.dimensions.head_dim else {}
        return values | ({} if self.leaves.query_key_rank is None else {QUERIES: heads, KEYS: kv_heads})

    @property
    def taps(self) -> list[str]:
        """What is looked at."""
        return [*self.heads, CHANNELS]

    def shapes(self, layer: DecoderModule) -> dict[str, tuple[int, ...]]:
        """Return those of the moments ``Σ v vᵀ`` of each head, (G or H, d, d), and ``Σ z zᵀ`` of the MLP, (F, F)."""
        width, channels = self.dimensions.head_dim, self.dimensions.intermediate_size
        heads = {tap: (count, width, width) for tap, count in self.heads.items()}
        return {**heads, CHANNELS: (channels, channels), TOKENS: ()}

    def add(self, layer: DecoderModule, sums: Sums, seen: Mapping[str, Tensor]) -> None:
        """Add a batch's moments; of the MLP's the lower triangle alone."""
        for tap in self.heads:
            add_head_moments(sums[tap], seen[tap])
        add_moment(sums[CHANNELS], seen[CHANNELS])
        sums[TOKENS] += len(seen[CHANNELS])

    def solve(self, layer: DecoderModule, sums: Sums) -> Solution:
        """Return the layer's new weights; a rank or width that is the whole one leaves its part as it is."""
        weights: dict[str, Tensor] = {}
        eigenvalues = None
        if VALUES in self.heads:
            eigenvalues, directions = headwise_pca(sums[VALUES])
            bases = directions[..., : self.leaves.value_rank]  # (G, d, r)
            weights |= heads_projected(layer.self_attn.v_proj, "self_attn.v_proj", bases)
            weights["self_attn.o_proj.weight"] = project_output(layer.self_attn.o_proj.weight, bases)
        if self.leaves.query_key_rank is not None:
            for tap in (QUERIES, KEYS):  # into two factors, between whose products the rotary embedding stands
                name = tap.removesuffix(".output")
                bases = headwise_pca(sums[tap])[1][..., : self.leaves.query_key_rank]  # (H or G, d, r)
                weights |= {f"{name}.up": bases} | heads_projected(layer.get_submodule(name), f"{name}.down", bases)
        if self.leaves.mlp_width < self.dimensions.intermediate_size:
            moment, down = sums[CHANNELS], layer.mlp.down_proj.weight
            mirror_lower_triangle(moment)
            stay = select_channels(moment, self.leaves.mlp_width)
            jitter = few_tokens_jitter(int(sums[TOKENS]), len(moment))
            weights["mlp.down_proj.weight"] = reconstruct_down_projection(down, moment, stay, jitter=jitter)
            weights |= channels_kept(layer.mlp, stay)
        return Solution(weights, eigenvalues)
