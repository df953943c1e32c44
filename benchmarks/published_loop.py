"""The authors' loop by its operations, timed beside ours: float64 moments, one window at a time, every layer twice.

    python benchmarks/published_loop.py --shape llama-2-7b --nsamples 256 --seqlen 4096 --device cuda --out loop.json

A stand-in written from the description of the method, not their program: for each window a forward pass of the dense
layer with the moments of its values and of its MLP channels summed in float64, their eigenvectors, ridge inverse and
fit, and a forward pass of the narrower layer. Of one layer of random weights, and a model takes that times its layers.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from common import SHAPES, one_layer
from flatllmbench.provenance import hardware, versions
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.engine.memory import ModelInMemory, layer_arguments
from flatllmcore.engine.walk import tapped
from flatllmcore.layers import compressed_config
from flatllmcore.utils.devices import computed_in, parse_device, peak_memory_gib
from flatllmcore.utils.dimensions import Kept
from flatllmcore.utils.files import write_json
from flatllmcore.utils.layer_utils import dimensions_from_config
from flatllmcore.utils.stopwatch import Stopwatch, stage

TAPS = ("self_attn.v_proj.output", "mlp.down_proj.input")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--nsamples", type=int, default=256)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--sparsity_ratio", type=int, default=20)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="write the record here, as JSON")
    args = parser.parse_args()
    device, config = parse_device(args.device), SHAPES[args.shape]()
    dense = one_layer(config)
    selector = ImportancePreservingRankSelector(dimensions_from_config(dense))
    kept = selector.allocate([1.0], 1 - args.sparsity_ratio / 100).layers[0]
    narrow = compressed_config(dense, [kept])
    with Stopwatch(device).running() as watch:
        compress(dense, narrow, kept, args, device)
    seconds = {name: config.num_hidden_layers * of for name, of in watch.elapsed_s.items()}
    found = {"model": args.shape, "windows": [args.nsamples, args.seqlen], "layers": config.num_hidden_layers}
    found |= {"compress_s": sum(seconds.values()), "stages_s": seconds, "peak_memory_gib": peak_memory_gib(device)}
    write_json(args.out, found | {"hardware": hardware(device), "versions": versions()})
    stages = ", ".join(f"{name} {of:.1f} s" for name, of in seconds.items())
    print(f"{args.shape}, {args.nsamples} x {args.seqlen} tokens: {sum(seconds.values()):.1f} s, of it {stages}")


@torch.no_grad()
def compress(
    dense: PretrainedConfig, narrow: PretrainedConfig, kept: Kept, args: argparse.Namespace, device: torch.device
) -> None:
    """Run the loop on one layer of random weights, in the stages of the stopwatch."""
    dtype = computed_in(torch.bfloat16, device)
    with torch.device(device):
        models = [AutoModelForCausalLM.from_config(of, dtype=dtype).eval() for of in (dense, narrow)]
    before, after = (model.model.layers[0] for model in models)
    arguments = layer_arguments(ModelInMemory(models[0], device), args.seqlen)[0]
    window = torch.randn(1, 1, args.seqlen, dense.hidden_size, dtype=dtype)  # on the host, as there
    states = window.expand(args.nsamples, -1, -1, -1)
    num_kv_heads, width = dense.num_key_value_heads, dense.intermediate_size
    zeros = partial(torch.zeros, dtype=torch.float64, device=device)
    heads = zeros(num_kv_heads, before.self_attn.head_dim, before.self_attn.head_dim)
    channels = zeros(width, width)
    with tapped(before, TAPS) as look:
        for window in states:
            with stage("forward"):
                seen = look(partial(before, window.to(device), **arguments))
            with stage("moments"):
                values = seen[TAPS[0]].double().unflatten(-1, (num_kv_heads, -1)).transpose(0, 1)
                heads += values.mT @ values
                inner = seen[TAPS[1]].double()
                channels += inner.T @ inner
    with stage("solves"):
        solve(heads, channels, before.mlp.down_proj, kept.mlp_width)
    for window in states:
        with stage("forward"):
            after(window.to(device), **arguments)


def solve(heads: Tensor, channels: Tensor, down_proj: nn.Linear, width: int) -> None:
    """Do the solves of a layer: bases of the values, ridge leverage scores of the channels, and the fit to the rest."""
    torch.linalg.eigh(heads)
    ridge = channels.diagonal().mean() * torch.eye(len(channels), dtype=torch.float64, device=channels.device)
    scores = (channels @ torch.linalg.inv(channels + ridge)).diagonal()
    stay = scores.topk(width).indices
    torch.linalg.solve(channels[stay][:, stay] + ridge[:width, :width], channels[stay] @ down_proj.weight.double().T)


if __name__ == "__main__":
    main()
