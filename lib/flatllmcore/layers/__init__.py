"""Compressed model classes, and what makes them of dense ones."""

from .._lazy import attach

_LLAMA = ("FlatLlamaAttention", "FlatLlamaConfig", "FlatLlamaDecoderLayer", "FlatLlamaForCausalLM")
_MISTRAL = ("FlatMistralAttention", "FlatMistralConfig", "FlatMistralDecoderLayer", "FlatMistralForCausalLM")

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".flat_models": _LLAMA + _MISTRAL,
        ".registration": ("register",),
        ".replacement": ("adopt_compressed_layers", "compress_decoder_layer", "compressed_config", "family_of"),
    },
)
