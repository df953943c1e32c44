"""What compressing a model takes, and where: from its config alone, before any weight is there.

    python benchmarks/plan.py                                       # the published models, on the GPUs known here
    python benchmarks/plan.py llama-2-70b --device h100-80gb --sparsity_ratio 50
    python benchmarks/plan.py out/llama-2-13b --device here
    python benchmarks/plan.py mistral-7b --device_tflops 165 --device_gib 23.6

Each model is a published model's name, a model folder, a `config.json` or a hub id. Sizes and operations are those of
the published run (importance on 128 windows, compression on 256, of 4096 tokens or what the model takes), ranks those
of equal scores. Times are bounds: operations over the peak rate, that of float64 for the solves. Not counted: reading
and writing weights, perplexity, and what Python and its libraries take of memory. Sizes are those of bf16: on a CPU
without instructions for it hidden states and the layers at work are of float32 and take twice as much.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from common import PUBLISHED, find_config, moment_bytes, one_layer, operations, peak_rates, solve_bytes
from flatllmbench.speed import forward_operations
from flatllmbench.tables import markdown_table
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector
from flatllmcore.errors import InputError, run_program
from flatllmcore.utils.data_utils import window_length
from flatllmcore.utils.devices import best_device, computed_in, device_name, free_host_memory
from flatllmcore.utils.files import GIB
from flatllmcore.utils.layer_utils import count_parameters, dimensions_from_config
from flatllmcore.utils.loading import empty_causal_lm

ITEMSIZE = 2  # bf16


class Machine(NamedTuple):
    """Operations per second in bf16 and in float64, and bytes of memory, of one device."""

    name: str
    rate: float
    float64_rate: float
    memory_bytes: float


# Dense rates of NVIDIA's data sheets, float64 on tensor cores; memory as CUDA reports it.
MACHINES = {
    "a100-40gb": Machine("A100 40GB", 312e12, 19.5e12, 39.4 * GIB),
    "a100-80gb": Machine("A100 80GB", 312e12, 19.5e12, 79.2 * GIB),
    "h100-80gb": Machine("H100 80GB", 989.4e12, 66.9e12, 79.2 * GIB),
}


class Plan(NamedTuple):
    """What one model takes: bytes, and operations by stage."""

    parameters: int
    layer_bytes: int
    states_bytes: int
    moments_bytes: int
    solve_bytes: int
    operations: dict[str, float]

    def device_bytes(self) -> int:
        """Return the least memory of a device: a dense layer and a compressed one, and the solves of a layer."""
        return 2 * self.layer_bytes + self.solve_bytes

    def least_s(self, machine: Machine) -> float:
        """Return the time of the operations at the machine's peak."""
        in_model_dtype = sum(count for stage, count in self.operations.items() if stage != "solves")
        return in_model_dtype / machine.rate + self.operations["solves"] / machine.float64_rate


def plan(config: PretrainedConfig, args: argparse.Namespace) -> Plan:
    """Return what a run of ``args`` on a model of ``config`` takes."""
    dimensions = dimensions_from_config(config)
    seqlen = window_length(args.seqlen, config.max_position_embeddings)
    selector = ImportancePreservingRankSelector(dimensions)
    allocation = selector.allocate([1.0] * dimensions.num_layers, 1 - args.sparsity_ratio / 100)
    importance = args.importance_nsamples * dimensions.num_layers * forward_operations(one_layer(config), seqlen)
    return Plan(
        parameters=count_parameters(empty_causal_lm(config))["total"],
        layer_bytes=ITEMSIZE * dimensions.layer_parameters,
        states_bytes=ITEMSIZE * max(args.nsamples, args.importance_nsamples) * seqlen * dimensions.hidden_size,
        moments_bytes=moment_bytes(dimensions),
        solve_bytes=solve_bytes(dimensions, max(kept.mlp_width for kept in allocation.layers)),
        operations={"importance": importance} | operations(config, allocation, args.nsamples, seqlen),
    )


def machines_of(args: argparse.Namespace) -> list[Machine]:
    """Return the machines asked about: those of the table, one of it, this one measured, or one given in numbers."""
    if args.device_tflops is not None:
        if args.device_gib is None:
            raise InputError("--device_tflops needs --device_gib, the memory of the same device")
        return [Machine("given", args.device_tflops * 1e12, args.device_tflops * 1e12 / 16, args.device_gib * GIB)]
    if args.device == "here":
        device = best_device()
        rates = peak_rates(computed_in(torch.bfloat16, device), device)
        is_gpu = device.type == "cuda"
        memory_bytes = torch.cuda.get_device_properties(device).total_memory if is_gpu else free_host_memory()
        return [Machine(device_name(device), rates["forward"], rates["solves"], memory_bytes)]
    return list(MACHINES.values()) if args.device is None else [MACHINES[args.device]]


def table(plans: dict[str, Plan], machines: list[Machine]) -> str:
    """Return a row for each model: sizes, operations by stage, and for each machine the least time and if it fits."""
    header = ["model", "weights GB", "hidden states GiB", "moments GiB", "solve GiB", "device GiB"]
    header += [f"{stage} PFLOP" for stage in next(iter(plans.values())).operations]
    rows = []
    for name, found in plans.items():
        sizes = (found.states_bytes, found.moments_bytes, found.solve_bytes, found.device_bytes())
        row = [name, f"{ITEMSIZE * found.parameters / 1e9:.1f}", *(f"{size / GIB:.2f}" for size in sizes)]
        row += [f"{count / 1e15:.3g}" for count in found.operations.values()]
        for machine in machines:
            fits = found.device_bytes() <= machine.memory_bytes
            row.append(f"{found.least_s(machine) / 60:.3g}" if fits else "too small")
        rows.append(row)
    return markdown_table(header + [f"{machine.name}, min" for machine in machines], rows)


def main(argv: list[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(PUBLISHED), metavar="MODEL", help=f"{', '.join(PUBLISHED)}")
    parser.add_argument("--sparsity_ratio", type=int, default=20)
    parser.add_argument("--nsamples", type=int, default=256, help="windows to compress with")
    parser.add_argument("--importance_nsamples", type=int, default=128, help="windows to score layers with")
    parser.add_argument("--seqlen", type=int, help="default: 4096, or what the model takes")
    parser.add_argument("--device", choices=(*MACHINES, "here"), help="here: measured by one matrix product")
    parser.add_argument(
        "--device_tflops", type=float, help="10^12 bf16 operations per second of another; float64 a sixteenth of it"
    )
    parser.add_argument("--device_gib", type=float, help="its memory")
    args = parser.parse_args(argv)

    def work() -> None:
        machines = machines_of(args)
        print(table({model: plan(find_config(model), args) for model in args.models}, machines), end="")

    return run_program(work, Path.cwd())


if __name__ == "__main__":
    sys.exit(main())
