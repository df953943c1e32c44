"""Llama with its own value width and MLP width in every decoder layer."""

from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer


class FlatLlamaConfig(FlatConfig, LlamaConfig):
    model_type = "flat_llama"


class FlatLlamaAttention(FlatAttention, modeling_llama.LlamaAttention):
    dense = modeling_llama


class FlatLlamaDecoderLayer(FlatDecoderLayer, modeling_llama.LlamaDecoderLayer):
    attention_class = FlatLlamaAttention


class FlatLlamaForCausalLM(FlatCausalLM, modeling_llama.LlamaForCausalLM):
    config: FlatLlamaConfig
    decoder_layer_class = FlatLlamaDecoderLayer
