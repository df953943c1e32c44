"""Mistral with its own value width and MLP width in every decoder layer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralRMSNorm,
    MistralRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer, FlatModel


@strict
class FlatMistralConfig(FlatConfig, MistralConfig):
    """A Mistral config whose ``per_layer_config`` may hold ranks and ``intermediate_size``."""

    model_type = "flat_mistral"


class FlatMistralAttention(FlatAttention, MistralAttention):
    apply_rotary_pos_emb = staticmethod(apply_rotary_pos_emb)
    eager_attention_forward = staticmethod(eager_attention_forward)

    def attention_options(self) -> dict[str, Any]:
        return {"sliding_window": self.config.sliding_window}


class FlatMistralDecoderLayer(FlatDecoderLayer, MistralDecoderLayer):
    attention_class = FlatMistralAttention


class FlatMistralModel(FlatModel, MistralModel):
    config: FlatMistralConfig
    _no_split_modules = ["FlatMistralDecoderLayer"]

    decoder_layer_class = FlatMistralDecoderLayer
    norm_class = MistralRMSNorm
    rotary_embedding_class = MistralRotaryEmbedding


class FlatMistralForCausalLM(FlatCausalLM, MistralForCausalLM):
    config: FlatMistralConfig
    _no_split_modules = ["FlatMistralDecoderLayer"]

    model_class = FlatMistralModel


# save_pretrained copies this file and its siblings beside the weights, for trust_remote_code=True.
FlatMistralConfig.register_for_auto_class("AutoConfig")
FlatMistralModel.register_for_auto_class("AutoModel")
FlatMistralForCausalLM.register_for_auto_class("AutoModelForCausalLM")
