"""What a model is made of: its family, its dimensions and where its layers are."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoConfig, PretrainedConfig

from ..errors import InputError
from ..layers.families import FAMILIES, family_of

# A decoder layer or a part of one. torch types a module's members as tensor or module, so their own are lost.
DecoderModule: TypeAlias = Any


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

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def load_config(model: str, cache_dir: Path | None = None) -> PretrainedConfig:
    """Return the config of a local folder or a hub id; no weight is read.

    Raises:
        InputError: If there is no such model, or its ``config.json`` cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(model, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"no usable model config at {model!r} ({reason}); expected a local model folder or a hub id"
        ) from error


def dimensions_from_config(config: PretrainedConfig) -> ModelDimensions:
    """Return the sizes a dense model's config states.

    Raises:
        InputError: If the family is not supported, or the model is compressed already.
    """
    family_of(config)
    if config.model_type not in FAMILIES:
        raise InputError(f"the model is compressed already ({config.model_type}); give one of: {', '.join(FAMILIES)}")
    return ModelDimensions(
        architecture=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
    )
