import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flatllmcore.layers import attention_value_width, flat_attention
from flatllmcore.layers.flat_attention import cached_value_width, one_token_attention

from .tiny_models import RANKS, SIZES, compress, dense_model_of, project_in_full_size


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("query_length", [1, 7])
@pytest.mark.parametrize("rank", [1, 24, 99, 127, 128])
def test_eager_attention_is_never_padded(rank, query_length, device_type):
    assert attention_value_width(rank, 128, query_length, "eager", device_type) == rank


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2", "flex_attention", "paged|sdpa"])
def test_a_prompt_gets_values_as_wide_as_the_keys(implementation, device_type):
    assert attention_value_width(24, 128, 7, implementation, device_type) == 128


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|eager"])
def test_functions_that_need_equal_widths_get_them_at_every_step(implementation):
    assert attention_value_width(24, 128, 1, implementation, "cuda") == 128


@pytest.mark.parametrize(
    ("rank", "head_dim", "width"), [(24, 128, 24), (25, 128, 32), (127, 128, 128), (1, 128, 8), (18, 20, 20)]
)
def test_one_new_token_on_an_accelerator_gets_the_next_multiple_of_8_within_head_dim(rank, head_dim, width):
    assert attention_value_width(rank, head_dim, 1, "sdpa", "cuda") == width


@given(
    head_dim=st.integers(1, 256),
    share=st.floats(0, 1),
    query_length=st.integers(1, 3),
    implementation=st.sampled_from(["eager", "sdpa", "flash_attention_2"]),
    device_type=st.sampled_from(["cpu", "cuda"]),
)
def test_the_width_lies_between_rank_and_head_dim(head_dim, share, query_length, implementation, device_type):
    rank = max(1, round(share * head_dim))
    assert rank <= attention_value_width(rank, head_dim, query_length, implementation, device_type) <= head_dim


def test_one_new_token_on_cpu_is_not_padded():
    assert attention_value_width(25, 128, 1, "sdpa", "cpu") == 25


def test_a_prompt_runs_on_the_fused_cpu_kernel(flat_model, tokens):
    """Without padding, torch answers unequal widths with its unfused path."""
    model = flat_model()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(tokens, use_cache=False)
    operators = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators
    assert "aten::_scaled_dot_product_attention_math" not in operators


MASKS = {
    "no mask": None,
    "bool": torch.tensor([[True, True, True, True, False], [False, True, True, True, True]])[:, None, None],
    "one for all, added": torch.tensor([0.0, -2.0, 1.5, -torch.inf, 0.0])[None, None, None],
}


@pytest.mark.parametrize("few_keys", [0, 2**16], ids=["plain", "fused"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_attention_of_one_token_is_softmax_of_scores_times_values(num_kv_heads, mask, few_keys, monkeypatch):
    """Oracle: one sequence and one head at a time, in float64."""
    monkeypatch.setattr(flat_attention, "_FEW_KEYS", few_keys)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 16, generator=generator)
    key = torch.randn(2, num_kv_heads, 5, 16, generator=generator)
    value = torch.randn(2, num_kv_heads, 5, 7, generator=generator)
    expected = torch.empty(2, 1, 42, dtype=torch.float64)
    for b in range(2):
        for h in range(6):
            g = h // (6 // num_kv_heads)
            scores = 0.3 * key[b, g].double() @ query[b, h, 0].double()
            if mask is not None:
                row = mask[b % len(mask), 0, 0]
                scores += row if row.dtype != torch.bool else torch.where(row, 0.0, -torch.inf)
            expected[b, 0, 7 * h : 7 * h + 7] = scores.softmax(0) @ value[b, g].double()
    found = one_token_attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("few_keys", [0, 2**16], ids=["plain", "fused"])
def test_attention_of_one_token_keeps_the_dtype(dtype, few_keys, monkeypatch):
    monkeypatch.setattr(flat_attention, "_FEW_KEYS", few_keys)
    query, key, value = (torch.randn(2, 4, length, width).to(dtype) for length, width in ((1, 16), (5, 16), (5, 7)))
    found = one_token_attention(query, key, value, None, 0.25)
    exact = one_token_attention(query.double(), key.double(), value.double(), None, 0.25)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("few_keys", [0, 2**16], ids=["plain", "fused"])
def test_decoding_on_cpu_copies_no_cache_to_float32(few_keys, monkeypatch, tokens):
    """With torch's answer to unequal widths, which does, the operator that it consists of is run."""
    monkeypatch.setattr(flat_attention, "_FEW_KEYS", few_keys)
    model = compress(dense_model_of("llama")).bfloat16()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(tokens[:, :1], past_key_values=cache)
    assert "aten::_scaled_dot_product_attention_math" not in {event.key for event in profiler.key_averages()}


def test_what_one_token_attention_does_not_take_goes_to_the_attention_function(flat_model, tokens, monkeypatch):
    """A mask per head, then dropout; the last line shows that a step without either would have been taken."""
    model = flat_model(attention_dropout=0.5)
    monkeypatch.setattr(flat_attention, "one_token_attention", None)
    cache = DynamicCache(config=model.config)
    expected = model(tokens).logits[:, -1]
    model(tokens[:, :-1], past_key_values=cache)
    length, heads = tokens.shape[1], SIZES["num_attention_heads"]
    mask = torch.ones(len(tokens), heads, 1, length, dtype=torch.bool)
    logits = model(tokens[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    model.train()(tokens[:, -1:], past_key_values=cache)
    model.eval()
    with pytest.raises(TypeError, match="not callable"):
        model(tokens[:, -1:], past_key_values=cache)


def test_a_layer_that_was_left_whole_decodes_bit_by_bit_as_the_dense_one(dense_model, tokens):
    dense = dense_model()
    state = {name: weight.clone() for name, weight in dense.state_dict().items()}
    flat = AutoModelForCausalLM.from_config(compress(dense_model(), (16,) * 3, (96,) * 3).config).eval()
    flat.load_state_dict(state)
    caches = [DynamicCache(config=model.config) for model in (dense, flat)]
    for step in tokens.split(1, dim=1):
        logits = [model(step, past_key_values=cache).logits for model, cache in zip((dense, flat), caches, strict=True)]
        assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("implementation", "device_type", "width"),
    [("sdpa", "cpu", 25), ("sdpa", "cuda", 32), ("eager", "cuda", 25), ("flash_attention_2", "cuda", 25)],
)
def test_values_are_cached_as_decoding_takes_them_where_that_costs_a_few_zeros(implementation, device_type, width):
    assert cached_value_width(25, 128, implementation, device_type) == width


def test_values_padded_in_the_cache_give_the_same_tokens(flat_model, tokens, monkeypatch):
    """As on an accelerator, which this pretends to be on by its widths."""
    model = flat_model()
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, **options)
    on_accelerator = flat_attention.attention_value_width
    monkeypatch.setattr(flat_attention, "attention_value_width", lambda *args: on_accelerator(*args[:4], "cuda"))
    monkeypatch.setattr(flat_attention.FlatAttention, "_takes_one_token_attention", lambda *_: False)
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(tokens, past_key_values=cache, **options), expected)
    assert [layer.values.shape[-1] for layer in cache.layers] == [8, 16, 16]
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)


