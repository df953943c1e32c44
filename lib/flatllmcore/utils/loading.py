"""Models and tokenizers from a local folder or the hub, refused in one line when they cannot be used."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from ..errors import InputError

FINGERPRINT_ROWS = 16


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
    check_weights(model, info)
    return loaded.eval()


def check_weights(model: str, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not exactly those its config asks for.

    Raises:
        InputError: Naming the first weight that is wrong.
    """
    for kind, problem in (
        ("missing_keys", "are missing"),
        ("mismatched_keys", "have other shapes than its config.json says"),
        ("unexpected_keys", "have no place in the model its config.json describes"),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in info[kind])
        if names:
            raise InputError(f"checkpoint {model!r} is damaged: {len(names)} weights {problem}, first {names[0]}")


def empty_causal_lm(config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model of a dense or compressed config, on the meta device: shapes and no weights.

    Raises:
        InputError: If the config asks for what transformers has not, such as an unknown activation.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (KeyError, ValueError) as error:
        raise InputError(f"the model config asks for {error}, which transformers has not; mend config.json") from error


def generation_config_file(model: str, cache_dir: Path | None = None) -> Path | None:
    """Return the ``generation_config.json`` beside a model, local or on the hub, if it has one."""
    found = cached_file(model, GENERATION_CONFIG_NAME, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


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


def weights_fingerprint(leading_rows: Iterable[Tensor]) -> str:
    """Return 16 hexadecimal digits that tell a model's weights from another's of the same shape.

    A digest of signs: they are what loading the same checkpoint in another dtype leaves alone, and training or a
    merged adapter does not.

    Args:
        leading_rows: The first ``FINGERPRINT_ROWS`` rows of every matrix, in the order of the model's parameters.
    """
    digest = hashlib.sha256()
    for rows in leading_rows:
        digest.update(rows.signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
