"""Records read back; one that lacks a field is refused in a line that names file and field."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from flatllmcore.errors import InputError
from flatllmcore.utils.files import read_json
from flatllmcore.utils.layer_utils import model_name

KINDS = ("bi", "flatllm", "zero_shot", "speed")


class Record(dict[str, Any]):
    """The fields of a record, and those of the objects in it by names like ``perplexity.dense``.

    Raises:
        InputError: Where a field is asked for that is not there, or is no number; with the name of the file.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(_flat(content))
        self.path = path

    def __missing__(self, field: str) -> NoReturn:
        raise InputError(f"{self.path} is not usable: the field {field!r} is missing")

    def number(self, field: str) -> float:
        """Return a field that must be a number; JSON as we read it has no NaN and no infinity."""
        value = self[field]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.path} is not usable: the field {field!r} is {value!r}; expected a number")
        return float(value)


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Return the records of files; a folder stands for all ``*.json`` files below it.

    Raises:
        InputError: If a file is none, or a folder has none.
    """
    files: dict[Path, None] = {}  # in order, once
    for path in paths:
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        if not found:
            raise InputError(f"no records in {path}: it holds no *.json file")
        files |= dict.fromkeys(found)
    records = [Record(path, read_json(path, dict[str, Any])) for path in files]
    for record in records:
        if record["kind"] not in KINDS:
            raise InputError(f"{record.path} is a record of {record['kind']!r}; expected one of {', '.join(KINDS)}")
    return records


def of_kind(runs: Iterable[Record], kind: str) -> list[Record]:
    """Return the records of one kind, in their order."""
    return [run for run in runs if run["kind"] == kind]


def settings(run: Record) -> str:
    """Return what a compression depends on beside its model and the share removed."""
    windows = f"{run['dataset']}, {run['nsamples']} × {run['seqlen']} tokens, seed {run['seed']}"
    return f"{windows}, multiples of {run['rank_multiple']}{', Q and K pruned' if run['prune_qk'] else ''}"


def dense_model(run: Record) -> Record:
    """Return what a compression says of the model it began with, as if that were one too."""
    sizes, perplexity = run["parameters_before"], {"compressed": run.number("perplexity.dense")}
    content = {"sparsity_ratio": 0, "achieved_sparsity_percent": 0, "parameters_after": sizes, "perplexity": perplexity}
    return Record(run.path, content)


def evaluations(runs: Iterable[Record]) -> list[Record]:
    """Return the evaluations, those at the end of a compression too."""
    return [run if run["kind"] == "zero_shot" else as_evaluation(run) for run in runs if run.get("zero_shot")]


def as_evaluation(run: Record) -> Record:
    """Return a compression's record as an evaluation of the folder that it saved has the model."""
    base_model = model_name(run["base_model"])
    name = model_name(run.get("request.save_model") or f"{base_model}, {run.number('sparsity_ratio'):g} %")
    removed = run.number("achieved_sparsity_percent")
    model = {"model": name, "base_model": base_model, "achieved_sparsity_percent": removed}
    return Record(run.path, run | {"model": model})


def _flat(content: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        yield above + name, value
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
