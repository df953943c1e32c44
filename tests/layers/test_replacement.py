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
    compressed_part,
)

from .tiny_models import RANKS, WIDTHS, compress, compressed_layers, dense_model_of, kept, projected_weights


def test_the_config_keeps_everything_else(dense_model):
    model = dense_model(
        tie_word_embeddings=True, bos_token_id=5, dtype="bfloat16", max_position_embeddings=77, use_cache=False
    )
    model.config._name_or_path = "somewhere/base"
    model.set_attn_implementation("eager")
    flat = compressed_config(model.config, kept())
    widths = {"intermediate_size", "value_head_dim", "model_type", "per_layer_config"}
    for name, value in model.config.to_dict().items():
        if name not in widths:
            assert flat.to_dict()[name] == value, name
    assert flat.dtype is torch.bfloat16
    assert flat._name_or_path == "somewhere/base"
    assert flat._attn_implementation == "eager"
    assert [layer.value_head_dim for layer in flat.per_layer_config] == list(RANKS)
    assert [layer.intermediate_size for layer in flat.per_layer_config] == list(WIDTHS)


def test_other_families_compressed_models_and_other_depths_are_refused(dense_model, flat_model):
    with pytest.raises(InputError, match=f"'gpt2' is not supported; supported: {', '.join(FAMILIES)}"):
        compressed_config(GPT2Config(), kept())
    with pytest.raises(InputError, match="compressed already"):
        compressed_config(flat_model().config, kept())
    with pytest.raises(ValueError, match="what each of 3 layers keeps, got 2"):
        compressed_config(dense_model().config, kept()[:2])


def test_a_compressed_layer_shares_what_it_keeps_and_copies_what_is_new(dense_model, family):
    model = dense_model().to(torch.bfloat16).train().requires_grad_(False)
    dense = model.model.layers[0]
    weights = projected_weights(copy.deepcopy(dense).double(), RANKS[0], WIDTHS[0])[0]
    weights["self_attn.v_proj.weight"] = torch.cat([weights["self_attn.v_proj.weight"]] * 9)[: 2 * RANKS[0]]
    before = copy.deepcopy(dense.state_dict())
    flat = compress_decoder_layer(dense, compressed_config(model.config, kept()), 0, weights)
    assert type(flat) is FAMILIES[family].decoder_layer
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"):
        assert flat.get_parameter(name) is dense.get_parameter(name)
    for name, weight in weights.items():
        assert torch.equal(flat.get_parameter(name), weight.bfloat16())
        # Nor does it hold on to what the weight was cut from.
        assert flat.get_parameter(name).untyped_storage().nbytes() == 2 * weight.numel()
    assert flat.training
    assert not any(parameter.requires_grad for parameter in flat.parameters())
    assert {parameter.dtype for parameter in flat.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("qk", [(None,) * 3, (7, None, 9)], ids=["Q and K whole", "Q and K pruned"])
@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_a_part_is_that_of_the_whole_layer(dense_model, part, qk):
    model = dense_model(attention_bias=True).eval()
    config = compressed_config(model.config, kept(qk=qk))
    for i, dense in enumerate(model.model.layers):
        weights = projected_weights(dense, RANKS[i], WIDTHS[i])[0]
        if qk[i] is not None:
            for name, heads in (("q_proj", 4), ("k_proj", 2)):
                weights[f"self_attn.{name}.up"] = torch.randn(heads, 16, qk[i])
                weights[f"self_attn.{name}.down.weight"] = torch.randn(heads * qk[i], 64)
                if dense.self_attn.q_proj.bias is not None:
                    weights[f"self_attn.{name}.down.bias"] = torch.randn(heads * qk[i])
        expected = compress_decoder_layer(dense, config, i, weights).get_submodule(part)
        own = {name: weight for name, weight in weights.items() if name.startswith(part)}
        found = compressed_part(config, i, part, dense, own)
        assert type(found) is type(expected)
        assert found.training == expected.training
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
        names = dict(found.named_parameters()).keys() - {name.removeprefix(f"{part}.") for name in own}
        assert all(found.get_parameter(name) is dense.get_parameter(f"{part}.{name}") for name in names)
        with pytest.raises(ValueError, match=rf"layer {i}: no parameter (self_attn|mlp)\."):
            compressed_part(config, i, part, dense, weights)


def test_a_compressed_layer_refuses_wrong_shapes_and_names(dense_model):
    model = dense_model()
    config = compressed_config(model.config, kept())
    layer = model.model.layers[1]
    weights = projected_weights(layer, RANKS[1], WIDTHS[1])[0]
    without = {name: weight for name, weight in weights.items() if name != "mlp.down_proj.weight"}
    for name in ("", "mlp"):
        given = {key: weight for key, weight in without.items() if key.startswith(name)}
        with pytest.raises(ValueError, match=r"layer 1: mlp\.down_proj\.weight must be \(64, 40\), got \(64, 96\)"):
            compressed_part(config, 1, name, layer, given)
    with pytest.raises(ValueError, match=r"layer 1: no parameter mlp\.nothing"):
        compress_decoder_layer(layer, config, 1, weights | {"mlp.nothing": torch.zeros(1)})


def test_adoption_keeps_the_object_and_its_parts(dense_model, family, tokens):
    model = dense_model()
    model.generation_config.temperature = 0.3
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    model(tokens, output_hidden_states=True)  # leaves recording hooks on the layers that will go
    before = (model.model, model.model.embed_tokens, model.model.norm, model.lm_head, model.generation_config)
    adopted = compress(model)
    assert adopted is model
    assert type(model) is FAMILIES[family].causal_lm
    assert before == (model.model, model.model.embed_tokens, model.model.norm, model.lm_head, model.generation_config)
    for module in (model.model, model.model.rotary_emb, *(layer.self_attn for layer in model.model.layers)):
        assert module.config is model.config
    assert model._no_split_modules == {FAMILIES[family].decoder_layer.__name__}
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    outputs = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4
    assert len(outputs.attentions) == 3


def test_adopted_layers_follow_the_model_though_made_under_an_equal_config(dense_model):
    model = dense_model()
    config = compressed_config(model.config, kept())
    layers = compressed_layers(model, config)
    model.set_attn_implementation("eager")
    adopt_compressed_layers(model, copy.deepcopy(config), layers)
    assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}


def test_a_refused_adoption_changes_nothing(dense_model, tokens):
    model = dense_model()
    expected, model_class, config = model(tokens).logits, type(model), model.config
    flat_config = compressed_config(config, kept())
    layers = compressed_layers(model, flat_config)
    for bad_config, bad_layers, message in (
        (flat_config, layers[:2], "expected 3 compressed layers in order"),
        (flat_config, layers[::-1], "expected 3 compressed layers in order"),
        (flat_config, [model.model.layers[0], *layers[1:]], "expected 3 compressed layers in order"),
        (compressed_config(config, kept((4, 16, 11))), layers, r"layer 0\.self_attn\.v_proj\.weight must be \(8, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            adopt_compressed_layers(model, bad_config, bad_layers)
        assert type(model) is model_class
        assert model.config is config
        assert torch.equal(model(tokens).logits, expected)


def test_adoption_refuses_a_model_of_another_family():
    config = compressed_config(dense_model_of("llama").config, kept())
    with pytest.raises(TypeError, match="expected a LlamaForCausalLM, got a MistralForCausalLM"):
        adopt_compressed_layers(dense_model_of("mistral"), config, [])
