"""Sections of the report that say what our runs measured, each table with all that its figures depend on."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flatllmcore.utils.layer_utils import model_name

from .runs import (
    Cell,
    Compression,
    Evaluation,
    Predicted,
    Run,
    Scoring,
    Spread,
    TaskResult,
    TimedModel,
    Timing,
    ZeroShot,
    of_kind,
)
from .tables import NOT_RUN, NOT_THERE, code, code_block, escaped, markdown_table

MIB = 2**20

_COMPRESSION_HEADER = (
    "asked, %",
    "removed, %",
    "decoder weights",
    "all parameters",
    "perplexity",
    "÷ dense",
    "calibration, s",
    "whole run, s",
    "peak host memory, GiB",
    "peak device memory, GiB",
)
_COMPRESSION_NOTES = (
    "Removed: share of the decoder layers' linear weights, Q and K counted. Calibration: the run without loading, "
    "measuring and saving. Peak memory: of the whole run."
)
_NO_PEAK = "Peak memory: on a GPU only; a CPU does not tell what each of several loaded models allocates."
_SCORING_HEADER = (
    "model",
    "calibration",
    "layers",
    "lowest score",
    "highest score",
    "whole run, s",
    "peak host memory, GiB",
    "peak device memory, GiB",
    "hardware",
)
_CELL_HEADER = ("model", "removed, %", "batch", "prompt", "new tokens")
_TIME_HEADER = (
    *_CELL_HEADER,
    "prefill, ms",
    "first token, ms",
    "decoding, ms per token",
    "prefill, tokens/s",
    "decoding, tokens/s",
)
_RATIO_HEADER = (
    *_CELL_HEADER,
    "prefill, × dense",
    "predicted by operations",
    "decoding, × dense",
    "predicted by bytes",
)
_MEMORY_HEADER = (*_CELL_HEADER, "all parameters", "weights, MiB", "KV cache, MiB", "peak memory, MiB")


@dataclass(frozen=True)
class Conditions:
    """What compressions must share to stand in one table."""

    base_model: str
    dtype: str
    calibration: str
    evaluation: str
    ranks: str
    hardware: str
    versions: str

    @property
    def heading(self) -> str:
        return f"{model_name(self.base_model)}, calibrated on {self.calibration}"


def conditions(run: Compression) -> Conditions:
    on = run.perplexity
    return Conditions(
        base_model=run.base_model,
        dtype=run.request.dtype,
        calibration=f"{run.dataset}, {run.nsamples} × {run.seqlen} tokens, seed {run.seed}",
        evaluation=f"{on.dataset}, {on.windows} × {on.seqlen} tokens",
        ranks=f"multiples of {run.rank_multiple}{', Q and K pruned too' if run.prune_qk else ''}",
        hardware=str(run.hardware),
        versions=_versions(run),
    )


def sweeps(runs: Iterable[Run]) -> dict[str, list[Compression]]:
    """Return compressions that differ in the share removed alone, by rising share, each group under its own heading."""
    groups: dict[Conditions, list[Compression]] = defaultdict(list)
    for run in of_kind(runs, Compression):
        groups[conditions(run)].append(run)
    named: Counter[str] = Counter()
    headed = {}
    for group, members in groups.items():
        named[group.heading] += 1
        number = f" ({named[group.heading]})" if named[group.heading] > 1 else ""
        headed[group.heading + number] = sorted(members, key=lambda run: run.sparsity_ratio)
    return headed


def compression_tables(runs: Iterable[Run]) -> str:
    """Return a table for every sweep, with what its figures hold for."""
    parts = []
    for heading, members in sweeps(runs).items():
        parts += [f"### {escaped(heading)}\n", markdown_table(_COMPRESSION_HEADER, _compression_rows(members))]
        group = conditions(members[0])
        facts = [
            f"Model: {code(group.base_model)}, `--dtype` {escaped(group.dtype)}.",
            f"Calibration: {escaped(group.calibration)}; ranks and widths in {escaped(group.ranks)}.",
            f"Perplexity: {escaped(group.evaluation)}.",
        ]
        parts.append(_facts([*facts, *_machines(members), _COMPRESSION_NOTES], members))
    return "\n".join(parts) or f"{NOT_RUN}: no record of a compression\n"


def scoring_table(runs: Iterable[Run]) -> str:
    """Return a row per run that scored layers."""
    found = of_kind(runs, Scoring)
    if not found:
        return f"{NOT_RUN}: no record of `--prune_method bi`\n"
    rows = (
        (
            run.model,
            _calibration(run),
            str(len(run.scores)),
            f"{min(run.scores):.4f}",
            f"{max(run.scores):.4f}",
            f"{run.elapsed_s:.1f}",
            *_peaks(run.peak_memory_gib),
            str(run.hardware),
        )
        for run in found
    )
    return f"{markdown_table(_SCORING_HEADER, rows)}\n{_facts([], found)}"


class Scored(NamedTuple):
    """A model's answers to tasks, and the run they are of."""

    name: str
    removed_percent: float
    zero_shot: ZeroShot
    run: Evaluation | Compression


