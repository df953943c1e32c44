"""The compressed classes of every family, made of its dense ones when they are first asked for by name.

``FlatLlamaConfig``, ``FlatLlamaAttention``, ``FlatLlamaDecoderLayer``, ``FlatLlamaModel``, ``FlatLlamaForCausalLM`` and
``FlatLlamaForSequenceClassification``, and so on: whatever is ``Flat`` before a class of transformers.
"""

import re
import sys
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification

from .flat_attention import FlatAttention, FlatCausalLM, FlatDecoderLayer, FlatModel
from .flat_configs import flat_config


class _Normed(FlatAttention):
    """Queries and keys are normalised before they are turned, within each head or all heads together."""

    def project_queries_and_keys(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, key = super().project_queries_and_keys(hidden_states)
        return _normed(query, self.q_norm), _normed(key, self.k_norm)


def _normed(heads: Tensor, norm: Any) -> Tensor:
    is_within_heads = norm.weight.numel() == heads.shape[-1]
    return norm(heads) if is_within_heads else norm(heads.flatten(-2)).view_as(heads)


class _NormedBehind(FlatAttention):
    """Queries and keys are normalised within each head when they have been turned."""

    query_layernorm: nn.Module
    key_layernorm: nn.Module

    def rotated(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        query, key = super().rotated(query, key, position_embeddings)
        return self.query_layernorm(query), self.key_layernorm(key)


class _Dropping(FlatAttention):
    """What leaves the attention is dropped in part in training."""

    residual_dropout: float

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = super().forward(*args, **kwargs)
        return nn.functional.dropout(output, self.residual_dropout, self.training), weights


class _Capped(FlatAttention):
    """Scores are capped, in attention functions that can."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args, softcap=self.attn_logit_softcapping, **kwargs)


class _TurnedInWindows(FlatAttention):
    """Layers without a sliding window know no positions."""

    @property
    def use_rope(self) -> bool:  # type: ignore[override]
        return self.sliding_window is not None


class _NormedTurnedInWindows(_Normed):
    """The same, with norms; where no layer has a window, all know positions."""

    is_sliding: bool

    def __init__(self, config: transformers.PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.use_rope = self.is_sliding or self.sliding_window is None
        self.sliding_window = self.sliding_window if self.is_sliding else None


# Attention that does more than Llama's, by the family's part in the names of its classes.
_ATTENTION: dict[str, type[FlatAttention]] = {
    "Cohere2": _TurnedInWindows,
    "Exaone4": _NormedTurnedInWindows,
    "Gemma2": _Capped,
    "HunYuanDenseV1": _NormedBehind,
    **dict.fromkeys(("Gemma3", "Olmo2", "Olmo3", "Qwen3"), _Normed),
    "SeedOss": _Dropping,
}


def _make_classes(family: str) -> None:
    """Make the classes of a family of transformers, ``Llama``, and have them in this module."""
    causal_lm = getattr(transformers, f"{family}ForCausalLM")
    dense = sys.modules[causal_lm.__module__]

    def made(shared: type, parent: type, **members: Any) -> type:
        name = f"Flat{parent.__name__}"
        globals()[name] = type(name, (shared, parent), {"__module__": __name__, **members})
        return globals()[name]

    config = flat_config(causal_lm.config_class.model_type)
    globals()[config.__name__] = config
    attention = made(_ATTENTION.get(family, FlatAttention), getattr(dense, f"{family}Attention"), dense=dense)
    layer = made(FlatDecoderLayer, getattr(dense, f"{family}DecoderLayer"), attention_class=attention)
    members: dict[str, Any] = {"config_class": config, "decoder_layer_class": layer}
    model = transformers.MODEL_MAPPING[causal_lm.config_class]
    # Not all families have a classifier of their own, but all of those that have one make it of these.
    classifier = type(f"{family}ForSequenceClassification", (GenericForSequenceClassification, *model.__bases__), {})
    for shared, parent in ((FlatModel, model), (FlatCausalLM, causal_lm), (FlatModel, classifier)):
        made(shared, parent, **members)
    for auto_class, name in config.model_classes.items():  # here, because a classifier asks AutoModel for its body
        one = globals()[name.removeprefix("flat_models.")]
        getattr(transformers, auto_class).register(config, one, exist_ok=True)


def __getattr__(name: str) -> Any:
    of_family = re.fullmatch(r"Flat(\w+?)(Text)?(Config|Attention|DecoderLayer|Model|For\w+)", name)
    if of_family is not None and f"Flat{of_family[1]}ForCausalLM" not in globals():
        _make_classes(of_family[1])
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
