"""From a dense model to a compressed one: its config, one layer at a time, and the whole model in place."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .families import check_is_dense, family_of, head_dim_of
from .flat_attention import FlatDecoderLayer

_LOST_IN_CONVERSION = ("model_type", "transformers_version", "architectures", "auto_map")


def compressed_config(
    config: PreTrainedConfig,
    value_ranks: Sequence[int],
    mlp_widths: Sequence[int],
    query_key_ranks: Sequence[int | None] | None = None,
) -> PreTrainedConfig:
    """Return the compressed family's config; all else is as in the dense ``config``.

    A width that all layers share becomes the model's; otherwise it stands in ``per_layer_config``.

    Args:
        config: A dense model's config.
        value_ranks: Value width per head of each layer, ``1..head_dim``.
        mlp_widths: MLP width of each layer, ``1..intermediate_size``.
        query_key_ranks: Rank per head of each layer's queries and keys, ``1..head_dim``; a layer with ``None``
            keeps them whole, and so do all layers by default.

    Raises:
        InputError: If the family is not supported, or the model is compressed already.
        ValueError: If there is not one rank and one width per layer, or one is out of range.
    """
    family = family_of(config)
    check_is_dense(config)
    _check_widths("value ranks", value_ranks, config.num_hidden_layers, head_dim_of(config))
    _check_widths("MLP widths", mlp_widths, config.num_hidden_layers, config.intermediate_size)
    if query_key_ranks is None:
        query_key_ranks = [None] * config.num_hidden_layers
    whole_or_rank = [head_dim_of(config) if rank is None else rank for rank in query_key_ranks]
    _check_widths("query and key ranks", whole_or_rank, config.num_hidden_layers, head_dim_of(config))

    fields = {name: value for name, value in config.to_dict().items() if name not in _LOST_IN_CONVERSION}
    fields["dense_intermediate_size"] = config.intermediate_size
    per_layer: dict[int, dict[str, int | None]] = {layer_idx: {} for layer_idx in range(config.num_hidden_layers)}
    layer_fields: dict[str, Sequence[int | None]] = {
        "value_head_dim": value_ranks,
        "intermediate_size": mlp_widths,
        "query_key_rank": query_key_ranks,
    }
    for name, widths in layer_fields.items():
        if len(set(widths)) == 1:
            fields[name] = widths[0]
            continue
        for layer_idx, width in enumerate(widths):
            per_layer[layer_idx][name] = width
    if any(per_layer.values()):
        fields["per_layer_config"] = per_layer
    return family.config(**fields, attn_implementation=config._attn_implementation)


def empty_decoder_layer(flat_config: PreTrainedConfig, layer_idx: int) -> FlatDecoderLayer:
    """Return layer ``layer_idx`` on the meta device, its weights still to be filled in."""
    with torch.device("meta"):
        return family_of(flat_config).decoder_layer(flat_config, layer_idx)


def fill_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put ``weights`` in the place of all the parameters of ``module``, which are on the meta device; no copies.

    Raises:
        ValueError: If a parameter is missing, or a shape is another.
    """
    for name, expected in list(module.named_parameters()):
        if name not in weights or weights[name].shape != expected.shape:
            given = tuple(weights[name].shape) if name in weights else "nothing"
            raise ValueError(f"{name} must be {tuple(expected.shape)}, got {given}")
        _set_parameter(module, name, nn.Parameter(weights[name], requires_grad=False))


