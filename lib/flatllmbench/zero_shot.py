"""Zero-shot and few-shot results of a dense or compressed model, by the evaluation harness as EleutherAI releases it.

    python -m flatllmbench.zero_shot out/llama-2-7b-20
    python -m flatllmbench.zero_shot models/pydocs-llama --tasks pydocs_endings,pydocs_text --include_path tests/tasks

Without `--tasks` it runs the paper's seven, with the paper's numbers of examples. The paper does not say of each task
which accuracy it means; `PAPER_TASKS` does as SliceGPT, whose protocol is the usual one: normalised by length
(`acc_norm`) where the harness has that, and plain (`acc`) for MMLU and WinoGrande, where it has not. Records hold every
metric of a task.

Log-likelihoods are sums of float32 log-probabilities, whatever the type of the weights; the harness by itself takes the
type of the logits. So the same figures come from `lm_eval --model hf --model_args
pretrained=FOLDER,trust_remote_code=True,softmax_dtype=float32`, and with `parallelize=True` those of a model that is
larger than one device.

Why the harness's perplexities differ from ours: `flatllmbench.perplexity` joins the documents of a text, cuts windows
of `seqlen` tokens and predicts every token of a window but its first. The harness takes each document by itself and
predicts every token: the first from the BOS token, and where a document is longer than the model's context, the first
of each further window from the token before it, the tokens of the last from all that fit before them. And it divides by
words or bytes, not tokens. On the same windows both sum the same log-likelihoods.
"""

import argparse
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatllmcore.core.checkpoint_source import CheckpointSource
from flatllmcore.utils.devices import check_whole_models_fit, parse_device
from flatllmcore.utils.layer_utils import model_name
from flatllmcore.utils.loading import load_model, load_tokenizer

from . import command_line
from .harness import (
    PAPER_TASKS,
    Tasks,
    bars_for_terminals,
    language_model_of,
    load_tasks,
    refusing_logits_that_are_not_finite,
)
from .records import describe_model, hardware, versions, write_record

OVER_SEVERAL_GPUS = (
    "over several GPUs a saved model is evaluated by: lm_eval --model hf --model_args "
    "pretrained=FOLDER,trust_remote_code=True,parallelize=True,softmax_dtype=float32"
)
logger = logging.getLogger("flatllmbench.zero_shot")  # also where this file is the program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status: 0, or 2 after one line on stderr about unusable input."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "-m", "flatllmbench.zero_shot", *(sys.argv[1:] if argv is None else argv)])
    return command_line.run_program(lambda: keep_evaluation(args, command), args.save)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flatllmbench.zero_shot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="FOLDER", help="dense or compressed model: a local folder or a hub id")
    command_line.add_task_flags(parser, "--batch_size")
    command_line.add_machine_flags(parser)
    parser.add_argument(
        "--cache_dir", type=Path, metavar="DIR", help="where downloads of models are kept (default: the hub's own)"
    )
    return parser.parse_args(argv)


def keep_evaluation(args: argparse.Namespace, command: str) -> None:
    """Evaluate the model and write the record."""
    command_line.check_task_flags(args)
    place = args.save / f"{run_name(args)}.json"
    with command_line.logging_to(place.with_suffix(".log")), logging_redirect_tqdm():
        asked = {"kind": "zero_shot", "command": command, "request": command_line.request(args)}
        write_record(place, asked | {"versions": versions()} | evaluate(args))


