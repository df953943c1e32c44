"""How long models take to read a prompt and to decode, measured in turns."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from flatllmcore.utils.devices import peak_allocated_bytes, reset_peak_allocated, synchronize

# Of a compiled model: its prompt, its first step and all steps of growing lengths compile in the first run; CUDA
# graphs are recorded in the second.
_WARM_UP_RUNS = {False: 1, True: 3}
# Graphs per method of a model's class, which several models may share: three each. Beyond, compiling is an error.
_MOST_GRAPHS = 256


@dataclass(frozen=True)
class Workload:
    """What is run: a batch of prompts and the tokens decoded after them.

    Attributes:
        prompt_length: 0 feeds ``new_tokens`` given tokens one by one to an empty cache, each step timed by itself.
    """

    batch_size: int
    prompt_length: int
    new_tokens: int

    def random_tokens(self, vocab_size: int, device: torch.device) -> Tensor:
        """Return the prompts, or without them the tokens to feed, always the same, (B, S)."""
        shape = (self.batch_size, self.prompt_length or self.new_tokens)
        return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass(frozen=True)
class PromptTiming:
    """Seconds that a batch of prompts takes: to be read, and from the making of an empty cache to the first tokens."""

    prefill_s: float
    first_token_s: float


@dataclass(frozen=True)
class Timing:
    """Seconds and bytes of one run.

    Attributes:
        prompt: None without prompts.
        decode_s: A step, which is one token for every sequence of the batch: the mean over the steps after a prompt,
            their median without one.
        kv_cache_bytes: Of the keys and values cached at the end.
        peak_memory_bytes: The most that was allocated at once, the model's own weights counted and those of other
            models not; None on a CPU, where nobody counts it.
    """

    prompt: PromptTiming | None
    decode_s: float
    kv_cache_bytes: int
    peak_memory_bytes: int | None = None


class Runner:
    """A model on its device, run as it is or compiled, with a growing or a static cache.

    Args:
        clock: Returns seconds; the differences count.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        *,
        is_compiled: bool = False,
        has_static_cache: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model = model.to(device).eval()
        self.device = device
        self.is_compiled = is_compiled
        self.has_static_cache = has_static_cache
        self._clock = clock
        self._static_cache: Cache | None = None
        self._forward: Callable[..., Any] = self.model
        if is_compiled:
            # CUDA graphs replay on fixed addresses, which a growing cache does not have.
            mode = "reduce-overhead" if has_static_cache else "default"
            self._forward = torch.compile(self.model, fullgraph=True, mode=mode)

    @property
    def weight_memory_bytes(self) -> int:
        """Bytes of parameters and buffers, tied ones counted once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def warm_up(self, workload: Workload, token_ids: Tensor) -> None:
        """Do all that only first runs need to do, compiling above all."""
        self._static_cache = None
        if self.has_static_cache:
            length = workload.prompt_length + workload.new_tokens
            self._static_cache = StaticCache(config=self.model.config, max_cache_len=length)
            with torch.no_grad():  # not compiled: the tensors made now are to keep their addresses
                self.model(token_ids[:, :1], past_key_values=self._static_cache)
        for _ in range(_WARM_UP_RUNS[self.is_compiled]):
            self.run(workload, token_ids)

    @torch.no_grad()
    def run(self, workload: Workload, token_ids: Tensor) -> Timing:
        """Return the timing of one run on the workload's tokens."""
        held_bytes = 0 if self._static_cache is None else kv_cache_bytes(self._static_cache)
        before = reset_peak_allocated(self.device)
        if workload.prompt_length:
            timing = self._read_and_decode(token_ids, workload.new_tokens)
        else:
            timing = self._feed_one_by_one(token_ids)
        peak = peak_allocated_bytes(self.device)
        if before is None or peak is None:
            return timing
        return replace(timing, peak_memory_bytes=self.weight_memory_bytes + held_bytes + peak - before)

    def _read_and_decode(self, prompts: Tensor, new_tokens: int) -> Timing:
        started = self._now()
        cache = self._empty_cache()
        prepared = self._now()
        logits = self._forward(prompts, past_key_values=cache, logits_to_keep=1).logits
        read = self._now()
        tokens = logits.argmax(-1)  # (B, 1)
        first = self._now()
        for _ in range(new_tokens):
            tokens = self._forward(tokens, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
        decoded = self._now()
        prompt = PromptTiming(prefill_s=read - prepared, first_token_s=first - started)
        return Timing(prompt, (decoded - first) / new_tokens, kv_cache_bytes(cache))

    def _feed_one_by_one(self, token_ids: Tensor) -> Timing:
        cache = self._empty_cache()
        steps_s = []
        for tokens in token_ids.split(1, dim=1):
            started = self._now()
            self._forward(tokens, past_key_values=cache)
            steps_s.append(self._now() - started)
        return Timing(None, median(steps_s), kv_cache_bytes(cache))

    def _empty_cache(self) -> Cache:
        if self._static_cache is None:
            return DynamicCache(config=self.model.config)
        self._static_cache.reset()
        return self._static_cache

    def _now(self) -> float:
        synchronize(self.device)
        return self._clock()


def measure(
    runners: Sequence[Runner], workload: Workload, repeats: int, done: Callable[[], object]
) -> list[list[Timing]]:
    """Return the timings of each model, one per repeat.

    The models take turns, A B C A B C, so that whatever else the machine does meets all of them, and timings of the
    same repeat can be compared. Every model is warmed up first.

    Args:
        done: Called after every model's warm-up and after every timed run.

    Raises:
        RuntimeError: If a compiled model compiles again while it is timed.
    """
    config = runners[0].model.config
    token_ids = workload.random_tokens(config.vocab_size, runners[0].device)
    is_compiled = any(runner.is_compiled for runner in runners)
    if is_compiled:
        torch.compiler.reset()  # other shapes' graphs, which would count against the limit
    with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS) if is_compiled else nullcontext():
        for runner in runners:
            runner.warm_up(workload, token_ids)
            done()
    timings: list[list[Timing]] = [[] for _ in runners]
    with torch.compiler.set_stance("fail_on_recompile") if is_compiled else nullcontext():
        for _ in range(repeats):
            for runner, own in zip(runners, timings, strict=True):
                own.append(runner.run(workload, token_ids))
                done()
    return timings


def kv_cache_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values that a cache holds."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
