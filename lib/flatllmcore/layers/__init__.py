"""Compressed model classes; importing this package makes them known to transformers' auto classes.

Where two copies of this package are imported, the auto classes load models as those of the first.
"""
# ruff: noqa: F401 - what is imported is what this package offers

from transformers import CONFIG_MAPPING, AutoConfig

from .families import FAMILIES, family_of
from .flat_models import (
    FlatLlamaAttention,
    FlatLlamaConfig,
    FlatLlamaDecoderLayer,
    FlatLlamaForCausalLM,
    FlatMistralAttention,
    FlatMistralConfig,
    FlatMistralDecoderLayer,
    FlatMistralForCausalLM,
)
from .replacement import adopt_compressed_layers, compress_decoder_layer, compressed_config


def register() -> None:
    """Make compressed models known to the auto classes; vLLM, in each of its processes, calls this as a plugin."""
    for causal_lm in FAMILIES.values():
        config = causal_lm.config_class
        if config.model_type not in CONFIG_MAPPING:  # else of a copy of this package that was there before
            AutoConfig.register(config.model_type, config)


register()
