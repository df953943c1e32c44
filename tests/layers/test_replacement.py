import copy

import pytest
import torch
from transformers import GPT2Config

from flatllmcore import InputError
from flatllmcore.layers import (
    FAMILIES,
    adopt_compressed_layers,
    compress_decoder_layer,
    compressed_config,
    empty_decoder_layer,
)

from .tiny_models import RANKS, WIDTHS, compress, dense_model_of, projected_weights


def test_the_config_keeps_everything_else(dense_model):
    model = dense_model(
        tie_word_embeddings=True, bos_token_id=5, dtype="bfloat16", max_position_embeddings=77, use_cache=False
    )
    model.config._name_or_path = "somewhere/base"
    model.set_attn_implementation("eager")
    flat = compressed_config(model.config, RANKS, WIDTHS)
    widths = {"intermediate_size", "value_head_dim", "model_type", "per_layer_config"}
    for name, value in model.config.to_dict().items():
        if name not in widths:
            assert flat.to_dict()[name] == value, name
    assert flat.dtype is torch.bfloat16
    assert flat._name_or_path == "somewhere/base"
    assert flat._attn_implementation == "eager"
    assert [layer.value_head_dim for layer in flat.per_layer_config] == list(RANKS)
    assert [layer.intermediate_size for layer in flat.per_layer_config] == list(WIDTHS)


@pytest.mark.parametrize(
    ("ranks", "widths", "message"),
    [
        ((5, 5), WIDTHS, "value ranks: expected 3, one per layer, got 2"),
        (RANKS, (9,) * 4, "MLP widths: expected 3, one per layer, got 4"),
        ((5, 17, 5), WIDTHS, "layer 1 must be in 1..16, got 17"),
        (RANKS, (9, 9, 0), "layer 2 must be in 1..96, got 0"),
    ],
)
def test_the_config_refuses_widths_the_model_has_not(dense_model, ranks, widths, message):
    with pytest.raises(ValueError, match=message):
        compressed_config(dense_model().config, ranks, widths)


def test_other_families_and_compressed_models_are_refused(flat_model):
    with pytest.raises(InputError, match=f"'gpt2' is not supported; supported: {', '.join(FAMILIES)}"):
        compressed_config(GPT2Config(), RANKS, WIDTHS)
    with pytest.raises(InputError, match="compressed already"):
        compressed_config(flat_model().config, RANKS, WIDTHS)