def stage_table(runs: Iterable[Run]) -> str:
    """Return the seconds of every run that counted its stages."""
    staged = [run for run in runs if isinstance(run, Scoring | Compression)]
    if not staged:
        return f"{NOT_RUN}: no record with stages\n"
    stages = [*dict.fromkeys(stage for run in staged for stage in run.stages_s if stage != "rest"), "rest"]
    rows = [
        [name_of_run(run), f"{run.elapsed_s:,.1f}"]
        + [f"{run.stages_s[stage]:,.2f}" if stage in run.stages_s else NOT_THERE for stage in stages]
        for run in staged
    ]
    return markdown_table(("seconds", "whole run", *stages), rows)


def name_of_run(run: Scoring | Compression) -> str:
    return f"{run.model}, {'scores' if isinstance(run, Scoring) else f'{run.sparsity_ratio:g} %'}"


def accuracy_tables(runs: Iterable[Run]) -> str:
    """Return a table for every set of tasks under the same protocol, a row per model."""
    groups: dict[tuple, list[Scored]] = defaultdict(list)
    for scored in _all_scored(runs):
        asked = tuple((task, result.metric, result.num_fewshot) for task, result in scored.zero_shot.tasks.items())
        groups[scored.run.request.dtype, scored.zero_shot.limit, asked].append(scored)
    parts = []
    for (dtype, limit, asked), members in groups.items():
        members.sort(key=lambda scored: (scored.name, scored.removed_percent))
        tasks = [_task_heading(*task) for task in asked]
        table = markdown_table(("model", "removed, %", *tasks, "mean, %"), map(_accuracy_row, members))
        samples = (f"{task} {result.samples:,}" for task, result in members[0].zero_shot.tasks.items())
        limited = "" if limit is None else f" `--limit` {limit:g}: not the whole of a task, so no mean."
        harnesses = sorted({scored.zero_shot.harness for scored in members if scored.zero_shot.harness})
        facts = [
            f"Samples: {escaped(', '.join(samples))}.{limited} `--dtype` {escaped(dtype)}.",
            f"Harness: {escaped(', '.join(harnesses) or 'not stated')}; ± is its standard error.",
        ]
        origins = list({id(scored.run): scored.run for scored in members}.values())
        parts += [table, _facts([*facts, *_machines(origins)], origins)]
    return "\n".join(parts) or f"{NOT_RUN}: no record of tasks\n"


def speed_tables(runs: Iterable[Run]) -> str:
    """Return time, ratios and memory for every run that measured speed."""
    parts = []
    for number, run in enumerate(of_kind(runs, Timing), 1):
        facts = [f"Medians of {_repeats(run)} interleaved repeats, lower and upper quartile in brackets."]
        if any(cell.peak_memory_bytes is None for cell in run.cells):
            facts.append(_NO_PEAK)
        if run.request.shape is not None:
            facts.append(f"Random weights in the shape of {code(run.request.shape)}.")
        parts += [
            f"### {escaped(heading_of_timing(number, run))}\n",
            markdown_table(_TIME_HEADER, _rows_of(run, run.cells, _times)),
            markdown_table(_RATIO_HEADER, _rows_of(run, [cell for cell in run.cells if cell.decode_speedup], _ratios)),
            markdown_table(_MEMORY_HEADER, _rows_of(run, run.cells, _memory)),
            _facts([*facts, *_machines([run])], [run]),
        ]
    return "\n".join(parts) or f"{NOT_RUN}: no record of speed\n"


def heading_of_timing(number: int, run: Timing) -> str:
    options = {"torch.compile": run.compiled, "static cache": run.static_cache}
    used = [f"protocol {run.protocol}", run.dtype, run.attention, *(name for name, is_on in options.items() if is_on)]
    return f"Run {number}: {run.models[0].model}, {', '.join(used)}, {run.hardware.device}"


def _compression_rows(runs: Sequence[Compression]) -> Iterator[tuple[str, ...]]:
    """Yield a row for the dense model and one per run."""
    first = runs[0]
    before = first.parameters_before
    sizes = (f"{before.decoder_linear:,}", f"{before.total:,}")
    yield ("0 (dense)", "0", *sizes, f"{first.perplexity.dense:.3f}", "1", *4 * (NOT_THERE,))
    for run in runs:
        after, measured = run.parameters_after, run.perplexity
        yield (
            f"{run.sparsity_ratio:g}",
            f"{run.achieved_sparsity_percent:.3f}",
            f"{after.decoder_linear:,}",
            f"{after.total:,}",
            f"{measured.compressed:.3f}",
            f"{measured.compressed / measured.dense:.3f}",
            f"{run.calibration_s:.1f}",
            f"{run.elapsed_s:.1f}",
            *_peaks(run.peak_memory_gib),
        )


