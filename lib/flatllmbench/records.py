"""JSON records of runs, read: what they say of compressions, of evaluations and of the dense model. No torch here."""

from collections.abc import Iterable
from math import hypot, inf
from statistics import mean
from typing import Any, TypeAlias

from flatllmcore.methods import METHODS
from flatllmcore.utils.names import STOCK, model_name

Record: TypeAlias = dict[str, Any]
_CHOICES = {"importance_method": "ranks by {}", "gradient_nsamples": "gradients of {} windows"}
_CHOICES |= {"request.width_multiple": "widths in multiples of {}"}


def flat(content: Record) -> Record:
    """Return the fields of a record, and those in its objects and lists also as ``perplexity.0.dense``."""
    fields = dict(content)
    for name, value in content.items():
        if isinstance(value, dict | list):
            below: Any = value if isinstance(value, dict) else dict(enumerate(value))
            fields |= {f"{name}.{part}": found for part, found in flat(below).items()}
    return fields


def of_kind(runs: Iterable[Record], kind: str) -> list[Record]:
    """Return the records of one kind, in their order; evaluations at the end of compressions are ``zero_shot`` too.

    ``compression`` is by any method.
    """
    if kind == "zero_shot":
        return [as_evaluation(run) for run in runs if run.get("zero_shot")]
    return [run for run in runs if run["kind"] in (METHODS if kind == "compression" else (kind,))]


def as_evaluation(run: Record) -> Record:
    """Return an evaluation's record as it is, a compression's as one of an evaluation of the folder that it saved."""
    if run["kind"] == "zero_shot":
        return run
    folder = run.get("request.save_model") or f"{run['base_model']}, {run['sparsity_ratio']:g} %"
    model = {"model": model_name(folder), "base_model": model_name(run["base_model"]), "method": run["kind"]}
    return flat(run | {"model": model | {of: run.get(of) for of in ("achieved_sparsity_percent", "gradient_nsamples")}})


def dense_model(run: Record) -> Record:
    """Return what a compression says of the model it began with, as if that were one too."""
    dense = {"sparsity_ratio": 0, "achieved_sparsity_percent": 0, "parameters_after": run["parameters_before"]}
    return flat(dense | {"perplexity": [of | {"compressed": of["dense"]} for of in run["perplexity"]]})


def mean_accuracy(run: Record) -> tuple[float, float] | None:
    """Return the mean over the tasks of an evaluation that have an accuracy, and its standard error, in percent."""
    found = [task for task in run["zero_shot.tasks"].values() if task["metric"].startswith("acc")]
    errors = [task.get("stderr") or 0.0 for task in found]  # none of a single question
    return (100 * mean(task["value"] for task in found), 100 * hypot(*errors) / len(found)) if found else None


def identity(run: Record) -> tuple[str, Any, float]:
    """Return what tells an evaluated model from others: its dense model, how it was compressed, the percent removed."""
    weighed, dense = run.get("model.gradient_nsamples"), run.get("model.base_model") or run["model.model"]
    how = (run["model.method"], weighed) if weighed else run.get("model.method")
    return dense, how, round(removed_percent(run), 6)


def removed_percent(run: Record) -> float:
    """Return the percent removed of an evaluated model; infinity where its record does not know."""
    found = run["model.achieved_sparsity_percent"]
    return inf if found is None else found


def settings(run: Record) -> str:
    """Return what a compression depends on beside its model and the share removed."""
    parts = [f"{run['kind']} on {run['dataset']}, {run['nsamples']} × {run['seqlen']} tokens, seed {run['seed']}"]
    parts += [words.format(run[name]) for name, words in _CHOICES.items() if run.get(name)]
    parts.append("stock shape" if run.get("shape") == STOCK else f"multiples of {run['rank_multiple']}")
    return f"{', '.join(parts)}{', Q and K pruned' if run['prune_qk'] else ''}"
