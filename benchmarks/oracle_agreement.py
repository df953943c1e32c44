"""Compare compressed perplexity with the plain float64 implementation of the method, target by target.

    python benchmarks/oracle_agreement.py --model models/pydocs-llama --dataset pydocs

Same tokens and same ranks for both; the package runs in --dtype, the oracle (tests/oracle.py) in float64 on the
same weights. Prints a Markdown table and writes `--out` as JSON.
"""

import sys

import common
from flatllmbench.tables import markdown_table
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model

sys.path.insert(0, str(common.ROOT / "tests"))
import oracle


def main() -> None:
    parser = common.text_parser(__doc__)
    parser.add_argument("--sparsity_ratio", type=int, nargs="+", default=[10, 20, 30, 40, 50])
    parser.add_argument("--rank_multiple", type=int, default=1)
    args = parser.parse_args()
    device = parse_device(args.device)
    calibration, importance_windows, test = common.token_windows(args, importance_seed=0)
    model = load_model(args.model, dtype=args.dtype)
    weights, sizes = oracle.weights_and_sizes(model)

    scores = common.importance(model, importance_windows, device)
    exact_scores = oracle.importance(weights, sizes, importance_windows)
    worst = max(abs(a / b - 1) for a, b in zip(scores, exact_scores, strict=True))
    dense, exact = common.perplexity(model, test, device), oracle.perplexity(weights, sizes, test)
    rows = [{"asked": 0, "removed": 0.0, "ours": dense, "oracle": exact}]
    selector = ImportancePreservingRankSelector(dimensions_from_config(model.config), rank_multiple=args.rank_multiple)
    for percent in args.sparsity_ratio:
        allocation = selector.allocate(scores, 1 - percent / 100)
        ranks, widths = zip(*((kept.value_rank, kept.mlp_width) for kept in allocation.layers), strict=True)
        ours = common.perplexity(common.compressed(model, calibration, allocation, device), test, device)
        theirs = oracle.compress(weights, sizes, calibration, ranks, widths)
        row = {"asked": percent, "removed": allocation.achieved_sparsity_percent, "ours": ours}
        rows.append(row | {"oracle": oracle.perplexity(theirs, sizes, test)})

    print(f"{args.model}, {args.dtype}, {list(calibration.shape)} calibration and {list(test.shape)} test tokens")
    print(f"importance: largest relative difference {worst:.1e}\n")
    header = ("asked %", "removed %", "ours", "oracle", "difference %")
    cells = [
        (
            str(row["asked"]),
            *(f"{row['removed']:.3f}", f"{row['ours']:.4f}", f"{row['oracle']:.4f}"),
            f"{100 * (row['ours'] / row['oracle'] - 1):+.5f}",
        )
        for row in rows
    ]
    print(markdown_table(header, cells), end="")
    common.write(args, device, {"importance_difference": worst, "rows": rows})


if __name__ == "__main__":
    main()
