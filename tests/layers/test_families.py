"""Published models of every family, scaled down: from their ``config.json`` through the engine to a saved model.

The keys are those of the published files, old spellings included; only sizes differ. Oracles: the float64 method
of tests/oracle.py, and the model itself where nothing is removed.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import oracle
from flatllmbench.perplexity import perplexity
from flatllmcore import InputError
from flatllmcore.core.calibration import ModelInMemory, record_layer_arguments
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.layers import FAMILIES
from flatllmcore.utils.layer_utils import dimensions_from_config, load_config

from .test_flat_models import generate
from .tiny_models import random_model

CPU = torch.device("cpu")
COMMON = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "use_cache": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}


def shape(heads: int, kv_heads: int, hidden: int, mlp: int) -> dict[str, int]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "intermediate_size": mlp,
    }


def qwen_windows(is_used: bool, size: int | None, whole_layers: int) -> dict[str, Any]:
    return {"use_sliding_window": is_used, "sliding_window": size, "max_window_layers": whole_layers}


PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7b": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, **shape(4, 4, 32, 56)},
    "Llama-3.1-8B": {
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": [2, 3],
        "rope_scaling": LLAMA_3_ROPE,
        "rope_theta": 500000.0,
        **shape(4, 1, 48, 72),
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "head_dim": 8,
        "rope_scaling": LLAMA_3_ROPE | {"factor": 32.0},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        **shape(4, 2, 32, 56),
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        **shape(9, 3, 72, 96),
    },
    "Mistral-7B-v0.1": {"model_type": "mistral", "sliding_window": 5, "rope_theta": 10000.0, **shape(4, 1, 32, 56)},
    "Mistral-Nemo": {"model_type": "mistral", "head_dim": 8, "sliding_window": None, **shape(4, 1, 40, 56)},
    "Qwen2-7B": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        **qwen_windows(False, 128, 3),
        **shape(7, 1, 56, 72),
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        **qwen_windows(False, 128, 3),
        **shape(14, 2, 56, 72),
    },
    "Qwen2 with windows": {
        "model_type": "qwen2",
        "rope_theta": 10000.0,
        **qwen_windows(True, 5, 1),
        **shape(4, 2, 32, 56),
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 16,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        **qwen_windows(False, None, 3),
        **shape(4, 2, 32, 56),
    },
    "Qwen3 with biases and windows": {
        "model_type": "qwen3",
        "attention_bias": True,
        "head_dim": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **qwen_windows(True, 5, 3),
        **shape(4, 1, 32, 56),
    },
}


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """A random model in float64, by the road a checkpoint takes."""
    (tmp_path / "config.json").write_text(json.dumps(COMMON | PUBLISHED[request.param]))
    return random_model(load_config(str(tmp_path))).double()


def random_windows(count: int, seed: int) -> Tensor:
    return torch.randint(1, 97, (count, 16), generator=torch.Generator().manual_seed(seed))


def compress(
    model: PreTrainedModel, percent: float, *, scores: Sequence[float] = (0.4, 0.2, 0.3), prune_qk: bool = False
) -> tuple[PreTrainedModel, RankAllocation]:
    """Run the engine on ``model``, which becomes the compressed one; return it and its ranks."""
    selector = ImportancePreservingRankSelector(dimensions_from_config(model.config), prune_qk=prune_qk)
    allocation = selector.allocate(scores, percent)
    source = ModelInMemory(model, CPU)
    flat_config, _ = compress_layers(
        source, source, random_windows(24, 1), allocation, batch_size=7, tolerance=0.96, stopwatch=Stopwatch(CPU)
    )
    return source.adopt(flat_config), allocation


def test_every_family_has_a_published_model():
    assert {fields["model_type"] for fields in PUBLISHED.values()} == set(FAMILIES)


def test_dimensions_are_those_of_the_weights(published):
    dimensions = dimensions_from_config(published.config)
    attention, mlp = published.model.layers[0].self_attn, published.model.layers[0].mlp
    assert dimensions.architecture == published.config.model_type
    assert dimensions.num_layers == len(published.model.layers)
    assert attention.q_proj.weight.shape == (dimensions.num_heads * dimensions.head_dim, dimensions.hidden_size)
    assert attention.k_proj.weight.shape == (dimensions.num_kv_heads * dimensions.head_dim, dimensions.hidden_size)
    assert mlp.down_proj.weight.shape == (dimensions.hidden_size, dimensions.intermediate_size)
    weights = [w for name, w in published.model.layers[0].named_parameters() if name.endswith("proj.weight")]
    assert dimensions.layer_parameters == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keep_ratio_1_leaves_logits_as_they_were(published, implementation):
    published.set_attn_implementation(implementation)
    windows = random_windows(3, 2)
    expected = published(windows).logits
    kept_whole, _ = compress(published, 0.0, scores=(0.3, 0.3, 0.3))
    assert type(kept_whole) is FAMILIES[kept_whole.config.model_type.removeprefix("flat_")].causal_lm
    assert torch.equal(kept_whole(windows).logits, expected)


def test_importance_equals_the_oracle(published):
    windows = random_windows(5, 2)
    found = layer_importance(ModelInMemory(published, CPU), windows, 2, Stopwatch(CPU))
    assert found.scores == pytest.approx(oracle.importance(*oracle.weights_and_sizes(published), windows), rel=1e-5)


@pytest.mark.parametrize("prune_qk", [False, True], ids=["Q and K whole", "Q and K pruned"])
def test_a_compressed_model_equals_the_oracle(published, prune_qk):
    """The engine runs in float64, but transformers' norms and rotary embeddings do not: hence 1e-5."""
    weights, sizes = oracle.weights_and_sizes(published)
    windows, test_windows = random_windows(24, 1), random_windows(6, 2)
    dense_perplexity = oracle.perplexity(weights, sizes, test_windows)
    compressed, ranks = compress(published, 40, prune_qk=prune_qk)
    assert any(rank is not None for rank in ranks.query_key_rank) == prune_qk
    weights = oracle.compress(weights, sizes, windows, ranks.value_rank, ranks.mlp_width, prune_qk)
    expected = oracle.perplexity(weights, sizes, test_windows)
    measured = perplexity(ModelInMemory(compressed, CPU), test_windows, 4, Stopwatch(CPU)).value
    assert measured == pytest.approx(expected, rel=1e-5)
    assert abs(expected / dense_perplexity - 1) > 1e-2  # or nothing was compressed


