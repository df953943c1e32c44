"""What the method must compute and move, from the sizes of a model alone.

Operations are those of matrix products and factorisations; a multiplication and an addition are two. Attention is
causal, so half its square counts; a window of attention is not taken into account. Bytes are those that must be read
or written in the device's memory however well a batch is kept in cache. Both are lower bounds, and a rate divided by
them a lower bound of time.

Shapes: D hidden size, F MLP width, H query heads, G key/value heads, d head width, r value rank, k channels kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from transformers import PretrainedConfig

from flatllmcore.core.moments import BLOCK
from flatllmcore.core.rank_allocation import RankAllocation
from flatllmcore.core.rank_rounding import factor_parameters
from flatllmcore.utils.layer_utils import ModelDimensions
from flatllmcore.utils.loading import empty_causal_lm

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8

LayerSize: TypeAlias = tuple[int, int]  # value rank and MLP width of one decoder layer


@dataclass(frozen=True)
class Cost:
    """Work of one stage: operations, and bytes read or written in the device's memory."""

    operations: float = 0.0
    moved_bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.operations + other.operations, self.moved_bytes + other.moved_bytes)

    def bound_s(self, operations_per_s: float, bytes_per_s: float) -> float:
        """Return the least time this takes: that of the operations or that of the bytes, the longer one."""
        return max(self.operations / operations_per_s, self.moved_bytes / bytes_per_s)


NO_COST = Cost()


