"""The report of measured runs beside published figures, made from the records that the programs write.

    python -m flatllmbench.report results/records --out results

Writes `README.md` and `perplexity.png` to `--out`, and the tables of compressions to stdout.
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from flatllmcore.config import checked
from flatllmcore.errors import InputError, door, run_program
from flatllmcore.utils.files import read_json, replacing, write_atomically
from flatllmcore.utils.names import model_name

from .command_line import ROWS
from .plots import PICTURE_MARK, draw_perplexity
from .records import Record, as_evaluation, flat, identity, of_kind, settings
from .tables import KINDS, NOT_RUN, NOT_THERE, figure, markdown_table, measured_tables

_REPORT = """\
# Results

Made from records by `python -m flatllmbench.report`. What was not measured says "not run"; – stands where there is
nothing to say. Removed: of the linear weights in decoder layers, Q and K counted. Whole run: of several ratios in one
command, what they share (text, scores, the dense model's perplexity) counts for the first.

## Table 1 of the paper, and ours

20 % of the decoder layers' linear weights removed; WikiText-2 perplexity at length 4096; accuracy in percent, mean of
MMLU (5-shot) and PIQA, WinoGrande, HellaSwag, ARC-e, ARC-c, OpenBookQA (0-shot). Published: Tian et al., arXiv
2505.23966, Table 1. A run stands here when model, share removed, length and text are these, whatever came out: a
positive difference in perplexity, or a negative one in accuracy, is a miss. What was not run takes the weights and
`bash scripts/llama_7b.sh` or its siblings, then `scripts/eval.sh` for accuracy.

Outside the table, MoDeGPT (Lin et al., arXiv 2408.09632, 4 to 8 hours of calibration), perplexity at 10 to 50 %:
Llama-2 7B 5.48, 6.16, 7.51, 8.41, 11.88; 13B 4.83, 5.29, 6.10, 6.95, 8.95. Published minutes of calibration, Llama-2
13B on one A100: FLAT-LLM 15, SliceGPT 35, SVD-LLM 27, FLAP 10.

{table_1}
## Compression

{picture}{compression}
## Zero-shot and few-shot accuracy

In percent where the metric is an accuracy; ± is the harness's standard error; the mean is over the tasks in the row.

{zero_shot}
## Speed

Medians over interleaved repeats, quartiles in brackets; beside the ratios what arithmetic predicts, of prefill by
operations and of decoding by bytes. Peak memory: of a GPU. Published, by SliceGPT's protocol (Llama-2 7B, batch 128,
256 tokens): decoding 1.04, 1.10, 1.11, 1.17 and 1.23 times as fast at 10 to 50 %, the middle three read off a plot.

{speed}"""
_PICTURE = "![Perplexity and accuracy against the share of decoder-layer weights kept](perplexity.png)\n\n"
# Published perplexity and mean accuracy, a column for each of MODELS.
MODELS = ("Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf", "Mistral-7B-v0.1", "Meta-Llama-3-8B")
TABLE_1: dict[str, tuple[tuple[float, float] | None, ...]] = {
    "dense": ((5.11, 62.14), (4.57, 65.70), (3.12, 71.38), (4.92, 68.14), (5.75, 68.14)),
    "LLM-Pruner": ((10.55, 53.89), (9.67, 55.45), None, None, None),
    "FLAP": ((6.76, 53.07), (5.90, 57.00), (8.76, 48.29), (7.11, 48.29), (8.42, 54.42)),
    "SliceGPT": ((8.24, 46.26), (7.10, 50.58), (5.76, 57.40), (9.06, 43.18), (16.62, 41.28)),
    "SVD-LLM": ((7.84, 52.32), (7.37, 55.86), (5.96, 61.07), (9.29, 50.23), (17.17, 47.06)),
    "FLAT-LLM": ((6.70, 55.16), (5.55, 63.00), (4.33, 67.98), (6.11, 58.54), (8.15, 61.47)),
}
_OURS = {"dense": "dense", "FLAT-LLM": "compressed"}  # rows that our runs stand in, and their perplexity in a record


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    return run_program(lambda: write_report(read_records(args.records), args.out), args.out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Make README.md and its picture from records.")
    parser.add_argument("records", nargs="+", metavar="RECORDS", help="records, or folders of them")
    parser.add_argument("--out", default=Path("out"), metavar="DIR", help="(default: %(default)s)")
    return parser.parse_args(argv)


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Return the records of files, each once and fit for a page; a folder stands for all ``*.json`` files below it."""
    files: list[Path] = []
    for path in (checked(ROWS["save"], path, "RECORDS") for path in paths):
        files += sorted(filter(Path.is_file, path.rglob("*.json"))) if path.is_dir() else [path]
    if not files:
        raise InputError(f"no records in {', '.join(map(str, paths))}: expected *.json files")
    records = {path: read_json(path, dict[str, Any]) for path in files}
    for path, record in records.items():
        try:
            records[path] = flat(record)
            page([records[path]])
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            problem = f"the field {error} is missing" if isinstance(error, KeyError) else error
            raise InputError(f"{path} is not usable: {problem}") from error
    return list(records.values())


