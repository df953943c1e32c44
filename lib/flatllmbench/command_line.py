"""Command lines made from the table of options. No torch here: they are read before it is imported."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from flatllmcore.config import MOST, PATH, SWITCH, Accepted, RunConfig, checked, integer, one_of, option
from flatllmcore.errors import run_program
from flatllmcore.methods import METHODS
from flatllmcore.utils.names import ANGULAR, STOCK, model_name

FOLDER = Accepted("a folder that is there", os.path.isdir, os.path.expanduser)
TASK_NAMES = Accepted(
    "tasks of the evaluation harness, comma-separated",
    lambda value: isinstance(value, str | list),
    lambda value: value.split(",") if isinstance(value, str) else value,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Options(RunConfig):
    """The options of ``main.py``: those of the run, the stage, and the evaluation of what came of it.

    ``sparsity_ratio``, ``prune_qk`` and ``prune_method`` decide the library's ``target_sparsity``,
    ``preserve_qk_layers`` and ``method``, which are not given beside them.
    """

    sparsity_ratio: list[int] = option(
        20, integer(1, 95), "percent of the decoder layers' linear weights to remove, 1 to 95, or several", is_list=True
    )
    cal_nsamples: int | None = option(None, integer(1, MOST), "windows of text (128 for scores, 256 to compress)")
    prune_qk: bool | None = option(
        None,
        SWITCH,
        "prune Q and K too: two factors of each are kept, or rotary pairs by damage (flatllm+ does by itself)",
    )
    prune_method: str = option("flatllm", one_of(("bi", *METHODS)), "flatllm, flatllm+: compress; bi: write scores")
    save: Path = option(Path("logs"), PATH, "folder for logs and records")
    eval_zero_shot: bool = option(
        False, SWITCH, "evaluate the compressed model on tasks of the evaluation harness (package lm_eval)"
    )
    tasks: list[str] | None = option(
        None,
        TASK_NAMES,
        "tasks or groups of tasks, A,B (the paper's seven: MMLU with 5 examples, the others with none)",
    )
    num_fewshot: int | None = option(None, integer(0), "examples before each question (the paper's, or as defined)")
    limit: int | None = option(None, integer(1), "questions of every task, for a trial (all)")
    include_path: str | None = option(None, FOLDER, "folder with task definitions of your own")
    eval_batch_size: int = option(8, integer(1), "questions run at a time")

    def __post_init__(self) -> None:
        if self.prune_qk is not None:
            object.__setattr__(self, "preserve_qk_layers", not self.prune_qk)
        if self.prune_method != "bi":
            object.__setattr__(self, "method", self.prune_method)
        super().__post_init__()
        object.__setattr__(self, "sparsity_ratio", list(dict.fromkeys(self.sparsity_ratio)))
        object.__setattr__(self, "target_sparsity", self.sparsity_ratio[0] / 100)

    @property
    def record_place(self) -> Path:
        """Where the record goes, and with another suffix the log, which several ratios share."""
        ratios = "-".join(map(str, dict.fromkeys((min(self.sparsity_ratio), max(self.sparsity_ratio)))))
        scores = "" if self.importance_method == ANGULAR else f"_{self.importance_method}"
        shape = "_stock" if self.shape == STOCK else ""
        stage = f"{self.prune_method}{scores if self.prune_method == 'bi' else f'{shape}_{ratios}'}"
        return self.save / f"{model_name(self.model)}_{stage}.json"

    def each_ratio(self) -> list["Options"]:
        """Return the options for one ratio after the other; of several each has a folder of its own."""
        if len(self.sparsity_ratio) == 1:
            return [self]
        folders = {p: self.save_model and Path(f"{self.save_model}-{p}") for p in self.sparsity_ratio}
        return [replace(self, sparsity_ratio=[p], save_model=folder) for p, folder in folders.items()]


ROWS = {row.name: row for row in fields(Options)}
_ALIASES = {"cal_dataset": "dataset", "cal_nsamples": "nsamples", "tolerance": "tol"}
_FIRST = ("model", "prune_method", "sparsity_ratio", "cal_dataset", "eval_dataset", "eval_nsamples", "save_model")
_ORDER = dict.fromkeys((*_FIRST, "tolerance", "cal_nsamples", "prune_qk", *ROWS))
# Names of flags without dashes, by field; those that everybody needs come first.
FLAGS = {of: _ALIASES.get(of, of) for of in _ORDER if of not in ("target_sparsity", "preserve_qk_layers", "method")}


def parse_options(argv: Sequence[str] | None, description: str) -> tuple[Options, dict[str, Any]]:
    """Return the options of ``main.py``, and the flags as they were given, as JSON takes them."""
    args = parser_with(FLAGS, "main.py", description).parse_args(argv)
    return Options(**read_flags(args, FLAGS)), as_given(args)


def answer_at_once(description: str) -> None:
    """End ``main.py`` if its flags ask for help or cannot be used, before what it imports takes seconds.

    Several processes are left to say what is wrong once, as a group.
    """
    if "WORLD_SIZE" not in os.environ and (status := run_program(lambda: parse_options(None, description))):
        sys.exit(status)


def as_given(args: argparse.Namespace) -> dict[str, Any]:
    """Return flags as they were given, as JSON takes them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def command_line(argv: Sequence[str]) -> str:
    """Return what to type for this run with as many processes; on several machines, N numbers them from 0."""
    count, local_count = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count == 1:
        return shlex.join(["python", "main.py", *argv])
    start = ["torchrun", "--nproc_per_node", str(local_count)]
    if count != local_count:
        machines = ["--nnodes", str(count // local_count), "--node_rank", "N"]
        start += [*machines, "--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"]]
    return shlex.join([*start, "main.py", *argv])


def parser_with(flags: Mapping[str, str], program: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with flags: their names, without dashes, by the fields of :class:`Options` they stand for."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, description=description, formatter_class=layout)
    for name, flag in flags.items():
        row, accepted = ROWS[name], ROWS[name].metadata["accepted"]
        shown = "" if row.default in (None, False, MISSING) else f" (default: {row.default})"
        text = f"{row.metadata['help']}{shown}".replace("%", "%%")
        if accepted is SWITCH:
            action = "store_true" if row.default is False else argparse.BooleanOptionalAction
            parser.add_argument(f"--{flag}", action=action, default=row.default, help=text)
        elif row.default is MISSING:
            parser.add_argument(f"--{flag}", required=True, help=text)
        else:
            count = "+" if row.metadata["is_list"] else None
            parser.add_argument(f"--{flag}", nargs=count, type=accepted.convert, default=row.default, help=text)
    return parser


def read_flags(args: argparse.Namespace, flags: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of flags that :func:`parser_with` gave, checked, by field."""
    return {name: checked(ROWS[name], getattr(args, flag), f"--{flag}") for name, flag in flags.items()}
