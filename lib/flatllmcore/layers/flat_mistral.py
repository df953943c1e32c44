"""Mistral with its own value width and MLP width in every decoder layer."""

from transformers import MistralConfig
from transformers.models.mistral import modeling_mistral

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer


class FlatMistralConfig(FlatConfig, MistralConfig):
    model_type = "flat_mistral"


class FlatMistralAttention(FlatAttention, modeling_mistral.MistralAttention):
    dense = modeling_mistral


class FlatMistralDecoderLayer(FlatDecoderLayer, modeling_mistral.MistralDecoderLayer):
    attention_class = FlatMistralAttention


class FlatMistralForCausalLM(FlatCausalLM, modeling_mistral.MistralForCausalLM):
    config: FlatMistralConfig
    decoder_layer_class = FlatMistralDecoderLayer
