"""What a ridge does for the MLP solve when calibration tokens are few: perplexity by tokens and jitter.

    python benchmarks/few_tokens.py --model models/pydocs-llama --dataset pydocs --tokens 128 256 512 1024 8192

The jitter is relative to each kept channel's own energy. With fewer tokens than MLP channels the exact solve fits
the noise of the tokens it has; the library then uses FEW_TOKENS_JITTERS. Prints a Markdown table.
"""

import argparse
import copy
from unittest import mock

import torch

from flatllmbench.perplexity import perplexity
from flatllmcore.core import mlp_nystrom
from flatllmcore.core.calibration import ModelInMemory
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 8192])
    parser.add_argument("--jitter", type=float, nargs="+", default=[0.0, 1e-3, 1e-2, 1e-1, 1.0])
    parser.add_argument("--sparsity_ratio", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
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
    print("\n| tokens | " + " | ".join(f"jitter {jitter:g}" for jitter in args.jitter) + " |")
    print("|---:" * (1 + len(args.jitter)) + "|")
    for tokens in args.tokens:
        found = [f"{compressed(model, calibration[: tokens // SEQLEN], allocation, test, j):.2f}" for j in args.jitter]
        print(f"| {tokens} | " + " | ".join(found) + " |", flush=True)


def compressed(model, windows: torch.Tensor, allocation, test: torch.Tensor, jitter: float) -> float:
    """Return the perplexity after a compression whose MLP solves all use ``jitter``, or more if they must."""
    ladder = tuple(j for j in (*mlp_nystrom.JITTERS, 1e-2, 1e-1) if j > jitter)
    device = best_device()
    source = ModelInMemory(copy.deepcopy(model), device)
    with (
        mock.patch.object(mlp_nystrom, "JITTERS", (jitter, *ladder)),
        mock.patch.object(mlp_nystrom, "FEW_TOKENS_JITTERS", (jitter, *ladder)),
    ):
        flat_config, _ = compress_layers(
            source, source, windows, allocation, batch_size=64, tolerance=0.96, stopwatch=Stopwatch(device)
        )
    return perplexity(ModelInMemory(source.adopt(flat_config), device), test, 64, Stopwatch(device)).value


if __name__ == "__main__":
    main()
