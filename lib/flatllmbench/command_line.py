"""Command lines made from the table of options, and what the programs share in talking to a terminal."""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from flatllmcore.config import MOST, PATH, SWITCH, Accepted, RunConfig, checked, integer, one_of, option
from flatllmcore.core.importance import IMPORTANCE_FILE
from flatllmcore.core.rank_files import ranks_file
from flatllmcore.errors import InputError, door, show_all_characters
from flatllmcore.methods import METHODS
from flatllmcore.utils.checkpoint import check_output_folder, partial_folder
from flatllmcore.utils.dimensions import STOCK
from flatllmcore.utils.files import check_is_no_folder, check_writable
from flatllmcore.utils.layer_utils import model_name
from flatllmcore.utils.processes import is_rank_0, local_world_size
from flatllmcore.utils.text_sources import has_test_split

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
        20, integer(1, 95), "percentage of the decoder layers' linear weights that is removed, or several", is_list=True
    )
    cal_nsamples: int | None = option(None, integer(1, MOST), "windows of text (128 for scores, 256 to compress)")
    prune_qk: bool | None = option(
        None,
        SWITCH,
        "prune Q and K too: two factors of each are kept, or rotary pairs by damage (flatllm+ does by itself)",
    )
    prune_method: str = option("flatllm", one_of(("bi", *METHODS)), "bi: write importance scores; the others compress")
    save: Path = option(Path("logs"), PATH, "folder for logs and records")
    eval_zero_shot: bool = option(
        False, SWITCH, "evaluate the compressed model on tasks of the evaluation harness (package lm_eval)"
    )
    tasks: list[str] | None = option(
        None,
        TASK_NAMES,
        "tasks or groups of tasks, A,B (the paper's seven, MMLU with 5 examples and the others with none)",
    )
    num_fewshot: int | None = option(
        None, integer(0), "examples before every question (the paper's; others as they are defined)"
    )
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
        method = f"{self.prune_method}_stock" if self.shape == STOCK else self.prune_method
        stage = "bi" if self.prune_method == "bi" else f"{method}_{ratios}"
        return self.save / f"{model_name(self.model)}_{stage}.json"

    def each_ratio(self) -> list["Options"]:
        """Return the options for one ratio after the other; of several each has a folder of its own."""
        if len(self.sparsity_ratio) == 1:
            return [self]
        folders = {p: self.save_model and Path(f"{self.save_model}-{p}") for p in self.sparsity_ratio}
        return [replace(self, sparsity_ratio=[p], save_model=folder) for p, folder in folders.items()]

    def check(self) -> None:
        """Refuse what can be refused without looking at the model."""
        for name, flag in FLAGS.items():
            place = Path(self.model) if name == "model" else getattr(self, name)
            if isinstance(place, Path):
                with door(f"--{flag} {place} is no place", "give another one"):
                    place.resolve()  # RuntimeError of a link to itself
        if self.device is not None and ":" in self.device and local_world_size() > 1:
            raise InputError(f"--device {self.device} is one GPU for several processes; with cuda each has its own")
        for flag in ("tasks", "num_fewshot", "limit", "include_path"):
            if getattr(self, flag) is not None and not self.eval_zero_shot:
                raise InputError(f"--{flag} is about tasks of the evaluation harness; give --eval_zero_shot too")
        unused = {
            "--prune_method bi": self.prune_method == "bi",
            "--prune_qk": self.prune_qk,
            "--bi_score": self.bi_score,
        }
        if self.shape == STOCK and any(unused.values()):
            given = ", ".join(flag for flag, value in unused.items() if value)
            raise InputError(f"--shape stock has Q and K whole and all layers alike, without scores; leave out {given}")
        place = self.score_place
        is_kind_for_scores = place.suffix != ".pt" and not place.match("ranks_*.json")
        if not (is_kind_for_scores or place.is_file()):
            raise InputError(
                f"--bi_score {place} does not exist; give a file that does, a folder, or a .json for scores"
            )
        if self.prune_method == "bi":
            if place.is_file() and not (is_kind_for_scores and place == self.score_file):
                raise InputError(f"--bi_score {place} is a file; scores are written to a folder, or to a .json of them")
            if self.score_file.exists() and not self.overwrite:
                raise InputError(f"{self.score_file} exists; give --overwrite, or another --bi_score")
            return
        for name in [] if self.eval_dataset else self.eval_texts:
            if not has_test_split(name, self.dataset_root):
                raise InputError(f"{name} has no test split to measure perplexity on; name an --eval_dataset")

    def check_places(self) -> None:
        """Refuse places that cannot be written to, and a model folder that another place would be part of."""
        for place in filter(None, (self.save, self.offload_folder)):
            check_writable(place)
        for file in (IMPORTANCE_FILE, *map(ranks_file, self.sparsity_ratio)):
            check_is_no_folder(self.score_place / file)
        for suffix in (".log", ".json"):
            check_is_no_folder(self.record_place.with_suffix(suffix))
        if self.save_model is None:
            return
        out = Path(os.path.realpath(self.save_model))
        places: dict[str, Path | None] = {"save": self.save, "bi_score": self.score_place, "model": Path(self.model)}
        places |= {"offload_folder": self.offload_folder, "cache_dir": self.cache_dir}
        for flag, path in places.items():
            real = Path(os.path.realpath(path or "/"))  # which is part of nothing
            is_part = any(real.is_relative_to(folder) for folder in (out, partial_folder(out)))
            if is_part or (flag == "model" and out.is_relative_to(real)):
                raise InputError(f"--save_model {self.save_model} overlaps with --{flag} {path}; give another folder")
        check_output_folder(self.save_model, self.overwrite)


