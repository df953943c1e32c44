"""What a model is made of: its family, its dimensions and where its layers are."""

import copy
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import InputError
from .dimensions import ModelDimensions
from .names import FAMILY_NAMES

_SUPPORTED = ", ".join(FAMILY_NAMES)
_OBSTACLES = {  # by a part of the family's name or of a field of its config
    **dict.fromkeys(("mamba", "state_size"), "has state-space layers"),
    "expert": "has experts in place of MLPs",
    **dict.fromkeys(("phi3", "glm"), "has fused projections"),
    "text_config": "has its language model inside a larger one",
}
# What weights may be, as safetensors spells it; float8 is a floating-point type too.
WEIGHT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What writes to the stream, by the part that a step works on; of a whole layer the attention's, behind which its MLP is
# computed anew.
WRITERS = {"": "self_attn.o_proj", "self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
# A decoder layer or a part of one. torch types a module's members as tensor or module, so their own are lost.
DecoderModule: TypeAlias = Any


def family_name(config: PretrainedConfig) -> str:
    """Return the family of a dense or compressed model's config, one of ``FAMILY_NAMES``."""
    name = config.model_type.removeprefix("flat_")  # of a compressed model
    if name not in FAMILY_NAMES:
        marks = " ".join((name, *config.to_dict()))
        found = [f", which {obstacle}," for part, obstacle in _OBSTACLES.items() if part in marks]
        raise InputError(f"model family {name!r}{''.join(found[:1])} is not supported; supported: {_SUPPORTED}")
    return name


def check_is_dense(config: PretrainedConfig) -> None:
    """Refuse the config of a model that is compressed already."""
    if config.model_type != family_name(config):
        raise InputError(f"the model is compressed already ({config.model_type}); give one of: {_SUPPORTED}")


def dimensions_from_config(config: PretrainedConfig) -> ModelDimensions:
    """Return the sizes a dense model's config states; that of a compressed one is refused."""
    check_is_dense(config)
    return dense_dimensions(config)


def dense_dimensions(config: PretrainedConfig) -> ModelDimensions:
    """Return the sizes of the dense model, from the config of that model or of what it was compressed to."""
    family = family_name(config)
    is_dense = config.model_type == family
    if is_dense and config.to_dict().get("per_layer_config"):
        raise InputError(f"the layers of this {family} differ (per_layer_config); accepted: models of equal layers")
    return ModelDimensions(
        architecture=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        # Some configs state it only where it is not that quotient.
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // max(1, config.num_attention_heads),
        # A config of per-layer widths refuses to give one for all; and that of the dense model may be missing.
        intermediate_size=config.intermediate_size if is_dense else config.dense_intermediate_size or 0,
    )


def detect_architecture(model: nn.Module) -> str:
    """Return the family of a dense or compressed transformers model, ``llama``, ``mistral`` and so on."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"the model is a {type(model).__name__}; accepted: a transformers model, not wrapped")
    return family_name(model.config)


def check_architecture(model: nn.Module, architecture: str | None) -> None:
    """Refuse a model of another family than ``architecture``, if one is named, in capitals or not."""
    found = detect_architecture(model)
    if architecture is not None and architecture.lower() != found:
        raise InputError(f"the model is of the family {found!r}, not {architecture!r}")


def check_causal_lm(model: PreTrainedModel) -> None:
    """Refuse what is no causal language model, dense or compressed, of its config's modules, with weights in memory."""
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[detect_architecture(model)]
    # By name: another copy of this package, or a model folder's own files, have a compressed class of their own.
    if type(model).__name__ not in (expected, f"Flat{expected}"):
        raise InputError(f"the model is a {type(model).__name__}; accepted of this family: {expected}")
    method = getattr(getattr(model, "quantization_method", None), "value", None)
    if method not in (None, "gguf"):  # whose weights transformers has dequantised
        raise InputError(f"the model is quantised by {method}; accepted: one that is not, or one from a GGUF file")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"the weight {name} is offloaded; load the model without a device map, or on the CPU")
        if parameter.is_inference():
            raise InputError(f"the weight {name} was made under torch.inference_mode(); load the model outside of it")
        if parameter.dtype not in WEIGHT_DTYPES.values():
            raise InputError(f"the weight {name} is {parameter.dtype}; accepted: models that are not quantised")
    names: dict[int, str] = {}
    for name, parameter in find_decoder_layers(model).named_parameters(remove_duplicate=False):
        if (first := names.setdefault(id(parameter), name)) != name:
            raise InputError(f"decoder layers share a weight, {first} and {name}; give each its own")
    with torch.device("meta"):
        plain, found = map(_makeup, (type(model)(copy.deepcopy(model.config)), model))
    if different := sorted(name for name in found.keys() | plain.keys() if found.get(name) != plain.get(name)):
        problem = f"the module {different[0]} is {found.get(different[0])}, and by the config {plain.get(different[0])}"
        remedy = "merge adapters, make masks and parametrizations permanent, take hooks off, compile afterwards"
        raise InputError(f"{problem}; {remedy}, or give the config the sizes that there are")


