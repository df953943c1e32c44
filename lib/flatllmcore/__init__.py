"""FLAT-LLM: training-free compression of language models, Llama and its relatives.

Importing this package makes compressed models known to transformers: ``AutoModelForCausalLM.from_pretrained``
then loads their folders like any other. ``FlatLLMReassembler`` is made when it is first asked for, since it is a
subclass of FedCore's ``Reassembler`` where FedCore can be imported.
"""

from typing import Any

from . import _versions  # noqa: F401 (first: it says which transformers is needed)
from .api import FlatLLMPruner, apply_flat_llm, compute_layer_importance
from .config import FlatLLMConfig
from .core.rank_allocation import ImportancePreservingRankSelector
from .errors import InputError
from .layers import FlatLlamaConfig, FlatLlamaForCausalLM, FlatMistralConfig, FlatMistralForCausalLM

__all__ = [
    "FlatLLMConfig",
    "FlatLLMPruner",
    "FlatLLMReassembler",
    "FlatLlamaConfig",
    "FlatLlamaForCausalLM",
    "FlatMistralConfig",
    "FlatMistralForCausalLM",
    "ImportancePreservingRankSelector",
    "InputError",
    "apply_flat_llm",
    "compute_layer_importance",
]


def __getattr__(name: str) -> Any:
    if name != "FlatLLMReassembler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .reassembler import FlatLLMReassembler

    return FlatLLMReassembler
