"""Qwen3 with its own value width and MLP width in every decoder layer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer, FlatModel


@strict
class FlatQwen3Config(FlatConfig, Qwen3Config):
    """A Qwen3 config whose ``per_layer_config`` may hold ranks and ``intermediate_size``."""

    model_type = "flat_qwen3"


class FlatQwen3Attention(FlatAttention, Qwen3Attention):
    q_norm: Qwen3RMSNorm
    k_norm: Qwen3RMSNorm

    apply_rotary_pos_emb = staticmethod(apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(eager_attention_forward)

    def project_queries_and_keys(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, key = super().project_queries_and_keys(hidden_states)
        return self.q_norm(query), self.k_norm(key)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


class FlatQwen3DecoderLayer(FlatDecoderLayer, Qwen3DecoderLayer):
    attention_class = FlatQwen3Attention


class FlatQwen3Model(FlatModel, Qwen3Model):
    config: FlatQwen3Config
    _no_split_modules = ["FlatQwen3DecoderLayer"]

    decoder_layer_class = FlatQwen3DecoderLayer
    norm_class = Qwen3RMSNorm
    rotary_embedding_class = Qwen3RotaryEmbedding

    def __init__(self, config: FlatQwen3Config) -> None:
        super().__init__(config)
        self.has_sliding_layers = "sliding_attention" in config.layer_types


class FlatQwen3ForCausalLM(FlatCausalLM, Qwen3ForCausalLM):
    config: FlatQwen3Config
    _no_split_modules = ["FlatQwen3DecoderLayer"]

    model_class = FlatQwen3Model


# save_pretrained copies this file and its siblings beside the weights, for trust_remote_code=True.
FlatQwen3Config.register_for_auto_class("AutoConfig")
FlatQwen3Model.register_for_auto_class("AutoModel")
FlatQwen3ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
