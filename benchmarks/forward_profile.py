"""Which operators a decoder layer's forward pass takes its time in, and at what rate its matrix products run.

    OMP_NUM_THREADS=1 python benchmarks/forward_profile.py models/pydocs-llama --seqlen 256
    python benchmarks/forward_profile.py llama-2-7b --seqlen 4096 --dtype bfloat16 --device cuda

Random weights in the shape of a published model by name, or of a local folder or hub id: time does not depend on them.
The bound is the rate of one large matrix product on the same device in the same run.
"""

import argparse
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from common import PUBLISHED, find_config, one_layer, peak_rates
from flatllmbench.tables import markdown_table
from flatllmcore.utils.devices import parse_device

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(PUBLISHED)}, local folder or hub id")
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, help="windows (default: about 4096 tokens)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    device, dtype = parse_device(args.device), getattr(torch, args.dtype)
    config = one_layer(find_config(args.model))
    decoder = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval().model
    batch_size = args.batch_size or max(1, 4096 // args.seqlen)
    states = torch.randn(batch_size, args.seqlen, config.hidden_size, dtype=dtype, device=device)
    positions = torch.arange(args.seqlen, device=device)[None]
    given = {"position_embeddings": decoder.rotary_emb(states, positions), "attention_mask": None}
    with torch.inference_mode():
        decoder.layers[0](states, **given)
        activities = [ProfilerActivity.CPU] if device.type == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities, with_flops=True) as profiled:
            for _ in range(args.repeats):
                decoder.layers[0](states, **given)
    report(profiled, device, peak_rates(dtype, device)["forward"])


def report(profiled: profile, device: torch.device, peak: float) -> None:
    """Print the operators by their share of the time, and the rate of the matrix products beside the bound."""
    kind = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    found = sorted(profiled.key_averages(), key=lambda event: getattr(event, kind), reverse=True)
    total = sum(getattr(event, kind) for event in found)
    shares = [(event.key, f"{getattr(event, kind) / total:.1%}", str(event.count)) for event in found]
    print(markdown_table(("operator", "share", "calls"), shares[:10]))
    products = [event for event in found if event.key in PRODUCTS]
    rate = sum(event.flops for event in products) / sum(getattr(event, kind) for event in products) / 1e3
    print(f"matrix products {rate:.1f} of {peak / 1e9:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
