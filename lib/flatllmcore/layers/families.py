"""The compressed model of each family; its ``config_class`` and ``decoder_layer_class`` are the family's other ones."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..utils.layer_utils import family_name
from .flat_attention import FlatCausalLM
from .flat_llama import FlatLlamaForCausalLM
from .flat_mistral import FlatMistralForCausalLM
from .flat_qwen2 import FlatQwen2ForCausalLM
from .flat_qwen3 import FlatQwen3ForCausalLM

FAMILIES: dict[str, type[FlatCausalLM]] = {
    "llama": FlatLlamaForCausalLM,
    "mistral": FlatMistralForCausalLM,
    "qwen2": FlatQwen2ForCausalLM,
    "qwen3": FlatQwen3ForCausalLM,
}


def classes_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], type[nn.Module]]:
    """Return the causal language model and the decoder layer of a config: its family's dense or compressed ones."""
    causal_lm = family_of(config)
    if config.model_type == causal_lm.config_class.model_type:
        return causal_lm, causal_lm.decoder_layer_class
    return causal_lm.__bases__[-1], causal_lm.decoder_layer_class.__bases__[-1]  # the parents, after what is shared


def family_of(config: PreTrainedConfig) -> type[FlatCausalLM]:
    """Return the compressed model class of a dense or compressed model's config."""
    return FAMILIES[family_name(config)]
