"""Peak memory and time of compressing a checkpoint that is many times larger than what a run holds of it.

    python benchmarks/out_of_core.py --folder /scratch/out-of-core
    python benchmarks/out_of_core.py --layers 8 --hidden_size 1024     # a quick look

Writes a checkpoint of random weights (bf16), scores and compresses it out of core on few tokens, by a process of
its own. Beside its peak stand the bound on memory, the imports alone, and the time to read and to write the
same bytes without computing anything. Each pass of a run (scores, dense perplexity, compression, compressed perplexity)
reads its checkpoint once. The C library keeps freed blocks of less than 32 MB for later, which is what a peak may have
above the bound; MALLOC_MMAP_THRESHOLD_=1048576 in the environment has it give them back.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from common import ROOT, solve_bytes
from flatllmbench.provenance import hardware, versions
from flatllmcore.utils.devices import computed_in, parse_device
from flatllmcore.utils.files import GIB, write_json
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_tokenizer
from random_checkpoint import write_random_checkpoint

CHUNK = 2**24
IMPORTS = """
import main, torch
from flatllmcore.utils.devices import peak_memory_gib
print(peak_memory_gib(torch.device('cpu'))['host'])
"""


def main() -> None:
    args = parse_arguments()
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 128,
        max_position_embeddings=args.seqlen,
    )
    dense, compressed = args.folder / "dense", args.folder / "compressed"
    if not dense.exists():
        write_random_checkpoint(config, dense)
        load_tokenizer(str(ROOT / "models" / "pydocs-llama")).save_pretrained(dense)
    text = args.folder / "text.txt"
    text.write_text((ROOT / "README.md").read_text()[:10_000])
    shutil.rmtree(compressed, ignore_errors=True)
    shutil.rmtree(args.folder / "scores", ignore_errors=True)

    run = [sys.executable, str(ROOT / "main.py"), "--model", str(dense), "--dataset", str(text)]
    run += ["--eval_dataset", str(text), "--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen)]
    run += ["--sparsity_ratio", "20", "--bi_score", str(args.folder / "scores"), "--save", str(args.folder / "logs")]
    run += ["--save_model", str(compressed), "--out_of_core", "--device", args.device]
    imports_s, printed = timed([sys.executable, "-c", IMPORTS])
    imports_gib = float(printed)
    run_s, _ = timed(run)
    record = json.loads((args.folder / "logs" / "dense_flatllm_20.json").read_text())

    dimensions = dimensions_from_config(config)
    layer_gib = 2 * dimensions.layer_parameters / GIB
    widened = computed_in(torch.bfloat16, parse_device(args.device)).itemsize / 2
    solve_gib = max(solve_bytes(dimensions, layer["mlp_width"]) for layer in record["layers"]) / GIB
    found: dict[str, Any] = {
        "command": "python benchmarks/out_of_core.py " + " ".join(sys.argv[1:]),
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "checkpoint_gib": size_gib(dense),
        "compressed_gib": size_gib(compressed),
        "layer_gib": layer_gib,
        "solve_gib": solve_gib,
        "states_gib": 2 * widened * record["perplexity"][0]["windows"] * args.seqlen * args.hidden_size / GIB,
        "imports": {"elapsed_s": imports_s, "peak_memory_gib": imports_gib},
        "run": {
            "elapsed_s": run_s,
            "peak_memory_gib": record["peak_memory_gib"],
            "stages_s": record["stages_s"],
        },
        "read_s": read_s(dense),
        "write_s": write_s(compressed, args.folder / "copy"),
        "hardware": hardware(parse_device(args.device)),
        "versions": versions(),
    }
    # Four layers: in use and compressed, as they are computed with, read ahead, and the mapped pages it is read from.
    found["bound_gib"] = imports_gib + (2 * widened + 2) * layer_gib + solve_gib + found["states_gib"]
    write_json(args.out, found)
    print(json.dumps(found, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out-of-core"), help="holds twice the checkpoint")
    sizes = {"layers": 28, "hidden_size": 4096, "intermediate_size": 4096, "nsamples": 8, "seqlen": 128}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/out_of_core.json"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


def timed(command: list[str]) -> tuple[float, str]:
    """Run a command in a process of its own; return its seconds and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return round(time.perf_counter() - started, 2), done.stdout


def size_gib(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / GIB, 3)


def read_s(folder: Path) -> float:
    """Return the seconds to read all weights once, from the disk or from the system's cache, whichever has them."""
    started = time.perf_counter()
    buffer = bytearray(CHUNK)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return round(time.perf_counter() - started, 2)


def write_s(folder: Path, copy: Path) -> float:
    """Return the seconds to write as many bytes as the weights have, to the disk."""
    started = time.perf_counter()
    block = os.urandom(CHUNK)
    for path in folder.glob("*.safetensors"):
        with copy.open("wb", buffering=0) as file:
            for _ in range(path.stat().st_size // CHUNK + 1):
                file.write(block)
            os.fsync(file.fileno())
    copy.unlink()
    return round(time.perf_counter() - started, 2)


if __name__ == "__main__":
    main()
