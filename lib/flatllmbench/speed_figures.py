"""From the seconds of repeated runs to the figures of a record."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from .arithmetic import decode_bytes, prefill_flops
from .timing import Timing, Workload


def figures_of(
    workload: Workload,
    configs: Sequence[PretrainedConfig],
    timings: Sequence[Sequence[Timing]],
    itemsize: int,
    *,
    has_static_cache: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield the figures of each model at one workload.

    Args:
        configs: Of the models, the dense one's first.
        timings: Per model one per repeat. A speed-up compares the runs of the same repeat.
        itemsize: Bytes of a weight, and of a number in the cache.
    """
    for config, own in zip(configs, timings, strict=True):
        figures = memory_figures(workload, own) | decode_figures(workload, timings[0], own)
        figures |= prefill_figures(workload, timings[0], own) | {"predicted": None}
        if own is timings[0]:
            figures |= {"prefill_speedup": None, "decode_speedup": None}
        else:
            figures["predicted"] = predicted_speedups(
                configs[0], config, workload, itemsize, has_static_cache=has_static_cache
            )
        yield figures


def memory_figures(workload: Workload, own: Sequence[Timing]) -> dict[str, Any]:
    peaks = [timing.peak_memory_bytes for timing in own if timing.peak_memory_bytes is not None]
    return {
        "batch_size": workload.batch_size,
        "prompt_length": workload.prompt_length,
        "new_tokens": workload.new_tokens,
        "repeats": len(own),
        "peak_memory_bytes": max(peaks, default=None),
        "kv_cache_bytes": own[0].kv_cache_bytes,
    }


def prefill_figures(workload: Workload, dense: Sequence[Timing], own: Sequence[Timing]) -> dict[str, Any]:
    """Return what reading the prompts took; None for each figure without prompts."""
    names = ("prefill_ms", "prefill_tokens_per_s", "time_to_first_token_ms", "prefill_speedup")
    prompts = [timing.prompt for timing in own if timing.prompt is not None]
    dense_prompts = [timing.prompt for timing in dense if timing.prompt is not None]
    if not prompts:
        return dict.fromkeys(names)
    prefill_ms = spread([1000 * prompt.prefill_s for prompt in prompts])
    tokens_per_s = 1000 * workload.batch_size * workload.prompt_length / prefill_ms["median"]
    first_token_ms = spread([1000 * prompt.first_token_s for prompt in prompts])["median"]
    speedup = spread([a.prefill_s / b.prefill_s for a, b in zip(dense_prompts, prompts, strict=True)])
    return dict(zip(names, (prefill_ms, tokens_per_s, first_token_ms, speedup), strict=True))


def decode_figures(workload: Workload, dense: Sequence[Timing], own: Sequence[Timing]) -> dict[str, Any]:
    decode_ms = spread([1000 * timing.decode_s for timing in own])
    return {
        "decode_ms_per_token": decode_ms,
        "decode_tokens_per_s": 1000 * workload.batch_size / decode_ms["median"],
        "decode_speedup": spread([a.decode_s / b.decode_s for a, b in zip(dense, own, strict=True)]),
    }


def predicted_speedups(
    dense: PretrainedConfig, config: PretrainedConfig, workload: Workload, itemsize: int, *, has_static_cache: bool
) -> dict[str, float | None]:
    """Return how many times the operations of the prompts, and the bytes of a decoding step, the dense model needs."""
    batch_size, prompt_length, new_tokens = workload.batch_size, workload.prompt_length, workload.new_tokens
    flops = [prefill_flops(each, batch_size, prompt_length) for each in (dense, config)]
    moved = [
        decode_bytes(each, batch_size, prompt_length, new_tokens, itemsize, has_static_cache=has_static_cache)
        for each in (dense, config)
    ]
    return {
        "prefill_speedup_flops": flops[0] / flops[1] if prompt_length else None,
        "decode_speedup_bytes": moved[0] / moved[1],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 25th and 75th percentiles."""
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return {"median": middle, "low": low, "high": high}
