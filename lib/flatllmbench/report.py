"""Tables and a picture of what compression cost and gave, made from the records of `main.py`.

    python -m flatllmbench.report demo/logs/*.json --out demo

Writes `README.md` and `perplexity.png` to `--out` and the tables to stdout. Records of runs that compare, alike
in all but the target, share a table; records of importance scoring are passed over.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatllmcore.errors import InputError
from flatllmcore.utils.files import write_atomically

from .command_line import complain
from .plots import plot_perplexity
from .tables import markdown_table

HEADER = (
    "asked, %",
    "removed, %",
    "decoder weights",
    "all parameters",
    "perplexity",
    "÷ dense",
    "calibration, s",
    "whole run, s",
    "peak memory, GiB",
)
NOTES = (
    "Removed: share of the decoder layers' linear weights, Q and K counted. Calibration: the run without loading, "
    "measuring perplexity and saving. Peak memory: of the whole run."
)
BESIDE_CALIBRATION = ("load", "perplexity", "save")


@dataclass(frozen=True)
class Conditions:
    """What runs must share to stand in one table."""

    model: str
    dtype: str
    calibration: str
    evaluation: str
    rank_multiple: int
    hardware: str
    versions: str


@dataclass(frozen=True)
class Compression:
    """One run of `main.py --prune_method flatllm`.

    Attributes:
        asked_percent: Decoder-layer linear weights to remove.
        removed_percent: Those removed.
        decoder_weights: Linear weights of the decoder layers, dense and compressed.
        parameters: All of the model's, dense and compressed.
        perplexity: Dense and compressed.
        peak_memory_gib: By place: ``host``, and ``device`` where that is a GPU.
    """

    conditions: Conditions
    asked_percent: float
    removed_percent: float
    decoder_weights: tuple[int, int]
    parameters: tuple[int, int]
    perplexity: tuple[float, float]
    calibration_s: float
    elapsed_s: float
    peak_memory_gib: Mapping[str, float]
    command: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    try:
        tables = report(args.records, args.out)
    except InputError as error:
        return complain(str(error))
    sys.stdout.write(tables)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flatllmbench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", nargs="+", type=Path, help="JSON records of main.py")
    parser.add_argument("--out", required=True, type=Path, help="folder for README.md and perplexity.png")
    return parser.parse_args(argv)


def report(records: Sequence[Path], out: Path) -> str:
    """Write the report of the records to the folder ``out``; return its tables.

    Raises:
        InputError: If a record cannot be read, or none is about a compression.
    """
    groups: dict[Conditions, list[Compression]] = defaultdict(list)
    for path in records:
        if (run := read_compression(path)) is not None:
            groups[run.conditions].append(run)
    if not groups:
        raise InputError(f"no record of a compression among {', '.join(map(str, records))}")
    for runs in groups.values():
        runs.sort(key=lambda run: run.asked_percent)

    plot_perplexity([(heading(group), curve(runs)) for group, runs in groups.items()], out / "perplexity.png")
    tables = {group: f"## {heading(group)}\n\n{table(runs)}" for group, runs in groups.items()}
    sections = [f"{tables[group]}\n{facts(group, runs)}" for group, runs in groups.items()]
    picture = "![Perplexity against the share of decoder-layer weights kept](perplexity.png)\n"
    write_atomically(out / "README.md", "\n".join(["# Results\n", picture, *sections]).encode())
    return "\n".join(tables.values())


def read_compression(path: Path) -> Compression | None:
    """Return what a record says about a compression, or None when it is about importance scores.

    Raises:
        InputError: If the file is missing or not a record of `main.py`.
    """
    try:
        record = json.loads(path.read_bytes())
        return None if record["request"]["prune_method"] == "bi" else compression(record)
    except OSError as error:
        raise InputError(f"no readable record at {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a record of main.py: {type(error).__name__} {error}") from error


def compression(record: Mapping[str, Any]) -> Compression:
    """Return the record's figures, each beside its dense counterpart where it has one."""
    before, after = record["parameters_before"], record["parameters_after"]
    beside = sum(record["stages_s"].get(stage, 0.0) for stage in BESIDE_CALIBRATION)
    return Compression(
        conditions=conditions(record),
        asked_percent=record["sparsity_ratio"],
        removed_percent=record["achieved_sparsity_percent"],
        decoder_weights=(before["decoder_linear"], after["decoder_linear"]),
        parameters=(before["total"], after["total"]),
        perplexity=(record["perplexity"]["dense"], record["perplexity"]["compressed"]),
        calibration_s=record["elapsed_s"] - beside,
        elapsed_s=record["elapsed_s"],
        peak_memory_gib=record["peak_memory_gib"],
        command=record["command"],
    )


def conditions(record: Mapping[str, Any]) -> Conditions:
    measured, hardware = record["perplexity"], record["hardware"]
    return Conditions(
        model=record["base_model"],
        dtype=record["request"]["dtype"],
        calibration=f"{record['dataset']}, {record['nsamples']} × {record['seqlen']} tokens, seed {record['seed']}",
        evaluation=f"{measured['dataset']}, {measured['windows']} × {measured['seqlen']} tokens",
        rank_multiple=record["rank_multiple"],
        hardware=f"{hardware['device']}, {hardware['system']} {hardware['machine']}",
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )


def heading(group: Conditions) -> str:
    return f"{Path(group.model).name}, calibrated on {group.calibration}"


def table(runs: Sequence[Compression]) -> str:
    """Return a row for the dense model and one per run."""
    dense = runs[0]
    first = ("dense", "0", f"{dense.decoder_weights[0]:,}", f"{dense.parameters[0]:,}", f"{dense.perplexity[0]:.3f}")
    return markdown_table(HEADER, [(*first, "1", "", "", ""), *map(row, runs)])


def row(run: Compression) -> tuple[str, ...]:
    dense, compressed = run.perplexity
    return (
        f"{run.asked_percent:g}",
        f"{run.removed_percent:.3f}",
        f"{run.decoder_weights[1]:,}",
        f"{run.parameters[1]:,}",
        f"{compressed:.3f}",
        f"{compressed / dense:.3f}",
        f"{run.calibration_s:.1f}",
        f"{run.elapsed_s:.1f}",
        ", ".join(f"{place} {gib:.2f}" for place, gib in run.peak_memory_gib.items()),
    )


def facts(group: Conditions, runs: Sequence[Compression]) -> str:
    """Return what the figures of a table hold for, and the commands that gave them."""
    lines = [
        f"- Model: `{group.model}`, `--dtype {group.dtype}`.",
        f"- Calibration: {group.calibration}; ranks and widths in multiples of {group.rank_multiple}.",
        f"- Perplexity: {group.evaluation}.",
        f"- Hardware: {group.hardware}.",
        f"- Versions: {group.versions}.",
        f"- {NOTES}",
    ]
    commands = [run.command for run in runs]
    return "\n".join([*lines, "", "```bash", *commands, "```", ""])


def curve(runs: Sequence[Compression]) -> list[tuple[float, float]]:
    """Return percent of decoder-layer weights kept and perplexity, the dense model's first."""
    return [(100.0, runs[0].perplexity[0]), *((100 - run.removed_percent, run.perplexity[1]) for run in runs)]


if __name__ == "__main__":
    sys.exit(main())
