import subprocess
import sys
import textwrap

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .tiny_models import RANKS, SIZES, WIDTHS, compress, dense_model_of, project_in_full_size

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FIELDS_OF_ALL = {
    "plain": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "head_dim not hidden / heads": {"head_dim": 24},
    "one key-value head": {"num_key_value_heads": 1},
    "no groups": {"num_key_value_heads": 4},
    "scaled rope": {"rope_parameters": LLAMA3_ROPE},
}
FIELDS_OF_ONE = {
    "llama": {"biases": {"attention_bias": True, "mlp_bias": True}},
    "mistral": {"window shorter than the text": {"sliding_window": 4}, "no window": {"sliding_window": None}},
    "qwen2": {"windows in the last layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}},
    "qwen3": {
        "biases": {"attention_bias": True},
        "windows in two layers": {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    },
}
VARIANTS = [
    pytest.param(family, fields, id=f"{family}, {name}")
    for family, own_fields in FIELDS_OF_ONE.items()
    for name, fields in (FIELDS_OF_ALL | own_fields).items()
]


def generate(model, tokens, **options):
    """Return the tokens and eight more, decoded greedily."""
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False} | options
    return model.generate(tokens, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_full_rank_leaves_logits_as_they_were(dense_model, tokens):
    model = dense_model()
    expected = model(tokens).logits
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = compress(model, (16,) * 3, (96,) * 3).config
    assert not config.is_heterogeneous
    flat = AutoModelForCausalLM.from_config(config).eval()
    flat.load_state_dict(state)
    assert torch.equal(flat(tokens).logits, expected)


@pytest.mark.parametrize(("family", "fields"), VARIANTS)
def test_a_compressed_model_equals_the_dense_one_with_projected_weights(family, fields, tokens):
    flat, dense = compress(dense_model_of(family, **fields)), project_in_full_size(dense_model_of(family, **fields))
    torch.testing.assert_close(flat(tokens).logits, dense(tokens).logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(generate(flat, tokens), generate(dense, tokens))


def test_a_static_cache_gives_the_same_tokens(flat_model, tokens):
    model = flat_model()
    expected = generate(model, tokens)
    assert torch.equal(generate(model, tokens, cache_implementation="static"), expected)
    assert torch.equal(generate(model, tokens, use_cache=False), expected)


def test_a_prompt_read_in_chunks_gives_the_same_tokens(flat_model, tokens):
    """transformers then shapes a static cache beforehand, from a head_dim that the values do not have."""
    model = flat_model()
    expected = generate(model, tokens)
    chunked = generate(model, tokens, cache_implementation="static", prefill_chunk_size=4, disable_compile=True)
    assert torch.equal(chunked, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_batch_of_4_with_padding_equals_four_batches_of_1(flat_model, tokens, implementation):
    model = flat_model(attn_implementation=implementation)
    prompts = [row[: 9 - 2 * i] for i, row in enumerate(tokens)]
    padded = torch.stack([F.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    together = generate(model, padded, attention_mask=(padded != 0).long())[:, 9:]
    one_by_one = [generate(model, prompt[None])[0, len(prompt) :] for prompt in prompts]
    assert torch.equal(together, torch.stack(one_by_one))


def test_a_uniform_model_needs_no_per_layer_config(dense_model, tokens, tmp_path):
    model = compress(dense_model(), (5,) * 3, (40,) * 3)
    assert (model.config.value_head_dim, model.config.intermediate_size) == (5, 40)
    model.save_pretrained(tmp_path)
    assert "per_layer_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(("family", "fields"), VARIANTS)
def test_save_load_generate_is_bit_exact_and_saving_again_gives_the_same_files(family, fields, tokens, tmp_path):
    model = compress(dense_model_of(family, **fields))
    model.save_pretrained(tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(generate(loaded, tokens), generate(model, tokens))
    loaded.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_auto_classes_load_with_the_package(flat_model, family, tokens, tmp_path):
    model = flat_model()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == f"flat_{family}"
    assert [layer.intermediate_size for layer in config.per_layer_config] == list(WIDTHS)
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(trusted) is type(model)
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path)(tokens).last_hidden_state, model.model(tokens).last_hidden_state
    )


def test_the_folder_loads_where_the_package_is_not_installed(flat_model, tokens, tmp_path):
    """Also from there it can be saved again."""
    model = flat_model()
    model.save_pretrained(tmp_path / "model")
    torch.save({"tokens": tokens, "logits": model(tokens).logits}, tmp_path / "expected.pt")
    program = f"""
        import sys
        sys.modules["flatllmcore"] = None  # makes its import fail
        import torch
        from transformers import AutoModelForCausalLM

        expected = torch.load({str(tmp_path / "expected.pt")!r})
        for source, copy in (("model", "again"), ("again", "third")):
            model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + source, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules"), type(model)
            assert torch.equal(model(expected["tokens"]).logits, expected["logits"])
            model.generate(expected["tokens"], max_new_tokens=2, cache_implementation="static", disable_compile=True)
            model.save_pretrained({str(tmp_path)!r} + "/" + copy)
    """
    subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(program)],
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1", "PATH": ""},
        check=True,
    )
    assert contents(tmp_path / "third") == contents(tmp_path / "model")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(flat_model, tokens, use_reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        model = flat_model().train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def assert_compiled_equals_eager(model, tokens, **options):
    """Compare a prompt and one more token; the whole model must be one graph."""
    compiled = torch.compile(model, fullgraph=True, **options)
    next_token = torch.full((len(tokens), 1), 3)
    with torch.no_grad():
        run, reference = compiled(tokens), model(tokens)
        torch.testing.assert_close(run.logits, reference.logits, rtol=1e-4, atol=1e-4)
        run = compiled(next_token, past_key_values=run.past_key_values)
        reference = model(next_token, past_key_values=reference.past_key_values)
        torch.testing.assert_close(run.logits, reference.logits, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_prompt_and_decoding_trace_to_one_graph_each(flat_model, tokens):
    assert_compiled_equals_eager(flat_model(), tokens, backend="aot_eager")


@pytest.mark.slow
def test_compiled_prompt_and_decoding_equal_eager_ones(tokens):
    assert_compiled_equals_eager(compress(dense_model_of("llama")), tokens)


def test_config_refuses_a_value_width_beyond_head_dim(flat_model):
    config = flat_model().config
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"layer 1: value_head_dim must be in 1\.\.16, got 17"
    ):
        type(config)(**SIZES, per_layer_config={1: {"value_head_dim": 17}})


def test_parameters_bear_the_names_of_the_dense_model(dense_model, flat_model):
    assert list(flat_model().state_dict()) == list(dense_model().state_dict())
    assert [layer.self_attn.v_proj.out_features for layer in flat_model().model.layers] == [2 * r for r in RANKS]
