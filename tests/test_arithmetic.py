"""Operations and bytes of inference, counted from configs, against what runs of the models do."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from flatllmbench.arithmetic import decode_bytes, layer_costs, prefill_flops
from flatllmbench.timing import kv_cache_bytes
from flatllmcore.layers import compressed_config
from flatllmcore.layers.flat_attention import HeadwiseFactoredLinear
from layers.tiny_models import RANKS, SIZES, WIDTHS, compress, dense_model_of

BATCH, PROMPT, NEW = 3, 11, 4


def models() -> dict[str, PreTrainedModel]:
    dense = dense_model_of("llama")
    with_ranks_of_qk = compressed_config(dense.config, RANKS, WIDTHS, (None, 6, 3))
    return {
        "dense": dense,
        "compressed": compress(dense_model_of("llama")),
        "Q and K compressed too": AutoModelForCausalLM.from_config(with_ranks_of_qk),
        "biases and a head_dim of its own": compress(dense_model_of("llama", attention_bias=True, head_dim=24)),
        "tied": compress(dense_model_of("llama", tie_word_embeddings=True)),
    }


@pytest.fixture(params=models())
def model(request) -> PreTrainedModel:
    return models()[request.param].eval()


@torch.no_grad()
def test_operations_of_a_prompt_are_those_that_torch_counts(model):
    """Eager attention computes the scores of tokens to come, too."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(BATCH, PROMPT, dtype=torch.long), use_cache=False, logits_to_keep=1)
    pairs_to_come = BATCH * PROMPT * (PROMPT - 1) // 2
    attentions = [layer.self_attn for layer in model.model.layers]
    widths = [SIZES["num_attention_heads"] * each.head_dim + each.o_proj.in_features for each in attentions]
    assert counter.get_total_flops() == prefill_flops(model.config, BATCH, PROMPT) + 2 * sum(widths) * pairs_to_come


@torch.no_grad()
def test_bytes_of_a_step_are_the_linear_weights_and_the_cache(model):
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    factors = [module.up for module in model.modules() if isinstance(module, HeadwiseFactoredLinear)]
    weights = sum(tensor.numel() * tensor.itemsize for tensor in linear + factors)
    cache = DynamicCache(config=model.config)
    model(torch.ones(BATCH, PROMPT, dtype=torch.long), past_key_values=cache)
    cached = 0
    for _ in range(NEW):
        model(torch.ones(BATCH, 1, dtype=torch.long), past_key_values=cache)
        cached += kv_cache_bytes(cache)
    assert decode_bytes(model.config, BATCH, PROMPT, NEW, itemsize=4) == weights + cached / NEW
    static = decode_bytes(model.config, BATCH, PROMPT, NEW, itemsize=4, has_static_cache=True)
    assert static == weights + kv_cache_bytes(cache)  # at every step as much as at the last


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("mistral", {"sliding_window": 4}, [4, 4, 4]),
        ("mistral", {"sliding_window": None}, [None, None, None]),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}, [None, None, 4]),
        ("qwen3", {"use_sliding_window": False}, [None, None, None]),
    ],
)
def test_tokens_attend_within_a_layers_window_alone(family, fields, windows):
    """Oracle: pairs of tokens, one by one."""
    config = compress(dense_model_of(family, **fields)).config
    assert [layer.window for layer in layer_costs(config)] == windows
    pairs = [
        sum(1 for i in range(PROMPT) for j in range(i + 1) if window is None or i - j < window) for window in windows
    ]
    widths = [2 * SIZES["num_attention_heads"] * (SIZES["head_dim"] + rank) for rank in RANKS]
    attention = sum(count * width for count, width in zip(pairs, widths, strict=True))
    linear = 2 * PROMPT * sum(layer.weights for layer in layer_costs(config))
    head = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    assert prefill_flops(config, 1, PROMPT) == linear + attention + head
