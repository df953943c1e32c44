"""The compressed classes of every family, made of its dense ones when they are first asked for by name.

``FlatLlamaConfig``, ``FlatLlamaAttention``, ``FlatLlamaDecoderLayer`` and ``FlatLlamaForCausalLM``, and so on: whatever
is ``Flat`` before a class of transformers.
"""

import re
import sys
from typing import Any

import transformers
from torch import Tensor, nn

from .flat_attention import FlatAttention, FlatCausalLM, FlatConfig, FlatDecoderLayer


class _Normed(FlatAttention):
    """Queries and keys are normalised before they are turned, within each head."""

    q_norm: nn.Module
    k_norm: nn.Module

    def project_queries_and_keys(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, key = super().project_queries_and_keys(hidden_states)
        return self.q_norm(query), self.k_norm(key)


# Attention that does more than Llama's, by the family's part in the names of its classes.
_ATTENTION: dict[str, type[FlatAttention]] = {
    "Qwen3": _Normed,
}


def _make_classes(family: str) -> None:
    """Make the classes of a family of transformers, ``Llama``, and have them in this module."""
    causal_lm = getattr(transformers, f"{family}ForCausalLM")
    dense = sys.modules[causal_lm.__module__]

    def made(shared: type, parent: type, **members: Any) -> type:
        name = f"Flat{parent.__name__}"
        globals()[name] = type(name, (shared, parent), {"__module__": __name__, **members})
        return globals()[name]

    config = made(FlatConfig, causal_lm.config_class, model_type=f"flat_{causal_lm.config_class.model_type}")
    attention = made(_ATTENTION.get(family, FlatAttention), getattr(dense, f"{family}Attention"), dense=dense)
    layer = made(FlatDecoderLayer, getattr(dense, f"{family}DecoderLayer"), attention_class=attention)
    made(FlatCausalLM, causal_lm, config_class=config, decoder_layer_class=layer)


def __getattr__(name: str) -> Any:
    of_family = re.fullmatch(r"Flat(\w+?)(Text)?(Config|Attention|DecoderLayer|ForCausalLM)", name)
    if of_family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _make_classes(of_family[1])
    return globals()[name]