def test_an_empty_layer_has_the_shapes_of_its_place(dense_model, family):
    config = compressed_config(dense_model().config, RANKS, WIDTHS)
    for i in range(3):
        layer = empty_decoder_layer(config, i)
        assert type(layer) is FAMILIES[family].decoder_layer
        assert layer.self_attn.v_proj.weight.shape == (2 * RANKS[i], 64)
        assert layer.self_attn.o_proj.weight.shape == (64, 4 * RANKS[i])
        assert layer.mlp.down_proj.weight.shape == (64, WIDTHS[i])
        assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_a_compressed_layer_shares_what_it_keeps_and_copies_what_is_new(dense_model):
    model = dense_model().to(torch.bfloat16).train().requires_grad_(False)
    config = compressed_config(model.config, RANKS, WIDTHS)
    dense = model.model.layers[0]
    weights = projected_weights(copy.deepcopy(dense).double(), RANKS[0], WIDTHS[0])[0]
    before = copy.deepcopy(dense.state_dict())
    flat = compress_decoder_layer(dense, config, 0, weights)

    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"):
        assert flat.get_parameter(name) is dense.get_parameter(name)
    for name, weight in weights.items():
        assert torch.equal(flat.get_parameter(name), weight.bfloat16())
    assert flat.training
    assert not any(parameter.requires_grad for parameter in flat.parameters())
    assert {parameter.dtype for parameter in flat.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


def test_a_new_weight_does_not_hold_on_to_what_it_was_cut_from(dense_model):
    model = dense_model()
    config = compressed_config(model.config, RANKS, (40,) * 3)
    weights = projected_weights(model.model.layers[0], RANKS[0], 40)[0]
    weights["mlp.up_proj.weight"] = torch.randn(1000, 64)[:40]
    up_proj = compress_decoder_layer(model.model.layers[0], config, 0, weights).mlp.up_proj.weight
    assert up_proj.untyped_storage().nbytes() == 40 * 64 * 4


def test_a_compressed_layer_refuses_wrong_shapes_and_names(dense_model):
    model = dense_model()
    config = compressed_config(model.config, RANKS, WIDTHS)
    layer = model.model.layers[1]
    weights = projected_weights(layer, RANKS[1], WIDTHS[1])[0]
    with pytest.raises(ValueError, match=r"layer 1: mlp\.down_proj\.weight must be \(64, 40\), got \(64, 96\)"):
        compress_decoder_layer(layer, config, 1, {k: v for k, v in weights.items() if k != "mlp.down_proj.weight"})
    with pytest.raises(ValueError, match=r"layer 1: no parameter mlp\.nothing"):
        compress_decoder_layer(layer, config, 1, weights | {"mlp.nothing": torch.zeros(1)})


def test_adoption_keeps_the_object_and_its_parts(dense_model, family, tokens):
    model = dense_model()
    model.generation_config.temperature = 0.3
    model.set_attn_implementation("eager")
    model(tokens, output_hidden_states=True)  # leaves recording hooks on the layers that will go
    kept = (model.model, model.model.embed_tokens, model.model.norm, model.lm_head, model.generation_config)
    adopted = compress(model)
    assert adopted is model
    assert type(model) is FAMILIES[family].causal_lm
    assert kept == (model.model, model.model.embed_tokens, model.model.norm, model.lm_head, model.generation_config)
    for module in (model.model, model.model.rotary_emb, *(layer.self_attn for layer in model.model.layers)):
        assert module.config is model.config
    assert model._no_split_modules == {FAMILIES[family].decoder_layer.__name__}
    outputs = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4
    assert len(outputs.attentions) == 3


def test_adopted_layers_follow_the_model_though_made_under_an_equal_config(dense_model):
    model = dense_model()
    config = compressed_config(model.config, RANKS, WIDTHS)
    layers = [
        compress_decoder_layer(layer, config, i, projected_weights(layer, RANKS[i], WIDTHS[i])[0])
        for i, layer in enumerate(model.model.layers)
    ]
    model.set_attn_implementation("eager")
    adopt_compressed_layers(model, copy.deepcopy(config), layers)
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}


def test_adoption_keeps_gradient_checkpointing(dense_model):
    model = dense_model()
    model.gradient_checkpointing_enable()
    assert compress(model).is_gradient_checkpointing


def test_a_refused_adoption_changes_nothing(dense_model, tokens):
    model = dense_model()
    expected, model_class, config = model(tokens).logits, type(model), model.config
    flat_config = compressed_config(config, RANKS, WIDTHS)
    layers = [
        compress_decoder_layer(layer, flat_config, i, projected_weights(layer, RANKS[i], WIDTHS[i])[0])
        for i, layer in enumerate(model.model.layers)
    ]
    other_config = compressed_config(config, (4, 16, 11), WIDTHS)
    for bad_config, bad_layers, message in (
        (flat_config, layers[:2], "expected 3 layers, got 2"),
        (flat_config, layers[::-1], "layer 0: its attention says it is layer 2"),
        (flat_config, [model.model.layers[0], *layers[1:]], "layer 0: expected a Flat"),
        (other_config, layers, r"layer 0: self_attn\.v_proj\.weight must be \(8, 64\), got \(10, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adopt_compressed_layers(model, bad_config, bad_layers)
        assert type(model) is model_class
        assert model.config is config
        assert torch.equal(model(tokens).logits, expected)


def test_adoption_refuses_a_model_of_another_family():
    mistral = dense_model_of("mistral")
    config = compressed_config(dense_model_of("llama").config, RANKS, WIDTHS)
    with pytest.raises(TypeError, match="expected a LlamaForCausalLM, got a MistralForCausalLM"):
        adopt_compressed_layers(mistral, config, [])
