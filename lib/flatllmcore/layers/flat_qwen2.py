"""Qwen2 with its own value width and MLP width in every decoder layer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer, FlatModel


@strict
class FlatQwen2Config(FlatConfig, Qwen2Config):
    """A Qwen2 config whose ``per_layer_config`` may hold ranks and ``intermediate_size``.

    Qwen2's own config states ``head_dim`` only when it is not ``hidden_size / num_attention_heads``; here it always is.
    """

    model_type = "flat_qwen2"

    head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class FlatQwen2Attention(FlatAttention, Qwen2Attention):
    apply_rotary_pos_emb = staticmethod(apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.sliding_window}


class FlatQwen2DecoderLayer(FlatDecoderLayer, Qwen2DecoderLayer):
    attention_class = FlatQwen2Attention


class FlatQwen2Model(FlatModel, Qwen2Model):
    config: FlatQwen2Config
    _no_split_modules = ["FlatQwen2DecoderLayer"]

    decoder_layer_class = FlatQwen2DecoderLayer
    norm_class = Qwen2RMSNorm
    rotary_embedding_class = Qwen2RotaryEmbedding

    def __init__(self, config: FlatQwen2Config) -> None:
        super().__init__(config)
        self.has_sliding_layers = "sliding_attention" in config.layer_types


class FlatQwen2ForCausalLM(FlatCausalLM, Qwen2ForCausalLM):
    config: FlatQwen2Config
    _no_split_modules = ["FlatQwen2DecoderLayer"]

    model_class = FlatQwen2Model


# save_pretrained copies this file and its siblings beside the weights, for trust_remote_code=True.
FlatQwen2Config.register_for_auto_class("AutoConfig")
FlatQwen2Model.register_for_auto_class("AutoModel")
FlatQwen2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
