"""Speed and memory of a dense model and of compressed ones, measured in turns in one run.

    python -m flatllmbench.speed models/pydocs-llama out/pydocs-llama-20 out/pydocs-llama-50
    python -m flatllmbench.speed /models/Llama-2-7b-hf out/llama-2-7b-20 --protocol slicegpt
    python -m flatllmbench.speed --shape benchmarks/shapes/llama-2-7b --ratios 20,50 --rank_multiple 1,8

The others are compared with the first, dense model, repeat by repeat; the record has medians and quartiles, and the
speed-ups that operations (of a prompt) and bytes (of a decoding step) would give if nothing else took time. `--shape`
measures random weights, dense and compressed. `--protocol grid` times prompts and the decoding after them apart;
`--protocol slicegpt` is SliceGPT's benchmark: one token per step for a large batch, the median step.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from inspect import signature
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from flatllmcore.config import MOST, checked
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.errors import InputError, run_program
from flatllmcore.layers import compressed_config
from flatllmcore.utils.devices import parse_device, restart_peak, synchronize
from flatllmcore.utils.layer_utils import count_parameters, dense_dimensions, dimensions_from_config
from flatllmcore.utils.loading import empty_causal_lm, load_config, load_model
from flatllmcore.utils.names import model_name
from flatllmcore.utils.progress import progress

from .command_line import ROWS, parser_with, read_flags
from .provenance import describe_config, describe_model, hardware, keep_record
from .records import flat
from .tables import measured_tables

FLAGS = {name: name for name in ("device", "dtype", "save", "cache_dir")}
DEFAULTS = {"grid": ([1, 8], [128, 512], 32), "slicegpt": ([128], [0], 256)}  # batch sizes, prompts, new tokens


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    return run_program(lambda: keep_measurement(args, argv), args.save)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the program, with the defaults of the protocol."""
    parser = parser_with(FLAGS, "python -m flatllmbench.speed", __doc__)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="the dense model, then any number of compressed ones")
    add("--shape", metavar="MODEL", help="folder or hub id whose config to take, with random weights")
    add("--ratios", type=_numbers, default=[20, 50], metavar="P,...", help="of a shape: percents removed (20,50)")
    add("--rank_multiple", type=_numbers, default=[None], metavar="M,...", help="of a shape's ranks, as in main.py")
    add("--protocol", choices=DEFAULTS, default="grid", help="(default: %(default)s)")
    add("--batch_size", type=_numbers, metavar="N,...", help="(default: 1,8; slicegpt: 128)")
    add("--prompt_length", type=_numbers, metavar="N,...", help="grid: tokens (default: 128,512)")
    add("--new_tokens", type=_number, metavar="N", help="decoding steps (default: 32; slicegpt: 256)")
    add("--repeats", type=_number, default=7, metavar="N", help="timed runs (default: %(default)s)")
    add("--threads", type=int, choices=range(1, 1 + (os.cpu_count() or 1)), metavar="N", help="(default: one per core)")
    args = parser.parse_args(argv)
    if bool(args.models) == bool(args.shape):
        parser.error("give a dense model and compressed ones, or --shape with a config to take, not both")
    if args.protocol == "slicegpt" and args.prompt_length:
        parser.error("--prompt_length does not go with --protocol slicegpt, which has no prompt")
    for name, default in zip(("batch_size", "prompt_length", "new_tokens"), DEFAULTS[args.protocol], strict=True):
        setattr(args, name, getattr(args, name) or default)
    return args


def _number(text: str) -> int:
    if not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is out of range; 1 to {MOST} is accepted")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(number) for number in text.split(",")]


