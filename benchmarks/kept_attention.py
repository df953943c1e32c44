"""How far what stands for a compressed layer's attention is from the attention itself, layer by layer.

    python benchmarks/kept_attention.py --model out/smollm2/SmolLM2-135M-Instruct.Q4_1 --dataset data/wikitext2

The hidden states behind a compressed attention (by `flatllm` behind its layer) come of a product of what the dense
one's last projection read (engine/reuse.py). They are compared here with those of the compressed weights on the same
states, computed in the same type, and both with these in float64: the norm of the difference over that of what is
written, of all tokens and of the worst one.
"""

import argparse
import copy
from collections.abc import Sequence
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor

from flatllmbench.tables import markdown_table
from flatllmcore import FlatLLMPruner
from flatllmcore.engine import compress, memory, walk
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
    parser.add_argument("--as_stored", action="store_true", help="compute in the type of the weights, also where slow")
    args = parser.parse_args(argv)
    rows = []
    for method in args.method:
        model, tokenizer = load_model(args.model), load_tokenizer(args.model)
        how = {"target_sparsity": args.sparsity_ratio / 100, "preserve_qk_layers": True, "importance_method": "angular"}
        data = {"cal_dataset": args.dataset, "cal_nsamples": args.nsamples, "seqlen": args.seqlen}
        found: list[dict[str, Tensor]] = []
        with ExitStack() as stack:
            stack.enter_context(patch.object(compress._Loop, "_advance", compared(found, compress._Loop._advance)))
            if args.as_stored:
                stack.enter_context(patch.object(memory, "computed_in", lambda dtype, _: dtype))
            FlatLLMPruner(model, tokenizer, method=method, batch_size=args.nsamples, **how, **data).prune_model()
        for name in found[0]:
            layers, tokens = torch.stack([of[name] for of in found]).T
            shown = (layers.median(), layers.max(), tokens.max())
            rows.append((method, name, str(len(found)), *(f"{of:.1e}" for of in shown)))
    columns = ("method", "difference", "layers", "median layer", "worst layer", "worst token")
    print(markdown_table(columns, rows), end="")


def compared(found: list[dict[str, Tensor]], advance):
    """Return ``advance``, which adds to ``found`` the :func:`differences` of a layer's attention."""

    def run(loop, index: int, before, after, part: str, read: Tensor | None) -> None:
        states = loop.walk.states.to(loop.walk.source.device, copy=True)
        attends = part != "mlp" and after.self_attn.v_proj.out_features < before.self_attn.v_proj.out_features
        with patch.object(compress, "written", wraps=compress.written) as written:
            advance(loop, index, before, after, part, read)
        if attends and written.called:
            computed = loop.walk.run(walk.forward_of(after, part), index, states)
            exact = loop.walk.run(walk.forward_of(copy.deepcopy(after).double(), part), index, states.double())
            found.append(differences(loop.walk.states.to(states.device), computed, exact, exact - states))

    return run


def differences(kept: Tensor, computed: Tensor, exact: Tensor, size: Tensor) -> dict[str, Tensor]:
    """Return three relative differences of hidden states (N, S, D), of all and of the worst token, each (2,)."""
    pairs = {
        "kept from computed": kept.double() - computed,
        "kept from exact": kept - exact,
        "computed from exact": computed - exact,
    }
    return {
        name: torch.stack([of.norm() / size.norm(), (of.norm(dim=-1) / size.norm(dim=-1)).max()]).cpu()
        for name, of in pairs.items()
    }


if __name__ == "__main__":
    main()
