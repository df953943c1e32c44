"""Models and tokenizers from a local folder or the hub, refused in one line when they cannot be used."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError

_FINGERPRINT_ROWS = 16


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
            model,
            dtype=chosen,
            cache_dir=cache_dir,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"checkpoint {model!r} is missing or damaged ({reason}); expected safetensors files"
        ) from error
    _check_weights(model, info)
    return loaded.eval()


def _check_weights(model: str, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not exactly those its config asks for."""
    for kind, problem in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have other shapes than its config.json says"),
        ("unexpected_keys", "have no place in the model its config.json describes"),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if names:
            raise InputError(f"checkpoint {model!r} is damaged: {len(names)} weights {problem}, first {names[0]}")


def load_tokenizer(model: str, *, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer that stands beside a model.

    Raises:
        InputError: If there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(model, cache_dir=cache_dir)
    except Exception as error:  # damaged files raise KeyError, and the tokenizers library Exception itself
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"no usable tokenizer at {model!r} ({reason}); expected one beside the weights") from error


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits that tell this model's weights from another's of the same shape.

    A digest of the signs of the first rows of every matrix: signs are what loading the same checkpoint
    in another dtype leaves alone, and training or a merged adapter does not.
    """
    digest = hashlib.sha256()
    for parameter in model.get_decoder().parameters():
        if parameter.ndim == 2:
            digest.update(parameter.detach()[:_FINGERPRINT_ROWS].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