def compress_decoder_layer(
    dense_layer: nn.Module, flat_config: PreTrainedConfig, layer_idx: int, weights: Mapping[str, Tensor]
) -> FlatDecoderLayer:
    """Return the compressed layer: ``weights`` where given, else the dense layer's own parameters.

    Parameters taken from the dense layer are the same objects, not copies. New ones take device, dtype and
    ``requires_grad`` of the dense parameter they stand in for, factors those of the weight they are factors of.
    The dense layer is left as it was.

    Args:
        dense_layer: The decoder layer of the dense model.
        flat_config: What :func:`compressed_config` returned.
        layer_idx: Position of the layer in the model.
        weights: New weights by name inside the layer, e.g. ``self_attn.v_proj.weight``.

    Raises:
        ValueError: If a name is unknown, a factor is missing, or a shape is not the one ``flat_config`` states.
    """
    layer = empty_decoder_layer(flat_config, layer_idx)
    expected_parameters = dict(layer.named_parameters())
    dense_parameters = dict(dense_layer.named_parameters())
    unknown = sorted(weights.keys() - expected_parameters.keys())
    if unknown:
        raise ValueError(
            f"layer {layer_idx}: no parameter {', '.join(unknown)}; it has {', '.join(expected_parameters)}"
        )
    missing = sorted(expected_parameters.keys() - weights.keys() - dense_parameters.keys())
    if missing:
        raise ValueError(f"layer {layer_idx}: {', '.join(missing)} must be given; the dense layer has none such")
    for name, expected in expected_parameters.items():
        parameter = dense_parameters[name if name in dense_parameters else _dense_name(name)]
        if name in weights:
            parameter = nn.Parameter(_copy_like(weights[name], parameter), requires_grad=parameter.requires_grad)
        if parameter.shape != expected.shape:
            raise ValueError(f"layer {layer_idx}: {name} must be {tuple(expected.shape)}, got {tuple(parameter.shape)}")
        _set_parameter(layer, name, parameter)
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):  # set per layer when it is enabled
        if hasattr(dense_layer, name):
            setattr(layer, name, getattr(dense_layer, name))
    return layer.train(dense_layer.training)


def adopt_compressed_layers(
    model: PreTrainedModel, flat_config: PreTrainedConfig, layers: Sequence[FlatDecoderLayer]
) -> PreTrainedModel:
    """Turn a dense causal language model into the compressed one, in place, and return it.

    The object, its embeddings, norm, head and generation config stay; its class, its config and its layers change.
    Nothing is changed when this raises.

    Raises:
        TypeError: If the model is not of the family of ``flat_config``.
        ValueError: If the layers are not those that ``flat_config`` states, in order.
    """
    family = family_of(flat_config)
    if type(model) is not family.dense_causal_lm:
        raise TypeError(f"expected a {family.dense_causal_lm.__name__}, got a {type(model).__name__}")
    # Built in full on the meta device: states every shape, and makes the classes known to transformers' recorders.
    with torch.device("meta"):
        pattern = family.causal_lm(flat_config)
    _check_layers(pattern.model.layers, layers)

    dense_config = model.config
    flat_config._attn_implementation = dense_config._attn_implementation
    was_training = model.model.layers.training
    model.model.layers = nn.ModuleList(layers)
    model.model.layers.training = was_training  # of the list alone: each layer has a mode of its own
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


def _set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(module.get_submodule(owner), own_name, parameter)


def _check_widths(name: str, widths: Sequence[int], num_layers: int, largest: int) -> None:
    if len(widths) != num_layers:
        raise ValueError(f"{name}: expected {num_layers}, one per layer, got {len(widths)}")
    for layer_idx, width in enumerate(widths):
        if not 1 <= width <= largest:
            raise ValueError(f"{name}: layer {layer_idx} must be in 1..{largest}, got {width}")


def _check_layers(expected: Sequence[FlatDecoderLayer], layers: Sequence[FlatDecoderLayer]) -> None:
    if len(layers) != len(expected):
        raise ValueError(f"expected {len(expected)} layers, got {len(layers)}")
    for layer_idx, (pattern, layer) in enumerate(zip(expected, layers, strict=True)):
        if type(layer) is not type(pattern):
            raise ValueError(f"layer {layer_idx}: expected a {type(pattern).__name__}, got a {type(layer).__name__}")
        if layer.self_attn.layer_idx != layer_idx:
            raise ValueError(f"layer {layer_idx}: its attention says it is layer {layer.self_attn.layer_idx}")
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        for name, parameter in pattern.named_parameters():
            if shapes.get(name) != tuple(parameter.shape):
                raise ValueError(f"layer {layer_idx}: {name} must be {tuple(parameter.shape)}, got {shapes.get(name)}")


def _dense_name(factor: str) -> str:
    """Return the name of the weight that ``factor``, a parameter of a factored projection, is part of."""
    projection = factor.rpartition(".")[0].removesuffix(".down")
    return f"{projection}.weight"


def _copy_like(weight: Tensor, parameter: Tensor) -> Tensor:
    """Return a contiguous copy on the parameter's device and in its dtype, sharing storage with nothing."""
    return weight.detach().to(parameter.device, parameter.dtype, copy=True, memory_format=torch.contiguous_format)
