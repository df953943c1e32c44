"""FLAT-LLM: training-free compression of Llama- and Mistral-family language models.

Importing this package makes compressed models known to transformers: ``AutoModelForCausalLM.from_pretrained``
then loads their folders like any other.
"""

from .errors import InputError
from .layers import FlatLlamaConfig, FlatLlamaForCausalLM, FlatMistralConfig, FlatMistralForCausalLM

__all__ = [
    "FlatLlamaConfig",
    "FlatLlamaForCausalLM",
    "FlatMistralConfig",
    "FlatMistralForCausalLM",
    "InputError",
]