def test_layer_arguments_are_those_the_model_passes(published):
    """Oracle: the model's own hidden states. Windows differ from layer to layer, and so must masks."""
    windows = random_windows(4, 2)
    arguments = record_layer_arguments(published.model, 16)
    states = published.model(windows, output_hidden_states=True).hidden_states
    for i, layer in enumerate(published.model.layers[:-1]):  # the last state is the norm's output
        torch.testing.assert_close(layer(states[i], **arguments[i]), states[i + 1])


@pytest.mark.parametrize("prune_qk", [False, True], ids=["Q and K whole", "Q and K pruned"])
def test_save_load_generate_and_save_again_are_bit_exact(published, prune_qk, tmp_path):
    compressed, ranks = compress(published.float(), 30, prune_qk=prune_qk)
    tokens = random_windows(4, 3)[:, :9]
    compressed.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded) is type(compressed)
    assert [layer.self_attn.value_head_dim for layer in loaded.model.layers] == list(ranks.value_rank)
    assert torch.equal(loaded(tokens).logits, compressed(tokens).logits)
    assert torch.equal(generate(loaded, tokens), generate(compressed, tokens))
    is_tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert is_tied == loaded.config.tie_word_embeddings
    loaded.save_pretrained(tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_batch_of_4_with_padding_equals_four_batches_of_1(published, cache):
    """In float64, where no near tie of two tokens depends on the order of a sum."""
    compressed, _ = compress(published, 30)
    options = {"cache_implementation": cache, "disable_compile": True}
    prompts = [row[: 9 - 2 * i] for i, row in enumerate(random_windows(4, 3))]
    padded = torch.stack([F.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    together = generate(compressed, padded, attention_mask=(padded != 0).long(), **options)[:, 9:]
    one_by_one = [generate(compressed, prompt[None], **options)[0, len(prompt) :] for prompt in prompts]
    assert torch.equal(together, torch.stack(one_by_one))


@pytest.mark.parametrize("published", ["Llama-3.1-8B", "Llama-3.2-1B"], indirect=True)
def test_the_rope_scaling_of_llama_3_changes_the_result(published):
    """Otherwise the tests above would not see it lost."""
    plain = copy.deepcopy(published.config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": plain.rope_parameters["rope_theta"]}
    windows = random_windows(2, 2)
    assert not torch.allclose(published(windows).logits, random_model(plain).double()(windows).logits, rtol=1e-2)


def test_an_unsupported_family_is_refused_by_name_before_any_weight_is_read(tmp_path):
    """There are no weights to read."""
    GPT2Config(n_layer=2).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"'gpt2' is not supported; supported: {', '.join(FAMILIES)}$"):
        dimensions_from_config(load_config(str(tmp_path)))


def test_a_family_transformers_does_not_know_is_refused_with_the_list(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "perceptron-1958"}')
    with pytest.raises(InputError, match=f"perceptron-1958.*one of the families {', '.join(FAMILIES)}$"):
        load_config(str(tmp_path))
