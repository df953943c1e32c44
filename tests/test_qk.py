"""Pruned queries and keys, beside what test_engine.py and layers/ show of all models: the factors and models of them.

Compressed models of this file come out of the engine itself, on tiny random models whose heads share keys.
"""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import main
from checkpoints import compressed, save_inputs
from conftest import tiny_model
from flatllmcore.core.attention_pca import headwise_pca
from flatllmcore.layers import compress_decoder_layer, compressed_config
from flatllmcore.layers.flat_attention import HeadwiseFactoredLinear
from flatllmcore.utils.layer_utils import count_parameters
from layers.tiny_models import DENSE, SIZES, dense_model_of, generate, kept
from python_process import BLOCKED, run_python


@pytest.fixture(params=DENSE)
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


def test_factors_of_full_rank_are_the_linear_layer():
    linear = torch.nn.Linear(7, 3 * 4).double()
    factored = HeadwiseFactoredLinear(7, 3, 4, rank=4, bias=True).double()
    Q = torch.linalg.qr(torch.randn(3, 4, 4, dtype=torch.float64))[0]
    with torch.no_grad():
        factored.up.copy_(Q)
        factored.down.weight.copy_((Q.mT @ linear.weight.view(3, 4, 7)).flatten(0, 1))
        factored.down.bias.copy_((Q.mT @ linear.bias.view(3, 4, 1)).flatten())
    for shape in ((7,), (5, 7), (2, 3, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(factored(x), linear(x))


def test_a_cache_a_batch_and_eager_attention_give_the_same_tokens(flat_model, tokens):
    expected = generate(flat_model, tokens)
    assert torch.equal(generate(flat_model, tokens, use_cache=False), expected)
    assert torch.equal(generate(flat_model, tokens, cache_implementation="static", disable_compile=True), expected)
    prompts = [row[: 9 - 2 * i] for i, row in enumerate(tokens)]
    padded = torch.stack([F.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    for implementation in ("sdpa", "eager"):
        flat_model.set_attn_implementation(implementation)
        assert torch.equal(generate(flat_model, tokens), expected)
        together = generate(flat_model, padded, attention_mask=(padded != 0).long())[:, 9:]
        one_by_one = [generate(flat_model, prompt[None])[0, len(prompt) :] for prompt in prompts]
        assert torch.equal(together, torch.stack(one_by_one))


def test_logits_do_not_depend_on_the_batch_or_on_how_a_text_is_split(flat_model, tokens):
    whole = flat_model(tokens).logits
    torch.testing.assert_close(torch.cat([flat_model(row[None]).logits for row in tokens]), whole)
    cache = DynamicCache(config=flat_model.config)
    parts = [flat_model(part, past_key_values=cache).logits for part in tokens.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert {layer.keys.shape[-1] for layer in cache.layers} == {SIZES["head_dim"]}


def test_gradients_reach_both_factors(flat_model, tokens):
    flat_model.train()(tokens, labels=tokens).loss.backward()
    attention = flat_model.model.layers[2].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        assert projection.up.grad.norm() > 0
        assert projection.down.weight.grad.norm() > 0


@pytest.mark.parametrize("flat_model", ["llama", "qwen3"], indirect=True)
def test_prompt_and_decoding_trace_to_one_graph_each(flat_model, tokens):
    traced = torch.compile(flat_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        run, expected = traced(tokens), flat_model(tokens)
        torch.testing.assert_close(run.logits, expected.logits, rtol=1e-4, atol=1e-4)
        run = traced(tokens[:, :1], past_key_values=run.past_key_values)
        expected = flat_model(tokens[:, :1], past_key_values=expected.past_key_values)
        torch.testing.assert_close(run.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("flat_model", ["llama"], indirect=True)
def test_a_saved_folder_tells_ranks_and_factors_and_loads_where_the_package_is_not_installed(
    flat_model, tokens, tmp_path
):
    flat_model.save_pretrained(tmp_path / "model")
    stored = json.loads((tmp_path / "model/config.json").read_text())["per_layer_config"]
    assert [stored[str(layer)].get("query_key_rank") for layer in range(3)] == [None, 12, 9]
    factors = {f"model.layers.2.self_attn.{p}_proj.{f}" for p in "qk" for f in ("down.weight", "up")}
    assert factors <= load_file(tmp_path / "model/model.safetensors").keys()
    torch.save({"tokens": tokens, "logits": flat_model(tokens).logits}, tmp_path / "expected.pt")
    load = f"""
import torch
from transformers import AutoModelForCausalLM
expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert torch.equal(model(expected["tokens"]).logits, expected["logits"])
"""
    run_python(BLOCKED + load, paths=(), HF_MODULES_CACHE=str(tmp_path / "modules"))


def test_a_uniform_rank_is_the_models_and_its_columns_start_orthonormal(tokens):
    flat = compressed_config(dense_model_of("llama").config, kept((5,) * 3, (40,) * 3, (7,) * 3))
    assert flat.query_key_rank == 7
    assert not flat.is_heterogeneous
    model = AutoModelForCausalLM.from_config(flat).eval()
    for layer in model.model.layers:
        up = layer.self_attn.k_proj.up
        torch.testing.assert_close(up.mT @ up, torch.eye(7).expand(2, 7, 7))
    assert torch.isfinite(model(tokens).logits).all()


def test_a_layer_refuses_a_missing_factor_and_the_weight_it_replaces():
    model = dense_model_of("llama")
    config = compressed_config(model.config, kept((16,) * 3, (96,) * 3, (None, 5, None)))
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}
    weights = {f"{name}.down.weight": torch.zeros(5 * count, 64) for name, count in heads.items()}
    weights |= {f"{name}.up": torch.zeros(count, 16, 5) for name, count in heads.items()}
    layer = model.model.layers[1].bfloat16().requires_grad_(False)
    flat = compress_decoder_layer(layer, config, 1, weights)
    assert {(p.dtype, p.requires_grad) for p in flat.parameters()} == {(torch.bfloat16, False)}
    for change, reason in (
        ({"self_attn.q_proj.up": torch.zeros(64, 5)}, r"self_attn\.q_proj\.up must be \(4, 16, 5\), got \(64, 5\)"),
        ({"self_attn.q_proj.weight": torch.zeros(64, 64)}, r"no parameter self_attn\.q_proj\.weight"),
    ):
        with pytest.raises(ValueError, match=f"layer 1: {reason}"):
            compress_decoder_layer(layer, config, 1, weights | change)
    del weights["self_attn.k_proj.up"]
    with pytest.raises(ValueError, match=r"layer 1: self_attn\.k_proj\.up must be .*, got nothing"):
        compress_decoder_layer(layer, config, 1, weights)


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
