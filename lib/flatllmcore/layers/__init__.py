"""Compressed model classes; importing this package makes them known to transformers' auto classes.

Where two copies of this package are imported, the auto classes load models as those of the first.
"""
# ruff: noqa: F401 - what is imported is what this package offers

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from .families import FAMILIES, Family, family_of
from .flat_llama import FlatLlamaAttention, FlatLlamaConfig, FlatLlamaDecoderLayer, FlatLlamaForCausalLM
from .flat_mistral import FlatMistralAttention, FlatMistralConfig, FlatMistralDecoderLayer, FlatMistralForCausalLM
from .replacement import adopt_compressed_layers, compress_decoder_layer, compressed_config, compressed_part

for _family in FAMILIES.values():
    if _family.config.model_type not in CONFIG_MAPPING:  # else of a copy of this package that was there before
        AutoConfig.register(_family.config.model_type, _family.config)
    AutoModel.register(_family.config, _family.model)
    AutoModelForCausalLM.register(_family.config, _family.causal_lm)