ROWS = {row.name: row for row in fields(Options)}
_ALIASES = {"cal_dataset": "dataset", "cal_nsamples": "nsamples", "tolerance": "tol"}
_WITHOUT_FLAG = ("target_sparsity", "preserve_qk_layers", "method")
_FIRST = ("model", "prune_method", "sparsity_ratio", "cal_dataset", "eval_dataset", "eval_nsamples", "save_model")
_ORDER = dict.fromkeys((*_FIRST, "tolerance", "cal_nsamples", "prune_qk", *ROWS))
# Names of flags without dashes, by field; those that everybody needs come first.
FLAGS = {name: _ALIASES.get(name, name) for name in _ORDER if name not in _WITHOUT_FLAG}


def parse_options(argv: Sequence[str] | None, description: str) -> tuple[Options, dict[str, Any]]:
    """Return the options of ``main.py``, and the flags as they were given, as JSON takes them."""
    args = parser_with(FLAGS, "main.py", description).parse_args(argv)
    return Options(**read_flags(args, FLAGS)), as_given(args)


def as_given(args: argparse.Namespace) -> dict[str, Any]:
    """Return flags as they were given, as JSON takes them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def command_line(argv: Sequence[str]) -> str:
    """Return what to type for this run with as many processes; on several machines, N numbers them from 0."""
    count, local_count = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count == "1":
        return shlex.join(["python", "main.py", *argv])
    start = ["torchrun", "--nproc_per_node", local_count]
    if count != local_count:
        machines = ["--nnodes", str(int(count) // int(local_count)), "--node_rank", "N"]
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


class LogFile(logging.FileHandler):
    """A log file that is made, folder and all, for its first line; the run ends when it cannot be written."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Let the error that is being handled end the run."""
        raise  # noqa: PLE0704 (called while the error is handled)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log to the console and to the end of a file inside the block, from rank 0 alone; other libraries log errors."""
    transformers.utils.logging.set_verbosity_error()
    show_all_characters()
    keep_bars_to_terminals()
    huggingface_hub.utils.logging.set_verbosity_error()
    os.environ["DATASETS_VERBOSITY"] = "critical"  # read when the library is imported; what it logs it raises too
    for name in ("flatllm", "flatllmcore", "flatllmbench"):
        logging.getLogger(name).setLevel(logging.INFO if is_rank_0() else logging.CRITICAL)
    handlers = (logging.StreamHandler(sys.stdout), LogFile(path, delay=True)) if is_rank_0() else ()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()


def keep_bars_to_terminals() -> None:
    """Let transformers, datasets and the hub draw their bars where stderr is a terminal, and nowhere else."""
    if sys.stderr.isatty() and is_rank_0():
        transformers.utils.logging.enable_progress_bar()
    else:
        transformers.utils.logging.disable_progress_bar()
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
