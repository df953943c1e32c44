"""JSON records of runs: what was asked, on what, and what came out."""

import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError
from transformers import PretrainedConfig

from flatllmcore.errors import InputError
from flatllmcore.layers import FAMILIES
from flatllmcore.utils.checkpoint import count_parameters
from flatllmcore.utils.devices import device_name
from flatllmcore.utils.files import write_atomically
from flatllmcore.utils.json_fields import read_json_object
from flatllmcore.utils.layer_utils import dense_dimensions, load_config, model_name
from flatllmcore.utils.loading import empty_causal_lm

_PACKAGES = ("flatllmcore", "torch", "transformers", "datasets", "accelerate", "numpy", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a copy of the package without its metadata, or an optional one
            continue
    return found


def hardware(device: torch.device) -> dict[str, str]:
    """Return the device a run used and the machine around it."""
    return {"device": device_name(device), "machine": platform.machine(), "system": platform.system()}


def describe_model(model: str | Path, cache_dir: Path | None = None) -> dict[str, Any]:
    """Return what records say of a dense or compressed model; no weight is read.

    Args:
        model: Local folder or hub id.
        cache_dir: Where hub downloads are kept; the hub's own default for ``None``.

    Returns:
        A mapping with

        - ``model``: last part of the folder or id;
        - ``base_model``: the same of the model it was compressed from, so that a compressed model's equals its dense
          one's ``model``; ``None`` for a dense model, or where no model card says;
        - ``achieved_sparsity_percent``: of the dense model's linear weights in decoder layers, those removed;
        - ``parameters``: ``total``, tied ones once, and ``decoder_layers``, the linear weights in decoder layers.

    Raises:
        InputError: If there is no such model, its family is not supported or its model card is damaged.
    """
    config = load_config(str(model), cache_dir)
    base_model = None if config.model_type in FAMILIES else _base_model(str(model), cache_dir)
    return describe_config(config, model_name(model), base_model)


def describe_config(config: PretrainedConfig, name: str, base_model: str | None) -> dict[str, Any]:
    """Return what :func:`describe_model` does, of a model that need not be in a folder."""
    dense = dense_dimensions(config)
    counted = count_parameters(empty_causal_lm(config))
    kept = counted["decoder_linear"] / (dense.num_layers * dense.layer_parameters)
    return {
        "model": name,
        "base_model": base_model,
        "achieved_sparsity_percent": 100 * (1 - kept),
        "parameters": {"total": counted["total"], "decoder_layers": counted["decoder_linear"]},
    }


def _base_model(model: str, cache_dir: Path | None) -> str | None:
    """Return the name of the model that a compressed one was made from, as its model card states it."""
    card = Path(model, "README.md")
    if not Path(model).is_dir():
        try:
            card = Path(huggingface_hub.hf_hub_download(model, card.name, cache_dir=cache_dir))
        except EntryNotFoundError:
            return None
    if not card.is_file():
        return None
    try:
        stated = huggingface_hub.metadata_load(card) or {}
        return model_name(stated["flat_llm"]["base_model"]) if "flat_llm" in stated else None
    except Exception as error:  # those of the YAML parser share no other class
        raise InputError(f"the model card {card} has damaged front matter; mend or remove it") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as indented JSON, atomically."""
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def read_records(paths: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the JSON object of every file, each with its path; a folder stands for all ``*.json`` files below it.

    Raises:
        InputError: If a path does not exist, a folder has no such file, or a file holds something else.
    """
    files: dict[Path, None] = {}  # in order, once
    for path in paths:
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"no records in {path}: it holds no *.json file")
        files |= dict.fromkeys(found)
    return [(path, read_json_object(path)) for path in files]
