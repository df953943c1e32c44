"""Compare perplexity at equal total size, with queries and keys left whole and with them pruned too.

    python benchmarks/qk_pruning.py --model models/pydocs-llama --dataset pydocs

Both use the same importance scores, calibration tokens and test windows, and remove the asked share of all
decoder-layer linear weights to within 0.1 % of it or one step of rank or width: where Q and K stay whole, V, O and
the MLP give up more. Prints a Markdown table and writes `--out` as JSON.
"""

from collections.abc import Sequence
from dataclasses import asdict

import common
from flatllmbench.tables import markdown_table
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model


def main() -> None:
    parser = common.text_parser(__doc__)
    parser.add_argument("--sparsity_ratio", type=int, nargs="+", default=[10, 20, 30, 40, 50])
    parser.add_argument("--rank_multiple", type=int, default=1)
    args = parser.parse_args()
    device = parse_device(args.device)
    calibration, importance_windows, test = common.token_windows(args)
    model = load_model(args.model, dtype=args.dtype)
    dimensions = dimensions_from_config(model.config)
    scores = common.importance(model, importance_windows, device)
    dense = common.perplexity(model, test, device)
    rows = [{"asked": 0, "prune_qk": False, "removed": 0.0, "perplexity": dense}]
    cells = []
    for percent in args.sparsity_ratio:
        for prune_qk in (False, True):
            allocation = allocate_exactly(dimensions, scores, percent, args.rank_multiple, prune_qk)
            small = common.compressed(model, calibration, allocation, device)
            row = {"asked": percent, "prune_qk": prune_qk, "removed": allocation.achieved_sparsity_percent}
            row |= {
                "perplexity": common.perplexity(small, test, device),
                "layers": list(map(asdict, allocation.layers)),
            }
            rows.append(row)
        pair = rows[-2:]
        removed, found = ([f"{row[name]:.3f}" for row in pair] for name in ("removed", "perplexity"))
        cells.append([str(percent), *removed, *found, f"{pair[1]['perplexity'] / pair[0]['perplexity']:.3f}"])

    print(f"{args.model}, {args.dtype}, {list(calibration.shape)} calibration and {list(test.shape)} test tokens")
    print(f"dense perplexity {dense:.3f}\n")
    header = ("asked %", "removed % (whole)", "removed % (pruned)", "Q, K whole", "Q, K pruned", "pruned / whole")
    print(markdown_table(header, cells), end="")
    common.write(args, device, {"rows": rows})


def allocate_exactly(
    dimensions: ModelDimensions, scores: Sequence[float], percent: int, rank_multiple: int, prune_qk: bool
) -> RankAllocation:
    """Return the ranks at the exact budget also for a multiple of 1, whose published floors miss it."""
    selector = ImportancePreservingRankSelector(dimensions, rank_multiple=rank_multiple, prune_qk=prune_qk)
    selector.is_floored = False
    return selector.allocate(scores, 1 - percent / 100)


if __name__ == "__main__":
    main()
