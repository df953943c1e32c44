"""Tables in Markdown of what our runs measured, each with all that its figures depend on."""

from collections.abc import Iterable, Iterator, Sequence

from flatllmcore.utils.names import model_name

from .records import Record, dense_model, flat, mean_accuracy, of_kind, removed_percent, settings

NOT_RUN = "not run"
NOT_THERE = "–"
_COMPRESSION = (  # a column's heading, field and form
    ("asked, %", "sparsity_ratio", "g"),
    ("removed, %", "achieved_sparsity_percent", ".3f"),
    ("decoder weights", "parameters_after.decoder_linear", ",.0f"),
    ("all parameters", "parameters_after.total", ",.0f"),
    ("whole run, s", "elapsed_s", ".1f"),
    ("peak host memory, GiB", "peak_memory_gib.host", ".2f"),
    ("peak device memory, GiB", "peak_memory_gib.device", ".2f"),
)
_EVALUATED = (("model", "s"), ("method", "s"), ("achieved_sparsity_percent", ".3f"))
_SPEED = (
    ("model", "of.model", "s"),
    ("removed, %", "of.achieved_sparsity_percent", ".3f"),
    ("batch", "batch_size", "g"),
    ("prompt", "prompt_length", "g"),
    ("new", "new_tokens", "g"),
    ("prefill, ms", "prefill_ms.median", ",.2f"),
    ("× dense", "prefill_speedup", "quartiles"),
    ("by operations", "predicted.prefill_speedup_flops", ".2f"),
    ("decoding, ms", "decode_ms_per_token.median", ",.2f"),
    ("× dense", "decode_speedup", "quartiles"),
    ("by bytes", "predicted.decode_speedup_bytes", ".2f"),
    ("weights, bytes", "of.weight_memory_bytes", ",.0f"),
    ("KV cache, bytes", "kv_cache_bytes", ",.0f"),
    ("peak memory, bytes", "peak_memory_bytes", ",.0f"),
)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned left and the others right, padded so that it reads as plain text."""
    cells = [[" ".join(cell.split()).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in (cells[0], rule, *cells[1:]))
    return "".join(f"| {' | '.join(row)} |\n" for row in padded)


def figure(value: float | None, form: str = ".2f") -> str:
    """Return a number as a cell has it, or that it was not measured."""
    return NOT_RUN if value is None else format(value, form)


def measured_tables(runs: Iterable[Record], kind: str) -> str:
    """Return what runs of one of ``KINDS`` measured, a table for all whose figures depend on the same things."""
    parts = []
    for facts, group in grouped(of_kind(runs, kind)).items():
        commands = dict.fromkeys(run["command"] for run in group)
        parts += [KINDS[kind](group), *(f"- {fact}" for fact in facts), "", "```bash", *commands, "```\n"]
    return "\n".join(parts or [f"{NOT_RUN}\n"])


def grouped(runs: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Return the runs whose figures depend on the same things together, under these facts."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for run in runs:
        groups.setdefault(tuple(_facts(run)), []).append(run)
    return groups


def _facts(run: Record) -> Iterator[str]:
    """Yield what the figures of a run depend on, a line each."""
    if run.get("perplexity"):
        rounded = f", whose publisher rounded it to {run['rounded_to']}" if run.get("rounded_to") else ""
        yield f"{run['base_model']}{rounded}, `--dtype {run['request.dtype']}`, {settings(run)}"
        for of in run["perplexity"]:
            yield f"perplexity on {of['dataset']}, {of['windows']} × {of['seqlen']} tokens"
    if run["kind"] == "speed":
        yield f"{run['protocol']}, {run['dtype']}, {run['attention']}, {run['cells'][0]['repeats']} repeats"
        if run.get("request.shape"):
            yield f"random weights in the shape of {run['request.shape']}"
    if run.get("zero_shot"):
        for task, found in run["zero_shot.tasks"].items():
            shots = "mixed" if found["num_fewshot"] is None else found["num_fewshot"]
            yield f"{task}: {found['metric']}, {shots}-shot, {found['samples']:,} samples"
        limited = f", `--limit {run['request.limit']:g}`" if run.get("request.limit") else ""
        yield f"{run['zero_shot.harness']}, `--dtype {run['request.dtype']}`{limited}"
    yield ", ".join(run["hardware"].values())
    yield ", ".join(map(" ".join, run["versions"].items()))


def _compression_table(runs: list[Record]) -> str:
    measured = [
        (f"perplexity, {model_name(of['dataset'])}", f"perplexity.{number}.compressed", ".3f")
        for number, of in enumerate(runs[0]["perplexity"])
    ]
    columns = (*_COMPRESSION[:4], *measured, *_COMPRESSION[4:])
    return _table(columns, sorted([dense_model(runs[0]), *runs], key=lambda run: run["sparsity_ratio"]))


def _speed_table(runs: list[Record]) -> str:
    return _table(_SPEED, (flat(cell | {"of": run["models"][cell["model"]]}) for run in runs for cell in run["cells"]))


def _accuracy_table(runs: list[Record]) -> str:
    tasks, rows = runs[0]["zero_shot.tasks"], []
    for run in sorted(runs, key=removed_percent):
        cells, accuracy = [_cell(run, f"model.{of}", form) for of, form in _EVALUATED], mean_accuracy(run)
        cells += map(_result, run["zero_shot.tasks"].values())
        rows.append([*cells, NOT_THERE if accuracy is None else "{:.2f} ± {:.2f}".format(*accuracy)])
    return markdown_table(("model", "method", "removed, %", *tasks, "mean accuracy, %"), rows)


def _result(task: Record) -> str:
    scale = 100 if task["metric"].startswith("acc") else 1  # to percent
    error = "" if task.get("stderr") is None else f" ± {scale * task['stderr']:.2f}"
    return f"{scale * task['value']:.2f}{error}"


def _table(columns: Sequence[tuple[str, str, str]], rows: Iterable[Record]) -> str:
    return markdown_table([of[0] for of in columns], ([_cell(row, *of[1:]) for of in columns] for row in rows))


def _cell(row: Record, field: str, form: str) -> str:
    if row.get(field) is None:
        return NOT_THERE
    if form == "quartiles":
        return "{median:.2f} ({low:.2f}–{high:.2f})".format_map(row[field])
    return format(row[field], form)


KINDS = {"compression": _compression_table, "zero_shot": _accuracy_table, "speed": _speed_table}
