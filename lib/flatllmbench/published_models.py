"""Configs of the models in the paper's tables, as their publishers state them, so that no hub is needed for a size."""

from collections.abc import Callable

from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from flatllmcore.errors import InputError
from flatllmcore.utils.layer_utils import load_config

_LLAMA_2 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA_3 = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_WIDTHS_OF_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}

PUBLISHED_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-2-7b": lambda: LlamaConfig(**_LLAMA_2, intermediate_size=11008),
    "llama-2-13b": lambda: LlamaConfig(
        **_LLAMA_2, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "llama-2-70b": lambda: LlamaConfig(**_LLAMA_2 | _WIDTHS_OF_70B),
    "llama-3-8b": lambda: LlamaConfig(**_LLAMA_3),
    "llama-3-70b": lambda: LlamaConfig(**_LLAMA_3 | _WIDTHS_OF_70B),
    "mistral-7b": lambda: MistralConfig(
        vocab_size=32000,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
    ),
}


def find_config(model: str) -> PretrainedConfig:
    """Return the config of a published model by name, or that of a local folder, ``config.json`` or hub id.

    Raises:
        InputError: If there is none, or it cannot be read; with the names there are.
    """
    if model in PUBLISHED_MODELS:
        return PUBLISHED_MODELS[model]()
    try:
        return load_config(model)
    except InputError as error:
        raise InputError(f"{error}; or one of the names {', '.join(PUBLISHED_MODELS)}") from error
