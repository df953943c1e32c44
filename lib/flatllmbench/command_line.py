"""The command line of `main.py`, and what the programs share in talking to a terminal."""

import argparse
import errno
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers

from flatllmcore.core.rank_allocation import check_sparsity_ratio
from flatllmcore.core.rank_files import IMPORTANCE_FILE
from flatllmcore.errors import InputError
from flatllmcore.utils.checkpoint import check_output_folder
from flatllmcore.utils.data_utils import has_test_split
from flatllmcore.utils.layer_utils import model_name
from flatllmcore.utils.processes import is_first_process, local_process_count

# What a user can mend about a place that cannot be written to.
UNUSABLE_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.EEXIST)


def parse_arguments(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="main.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    what = parser.add_argument_group("model and text")
    what.add_argument("--model", required=True, metavar="MODEL", help="local model folder or hub id")
    what.add_argument(
        "--dataset",
        metavar="TEXT",
        default="wikitext2",
        help="calibration text: wikitext2, c4, alpaca, pydocs, or a file or folder (default: %(default)s)",
    )
    what.add_argument(
        "--eval_dataset", metavar="TEXT", help="text to measure perplexity on (default: the test split of --dataset)"
    )
    what.add_argument("--dataset_root", type=Path, metavar="DIR", help="folder with local copies of the named datasets")
    what.add_argument(
        "--cache_dir", type=Path, metavar="DIR", help="where hub downloads are kept (default: the hub's own)"
    )

    how = parser.add_argument_group("compression")
    how.add_argument(
        "--prune_method",
        choices=("bi", "flatllm"),
        default="flatllm",
        help="bi: write importance scores; flatllm: compress (default: %(default)s)",
    )
    how.add_argument(
        "--sparsity_ratio",
        type=int,
        default=20,
        metavar="P",
        help="percentage of decoder-layer linear parameters removed, 1-95 (default: %(default)s)",
    )
    how.add_argument(
        "--bi_score",
        type=Path,
        metavar="PATH",
        help="folder of importance.json and ranks_<percent>.json, or one such file (default: ranks/<model>)",
    )
    how.add_argument(
        "--rank_multiple",
        type=int,
        metavar="M",
        help="round ranks and widths to multiples of this (default: 8 if heads are 64 wide or more, else 1)",
    )
    how.add_argument(
        "--prune_qk",
        action="store_true",
        help="prune Q and K too, each kept as two factors (default: leave them whole, as published)",
    )
    how.add_argument(
        "--tol",
        type=float,
        default=0.96,
        metavar="SHARE",
        help="share of eigenvalue mass whose rank is logged for comparison; changes nothing (default: %(default)s)",
    )

    sampling = parser.add_argument_group("calibration")
    sampling.add_argument(
        "--nsamples", type=int, metavar="N", help="windows of text (default: 128 for scores, 256 to compress)"
    )
    sampling.add_argument(
        "--seqlen", type=int, metavar="N", help="tokens per window (default: 4096, or less if the model takes less)"
    )
    sampling.add_argument(
        "--seed", type=int, default=42, metavar="N", help="seed of the sampling (default: %(default)s)"
    )
    sampling.add_argument(
        "--batch_size", type=int, metavar="N", help="windows run at a time (default: about 4096 tokens)"
    )

    where = parser.add_argument_group("machine and output")
    add_machine_flags(where)
    where.add_argument(
        "--out_of_core",
        action="store_true",
        help="read layers from disk one at a time (default: if the weights take over half of the host memory)",
    )
    where.add_argument(
        "--host_memory_gib",
        type=float,
        metavar="N",
        help="host memory to plan with, per process (default: what is free, shared by the processes)",
    )
    where.add_argument(
        "--offload_folder",
        type=Path,
        metavar="DIR",
        help="where hidden states go that memory is too small for (default: the system's temporary folder)",
    )
    where.add_argument(
        "--save_model", type=Path, metavar="DIR", help="folder for the compressed model (default: a temporary one)"
    )
    where.add_argument("--overwrite", action="store_true", help="replace scores or a model folder that exist")

    evaluation = parser.add_argument_group("zero-shot evaluation")
    evaluation.add_argument(
        "--eval_zero_shot",
        action="store_true",
        help="evaluate the compressed model on tasks of the evaluation harness (needs the package lm_eval)",
    )
    add_task_flags(evaluation, "--eval_batch_size")

    args = parser.parse_args(argv)
    if args.bi_score is None:
        args.bi_score = Path("ranks") / model_name(args.model)
    return args


def add_machine_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags about device, precision and records."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32", "float64"),
        default="auto",
        metavar="TYPE",
        help="of the weights, in the run and in the result: %(choices)s (default: the checkpoint's own)",
    )
    parser.add_argument(
        "--save", type=Path, default=Path("logs"), metavar="DIR", help="folder for logs and records (default: logs)"
    )


