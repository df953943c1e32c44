import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flatllmcore.layers import attention_value_width

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
