"""How far the plan is off: one run of `main.py` calibrates it, runs of other shapes and lengths are predicted.

    python benchmarks/plan_check.py --repeats 3 --out results/benchmarks/plan_check.json

Models are random checkpoints, their text is that of the embedded model. Every run is a process of its own, repeated in
turns; of a stage's times the least counts and of the machine's rates the highest, being the least disturbed. Memory is
predicted from the calibrating run too: what it had beside the planned is Python and its libraries. Prints a Markdown
table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from flatllmbench.machines import Machine, measured_machine
from flatllmbench.plan import Plan
from flatllmbench.plan_calibration import efficiency_of, request_of, seconds_by_rate
from flatllmbench.random_checkpoint import write_random_checkpoint
from flatllmbench.records import hardware, versions, write_record
from flatllmbench.tables import markdown_table
from flatllmcore.utils.data_utils import load_text
from flatllmcore.utils.devices import GIB, best_device

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "models" / "pydocs-llama"
CHARACTERS = {"train": 400_000, "test": 40_000}  # tokenising more would take more memory than the work


@dataclass(frozen=True)
class Run:
    """A shape and how many tokens run through it."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    nsamples: int
    seqlen: int
    out_of_core: bool = False

    def config(self) -> PretrainedConfig:
        return LlamaConfig(
            vocab_size=4096,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
        )


CALIBRATION = Run("calibration", 1024, 2816, 2, 16, 16, 32, 256)
PREDICTED = (
    Run("more layers and tokens", 1024, 2816, 4, 16, 16, 96, 256),
    Run("longer windows", 1024, 2816, 2, 16, 16, 16, 1024),
    Run("wider, grouped heads", 2048, 5632, 2, 16, 4, 32, 256),
    Run("narrower", 512, 1408, 8, 8, 8, 64, 256),
    Run("out of core", 1024, 2816, 16, 16, 16, 16, 256, out_of_core=True),
    Run("as wide as Llama-2 7B", 4096, 11008, 1, 32, 32, 8, 256, out_of_core=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    args = parser.parse_args()
    runs = (CALIBRATION, *PREDICTED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        for split, length in CHARACTERS.items():
            (folder / "text" / f"{split}.txt").write_text("\n".join(load_text("pydocs", split).documents)[:length])
        for run in runs:
            write_random_checkpoint(run.config(), folder / run.name, tokenizer_from=TOKENIZER)
        machines, repeats = [], []
        for _ in range(args.repeats):
            machines.append(measured_machine(best_device(), folder))
            repeats.append([compress(run, folder) for run in runs])
    machine = fastest(machines)
    records = [best_record(several) for several in zip(*repeats, strict=True)]
    comparison = compare(runs, records, machine)
    print(report(comparison))
    if args.out is not None:
        facts = {
            "command": " ".join(["python", *sys.argv]),
            "hardware": hardware(best_device()),
            "versions": versions(),
        }
        facts |= {"machine": asdict(machine), "repeats": args.repeats, "runs": [asdict(run) for run in runs]}
        write_record(args.out, facts | comparison)


def compress(run: Run, folder: Path) -> dict[str, Any]:
    """Score, compress, measure and save the run's model by `main.py`; return its record."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name)
        command = [sys.executable, str(ROOT / "main.py"), "--model", str(folder / run.name)]
        command += ["--dataset", str(folder / "text"), "--nsamples", str(run.nsamples), "--seqlen", str(run.seqlen)]
        command += ["--bi_score", str(out / "ranks"), "--save", str(out), "--save_model", str(out / "model")]
        command += ["--out_of_core"] if run.out_of_core else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (path,) = out.glob("*_flatllm_20.json")
        return json.loads(path.read_text())


def fastest(machines: list[Machine]) -> Machine:
    """Return the machine at the best of each rate it was measured at."""
    several = [asdict(machine) for machine in machines]
    rates = {name: max(each[name] for each in several) for name in several[0] if name.endswith(("tflops", "per_s"))}
    return replace(machines[0], **rates)


def best_record(records: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """Return the first record with the least of all records' times and memory."""
    least = {
        field: {name: min(record[field][name] for record in records) for name in records[0][field]}
        for field in ("stages_s", "peak_memory_gib")
    }
    return records[0] | least


def compare(runs: tuple[Run, ...], records: list[dict[str, Any]], machine: Machine) -> dict[str, Any]:
    """Return shares of the bound, and for each run and stage what was bound, predicted and measured."""
    plans = [Plan(request_of(record, run.config()), machine) for run, record in zip(runs, records, strict=True)]
    efficiency = efficiency_of(records[0], runs[0].config(), machine)
    libraries_gib = records[0]["peak_memory_gib"]["host"] - host_gib(plans[0])
    rows = []
    for run, record, plan in zip(runs, records, plans, strict=True):
        bounds = seconds_by_rate(plan)
        predicted = seconds_by_rate(Plan(plan.request, machine, efficiency))
        measured = record["stages_s"]
        stages = [stage for stage in efficiency if stage in measured]
        rows += [row(run.name, f"{stage} s", bounds[stage], predicted[stage], measured[stage]) for stage in stages]
        sums = (sum(times[stage] for stage in stages) for times in (bounds, predicted, measured))
        rows.append(row(run.name, "sum s", *sums))
        memory = (host_gib(plan), host_gib(plan) + libraries_gib, record["peak_memory_gib"]["host"])
        rows.append(row(run.name, "memory GiB", *memory))
    return {"efficiency": efficiency, "rows": rows}


def host_gib(plan: Plan) -> float:
    return sum(plan.host_bytes().values()) / GIB


def row(run: str, quantity: str, bound: float, predicted: float, measured: float) -> dict[str, Any]:
    error_percent = 100 * (predicted / measured - 1)
    values = {"bound": bound, "predicted": predicted, "measured": measured, "error_percent": error_percent}
    return {"run": run, "quantity": quantity} | {name: round(value, 4) for name, value in values.items()}


def report(comparison: Mapping[str, Any]) -> str:
    header = ("run", "quantity", "bound", "predicted", "measured", "error %")
    rows = [
        (
            row["run"],
            row["quantity"],
            *(f"{row[name]:.2f}" for name in ("bound", "predicted", "measured")),
            f"{row['error_percent']:+.0f}",
        )
        for row in comparison["rows"]
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
