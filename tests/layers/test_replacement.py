import copy

import pytest
import torch

from flatllmcore.layers import compress_decoder_layer, compressed_config, family_of

from .tiny_models import RANKS, WIDTHS, compress, dense_model_of, kept, projected_weights


def test_the_config_keeps_everything_else():
    fields = {"tie_word_embeddings": True, "bos_token_id": 5, "max_position_embeddings": 77, "use_cache": False}
    model = dense_model_of("llama", dtype="bfloat16", **fields)
    model.config._name_or_path = "somewhere/base"
    model.set_attn_implementation("eager")
    flat = compressed_config(model.config, kept())
    widths = {"intermediate_size", "value_head_dim", "model_type", "per_layer_config"}
    for name, value in model.config.to_dict().items():
        if name not in widths:
            assert flat.to_dict()[name] == value, name
    assert flat._name_or_path == "somewhere/base"
    assert flat._attn_implementation == "eager"
    assert [layer.value_head_dim for layer in flat.per_layer_config] == list(RANKS)
    assert [layer.intermediate_size for layer in flat.per_layer_config] == list(WIDTHS)


def test_a_compressed_layer_shares_what_it_keeps_and_copies_what_is_new(dense_model, family):
    model = dense_model().to(torch.bfloat16).train().requires_grad_(False)
    dense = model.model.layers[0]
    dense.input_layernorm.weight.requires_grad_(True)
    weights = projected_weights(copy.deepcopy(dense).double(), RANKS[0], WIDTHS[0])[0]
    weights["self_attn.v_proj.weight"] = torch.cat([weights["self_attn.v_proj.weight"]] * 9)[: 2 * RANKS[0]]
    before = copy.deepcopy(dense.state_dict())
    flat = compress_decoder_layer(dense, compressed_config(model.config, kept()), 0, weights)
    assert type(flat) is family_of(model.config).decoder_layer_class
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"):
        assert flat.get_parameter(name) is dense.get_parameter(name)
    for name, weight in weights.items():
        assert torch.equal(flat.get_parameter(name), weight.bfloat16())
        # Nor does it hold on to what the weight was cut from.
        assert flat.get_parameter(name).untyped_storage().nbytes() == 2 * weight.numel()
    assert flat.training
    assert [name for name, own in flat.named_parameters() if own.requires_grad] == ["input_layernorm.weight"]
    assert {parameter.dtype for parameter in flat.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


def test_wrong_shapes_and_names_are_refused():
    model = dense_model_of("llama")
    config, layer = compressed_config(model.config, kept()), model.model.layers[1]
    weights = projected_weights(layer, RANKS[1], WIDTHS[1])[0]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*mlp\.nothing"):
        compress_decoder_layer(layer, config, 1, weights | {"mlp.nothing": torch.zeros(1)})
    del weights["mlp.down_proj.weight"]
    with pytest.raises(RuntimeError, match=r"size mismatch for mlp\.down_proj\.weight"):
        compress_decoder_layer(layer, config, 1, weights)


def test_adoption_keeps_the_object_and_its_parts(dense_model, family, tokens):
    model = dense_model()
    model.generation_config.temperature = 0.3
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    model(tokens, output_hidden_states=True)  # leaves recording hooks on the layers that will go
    before = (model.model, model.model.embed_tokens, model.model.norm, model.lm_head, model.generation_config)
    adopted = compress(model)
    assert adopted is model
    assert type(model) is family_of(model.config)
    assert before == (model.model, model.model.embed_tokens, model.model.norm, model.lm_head, model.generation_config)
    for module in (model.model, model.model.rotary_emb, *(layer.self_attn for layer in model.model.layers)):
        assert module.config is model.config
    assert family_of(model.config).decoder_layer_class.__name__ in model._no_split_modules
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    outputs = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4
    assert len(outputs.attentions) == 3