def keep_measurement(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Measure the models, write the record and print its tables."""
    vars(args).update(read_flags(args, FLAGS))
    torch.set_num_threads(args.threads or torch.get_num_threads())
    # oneDNN keeps the kernels of 1,024 shapes: several models by turns have more where each layer has its own widths.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "65536")
    model, marks = args.shape or args.models[0], "" if args.protocol == "grid" else f"_{args.protocol}"
    path, found = keep_record("speed", args, argv, model, marks, lambda: measure_models(args, dict(read_configs(args))))
    sys.stdout.write(f"record: {path}\n\n{measured_tables([flat(found)], 'speed')}")


def read_configs(args: argparse.Namespace) -> Iterator[tuple[str, PretrainedConfig]]:
    """Yield what each model is called and its config, the dense one's first."""
    first, *others = [checked(ROWS["model"], name, "MODEL") for name in args.models or [args.shape]]
    dense = load_config(first, args.cache_dir)
    dimensions = dimensions_from_config(dense)
    yield first, dense
    for name in others:
        config = load_config(name, args.cache_dir)
        sizes = dense_dimensions(config)
        if type(config) is type(dense):  # of the stock shape, which states no dense width
            sizes = replace(sizes, intermediate_size=max(sizes.intermediate_size, dimensions.intermediate_size))
        if differences := sizes.differences_from(dimensions):
            raise InputError(f"{name} was not compressed from {first}: {differences}")
        yield name, config
    # Falling to the middle, about as in trained models: ranks that are all the same might happen to suit the hardware.
    last = max(dimensions.num_layers - 1, 1)
    scores = [1 + 0.3 * abs(2 * index / last - 1) for index in range(dimensions.num_layers)]
    for percent, multiple in product(args.ratios, args.rank_multiple) if args.shape else ():
        selector = ImportancePreservingRankSelector(dimensions, rank_multiple=multiple)
        allocation = selector.allocate(scores, 1 - percent / 100)
        suffix = f"-m{multiple}" if len(args.rank_multiple) > 1 else ""
        yield f"{first}-{percent}{suffix}", compressed_config(dense, allocation.layers)


def measure_models(args: argparse.Namespace, configs: dict[str, PretrainedConfig]) -> dict[str, Any]:
    """Measure every model at every cell of the grid; return what the record says about it."""
    device, first = parse_device(args.device), next(iter(configs))
    dtype = str(configs[first].dtype or torch.float32).removeprefix("torch.") if args.dtype == "auto" else args.dtype
    models, described = [], []
    torch.manual_seed(0)
    for name, config in progress(configs.items(), "loading", "model"):
        about = describe_config(config, name, None) if args.shape else describe_model(name, args.cache_dir)
        if args.shape:
            with torch.device(device):
                made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
            models.append(made.eval())
        else:
            models.append(load_model(name, dtype=dtype, cache_dir=args.cache_dir).to(device))
        about["base_model"] = None if name == first else model_name(first)
        described.append(about | {"weight_memory_bytes": models[-1].get_memory_footprint()})
    grid = [Workload(size, length, args.new_tokens) for size, length in product(args.batch_size, args.prompt_length)]
    measured = ((workload, measure(models, workload, args.repeats)) for workload in progress(grid, "speed", "cell"))
    cells = [cell for workload, timings in measured for cell in figures(models, workload, timings)]
    return {
        "hardware": hardware(device),
        "protocol": args.protocol,
        "dtype": dtype,
        "attention": models[0].config._attn_implementation,
        "models": described,
        "cells": cells,
    }


def measure(models: Sequence[PreTrainedModel], workload: Workload, repeats: int) -> list[list[Timing]]:
    """Return the timings of each model, one per repeat.

    Every model runs once untimed, then they take turns, A B C A B C: whatever else the machine does meets all of them.
    """
    shape = (workload.batch_size, workload.prompt_length or workload.new_tokens)
    token_ids = torch.randint(models[0].config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found: list[list[Timing]] = [[] for _ in models]
    for _ in progress(range(1 + repeats), "runs", "run of all models"):
        for model, own in zip(models, found, strict=True):
            own.append(run(model, workload, token_ids.to(model.device)))
    return [own[1:] for own in found]


def cache_argument(model: PreTrainedModel, cache: DynamicCache) -> dict[str, DynamicCache]:
    """Return the cache under the name that the model's forward pass takes it by: another before transformers 5.24."""
    return {"cache" if "cache" in signature(model.forward).parameters else "past_key_values": cache}


@torch.no_grad()
def run(model: PreTrainedModel, workload: Workload, token_ids: Tensor) -> Timing:
    """Return the timing of one run on the workload's tokens, (B, S), which are on the model's device."""

    def now() -> float:
        synchronize(model.device)
        return time.perf_counter()

    (before, _), cache, prefill_s = restart_peak(model.device), DynamicCache(config=model.config), 0.0
    by_name = cache_argument(model, cache)
    if workload.prompt_length:
        started = now()
        tokens = model(token_ids, **by_name, logits_to_keep=1).logits.argmax(-1)  # (B, 1)
        read = now()
        for _ in range(workload.new_tokens):
            tokens = model(tokens, **by_name, logits_to_keep=1).logits.argmax(-1)
        prefill_s, decode_s = read - started, (now() - read) / workload.new_tokens
    else:
        steps_s = []
        for tokens in token_ids.split(1, dim=1):
            started = now()
            model(tokens, **by_name)
            steps_s.append(now() - started)
        decode_s = median(steps_s)
    _, peak = restart_peak(model.device)
    own = model.get_memory_footprint() + peak - before if peak else None
    return Timing(decode_s, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), prefill_s, own)


def figures(models: Sequence[PreTrainedModel], workload: Workload, found: Sequence[Sequence[Timing]]) -> Iterator[dict]:
    """Yield each model's figures as records have them; speed-ups over the first compare the runs of the same repeat."""
    needs = [_needs(model, workload, own[0].kv_cache_bytes) for model, own in zip(models, found, strict=True)]
    stages = [("decode", "decode_ms_per_token", 1, "bytes"), ("prefill", "prefill_ms", workload.prompt_length, "flops")]
    for index, own in enumerate(found):
        cell: dict[str, Any] = {"model": index, **workload._asdict(), "repeats": len(own)}
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
        yield cell


def _spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("median", "low", "high"), np.quantile(values, [0.5, 0.25, 0.75]).tolist(), strict=True))


def _needs(model: PreTrainedModel, workload: Workload, cache_bytes: int) -> dict[str, float]:
    """Return the operations of reading one prompt, and the bytes of weights and cache that a step reads on average."""
    head, length = model.lm_head.weight.numel(), workload.prompt_length
    weights = count_parameters(model)["decoder_linear"] + head
    mean_length = length + (workload.new_tokens + 1) / 2
    cached = cache_bytes * mean_length / (length + workload.new_tokens)
    operations = forward_operations(model.config, length or 1) + 2 * head
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


if __name__ == "__main__":
    sys.exit(main())