def test_cached_values_are_as_wide_as_the_rank(flat_model, tokens):
    model = flat_model()
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    assert [layer.values.shape[-1] for layer in cache.layers] == list(RANKS)
    assert [layer.keys.shape[-1] for layer in cache.layers] == [SIZES["head_dim"]] * len(RANKS)


@pytest.mark.parametrize("fields", [{}, {"head_dim": 24}], ids=["head_dim 16", "head_dim 24"])
def test_eager_equals_sdpa(flat_model, tokens, fields):
    model = flat_model(**fields)
    model.set_attn_implementation("sdpa")
    expected = model(tokens).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_adopted", [True, False], ids=["adopted", "built anew"])
def test_set_attn_implementation_reaches_every_layer(flat_model, tokens, is_adopted):
    """A layer that kept its own copy of the config would stay with the old function."""
    called_from = []

    def counting_attention(module, *args, **kwargs):
        called_from.append(module.layer_idx)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counting", counting_attention)
    model = flat_model()
    if not is_adopted:
        model = AutoModelForCausalLM.from_config(model.config)
    model.set_attn_implementation("counting")
    model(tokens)
    assert called_from == [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("mistral", {}, [4, 4, 4]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [None, 4, 4]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, [None, None, 4]),
        ("qwen3", {"use_sliding_window": False}, [None, None, None]),
    ],
)
def test_the_attention_function_is_told_each_layers_window(family, fields, expected, tokens):
    """Fused functions apply the window themselves; the mask alone carries it on CPU."""
    windows = []

    def recording_attention(*args, sliding_window, **kwargs):
        windows.append(sliding_window)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("recording", recording_attention)
    model = compress(dense_model_of(family, sliding_window=4, **fields))
    model.set_attn_implementation("recording")
    model(tokens)
    assert windows == expected


def test_attention_weights_and_hidden_states_equal_those_of_the_projected_model(dense_model, flat_model, tokens):
    flat, dense = (
        flat_model(attn_implementation="eager"),
        project_in_full_size(dense_model(attn_implementation="eager")),
    )
    outputs = [model(tokens, output_attentions=True, output_hidden_states=True) for model in (flat, dense)]
    assert len(outputs[0].attentions) == 3
    assert len(outputs[0].hidden_states) == 4
    torch.testing.assert_close(outputs[0].attentions, outputs[1].attentions, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs[0].hidden_states, outputs[1].hidden_states, rtol=1e-3, atol=1e-4)


def test_attention_dropout_acts_in_training_only(flat_model, tokens):
    model = flat_model(attention_dropout=0.5)
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