@dataclass(frozen=True)
class Workload:
    """Token windows that one process runs through the layers, and the bytes of a number in the model's dtype."""

    windows: int
    seqlen: int
    batch_size: int
    itemsize: int

    @property
    def tokens(self) -> int:
        return self.windows * self.seqlen

    @property
    def batches(self) -> int:
        return -(-self.windows // self.batch_size)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model: one decoder layer's, biases and norms included, and those outside the layers."""

    num_layers: int
    layer: int
    embedding: int
    head: int  # what embedding and head share counts in the embedding
    norm: int

    @property
    def total(self) -> int:
        return self.num_layers * self.layer + self.embedding + self.head + self.norm


def parameter_counts(config: PretrainedConfig) -> ParameterCounts:
    """Return the parameters of the model class that ``config`` names; no memory is taken for them."""
    model = empty_causal_lm(config)
    decoder, head, embedding = model.get_decoder(), model.lm_head.weight, model.get_input_embeddings().weight
    return ParameterCounts(
        num_layers=len(decoder.layers),
        layer=sum(parameter.numel() for parameter in decoder.layers[0].parameters()),
        embedding=embedding.numel(),
        head=0 if head is embedding else head.numel(),
        norm=decoder.norm.weight.numel(),
    )


def dense_layers(dimensions: ModelDimensions) -> list[LayerSize]:
    return [(dimensions.head_dim, dimensions.intermediate_size)] * dimensions.num_layers


def compressed_layers(allocation: RankAllocation) -> list[LayerSize]:
    return list(zip(allocation.value_rank, allocation.mlp_width, strict=True))


def cut_layers(allocation: RankAllocation) -> list[LayerSize]:
    """Return the layers that lose something, the only ones whose moments are summed."""
    whole = (allocation.dimensions.head_dim, allocation.dimensions.intermediate_size)
    return [size for size in compressed_layers(allocation) if size != whole]


def layer_weights(dimensions: ModelDimensions, size: LayerSize, query_key_rank: int | None = None) -> int:
    """Return the linear weights of a layer; Q and K are whole without a rank, and two factors each with one."""
    rank, width = size
    qk_weights = dimensions.qk_parameters if query_key_rank is None else query_key_rank * factor_parameters(dimensions)
    return qk_weights + rank * dimensions.rank_parameters + width * dimensions.width_parameters


def pair_operations(dimensions: ModelDimensions, rank: int) -> int:
    """Return the operations of all heads for a query and a key: their product, and its weight times the value."""
    return 2 * dimensions.num_heads * (dimensions.head_dim + rank)


def forward_cost(dimensions: ModelDimensions, layers: Sequence[LayerSize], work: Workload) -> Cost:
    """Return the cost of running every window through ``layers``.

    Per batch a layer's weights are read, and its hidden states read and written.
    """
    weights = sum(layer_weights(dimensions, size) for size in layers)
    attention = sum(_attention_operations(dimensions, work.seqlen, rank) for rank, _ in layers)
    states = 2 * len(layers) * hidden_state_bytes(dimensions, work)
    return Cost(work.tokens * (2 * weights + attention), work.itemsize * work.batches * weights + states)


def statistics_cost(allocation: RankAllocation, work: Workload) -> Cost:
    """Return the cost of running every window through the dense layers up to the input of ``down_proj``."""
    dimensions = allocation.dimensions
    down = dimensions.hidden_size * dimensions.intermediate_size
    layers = len(cut_layers(allocation))
    weights = layers * (dimensions.layer_parameters - down)
    attention = layers * _attention_operations(dimensions, work.seqlen, dimensions.head_dim)
    states = layers * hidden_state_bytes(dimensions, work)
    return Cost(work.tokens * (2 * weights + attention), work.itemsize * work.batches * weights + states)


def angles_cost(dimensions: ModelDimensions, work: Workload) -> Cost:
    """Return the cost of comparing what enters each layer with what leaves it: reading both."""
    return Cost(0.0, 2 * dimensions.num_layers * hidden_state_bytes(dimensions, work))


def moments_cost(allocation: RankAllocation, work: Workload) -> Cost:
    """Return the cost of one triangle of the MLP's moment and of each head's moment.

    Per batch the activations are read, and the triangle of float64 sums is read and written.
    """
    dimensions = allocation.dimensions
    layers, F = len(cut_layers(allocation)), dimensions.intermediate_size
    operations = F * F + 2 * dimensions.num_kv_heads * dimensions.head_dim**2
    moved = work.itemsize * work.tokens * F + work.batches * FLOAT64_BYTES * F * F
    return Cost(layers * work.tokens * operations, layers * moved)


def solves_cost(allocation: RankAllocation, processes: int = 1) -> Cost:
    """Return what the new weights of all layers that are cut cost the first process; each moment is read once.

    For the MLP its share of two Cholesky factors, of the inverse of one and of the products with ``down_proj``; for
    the attention the products of V and O with the heads' bases. What finding those bases costs is too little to count.
    """
    dimensions = allocation.dimensions
    D, F, d = dimensions.hidden_size, dimensions.intermediate_size, dimensions.head_dim
    cost = NO_COST
    for r, k in cut_layers(allocation):
        mlp = 2 * F**3 / 3 + k**3 / 3 + 2 * D * (F - k) * k + 2 * D * k * k
        attention = 2 * d * r * dimensions.rank_parameters
        cost += Cost(mlp / processes + attention, moment_bytes(dimensions))
    return cost


def compression_costs(allocation: RankAllocation, work: Workload, processes: int = 1) -> dict[str, Cost]:
    """Return the cost of a compression by stage: ``forward`` (statistics and compressed), ``moments``, ``solves``.

    Args:
        work: Of the process that has most to do.
    """
    compressed = forward_cost(allocation.dimensions, compressed_layers(allocation), work)
    return {
        "forward": statistics_cost(allocation, work) + compressed,
        "moments": moments_cost(allocation, work),
        "solves": solves_cost(allocation, processes),
    }


def perplexity_cost(dimensions: ModelDimensions, layers: Sequence[LayerSize], vocab_size: int, work: Workload) -> Cost:
    """Return the cost of running every window through ``layers`` and the head."""
    head = dimensions.hidden_size * vocab_size
    return forward_cost(dimensions, layers, work) + Cost(2 * work.tokens * head, work.itemsize * work.batches * head)


def hidden_state_bytes(dimensions: ModelDimensions, work: Workload) -> int:
    return work.tokens * dimensions.hidden_size * work.itemsize


def moment_bytes(dimensions: ModelDimensions) -> int:
    """Return the bytes of a layer's moments, what processes sum up between them."""
    return FLOAT64_BYTES * (dimensions.intermediate_size**2 + dimensions.num_kv_heads * dimensions.head_dim**2)


def solve_memory_bytes(dimensions: ModelDimensions, size: LayerSize) -> int:
    """Return the most memory that the solves of a layer take at once, its moments included.

    Beside the moment: its shifted copy, factorised in place, and a strip of the inverse, while channels are selected;
    the kept channels' moment and its factor, while they are fitted; then this factor, the moment of dropped with kept
    channels, the new ``down_proj``, and what some of its rows take at work (``mlp_nystrom.py``).
    """
    D, F, k = dimensions.hidden_size, dimensions.intermediate_size, size[1]
    select = F * F + 2 * F * min(F, 256)
    factorise = 2 * k * k
    fit = k * F + D * k + min(D, 1024) * (F + 3 * k)
    return moment_bytes(dimensions) + FLOAT64_BYTES * max(select, factorise, fit)


def activation_bytes(dimensions: ModelDimensions, work: Workload, product_itemsize: int) -> int:
    """Return the most memory that one batch takes at once inside a layer whose moments are summed.

    Gate, up and their product; or the latter, its copy to be multiplied and a strip of the product in float32 and
    float64 (``moments.py``). Beside them two of the layer's own width.

    Args:
        product_itemsize: Bytes of a number as the moments are multiplied: the model's own where the device takes it,
            4 where it is widened to float32.
    """
    D, F = dimensions.hidden_size, dimensions.intermediate_size
    tokens = min(work.batch_size, work.windows) * work.seqlen
    widened = product_itemsize if product_itemsize != work.itemsize else 0
    gated = 3 * tokens * F * work.itemsize
    multiplied = tokens * F * (work.itemsize + widened) + BLOCK * F * (FLOAT32_BYTES + FLOAT64_BYTES)
    return max(gated, multiplied) + 2 * tokens * D * work.itemsize


def _attention_operations(dimensions: ModelDimensions, seqlen: int, rank: int) -> float:
    """Return the operations per token of the products of queries with keys and of their weights with values."""
    mean_keys = (seqlen + 1) / 2
    return mean_keys * pair_operations(dimensions, rank)
