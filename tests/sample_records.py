"""Records of every kind, by hand, in the form the programs write; the figures are made up."""

import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "command": "python main.py --model tiny",
    "request": {"dtype": "auto", "save_model": "out/tiny-20", "shape": None},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"device": "Some GPU", "machine": "x86_64", "system": "Linux"},
    "elapsed_s": 100.0,
}
COMPRESSION: dict[str, Any] = COMMON | {
    "request": COMMON["request"] | {"shape": "per-layer"},
    "kind": "flatllm",
    "base_model": "models/tiny",
    "sparsity_ratio": 20.0,
    "achieved_sparsity_percent": 19.75,
    "rank_multiple": 8,
    "prune_qk": False,
    "parameters_before": {"decoder_linear": 4000, "total": 6000},
    "parameters_after": {"decoder_linear": 3210, "total": 5210},
    "dataset": "pydocs",
    "nsamples": 128,
    "seqlen": 256,
    "seed": 42,
    "perplexity": [{"dataset": "pydocs", "seqlen": 256, "windows": 332, "dense": 8.0, "compressed": 10.0}],
    "peak_memory_gib": {"host": 1.25},
}
SCORING: dict[str, Any] = COMMON | {"kind": "bi", "scores": [0.31, 0.052]}
DENSE_MODEL: dict[str, Any] = {"model": "tiny", "base_model": None, "achieved_sparsity_percent": 0.0}
SMALL_MODEL: dict[str, Any] = {"model": "tiny-20", "base_model": "tiny", "method": "flatllm"}
SMALL_MODEL |= {"achieved_sparsity_percent": 19.75}
ACCURACIES: dict[str, Any] = {
    "tasks": {
        "piqa": {"metric": "acc_norm", "value": 0.7812, "stderr": 0.0096, "num_fewshot": 0, "samples": 1838},
        "mmlu": {"metric": "acc", "value": 0.4567, "stderr": None, "num_fewshot": None, "samples": 14042},
    },
    "mean_accuracy": 62.14,
    "harness": "lm_eval 0.4.13",
}
EVALUATION: dict[str, Any] = COMMON | {"kind": "zero_shot", "model": DENSE_MODEL, "zero_shot": ACCURACIES}
WORKLOAD = {"batch_size": 8, "prompt_length": 512, "new_tokens": 64, "repeats": 9}
DENSE_CELL: dict[str, Any] = WORKLOAD | {
    "model": 0,
    "prefill_ms": {"median": 1200.5, "low": 1190.0, "high": 1300.0},
    "decode_ms_per_token": {"median": 12.0, "low": 11.0, "high": 13.0},
    "kv_cache_bytes": 2**29,
    "peak_memory_bytes": 3 * 2**30,
}
SMALL_CELL: dict[str, Any] = DENSE_CELL | {
    "model": 1,
    "prefill_ms": None,
    "peak_memory_bytes": None,
    "decode_speedup": {"median": 1.19, "low": 1.1, "high": 1.25},
    "predicted": {"decode_speedup_bytes": 1.24},
}
PROTOCOL = {"protocol": "grid", "dtype": "bfloat16", "attention": "sdpa"}
TIMED = [DENSE_MODEL | {"weight_memory_bytes": 2**31}, SMALL_MODEL | {"weight_memory_bytes": 2**30}]
TIMING: dict[str, Any] = COMMON | PROTOCOL | {"kind": "speed", "models": TIMED, "cells": [DENSE_CELL, SMALL_CELL]}
WIKITEXT = {"dataset": "wikitext2", "seqlen": 4096}
LLAMA: dict[str, Any] = {"base_model": "meta-llama/Llama-2-7b-hf", "nsamples": 256, "rank_multiple": 1}
LLAMA |= {"perplexity": [WIKITEXT | {"windows": 83, "dense": 5.114, "compressed": 6.735}]}
LLAMA_2_7B: dict[str, Any] = COMPRESSION | WIKITEXT | LLAMA


def saved(folder: Path, name: str, record: dict[str, Any], **changes: Any) -> Path:
    """Write a record, changed so, as ``folder/name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record | changes))
    return path
