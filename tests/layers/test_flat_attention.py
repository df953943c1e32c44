from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flatllmcore.layers import compressed_config, flat_attention, flat_values
from flatllmcore.layers.flat_values import one_token_attention, padded_values, unplanned
from flatllmcore.utils.dimensions import Kept
from flatllmcore.utils.names import FAMILY_NAMES
from served_attention import served_logits

from .tiny_models import SIZES, compress, dense_model_of, generate, project_in_full_size


@pytest.mark.parametrize(
    ("implementations", "query_length", "device_type", "width_of"),
    [
        ("eager", 7, "cuda", lambda rank, _: rank),
        ("sdpa flash_attention_2 flex_attention", 7, "cpu", lambda _, head_dim: head_dim),
        ("sdpa flash_attention_2 flex_attention", 7, "cuda", lambda _, head_dim: head_dim),
        ("flash_attention_2 flash_attention_3 flex_attention", 1, "cuda", lambda _, head_dim: head_dim),
        ("sdpa", 1, "cpu", lambda rank, _: rank),
        ("sdpa", 1, "cuda", lambda rank, head_dim: min(next(w for w in range(rank, 999) if w % 8 == 0), head_dim)),
    ],
)
@given(head_dim=st.integers(1, 256), data=st.data())
def test_values_are_as_wide_as_the_attention_function_asks(
    implementations, query_length, device_type, width_of, head_dim, data
):
    value = torch.ones(3, data.draw(st.integers(1, head_dim)))
    for implementation in implementations.split():
        padded = padded_values(value, head_dim, query_length, implementation, device_type)
        assert padded.shape == (3, width_of(value.shape[1], head_dim))
        assert padded.sum() == value.numel()


@pytest.mark.parametrize(("length", "is_cuda", "is_on"), [(1, True, False), (7, True, True), (1, False, True)])
def test_a_token_on_a_gpu_is_kept_off_cudnn_and_the_setting_put_back(length, is_cuda, is_on):
    """A stand-in tells where it is; on a GPU the next test asks the layers."""
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled
    was_on = is_enabled()

    def fail_in(context):
        with context:
            is_off = length == 1 and is_cuda
            assert flat_values._cudnn_is_off.locked() == is_off  # no other thread's setting is put back
            raise ValueError(is_enabled())

    with pytest.raises(ValueError, match=str(was_on and is_on)):
        fail_in(unplanned(SimpleNamespace(shape=(2, 3, length, 8), is_cuda=is_cuda)))
    assert is_enabled() == was_on


def test_attention_of_a_prompt_may_be_planned_and_that_of_a_token_not(flat_model, tokens, device):
    seen = []

    def noting_attention(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("noting", noting_attention)
    model, tokens = flat_model().to(device), tokens.to(device)
    model.set_attn_implementation("noting")
    cache = DynamicCache(config=model.config)
    for part in (tokens, tokens[:, :1]):
        model(part, past_key_values=cache)
    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    assert seen == [was_on] * 3 + [was_on and device.type == "cpu"] * 3


MASKS = {
    "no mask": None,
    "bool": torch.tensor([[True, True, True, True, False], [False, True, True, True, True]])[:, None, None],
    "one for all, added": torch.tensor([0.0, -2.0, 1.5, -torch.inf, 0.0])[None, None, None],
}


@pytest.mark.parametrize("few_keys", [0, 2**16], ids=["plain", "fused"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_attention_of_one_token_is_softmax_of_scores_times_values(dtype, num_kv_heads, mask, few_keys, monkeypatch):
    """Oracle: one sequence and one head at a time, in float64."""
    monkeypatch.setattr(flat_values, "_FEW_KEYS", few_keys)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 16, generator=generator).to(dtype)
    key = torch.randn(2, num_kv_heads, 5, 16, generator=generator).to(dtype)
    value = torch.randn(2, num_kv_heads, 5, 7, generator=generator).to(dtype)
    mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
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
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_one_token_are_not_rounded_to_half_precision(dtype, monkeypatch):
    """All keys have 160,000 in common, which softmax takes away, and which is beyond float16."""
    monkeypatch.setattr(flat_values, "_FEW_KEYS", 0)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 16, generator=generator).to(dtype) for rows in (1, 5, 5))
    query[..., 0] = key[..., 0] = 400
    shifted = one_token_attention(query, key, value[..., :7], None, 0.25)
    query[..., 0] = 0
    expected = one_token_attention(query.double(), key.double(), value[..., :7].double(), None, 0.25)
    torch.testing.assert_close(shifted.double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("few_keys", [0, 2**16], ids=["plain", "fused"])
def test_a_row_of_padding_alone_stays_finite(few_keys, monkeypatch):
    """What it gives counts nowhere, but zero times NaN would."""
    monkeypatch.setattr(flat_values, "_FEW_KEYS", few_keys)
    query, key, value = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 3)
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 5)
    assert one_token_attention(query, key, value, mask, 0.3).isfinite().all()


