"""The compression methods, by the name that ``--prune_method`` and ``FlatLLMConfig.method`` take.

A method is data about what is looked at and what is solved; ``engine/protocols.py`` says how the engine asks. A further
one is a file here and an entry below.
"""

from ..engine.protocols import Method
from .flatllm import FlatLLM
from .flatllm_plus import FlatLLMPlus

METHODS: dict[str, Method] = {method.name: method for method in (FlatLLM(), FlatLLMPlus())}

__all__ = ["METHODS", "FlatLLM"]
