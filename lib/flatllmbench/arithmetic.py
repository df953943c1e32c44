"""What inference costs by its arithmetic alone: operations of a prompt, bytes of a decoding step.

From configs, dense or compressed; no weight is read. The ratio of two models' operations is the speed-up to expect
where operations bound the time (a prompt of some length), that of their bytes where reading memory does (decoding a
few sequences).
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from flatllmcore.utils.layer_utils import dense_dimensions

from .costs import layer_weights, pair_operations


@dataclass(frozen=True)
class LayerCost:
    """What one decoder layer costs.

    Attributes:
        weights: Of its linear layers. Norms and biases, below a thousandth of these, are left out.
        pair_operations: What a pair of query and key costs over all heads.
        cached_width: Numbers kept per token: keys and values of all key/value heads.
        window: Tokens that a query looks back on, itself counted; None for all.
    """

    weights: int
    pair_operations: int
    cached_width: int
    window: int | None

    def attended(self, length: int) -> int:
        """Return the tokens that the last of ``length`` attends to."""
        return length if self.window is None else min(length, self.window)


def layer_costs(config: PreTrainedConfig) -> list[LayerCost]:
    """Return the costs of each decoder layer of a dense or compressed model.

    Raises:
        InputError: If the family is not supported.
    """
    dims = dense_dimensions(config)
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * dims.num_layers
    costs = []
    for layer, layer_type in zip(config.per_layer_config, layer_types, strict=True):
        rank = getattr(layer, "value_head_dim", None) or dims.head_dim
        size = rank, layer.intermediate_size
        costs.append(
            LayerCost(
                weights=layer_weights(dims, size, getattr(layer, "query_key_rank", None)),
                pair_operations=pair_operations(dims, rank),
                cached_width=dims.num_kv_heads * (dims.head_dim + rank),
                window=getattr(layer, "sliding_window", None) if layer_type == "sliding_attention" else None,
            )
        )
    return costs


def prefill_flops(config: PreTrainedConfig, batch_size: int, prompt_length: int) -> int:
    """Return the operations of reading prompts, a multiplication and an addition counted as two.

    Every token attends to itself and those before it; logits are computed at each prompt's last token alone.
    """
    per_prompt = 0
    for layer in layer_costs(config):
        pairs = sum(layer.attended(length) for length in range(1, prompt_length + 1))
        per_prompt += 2 * layer.weights * prompt_length + layer.pair_operations * pairs
    return batch_size * (per_prompt + 2 * config.vocab_size * config.hidden_size)


def decode_bytes(
    config: PreTrainedConfig,
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    itemsize: int,
    *,
    has_static_cache: bool = False,
) -> float:
    """Return the bytes that one decoding step reads, on average over ``new_tokens`` after a prompt.

    The weights of the decoder layers and of the head once, and the keys and values of every sequence so far, the new
    token's included; a static cache is read whole, filled or not. Of embeddings a step reads one row per sequence,
    which is left out.
    """
    cached = 0.0
    weights = config.vocab_size * config.hidden_size
    for layer in layer_costs(config):
        weights += layer.weights
        first = new_tokens if has_static_cache else 1
        lengths = (layer.attended(prompt_length + max(first, step)) for step in range(1, new_tokens + 1))
        cached += layer.cached_width * sum(lengths) / new_tokens
    return itemsize * (weights + batch_size * cached)
