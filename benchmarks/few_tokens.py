"""What a ridge does for the MLP solve when calibration tokens are few: perplexity by tokens and jitter.

    python benchmarks/few_tokens.py --model models/pydocs-llama --dataset pydocs --tokens 128 256 512 1024 2048 8192

The jitter is a share of each kept channel's own energy; 0 is the exact solve, and the last column is what the library
does: a tenth, faded out up to four tokens per channel. Prints a Markdown table and writes `--out` as JSON.
"""

import argparse
import copy
import json
from pathlib import Path
from unittest import mock

from torch import Tensor
from transformers import PreTrainedModel

from flatllmbench.perplexity import perplexity
from flatllmbench.records import hardware, versions
from flatllmbench.tables import markdown_table
from flatllmcore.core import prune
from flatllmcore.core.calibration import ModelInMemory
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.utils.data_utils import consecutive_windows, load_text, sample_documents
from flatllmcore.utils.devices import best_device
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model, load_tokenizer

SEQLEN = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval_dataset")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 8192])
    parser.add_argument("--jitter", type=float, nargs="+", default=[0.0, 1e-2, 1e-1])
    parser.add_argument("--sparsity_ratio", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = best_device()
    watch = Stopwatch(device)
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=args.dtype)
    test = consecutive_windows(load_text(args.eval_dataset or args.dataset, "test"), tokenizer, SEQLEN)[:200]
    calibration = sample_documents(
        load_text(args.dataset, "train"), tokenizer, max(args.tokens) // SEQLEN, SEQLEN, seed=42
    )
    scores = layer_importance(ModelInMemory(model, device), calibration, 64, watch).scores
    dimensions = dimensions_from_config(model.config)
    allocation = ImportancePreservingRankSelector(dimensions).allocate(scores, args.sparsity_ratio)

    dense = perplexity(ModelInMemory(model, device), test, 64, watch).value
    width = dimensions.intermediate_size
    print(f"{args.model} {args.sparsity_ratio} %: dense perplexity {dense:.2f}, MLP width {width}")
    rows = []
    for tokens in args.tokens:
        part = calibration[: tokens // SEQLEN]
        rows.append([tokens, *(compressed(model, part, allocation, test, jitter) for jitter in (*args.jitter, None))])
    header = ("tokens", *(f"jitter {jitter:g}" for jitter in args.jitter), "library")
    print("\n" + markdown_table(header, [(str(tokens), *(f"{p:.2f}" for p in found)) for tokens, *found in rows]))
    if args.out is not None:
        facts = {"request": {k: str(v) for k, v in vars(args).items()}, "hardware": hardware(device)}
        args.out.write_text(json.dumps(facts | {"versions": versions(), "dense": dense, "rows": rows}, indent=1) + "\n")


def compressed(
    model: PreTrainedModel, windows: Tensor, allocation: RankAllocation, test: Tensor, jitter: float | None
) -> float:
    """Return the perplexity after a compression with ``jitter`` in every MLP solve, ``None`` for the library's own."""
    device = best_device()
    source = ModelInMemory(copy.deepcopy(model), device)
    chosen = prune.few_tokens_jitter if jitter is None else (lambda _tokens, _channels: jitter)
    with mock.patch.object(prune, "few_tokens_jitter", chosen):
        flat_config, _ = prune.compress_layers(
            source, source, windows, allocation, batch_size=64, tolerance=0.96, stopwatch=Stopwatch(device)
        )
    return perplexity(ModelInMemory(source.adopt(flat_config), device), test, 64, Stopwatch(device)).value


if __name__ == "__main__":
    main()
