"""What a quantised cache costs: perplexity of text read in chunks behind it, dense model and compressed ones.

pip install optimum-quanto==0.2.7
python benchmarks/quantized_cache.py out/smollm2/MODEL out/smollm2/MODEL-plus-20 --dataset data/wikitext2_raw
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import Cache

from common import write
from flatllmbench.speed import cache_argument
from flatllmbench.tables import markdown_table
from flatllmcore.utils.data_utils import consecutive_windows
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.text_sources import load_text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="*", choices=(2, 4), default=[4, 2])
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    args = parser.parse_args(argv)
    rows, kinds = [], [None, *args.bits]
    for name in args.models:
        model, tokenizer = load_model(name, dtype="float32"), load_tokenizer(name)
        text = load_text(args.dataset, "test", tokenizer=tokenizer)
        windows = consecutive_windows(text, tokenizer, args.seqlen, args.windows)
        found = [
            sum(loss(model, window, cache_of(model, bits, args), args.chunk) for window in windows) for bits in kinds
        ]
        tokens = len(windows) * (args.seqlen - 1)
        rows.append((Path(name).name, *(f"{math.exp(each / tokens):.2f}" for each in found)))
    head = ("model", "as it is", *(f"{bits} bits" for bits in args.bits))
    print(markdown_table(head, rows), end="")
    write(args, torch.device("cpu"), {"perplexity": [dict(zip(head, row, strict=True)) for row in rows]})


def cache_of(model: PreTrainedModel, bits: int | None, args: argparse.Namespace) -> Cache:
    """Return a cache as it is, or the one that `generate` makes of cache_implementation="quantized"."""
    if bits is None:
        return DynamicCache(config=model.config)
    groups = {"q_group_size": args.group_size, "residual_length": args.chunk}
    return QuantizedCache(backend="quanto", config=model.config, nbits=bits, **groups)


@torch.no_grad()
def loss(model: PreTrainedModel, window: Tensor, cache: Cache, chunk: int) -> float:
    """Return the summed loss of the window's tokens, (S,), but the first, read ``chunk`` at a time."""
    by_name, total = cache_argument(model, cache), 0.0
    for ids, following in zip(window[None, :-1].split(chunk, 1), window[1:].split(chunk), strict=True):
        total += F.cross_entropy(model(ids, **by_name).logits[0], following, reduction="sum").item()
    return total


if __name__ == "__main__":
    main()