def _peaks(peak_memory_gib: Mapping[str, float]) -> Iterator[str]:
    for place in ("host", "device"):
        yield f"{peak_memory_gib[place]:.2f}" if place in peak_memory_gib else NOT_THERE


def _calibration(run: Scoring) -> str:
    return f"{run.request.dataset}, {run.nsamples} × {run.seqlen} tokens, seed {run.request.seed}"


def _all_scored(runs: Iterable[Run]) -> Iterator[Scored]:
    for run in runs:
        if isinstance(run, Evaluation):
            yield Scored(run.model.model, run.model.achieved_sparsity_percent, run.zero_shot, run)
        elif isinstance(run, Compression) and run.zero_shot is not None:
            yield Scored(run.model, run.achieved_sparsity_percent, run.zero_shot, run)


def _accuracy_row(scored: Scored) -> list[str]:
    mean = scored.zero_shot.mean_accuracy
    results = map(_result, scored.zero_shot.tasks.values())
    return [scored.name, f"{scored.removed_percent:.3f}", *results, NOT_RUN if mean is None else f"{mean:.2f}"]


def _result(result: TaskResult) -> str:
    scale = 100 if _unit(result.metric) else 1
    error = "" if result.stderr is None else f" ± {scale * result.stderr:.2f}"
    return f"{scale * result.value:.2f}{error}"


def _task_heading(task: str, metric: str, num_fewshot: int | None) -> str:
    return f"{task}, {metric}, {'mixed' if num_fewshot is None else num_fewshot}-shot{_unit(metric)}"


def _unit(metric: str) -> str:
    """Return how a column of this metric is headed; shares become percent."""
    return ", %" if metric.startswith("acc") else ""


def _rows_of(
    run: Timing, cells: Iterable[Cell], figures: Callable[[Cell, TimedModel], Iterable[str]]
) -> Iterator[list[str]]:
    for cell in cells:
        model = run.models[cell.model]
        settings = (cell.batch_size, cell.prompt_length, cell.new_tokens)
        yield [model.model, f"{model.achieved_sparsity_percent:.3f}", *map(str, settings), *figures(cell, model)]


def _times(cell: Cell, _: TimedModel) -> Iterator[str]:
    yield _spread(cell.prefill_ms)
    yield _maybe(cell.time_to_first_token_ms, ",.2f")
    yield _spread(cell.decode_ms_per_token)
    yield _maybe(cell.prefill_tokens_per_s, ",.0f")
    yield f"{cell.decode_tokens_per_s:,.1f}"


def _ratios(cell: Cell, _: TimedModel) -> Iterator[str]:
    predicted = cell.predicted or Predicted()
    yield _spread(cell.prefill_speedup)
    yield _maybe(predicted.prefill_speedup_flops, ".2f")
    yield _spread(cell.decode_speedup)
    yield _maybe(predicted.decode_speedup_bytes, ".2f")


def _memory(cell: Cell, model: TimedModel) -> Iterator[str]:
    yield f"{model.parameters.total:,}"
    for size in (model.weight_memory_bytes, cell.kv_cache_bytes):
        yield f"{size / MIB:,.2f}"
    yield NOT_RUN if cell.peak_memory_bytes is None else f"{cell.peak_memory_bytes / MIB:,.2f}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return NOT_THERE
    return f"{spread.median:,.2f} ({spread.low:,.2f}–{spread.high:,.2f})"


def _maybe(value: float | None, form: str) -> str:
    return NOT_THERE if value is None else format(value, form)


def _repeats(run: Timing) -> str:
    return ", ".join(map(str, sorted({cell.repeats for cell in run.cells})))


def _versions(run: Run) -> str:
    return ", ".join(f"{name} {version}" for name, version in run.versions.items())


def _machines(runs: Iterable[Run]) -> list[str]:
    """Return one fact per hardware and one per set of versions that runs were made with."""
    hardware = {f"Hardware: {escaped(str(run.hardware))}." for run in runs}
    versions = {f"Versions: {escaped(_versions(run))}." for run in runs}
    return sorted(hardware) + sorted(versions)


def _facts(facts: Iterable[str], runs: Iterable[Run]) -> str:
    """Return what the figures of a table hold for, and the commands that gave them."""
    lines = [f"- {fact}" for fact in facts]
    commands = list(dict.fromkeys(run.command for run in runs))
    return "\n".join([*lines, *([""] if lines else []), code_block(commands)])
