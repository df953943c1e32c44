"""Models and tokenizers from a local folder or the hub, refused in one line when they cannot be used."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError


def load_model(model: str, *, dtype: str = "auto", cache_dir: Path | None = None) -> PreTrainedModel:
    """Return a causal language model in host memory, with every weight read from safetensors.

    Args:
        model: Local folder or hub id.
        dtype: ``auto`` for the checkpoint's own, or a torch dtype's name.
        cache_dir: Where hub downloads are kept; the hub's own default for ``None``.

    Raises:
        InputError: If weights are missing, damaged or of other shapes than the config says.
    """
    chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model, dtype=chosen, cache_dir=cache_dir, use_safetensors=True, output_loading_info=True
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"checkpoint {model!r} is missing or damaged: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"checkpoint {model!r} is damaged: {len(missing)} weights are missing, first {missing[0]}")
    return loaded.eval()


def load_tokenizer(model: str, *, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands beside a model.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise InputError(f"no usable tokenizer at {model!r}: {_first_line(error)}") from error


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits that tell this model's weights from another's of the same shape.

    A digest of the final norm and the first rows of the embedding, rounded to bf16 so that loading
    the same checkpoint in another dtype gives the same digits.
    """
    embedding = model.get_input_embeddings().weight[:64]
    digest = hashlib.sha256()
    for tensor in (model.get_decoder().norm.weight, embedding):
        digest.update(tensor.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