def run_name(args: argparse.Namespace) -> str:
    """Return what the record is called: by model and tasks, so that a trial leaves the record of another run alone."""
    parts = [model_name(args.model), "zero_shot"]
    if args.tasks is not None:
        parts.append("+".join(args.tasks)[:100])  # names of files are limited
    if args.num_fewshot is not None:
        parts.append(f"{args.num_fewshot}-shot")
    if args.limit is not None:
        parts.append(f"limit-{args.limit}")
    if args.dtype != "auto":
        parts.append(args.dtype)
    return "_".join(parts)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the model that ``args`` names; return what the record says about it."""
    started = time.perf_counter()
    device = parse_device(args.device)
    described = describe_model(args.model, args.cache_dir)
    checkpoint = CheckpointSource(args.model, device, args.dtype, args.cache_dir)  # looks its weights through
    check_whole_models_fit(device, [described["parameters"]["total"] * checkpoint.dtype.itemsize], OVER_SEVERAL_GPUS)
    tasks = load_tasks(args.tasks, args.num_fewshot, args.include_path)
    found = evaluate_saved(
        *(args.model, tasks, device, args.eval_batch_size, args.limit), dtype=args.dtype, cache_dir=args.cache_dir
    )
    elapsed_s = round(time.perf_counter() - started, 3)
    return {"model": described, "zero_shot": found, "elapsed_s": elapsed_s, "hardware": hardware(device)}


def evaluate_saved(
    model: str,
    tasks: Tasks,
    device: torch.device,
    batch_size: int,
    limit: int | None,
    *,
    dtype: str = "auto",
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Return what :func:`zero_shot` does of the model and the tokenizer in a local folder or at a hub id.

    Raises:
        InputError: If one of them cannot be used.
    """
    tokenizer = load_tokenizer(model, cache_dir=cache_dir)
    loaded = load_model(model, dtype=dtype, cache_dir=cache_dir).to(device)
    return zero_shot(loaded, tokenizer, tasks, batch_size, limit)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    batch_size: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the results of a model, dense or compressed, on the device where it is.

    Args:
        batch_size: Questions run at a time.
        limit: The first so many questions of every task; all for ``None``.

    Returns:
        A mapping with

        - ``tasks``: by name, ``metric``, the one reported, with its ``value`` and ``stderr`` (``None`` where the
          harness has none), ``metrics``, every one's value, ``num_fewshot``, ``samples`` and the definition's
          ``version``; a metric of filtered answers is called ``metric,filter``;
        - ``mean_accuracy``: in percent, over the paper's tasks under the paper's protocol; ``None`` unless all seven
          ran in full;
        - ``limit``, ``batch_size``, and the version of the ``harness``.

    Raises:
        InputError: If the model gives logits that are not finite.
    """
    from lm_eval import evaluate as run_harness
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    for task in tasks.tasks.values():
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the same examples in every evaluation
    language_model = language_model_of(model, tokenizer, batch_size)
    with bars_for_terminals(), refusing_logits_that_are_not_finite(model):
        found = run_harness(
            language_model, {"tasks": tasks.tasks, "groups": tasks.groups}, limit=limit, log_samples=False
        )
    results = {}
    for name, members in tasks.reported.items():
        shots = {tasks.tasks[member].get_config("num_fewshot") for member in members}
        num_fewshot = shots.pop() if len(shots) == 1 else None
        result = _result(name, found["results"][name])
        results[name] = result | {"num_fewshot": num_fewshot, "version": found["versions"][name]}
        logger.info(
            "%s, %s-shot: %s %.4f on %d samples",
            *(name, "mixed" if num_fewshot is None else num_fewshot),
            *(result[key] for key in ("metric", "value", "samples")),
        )
    mean = None if limit else _mean_accuracy(results)
    if mean is not None:
        logger.info("mean accuracy of the paper's seven tasks %.2f %%", mean)
    return {
        "tasks": results,
        "mean_accuracy": mean,
        "limit": limit,
        "batch_size": batch_size,
        "harness": f"lm_eval {version('lm_eval')}",
    }


def _result(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of the harness's row of results, whose keys are like ``acc_norm,none``."""
    keys = {key.removesuffix(",none"): key for key in row if "," in key and "_stderr," not in key}
    wanted = PAPER_TASKS[name].metric if name in PAPER_TASKS else "acc_norm"
    metric = wanted if wanted in keys else next(iter(keys))
    stderr = row.get(keys[metric].replace(",", "_stderr,", 1))
    return {
        "metric": metric,
        "value": float(row[keys[metric]]),
        "stderr": None if stderr in (None, "N/A") else float(stderr),
        "metrics": {metric: float(row[key]) for metric, key in keys.items()},
        "samples": row["sample_len"],
    }


def _mean_accuracy(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Return the mean in percent over the paper's tasks; ``None`` if one is missing or under another protocol."""
    values = [
        results[name]["value"]
        for name, protocol in PAPER_TASKS.items()
        if name in results and (results[name]["num_fewshot"], results[name]["metric"]) == protocol
    ]
    return 100 * sum(values) / len(values) if len(values) == len(PAPER_TASKS) else None


if __name__ == "__main__":
    sys.exit(main())
