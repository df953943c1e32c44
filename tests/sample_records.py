"""Records of every kind, by hand, in the form the programs write; the figures are made up."""

import copy
import json
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "command": "python main.py --sparsity_ratio 20",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "hardware": {"device": "Some GPU", "machine": "x86_64", "system": "Linux"},
    "elapsed_s": 100.0,
}
COMPRESSION: dict[str, Any] = COMMON | {
    "kind": "flatllm",
    "request": {"prune_method": "flatllm", "dtype": "auto", "save_model": "out/tiny-20"},
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
    "perplexity": {"dataset": "pydocs", "seqlen": 256, "windows": 332, "dense": 8.0, "compressed": 10.0},
    "layers": [{"layer": 0, "keep": 1.0}, {"layer": 1, "keep": 0.6}],
    "stages_s": {"load": 5.0, "forward": 30.0, "perplexity": 20.0, "write": 3.0, "rest": 42.0},
    "peak_memory_gib": {"host": 1.25},
}
SCORING: dict[str, Any] = COMMON | {
    "kind": "bi",
    "request": {"model": "models/tiny", "dataset": "pydocs", "seed": 7},
    "nsamples": 64,
    "seqlen": 256,
    "scores": [0.31, 0.052],
    "zero_rows": 0,
    "stages_s": {"forward": 60.0, "angles": 30.0, "rest": 10.0},
    "peak_memory_gib": {"host": 1.0, "device": 2.5},
}
DENSE_MODEL: dict[str, Any] = {
    "model": "tiny",
    "base_model": None,
    "achieved_sparsity_percent": 0.0,
    "parameters": {"total": 6000, "decoder_layers": 4000},
}
SMALL_MODEL: dict[str, Any] = {
    "model": "tiny-20",
    "base_model": "tiny",
    "achieved_sparsity_percent": 19.75,
    "parameters": {"total": 5210, "decoder_layers": 3210},
}
ACCURACIES: dict[str, Any] = {
    "tasks": {
        "piqa": {"metric": "acc_norm", "value": 0.7812, "stderr": 0.0096, "num_fewshot": 0, "samples": 1838},
        "mmlu": {"metric": "acc", "value": 0.4567, "stderr": None, "num_fewshot": 5, "samples": 14042},
    },
    "mean_accuracy": 62.14,
    "limit": None,
    "harness": "lm_eval 0.4.13",
}
EVALUATION: dict[str, Any] = COMMON | {
    "kind": "zero_shot",
    "request": {"dtype": "auto"},
    "model": DENSE_MODEL,
    "zero_shot": ACCURACIES,
}
TIMING: dict[str, Any] = COMMON | {
    "kind": "speed",
    "request": {},
    "protocol": "grid",
    "dtype": "bfloat16",
    "attention": "sdpa",
    "compiled": False,
    "static_cache": True,
    "models": [DENSE_MODEL | {"weight_memory_bytes": 2**31}, SMALL_MODEL | {"weight_memory_bytes": 2**30}],
    "cells": [
        {
            "model": 0,
            "batch_size": 8,
            "prompt_length": 512,
            "new_tokens": 64,
            "repeats": 9,
            "prefill_ms": {"median": 1200.5, "low": 1190.0, "high": 1300.0},
            "decode_ms_per_token": {"median": 12.0, "low": 11.0, "high": 13.0},
            "prefill_tokens_per_s": 3412.0,
            "decode_tokens_per_s": 666.7,
            "time_to_first_token_ms": 1212.5,
            "peak_memory_bytes": 3 * 2**30,
            "kv_cache_bytes": 2**29,
            "prefill_speedup": None,
            "decode_speedup": None,
            "predicted": None,
        },
        {
            "model": 1,
            "batch_size": 8,
            "prompt_length": 512,
            "new_tokens": 64,
            "repeats": 9,
            "prefill_ms": {"median": 1000.0, "low": 990.0, "high": 1010.0},
            "decode_ms_per_token": {"median": 10.0, "low": 9.5, "high": 10.5},
            "prefill_tokens_per_s": 4096.0,
            "decode_tokens_per_s": 800.0,
            "time_to_first_token_ms": 1010.0,
            "peak_memory_bytes": 2 * 2**30,
            "kv_cache_bytes": 2**28,
            "prefill_speedup": {"median": 1.2, "low": 1.15, "high": 1.31},
            "decode_speedup": {"median": 1.19, "low": 1.1, "high": 1.25},
            "predicted": {"prefill_speedup_flops": 1.22, "decode_speedup_bytes": 1.24},
        },
    ],
}
SLICEGPT_CELL: dict[str, Any] = TIMING["cells"][1] | {
    "batch_size": 128,
    "prompt_length": 0,
    "new_tokens": 256,
    "prefill_ms": None,
    "prefill_tokens_per_s": None,
    "time_to_first_token_ms": None,
    "prefill_speedup": None,
}
LLAMA_2_7B: dict[str, Any] = {
    "base_model": "meta-llama/Llama-2-7b-hf",
    "dataset": "wikitext2",
    "nsamples": 256,
    "seqlen": 4096,
    "rank_multiple": 1,
    "perplexity": {"dataset": "wikitext2", "seqlen": 4096, "windows": 83, "dense": 5.114, "compressed": 6.735},
}


def saved(folder: Path, name: str, record: dict[str, Any], **changes: Any) -> Path:
    """Write a record, changed so, as ``folder/name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(copy.deepcopy(record) | changes))
    return path
