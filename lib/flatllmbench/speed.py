"""Speed and memory of a dense model and of compressed ones, measured in turns in one run.

    python -m flatllmbench.speed models/pydocs-llama out/pydocs-llama-20 out/pydocs-llama-50
    python -m flatllmbench.speed /models/Llama-2-7b-hf out/llama-2-7b-20 --protocol slicegpt
    python -m flatllmbench.speed --shape benchmarks/shapes/llama-2-7b --ratios 20,50 --rank_multiple 1,8 --compile

The first model is the dense one, which the others are compared with, repeat by repeat. `--shape` takes a folder that
need hold no more than a `config.json`, and measures that shape with random weights, dense and compressed.

`--protocol grid` reads random prompts and decodes after them, prompt and decoding timed apart. `--protocol slicegpt`
follows SliceGPT's benchmark: one token per step for a large batch, the median step; without `--static_cache` and
`--compile` its figures compare with that paper's.

Writes a record to --save and prints its tables: medians with the 25th and 75th percentiles over the repeats, beside the
speed-up that operations (of a prompt) and bytes (of a decoding step) would give if nothing else took time.
"""

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PretrainedConfig

from flatllmcore.core.rank_allocation import check_sparsity_ratio
from flatllmcore.errors import InputError
from flatllmcore.layers.families import check_is_dense
from flatllmcore.utils.devices import check_whole_models_fit, parse_device
from flatllmcore.utils.layer_utils import dense_dimensions, load_config, model_name
from flatllmcore.utils.loading import load_model
from flatllmcore.utils.progress import progress

from .command_line import add_machine_flags, logging_to, request, run_program
from .measured import speed_tables
from .records import describe_config, describe_model, hardware, versions, write_record
from .runs import Timing
from .shapes import compressed_shapes, random_model
from .speed_figures import figures_of
from .timing import Runner, Workload, measure
from .typed_json import read_as

logger = logging.getLogger("flatllmbench.speed")  # not __name__, which is "__main__" here

Configs = list[tuple[str, PretrainedConfig]]

DEFAULTS: dict[str, dict[str, Any]] = {
    "grid": {"batch_size": [1, 8], "prompt_length": [128, 512], "new_tokens": 32},
    "slicegpt": {"batch_size": [128], "prompt_length": [0], "new_tokens": 256},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "-m", "flatllmbench.speed", *(sys.argv[1:] if argv is None else argv)])
    return run_program(lambda: keep_measurement(args, command), args.save)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flatllmbench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("models")
    what.add_argument("models", nargs="*", metavar="MODEL", help="the dense model, then any number of compressed ones")
    what.add_argument("--shape", metavar="MODEL", help="folder or hub id whose config to take, with random weights")
    what.add_argument("--ratios", type=numbers, metavar="P,...", help="with --shape: percents removed (20,50)")
    what.add_argument(
        "--rank_multiple",
        type=numbers,
        metavar="M,...",
        help="with --shape: ranks and widths are multiples of this (8 if heads are 64 wide or more, else 1)",
    )
    what.add_argument("--cache_dir", type=Path, metavar="DIR", help="where hub downloads are kept")

    how = parser.add_argument_group("measure")
    how.add_argument("--protocol", choices=DEFAULTS, default="grid", help="(default: %(default)s)")
    how.add_argument("--batch_size", type=numbers, metavar="N,...", help="(default: 1,8; slicegpt: 128)")
    how.add_argument("--prompt_length", type=numbers, metavar="N,...", help="grid: tokens (default: 128,512)")
    how.add_argument("--new_tokens", type=int, metavar="N", help="decoding steps (default: 32; slicegpt: 256)")
    how.add_argument("--repeats", type=int, default=7, metavar="N", help="timed runs (default: %(default)s)")
    how.add_argument(
        "--compile", action="store_true", help="torch.compile; with --static_cache by CUDA graphs on a GPU"
    )
    how.add_argument("--static_cache", action="store_true", help="a cache of full length from the start")

    where = parser.add_argument_group("machine and output")
    add_machine_flags(where)
    where.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: one per core)")
    args = parser.parse_args(argv)
    for name, default in DEFAULTS[args.protocol].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def keep_measurement(args: argparse.Namespace, command: str) -> None:
    """Measure the models, write the record and print its tables."""
    started = time.perf_counter()
    check_arguments(args)
    configs = read_configs(args)
    check_configs(args, configs)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    place = args.save / f"{run_name(args)}.json"
    with logging_to(place.with_suffix(".log")), logging_redirect_tqdm():
        measured = measure_models(args, configs)
        asked = {"kind": "speed", "command": command, "request": request(args), "versions": versions()}
        record = asked | measured | {"elapsed_s": round(time.perf_counter() - started, 3)}
        write_record(place, record)
        logger.info("record: %s", place)
    sys.stdout.write(f"\n{speed_tables([read_as(Timing, record)])}")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be refused without looking at the models."""
    if bool(args.models) == (args.shape is not None):
        raise InputError("give a dense model and compressed ones, or --shape with a config to take, not both")
    if args.protocol == "slicegpt" and args.prompt_length != [0]:
        raise InputError("--prompt_length does not go with --protocol slicegpt, which has no prompt")
    given = [name for name in ("ratios", "rank_multiple") if getattr(args, name) is not None]
    if given and args.shape is None:
        raise InputError(f"--{given[0]} is about shapes; give --shape too")
    for name in ("batch_size", "prompt_length", "new_tokens", "repeats", "rank_multiple", "threads"):
        value = getattr(args, name)
        least = 0 if name == "prompt_length" and args.protocol == "slicegpt" else 1
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise InputError(f"--{name} {number} is out of range; {least} or more is accepted")
    for percent in args.ratios or ():
        check_sparsity_ratio(percent)


def read_configs(args: argparse.Namespace) -> Configs:
    """Return what each model is called and its config, the dense one's first."""
    if args.shape is None:
        return [(model, load_config(model, args.cache_dir)) for model in args.models]
    config, name = load_config(args.shape, args.cache_dir), model_name(args.shape)
    return [(name, config), *compressed_shapes(config, name, args.ratios or [20, 50], args.rank_multiple or [None])]


