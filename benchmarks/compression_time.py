"""Where the time of a compression goes, beside what its arithmetic must cost on the same machine, by each method.

    python benchmarks/compression_time.py --model models/pydocs-llama --dataset pydocs --nsamples 256 --seqlen 256
    python benchmarks/compression_time.py --shape 1024x8 --nsamples 128 --seqlen 512
    python benchmarks/compression_time.py --shape llama-2-7b --nsamples 256 --seqlen 4096 --device cuda --method flatllm
    python benchmarks/compression_time.py --shape 1024x8 --nsamples 8 --dtype float32 --against ../checkout

A shape is a Llama with random weights, and without `--dataset` the tokens are random: the time does not depend on their
values. The bound of a stage is its operations over the rate of one large matrix product on the same device in the same
run, in the dtype that layers are computed in, in the one that moments are multiplied in, and in float64. Every layer is
cut. A shape is on the device as a whole, and once more for each of several methods: peak memory, read before the rates
are measured, has it all, and is that of the methods so far.

`--against` has another checkout of this repository compress by turns with this one, by its own copy of this program,
and gives the ratio of the CPU seconds that compressions took: where others use the machine too, these are steadier.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common import ROOT, SHAPES, falling_scores, operations, peak_rates
from flatllmbench.provenance import hardware, versions
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

NOT_PASSED = ("method", "against", "repeats", "out")  # to the processes of a comparison


def main() -> None:
    args = parse_arguments()
    if args.against is not None:
        compare(args)
        return
    device = parse_device(args.device)
    if args.model:
        model = load_model(args.model, dtype=args.dtype)
    else:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
        with device:  # the host would take a minute for the random numbers of 7B
            model = AutoModelForCausalLM.from_config(SHAPES[args.shape](), dtype=dtype).eval()
    started = time.perf_counter()
    windows = token_windows(args, model.config.vocab_size)
    data_s = time.perf_counter() - started
    records = []
    for method in args.method:
        own = copy.deepcopy(model) if args.method[1:] else model  # which a compression changes
        records.append(measure(args, method, own, windows, device) | {"data_s": data_s})
        report(records[-1])
    if args.out is not None:
        args.out.write_text(json.dumps(records[0] if len(records) == 1 else records, indent=1) + "\n")


def measure(
    args: argparse.Namespace, name: str, model: PreTrainedModel, windows: torch.Tensor, device: torch.device
) -> dict:
    """Return the record of a compression by the method of that name, of a model that it changes."""
    config, dimensions = model.config, dimensions_from_config(model.config)
    batch_size = args.batch_size or max(1, 4096 // args.seqlen)
    source, method = ModelInMemory(model, device), METHODS[name]
    started = time.perf_counter()
    curves = layer_importance(source, windows, batch_size, method.importance_method).curves_in_nats
    importance_s = time.perf_counter() - started
    selector = ImportancePreservingRankSelector(dimensions, prune_qk=curves is not None)
    scores = falling_scores(dimensions.num_layers)
    allocation = method.allocate(selector, scores, curves, 1 - args.sparsity_ratio / 100)

    started, cpu_s = time.perf_counter(), -sum(os.times()[:2])
    with Stopwatch(device).running() as watch:
        flat_config, _ = compress_layers(
            source, source, windows, method, allocation, batch_size=batch_size, tolerance=0.96
        )
        source.adopt(flat_config)
    elapsed_s = time.perf_counter() - started
    cpu_s += sum(os.times()[:2])

    peak = peak_memory_gib(device)
    rates = peak_rates(source.dtype, device)
    counted = operations(config, allocation, *windows.shape, name)
    return {
        "model": args.model or args.shape,
        "method": name,
        "dtype": str(source.dtype),
        "windows": list(windows.shape),
        "batch_size": batch_size,
        "importance_s": importance_s,
        "compress_s": elapsed_s,
        "compress_cpu_s": cpu_s,
        "stages_s": watch.elapsed_s | {"rest": elapsed_s - sum(watch.elapsed_s.values())},
        "bounds_s": {stage: count / rates[stage] for stage, count in counted.items()},
        "tflop": {stage: count / 1e12 for stage, count in counted.items()},
        "peak_tflops": {stage: rate / 1e12 for stage, rate in rates.items()},
        "tokens_per_s": windows.numel() / elapsed_s,
        "peak_memory_gib": peak,
        "hardware": hardware(device),
        "versions": versions(),
    }


def compare(args: argparse.Namespace) -> None:
    """Print the CPU seconds of this checkout and of another by turns, and write all records."""
    records: dict[str, list[dict]] = {}
    passed = [f"--{name}={of}" for name, of in vars(args).items() if of is not None and name not in NOT_PASSED]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "record.json")
        for method in args.method * args.repeats:
            for checkout in (ROOT, args.against):
                command = [
                    sys.executable,
                    str(checkout / "benchmarks" / Path(__file__).name),
                    *passed,
                    "--method",
                    method,
                    "--out",
                    str(out),
                ]
                environment = os.environ | {"PYTHONPATH": str(checkout.resolve() / "lib")}
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                which = "this" if checkout is ROOT else "other"
                records.setdefault(f"{method}, {which}", []).append(json.loads(out.read_text()))
    rows = []
    for method in args.method:
        ours, theirs = ([of["compress_cpu_s"] for of in records[f"{method}, {which}"]] for which in ("this", "other"))
        ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
        rows.append((method, *(f"{of:.2f}" for of in (median(ours), median(theirs), median(ratios)))))
        rows[-1] += (f"{min(ratios):.2f}-{max(ratios):.2f}",)
    print(markdown_table(("method", "CPU s here", "CPU s there", "ratio", "of turns"), rows), end="")
    if args.out is not None:
        args.out.write_text(json.dumps(records, indent=1) + "\n")


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
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument("--dtype", default="auto", help="of the model; a shape's auto is bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--against", type=Path, help="folder of another checkout of this repository")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each checkout, with --against")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON; several as a list")
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
    print(
        f"data {record['data_s']:.1f} s, importance {record['importance_s']:.1f} s, compression "
        f"{record['compress_s']:.1f} s ({record['compress_cpu_s']:.1f} s of CPU), {record['tokens_per_s']:.0f} tokens/s"
        "\n"
    )
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
