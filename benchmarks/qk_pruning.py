"""Compare perplexity at equal total size, with queries and keys left whole and with them pruned too.

    python benchmarks/qk_pruning.py --model models/pydocs-llama --dataset pydocs

Both use the same importance scores, calibration tokens and test windows, and remove the asked share of all
decoder-layer linear weights to within 0.1 % of it or one step of rank or width: where Q and K stay whole, V, O and
the MLP give up more. Prints a Markdown table and writes `--out` as JSON.
"""

import argparse
import copy
import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from flatllmbench.perplexity import perplexity
from flatllmbench.records import hardware, versions
from flatllmbench.tables import markdown_table
from flatllmcore.core.calibration import ModelInMemory, default_batch_size
from flatllmcore.core.importance import layer_importance
from flatllmcore.core.prune import compress_layers
from flatllmcore.core.rank_allocation import RankAllocation, allocate_keep_ratios, prunable_keep_ratio
from flatllmcore.core.rank_rounding import rounded_ranks
from flatllmcore.core.stopwatch import Stopwatch
from flatllmcore.utils.data_utils import consecutive_windows, load_text, sample_documents, sample_windows
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.layer_utils import ModelDimensions, dimensions_from_config
from flatllmcore.utils.loading import load_model, load_tokenizer


def main() -> None:
    args = parse_arguments()
    device = parse_device(args.device)
    batch_size = args.batch_size or default_batch_size(args.seqlen)
    calibration, importance_windows, test = token_windows(args)
    model = load_model(args.model, dtype=args.dtype)
    dimensions = dimensions_from_config(model.config)
    stopwatch = Stopwatch(device)

    def measured(measured_model: PreTrainedModel) -> float:
        return perplexity(ModelInMemory(measured_model, device), test, batch_size, stopwatch).value

    scores = layer_importance(ModelInMemory(model, device), importance_windows, batch_size, stopwatch).scores
    rows = [{"asked": 0, "prune_qk": False, "removed": 0.0, "perplexity": measured(model)}]
    for percent in args.sparsity_ratio:
        for prune_qk in (False, True):
            allocation = allocate_exactly(dimensions, scores, percent, args.rank_multiple, prune_qk)
            source = ModelInMemory(copy.deepcopy(model), device)
            flat_config, _ = compress_layers(
                source, source, calibration, allocation, batch_size=batch_size, tolerance=0.96, stopwatch=stopwatch
            )
            rows.append(
                {
                    "asked": percent,
                    "prune_qk": prune_qk,
                    "removed": allocation.achieved_sparsity_percent,
                    "perplexity": measured(source.adopt(flat_config)),
                    "value_rank": allocation.value_rank,
                    "query_key_rank": allocation.query_key_rank,
                    "mlp_width": allocation.mlp_width,
                }
            )

    name = Path(args.model).name
    print(f"{name}, {args.dtype}, {list(calibration.shape)} calibration and {list(test.shape)} test tokens")
    print(f"dense perplexity {rows[0]['perplexity']:.3f}\n")
    print(table(rows[1:]), end="")
    if args.out is not None:
        request = {key: str(value) for key, value in vars(args).items()}
        record = {"request": request, "versions": versions(), "hardware": hardware(device), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--eval_dataset")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval_windows", type=int, default=100, help="most test windows used")
    parser.add_argument("--sparsity_ratio", type=int, nargs="+", default=[10, 20, 30, 40, 50])
    parser.add_argument("--rank_multiple", type=int, default=1)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def token_windows(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the windows for calibration, for importance and for perplexity."""
    tokenizer = load_tokenizer(args.model)
    text = load_text(args.dataset, "train")
    test = consecutive_windows(load_text(args.eval_dataset or args.dataset, "test"), tokenizer, args.seqlen)
    return (
        sample_documents(text, tokenizer, args.nsamples, args.seqlen, seed=42),
        sample_windows(text, tokenizer, args.nsamples, args.seqlen, seed=42),
        test[: args.eval_windows],
    )


def allocate_exactly(
    dimensions: ModelDimensions, scores: tuple[float, ...], percent: int, rank_multiple: int, prune_qk: bool
) -> RankAllocation:
    """Return the ranks at the exact budget also for a multiple of 1, whose published floors miss it."""
    keep_ratio = 1 - percent / 100
    keep = allocate_keep_ratios(scores, prunable_keep_ratio(dimensions, keep_ratio, prune_qk))
    ranks, widths = rounded_ranks(dimensions, keep, keep_ratio, rank_multiple, prune_qk)
    return RankAllocation(percent, prune_qk, rank_multiple, tuple(keep), tuple(ranks), tuple(widths), dimensions)


def table(rows: list[dict]) -> str:
    """Return one line per target; the rows come in pairs, first whole and then pruned."""
    header = ("asked %", "removed % (whole)", "removed % (pruned)", "Q, K whole", "Q, K pruned", "pruned / whole")
    cells = []
    for whole, pruned in zip(rows[::2], rows[1::2], strict=True):
        removed, found = ([f"{row[name]:.3f}" for row in (whole, pruned)] for name in ("removed", "perplexity"))
        cells.append([str(whole["asked"]), *removed, *found, f"{pruned['perplexity'] / whole['perplexity']:.3f}"])
    return markdown_table(header, cells)


if __name__ == "__main__":
    main()
