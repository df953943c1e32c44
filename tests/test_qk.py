"""Pruned queries and keys, beside what test_engine.py and layers/ show of all models: the factors, and models of them.

Compressed models of this file come out of the engine itself, on tiny random models whose heads share keys.
"""

import copy
import json

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import main
from checkpoints import compressed, save_inputs
from conftest import tiny_model
from flatllmcore.core.attention_pca import headwise_pca
from flatllmcore.layers import compressed_config
from flatllmcore.utils.layer_utils import count_parameters
from layers.tiny_models import KINDS, SIZES, dense_model_of, generate, kept


@pytest.fixture(params=KINDS)
def flat_model(request: pytest.FixtureRequest, tokens: Tensor) -> PreTrainedModel:
    """A model of each family whose three layers keep Q and K whole, at 12 of 16 directions, and at fewer."""
    biases = {"attention_bias": True} if request.param in ("llama", "qwen3") else {}
    model, allocation, _ = compressed(dense_model_of(request.param, **biases), tokens, 0.78, prune_qk=True)
    assert [of.query_key_rank for of in allocation.layers] == [None, 12, 9]
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_of_queries_and_keys_is_the_sum_of_dropped_eigenvalues(bias, windows):
    """Oracle: the outputs of both projections on the first layer's input, which is the same before and after."""
    model = tiny_model(attention_bias=bias)
    dense = copy.deepcopy(model).model
    model, allocation, _ = compressed(model, windows, 0.4, prune_qk=True)
    rank = allocation.layers[0].query_key_rank
    assert rank is not None
    rows = dense.layers[0].input_layernorm(dense.embed_tokens(windows)).flatten(0, 1)
    for name in ("q_proj", "k_proj"):
        outputs = getattr(dense.layers[0].self_attn, name)(rows).unflatten(-1, (-1, 12)).transpose(0, 1)  # (H, T, d)
        factored = getattr(model.model.layers[0].self_attn, name)(rows).unflatten(-1, (-1, 12)).transpose(0, 1)
        errors = (outputs - factored).square().sum((1, 2))
        dropped = headwise_pca(outputs.mT @ outputs)[0][:, rank:].sum(-1)
        torch.testing.assert_close(errors, dropped)


def test_every_cache_and_eager_attention_give_the_same_tokens(flat_model, tokens):
    expected = generate(flat_model, tokens)
    assert torch.equal(generate(flat_model, tokens, use_cache=False), expected)
    assert torch.equal(generate(flat_model, tokens, cache_implementation="static", disable_compile=True), expected)
    flat_model.set_attn_implementation("eager")
    assert torch.equal(generate(flat_model, tokens), expected)


def test_logits_do_not_depend_on_the_batch_or_on_how_a_text_is_split(flat_model, tokens):
    whole = flat_model(tokens).logits
    torch.testing.assert_close(torch.cat([flat_model(row[None]).logits for row in tokens]), whole)
    cache = DynamicCache(config=flat_model.config)
    parts = [flat_model(part, past_key_values=cache).logits for part in tokens.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert {layer.keys.shape[-1] for layer in cache.layers} == {SIZES["head_dim"]}


def test_a_uniform_rank_is_the_models_and_its_columns_start_orthonormal(tokens):
    flat = compressed_config(dense_model_of("llama").config, kept((5,) * 3, (40,) * 3, (7,) * 3))
    assert flat.query_key_rank == 7
    assert not flat.is_heterogeneous
    model = AutoModelForCausalLM.from_config(flat).eval()
    for layer in model.model.layers:
        up = layer.self_attn.k_proj.up
        torch.testing.assert_close(up.mT @ up, torch.eye(7).expand(2, 7, 7))
    assert torch.isfinite(model(tokens).logits).all()


def test_the_flag_prunes_saves_and_counts(tmp_path, monkeypatch):
    save_inputs(tmp_path, torch.float32)
    monkeypatch.chdir(tmp_path)
    sizes = ["--nsamples", "6", "--seqlen", "32", "--device", "cpu", "--sparsity_ratio", "30"]
    assert main.main(["--model", "dense", "--dataset", "text", *sizes, "--prune_qk", "--save_model", "out"]) == 0
    record = json.loads((tmp_path / "logs/dense_flatllm_30.json").read_text())
    assert record["prune_qk"] is True
    assert any(layer["query_key_rank"] is not None for layer in record["layers"])
    assert record["parameters_after"] == count_parameters(AutoModelForCausalLM.from_pretrained("out"))
    removed = 1 - record["parameters_after"]["decoder_linear"] / record["parameters_before"]["decoder_linear"]
    assert record["achieved_sparsity_percent"] == pytest.approx(100 * removed)
    assert "query, key, value and output projections" in (tmp_path / "out" / "README.md").read_text()
