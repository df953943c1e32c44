"""Pruned queries and keys: the method's step 6, from the moments to a saved model.

Compressed models of this file come out of the engine itself, on tiny random models whose heads share keys. The
float64 oracle (tests/oracle.py) knows no factors: it projects the weights of Q and K at full width.
"""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import oracle
from conftest import ranks_of, tiny_model, widths_of
from flatllmcore.core.attention_pca import headwise_pca
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.engine.perplexity import perplexity
from flatllmcore.engine.protocols import LayerRecord
from flatllmcore.engine.taps import tapped
from flatllmcore.layers import compress_decoder_layer, compressed_config
from flatllmcore.layers.flat_attention import HeadwiseFactoredLinear
from flatllmcore.methods import METHODS
from flatllmcore.methods.flatllm import FlatLLMStep
from flatllmcore.utils.dimensions import Kept
from flatllmcore.utils.layer_utils import count_parameters, dimensions_from_config
from layers.tiny_models import DENSE, SIZES, dense_model_of, kept
from test_main import read, run, save_checkpoint, save_text

CPU = torch.device("cpu")
VARIANTS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 5}),
]


def compress_with_qk(
    model: PreTrainedModel, windows: Tensor, percent: float, batch_size: int = 5
) -> tuple[PreTrainedModel, RankAllocation, list[LayerRecord]]:
    """Compress ``model`` in place; its first layer counts most, so the last is compressed most."""
    dimensions = dimensions_from_config(model.config)
    scores = [0.5 - 0.1 * layer for layer in range(dimensions.num_layers)]
    allocation = ImportancePreservingRankSelector(dimensions, prune_qk=True).allocate(scores, 1 - percent / 100)
    source = ModelInMemory(model, CPU)
    flat_config, records = compress_layers(
        source, source, windows, METHODS["flatllm"], allocation, batch_size=batch_size, tolerance=0.96
    )
    return source.adopt(flat_config), allocation, records


@pytest.fixture(params=DENSE)
def flat_model(request: pytest.FixtureRequest, tokens: Tensor) -> PreTrainedModel:
    """A model of each family whose three layers keep Q and K whole, at 12 of 16 directions, and at fewer."""
    biases = {"attention_bias": True} if request.param in ("llama", "qwen3") else {}
    model, allocation, _ = compress_with_qk(dense_model_of(request.param, **biases), tokens, 22)
    assert allocation.query_key_rank == (None, 12, 9)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(1))


def generate(model: PreTrainedModel, tokens: Tensor, **options) -> Tensor:
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False} | options
    return model.generate(tokens, **options)


# The method


