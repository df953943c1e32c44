"""Tables of what our runs measured, each with all that its figures depend on."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from .runs import Record, dense_model, evaluations, of_kind, settings
from .tables import NOT_RUN, NOT_THERE, figure, markdown_table

_COMPRESSION = (  # a column's heading, field and form
    ("asked, %", "sparsity_ratio", "g"),
    ("removed, %", "achieved_sparsity_percent", ".3f"),
    ("decoder weights", "parameters_after.decoder_linear", ",.0f"),
    ("all parameters", "parameters_after.total", ",.0f"),
    ("perplexity", "perplexity.compressed", ".3f"),
    ("whole run, s", "elapsed_s", ".1f"),
    ("peak host memory, GiB", "peak_memory_gib.host", ".2f"),
    ("peak device memory, GiB", "peak_memory_gib.device", ".2f"),
)
_SPEED = (
    ("removed, %", "of.achieved_sparsity_percent", ".3f"),
    ("batch", "batch_size", "g"),
    ("prompt", "prompt_length", "g"),
    ("new", "new_tokens", "g"),
    ("prefill, ms", "prefill_ms.median", ",.2f"),
    ("× dense", "prefill_speedup", ""),
    ("by operations", "predicted.prefill_speedup_flops", ".2f"),
    ("decoding, ms", "decode_ms_per_token.median", ",.2f"),
    ("× dense", "decode_speedup", ""),
    ("by bytes", "predicted.decode_speedup_bytes", ".2f"),
    ("weights, bytes", "of.weight_memory_bytes", ",.0f"),
    ("KV cache, bytes", "kv_cache_bytes", ",.0f"),
    ("peak memory, bytes", "peak_memory_bytes", ",.0f"),
)


def grouped(runs: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Return the runs whose figures depend on the same things together, under these facts."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for run in runs:
        groups.setdefault(tuple(_facts(run)), []).append(run)
    return groups


def compression_tables(runs: Iterable[Record]) -> str:
    """Return perplexity, size, time and memory, a table per model and settings, its first row the dense model."""
    return _tables(of_kind(runs, "flatllm"), _compression_table)


def accuracy_tables(runs: Iterable[Record]) -> str:
    """Return zero-shot and few-shot accuracy, a table per set of tasks under one protocol."""
    return _tables(evaluations(runs), _accuracy_table)


def speed_tables(runs: Iterable[Record]) -> str:
    """Return times, ratios and memory, a table per protocol and machine."""
    return _tables(of_kind(runs, "speed"), _speed_table)


def _tables(runs: Iterable[Record], table: Callable[[list[Record]], str]) -> str:
    parts = []
    for facts, group in grouped(runs).items():
        commands = dict.fromkeys(run["command"] for run in group)
        parts += [table(group), *(f"- {fact}" for fact in facts), "", "```bash", *commands, "```\n"]
    return "\n".join(parts or [f"{NOT_RUN}\n"])


def _compression_table(runs: list[Record]) -> str:
    rows = sorted([dense_model(runs[0]), *runs], key=lambda run: run.number("sparsity_ratio"))
    return markdown_table([heading for heading, *_ in _COMPRESSION], (list(_cells(row, _COMPRESSION)) for row in rows))


def _accuracy_table(runs: list[Record]) -> str:
    rows = (
        [
            run["model.model"],
            f"{run.number('model.achieved_sparsity_percent'):.3f}",
            *map(_result, _tasks(run)),
            figure(run.get("zero_shot.mean_accuracy")),
        ]
        for run in sorted(runs, key=lambda run: run.number("model.achieved_sparsity_percent"))
    )
    return markdown_table(["model", "removed, %", *runs[0]["zero_shot.tasks"], "mean, %"], rows)


def _speed_table(runs: list[Record]) -> str:
    cells = (cell | {"of": run["models"][cell["model"]]} for run in runs for cell in run["cells"])
    rows = ([cell["of"]["model"], *_cells(Record(runs[0].path, cell), _SPEED)] for cell in cells)
    return markdown_table(["model", *(heading for heading, *_ in _SPEED)], rows)


def _facts(run: Record) -> Iterator[str]:
    """Yield what the figures of a run depend on, a line each."""
    if run["kind"] == "flatllm":
        yield f"{run['base_model']}, `--dtype {run['request.dtype']}`, calibrated on {settings(run)}"
        length = f"{run['perplexity.windows']} × {run['perplexity.seqlen']} tokens"
        yield f"perplexity on {run['perplexity.dataset']}, {length}"
    if run["kind"] == "speed":
        options = "".join(f", {name}" for name in ("compiled", "static_cache") if run[name])
        yield f"{run['protocol']}, {run['dtype']}, {run['attention']}{options}, {run['cells'][0]['repeats']} repeats"
    if run.get("request.shape"):
        yield f"random weights in the shape of {run['request.shape']}"
    for task in _tasks(run):
        shots = "mixed" if task.get("num_fewshot") is None else task["num_fewshot"]
        yield f"{task['name']}: {task['metric']}, {shots}-shot, {task['samples']:,} samples"
    if run.get("zero_shot"):
        limited = f", `--limit {run['zero_shot.limit']:g}`, so no mean" if run.get("zero_shot.limit") else ""
        yield f"{run['zero_shot.harness']}, `--dtype {run['request.dtype']}`{limited}"
    yield ", ".join(run["hardware"].values())
    yield ", ".join(map(" ".join, run["versions"].items()))


def _cells(record: Record, columns: Sequence[tuple[str, str, str]]) -> Iterator[str]:
    """Yield what a record says, nothing where it has no such field; a spread over repeats has its quartiles."""
    for _, field, form in columns:
        if record.get(field) is None:
            yield NOT_THERE
        elif form:
            yield format(record.number(field), form)
        else:
            median, low, high = (record.number(f"{field}.{name}") for name in ("median", "low", "high"))
            yield f"{median:.2f} ({low:.2f}–{high:.2f})"


def _tasks(run: Record) -> list[Record]:
    return [Record(run.path, {"name": name} | result) for name, result in run.get("zero_shot.tasks", {}).items()]


def _result(task: Record) -> str:
    scale = 100 if task["metric"].startswith("acc") else 1  # to percent
    error = "" if task.get("stderr") is None else f" ± {scale * task.number('stderr'):.2f}"
    return f"{scale * task.number('value'):.2f}{error}"
