"""How exact the streamed second moments are: against the same products in float64 from first to last.

    python benchmarks/moment_precision.py --model models/pydocs-llama --dataset pydocs
    python benchmarks/moment_precision.py --model meta-llama/Llama-2-7b-hf --dataset wikitext2 --device cuda

The activations are the model's own on real text, in its dtype: bf16 and fp16 numbers multiply exactly in float32, so
what is lost is in the sums. Ours: float32 within a batch of about 4096 tokens (on the GPU's matrix units, where there
is one), float64 over batches. Beside it all batches summed in float32, what a plain accumulator would do.
`--batch_tokens` takes other batches.
"""

import torch

import common
from flatllmbench.tables import markdown_table
from flatllmcore.core.moments import add_moment, mirror_lower_triangle
from flatllmcore.utils.devices import float32_product, parse_device
from flatllmcore.utils.loading import load_model


@torch.no_grad()
def main() -> None:
    parser = common.text_parser(__doc__)
    parser.set_defaults(nsamples=256, dtype="auto")
    parser.add_argument("--batch_tokens", type=int, default=4096)
    args = parser.parse_args()
    device = parse_device(args.device)
    model = load_model(args.model, dtype=args.dtype).to(device)
    windows, _, _ = common.token_windows(args)
    batches = windows.to(device).split(max(args.batch_tokens // args.seqlen, 1))
    errors: dict[str, list[float]] = {"float64 over batches": [], "float32 throughout": []}
    for layer in model.base_model.layers:  # one at a time: three matrices of the MLP's width are enough
        width = layer.mlp.down_proj.in_features
        exact, ours = (torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2))
        plain = torch.zeros_like(exact, dtype=torch.float32)

        def add(_module, given, exact=exact, ours=ours, plain=plain) -> None:
            rows = given[0].flatten(0, -2)  # (tokens, F)
            exact.add_(rows.double().T @ rows.double())
            add_moment(ours, rows)
            plain.add_(float32_product(rows.T, rows))

        hook = layer.mlp.down_proj.register_forward_pre_hook(add)
        for batch in batches:
            model.base_model(batch, use_cache=False)
        hook.remove()
        mirror_lower_triangle(ours)
        for found, name in ((ours, "float64 over batches"), (plain, "float32 throughout")):
            errors[name].append(((found - exact).norm() / exact.norm()).item())
    rows = [[str(i), *(f"{found[i]:.1e}" for found in errors.values())] for i in range(len(model.base_model.layers))]
    print(markdown_table(["layer", *errors], rows))
    common.write(
        args,
        device,
        {"tokens": windows.numel(), "batch_tokens": args.batch_tokens, "dtype": str(model.dtype), "errors": errors},
    )


if __name__ == "__main__":
    main()