@pytest.mark.parametrize("percent", [20, 45])
@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_perplexity_equals_the_oracle(family, overrides, percent, windows):
    model = tiny_model(family, **overrides)
    weights, sizes = oracle.weights_and_sizes(model)
    model, allocation, _ = compress_with_qk(model, windows, percent)
    assert any(kept.query_key_rank is not None for kept in allocation.layers)
    expected = oracle.compress(weights, sizes, windows, ranks_of(allocation), widths_of(allocation), prune_qk=True)

    test_windows = torch.randint(97, (6, 16), generator=torch.Generator().manual_seed(2))
    measured = perplexity(ModelInMemory(model, CPU), test_windows, 4).value
    assert measured == pytest.approx(oracle.perplexity(expected, sizes, test_windows), rel=1e-5)
    whole = oracle.compress(weights, sizes, windows, ranks_of(allocation), widths_of(allocation))
    assert measured != pytest.approx(oracle.perplexity(whole, sizes, test_windows), rel=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_of_queries_and_keys_is_the_sum_of_dropped_eigenvalues(bias, windows):
    """Oracle: the outputs of both projections on the first layer's input, which is the same before and after."""
    model = tiny_model(attention_bias=bias)
    dense = copy.deepcopy(model).model
    model, allocation, _ = compress_with_qk(model, windows, 60)
    rank = allocation.layers[0].query_key_rank
    assert rank is not None
    rows = dense.layers[0].input_layernorm(dense.embed_tokens(windows)).flatten(0, 1)
    for name in ("q_proj", "k_proj"):
        outputs = getattr(dense.layers[0].self_attn, name)(rows).unflatten(-1, (-1, 12)).transpose(0, 1)  # (H, T, d)
        factored = getattr(model.model.layers[0].self_attn, name)(rows).unflatten(-1, (-1, 12)).transpose(0, 1)
        errors = (outputs - factored).square().sum((1, 2))
        dropped = headwise_pca(outputs.mT @ outputs)[0][:, rank:].sum(-1)
        torch.testing.assert_close(errors, dropped)


def test_nothing_removed_gives_the_very_same_logits(model, windows):
    before = model(windows).logits
    model, allocation, _ = compress_with_qk(model, windows, 0)
    assert [kept.query_key_rank for kept in allocation.layers] == [None, None]
    assert torch.equal(model(windows).logits, before)


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


def test_the_result_does_not_depend_on_the_batch_size(windows):
    """Bases are fixed only up to sign, so magnitudes are compared."""
    together, _, _ = compress_with_qk(tiny_model(), windows, 45, batch_size=24)
    one_by_one, _, _ = compress_with_qk(tiny_model(), windows, 45, batch_size=1)
    for (name, a), (_, b) in zip(together.state_dict().items(), one_by_one.state_dict().items(), strict=True):
        torch.testing.assert_close(a.abs(), b.abs(), rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("percent", [10, 25, 40, 60, 80])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reported_parameters_are_those_of_the_model(percent, kv_heads, windows):
    """Oracle: the sizes of the tensors under their names, the second factors included."""
    model, allocation, records = compress_with_qk(tiny_model(num_key_value_heads=kv_heads), windows, percent)
    linear = [p.numel() for name, p in model.named_parameters() if ".layers." in name and "_proj." in name]
    assert allocation.parameters_after == sum(linear) == count_parameters(model)["decoder_linear"]
    for asked, record, layer in zip(allocation.layers, records, model.model.layers, strict=True):
        assert asked.query_key_rank == record.query_key_rank
        assert isinstance(layer.self_attn.q_proj, HeadwiseFactoredLinear) == (asked.query_key_rank is not None)


# Moments


@pytest.mark.parametrize("rank", [None, 5])
def test_moments_of_queries_and_keys_are_summed_only_when_asked(rank):
    """Oracle: the products of the projections' outputs, head by head."""
    layer, dimensions = tiny_model(attention_bias=True).model.layers[0], dimensions_from_config(tiny_model().config)
    step = FlatLLMStep(dimensions, Kept(0.5, 5, 20, rank))
    sums, rows = step.zeros(layer), torch.randn(3, 5, 32, dtype=torch.float64)

    def forward(part):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name)(part)
        layer.mlp(part)
        raise AssertionError("the last tap ends the pass")

    with tapped(layer, step.taps) as look:
        for part in rows:
            step.add(sums, look(lambda part=part: forward(part[None])))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    names = [name for name in ("q_proj", "k_proj", "v_proj") if f"self_attn.{name}.output" in sums]
    assert names == (["v_proj"] if rank is None else ["q_proj", "k_proj", "v_proj"])
    for name in names:
        outputs = getattr(layer.self_attn, name)(rows.flatten(0, 1)).unflatten(-1, (-1, 12)).transpose(0, 1)
        torch.testing.assert_close(sums[f"self_attn.{name}.output"], outputs.mT @ outputs)
    assert sums["tokens"] == 15


def test_a_moment_that_is_not_finite_names_projection_and_head():
    moment = torch.eye(3, dtype=torch.float64).repeat(4, 1, 1)
    moment[2, 1, 1] = float("inf")
    with pytest.raises(ArithmeticError, match=r"the q_proj moment of heads \[2\] is not finite"):
        headwise_pca(moment, "q_proj")


# The model


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
    compiled = torch.compile(flat_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        run, expected = compiled(tokens), flat_model(tokens)
        torch.testing.assert_close(run.logits, expected.logits, rtol=1e-4, atol=1e-4)
        run = compiled(tokens[:, :1], past_key_values=run.past_key_values)
        expected = flat_model(tokens[:, :1], past_key_values=expected.past_key_values)
        torch.testing.assert_close(run.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_save_load_generate_is_bit_exact(flat_model, tokens, tmp_path):
    flat_model.save_pretrained(tmp_path / "first")
    names = {name for name in load_file(tmp_path / "first" / "model.safetensors") if ".layers.2." in name}
    factors = {f"model.layers.2.self_attn.{p}_proj.{f}" for p in "qk" for f in ("down.weight", "up")}
    assert factors <= names
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(flat_model)
    assert torch.equal(loaded(tokens).logits, flat_model(tokens).logits)
    assert torch.equal(generate(loaded, tokens), generate(flat_model, tokens))
    loaded.save_pretrained(tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("flat_model", ["llama"], indirect=True)
def test_the_folder_loads_where_the_package_is_not_installed(flat_model, tokens, tmp_path):
    flat_model.save_pretrained(tmp_path / "model")
    torch.save({"tokens": tokens, "logits": flat_model(tokens).logits}, tmp_path / "expected.pt")
    program = f"""
        import sys
        sys.modules["flatllmcore"] = None  # makes its import fail
        import torch
        from transformers import AutoModelForCausalLM

        expected = torch.load({str(tmp_path / "expected.pt")!r})
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        assert torch.equal(model(expected["tokens"]).logits, expected["logits"])
    """
    subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(program)],
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=True,
    )


def test_ranks_stand_in_the_config_where_layers_differ(flat_model, tmp_path):
    flat_model.config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["per_layer_config"]
    assert [stored[str(layer)].get("query_key_rank") for layer in range(3)] == [None, 12, 9]
    loaded = type(flat_model.config).from_pretrained(tmp_path)
    assert [layer.query_key_rank for layer in loaded.per_layer_config] == [None, 12, 9]


def test_a_uniform_rank_is_the_models(tokens):
    config = dense_model_of("llama").config
    flat = compressed_config(config, kept((5,) * 3, (40,) * 3, (7,) * 3))
    assert flat.query_key_rank == 7
    assert not flat.is_heterogeneous
    model = AutoModelForCausalLM.from_config(flat).eval()
    assert {layer.self_attn.k_proj.up.shape for layer in model.model.layers} == {(2, 16, 7)}
    assert torch.isfinite(model(tokens).logits).all()


def test_a_new_model_starts_with_orthonormal_columns(flat_model):
    fresh = AutoModelForCausalLM.from_config(flat_model.config)
    up = fresh.model.layers[2].self_attn.q_proj.up
    torch.testing.assert_close(up.mT @ up, torch.eye(9).expand(4, 9, 9))


def test_a_layer_refuses_a_missing_factor_and_the_weight_it_replaces():
    model = dense_model_of("llama")
    config = compressed_config(model.config, kept((16,) * 3, (96,) * 3, (None, 5, None)))
    factors = {"down.weight": (5, 64), "up": (16, 5)}
    weights = {f"self_attn.k_proj.{name}": torch.zeros(2 * a, b) for name, (a, b) in factors.items()}
    weights |= {f"self_attn.q_proj.{name}": torch.zeros(4 * a, b) for name, (a, b) in factors.items()}
    layer = model.model.layers[1]
    with pytest.raises(ValueError, match=r"layer 1: self_attn\.q_proj\.up must be \(4, 16, 5\), got \(64, 5\)"):
        compress_decoder_layer(layer, config, 1, weights)
    for name in ("self_attn.q_proj.up", "self_attn.k_proj.up"):
        weights[name] = weights[name].view(-1, 16, 5)
    flat = compress_decoder_layer(layer.bfloat16().requires_grad_(False), config, 1, weights)
    assert {(p.dtype, p.requires_grad) for p in flat.parameters()} == {(torch.bfloat16, False)}
    with pytest.raises(ValueError, match=r"layer 1: no parameter self_attn\.q_proj\.weight"):
        compress_decoder_layer(layer, config, 1, weights | {"self_attn.q_proj.weight": torch.zeros(64, 64)})
    del weights["self_attn.k_proj.up"]
    with pytest.raises(ValueError, match=r"layer 1: self_attn\.k_proj\.up must be \(2, 16, 5\), got nothing"):
        compress_decoder_layer(layer, config, 1, weights)


# The program


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model and a text."""
    save_checkpoint(tmp_path / "llama", "llama", torch.float32)
    save_text(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_flag_prunes_saves_and_counts(here):
    assert run("--prune_qk", "--save_model", "out") == 0
    record = read("logs/llama_flatllm_30.json")
    assert record["prune_qk"] is True
    assert any(layer["query_key_rank"] is not None for layer in record["layers"])
    model = AutoModelForCausalLM.from_pretrained("out")
    assert record["parameters_after"] == count_parameters(model)
    removed = 1 - record["parameters_after"]["decoder_linear"] / record["parameters_before"]["decoder_linear"]
    assert record["achieved_sparsity_percent"] == pytest.approx(100 * removed)
    assert "query, key, value and output projections" in (here / "out" / "README.md").read_text()


def test_ranks_made_with_the_other_choice_are_refused(here, capfd):
    assert run("--prune_qk") == 0
    assert run() == 2
    assert "are for pruned Q and K, which are whole here; give --prune_qk" in capfd.readouterr().err
    assert run("--bi_score", "ranks/llama/importance.json") == 0
    assert all(layer["query_key_rank"] is None for layer in read("logs/llama_flatllm_30.json")["layers"])


def test_queries_and_keys_stay_whole_by_default(here):
    assert run() == 0
    record = read("logs/llama_flatllm_30.json")
    assert record["prune_qk"] is False
    assert read("ranks/llama/ranks_30.json")["prune_qk"] is False
    assert run("--prune_qk") == 2
