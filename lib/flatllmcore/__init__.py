"""FLAT-LLM: training-free compression of language models, Llama and its relatives.

Importing this package makes compressed models known to transformers: ``AutoModelForCausalLM.from_pretrained``
then loads their folders like any other. Its names are imported when they are first asked for; ``FlatLLMReassembler``
is a subclass of FedCore's ``Reassembler`` where FedCore can be imported.
"""

from typing import TYPE_CHECKING

from . import _versions
from ._lazy import attach
from .layers.registration import register_with_others

if TYPE_CHECKING:  # for editors
    from .api import FlatLLMPruner, apply_flat_llm, compute_layer_importance
    from .config import FlatLLMConfig
    from .core.rank_allocation import ImportancePreservingRankSelector
    from .errors import InputError
    from .reassembler import FlatLLMReassembler

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".api": ("FlatLLMPruner", "apply_flat_llm", "compute_layer_importance"),
        ".config": ("FlatLLMConfig",),
        ".core.rank_allocation": ("ImportancePreservingRankSelector",),
        ".errors": ("InputError",),
        ".layers.flat_models": (
            *("FlatLlamaConfig", "FlatLlamaForCausalLM"),
            *("FlatMistralConfig", "FlatMistralForCausalLM"),
        ),
        ".reassembler": ("FlatLLMReassembler",),
    },
)

register_with_others()