def _makeup(model: PreTrainedModel) -> dict[str, str]:
    """Return the kind of each module with its parameters and their shapes, and whether it does more than its class."""

    def described(part: nn.Module) -> str:
        weights = (f"{name} {list(weight.shape)}" for name, weight in part.named_parameters(recurse=False))
        kinds = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        hooks = (hook for kind in kinds for hook in kind.values())
        # Accelerate's are taken off while layers are on loan; transformers' own change nothing but in training.
        is_changed = "forward" in vars(part) and not hasattr(part, "_hf_hook")
        is_changed |= any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks)
        is_changed |= part._compiled_call_impl is not None
        is_called = part is not model  # as a whole it never is
        return f"{type(part).__name__}({', '.join(weights)}){' hooked or compiled' * (is_changed and is_called)}"

    return {name: described(part) for name, part in model.named_modules()}


def find_layers(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> dict[str, nn.Module]:
    """Return the modules inside ``module`` that are of exactly one of ``kinds``, by dotted name."""
    return {name: part for name, part in module.named_modules() if type(part) in kinds}


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a dense or compressed model, in order."""
    return model.base_model.layers


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint has of a module, by name: parameters, tied ones once, and buffers that are kept."""
    kept = module.state_dict().keys()
    return dict(module.named_parameters()) | {name: part for name, part in module.named_buffers() if name in kept}


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return ``decoder_linear``, weights of linear layers inside decoder layers, and ``total``, tied ones once.

    The second factors of pruned queries and keys count as linear weights.
    """
    of_layers = find_decoder_layers(model).parameters()
    return {
        "decoder_linear": sum(weight.numel() for weight in of_layers if weight.ndim > 1),  # no norm, no bias
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }


def check_sparsity(model: PreTrainedModel) -> float:
    """Return the share of the dense model's linear weights in decoder layers that is zero or has been removed, 0 to 1.

    Two factors that stand for one weight count as they are. A model of stock shape is a dense one, which lacks nothing.
    """
    dimensions = dense_dimensions(model.config)
    nonzero = sum(int(weight.count_nonzero()) for weight in find_decoder_layers(model).parameters() if weight.ndim > 1)
    return 1 - nonzero / (dimensions.num_layers * dimensions.layer_parameters)


def get_layer_dimensions(model: PreTrainedModel, architecture: str | None = None) -> dict[str, Any]:
    """Return the sizes of the dense model, and what each layer of this one, dense or compressed, has of them.

    Per layer these are ``value_rank``, ``mlp_width`` and ``query_key_rank``, which is ``None`` where Q and K are whole.
    A model of another family than ``architecture`` is refused.
    """
    check_architecture(model, architecture)
    dimensions = dense_dimensions(model.config)
    layers: list[DecoderModule] = list(find_decoder_layers(model))
    factors = [getattr(layer.self_attn.q_proj, "up", None) for layer in layers]
    return asdict(dimensions) | {
        "value_rank": [layer.self_attn.v_proj.out_features // dimensions.num_kv_heads for layer in layers],
        "mlp_width": [layer.mlp.down_proj.in_features for layer in layers],
        "query_key_rank": [None if up is None else up.shape[-1] for up in factors],
    }
