"""A plan calibrated by a run: the share of its bound that each stage of a record of ``main.py`` reached."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from flatllmcore.core.calibration import default_batch_size
from flatllmcore.errors import InputError
from flatllmcore.utils.json_fields import read_json_object

from .machines import Machine
from .plan import Plan, Request


def seconds_by_rate(plan: Plan) -> dict[str, float]:
    """Return the seconds of computing and of files by the name they have among the stages of a run's record."""
    found: dict[str, float] = {}
    for stage in plan.stages():
        seconds = plan.seconds(stage)
        if seconds.compute + seconds.disk:
            found[stage.rate] = found.get(stage.rate, 0.0) + seconds.compute + seconds.disk
    return found


def read_run_record(path: Path) -> dict[str, Any]:
    """Return the record that a run of ``main.py --prune_method flatllm`` wrote.

    Raises:
        InputError: If it cannot be read, or is of something else.
    """
    record = read_json_object(path)
    missing = [name for name in ("request", "base_model", "stages_s", "perplexity", "nsamples") if name not in record]
    if missing:
        raise InputError(
            f"{path} is not the record of a run of main.py --prune_method flatllm: it has no {missing[0]!r}"
        )
    return record


def efficiency_of(record: Mapping[str, Any], config: PretrainedConfig, machine: Machine) -> dict[str, float]:
    """Return the share of the bound that a run of ``main.py`` reached, by stage of its record.

    Reading layers hides behind computing, so what a record has of it tells nothing of its rate.

    Args:
        record: See :func:`read_run_record`; of one process.
        config: Of the model it compressed.
        machine: Where it ran.
    """
    measured = record["stages_s"]
    bounds = seconds_by_rate(Plan(request_of(record, config), machine))
    return {rate: bound / measured[rate] for rate, bound in bounds.items() if measured.get(rate) and rate != "read"}


def request_of(record: Mapping[str, Any], config: PretrainedConfig) -> Request:
    """Return what a run of ``main.py`` was asked for, as its record says."""
    flags = record["request"]
    is_scored = "angles" in record["stages_s"]
    dtype = (config.dtype or torch.bfloat16) if flags["dtype"] == "auto" else getattr(torch, flags["dtype"])
    return Request(
        config=config,
        sparsity_ratio=record["sparsity_ratio"],
        nsamples=record["nsamples"],
        importance_nsamples=(flags["nsamples"] or 128) if is_scored else 0,
        eval_windows=record["perplexity"]["windows"],
        seqlen=record["seqlen"],
        batch_size=flags["batch_size"] or default_batch_size(record["seqlen"]),
        itemsize=dtype.itemsize,
        out_of_core=flags.get("out_of_core", False),
    )
