"""What a model is made of: its family, its dimensions and where its layers are."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import InputError
from .dimensions import ModelDimensions
from .dispatch import check_weights_present
from .model_families import FAMILY_NAMES, check_is_dense, family_name, head_dim_of

# A decoder layer or a part of one. torch types a module's members as tensor or module, so their own are lost.
DecoderModule: TypeAlias = Any


def model_name(model: str | Path) -> str:
    """Return what a model is called: the last part of its folder or hub id."""
    return Path(model).absolute().name  # absolute: "." has no name


def load_config(model: str, cache_dir: Path | None = None) -> PretrainedConfig:
    """Return the config of a local folder or a hub id; no weight is read.

    Raises:
        InputError: If there is no such model, or its ``config.json`` cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(model, cache_dir=cache_dir)
    except (OSError, ValueError, TypeError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split("\n")[:2])
        raise InputError(
            f"no usable model config at {model!r} ({reason}); expected a local model folder or a hub id, "
            f"of one of the families {', '.join(FAMILY_NAMES)}"
        ) from error


def dimensions_from_config(config: PretrainedConfig) -> ModelDimensions:
    """Return the sizes a dense model's config states.

    Raises:
        InputError: If the family is not supported, or the model is compressed already.
    """
    check_is_dense(config)
    return dense_dimensions(config)


def dense_dimensions(config: PretrainedConfig) -> ModelDimensions:
    """Return the sizes of the dense model, from the config of that model or of what it was compressed to.

    Raises:
        InputError: If the family is not supported.
    """
    family = family_name(config)
    return ModelDimensions(
        architecture=family,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        # A config of per-layer widths refuses to give one for all.
        intermediate_size=config.intermediate_size if config.model_type == family else config.dense_intermediate_size,
    )


def detect_architecture(model: nn.Module) -> str:
    """Return the family of a dense or compressed model, ``llama``, ``mistral`` and so on.

    Raises:
        InputError: If the model is not a transformers model of a supported family.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        names = ", ".join(FAMILY_NAMES)
        raise InputError(f"a {type(model).__name__} has no config that names its family; supported: {names}")
    return family_name(config)


def check_causal_lm(model: PreTrainedModel) -> None:
    """Refuse a model that the method cannot walk through, layer by layer.

    Raises:
        InputError: If it is not a causal language model of a supported family, dense or compressed, or weights are
            not in memory as floating-point numbers.
    """
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[detect_architecture(model)]
    # By name: another copy of this package, or a model folder's own files, have a compressed class of their own.
    if type(model).__name__ not in (expected, f"Flat{expected}"):
        raise InputError(f"the model is a {type(model).__name__}; accepted of this family: {expected}")
    check_weights_present(model)


def find_layers(module: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> dict[str, nn.Module]:
    """Return the modules inside ``module`` that are of exactly one of ``kinds``, by dotted name."""
    return {name: part for name, part in module.named_modules() if type(part) in kinds}


def find_decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a dense or compressed model, in order.

    Raises:
        InputError: If the family is not supported.
    """
    detect_architecture(model)
    return model.base_model.layers


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Return ``decoder_linear``, weights of linear layers inside decoder layers, and ``total``, tied ones once.

    The second factors of pruned queries and keys count as linear weights.
    """
    layers = model.base_model.layers
    return {
        "decoder_linear": sum(weight.numel() for weight in layers.parameters() if weight.ndim > 1),  # no norm, no bias
        "total": sum(parameter.numel() for parameter in model.parameters()),
    }


def check_sparsity(model: PreTrainedModel) -> float:
    """Return the share of the decoder layers' linear weights that is zero or has been removed, 0 to 1.

    Relative to the dense model: 0 for an ordinary dense model, the zeros of one pruned by a mask, and for a compressed
    model what its smaller weights leave out. Two factors that stand for one weight count as they are.

    Raises:
        InputError: If the family is not supported.
    """
    layers = find_decoder_layers(model)
    weights = [parameter for parameter in layers.parameters() if parameter.ndim > 1]  # norms and biases are vectors
    nonzero = sum(int(weight.count_nonzero()) for weight in weights)
    dimensions = dense_dimensions(model.config)
    return 1 - nonzero / (dimensions.num_layers * dimensions.layer_parameters)


def get_layer_dimensions(model: PreTrainedModel, architecture: str | None = None) -> dict[str, Any]:
    """Return the sizes of the dense model, and what each layer has of them.

    Per layer these are ``value_rank``, ``mlp_width`` and ``query_key_rank``, which is ``None`` where Q and K are whole.

    Args:
        model: Dense or compressed.
        architecture: The family the model is expected to be of; any for ``None``.

    Raises:
        InputError: If the model is of another family, or of one that is not supported.
    """
    check_architecture(model, architecture)
    dimensions = dense_dimensions(model.config)
    layers: list[DecoderModule] = list(find_decoder_layers(model))
    return {
        **asdict(dimensions),
        "value_rank": [layer.self_attn.v_proj.out_features // dimensions.num_kv_heads for layer in layers],
        "mlp_width": [layer.mlp.down_proj.in_features for layer in layers],
        "query_key_rank": [_rank_of(layer.self_attn.q_proj) for layer in layers],
    }


def check_architecture(model: nn.Module, architecture: str | None) -> None:
    """Refuse a model of another family than ``architecture``, if one is named."""
    found = detect_architecture(model)
    if architecture not in (None, found):
        raise InputError(f"the model is of the family {found!r}, not {architecture!r}")


def _rank_of(projection: DecoderModule) -> int | None:
    """Return the rank of a projection's two factors; ``None`` for a whole one."""
    return projection.up.shape[-1] if hasattr(projection, "up") else None