@pytest.mark.parametrize("few_keys", [0, 2**16], ids=["plain", "fused"])
def test_prompt_and_decoding_on_cpu_avoid_the_unfused_path(few_keys, monkeypatch, flat_model, tokens):
    """It is torch's answer to unequal widths, and copies the cache to float32."""
    monkeypatch.setattr(flat_values, "_FEW_KEYS", few_keys)
    model = flat_model().bfloat16()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(tokens, past_key_values=cache)
        model(tokens[:, :1], past_key_values=cache)
    operators = {event.key for event in profiler.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators
    assert "aten::_scaled_dot_product_attention_math" not in operators


def test_what_one_token_attention_does_not_take_goes_to_the_attention_function(flat_model, tokens, monkeypatch):
    """A mask per head, then dropout, in training alone; the last line shows that other steps would have been taken."""
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
    assert not torch.equal(model(tokens).logits, model(tokens).logits)
    model.eval()
    with pytest.raises(TypeError, match="not callable"):
        model(tokens[:, -1:], past_key_values=cache)


def test_a_cache_is_taken_by_its_names_before_and_since_transformers_5_24(flat_model, tokens):
    """By a layer's attention, whichever of them the decoder uses: the outputs see what is cached."""
    model = flat_model()
    hidden, attention, outputs = model.model.embed_tokens(tokens), model.model.layers[0].self_attn, []
    angles = torch.rand(1, tokens.shape[1], attention.head_dim // 2).repeat(1, 1, 2)
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        for part in (slice(0, 4), slice(4, None)):
            turned = angles[:, part].cos(), angles[:, part].sin()
            outputs.append(attention(hidden[:, part], turned, **{name: cache})[0])
        assert cache.get_seq_length() == tokens.shape[1]
    assert torch.equal(outputs[1], outputs[3])


def test_a_model_that_was_left_whole_decodes_bit_by_bit_as_the_dense_one(dense_model, tokens):
    """On a CPU: on a GPU the dense model's attention of one token may be that of cuDNN."""
    dense = dense_model()
    flat = AutoModelForCausalLM.from_config(compress(dense_model(), (16,) * 3, (96,) * 3).config).eval()
    flat.load_state_dict(dense.state_dict())
    assert not flat.config.is_heterogeneous
    assert torch.equal(flat(tokens).logits, dense(tokens).logits)
    caches = [DynamicCache(config=model.config) for model in (dense, flat)]
    for step in tokens.split(1, dim=1):
        logits = [model(step, past_key_values=cache).logits for model, cache in zip((dense, flat), caches, strict=True)]
        assert torch.equal(*logits)


def test_values_padded_in_the_cache_give_the_same_tokens(flat_model, tokens, monkeypatch):
    """As on an accelerator, which this pretends to be on by its widths."""
    model = flat_model()
    expected = generate(model, tokens)
    monkeypatch.setattr(flat_attention, "padded_values", lambda *args: padded_values(*args[:4], "cuda"))
    monkeypatch.setattr(flat_attention.FlatAttention, "_takes_one_token_attention", lambda *_: False)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(model, tokens, past_key_values=cache), expected)
    assert [layer.values.shape[-1] for layer in cache.layers] == [8, 16, 16]
    assert torch.equal(generate(model, tokens, cache_implementation="static"), expected)


@pytest.mark.parametrize("is_adopted", [True, False], ids=["adopted", "built anew"])
@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, [None, None, None]),  # the field of another family
        ("mistral", {}, [4, 4, 4]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [None, 4, 4]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, [None, None, 4]),
        ("qwen3", {"use_sliding_window": False}, [None, None, None]),
    ],
)
def test_a_new_attention_function_is_called_by_every_layer_with_its_window(
    family, fields, expected, is_adopted, tokens
):
    """Fused functions apply the window themselves; a layer with its own copy of the config would keep the old one."""
    called = []

    def recording_attention(module, *args, sliding_window, **kwargs):
        called.append((module.layer_idx, sliding_window))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("recording", recording_attention)
    model = compress(dense_model_of(family, sliding_window=4, **fields))
    if not is_adopted:
        model = AutoModelForCausalLM.from_config(model.config)
    model.set_attn_implementation("recording")
    model(tokens)
    assert called == list(enumerate(expected))


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name != "gemma2"])
def test_the_attention_of_servers_gives_the_same_bits(flat_model, tokens):
    model = flat_model()
    assert torch.equal(served_logits(model, tokens[:1]), model(tokens[:1], use_cache=False).logits)
    assert type(model).is_backend_compatible()


def test_scores_are_capped_there_too(tokens):
    model = compress(dense_model_of("gemma2", attn_logit_softcapping=1.0))
    model.set_attn_implementation("eager")  # which caps them, as torch's own does not
    expected = model(tokens[:1], use_cache=False).logits
    torch.testing.assert_close(served_logits(model, tokens[:1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_queries_and_keys_of_few_pairs_are_served_too(family, tokens):
    sizes = [Kept(0.5, rank, 40, None, pairs) for rank, pairs in ((5, 6), (16, 3), (11, None))]
    model = AutoModelForCausalLM.from_config(compressed_config(dense_model_of(family).config, sizes)).eval()
    served = served_logits(model, tokens[:1])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(served, model(tokens[:1], use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_attention_weights_and_hidden_states_equal_those_of_the_projected_model(dense_model, flat_model, tokens):
    models = flat_model(attn_implementation="eager"), project_in_full_size(dense_model(attn_implementation="eager"))
    outputs = [model(tokens, output_attentions=True, output_hidden_states=True) for model in models]
    assert len(outputs[0].attentions) == 3
    assert len(outputs[0].hidden_states) == 4
    torch.testing.assert_close(outputs[0].attentions, outputs[1].attentions, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(outputs[0].hidden_states, outputs[1].hidden_states, rtol=1e-3, atol=1e-4)
