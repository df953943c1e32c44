"""Which attention functions and kernels models run for a prompt and for a token behind it, dense and compressed.

    python benchmarks/attention_kernels.py --shape llama-2-7b --device cuda --out out/kernels.json

One layer of random weights of each, ranks in multiples of 8. A GPU's kernels stand beside torch's functions.
"""

import argparse
import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from common import SHAPES, one_layer
from flatllmbench.provenance import hardware, versions
from flatllmbench.speed import cache_argument
from flatllmbench.tables import markdown_table
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.layers import compressed_config
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.files import write_json
from flatllmcore.utils.layer_utils import dimensions_from_config

ATTENTION = re.compile(r"scaled_dot_product|attention|flash|fmha|bmm", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--ratios", type=int, nargs="+", default=[20, 50], help="percents removed")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, default=512)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="write the record here, as JSON")
    args = parser.parse_args()
    device, dense = parse_device(args.device), one_layer(SHAPES[args.shape]())
    selector = ImportancePreservingRankSelector(dimensions_from_config(dense), rank_multiple=8)
    configs = {"dense": dense}
    for percent in args.ratios:
        configs[f"{percent} %"] = compressed_config(dense, selector.allocate([1.0], 1 - percent / 100).layers)
    found = {}
    for name, config in configs.items():
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        found[name] = kernels(model, args.batch_size, args.prompt_length)
    write_json(
        args.out, {"request": {"shape": args.shape}, "hardware": hardware(device), "versions": versions()} | found
    )
    rows = [(name, stage, ", ".join(names)) for name, stages in found.items() for stage, names in stages.items()]
    print(markdown_table(("model", "of", "functions and kernels"), rows), end="")


@torch.no_grad()
def kernels(model: PreTrainedModel, batch_size: int, prompt_length: int) -> dict[str, list[str]]:
    """Return the names of what attends, for a prompt and for one token more."""
    cache, device = DynamicCache(config=model.config), model.device
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    found = {}
    for stage, length in (("prompt", prompt_length), ("token", 1)):
        token_ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        with profile(activities=activities) as seen:
            model(token_ids, **cache_argument(model, cache), logits_to_keep=1)
        found[stage] = sorted({event.key for event in seen.key_averages() if ATTENTION.search(event.key)})
    return found


if __name__ == "__main__":
    main()
