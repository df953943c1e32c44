"""What a ridge does for the MLP solve when calibration tokens are few: perplexity by tokens and jitter.

    python benchmarks/few_tokens.py --model models/pydocs-llama --dataset pydocs --tokens 128 256 512 1024 2048 8192

The jitter is a share of each kept channel's own energy; 0 is the exact solve, and the last column is what the library
does: a tenth, faded out up to four tokens per channel. Prints a Markdown table and writes `--out` as JSON.
"""

from contextlib import nullcontext
from unittest import mock

import common
from flatllmbench.tables import markdown_table
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.methods import flatllm
from flatllmcore.utils.devices import parse_device
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.loading import load_model


def main() -> None:
    parser = common.text_parser(__doc__)
    parser.set_defaults(seqlen=128, eval_windows=200)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 8192])
    parser.add_argument("--jitter", type=float, nargs="+", default=[0.0, 1e-2, 1e-1])
    parser.add_argument("--sparsity_ratio", type=int, default=20)
    args = parser.parse_args()
    args.nsamples = max(args.tokens) // args.seqlen

    device = parse_device(args.device)
    model = load_model(args.model, dtype=args.dtype)
    calibration, _, test = common.token_windows(args)
    dimensions = dimensions_from_config(model.config)
    scores = common.importance(model, calibration, device)
    allocation = ImportancePreservingRankSelector(dimensions).allocate(scores, 1 - args.sparsity_ratio / 100)
    dense = common.perplexity(model, test, device)
    print(f"{args.model} {args.sparsity_ratio} %: dense {dense:.2f}, MLP width {dimensions.intermediate_size}")
    rows = []
    for tokens in args.tokens:
        found = []
        for jitter in (*args.jitter, None):
            fixed = mock.patch.object(flatllm, "few_tokens_jitter", lambda _tokens, _channels, jitter=jitter: jitter)
            with nullcontext() if jitter is None else fixed:
                small = common.compressed(model, calibration[: tokens // args.seqlen], allocation, device)
            found.append(common.perplexity(small, test, device))
        rows.append([tokens, *found])
    header = ("tokens", *(f"jitter {jitter:g}" for jitter in args.jitter), "library")
    print("\n" + markdown_table(header, [(str(tokens), *(f"{p:.2f}" for p in found)) for tokens, *found in rows]))
    common.write(args, device, {"dense": dense, "rows": rows})


if __name__ == "__main__":
    main()
