"""Llama with its own value width and MLP width in every decoder layer."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer, FlatModel


@strict
class FlatLlamaConfig(FlatConfig, LlamaConfig):
    """A Llama config whose ``per_layer_config`` may hold ranks and ``intermediate_size``."""

    model_type = "flat_llama"


class FlatLlamaAttention(FlatAttention, LlamaAttention):
    apply_rotary_pos_emb = staticmethod(apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(eager_attention_forward)


class FlatLlamaDecoderLayer(FlatDecoderLayer, LlamaDecoderLayer):
    attention_class = FlatLlamaAttention


class FlatLlamaModel(FlatModel, LlamaModel):
    config: FlatLlamaConfig
    _no_split_modules = ["FlatLlamaDecoderLayer"]

    decoder_layer_class = FlatLlamaDecoderLayer
    norm_class = LlamaRMSNorm
    rotary_embedding_class = LlamaRotaryEmbedding


class FlatLlamaForCausalLM(FlatCausalLM, LlamaForCausalLM):
    config: FlatLlamaConfig
    _no_split_modules = ["FlatLlamaDecoderLayer"]

    model_class = FlatLlamaModel


# save_pretrained copies this file and its siblings beside the weights, for trust_remote_code=True.
FlatLlamaConfig.register_for_auto_class("AutoConfig")
FlatLlamaModel.register_for_auto_class("AutoModel")
FlatLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
