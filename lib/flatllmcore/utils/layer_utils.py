"""What a model is made of: its family, its dimensions and where its layers are."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import InputError
from .dimensions import ModelDimensions

FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3")  # the ``model_type`` of dense models
_SUPPORTED = ", ".join(FAMILY_NAMES)

# A decoder layer or a part of one. torch types a module's members as tensor or module, so their own are lost.
DecoderModule: TypeAlias = Any


def model_name(model: str | Path) -> str:
    """Return the last part of a model's folder or hub id."""
    return Path(model).absolute().name  # absolute: "." has no name


def load_config(model: str, cache_dir: Path | None = None) -> PretrainedConfig:
    """Return the config of a local folder or a hub id; no weight is read."""
    try:
        return AutoConfig.from_pretrained(model, cache_dir=cache_dir)
    except (OSError, ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise InputError(
            f"no usable model config at {model!r} ({reason}); give a model of one of the families {_SUPPORTED}"
        ) from error


def family_name(config: PretrainedConfig) -> str:
    """Return the family of a dense or compressed model's config, one of ``FAMILY_NAMES``."""
    name = config.model_type.removeprefix("flat_")  # of a compressed model
    if name not in FAMILY_NAMES:
        raise InputError(f"model family {config.model_type!r} is not supported; supported: {_SUPPORTED}")
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
    return ModelDimensions(
        architecture=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        # Some configs state it only where it is not that quotient.
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        # A config of per-layer widths refuses to give one for all.
        intermediate_size=config.intermediate_size if config.model_type == family else config.dense_intermediate_size,
    )


def detect_architecture(model: nn.Module) -> str:
    """Return the family of a dense or compressed transformers model, ``llama``, ``mistral`` and so on."""
    return family_name(model.config)


def check_architecture(model: nn.Module, architecture: str | None) -> None:
    """Refuse a model of another family than ``architecture``, if one is named."""
    found = detect_architecture(model)
    if architecture not in (None, found):
        raise InputError(f"the model is of the family {found!r}, not {architecture!r}")


def check_causal_lm(model: PreTrainedModel) -> None:
    """Refuse what is no causal language model, dense or compressed, with floating-point weights in memory."""
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[detect_architecture(model)]
    # By name: another copy of this package, or a model folder's own files, have a compressed class of their own.
    if type(model).__name__ not in (expected, f"Flat{expected}"):
        raise InputError(f"the model is a {type(model).__name__}; accepted of this family: {expected}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"the weight {name} is offloaded; load the model without a device map, or on the CPU")
        if not parameter.is_floating_point():
            raise InputError(f"the weight {name} is {parameter.dtype}; accepted: models that are not quantised")


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

    Two factors that stand for one weight count as they are.
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
