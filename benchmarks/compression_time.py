"""Where the time of a compression goes, beside what its arithmetic must cost on the same machine.

    python benchmarks/compression_time.py --model models/pydocs-llama --dataset pydocs --nsamples 256 --seqlen 256
    python benchmarks/compression_time.py --shape 1024x8 --nsamples 128 --seqlen 512
    python benchmarks/compression_time.py --shape llama-2-7b --nsamples 256 --seqlen 4096 --device cuda

A shape is a Llama with random weights, and without `--dataset` the tokens are random: the time does not depend on their
values. Peak rates are those of one large matrix product on the same device in the same run, in the model's dtype, in
the dtype the moments are multiplied in, and in float64, and of one large copy. The bound of a stage is the larger of
its operations over the first and the bytes it cannot but move over the second. Every layer is cut. Peak memory is
read before the rates are measured.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from flatllmbench.costs import Workload, compression_costs
from flatllmbench.published_models import PUBLISHED_MODELS
from flatllmbench.rates import copy_rate, peak_rates
from flatllmbench.records import hardware, versions
from flatllmcore.core.calibration import ModelInMemory, default_batch_size
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.utils.data_utils import load_text, sample_documents
from flatllmcore.utils.devices import parse_device, peak_memory_gib
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model, load_tokenizer

SHAPES: dict[str, Callable[[], PretrainedConfig]] = PUBLISHED_MODELS | {
    "1024x8": lambda: LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    ),
}


def main() -> None:
    args = parse_arguments()
    device = parse_device(args.device)
    started = time.perf_counter()
    model = load_model(args.model, dtype=args.dtype) if args.model else random_model(args.shape, args.dtype)
    load_s = time.perf_counter() - started
    dimensions = dimensions_from_config(model.config)
    dtype = model.dtype
    started = time.perf_counter()
    windows = token_windows(args, model.config.vocab_size)
    data_s = time.perf_counter() - started
    batch_size = args.batch_size or default_batch_size(args.seqlen)
    scores = [1 + 0.3 * abs(2 * layer / (dimensions.num_layers - 1) - 1) for layer in range(dimensions.num_layers)]
    allocation = ImportancePreservingRankSelector(dimensions).allocate(scores, args.sparsity_ratio)
    watch = Stopwatch(device)
    started = time.perf_counter()
    source = ModelInMemory(model, device)
    layer_importance(source, windows, batch_size, watch)
    importance_s, importance_stages = time.perf_counter() - started, watch.elapsed_s

    watch = Stopwatch(device)
    started = time.perf_counter()
    flat_config, _ = compress_layers(
        source, source, windows, allocation, batch_size=batch_size, tolerance=0.96, stopwatch=watch
    )
    source.adopt(flat_config)
    elapsed_s = time.perf_counter() - started

    peak = peak_memory_gib(device)
    rates = peak_rates(dtype, device)
    bandwidth = copy_rate(device)
    costs = compression_costs(allocation, Workload(*windows.shape, batch_size, dtype.itemsize))
    bounds = {name: cost.bound_s(rates[name], bandwidth) for name, cost in costs.items()}
    rest_s = elapsed_s - sum(watch.elapsed_s.values())
    stages = {"data": data_s} | watch.elapsed_s | {"rest": rest_s}
    record = {
        "model": args.model or args.shape,
        "dtype": str(dtype),
        "windows": list(windows.shape),
        "batch_size": batch_size,
        "load_s": load_s,
        "importance_s": importance_s,
        "importance_stages_s": importance_stages,
        "compress_s": elapsed_s,
        "stages_s": stages,
        "bounds_s": bounds,
        "tflop": {name: cost.operations / 1e12 for name, cost in costs.items()},
        "gbytes": {name: cost.moved_bytes / 1e9 for name, cost in costs.items()},
        "peak_tflops": {name: rate / 1e12 for name, rate in rates.items()},
        "peak_gbytes_per_s": bandwidth / 1e9,
        "tokens_per_s": windows.numel() / elapsed_s,
        "peak_memory_gib": peak,
        "hardware": hardware(device),
        "versions": versions(),
    }
    report(record)
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="local folder or hub id")
    what.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--dataset", help="text to sample the windows from, with --model")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--sparsity_ratio", type=int, default=20)
    parser.add_argument("--dtype", default="auto", help="of the model; a shape's auto is bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    return parser.parse_args()


def random_model(shape: str, dtype: str) -> PreTrainedModel:
    torch.manual_seed(0)
    chosen = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=chosen).eval()


def token_windows(args: argparse.Namespace, vocab_size: int) -> torch.Tensor:
    if args.dataset is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (args.nsamples, args.seqlen), generator=generator)
    text = load_text(args.dataset, "train")
    return sample_documents(text, load_tokenizer(args.model), args.nsamples, args.seqlen, seed=42)


def report(record: dict) -> None:
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in record["peak_tflops"].items())
    print(f"{record['model']}, {record['dtype']}, {record['windows']} tokens, {record['hardware']['device']}")
    print(f"peak TFLOP/s measured: {rates}; peak memory {record['peak_memory_gib']} GiB")
    print(
        f"load {record['load_s']:.1f} s, importance {record['importance_s']:.1f} s, "
        f"compress {record['compress_s']:.1f} s ({record['tokens_per_s']:.0f} tokens/s)"
    )
    print(f"copy {record['peak_gbytes_per_s']:.1f} GB/s\n")
    print("| stage | s | TFLOP | GB | bound s | share of bound |\n|---|---:|---:|---:|---:|---:|")
    for name, seconds in record["stages_s"].items():
        if name not in record["bounds_s"]:
            print(f"| {name} | {seconds:.2f} | | | | |")
            continue
        bound = record["bounds_s"][name]
        work = f"{record['tflop'][name]:.3f} | {record['gbytes'][name]:.2f}"
        print(f"| {name} | {seconds:.2f} | {work} | {bound:.2f} | {bound / seconds:.0%} |")


if __name__ == "__main__":
    main()
