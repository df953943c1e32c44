"""Qwen2 with its own value width and MLP width in every decoder layer."""

from transformers import Qwen2Config
from transformers.models.qwen2 import modeling_qwen2

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer


class FlatQwen2Config(FlatConfig, Qwen2Config):
    model_type = "flat_qwen2"


class FlatQwen2Attention(FlatAttention, modeling_qwen2.Qwen2Attention):
    dense = modeling_qwen2


class FlatQwen2DecoderLayer(FlatDecoderLayer, modeling_qwen2.Qwen2DecoderLayer):
    attention_class = FlatQwen2Attention


class FlatQwen2ForCausalLM(FlatCausalLM, modeling_qwen2.Qwen2ForCausalLM):
    config: FlatQwen2Config
    decoder_layer_class = FlatQwen2DecoderLayer
