"""The model families that can be compressed: one row each."""

from dataclasses import dataclass

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from ..errors import InputError
from .flat_attention import FlatDecoderLayer
from .flat_llama import FlatLlamaConfig, FlatLlamaDecoderLayer, FlatLlamaForCausalLM, FlatLlamaModel
from .flat_mistral import FlatMistralConfig, FlatMistralDecoderLayer, FlatMistralForCausalLM, FlatMistralModel
from .flat_qwen2 import FlatQwen2Config, FlatQwen2DecoderLayer, FlatQwen2ForCausalLM, FlatQwen2Model
from .flat_qwen3 import FlatQwen3Config, FlatQwen3DecoderLayer, FlatQwen3ForCausalLM, FlatQwen3Model


@dataclass(frozen=True)
class Family:
    """A dense causal language model class and the compressed classes that stand in for it and its parts."""

    dense_causal_lm: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    decoder_layer: type[FlatDecoderLayer]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


# By the dense model's ``model_type``; the compressed one's is the same behind "flat_".
FAMILIES = {
    "llama": Family(LlamaForCausalLM, FlatLlamaConfig, FlatLlamaDecoderLayer, FlatLlamaModel, FlatLlamaForCausalLM),
    "mistral": Family(
        MistralForCausalLM, FlatMistralConfig, FlatMistralDecoderLayer, FlatMistralModel, FlatMistralForCausalLM
    ),
    "qwen2": Family(Qwen2ForCausalLM, FlatQwen2Config, FlatQwen2DecoderLayer, FlatQwen2Model, FlatQwen2ForCausalLM),
    "qwen3": Family(Qwen3ForCausalLM, FlatQwen3Config, FlatQwen3DecoderLayer, FlatQwen3Model, FlatQwen3ForCausalLM),
}


def check_is_dense(config: PreTrainedConfig) -> None:
    """Refuse the config of a model that cannot be compressed.

    Raises:
        InputError: If the family is not supported, or the model is compressed already.
    """
    family_of(config)
    if config.model_type not in FAMILIES:
        raise InputError(f"the model is compressed already ({config.model_type}); give one of: {', '.join(FAMILIES)}")


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a dense or compressed model's config.

    Raises:
        InputError: If the family is not supported.
    """
    family = FAMILIES.get(config.model_type.removeprefix("flat_"))
    if family is None:
        raise InputError(f"model family {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return family


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of one head; a Qwen2 config states it only when it is not ``hidden / heads``."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
