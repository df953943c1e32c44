"""Compare compressed perplexity with the plain float64 implementation of the method, target by target.

    python benchmarks/oracle_agreement.py --model models/pydocs-llama --dataset pydocs

Same tokens and same ranks for both; the package runs in --dtype, the oracle (tests/oracle.py) in float64 on the
same weights. `--windows FILE.npz` takes calibration and importance windows from the arrays of these names instead
of sampling them. Prints a Markdown table and writes `--out` as JSON.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatllmbench.perplexity import perplexity
from flatllmbench.records import hardware, versions
from flatllmcore.core.calibration import ModelInMemory
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.utils.data_utils import consecutive_windows, load_text, sample_documents, sample_windows
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model, load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import oracle


def main() -> None:
    args = parse_arguments()
    device = parse_device(args.device)
    calibration, importance_windows, test = token_windows(args)
    model = load_model(args.model, dtype=args.dtype)
    weights, sizes = oracle.weights_and_sizes(model)
    stopwatch = Stopwatch(device)

    scores = layer_importance(ModelInMemory(model, device), importance_windows, 32, stopwatch).scores
    exact_scores = oracle.importance(weights, sizes, importance_windows)
    worst = max(abs(a / b - 1) for a, b in zip(scores, exact_scores, strict=True))
    dense = perplexity(ModelInMemory(model, device), test, 32, stopwatch).value
    rows = [{"asked": 0, "removed": 0.0, "ours": dense, "oracle": oracle.perplexity(weights, sizes, test)}]
    selector = ImportancePreservingRankSelector(dimensions_from_config(model.config), rank_multiple=args.rank_multiple)
    for percent in args.sparsity_ratio:
        allocation = selector.allocate(scores, percent)
        source = ModelInMemory(copy.deepcopy(model), device)
        flat_config, _ = compress_layers(
            source, source, calibration, allocation, batch_size=32, tolerance=0.96, stopwatch=stopwatch
        )
        ours = perplexity(ModelInMemory(source.adopt(flat_config), device), test, 32, stopwatch).value
        exact = oracle.compress(weights, sizes, calibration, allocation.value_rank, allocation.mlp_width)
        expected = oracle.perplexity(exact, sizes, test)
        rows.append(
            {"asked": percent, "removed": allocation.achieved_sparsity_percent, "ours": ours, "oracle": expected}
        )

    print(f"{args.model}, {args.dtype}, {list(calibration.shape)} calibration and {list(test.shape)} test tokens")
    print(f"importance: largest relative difference {worst:.1e}\n")
    print("| asked % | removed % | ours | oracle | difference % |\n|---:|---:|---:|---:|---:|")
    for row in rows:
        difference = 100 * (row["ours"] / row["oracle"] - 1)
        print(
            f"| {row['asked']} | {row['removed']:.3f} | {row['ours']:.4f} | {row['oracle']:.4f} | {difference:+.5f} |"
        )
    if args.out is not None:
        record = {"request": {k: str(v) for k, v in vars(args).items()}, "versions": versions()}
        record |= {"hardware": hardware(device), "importance_difference": worst, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval_dataset")
    parser.add_argument("--windows", type=Path)
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval_windows", type=int, default=100, help="test windows used")
    parser.add_argument("--sparsity_ratio", type=int, nargs="+", default=[10, 20, 30, 40, 50])
    parser.add_argument("--rank_multiple", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def token_windows(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the windows for calibration, for importance and for perplexity."""
    tokenizer = load_tokenizer(args.model)
    test = consecutive_windows(load_text(args.eval_dataset or args.dataset, "test"), tokenizer, args.seqlen)
    if args.windows is not None:
        arrays = np.load(args.windows)
        given = (torch.from_numpy(arrays[name]).long() for name in ("calibration", "importance"))
        return *given, test[: args.eval_windows]
    text = load_text(args.dataset, "train")
    return (
        sample_documents(text, tokenizer, args.nsamples, args.seqlen, seed=42),
        sample_windows(text, tokenizer, args.nsamples, args.seqlen, seed=0),
        test[: args.eval_windows],
    )


if __name__ == "__main__":
    main()
