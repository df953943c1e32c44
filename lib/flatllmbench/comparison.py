"""Sections of the report that put our runs beside published figures."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from . import published
from .published import Figures, PublishedModel
from .runs import Cell, Compression, Evaluation, Model, Run, Timing, ZeroShot, of_kind
from .tables import NOT_PUBLISHED, NOT_RUN, code, code_block, markdown_table

_RATIO_TOLERANCE = 1.0  # percent removed, beside what was asked: floors take a little more


@dataclass(frozen=True)
class Entry:
    """One of our runs as a column of Table 1 has it; ``None`` where it did not measure that."""

    model: PublishedModel
    settings: str
    dense: tuple[float | None, float | None]  # perplexity, accuracy
    compressed: tuple[float | None, float | None]


def table_1_section(runs: Sequence[Run]) -> str:
    """Return our runs beside Table 1, then the table with all its methods, then what is still to run."""
    entries = list(table_1_entries(runs))
    columns = ["method", *(model.name for model in published.MODELS)]
    return "\n".join(
        [
            "## Ours beside the paper's Table 1\n",
            _ABOUT_TABLE_1,
            markdown_table(_BESIDE_HEADER, _beside_rows(entries)),
            "### Every method, perplexity\n",
            markdown_table(columns, _method_rows(entries, "perplexity")),
            "### Every method, mean accuracy, %\n",
            markdown_table(columns, _method_rows(entries, "accuracy")),
            _what_is_needed(entries),
        ]
    )


def other_figures_section(runs: Sequence[Run]) -> str:
    """Return our runs beside published figures that are not in Table 1."""
    return "\n".join(
        [
            "## Ours beside other published figures\n",
            "### Perplexity by share removed\n",
            _ABOUT_RATIOS,
            markdown_table(_RATIO_HEADER, _ratio_rows(runs)),
            "### Minutes of calibration\n",
            _ABOUT_CALIBRATION,
            markdown_table(("method", "minutes", "hardware"), _calibration_rows(runs)),
            "### Speed-up of decoding\n",
            _ABOUT_SPEED,
            markdown_table(_SPEEDUP_HEADER, _speedup_rows(runs)),
        ]
    )


_ABOUT_TABLE_1 = (
    f"{published.PERCENT_REMOVED} % of the decoder layers' linear weights removed; WikiText-2 perplexity at length "
    f"{published.SEQLEN}; accuracy in percent, {published.ACCURACY}. Published: {published.PAPER}, Table 1. A run "
    "stands here when model, share removed, length and text are these, whatever came out. Differences are ours minus "
    "the published: a positive one in perplexity, or a negative one in accuracy, is a miss.\n"
)
_ABOUT_RATIOS = (
    f"WikiText-2 at length {published.SEQLEN}. FLAT-LLM: {published.PAPER}, which has numbers at "
    f"{published.PERCENT_REMOVED} % alone. MoDeGPT: {published.MODEGPT_PAPER}, 4 to 8 hours of calibration.\n"
)
_ABOUT_CALIBRATION = (
    f"{published.CALIBRATION_MODEL.name}, {published.PERCENT_REMOVED} % removed. Published: {published.PAPER}. Ours: "
    "the run without loading, measuring and saving; layers were scored in a run of their own where there is one.\n"
)
_ABOUT_SPEED = (
    f"{published.SPEED_MODEL.name}, batch {published.SPEED_BATCH}, {published.SPEED_LENGTH} tokens, as SliceGPT "
    f"measures. Published: {published.PAPER}, which also states {published.MEMORY_SAVED_PERCENT} % less memory at "
    f"best; the figures at {', '.join(map(str, published.READ_OFF_A_PLOT))} % were read off a plot.\n"
)
_BESIDE_HEADER = (
    "model",
    "weights",
    "perplexity, published",
    "perplexity, here",
    "perplexity, difference",
    "accuracy, published",
    "accuracy, here",
    "accuracy, difference",
    "settings here",
)
_RATIO_HEADER = ("model", "removed, %", "FLAT-LLM, published", "MoDeGPT, published", "FLAT-LLM, here", "here − MoDeGPT")
_SPEEDUP_HEADER = ("removed, %", "published", "here", "quartiles here", "difference", "hardware here")


def table_1_entries(runs: Sequence[Run]) -> Iterator[Entry]:
    """Yield our runs that stand beside Table 1, in its order of models.

    Accuracies are those of an evaluation of the dense model, and of the run itself or of the folder it saved. A
    model that was not compressed, but evaluated dense, has that accuracy alone.
    """
    evaluations = of_kind(runs, Evaluation)
    for model in published.MODELS:
        dense = [e.zero_shot for e in evaluations if e.model.is_dense and e.model.model == model.folder]
        found = [run for run in of_kind(runs, Compression) if _is_run_of_table_1(run, model)]
        for run in found:
            saved = (e.zero_shot for e in evaluations if _is_saved_by(run, e.model))
            accuracies = _mean_accuracy(dense), _mean_accuracy([run.zero_shot, *saved])
            yield Entry(
                model, _settings(run), (run.perplexity.dense, accuracies[0]), (run.perplexity.compressed, accuracies[1])
            )
        if not found and (accuracy := _mean_accuracy(dense)) is not None:
            yield Entry(model, "accuracy alone", (None, accuracy), (None, None))


def _mean_accuracy(answers: Iterable[ZeroShot | None]) -> float | None:
    """Return the first mean there is: not every evaluation asked the seven tasks whole."""
    return next((found.mean_accuracy for found in answers if found and found.mean_accuracy is not None), None)


def _is_on_published_text(run: Compression) -> bool:
    texts, lengths = {run.dataset, run.perplexity.dataset}, {run.seqlen, run.perplexity.seqlen}
    return (texts, lengths) == ({published.DATASET}, {published.SEQLEN})


def _is_run_of_table_1(run: Compression, model: PublishedModel) -> bool:
    return run.model == model.folder and run.sparsity_ratio == published.PERCENT_REMOVED and _is_on_published_text(run)


def _is_saved_by(run: Compression, model: Model) -> bool:
    """Tell whether a model is the folder that a run saved: by its name, its origin and its size."""
    saved = (run.saved_as, run.model, run.parameters_after.total)
    return (model.model, model.base_model, model.parameters.total) == saved


def _settings(run: Compression) -> str:
    dtype = "" if run.request.dtype == "auto" else f", {run.request.dtype}"
    queries = ", Q and K pruned" if run.prune_qk else ""
    return f"{run.nsamples} × {run.seqlen} tokens, seed {run.seed}, multiples of {run.rank_multiple}{queries}{dtype}"


def _beside_rows(entries: Sequence[Entry]) -> Iterator[tuple[str, ...]]:
    for model in published.MODELS:
        for entry in [e for e in entries if e.model == model] or [Entry(model, NOT_RUN, (None, None), (None, None))]:
            for method, ours in ((published.DENSE, entry.dense), (published.FLAT_LLM, entry.compressed)):
                theirs = published.figures(method, model) or (None, None)
                columns = (cell for pair in zip(theirs, ours, strict=True) for cell in _beside(*pair))
                yield (model.name, method, *columns, entry.settings)


def _beside(theirs: float | None, ours: float | None) -> tuple[str, str, str]:
    """Return a published figure, ours and the difference."""
    return _figure(theirs, NOT_PUBLISHED), _figure(ours, NOT_RUN), _difference(ours, theirs)


def _figure(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.2f}"


def _difference(ours: float | None, theirs: float | None) -> str:
    if ours is None:
        return NOT_RUN
    return NOT_PUBLISHED if theirs is None else f"{round(round(ours, 2) - theirs, 2) + 0.0:+.2f}"  # no -0.00


def _method_rows(entries: Sequence[Entry], measure: str) -> Iterator[list[str]]:
    """Yield a row per published method, then ours: dense and compressed for each of our settings."""
    place = Figures._fields.index(measure)
    for method, figures in published.TABLE_1.items():
        yield [method, *(_figure(pair and pair[place], NOT_PUBLISHED) for pair in figures)]
    numbered: dict[tuple[str, int], dict[PublishedModel, Entry]] = {}
    for entry in entries:
        number = 1
        while entry.model in numbered.setdefault((entry.settings, number), {}):
            number += 1
        numbered[entry.settings, number][entry.model] = entry
    for (settings, number), row in (numbered or {("", 1): {}}).items():
        label = ", ".join(part for part in ("here", settings, f"run {number}" if number > 1 else "") if part)
        for method, side in ((published.DENSE, "dense"), (published.FLAT_LLM, "compressed")):
            ours = [getattr(row[model], side)[place] if model in row else None for model in published.MODELS]
            yield [f"{method}, {label}", *(_figure(value, NOT_RUN) for value in ours)]


def _what_is_needed(entries: Sequence[Entry]) -> str:
    """Return how to fill the cells of Table 1 that say that they were not run."""
    compressed = {entry.model for entry in entries if entry.compressed[0] is not None}
    complete = {entry.model for entry in entries if None not in (*entry.dense, *entry.compressed)}
    missing = [model for model in published.MODELS if model not in complete]
    if not missing:
        return ""
    commands = [
        (model.name, code(f"bash {model.script}"), code(model.hub_id)) for model in missing if model not in compressed
    ]
    return "\n".join(
        [
            "### What the cells that were not run need\n",
            "Perplexity: the weights, WikiText-2 and the hardware that the script's header names. Weights and text "
            "come from the Hugging Face Hub, or from local folders by `MODEL=... DATASET_ROOT=...`. Each script "
            "compresses at 10 to 50 % and makes this page anew.\n",
            *([markdown_table(("model", "command", "weights"), commands)] if commands else []),
            "Then accuracy, which takes the tasks' data sets, and speed, which takes a device left alone:\n",
            code_block(_accuracy_and_speed(missing[0])),
        ]
    )


def _accuracy_and_speed(model: PublishedModel) -> list[str]:
    """Return the commands that measure what scripts have left in ``results``, of the published speed too."""
    timed = published.SPEED_MODEL
    sizes = "{10,20,30,40,50}"
    return [
        f"OUT=results/records/{model.folder} bash scripts/eval.sh {model.hub_id}",
        f"OUT=results/records/{model.folder} bash scripts/eval.sh results/{model.folder}-{published.PERCENT_REMOVED}",
        f"OUT=results/records/{timed.folder} bash scripts/test_speedup.sh "
        f"{timed.hub_id} results/{timed.folder}-{sizes}",
        "python -m flatllmbench.report results/records",
    ]


def _ratio_rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    for model, modegpt in published.MODEGPT.items():
        table_1 = published.figures(published.FLAT_LLM, model)
        for percent, theirs in modegpt.items():
            flat_llm = table_1.perplexity if table_1 and percent == published.PERCENT_REMOVED else None
            ours: list[float | None] = [
                run.perplexity.compressed
                for run in of_kind(runs, Compression)
                if run.model == model.folder and run.sparsity_ratio == percent and _is_on_published_text(run)
            ]
            for value in ours or [None]:
                yield (model.name, str(percent), _figure(flat_llm, NOT_PUBLISHED), *_beside(theirs, value))


def _calibration_rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    for method, minutes in published.CALIBRATION_MIN.items():
        yield (f"{method}, published", str(minutes), "one A100")
    ours = [run for run in of_kind(runs, Compression) if _is_run_of_table_1(run, published.CALIBRATION_MODEL)]
    for run in ours:
        yield (f"{published.FLAT_LLM}, here", f"{run.calibration_s / 60:.1f}", str(run.hardware))
    if not ours:
        yield (f"{published.FLAT_LLM}, here", NOT_RUN, NOT_RUN)


def _speedup_rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    for percent, theirs in published.DECODE_SPEEDUP.items():
        ours = [
            (run, cell.decode_speedup)
            for run in of_kind(runs, Timing)
            for cell in run.cells
            if cell.decode_speedup is not None and _is_published_cell(run, cell, percent)
        ]
        for run, spread in ours:
            quartiles = f"{spread.low:.2f}–{spread.high:.2f}"
            difference = _difference(spread.median, theirs)
            yield (str(percent), f"{theirs:.2f}", f"{spread.median:.2f}", quartiles, difference, str(run.hardware))
        if not ours:
            yield (str(percent), f"{theirs:.2f}", *4 * (NOT_RUN,))


def _is_published_cell(run: Timing, cell: Cell, percent: int) -> bool:
    model = run.models[cell.model]
    return (
        run.protocol == "slicegpt"
        and not (run.compiled or run.static_cache)
        and (cell.batch_size, cell.new_tokens) == (published.SPEED_BATCH, published.SPEED_LENGTH)
        and run.models[0].model == published.SPEED_MODEL.folder
        and abs(model.achieved_sparsity_percent - percent) <= _RATIO_TOLERANCE
    )