def add_task_flags(parser: argparse._ActionsContainer, batch_size_flag: str) -> None:
    """Add the flags about tasks of the evaluation harness, named as the harness's own."""
    parser.add_argument(
        "--tasks",
        type=lambda names: names.split(","),
        metavar="A,B",
        help="tasks or groups of tasks (default: the paper's seven, MMLU with 5 examples and the others with none)",
    )
    parser.add_argument(
        "--num_fewshot",
        type=int,
        metavar="N",
        help="examples before every question (default: the paper's, and for other tasks as they are defined)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="questions of every task, for a trial (default: all)")
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="folder with task definitions of your own")
    parser.add_argument(
        batch_size_flag,
        dest="eval_batch_size",
        type=int,
        default=8,
        metavar="N",
        help="questions run at a time (default: %(default)s)",
    )


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can be refused without looking at the model; fill in the default evaluation text."""
    check_sparsity_ratio(args.sparsity_ratio)
    if args.device is not None and ":" in args.device and local_process_count() > 1:
        raise InputError(f"--device {args.device} is one GPU for several processes; with cuda each has its own")
    for name in ("nsamples", "batch_size", "rank_multiple"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is out of range; 1 or more is accepted")
    if not 0 < args.tol <= 1:
        raise InputError(f"--tol {args.tol} is out of range; a share above 0 and at most 1 is accepted")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed} is out of range; 0 to 2^63 - 1 is accepted")
    if args.save_model is not None:
        check_output_folder(args.save_model, args.overwrite)
        model, out = Path(args.model).resolve(), args.save_model.resolve()
        if model == out or out in model.parents or model in out.parents:
            raise InputError(f"--save_model {args.save_model} and --model {args.model} overlap; give another folder")
    if args.host_memory_gib is not None and args.host_memory_gib < 0:
        raise InputError(f"--host_memory_gib {args.host_memory_gib} is out of range; 0 or more is accepted")
    given = [flag for flag in ("tasks", "num_fewshot", "limit", "include_path") if getattr(args, flag) is not None]
    if given and not args.eval_zero_shot:
        raise InputError(f"--{given[0]} is about tasks of the evaluation harness; give --eval_zero_shot too")
    check_task_flags(args)
    check_score_place(args)
    if args.eval_dataset is None:
        if args.prune_method == "flatllm" and not has_test_split(args.dataset, args.dataset_root):
            raise InputError(f"{args.dataset} has no test split to measure perplexity on; name one with --eval_dataset")
        args.eval_dataset = args.dataset


def check_task_flags(args: argparse.Namespace) -> None:
    """Refuse flags about tasks that are wrong whatever the tasks are."""
    for name, lowest in (("num_fewshot", 0), ("limit", 1), ("eval_batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise InputError(f"--{name} {value} is out of range; {lowest} or more is accepted")
    if args.include_path is not None and not args.include_path.is_dir():
        raise InputError(f"--include_path {args.include_path} is no folder; give one that holds task definitions")


def check_score_place(args: argparse.Namespace) -> None:
    """Refuse a --bi_score that cannot be read, or written to, as it is meant."""
    is_file_name = args.bi_score.suffix in (".json", ".pt")
    if args.prune_method == "flatllm":
        if is_file_name and not args.bi_score.is_file():
            raise InputError(f"--bi_score {args.bi_score} does not exist; give an existing file, or a folder")
        return
    if is_file_name or args.bi_score.is_file():
        raise InputError(f"--bi_score {args.bi_score} is a file; scores are written to a folder, as {IMPORTANCE_FILE}")
    place = args.bi_score / IMPORTANCE_FILE
    if place.exists() and not args.overwrite:
        raise InputError(f"{place} exists; give --overwrite to score anew, or another --bi_score")


def run_name(args: argparse.Namespace) -> str:
    stage = "bi" if args.prune_method == "bi" else f"flatllm_{args.sparsity_ratio}"
    return f"{model_name(args.model)}_{stage}"


def request(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON takes them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


class LogFile(logging.FileHandler):
    """A log file that is made, folder and all, for its first line; the run ends when it cannot be written."""

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return super()._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        raise  # noqa: PLE0704 (called while the error is handled)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Log to the console and to the end of a file, and keep other libraries to their warnings, inside the block.

    Of a group of processes, the first one alone logs.
    """
    transformers.utils.logging.set_verbosity_error()
    keep_bars_to_terminals()
    huggingface_hub.utils.logging.set_verbosity_error()
    package_loggers = [logging.getLogger(name) for name in ("flatllm", "flatllmcore", "flatllmbench")]
    for package_logger in package_loggers:
        package_logger.setLevel(logging.INFO if is_first_process() else logging.CRITICAL)
    handlers = (logging.StreamHandler(sys.stdout), LogFile(path, delay=True)) if is_first_process() else ()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()
        for package_logger in package_loggers:
            package_logger.setLevel(logging.NOTSET)


def keep_bars_to_terminals() -> None:
    """Let transformers and the hub draw their progress bars where stderr is a terminal, and nowhere else."""
    if sys.stderr.isatty() and is_first_process():
        transformers.utils.logging.enable_progress_bar()
    else:
        transformers.utils.logging.disable_progress_bar()


def run_program(work: Callable[[], None], place: Path) -> int:
    """Do a program's work; return its exit status: 0, or 2 after one line on stderr about what the user can mend.

    Args:
        work: Can be done again from the start after an interruption.
        place: Where it writes; named when an error about a file does not say which.
    """
    try:
        work()
    except InputError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain("interrupted; run it again")
    except OSError as error:
        if error.errno not in UNUSABLE_PLACE:
            raise
        return complain(f"{error.strerror}: {error.filename or place}")
    return 0


def complain(message: str) -> int:
    """Say in one line what was unusable; return the exit status that goes with it."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2
