"""Tasks, models and progress bars of the evaluation harness, the package `lm_eval`, as this project wants them."""

import copy
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flatllmcore.errors import InputError


class Protocol(NamedTuple):
    """Examples before every question, and the metric that is reported."""

    num_fewshot: int
    metric: str


PAPER_TASKS = {
    "mmlu": Protocol(5, "acc"),
    "piqa": Protocol(0, "acc_norm"),
    "winogrande": Protocol(0, "acc"),
    "hellaswag": Protocol(0, "acc_norm"),
    "arc_easy": Protocol(0, "acc_norm"),
    "arc_challenge": Protocol(0, "acc_norm"),
    "openbookqa": Protocol(0, "acc_norm"),
}


@dataclass(frozen=True)
class Tasks:
    """Tasks of the harness, with their data.

    Attributes:
        tasks: The harness's task objects, by name.
        groups: The harness's groups of them, by name.
        reported: The names of the tasks behind each name that has a result: a task's own, or a group's that has a
            score of its own.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    reported: Mapping[str, Sequence[str]]


def load_tasks(
    names: Sequence[str] | None = None, num_fewshot: int | None = None, include_path: Path | None = None
) -> Tasks:
    """Return tasks of the harness with their data, which are downloaded where they are not in the hub's cache.

    One question of every task is put together, so that what does not work is told before a model is touched.

    Args:
        names: Tasks, groups or tags; the paper's seven tasks for ``None``.
        num_fewshot: Examples before every question. By default as ``PAPER_TASKS`` says, and for any other task as
            its definition does. A task that is defined with none keeps to that, as in the harness.
        include_path: Folder of definitions beside the harness's own, which they replace where names are equal.

    Raises:
        InputError: If the harness is not installed, a name is unknown or given twice, data are not at hand, or a
            definition does not work or is not for text alone.
    """
    manager = _task_manager(include_path)
    names = list(PAPER_TASKS) if names is None else names
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(
                f"the harness has no task {name!r}; `lm_eval ls tasks` lists those it has, --include_path adds others"
            )
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    reported: dict[str, list[str]] = {}
    for name in names:
        asked = PAPER_TASKS[name].num_fewshot if num_fewshot is None and name in PAPER_TASKS else num_fewshot
        found = _load_task(manager, name, asked)
        if twice := found["tasks"].keys() & tasks.keys():
            raise InputError(f"task {min(twice)!r} is asked for twice, the second time as {name!r}")
        tasks |= found["tasks"]
        groups |= found["groups"]
        has_own_score = name in found["groups"] and found["groups"][name].has_aggregation
        reported |= {name: list(found["tasks"])} if has_own_score else {task: [task] for task in found["tasks"]}
    return Tasks(tasks, groups, reported)


def _task_manager(include_path: Path | None) -> Any:
    """Return the harness's index of task definitions."""
    for package in ("lm_eval", "accelerate"):  # the second is needed with the model, which is too late to say so
        if find_spec(package) is None:
            raise InputError(f"evaluation needs the package {package}; from the repository: pip install '.[eval]'")
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.tasks import TaskManager

    random.seed(DEFAULT_RANDOM_SEED)  # definitions may shuffle their data as they load, and the harness seeds both
    np.random.seed(DEFAULT_OTHER_SEED)
    return TaskManager(include_path=include_path)


def _load_task(manager: Any, name: str, num_fewshot: int | None) -> dict[str, Any]:
    """Return the harness's ``tasks`` and ``groups`` that a name stands for."""
    try:
        with bars_for_terminals():
            found = manager.load([name])
            for task in found["tasks"].values():
                defined = task.get_config("num_fewshot")
                if defined != 0:
                    task.set_config("num_fewshot", (defined or 0) if num_fewshot is None else num_fewshot)
                task.build_all_requests(limit=1, rank=0, world_size=1)
    except Exception as error:  # a definition is its author's templates and code, and data come from anywhere
        raise InputError(
            f"task {name!r} cannot be set up ({type(error).__name__}: {error}); without a network its data must be "
            "in the hub's cache, or its definition under --include_path name local files"
        ) from error
    for task in found["tasks"].values():
        for trait, need in (("UNSAFE_CODE", "runs code that a model wrote"), ("MULTIMODAL", "needs pictures or sound")):
            if getattr(task, trait, False):
                raise InputError(f"task {task.task_name!r} {need}, which is not for here; use lm_eval itself")
    return found


def language_model_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """Return the model as the harness calls it."""
    from lm_eval.models.huggingface import HFLM

    harness_logger = logging.getLogger(HFLM.__module__)
    level = harness_logger.level
    harness_logger.setLevel(logging.ERROR)  # it warns that a model is not to be given as an object
    try:
        return HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it adds a padding token where there is none
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",  # log-probabilities in the type of the weights would be rounded
        )
    finally:
        harness_logger.setLevel(level)


@contextmanager
def refusing_logits_that_are_not_finite(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block a model that gives NaN or infinity raises InputError; the harness takes these for answers."""

    def check(module: PreTrainedModel, _inputs: Any, outputs: Any) -> None:
        if not torch.isfinite(outputs.logits).all():
            raise InputError(f"the model gives NaN or infinite logits in {module.dtype}; a wider --dtype may help")

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def bars_for_terminals() -> Iterator[None]:
    """Keep the harness's progress bars, which it always draws, to terminals."""
    draw, restored = tqdm.__init__, vars(tqdm)["__init__"]  # not the same where another library wrapped it

    def draw_on_a_terminal(*args: Any, **kwargs: Any) -> None:
        draw(*args, **kwargs | {"disable": kwargs.get("disable") or None})

    tqdm.__init__ = draw_on_a_terminal
    try:
        yield
    finally:
        tqdm.__init__ = restored
