"""What JSON records of runs say of models, versions and hardware."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from flatllmcore.engine.checkpoint_sink import MANIFEST, Manifest
from flatllmcore.layers import FAMILIES
from flatllmcore.utils.devices import device_name
from flatllmcore.utils.files import read_json
from flatllmcore.utils.layer_utils import count_parameters, dense_dimensions, load_config, model_name
from flatllmcore.utils.loading import empty_causal_lm, found_file

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
    """Return what records say of a model in a folder or at a hub id, as :func:`describe_config`; no weight is read."""
    config = load_config(str(model), cache_dir)
    base_model = None if config.model_type in FAMILIES else _base_model(str(model), cache_dir)
    return describe_config(config, model_name(model), base_model)


def describe_config(config: PretrainedConfig, name: str, base_model: str | None) -> dict[str, Any]:
    """Return a model's name, that of the model it was compressed from, if known, its parameters and their share gone.

    ``parameters`` are ``total``, tied ones once, and ``decoder_layers``, the linear weights in decoder layers;
    ``achieved_sparsity_percent`` is the percentage of the latter that the dense model had more.
    """
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
    """Return the name of the model that a compressed one was made from, as the manifest beside its weights says."""
    manifest = found_file(model, MANIFEST, cache_dir)
    if manifest is None:
        return None
    return model_name(read_json(manifest, Manifest).request["base_model"])
