"""How exact the streamed second moments are: against the same products in float64 from first to last.

    python benchmarks/moment_precision.py --model models/pydocs-llama --dataset pydocs
    python benchmarks/moment_precision.py --model meta-llama/Llama-2-7b-hf --dataset wikitext2 --device cuda

The activations are the model's own on real text, in its dtype: bf16 and fp16 numbers multiply exactly in float32, so
what is lost is in the sums. Ours: float32 within a batch of about 4096 tokens (on the GPU's matrix units, where there
is one), float64 over batches. Beside it all batches summed in float32, what a plain accumulator would do.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from flatllmbench.records import hardware, versions, write_record
from flatllmbench.tables import markdown_table
from flatllmcore.core.calibration import ModelInMemory, default_batch_size
from flatllmcore.core.hidden_states import HiddenStates
from flatllmcore.core.moments import add_moment, mirror_lower_triangle
from flatllmcore.utils.data_utils import load_text, sample_documents
from flatllmcore.utils.devices import float32_product, parse_device
from flatllmcore.utils.layer_utils import DecoderModule
from flatllmcore.utils.loading import load_model, load_tokenizer


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    args = parser.parse_args()
    source = ModelInMemory(load_model(args.model), parse_device(args.device))
    text = load_text(args.dataset, "train")
    windows = sample_documents(text, load_tokenizer(args.model), args.nsamples, args.seqlen, seed=42)
    hidden = HiddenStates.embed(source, windows, default_batch_size(args.seqlen))
    errors = {"float64 over batches": [], "float32 throughout": []}
    for index in range(source.num_layers):
        with source.layer(index) as layer:
            width = layer.mlp.down_proj.in_features
            exact, ours = (torch.zeros(width, width, dtype=torch.float64, device=source.device) for _ in range(2))
            plain = torch.zeros_like(exact, dtype=torch.float32)
            with down_projection_inputs(layer) as inputs:
                for batch in hidden.batches():
                    batch.replace(hidden.run(layer, index, batch))
                    rows = inputs.pop()
                    exact += rows.double().T @ rows.double()
                    add_moment(ours, rows)
                    plain += float32_product(rows.T, rows)
            mirror_lower_triangle(ours)
        for found, name in ((ours, "float64 over batches"), (plain, "float32 throughout")):
            errors[name].append(((found - exact).norm() / exact.norm()).item())
    rows = [[str(i), *(f"{errors[name][i]:.1e}" for name in errors)] for i in range(source.num_layers)]
    print(markdown_table(["layer", *errors], rows))
    if args.out is not None:
        asked = {"model": args.model, "dataset": args.dataset, "tokens": windows.numel(), "dtype": str(source.dtype)}
        write_record(args.out, asked | {"errors": errors, "hardware": hardware(source.device), "versions": versions()})


@contextmanager
def down_projection_inputs(layer: DecoderModule) -> Iterator[list[Tensor]]:
    """Collect what ``down_proj`` is given inside the block, (tokens, F) each."""
    inputs: list[Tensor] = []
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _module, given: inputs.append(given[0].flatten(0, -2)))
    try:
        yield inputs
    finally:
        hook.remove()


if __name__ == "__main__":
    main()
