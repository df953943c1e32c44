"""The report of measured runs beside published figures, made from the records that the programs write.

    python -m flatllmbench.report results/records --out results
    python -m flatllmbench.report logs/*.json --out report

Writes `README.md`, `index.html` (the same as one page that needs no other file) and the pictures to `--out`, and
the tables of compressions to stdout. A folder stands for all records below it.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from flatllmcore.utils.files import write_atomically

from .command_line import run_program
from .comparison import other_figures_section, table_1_section
from .measured import accuracy_tables, compression_tables, scoring_table, speed_tables, stage_table
from .page import html_page
from .plots import pictures_of
from .runs import Run, read_runs
from .tables import NOT_RUN

_CAPTIONS = {
    "perplexity.png": "Perplexity against the share of decoder-layer weights kept",
    "kept_share.png": "Share kept per layer",
    "speedup.png": "Speed-up against the share removed, with quartiles, and what operations and bytes predict",
    "time.png": "Where the time went",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    return run_program(lambda: make_report(args.records, args.out), args.out)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flatllmbench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS", help="records, or folders of them")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), metavar="DIR", help="folder for the report (default: %(default)s)"
    )
    return parser.parse_args(argv)


def make_report(records: Sequence[Path], out: Path) -> None:
    """Write the report of the records and print its tables of compressions."""
    runs = read_runs(records)
    write_report(runs, out)
    sys.stdout.write(f"{compression_tables(runs)}\nthe report is in {out}: README.md, index.html\n")


def write_report(runs: Sequence[Run], out: Path) -> None:
    """Write README.md, index.html and the pictures of ``runs`` to the folder ``out``."""
    pictures = pictures_of(runs)
    markdown = report(runs, pictures)
    for name in _CAPTIONS:
        if name in pictures:
            write_atomically(out / name, pictures[name])
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier report
    write_atomically(out / "README.md", markdown.encode())
    write_atomically(out / "index.html", html_page(markdown, pictures).encode())


def report(runs: Sequence[Run], pictures: Collection[str]) -> str:
    """Return the report in Markdown.

    Args:
        runs: What was measured.
        pictures: Names of the pictures there are; for the others it says that there is nothing to draw.
    """

    def picture(name: str) -> str:
        return f"![{_CAPTIONS[name]}]({name})\n" if name in pictures else f"{_CAPTIONS[name]}: {NOT_RUN}.\n"

    return "\n".join(
        [
            "# Results\n",
            "Made from records by `python -m flatllmbench.report`, as README.md and as one page, "
            "[index.html](index.html), whose tables sort by a click on a heading. Cells of what was not measured here "
            f'say "{NOT_RUN}"; – stands where there is nothing to say.\n',
            table_1_section(runs),
            other_figures_section(runs),
            "## Perplexity, size, time and memory\n",
            picture("perplexity.png"),
            compression_tables(runs),
            "## Layers and stages\n",
            picture("kept_share.png"),
            picture("time.png"),
            stage_table(runs),
            "## Importance of layers\n",
            scoring_table(runs),
            "## Zero-shot and few-shot accuracy\n",
            accuracy_tables(runs),
            "## Speed and memory\n",
            picture("speedup.png"),
            speed_tables(runs),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
