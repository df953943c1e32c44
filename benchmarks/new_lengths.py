"""What a token costs behind a cache of a length that has not been met, as in any text, and of one that has.

    python benchmarks/new_lengths.py --shape llama-2-7b-4-layers --device cuda --out out/new_lengths.json

Some attention kernels are planned anew for every length and width. Random weights, dense and compressed in multiples
of 8, layers of falling scores; milliseconds per token, the middle of nine runs for lengths that have been met.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

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
    parser.add_argument("--sparsity_ratio", type=int, default=20)
    parser.add_argument("--prompt_length", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="write the record here, as JSON")
    args = parser.parse_args()
    device, dense = parse_device(args.device), SHAPES[args.shape]()
    selector = ImportancePreservingRankSelector(dimensions_from_config(dense), rank_multiple=8)
    allocation = selector.allocate(falling_scores(dense.num_hidden_layers), 1 - args.sparsity_ratio / 100)
    configs = {"dense": dense, f"{args.sparsity_ratio} %": compressed_config(dense, allocation.layers)}
    prompt = torch.randint(dense.vocab_size, (1, args.prompt_length), generator=torch.Generator().manual_seed(0))
    found = {}
    for name, config in configs.items():
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        step_ms(model, prompt[:, :1], 1)  # libraries are loaded
        first, *later = (step_ms(model, prompt, args.new_tokens) for _ in range(10))
        found[name] = {"new_ms": first, "met_ms": median(later)}
    request = {"shape": args.shape, "prompt_length": args.prompt_length, "new_tokens": args.new_tokens}
    write_json(args.out, {"request": request, "hardware": hardware(device), "versions": versions()} | found)
    rows = [(name, *(f"{of:.2f}" for of in each.values())) for name, each in found.items()]
    print(markdown_table(("model", "ms per token, new lengths", "met ones"), rows), end="")


@torch.no_grad()
def step_ms(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> float:
    """Return the mean milliseconds of the tokens decoded after a prompt."""
    cache = cache_argument(model, DynamicCache(config=model.config))
    tokens = model(prompt.to(model.device), **cache, logits_to_keep=1).logits.argmax(-1)
    synchronize(model.device)
    started = time.perf_counter()
    for _ in range(new_tokens):
        tokens = model(tokens, **cache, logits_to_keep=1).logits.argmax(-1)
    synchronize(model.device)
    return 1000 * (time.perf_counter() - started) / new_tokens


if __name__ == "__main__":
    main()
