"""The compressed model of each family; its ``config_class`` and ``decoder_layer_class`` are the family's other ones."""

from transformers import PreTrainedConfig

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


def family_of(config: PreTrainedConfig) -> type[FlatCausalLM]:
    """Return the compressed model class of a dense or compressed model's config."""
    return FAMILIES[family_name(config)]
