"""Qwen3 with its own value width and MLP width in every decoder layer."""

from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer


class FlatQwen3Config(FlatConfig, Qwen3Config):
    model_type = "flat_qwen3"


class FlatQwen3Attention(FlatAttention, modeling_qwen3.Qwen3Attention):
    dense = modeling_qwen3

    q_norm: nn.Module
    k_norm: nn.Module

    def project_queries_and_keys(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (B, T, H, d) and keys (B, T, G, d), normalised within each head."""
        query, key = super().project_queries_and_keys(hidden_states)
        return self.q_norm(query), self.k_norm(key)


class FlatQwen3DecoderLayer(FlatDecoderLayer, modeling_qwen3.Qwen3DecoderLayer):
    attention_class = FlatQwen3Attention


class FlatQwen3ForCausalLM(FlatCausalLM, modeling_qwen3.Qwen3ForCausalLM):
    config: FlatQwen3Config
    decoder_layer_class = FlatQwen3DecoderLayer
