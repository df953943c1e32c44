"""Speed and memory of a dense model and of compressed ones, measured in turns in one run.

    python -m flatllmbench.speed models/pydocs-llama out/pydocs-llama-20 out/pydocs-llama-50
    python -m flatllmbench.speed /models/Llama-2-7b-hf out/llama-2-7b-20 --protocol slicegpt
    python -m flatllmbench.speed --shape benchmarks/shapes/llama-2-7b --ratios 20,50 --rank_multiple 1,8

The others are compared with the first, dense model, repeat by repeat; the record has medians with the 25th and 75th
percentiles. `--shape` takes a folder with a `config.json`, and measures random weights, dense and compressed.

`--protocol grid` reads random prompts and decodes after them, prompt and decoding timed apart; beside the speed-ups
stand those that operations (of a prompt) and bytes (of a decoding step) would give if nothing else took time.
`--protocol slicegpt` is SliceGPT's benchmark: one token per step for a large batch, the median step.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.errors import InputError
from flatllmcore.layers import compressed_config
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.files import write_json
from flatllmcore.utils.layer_utils import dense_dimensions, dimensions_from_config, load_config, model_name
from flatllmcore.utils.loading import load_model
from flatllmcore.utils.progress import progress

from .command_line import add_flags, as_given, logging_to, read_flags, run_program
from .measured import speed_tables
from .records import describe_config, hardware, versions
from .runs import Record
from .timing import Workload, figures, measure

FLAGS = {name: name for name in ("device", "dtype", "save", "cache_dir")}
DEFAULTS = {"grid": ([1, 8], [128, 512], 32), "slicegpt": ([128], [0], 256)}  # batch sizes, prompts, new tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "-m", "flatllmbench.speed", *(sys.argv[1:] if argv is None else argv)])
    return run_program(lambda: keep_measurement(args, command), args.save)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the program, with the defaults of the protocol."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m flatllmbench.speed", description=__doc__, formatter_class=layout)
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
    add("--threads", type=_number, metavar="N", help="of the CPU (default: one per core)")
    add_flags(parser, FLAGS)
    args = parser.parse_args(argv)
    if bool(args.models) == bool(args.shape):
        parser.error("give a dense model and compressed ones, or --shape with a config to take, not both")
    if args.protocol == "slicegpt" and args.prompt_length:
        parser.error("--prompt_length does not go with --protocol slicegpt, which has no prompt")
    for name, default in zip(("batch_size", "prompt_length", "new_tokens"), DEFAULTS[args.protocol], strict=True):
        setattr(args, name, getattr(args, name) or default)
    return args


def _number(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; 1 or more is accepted")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_number(number) for number in text.split(",")]


def keep_measurement(args: argparse.Namespace, command: str) -> None:
    """Measure the models, write the record and print its tables."""
    started = time.perf_counter()
    read_flags(args, FLAGS)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    configs = dict(read_configs(args))
    protocol = "" if args.protocol == "grid" else f"_{args.protocol}"
    place = args.save / f"{model_name(next(iter(configs)))}_speed{protocol}.json"
    record: dict[str, Any] = {"kind": "speed", "command": command, "request": as_given(args), "versions": versions()}
    with logging_to(place.with_suffix(".log")), logging_redirect_tqdm():
        record |= measure_models(args, configs) | {"elapsed_s": round(time.perf_counter() - started, 3)}
        write_json(place, record)
    sys.stdout.write(f"record: {place}\n\n{speed_tables([Record(place, record)])}")


def read_configs(args: argparse.Namespace) -> Iterator[tuple[str, PretrainedConfig]]:
    """Yield what each model is called and its config, the dense one's first.

    A shape's importance falls to the middle of the model by less than a quarter, about as in trained ones: with equal
    scores all layers would have one rank, which might happen to suit the hardware.
    """
    first, *others = args.models or [args.shape]
    dense = load_config(first, args.cache_dir)
    dimensions = dimensions_from_config(dense)
    yield first, dense
    for name in others:
        config = load_config(name, args.cache_dir)
        if differences := dense_dimensions(config).differences_from(dimensions):
            raise InputError(f"{name} was not compressed from {first}: {differences}")
        yield name, config
    last = max(dimensions.num_layers - 1, 1)
    scores = [1 + 0.3 * abs(2 * index / last - 1) for index in range(dimensions.num_layers)]
    for percent, multiple in product(args.ratios, args.rank_multiple) if args.shape else ():
        selector = ImportancePreservingRankSelector(dimensions, rank_multiple=multiple)
        suffix = f"-m{multiple}" if len(args.rank_multiple) > 1 else ""
        yield (
            f"{first}-{percent}{suffix}",
            compressed_config(dense, selector.allocate(scores, 1 - percent / 100).layers),
        )


def measure_models(args: argparse.Namespace, configs: dict[str, PretrainedConfig]) -> dict[str, Any]:
    """Measure every model at every cell of the grid; return what the record says about it."""
    device, first = parse_device(args.device), next(iter(configs))
    dtype = (configs[first].dtype or torch.float32) if args.dtype == "auto" else getattr(torch, args.dtype)
    base = model_name(first)
    described = [describe_config(each, model_name(n), None if n == first else base) for n, each in configs.items()]
    torch.manual_seed(0)
    name_of_dtype = str(dtype).removeprefix("torch.")
    models = []
    for (name, config), about in zip(progress(configs.items(), "loading", "model"), described, strict=True):
        if args.shape:
            with torch.device(device):
                models.append(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
        else:
            models.append(load_model(name, dtype=name_of_dtype, cache_dir=args.cache_dir).to(device))
        about["weight_memory_bytes"] = models[-1].get_memory_footprint()
    grid = [Workload(size, length, args.new_tokens) for size, length in product(args.batch_size, args.prompt_length)]
    cells: list[dict[str, Any]] = []
    with progress(None, "speed", "run", len(grid) * len(models) * (1 + args.repeats)) as bar:
        for workload in grid:
            cells += figures(models, workload, measure(models, workload, args.repeats, bar.update))
    return {
        "hardware": hardware(device),
        "protocol": args.protocol,
        "dtype": name_of_dtype,
        "attention": models[0].config._attn_implementation,
        "compiled": False,
        "static_cache": False,
        "models": described,
        "cells": cells,
    }


if __name__ == "__main__":
    sys.exit(main())
