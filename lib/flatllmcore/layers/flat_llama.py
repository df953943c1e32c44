"""Llama with its own value width and MLP width in every decoder layer."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer, FlatModel


@strict
class FlatLlamaConfig(FlatConfig, LlamaConfig):
    model_type = "flat_llama"


class FlatLlamaAttention(FlatAttention, modeling_llama.LlamaAttention):
    dense = modeling_llama


class FlatLlamaDecoderLayer(FlatDecoderLayer, modeling_llama.LlamaDecoderLayer):
    attention_class = FlatLlamaAttention


class FlatLlamaModel(FlatModel, modeling_llama.LlamaModel):
    config: FlatLlamaConfig
    decoder_layer_class = FlatLlamaDecoderLayer


class FlatLlamaForCausalLM(FlatCausalLM, modeling_llama.LlamaForCausalLM):
    config: FlatLlamaConfig
    model_class = FlatLlamaModel
