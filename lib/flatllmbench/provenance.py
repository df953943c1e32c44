"""What JSON records say of models, versions and hardware, and how they are written."""

import logging
import platform
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PretrainedConfig

from flatllmcore.utils.checkpoint import MANIFEST, Manifest
from flatllmcore.utils.devices import device_name, peak_memory_gib
from flatllmcore.utils.files import check_replaceable, check_writable, read_json, write_json
from flatllmcore.utils.layer_utils import count_parameters, dense_dimensions
from flatllmcore.utils.loading import empty_causal_lm, found_file, load_config
from flatllmcore.utils.names import STOCK, model_name
from flatllmcore.utils.processes import check_alone
from flatllmcore.utils.stopwatch import Stopwatch

from .command_line import as_given
from .logs import logging_to
from .records import Record

logger = logging.getLogger(__name__)

_PACKAGES = ("flatllmcore", "torch", "transformers", "datasets", "accelerate", "numpy", "safetensors", "tokenizers")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages a result depends on, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # a copy of the package without its metadata, or an optional one
            found[package] = version(package)
    return found


def hardware(device: torch.device) -> dict[str, str]:
    """Return the device a run used and the machine around it."""
    return {"device": device_name(device), "machine": platform.machine(), "system": platform.system()}


def costs(stopwatch: Stopwatch) -> Record:
    """Return where the time of a run went since its stopwatch was started, and the peak memory, and log the sums."""
    elapsed_s = time.perf_counter() - stopwatch.started
    stages = {name: round(seconds, 3) for name, seconds in stopwatch.elapsed_s.items()}
    peak = peak_memory_gib(stopwatch.device)
    memory = ", ".join(f"{gib:.2f} GiB on the {place}" for place, gib in peak.items())
    logger.info("%.1f s in all; peak memory %s", elapsed_s, memory)
    return {
        "elapsed_s": round(elapsed_s, 3),
        "stages_s": stages | {"rest": round(elapsed_s - sum(stages.values()), 3)},
        "peak_memory_gib": peak,
    }


def describe_model(model: str, cache_dir: Path | None = None) -> dict[str, Any]:
    """Return what :func:`describe_config` does, of a model in a folder or at a hub id; no weight is read."""
    manifest = found_file(model, MANIFEST, cache_dir)
    request = {} if manifest is None else read_json(manifest, Manifest).request
    described = describe_config(load_config(model, cache_dir), model, request.get("base_model"))
    if request.get("shape") == STOCK:  # in which the config does not say what there was
        described["achieved_sparsity_percent"] = request.get("achieved_sparsity_percent")
    return described | {of: request.get(of) for of in ("method", "gradient_nsamples")}


def describe_config(config: PretrainedConfig, model: str, base_model: str | None) -> dict[str, Any]:
    """Return names of a model, its parameters, all and the decoder layers' linear ones, and the share of these gone."""
    dense = dense_dimensions(config)
    counted = count_parameters(empty_causal_lm(config))
    kept = counted["decoder_linear"] / (dense.num_layers * dense.layer_parameters)
    return {
        "model": model_name(model),
        "base_model": base_model and model_name(str(base_model)),
        "achieved_sparsity_percent": 100 * (1 - kept),
        "parameters": {"total": counted["total"], "decoder_layers": counted["decoder_linear"]},
    }


def keep_record(
    kind: str, args: Namespace, argv: Sequence[str] | None, model: str, marks: str, measure: Callable[[], Record]
) -> tuple[Path, Record]:
    """Measure, with a log, and write the record of this run of ``flatllmbench.<kind>``; return its place and itself."""
    check_alone()
    started = time.perf_counter()
    command = ["python", "-m", f"flatllmbench.{kind}", *(sys.argv[1:] if argv is None else argv)]
    path = args.save / f"{model_name(model)}_{kind}{marks}.json"
    check_writable(args.save)
    check_replaceable(path)
    record = {"kind": kind, "command": shlex.join(command), "request": as_given(args), "versions": versions()}
    with logging_to(path.with_suffix(".log")), logging_redirect_tqdm():
        record |= measure() | {"elapsed_s": round(time.perf_counter() - started, 3)}
        write_json(path, record)
    return path, record
