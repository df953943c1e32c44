"""Time of one process against two that share out the windows and the solves, each pinned to a core of its own.

    python benchmarks/process_scaling.py --folder /scratch/scaling --out results/benchmarks/process_scaling.json

Compresses a checkpoint of random weights on the embedded model's text, out of core, by turns in one process and in two.
Tokens per second are those of the compression itself; beside it stands the share that what one process would have to
compute is of what the cores could do at their measured peak. Both processes factorise the same moments: that, and
summing them, is what two processes cannot halve.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from common import ROOT, operations, peak_rates
from flatllmbench.provenance import hardware, versions
from flatllmcore.core.rank_files import read_ranks
from flatllmcore.utils.devices import computed_in
from flatllmcore.utils.files import write_json
from flatllmcore.utils.loading import load_tokenizer
from random_checkpoint import write_random_checkpoint

STAGES = ("read", "forward", "moments", "reduce", "solves", "write")
PORT = "29517"
CPU = torch.device("cpu")


def main() -> None:
    args = parse_arguments()
    dense = args.folder / "dense"
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 128,
        max_position_embeddings=args.seqlen,
    )
    if not dense.exists():
        write_random_checkpoint(config, dense)
        load_tokenizer(str(ROOT / "models" / "pydocs-llama")).save_pretrained(dense)
    (args.folder / "eval.txt").write_text((ROOT / "README.md").read_text()[:20_000])
    turns: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    compress(1, args)  # leaves the ranks, and the files in the system's cache
    for _ in range(args.repeats):
        for count, records in turns.items():
            records.append(compress(count, args))

    allocation = read_ranks(args.folder / "scores" / "ranks_20.json")
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    rates = peak_rates(computed_in(torch.bfloat16, CPU), CPU)
    counted = operations(config, allocation, args.nsamples, args.seqlen)
    bound_s = sum(count / rates[stage] for stage, count in counted.items())
    shape = ("layers", "hidden_size", "intermediate_size", "nsamples", "seqlen")
    found: dict[str, Any] = {
        "command": "python benchmarks/process_scaling.py " + " ".join(sys.argv[1:]),
        "shape": {name: getattr(args, name) for name in shape},
        "peak_tflops_of_a_core": {name: rate / 1e12 for name, rate in rates.items()},
    }
    for count, records in turns.items():
        compress_s = [sum(record["stages_s"].get(name, 0) for name in STAGES) for record in records]
        found[f"processes_{count}"] = {
            "compress_s": compress_s,
            "perplexity_s": [record["stages_s"]["perplexity"] for record in records],
            "stages_s": records[-1]["stages_s"],
            "tokens_per_s": args.nsamples * args.seqlen / median(compress_s),
            "share_of_peak": bound_s / count / median(compress_s),
        }
    one, two = found["processes_1"], found["processes_2"]
    for stage in ("compress", "perplexity"):
        ratios = [a / b for a, b in zip(one[f"{stage}_s"], two[f"{stage}_s"], strict=True)]
        found[f"speedup_{stage}"] = {"median": median(ratios), "all": ratios}
    found |= {"hardware": hardware(CPU), "versions": versions()}
    write_json(args.out, found)
    print(json.dumps(found, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("scaling"))
    sizes = {"layers": 8, "hidden_size": 1024, "intermediate_size": 2816, "nsamples": 64, "seqlen": 512, "repeats": 3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/process_scaling.json"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def compress(count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run `main.py` in ``count`` processes, process i on core i; return its record."""
    flags = ["--model", str(args.folder / "dense"), "--dataset", "pydocs", "--sparsity_ratio", "20", "--device", "cpu"]
    flags += ["--eval_dataset", str(args.folder / "eval.txt"), "--out_of_core"]
    flags += ["--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen)]
    flags += ["--bi_score", str(args.folder / "scores"), "--save", str(args.folder / "logs")]
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    processes = [
        subprocess.Popen(
            ["taskset", "-c", str(rank), sys.executable, str(ROOT / "main.py"), *flags],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(count)
    ]
    if any(process.wait() for process in processes):
        raise SystemExit(f"a run in {count} processes failed")
    return json.loads((args.folder / "logs" / "dense_flatllm_20.json").read_text())


if __name__ == "__main__":
    main()
