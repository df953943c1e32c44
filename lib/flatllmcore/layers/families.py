"""The model families that can be compressed: one row each."""

from dataclasses import dataclass

from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..errors import InputError
from .flat_attention import FlatDecoderLayer
from .flat_llama import FlatLlamaConfig, FlatLlamaDecoderLayer, FlatLlamaForCausalLM, FlatLlamaModel
from .flat_mistral import FlatMistralConfig, FlatMistralDecoderLayer, FlatMistralForCausalLM, FlatMistralModel


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
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a dense or compressed model's config.

    Raises:
        InputError: If the family is not supported.
    """
    family = FAMILIES.get(config.model_type.removeprefix("flat_"))
    if family is None:
        raise InputError(f"model family {config.model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return family
