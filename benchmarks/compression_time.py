"""Where the time of a compression goes, beside what its arithmetic must cost on the same machine.

    python benchmarks/compression_time.py --model models/pydocs-llama --dataset pydocs --nsamples 256 --seqlen 256
    python benchmarks/compression_time.py --shape 1024x8 --nsamples 128 --seqlen 512
    python benchmarks/compression_time.py --shape llama-2-7b --nsamples 256 --seqlen 4096 --device cuda

A shape is a Llama with random weights, and without `--dataset` the tokens are random: the time does not depend on their
values. The bound of a stage is its operations over the rate of one large matrix product on the same device in the same
run, in the model's dtype, in the dtype the moments are multiplied in, and in float64. Every layer is cut. Peak memory
is read before the rates are measured.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common import PUBLISHED, falling_scores, operations, peak_rates
from flatllmbench.records import hardware, versions
from flatllmbench.tables import markdown_table
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.engine.compress import compress_layers
from flatllmcore.engine.importance import layer_importance
from flatllmcore.engine.memory import ModelInMemory
from flatllmcore.methods import METHODS
from flatllmcore.utils.data_utils import sample_documents
from flatllmcore.utils.devices import parse_device, peak_memory_gib
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.stopwatch import Stopwatch
from flatllmcore.utils.text_sources import load_text

SHAPES = PUBLISHED | {
    "1024x8": lambda: LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    ),
    "64x2": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    ),
    "llama-2-7b-4-layers": lambda: LlamaConfig(
        intermediate_size=11008, num_hidden_layers=4, max_position_embeddings=4096
    ),
}


def main() -> None:
    args = parse_arguments()
    device = parse_device(args.device)
    if args.model:
        model = load_model(args.model, dtype=args.dtype)
    else:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
        model = AutoModelForCausalLM.from_config(SHAPES[args.shape](), dtype=dtype).eval()
    config, dtype, dimensions = model.config, model.dtype, dimensions_from_config(model.config)
    started = time.perf_counter()
    windows = token_windows(args, config.vocab_size)
    stages = {"data": time.perf_counter() - started}
    batch_size = args.batch_size or max(1, 4096 // args.seqlen)
    scores = falling_scores(dimensions.num_layers)
    source, method = ModelInMemory(model, device), METHODS[args.method]
    started = time.perf_counter()
    curves = layer_importance(source, windows, batch_size, method.importance_method).curves
    importance_s = time.perf_counter() - started
    selector = ImportancePreservingRankSelector(dimensions, prune_qk=curves is not None)
    allocation = method.allocate(selector, scores, curves, 1 - args.sparsity_ratio / 100)

    started = time.perf_counter()
    with Stopwatch(device).running() as watch:
        flat_config, _ = compress_layers(
            source, source, windows, method, allocation, batch_size=batch_size, tolerance=0.96
        )
        source.adopt(flat_config)
    elapsed_s = time.perf_counter() - started
    stages |= watch.elapsed_s | {"rest": elapsed_s - sum(watch.elapsed_s.values())}

    peak = peak_memory_gib(device)
    rates = peak_rates(dtype, device)
    counted = operations(config, allocation, *windows.shape) if args.method == "flatllm" else {}
    record = {
        "model": args.model or args.shape,
        "method": args.method,
        "dtype": str(dtype),
        "windows": list(windows.shape),
        "batch_size": batch_size,
        "importance_s": importance_s,
        "compress_s": elapsed_s,
        "stages_s": stages,
        "bounds_s": {name: count / rates[name] for name, count in counted.items()},
        "tflop": {name: count / 1e12 for name, count in counted.items()},
        "peak_tflops": {name: rate / 1e12 for name, rate in rates.items()},
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
    parser.add_argument("--method", choices=METHODS, default="flatllm", help="bounds are counted for flatllm alone")
    parser.add_argument("--dtype", default="auto", help="of the model; a shape's auto is bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    return parser.parse_args()


def token_windows(args: argparse.Namespace, vocab_size: int) -> torch.Tensor:
    if args.dataset is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (args.nsamples, args.seqlen), generator=generator)
    text = load_text(args.dataset, "train")
    return sample_documents(text, load_tokenizer(args.model), args.nsamples, args.seqlen, seed=42)


def report(record: dict) -> None:
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in record["peak_tflops"].items())
    print(
        f"{record['model']}, {record['method']}, {record['dtype']}, {record['windows']} tokens, "
        f"{record['hardware']['device']}"
    )
    print(f"peak TFLOP/s measured: {rates}; peak memory {record['peak_memory_gib']} GiB")
    print(f"importance {record['importance_s']:.1f} s, compression {record['compress_s']:.1f} s\n")
    rows = []
    for name, seconds in record["stages_s"].items():
        bound = record["bounds_s"].get(name)
        counted = (
            ("", "", "")
            if bound is None
            else (f"{record['tflop'][name]:.3f}", f"{bound:.2f}", f"{bound / seconds:.0%}")
        )
        rows.append((name, f"{seconds:.2f}", *counted))
    print(markdown_table(("stage", "s", "TFLOP", "bound s", "share of bound"), rows), end="")


if __name__ == "__main__":
    main()