def check_configs(args: argparse.Namespace, configs: Configs) -> None:
    """Refuse models that do not compare, or are too short for what is to be run."""
    (first, dense), *others = configs
    check_is_dense(dense)
    for model, config in others:
        if differences := dense_dimensions(config).differences_from(dense_dimensions(dense)):
            raise InputError(f"{model} was not compressed from {first}: {differences}")
        if args.dtype == "auto" and config.dtype != dense.dtype:
            raise InputError(f"{first} is {dense.dtype} and {model} {config.dtype}; measure both in one --dtype")
    longest = max(args.prompt_length) + args.new_tokens
    most = min(config.max_position_embeddings for _, config in configs)
    if longest > most:
        raise InputError(f"{longest} tokens are more than the model takes, {most}; shorten the prompt or the decoding")


def run_name(args: argparse.Namespace) -> str:
    name = model_name(args.shape or args.models[0])
    marks = {args.protocol: args.protocol != "grid", "compiled": args.compile, "static": args.static_cache}
    return "_".join([name, "speed", *(mark for mark, is_set in marks.items() if is_set)])


def measure_models(args: argparse.Namespace, configs: Configs) -> dict[str, Any]:
    """Measure every model at every cell of the grid; return what the record says about it."""
    device = parse_device(args.device)
    models = describe(args, configs)
    sizes = [model["parameters"]["total"] * dtype_of(args, configs).itemsize for model in models]
    check_whole_models_fit(device, sizes, "they take turns, so all are loaded at once: measure fewer")
    runners = load_runners(args, configs, device)
    for model, runner in zip(models, runners, strict=True):
        model["weight_memory_bytes"] = runner.weight_memory_bytes
    itemsize = runners[0].model.dtype.itemsize
    workloads = [
        Workload(batch_size, prompt_length, args.new_tokens)
        for batch_size in args.batch_size
        for prompt_length in args.prompt_length
    ]
    cells: list[dict[str, Any]] = []
    runs = len(workloads) * len(runners) * (1 + args.repeats)  # the warm-up is one
    with progress(None, "speed", "run", runs) as bar:
        for workload in workloads:
            timings = measure(runners, workload, args.repeats, bar.update)
            found = figures_of(
                workload,
                [config for _, config in configs],
                timings,
                itemsize,
                has_static_cache=args.static_cache,
            )
            cells += ({"model": index} | figures for index, figures in enumerate(found))
    return {
        "hardware": hardware(device),
        "protocol": args.protocol,
        "dtype": str(runners[0].model.dtype).removeprefix("torch."),
        "attention": runners[0].model.config._attn_implementation,
        "compiled": args.compile,
        "static_cache": args.static_cache,
        "models": models,
        "cells": cells,
    }


def load_runners(args: argparse.Namespace, configs: Configs, device: torch.device) -> list[Runner]:
    """Put every model on the device, its weights read or drawn."""
    runners = []
    torch.manual_seed(0)
    for model, config in progress(configs, "loading", "model"):
        if args.shape is None:
            loaded = load_model(model, dtype=args.dtype, cache_dir=args.cache_dir)
        else:
            loaded = random_model(config, dtype_of(args, configs), device)
        runners.append(Runner(loaded, device, is_compiled=args.compile, has_static_cache=args.static_cache))
    return runners


def dtype_of(args: argparse.Namespace, configs: Configs) -> torch.dtype:
    """Return the type of the weights, which is that of the first model's where none is asked for."""
    return (configs[0][1].dtype or torch.float32) if args.dtype == "auto" else getattr(torch, args.dtype)


def describe(args: argparse.Namespace, configs: Configs) -> list[dict[str, Any]]:
    """Return what the record says about the models before they are loaded, and log it."""
    first = configs[0][0]
    described = []
    for model, config in configs:
        if args.shape is None:
            about = describe_model(model, args.cache_dir)
        else:
            about = describe_config(config, model, None if model == first else first)
        removed, total = about["achieved_sparsity_percent"], about["parameters"]["total"]
        logger.info("%s: %.3f %% of decoder-layer weights removed, %d parameters", about["model"], removed, total)
        described.append(about)
    return described


if __name__ == "__main__":
    sys.exit(main())
