"""From a dense model to a compressed one: its config, one layer or part at a time, and the whole model in place."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.dimensions import Kept
from ..utils.layer_utils import check_is_dense
from .families import family_of
from .flat_attention import FlatDecoderLayer

_LOST_IN_CONVERSION = ("model_type", "transformers_version", "architectures", "auto_map")


def compressed_config(config: PreTrainedConfig, kept: Sequence[Kept]) -> PreTrainedConfig:
    """Return the compressed family's config; all else is as in the dense ``config``.

    A width that all layers share becomes the model's; otherwise it stands in ``per_layer_config``. ValueError if
    ``kept`` is not one per layer; transformers checks ranks and widths.
    """
    check_is_dense(config)
    if len(kept) != config.num_hidden_layers:
        raise ValueError(f"expected what each of {config.num_hidden_layers} layers keeps, got {len(kept)}")
    fields = {name: value for name, value in config.to_dict().items() if name not in _LOST_IN_CONVERSION}
    fields["dense_intermediate_size"] = config.intermediate_size
    layers = [
        {"value_head_dim": of.value_rank, "intermediate_size": of.mlp_width, "query_key_rank": of.query_key_rank}
        for of in kept
    ]
    shared = {name: size for name, size in layers[0].items() if all(layer[name] == size for layer in layers)}
    if len(shared) < len(layers[0]):
        fields["per_layer_config"] = {
            layer_idx: {name: size for name, size in layer.items() if name not in shared}
            for layer_idx, layer in enumerate(layers)
        }
    return family_of(config).config(**fields | shared, attn_implementation=config._attn_implementation)


def empty_decoder_layer(flat_config: PreTrainedConfig, layer_idx: int) -> FlatDecoderLayer:
    """Return layer ``layer_idx`` on the meta device, its weights still to be filled in."""
    with torch.device("meta"):
        return family_of(flat_config).decoder_layer(flat_config, layer_idx)


def fill_parameters(module: nn.Module, weights: Mapping[str, Tensor], place: str = "") -> None:
    """Put ``weights`` in the place of all the parameters of ``module``, which are on the meta device; no copies.

    ValueError, beginning with ``place``, if a parameter is missing or a shape is another.
    """
    _check_shapes(module, weights, place)
    for name, _ in list(module.named_parameters()):
        weight = weights[name]
        owner, _, own_name = name.rpartition(".")
        parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        setattr(module.get_submodule(owner), own_name, parameter)


def compressed_part(
    flat_config: PreTrainedConfig, layer_idx: int, part: str, dense_layer: nn.Module, weights: Mapping[str, Tensor]
) -> nn.Module:
    """Return a part of a compressed layer: ``weights`` where given, else the dense layer's own parameters.

    The part is a submodule such as ``mlp``, or the whole layer for an empty name; ``weights`` go by their names inside
    the layer. Parameters taken from the dense layer, which is left as it was, are the same objects, not copies. New
    ones take device, dtype and ``requires_grad`` of the dense parameter they stand in for, factors those of the weight
    they are factors of. ValueError if a name is unknown, a factor is missing, or ``flat_config`` states another shape.
    """
    module = empty_decoder_layer(flat_config, layer_idx).get_submodule(part)
    prefix = f"{part}." if part else ""
    own_names = {prefix + name: name for name, _ in module.named_parameters()}
    if unknown := sorted(weights.keys() - own_names.keys()):
        raise ValueError(f"layer {layer_idx}: no parameter {', '.join(unknown)}; it has {', '.join(own_names)}")
    dense = dict(dense_layer.named_parameters())
    filling = {own_name: dense[name] for name, own_name in own_names.items() if name in dense}
    for name, weight in weights.items():
        projection, _, _ = name.rpartition("_proj.")  # two factors, up and down, lie where its weight does
        like = dense[name] if name in dense else dense[f"{projection}_proj.weight"]
        copied = weight.detach().to(like.device, like.dtype, copy=True, memory_format=torch.contiguous_format)
        filling[own_names[name]] = nn.Parameter(copied, requires_grad=like.requires_grad)
    fill_parameters(module, filling, f"layer {layer_idx}: {prefix}")
    return module.train(dense_layer.training)


def compress_decoder_layer(
    dense_layer: nn.Module, flat_config: PreTrainedConfig, layer_idx: int, weights: Mapping[str, Tensor]
) -> FlatDecoderLayer:
    """Return the compressed layer: all of what :func:`compressed_part` gives."""
    layer = cast(FlatDecoderLayer, compressed_part(flat_config, layer_idx, "", dense_layer, weights))
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):  # set per layer when it is enabled
        if hasattr(dense_layer, name):
            setattr(layer, name, getattr(dense_layer, name))
    return layer


def adopt_compressed_layers(
    model: PreTrainedModel, flat_config: PreTrainedConfig, layers: Sequence[FlatDecoderLayer]
) -> PreTrainedModel:
    """Turn a dense causal language model into the compressed one, in place, and return it.

    The object, its embeddings, norm, head and generation config stay; its class, its config and its layers change.
    Nothing is changed when this raises: TypeError if the model is not of the family of ``flat_config``, ValueError if
    the layers are not those that it states, in order.
    """
    family = family_of(flat_config)
    if type(model) is not family.dense_causal_lm:
        raise TypeError(f"expected a {family.dense_causal_lm.__name__}, got a {type(model).__name__}")
    # Built in full on the meta device: states every shape, and makes the classes known to transformers' recorders.
    with torch.device("meta"):
        pattern = family.causal_lm(flat_config)
    if [(type(layer), layer.self_attn.layer_idx) for layer in layers] != [
        (family.decoder_layer, layer_idx) for layer_idx in range(flat_config.num_hidden_layers)
    ]:
        raise ValueError(f"expected {flat_config.num_hidden_layers} compressed layers in order")
    new_layers = nn.ModuleList(layers)
    _check_shapes(pattern.model.layers, dict(new_layers.named_parameters()), "layer ")

    dense_config = model.config
    flat_config._attn_implementation = dense_config._attn_implementation
    new_layers.training = model.model.layers.training  # of the list alone: each layer has a mode of its own
    model.model.layers = new_layers
    for adopted, example in ((model, pattern), (model.model, pattern.model)):
        adopted.__class__ = type(example)
        adopted._no_split_modules = example._no_split_modules
        # Recording hooks sat on the layers that went; transformers installs them anew when next asked for outputs.
        adopted._output_capturing_hooks_installed = False
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = flat_config
    for layer in layers:
        layer.self_attn.config = flat_config
    return model


def _check_shapes(module: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    for name, expected in module.named_parameters():
        given = tuple(weights[name].shape) if name in weights else "nothing"
        if given != tuple(expected.shape):
            raise ValueError(f"{place}{name} must be {tuple(expected.shape)}, got {given}")
