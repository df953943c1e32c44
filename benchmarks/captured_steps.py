"""Speed of a model whose calls are recorded once and replayed, so that Python takes no time: what its kernels take.

    python benchmarks/captured_steps.py --shape llama-2-7b --device cuda --out out/captured_steps.json

A prompt, and a token behind a static cache of that length, as one CUDA graph each. Random weights, dense and compressed
in multiples of 8, layers of falling scores; milliseconds, the middle of the replays. On a CPU the same calls are run.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

from common import SHAPES, falling_scores
from flatllmbench.provenance import hardware, versions
from flatllmbench.speed import cache_argument
from flatllmbench.tables import markdown_table
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.layers import compressed_config
from flatllmcore.utils.devices import parse_device, synchronize
from flatllmcore.utils.files import write_json
from flatllmcore.utils.layer_utils import dimensions_from_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--sparsity_ratio", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt_length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="write the record here, as JSON")
    args = parser.parse_args()
    device, dense = parse_device(args.device), SHAPES[args.shape]()
    configs: dict[str, Any] = {"dense": dense}
    selector = ImportancePreservingRankSelector(dimensions_from_config(dense), rank_multiple=8)
    for percent in args.sparsity_ratio:
        allocation = selector.allocate(falling_scores(dense.num_hidden_layers), 1 - percent / 100)
        configs[f"{percent} %"] = compressed_config(dense, allocation.layers)
    request = {"shape": args.shape, "prompt_length": args.prompt_length, "dtype": args.dtype}
    record = {"request": request, "hardware": hardware(device), "versions": versions()}
    found, rows = [], []
    for name, config in configs.items():
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
        for batch_size in args.batch_size:
            figures = prompt_and_step_ms(model, batch_size, args.prompt_length, args.repeats)
            found.append({"model": name, "batch_size": batch_size, **figures})
            write_json(args.out, record | {"found": found})
            rows.append((name, str(batch_size), *(f"{value:.2f}" for value in figures.values())))
    print(markdown_table(("model", "batch", "prompt, ms", "step, ms"), rows), end="")


@torch.no_grad()
def prompt_and_step_ms(model: PreTrainedModel, batch_size: int, length: int, repeats: int) -> dict[str, float]:
    """Return the milliseconds of a batch of prompts and of a token of each behind it."""
    shape = (batch_size, length)
    prompt = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = StaticCache(config=model.config, max_cache_len=length + 1)
    by_name, last = cache_argument(model, cache), prompt[:, -1:].clone()
    model(prompt, **by_name, logits_to_keep=1)  # fills the cache
    return {
        "prompt_ms": replayed_ms(lambda: model(prompt, use_cache=False, logits_to_keep=1), model.device, repeats),
        "step_ms": replayed_ms(lambda: _again(model, last, cache, length), model.device, repeats),
    }


def _again(model: PreTrainedModel, last: torch.Tensor, cache: StaticCache, length: int) -> None:
    """Decode the token at the place behind the prompt, whatever was decoded there before."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
    model(last, **cache_argument(model, cache), logits_to_keep=1)


def replayed_ms(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the milliseconds of a call, recorded as a CUDA graph on a GPU; the middle of the repeats."""
    if device.type == "cuda":
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            call()  # libraries are loaded, and plans made, before anything is recorded
        synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    taken = []
    for _ in range(1 + repeats):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        taken.append(1000 * (time.perf_counter() - started))
    return median(taken[1:])


if __name__ == "__main__":
    main()
