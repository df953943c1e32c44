"""How long models take to read a prompt and to decode, measured in turns, and what arithmetic alone would give."""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from flatllmcore.utils.devices import peak_allocated_bytes, reset_peak_allocated, synchronize
from flatllmcore.utils.layer_utils import count_parameters
from flatllmcore.utils.loading import empty_causal_lm


class Workload(NamedTuple):
    """A batch of prompts and the tokens decoded after them; without prompts these tokens are given."""

    batch_size: int
    prompt_length: int
    new_tokens: int


class Timing(NamedTuple):
    """Seconds and bytes of one run."""

    decode_s: float  # a step, one token for every sequence: the mean after a prompt, the median without one
    kv_cache_bytes: int  # of the keys and values at the end
    prefill_s: float = 0.0  # from a batch of prompts to the first tokens after them
    peak_memory_bytes: int | None = None  # this model's weights counted and others' not; None on a CPU


def measure(
    models: Sequence[PreTrainedModel], workload: Workload, repeats: int, done: Callable[[], object]
) -> list[list[Timing]]:
    """Return the timings of each model, one per repeat; ``done`` is called after every run.

    Every model runs once untimed, then they take turns, A B C A B C: whatever else the machine does meets all of them.
    """
    shape = (workload.batch_size, workload.prompt_length or workload.new_tokens)
    token_ids = torch.randint(models[0].config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found: list[list[Timing]] = [[] for _ in models]
    for _ in range(1 + repeats):
        for model, own in zip(models, found, strict=True):
            own.append(run(model, workload, token_ids.to(model.device)))
            done()
    return [own[1:] for own in found]


@torch.no_grad()
def run(model: PreTrainedModel, workload: Workload, token_ids: Tensor) -> Timing:
    """Return the timing of one run on the workload's tokens, (B, S), which are on the model's device."""
    before = reset_peak_allocated(model.device)
    timing = _read_and_decode(model, token_ids, workload) if workload.prompt_length else _feed(model, token_ids)
    peak = peak_allocated_bytes(model.device)
    own = None if before is None or peak is None else model.get_memory_footprint() + peak - before
    return timing._replace(peak_memory_bytes=own)


def _read_and_decode(model: PreTrainedModel, prompts: Tensor, workload: Workload) -> Timing:
    cache = DynamicCache(config=model.config)
    started = _now(model)
    tokens = model(prompts, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)  # (B, 1)
    read = _now(model)
    for _ in range(workload.new_tokens):
        tokens = model(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    return Timing((_now(model) - read) / workload.new_tokens, kv_cache_bytes(cache), read - started)


def _feed(model: PreTrainedModel, token_ids: Tensor) -> Timing:
    cache = DynamicCache(config=model.config)
    steps_s = []
    for tokens in token_ids.split(1, dim=1):
        started = _now(model)
        model(tokens, past_key_values=cache)
        steps_s.append(_now(model) - started)
    return Timing(median(steps_s), kv_cache_bytes(cache))


def _now(model: PreTrainedModel) -> float:
    synchronize(model.device)
    return time.perf_counter()


def figures(models: Sequence[PreTrainedModel], workload: Workload, found: Sequence[Sequence[Timing]]) -> Iterator[dict]:
    """Yield each model's figures as records have them; speed-ups over the first compare the runs of the same repeat."""
    needs = [_needs(model, workload, own[0].kv_cache_bytes) for model, own in zip(models, found, strict=True)]
    stages = [("decode", "decode_ms_per_token", 1, "bytes"), ("prefill", "prefill_ms", workload.prompt_length, "flops")]
    for index, own in enumerate(found):
        cell: dict[str, Any] = {"model": index} | workload._asdict() | {"repeats": len(own)}
        cell["kv_cache_bytes"] = own[0].kv_cache_bytes
        cell["peak_memory_bytes"] = max(timing.peak_memory_bytes or 0 for timing in own) or None
        cell["predicted"] = {} if index else None
        for stage, milliseconds, tokens, need in stages if workload.prompt_length else stages[:1]:
            seconds, dense_seconds = ([getattr(timing, f"{stage}_s") for timing in each] for each in (own, found[0]))
            cell[milliseconds] = _spread([1000 * each for each in seconds])
            cell[f"{stage}_tokens_per_s"] = workload.batch_size * tokens / median(seconds)
            if index:
                cell[f"{stage}_speedup"] = _spread([a / b for a, b in zip(dense_seconds, seconds, strict=True)])
                cell["predicted"][f"{stage}_speedup_{need}"] = needs[0][need] / needs[index][need]
        cell["time_to_first_token_ms"] = cell["prefill_ms"]["median"] if workload.prompt_length else None
        yield cell


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high}


def _needs(model: PreTrainedModel, workload: Workload, cache_bytes: int) -> dict[str, float]:
    """Return the operations of reading one prompt, and the bytes of weights and cache that a step reads on average."""
    head = model.lm_head.weight.numel()
    weights = count_parameters(model)["decoder_linear"] + head
    mean_length = workload.prompt_length + (workload.new_tokens + 1) / 2
    cached = cache_bytes * mean_length / (workload.prompt_length + workload.new_tokens)
    operations = forward_operations(model.config, workload.prompt_length or 1) + 2 * head
    return {"flops": operations, "bytes": weights * model.dtype.itemsize + cached}


def forward_operations(config: PretrainedConfig, length: int) -> int:
    """Return the operations of ``length`` tokens in the decoder layers, a multiplication and an addition being two.

    Counted on the meta device; attention as if every token saw every other.
    """
    model = empty_causal_lm(deepcopy(config))  # a copy: a model changes its config's attention with its own
    model.set_attn_implementation("eager")
    mask = torch.ones(1, 1, length, length, device="meta")  # given, or the values of the tokens would be looked at
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.base_model(mask[0, 0, :1].long(), attention_mask=mask, use_cache=False)
    return counter.get_total_flops()


def kv_cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes of the keys and values that a cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
