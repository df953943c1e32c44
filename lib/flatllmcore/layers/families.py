"""The classes of each model family: one row each."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.layer_utils import family_name
from . import flat_llama, flat_mistral, flat_qwen2, flat_qwen3
from .flat_attention import FlatDecoderLayer


@dataclass(frozen=True)
class Family:
    """A dense causal language model class and the compressed classes that stand in for it and its parts."""

    dense_causal_lm: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    decoder_layer: type[FlatDecoderLayer]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]


def _family(causal_lm: Any) -> Family:
    """Return what a compressed causal language model class leads to; the dense one is the second of its parents."""
    model = causal_lm.model_class
    return Family(causal_lm.__bases__[1], causal_lm.config_class, model.decoder_layer_class, model, causal_lm)


FAMILIES = {
    "llama": _family(flat_llama.FlatLlamaForCausalLM),
    "mistral": _family(flat_mistral.FlatMistralForCausalLM),
    "qwen2": _family(flat_qwen2.FlatQwen2ForCausalLM),
    "qwen3": _family(flat_qwen3.FlatQwen3ForCausalLM),
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a dense or compressed model's config."""
    return FAMILIES[family_name(config)]
