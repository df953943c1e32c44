"""The report of measured runs beside published figures, made from the records that the programs write.

    python -m flatllmbench.report results/records --out results
    python -m flatllmbench.report logs/*.json --out report

Writes `README.md` and `perplexity.png` to `--out`, and the tables of compressions to stdout. A folder stands for all
records below it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flatllmcore.utils.files import write_atomically

from .command_line import run_program
from .measured import accuracy_tables, compression_tables, speed_tables
from .plots import draw_perplexity
from .published import ABOUT, ABOUT_SPEED, table_1
from .runs import Record, of_kind, read_records

_PICTURE = "![Perplexity against the share of decoder-layer weights kept](perplexity.png)\n\n"
_REPORT = """\
# Results

Made from records by `python -m flatllmbench.report`. What was not measured says "not run"; – stands where there is
nothing to say. Removed: of the linear weights in decoder layers, Q and K counted.

## Table 1 of the paper, and ours

{about}
{table_1}
## Compression

{picture}{compressions}
## Zero-shot and few-shot accuracy

In percent where the metric is an accuracy; ± is the harness's standard error.

{accuracies}
## Speed

{about_speed}
{speeds}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    return run_program(lambda: write_report(read_records(args.records), args.out), args.out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description="Make README.md and its picture from records.")
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS", help="records, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="(default: %(default)s)")
    return parser.parse_args(argv)


def write_report(runs: Sequence[Record], out: Path) -> None:
    """Write README.md and its picture, and print their tables of compressions."""
    has_curve = bool(of_kind(runs, "flatllm"))
    markdown = _REPORT.format(
        about=ABOUT,
        table_1=table_1(runs),
        picture=_PICTURE if has_curve else "",
        compressions=compression_tables(runs),
        accuracies=accuracy_tables(runs),
        about_speed=ABOUT_SPEED,
        speeds=speed_tables(runs),
    )
    if has_curve:
        write_atomically(out / "perplexity.png", draw_perplexity(runs))
    write_atomically(out / "README.md", markdown.encode())
    sys.stdout.write(f"{compression_tables(runs)}\nthe report is {out / 'README.md'}\n")


if __name__ == "__main__":
    sys.exit(main())
