"""How far what stands for a compressed layer's attention is from the attention itself, layer by layer.

    python benchmarks/kept_attention.py --model out/smollm2/SmolLM2-135M-Instruct.Q4_1 --dataset data/wikitext2

The hidden states behind a compressed attention (by `flatllm` behind its layer) come of a product of what the dense
one's last projection read (engine/reuse.py). They are compared here with those of the compressed weights on the same
states: the norm of the difference over that of what is written, of all tokens and of the worst one.
"""

import argparse
from collections.abc import Sequence
from unittest.mock import patch

from torch import Tensor

from flatllmbench.tables import markdown_table
from flatllmcore import FlatLLMPruner
from flatllmcore.engine import compress, walk
from flatllmcore.methods import METHODS
from flatllmcore.utils.loading import load_model, load_tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--sparsity_ratio", type=float, default=20)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args(argv)
    rows = []
    for method in args.method:
        model, tokenizer = load_model(args.model), load_tokenizer(args.model)
        how = {"target_sparsity": args.sparsity_ratio / 100, "preserve_qk_layers": True, "importance_method": "angular"}
        data = {"cal_dataset": args.dataset, "cal_nsamples": args.nsamples, "seqlen": args.seqlen}
        found: list[tuple[float, float]] = []
        with patch.object(compress._Loop, "_advance", compared(found, compress._Loop._advance)):
            FlatLLMPruner(model, tokenizer, method=method, batch_size=args.nsamples, **how, **data).prune_model()
        of_all, of_worst = (sorted(numbers) for numbers in zip(*found, strict=True))
        shown = (of_all[len(found) // 2], of_all[-1], of_worst[-1])
        rows.append((method, str(len(found)), *(f"{of:.1e}" for of in shown)))
    print(markdown_table(("method", "layers", "median layer", "worst layer", "worst token"), rows), end="")


def compared(found: list[tuple[float, float]], advance):
    """Return ``advance``, which adds to ``found`` the relative error of a layer's attention and of its worst token."""

    def run(loop, index: int, before, after, part: str, read: Tensor | None) -> None:
        states = loop.walk.states.clone()
        attends = part != "mlp" and after.self_attn.v_proj.out_features < before.self_attn.v_proj.out_features
        with patch.object(compress, "written", wraps=compress.written) as written:
            advance(loop, index, before, after, part, read)
        if attends and written.called:
            expected = loop.walk.run(walk.forward_of(after, part), index, states.to(loop.walk.source.device))
            error, size = (of.float() for of in (loop.walk.states.to(expected.device) - expected, expected - states))
            tokens = error.norm(dim=-1) / size.norm(dim=-1)
            found.append(((error.norm() / size.norm()).item(), tokens.max().item()))

    return run


if __name__ == "__main__":
    main()
