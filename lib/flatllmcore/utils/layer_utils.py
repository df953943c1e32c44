"""What a model is made of: its family, its dimensions and where its layers are."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from ..errors import InputError
from ..layers.families import FAMILIES, check_is_dense, family_of, head_dim_of
from .dispatch import check_weights_present

# A decoder layer or a part of one. torch types a module's members as tensor or module, so their own are lost.
DecoderModule: TypeAlias = Any

_COMPRESSED = "flat_"  # before the model_type of the dense family


@dataclass(frozen=True)
class ModelDimensions:
    """Sizes of a decoder-only model; parameter counts are linear weights of one decoder layer, without biases."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    @property
    def qk_parameters(self) -> int:
        return self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def vo_parameters(self) -> int:
        return self.head_dim * self.rank_parameters

    @property
    def mlp_parameters(self) -> int:
        return self.intermediate_size * self.width_parameters

    @property
    def layer_parameters(self) -> int:
        return self.qk_parameters + self.vo_parameters + self.mlp_parameters

    @property
    def rank_parameters(self) -> int:
        """Parameters of V and O that one direction per head costs."""
        return self.hidden_size * (self.num_heads + self.num_kv_heads)

    @property
    def width_parameters(self) -> int:
        """Parameters of gate, up and down that one MLP channel costs."""
        return 3 * self.hidden_size

    def differences_from(self, other: "ModelDimensions") -> str:
        """Return the sizes that are not equal, in words; nothing for equal dimensions."""
        ours, given = self.to_dict(), other.to_dict()
        return "; ".join(f"{name} {ours[name]}, not {given[name]}" for name in ours if ours[name] != given[name])

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


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
            f"of one of the families {', '.join(FAMILIES)}"
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
    family_of(config)
    return ModelDimensions(
        architecture=config.model_type.removeprefix(_COMPRESSED),
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim_of(config),
        intermediate_size=_dense_intermediate_size(config),
    )


def detect_architecture(model: nn.Module) -> str:
    """Return the family of a dense or compressed model, ``llama``, ``mistral`` and so on.

    Raises:
        InputError: If the model is not a transformers model of a supported family.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        names = ", ".join(FAMILIES)
        raise InputError(f"a {type(model).__name__} has no config that names its family; supported: {names}")
    family_of(config)
    return config.model_type.removeprefix(_COMPRESSED)


def check_causal_lm(model: PreTrainedModel) -> None:
    """Refuse a model that the method cannot walk through, layer by layer.

    Raises:
        InputError: If it is not a causal language model of a supported family, dense or compressed, or weights are
            not in memory as floating-point numbers.
    """
    detect_architecture(model)
    family = family_of(model.config)
    # The compressed class by name: another copy of this package, or a model folder's own files, have one of their own.
    if type(model) is not family.dense_causal_lm and type(model).__name__ != family.causal_lm.__name__:
        expected = family.dense_causal_lm.__name__
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
    found = detect_architecture(model)
    if architecture not in (None, found):
        raise InputError(f"the model is of the family {found!r}, not {architecture!r}")
    dimensions = dense_dimensions(model.config)
    layers: list[DecoderModule] = list(find_decoder_layers(model))
    return {
        **dimensions.to_dict(),
        "value_rank": [layer.self_attn.v_proj.out_features // dimensions.num_kv_heads for layer in layers],
        "mlp_width": [layer.mlp.down_proj.in_features for layer in layers],
        "query_key_rank": [_rank_of(layer.self_attn.q_proj) for layer in layers],
    }


def _rank_of(projection: DecoderModule) -> int | None:
    """Return the rank of a projection's two factors; ``None`` for a whole one."""
    return projection.up.shape[-1] if hasattr(projection, "up") else None


def _dense_intermediate_size(config: PretrainedConfig) -> int:
    """Return the MLP width before compression; a config of per-layer widths refuses to give one for all."""
    return config.intermediate_size if config.model_type in FAMILIES else config.dense_intermediate_size