def page(runs: Sequence[Record]) -> bytes:
    """Return README.md."""
    picture = _PICTURE if of_kind(runs, "compression") else ""
    tables = {kind: measured_tables(runs, kind) for kind in KINDS}
    return _REPORT.format(**tables, table_1=table_1(runs), picture=picture).encode()


def write_report(runs: Sequence[Record], out: Path) -> None:
    """Write README.md and its picture, and print their tables of compressions."""
    out = checked(ROWS["save"], out, "--out")
    markdown, is_drawn, place = page(runs), bool(of_kind(runs, "compression")), out / "README.md"
    if place.is_file() and not place.read_bytes().startswith(_REPORT.partition("`")[0].encode()):
        raise InputError(f"{place} is no report; give another folder by --out")
    shown = out / "perplexity.png"
    if is_drawn and shown.is_file() and not place.is_file() and PICTURE_MARK not in shown.read_bytes():
        raise InputError(f"{shown} is of no report; give another folder by --out")
    with door("the perplexities cannot be drawn", "accepted: those of runs that ended well"):
        picture = draw_perplexity(runs) if is_drawn else b""
    with replacing(place) as file:  # it takes its place after the picture, or neither does
        file.write(markdown)
        if is_drawn:
            write_atomically(shown, picture)
    sys.stdout.write(f"{measured_tables(runs, 'compression')}\nthe report is {place}\n")


def table_1(runs: Sequence[Record]) -> str:
    """Return the paper's Table 1 with our runs in it: a row per model and method, and where we have some, per run."""
    header = ("model", "method", "perplexity", "here", "difference", "accuracy", "here", "difference", "settings here")
    ran = (run for run in of_kind(runs, "zero_shot") if run.get("zero_shot.mean_accuracy") is not None)
    accuracies: dict[Any, float] = {(run["model.model"], *identity(run)): run["zero_shot.mean_accuracy"] for run in ran}
    rows: list[Sequence[str]] = []
    for (place, model), (method, published) in product(enumerate(MODELS), TABLE_1.items()):
        if (theirs := published[place]) is None:
            continue
        perplexity, accuracy = theirs
        if method not in _OURS:
            rows.append((model, method, figure(perplexity), *2 * [NOT_THERE], figure(accuracy), *3 * [NOT_THERE]))
            continue
        ours: list[Record | None] = [run for run in of_kind(runs, "flatllm") if _as_published(run, model)]
        for run in ours or [None]:
            evaluated = as_evaluation(run) if run else None
            compressed = evaluated and (evaluated["model.model"], *identity(evaluated))
            found = accuracies.get((model, model, None, 0.0) if method == "dense" else compressed)
            measured = _as_published(run, model)[_OURS[method]] if run else None
            cells = _beside(perplexity, measured) + _beside(accuracy, found)
            rows.append((model, method, *cells, settings(run) if run else NOT_RUN))
    return markdown_table(header, rows)


def _beside(theirs: float, ours: float | None) -> tuple[str, str, str]:
    """Return a published figure, ours and the difference."""
    difference = None if ours is None else round(round(ours, 2) - theirs, 2) + 0.0  # no -0.00
    return figure(theirs), figure(ours), figure(difference, "+.2f")


def _as_published(run: Record, model: str) -> Record:
    """Return a run's perplexities on the published text if it is one at the published settings, else nothing."""
    text = "wikitext2", 4096
    if (model_name(run["base_model"]), run["sparsity_ratio"], run["dataset"], run["seqlen"]) != (model, 20, *text):
        return {}
    return next((of for of in run["perplexity"] if (of["dataset"], of["seqlen"]) == text), {})


if __name__ == "__main__":
    sys.exit(main())
