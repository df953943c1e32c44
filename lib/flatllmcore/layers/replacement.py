"""From a dense model to a compressed one: its config, one layer or part at a time, and the whole model in place."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..utils.dimensions import Kept, check_length
from ..utils.layer_utils import DecoderModule, check_is_dense, family_name, stored_tensors
from ..utils.names import PER_LAYER, STOCK
from . import flat_models
from .flat_attention import FlatCausalLM

_LOST_IN_CONVERSION = ("model_type", "transformers_version", "architectures", "auto_map", "quantization_config")
_SIZES = {"value_head_dim": "value_rank", "intermediate_size": "mlp_width"}  # what Kept calls the config's fields
_SIZES |= {name: name for name in ("query_key_rank", "query_key_pairs")}


def family_of(config: PreTrainedConfig) -> type[FlatCausalLM]:
    """Return the compressed model class of a dense or compressed model's config; it is made when first asked for."""
    return getattr(flat_models, f"Flat{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family_name(config)]}")


def classes_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], type[nn.Module]]:
    """Return the causal language model and the decoder layer of a config: its family's dense or compressed ones."""
    causal_lm = family_of(config)
    if config.model_type == causal_lm.config_class.model_type:
        return causal_lm, causal_lm.decoder_layer_class
    return causal_lm.__bases__[-1], causal_lm.decoder_layer_class.__bases__[-1]  # the parents, after what is shared


def compressed_config(config: PreTrainedConfig, kept: Sequence[Kept], shape: str = PER_LAYER) -> PreTrainedConfig:
    """Return the compressed family's config, or a stock model's; all else is as in the dense ``config``.

    A width that all layers share becomes the model's; otherwise it stands in ``per_layer_config``.
    """
    check_is_dense(config)
    check_length("kept", kept, config.num_hidden_layers)
    fields = {name: value for name, value in config.to_dict().items() if name not in _LOST_IN_CONVERSION}
    if shape == STOCK:
        fields["intermediate_size"] = kept[0].mlp_width
        return type(config)(**fields, attn_implementation=config._attn_implementation)
    fields["dense_intermediate_size"] = config.intermediate_size
    layers = [{field: getattr(of, size) for field, size in _SIZES.items()} for of in kept]
    shared = {name: size for name, size in layers[0].items() if all(layer[name] == size for layer in layers)}
    if len(shared) < len(layers[0]):
        fields["per_layer_config"] = {
            layer_idx: {name: size for name, size in layer.items() if name not in shared}
            for layer_idx, layer in enumerate(layers)
        }
    return family_of(config).config_class(**fields | shared, attn_implementation=config._attn_implementation)


def fill_parameters(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put ``weights`` in the place of all that :func:`stored_tensors` has of ``module``, on the meta device; no copies.

    RuntimeError if one is missing, unknown or of another shape.
    """
    for name, parameter in module.named_parameters():  # load_state_dict imposes the module's own requires_grad
        parameter.requires_grad_(name in weights and weights[name].requires_grad)
    module.load_state_dict(weights, assign=True)


def compress_decoder_layer(
    dense_layer: nn.Module, flat_config: PreTrainedConfig, layer_idx: int, weights: Mapping[str, Tensor], part: str = ""
) -> DecoderModule:
    """Return the compressed layer, or a part of it such as ``mlp``: ``weights`` where given, else the dense ones.

    ``weights`` go by their names inside the layer. Parameters taken from the dense layer, which is left as it was, are
    the same objects, not copies. New ones take device, dtype and ``requires_grad`` of the dense parameter they stand in
    for, factors those of the weight they are factors of. RuntimeError as of :func:`fill_parameters`.
    """
    with torch.device("meta"):
        module = classes_of(flat_config)[1](flat_config, layer_idx).get_submodule(part)
    dense_part = dense_layer.get_submodule(part)
    dense = stored_tensors(dense_part)
    filling: dict[str, Tensor] = {name: dense[name] for name in stored_tensors(module) if name in dense}
    for full_name, weight in weights.items():
        name = full_name.removeprefix(f"{part}.")
        factored = f"{name.rpartition('_proj.')[0]}_proj.weight"  # two factors, up and down, lie where it does
        like = dense.get(name, dense.get(factored, weight))
        copied = weight.detach().to(like.device, like.dtype, copy=True, memory_format=torch.contiguous_format)
        is_place = not weight.is_floating_point()
        filling[name] = weight if is_place else nn.Parameter(copied, requires_grad=like.requires_grad)
    fill_parameters(module, filling)
    for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):  # set per layer when it is enabled
        if hasattr(dense_part, name):
            setattr(module, name, getattr(dense_part, name))
    return module.train(dense_layer.training)


def adopt_compressed_layers(
    model: PreTrainedModel, flat_config: PreTrainedConfig, layers: Sequence[DecoderModule]
) -> PreTrainedModel:
    """Turn a dense causal language model into the compressed one, in place, and return it.

    The object, its embeddings, norm, head and generation config stay; its class, its config and its layers change.
    TypeError, and nothing is changed, if the model is not of the family of ``flat_config``; ``layers`` are all those
    that the latter states, in order.
    """
    causal_lm, layer_class = classes_of(flat_config)
    if not issubclass(causal_lm, type(model)):
        raise TypeError(f"a {causal_lm.__name__} cannot be made of a {type(model).__name__}")
    if quantizer := getattr(model, "hf_quantizer", None):  # of a GGUF file: its weights are plain numbers
        quantizer.remove_quantization_config(model)  # or transformers would not save it
    dense_config = model.config
    flat_config._attn_implementation = dense_config._attn_implementation
    new_layers = nn.ModuleList(layers)
    new_layers.training = model.model.layers.training  # of the list alone: each layer has a mode of its own
    model.model.layers = new_layers
    model.__class__ = causal_lm
    model._no_split_modules.add(layer_class.__name__)
    # Recording hooks sat on the layers that went; transformers installs them anew when next asked for outputs.
    model.model._output_capturing_hooks_installed = False
    for module in model.modules():
        if getattr(module, "config", None) is dense_config:
            module.config = flat_config
    return model
