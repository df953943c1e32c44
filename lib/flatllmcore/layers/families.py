"""The compressed model of each family; its ``config_class`` and ``decoder_layer_class`` are the family's other ones."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..utils.layer_utils import family_name
from . import flat_models
from .flat_attention import FlatCausalLM


def classes_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], type[nn.Module]]:
    """Return the causal language model and the decoder layer of a config: its family's dense or compressed ones."""
    causal_lm = family_of(config)
    if config.model_type == causal_lm.config_class.model_type:
        return causal_lm, causal_lm.decoder_layer_class
    return causal_lm.__bases__[-1], causal_lm.decoder_layer_class.__bases__[-1]  # the parents, after what is shared


def family_of(config: PreTrainedConfig) -> type[FlatCausalLM]:
    """Return the compressed model class of a dense or compressed model's config; it is made when first asked for."""
    found: type[FlatCausalLM] = getattr(flat_models, f"Flat{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family_name(config)]}")
    return found
