"""What compressing a model takes - operations, bytes, memory, time - from its config alone, before any weight is there.

    python benchmarks/plan.py llama-2-70b --device a100-40gb --processes 1 4
    python benchmarks/plan.py out/llama-2-13b --device here --calibrate logs/llama-2-7b_flatllm_20.json
    python benchmarks/plan.py --all

The model is a published model's name, a model folder, a `config.json` or a hub id. Times are bounds: operations over
the device's peak rate, bytes over its bandwidth. `--efficiency` divides the computing by a share you state,
`--calibrate` each stage by the share of its bound that a run on the same `--device` reached, as its record says. A
device is one of the table, with its numbers changed by flags, or `here`, measured in ten seconds. Ranks are those of
equal scores. Not counted: reading and tokenising text, starting processes, and what Python and its libraries take of
memory.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

from flatllmbench.command_line import complain
from flatllmbench.costs import hidden_state_bytes
from flatllmbench.machines import DEVICES, DISK_GBYTES_PER_S, HOST_MEMORY_GIB, Machine, measured_machine
from flatllmbench.plan import Plan, Request
from flatllmbench.plan_calibration import efficiency_of, read_run_record
from flatllmbench.published_models import PUBLISHED_MODELS, find_config
from flatllmbench.tables import markdown_table
from flatllmcore.core.calibration import default_batch_size
from flatllmcore.core.rank_allocation import check_sparsity_ratio
from flatllmcore.errors import InputError
from flatllmcore.utils.calibration_windows import window_length
from flatllmcore.utils.devices import GIB, best_device

NUMBERS = tuple(field.name for field in fields(Machine) if field.name not in ("name", "moments_tflops"))
COMPUTED = ("forward", "angles", "moments", "solves", "perplexity")  # stages that --efficiency divides


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        machine = chosen_machine(args)
        efficiency = dict.fromkeys(COMPUTED, args.efficiency)
        if args.calibrate is not None:
            record = read_run_record(args.calibrate)
            efficiency = efficiency_of(record, find_config(record["base_model"]), machine)
        print(describe_machine(machine, efficiency))
        if args.all:
            plans = {
                name: [Plan(request(args, name, count), machine, efficiency) for count in args.processes]
                for name in PUBLISHED_MODELS
            }
            print(summary(plans))
            return 0
        for count in args.processes:
            print(details(args.model, Plan(request(args, args.model, count), machine, efficiency)))
    except InputError as error:
        return complain(str(error))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", help=f"{', '.join(PUBLISHED_MODELS)}, or a folder, config.json or hub id")
    what.add_argument("--all", action="store_true", help="one row for each published model")
    run = parser.add_argument_group("the run (defaults: the published ones)")
    run.add_argument("--sparsity_ratio", type=int, default=20)
    run.add_argument("--nsamples", type=int, default=256, help="windows to compress with")
    run.add_argument(
        "--importance_nsamples", type=int, default=128, help="windows to score layers with; 0: they are scored"
    )
    run.add_argument("--seqlen", type=int, help="default: 4096, or what the model takes")
    run.add_argument("--batch_size", type=int, help="windows run at a time (default: about 4096 tokens)")
    run.add_argument(
        "--eval_windows",
        type=int,
        default=83,
        help="windows perplexity is measured on (default: 83, WikiText-2's test split in Llama-2's tokens, 4096 each)",
    )
    run.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    run.add_argument("--out_of_core", action="store_true", help="read weights layer by layer though they may fit")
    where = parser.add_argument_group("the machine")
    where.add_argument("--device", default="a100-40gb", choices=(*DEVICES, "here"))
    where.add_argument("--processes", type=int, nargs="+", help="devices, on one host (default: 1; with --all 1 and 4)")
    where.add_argument("--tflops", type=float, help="10^12 bf16 operations per second")
    where.add_argument("--float64_tflops", type=float)
    where.add_argument("--bandwidth_gbytes_per_s", type=float, help="of the device's memory")
    where.add_argument("--memory_gib", type=float, help="of the device")
    where.add_argument("--host_link_gbytes_per_s", type=float, help="between host and device, one way")
    where.add_argument("--link_gbytes_per_s", type=float, help="between devices, one way (default: as to the host)")
    where.add_argument("--disk_gbytes_per_s", type=float, help=f"default: {DISK_GBYTES_PER_S:g}")
    where.add_argument("--host_memory_gib", type=float, help=f"default: {HOST_MEMORY_GIB:g}")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--efficiency", type=float, default=1.0, help="share of the peak reached (default: 1, the bound)"
    )
    rates.add_argument("--calibrate", type=Path, metavar="RECORD", help="of a run of main.py on the same --device")
    args = parser.parse_args(argv)
    if args.processes is None:
        args.processes = [1, 4] if args.all else [1]
    return args


def check_arguments(args: argparse.Namespace) -> None:
    check_sparsity_ratio(args.sparsity_ratio)
    for name in ("nsamples", "importance_nsamples", "eval_windows", "batch_size"):
        value, least = getattr(args, name), 1 if name in ("nsamples", "batch_size") else 0
        if value is not None and value < least:
            raise InputError(f"--{name} {value} is out of range; {least} or more is accepted")
    if min(args.processes) < 1:
        raise InputError(f"--processes {min(args.processes)} is out of range; 1 or more is accepted")
    if not 0 < args.efficiency <= 1:
        raise InputError(f"--efficiency {args.efficiency:g} is out of range; a share above 0 and at most 1 is accepted")


def chosen_machine(args: argparse.Namespace) -> Machine:
    """Return the device of the table, or this machine measured, with the numbers that flags give instead."""
    machine = measured_machine(best_device(), Path.cwd()) if args.device == "here" else DEVICES[args.device]
    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    for name, value in given.items():
        if value <= 0:
            raise InputError(f"--{name} {value:g} is out of range; more than 0 is accepted")
    if "tflops" in given:
        given.setdefault("moments_tflops", given["tflops"])
    if "host_link_gbytes_per_s" in given:
        given.setdefault("link_gbytes_per_s", given["host_link_gbytes_per_s"])
    return replace(machine, **given)


def request(args: argparse.Namespace, model: str, processes: int) -> Request:
    config = find_config(model)
    seqlen = window_length(args.seqlen, config.max_position_embeddings)
    return Request(
        config=config,
        sparsity_ratio=args.sparsity_ratio,
        nsamples=args.nsamples,
        importance_nsamples=args.importance_nsamples,
        eval_windows=args.eval_windows,
        seqlen=seqlen,
        batch_size=args.batch_size or default_batch_size(seqlen),
        itemsize=getattr(torch, args.dtype).itemsize,
        processes=processes,
        out_of_core=args.out_of_core,
    )


def describe_machine(machine: Machine, efficiency: Mapping[str, float]) -> str:
    memory = "host memory" if machine.memory_gib is None else f"{machine.memory_gib:.1f} GiB"
    reached = ", ".join(f"{name} {share:.2f}" for name, share in efficiency.items() if share != 1)
    return (
        f"{machine.name}: {machine.tflops:.4g} TFLOP/s ({machine.moments_tflops:.4g} moments, "
        f"{machine.float64_tflops:.4g} float64), {memory} at {machine.bandwidth_gbytes_per_s:.4g} GB/s; "
        f"host {machine.host_memory_gib:.0f} GiB, {machine.host_link_gbytes_per_s:.4g} GB/s away; "
        f"disk {machine.disk_gbytes_per_s:.3g} GB/s\n"
        + (f"shares of the bound reached: {reached}\n" if reached else "all times are bounds\n")
    )


def details(model: str, plan: Plan) -> str:
    """Return the plan of one model: a row for each stage, then memory and the sums."""
    request = plan.request
    rows = []
    for stage in plan.stages():
        seconds = plan.seconds(stage)
        work = (stage.cost.operations / 1e12, stage.cost.moved_bytes / 1e9, stage.copied_bytes / 1e9)
        sizes = (*work, stage.linked_bytes / 1e9, stage.disk_bytes / 1e9, *vars(seconds).values())
        rows.append((f"{stage.step}: {stage.name}", *map(shown, sizes)))
    header = ("stage", "TFLOP", "device GB", "copied GB", "sent GB", "disk GB")
    header += ("compute s", "copy s", "send s", "disk s")
    processes = f"{request.processes} {'process' if request.processes == 1 else 'processes'}"
    return "\n".join(
        [
            f"{model}: {plan.counts.total / 1e9:.2f} G parameters, {plan.dense_bytes / 1e9:.1f} GB; "
            f"{plan.compressed_bytes / 1e9:.1f} GB without {request.sparsity_ratio:g} % of its layers. "
            f"{request.nsamples} windows of {request.seqlen} tokens to compress, "
            f"{request.importance_nsamples} to score, {request.eval_windows} to measure; {processes}, "
            f"weights {'in host memory' if plan.is_in_memory else 'read layer by layer in each step'}",
            "",
            markdown_table(header, rows),
            *([memory_line("a device", plan.device_bytes(), plan.machine.memory_gib)] if plan.device_bytes() else []),
            memory_line("the host", plan.host_bytes(), plan.machine.host_memory_gib),
            time_line(plan),
            "",
        ]
    )


def memory_line(where: str, parts: Mapping[str, int], capacity_gib: float | None) -> str:
    total = sum(parts.values()) / GIB
    listed = " + ".join(f"{size / GIB:.2f} {name}" for name, size in parts.items())
    fits = "" if capacity_gib is None or total <= capacity_gib else f" - MORE THAN ITS {capacity_gib:.1f}"
    return f"Memory of {where}: {total:.2f} GiB = {listed}{fits}"


def time_line(plan: Plan) -> str:
    steps = plan.steps()
    listed = ", ".join(f"{name} {seconds.one_after_another:.4g}" for name, seconds in steps.items())
    hidden = f"{hidden_s(plan):.4g} if files and copies hide behind the computing"
    return f"Seconds: {listed}; {total_s(plan):.4g} in all, {hidden}"


def summary(plans: Mapping[str, Sequence[Plan]]) -> str:
    """Return a row for each model, with a column of totals for each process count."""
    counts = [plan.request.processes for plan in next(iter(plans.values()))]
    header = ["model", "weights GB", "hidden states GiB", "device GiB", "host GiB", "PFLOP"]
    header += ["importance", "compression", "perplexity", "files, copies"]
    header += [f"total, {count} {'device' if count == 1 else 'devices'}" for count in counts]
    rows = []
    for name, several in plans.items():
        plan = several[0]
        compute = {step: seconds.compute for step, seconds in plan.steps().items()}
        perplexity = compute.get("dense perplexity", 0) + compute.get("compressed perplexity", 0)
        states = hidden_state_bytes(plan.dimensions, plan.work(plan.request.nsamples))
        operations = sum(stage.cost.operations for stage in plan.stages())
        rest = total_s(plan) - sum(compute.values())
        minutes = (compute.get("importance", 0), compute["compression"], perplexity, rest, *map(total_s, several))
        rows.append(
            (
                name,
                f"{plan.dense_bytes / 1e9:.1f}",
                f"{states / GIB:.1f} ({plan.states_place(plan.request.nsamples)})",
                f"{sum(plan.device_bytes().values()) / GIB:.1f}",
                f"{sum(plan.host_bytes().values()) / GIB:.1f}",
                f"{operations / 1e15:.0f}",
                *(f"{value / 60:.1f}" for value in minutes),
            )
        )
    return markdown_table(header, rows) + "\nMinutes; the sizes are those of the first count of devices.\n"


def total_s(plan: Plan) -> float:
    return sum(seconds.one_after_another for seconds in plan.steps().values())


def hidden_s(plan: Plan) -> float:
    return sum(seconds.overlapped for seconds in plan.steps().values())


def shown(value: float) -> str:
    return f"{value:.4g}" if value else ""


if __name__ == "__main__":
    sys.exit(main())
