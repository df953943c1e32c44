"""Zero-shot and few-shot results of a dense or compressed model, by the evaluation harness as EleutherAI releases it.

    python -m flatllmbench.zero_shot out/llama-2-7b-20
    python -m flatllmbench.zero_shot models/pydocs-llama --tasks pydocs_endings,pydocs_text --include_path tests/tasks

Without `--tasks` it runs the paper's seven, with the paper's numbers of examples. The paper does not say of each task
which accuracy it means; `PAPER_TASKS` does as SliceGPT: normalised by length where the harness has that. Whatever the
type of the weights, log-likelihoods are sums of float32 log-probabilities, as they are by
`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True,softmax_dtype=float32`.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch

from flatllmcore.config import checked
from flatllmcore.errors import InputError, door, run_program
from flatllmcore.utils.devices import computed_in, parse_device
from flatllmcore.utils.loading import load_model, load_tokenizer
from flatllmcore.utils.progress import bars_on_terminals_alone

from .command_line import ROWS, parser_with, read_flags
from .provenance import describe_model, hardware, keep_record

# Examples before every question, and the metric that is reported.
PAPER_TASKS = dict.fromkeys(
    ("mmlu", "piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge", "openbookqa"), (0, "acc_norm")
) | {"mmlu": (5, "acc"), "winogrande": (0, "acc")}
_FIELDS = ("tasks", "num_fewshot", "limit", "include_path", "dataset_root", "eval_batch_size", "device", "dtype")
FLAGS = {field: field.removeprefix("eval_") for field in (*_FIELDS, "save", "cache_dir")}
logger = logging.getLogger("flatllmbench.zero_shot")  # also where this file is the program


def load_tasks(
    names: Sequence[str] | None = None,
    num_fewshot: int | None = None,
    include_path: Path | str | None = None,
    dataset_root: Path | None = None,
) -> dict[str, Any]:
    """Return the harness's tasks, and its groups that have a score, with their data, by name; see the flags' help.

    One question of each is put together: what does not work is an InputError before a model is touched. Definitions in
    ``include_path`` replace the harness's own where names are equal; ``dataset_root`` has folders called as hub ids.
    """
    try:
        import accelerate  # noqa: F401 (needed with the model, which is too late to say so)
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"evaluation needs {error.name}; from the repository: pip install '.[eval]'") from error
    manager = TaskManager(include_path=include_path)
    chosen: dict[str, Any] = {}
    for name in PAPER_TASKS if names is None else dict.fromkeys(names):
        remedy = "give another, or mend its definition or data"  # its author's templates and code, and data of anywhere
        with door(f"task {name!r} cannot be set up", remedy), bars_on_terminals_alone(), _local_data(dataset_root):
            found = manager.load([name])
            for task in found["tasks"].values():
                defined = task.get_config("num_fewshot")
                own = PAPER_TASKS[name][0] if name in PAPER_TASKS else defined or 0
                shots = own if num_fewshot is None else num_fewshot
                task.set_config("num_fewshot", 0 if defined == 0 else shots)  # defined with none keeps to that
                task.build_all_requests(limit=1, rank=0, world_size=1)
            group = found["groups"].get(name)
            chosen |= {name: group} if group is not None and group.has_aggregation else found["tasks"]
            manager.load(list(chosen.values()))  # refuses a task that is in two of them
    return chosen


@contextmanager
def _local_data(root: Path | None) -> Iterator[None]:
    """Have the tasks that are set up meanwhile find their data below ``root``, if there is one, and not on the hub."""
    import datasets

    load = datasets.load_dataset

    def load_copy(path: str, **options: Any) -> Any:
        if root is None or "data_files" in options:
            return load(path, **options)
        if not (root / path).is_dir():
            raise FileNotFoundError(f"no copy of {path} in {root / path}")
        found = load(str(root / path), **options)
        found.setdefault("train", next(iter(found.values())).select([]))  # read for examples, also where none are asked
        return found

    with patch.object(datasets, "load_dataset", load_copy):
        yield


def evaluate_saved(
    model: str, tasks: Mapping[str, Any], device: torch.device, batch_size: int, limit: int | None, **loading: Any
) -> dict[str, Any]:
    """Return the results of a model in a folder or at a hub id, which is loaded by ``load_model(model, **loading)``.

    ``limit`` is a number of questions of every task. ``mean_accuracy`` is in percent, ``None`` unless the paper's tasks
    all ran in full under the paper's protocol. A model whose logits are not finite is refused.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is chosen here
    tokenizer = load_tokenizer(model, cache_dir=loading.get("cache_dir"))
    loaded = load_model(model, **loading).to(device)
    if computed_in(loaded.dtype, device) == torch.float32:  # buffers too, which keep a wider type than halves
        loaded.float()
    loaded.register_forward_hook(_refuse_logits_that_are_not_finite)
    harnessed = HFLM(loaded, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    known = TaskManager(include_defaults=False)  # they are loaded
    if harnessed.prefix_token_id is None:
        raise InputError(f"the tokenizer at {model!r} has no BOS or EOS token; the harness puts one before each text")
    length = f"what fits its {harnessed.max_length} tokens of context is accepted"
    with bars_on_terminals_alone(), door(f"the harness cannot evaluate {model!r}", length):
        found = simple_evaluate(harnessed, tasks=[*tasks.values()], limit=limit, task_manager=known, log_samples=False)
    results = {name: _result(name, task, found) for name, task in tasks.items()}
    paper = [row["value"] for n, row in results.items() if (row["num_fewshot"], row["metric"]) == PAPER_TASKS.get(n)]
    return {
        "tasks": results,
        "mean_accuracy": 100 * mean(paper) if limit is None and len(paper) == len(PAPER_TASKS) else None,
        "harness": f"lm_eval {version('lm_eval')}",
    }


def _refuse_logits_that_are_not_finite(_model: Any, _inputs: Any, outputs: Any) -> None:
    if not torch.isfinite(outputs.logits).all():  # the harness takes them for answers
        raise InputError(f"the model gives NaN or infinite logits in {outputs.logits.dtype}; a wider --dtype may help")


def _result(name: str, task: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the harness found of a task or group: the metric reported, and all with their standard errors."""
    row = found["results"][name]
    metrics = {key.removesuffix(",none"): value for key, value in row.items() if "," in key and value != "N/A"}
    metric = next(of for of in (PAPER_TASKS.get(name, (0, "acc_norm"))[1], *metrics) if of in metrics)
    shots = {member.get_config("num_fewshot") for member in getattr(task, "get_all_tasks", lambda: [task])()}
    logger.info("%s: %s %.4f on %d samples", name, metric, metrics[metric], row["sample_len"])
    return {
        "metric": metric,
        "value": metrics[metric],
        "stderr": metrics.get(metric.replace(",", "_stderr,") if "," in metric else f"{metric}_stderr"),
        "metrics": metrics,
        "samples": row["sample_len"],
        "num_fewshot": shots.pop() if len(shots) == 1 else None,  # those of a group may differ
        "version": found["versions"][name],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    return run_program(lambda: keep_evaluation(args, argv), args.save)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the program."""
    parser = parser_with(FLAGS, "python -m flatllmbench.zero_shot", __doc__)
    parser.add_argument("model", metavar="FOLDER", help="dense or compressed model: folder, GGUF file or hub id")
    return parser.parse_args(argv)


def keep_evaluation(args: argparse.Namespace, argv: Sequence[str] | None) -> None:
    """Evaluate the model and write the record, named by model and tasks so that a trial leaves others alone."""
    asked, args.model = read_flags(args, FLAGS), checked(ROWS["model"], args.model, "FOLDER")

    def evaluate() -> dict[str, Any]:
        device, described = parse_device(asked["device"]), describe_model(args.model, asked["cache_dir"])
        tasks = load_tasks(*(asked[name] for name in ("tasks", "num_fewshot", "include_path", "dataset_root")))
        loading = {name: asked[name] for name in ("dtype", "cache_dir")}
        found = evaluate_saved(args.model, tasks, device, asked["eval_batch_size"], asked["limit"], **loading)
        return {"hardware": hardware(device), "model": described, "zero_shot": found}

    marks = [f"_{'+'.join(asked['tasks'])[:100]}"] if asked["tasks"] else []
    marks += [f"_{name}-{asked[name]}" for name in ("num_fewshot", "limit") if asked[name] is not None]
    keep_record("zero_shot", args, argv, args.model, "".join(marks), evaluate)


if __name__ == "__main__":
    sys.exit(main())
