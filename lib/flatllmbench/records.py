"""JSON records of runs: what was asked, on what, and what came out."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flatllmcore.utils.devices import device_name
from flatllmcore.utils.files import write_atomically

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


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as indented JSON, atomically."""
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
