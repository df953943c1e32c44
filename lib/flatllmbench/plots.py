"""Pictures of what was measured, as PNGs."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatllmcore.utils.files import write_atomically

from .measured import heading_of_timing, name_of_run, sweeps
from .runs import Cell, Compression, Model, Run, Scoring, Spread, Timing, of_kind

if TYPE_CHECKING:  # matplotlib loads where it is used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.6, "clip_on": False}
_MOST_CURVES_WITH_FIGURES = 2
_HEADLINE: dict[str, Any] = {"fontsize": "large", "fontweight": "bold"}


def plot_ranks(scores: Sequence[float], keep_by_target: Mapping[int, Sequence[float]], title: str, path: Path) -> None:
    """Draw importance over kept share, layer by layer, one line per percentage removed, into a PNG."""
    from matplotlib.figure import Figure

    layers = range(len(scores))
    figure = Figure(figsize=(8, 6), layout="constrained")  # not pyplot: no global state, and Agg for a PNG
    importance, kept = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    figure.suptitle(f"Importance and share kept per layer: {title}", **_HEADLINE)

    importance.plot(layers, scores, color="0.2", **_MARKERS)
    importance.set_ylim(0, 1.1 * max(scores))
    importance.set_ylabel("importance")

    _draw_kept_share(kept, keep_by_target)
    figure.align_ylabels()
    figure.legend(title="removed", loc="outside right center", frameon=False)

    for axes in (importance, kept):
        _tidy(axes)
    write_atomically(path, _png(figure))


def pictures_of(runs: Sequence[Run]) -> dict[str, bytes]:
    """Return the PNGs there is something to draw for, by file name."""
    pictures = {}
    if compressions := sweeps(runs):
        pictures["perplexity.png"] = draw_perplexity(compressions)
        pictures["kept_share.png"] = draw_kept_shares(compressions)
    if staged := [run for run in runs if isinstance(run, Scoring | Compression)]:
        pictures["time.png"] = draw_time(staged)
    if timed := [run for run in of_kind(runs, Timing) if speedup_lines(run)]:
        pictures["speedup.png"] = draw_speedup(timed)
    return pictures


def draw_perplexity(sweeps: Mapping[str, Sequence[Compression]]) -> bytes:
    """Draw perplexity against the share of decoder-layer weights kept, a line per sweep from its dense model on."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 5 + 0.25 * len(sweeps)), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate((heading, curve(members)) for heading, members in sweeps.items()):
        color = f"C{index}"
        axes.plot(*zip(*points, strict=True), color=color, label=_text(label), marker="o", linewidth=1.6)
        axes.plot(*points[0], color=color, marker="o", markersize=9, markerfacecolor="white")
        for kept, value in points if len(sweeps) <= _MOST_CURVES_WITH_FIGURES else ():
            axes.annotate(f"{value:.2f}", (kept, value), (5, 5), textcoords="offset points", color=color)
    axes.plot([], [], color="0.4", marker="o", markersize=9, markerfacecolor="white", linestyle="", label="dense")
    axes.set_title("Perplexity against size", **_HEADLINE)
    axes.margins(x=0.06, y=0.12)
    axes.xaxis.set_major_formatter(PercentFormatter(symbol=" %"))
    axes.set_xlabel("decoder-layer weights kept")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8) if high < 3 * low else LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("perplexity (logarithmic)")
    figure.legend(loc="outside lower center", frameon=False)
    _tidy(axes)
    return _png(figure)


def curve(runs: Sequence[Compression]) -> list[tuple[float, float]]:
    """Return percent of decoder-layer weights kept and perplexity, the dense model's first."""
    kept = [(100 - run.achieved_sparsity_percent, run.perplexity.compressed) for run in runs]
    return [(100.0, runs[0].perplexity.dense), *kept]


def draw_kept_shares(sweeps: Mapping[str, Sequence[Compression]]) -> bytes:
    """Draw the share kept of every layer, a panel per sweep and a line per share removed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 3.2 * len(sweeps)), layout="constrained")
    panels = figure.subplots(len(sweeps), squeeze=False)[:, 0]
    for axes, (heading, runs) in zip(panels, sweeps.items(), strict=True):
        _draw_kept_share(axes, {run.sparsity_ratio: [layer.keep for layer in run.layers] for run in runs})
        axes.set_title(_text(heading), **_HEADLINE)
        axes.legend(title="removed", loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        _tidy(axes)
    return _png(figure)


def draw_time(runs: Sequence[Scoring | Compression]) -> bytes:
    """Draw the stages of every run as shares of the whole, whose seconds stand at the end of its bar."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages_s if stage != "rest"))
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(runs)), layout="constrained")
    axes = figure.subplots()
    names = [_text(name_of_run(run), longest=40) for run in runs]
    start = [0.0] * len(runs)
    for index, stage in enumerate([*stages, "rest"]):
        shares = [run.stages_s.get(stage, 0.0) / run.elapsed_s for run in runs]
        color = "0.8" if stage == "rest" else colormaps["tab20"](index)
        axes.barh(range(len(runs)), shares, left=start, height=0.7, color=color, label=stage)
        start = [left + share for left, share in zip(start, shares, strict=True)]
    for place, (run, end) in enumerate(zip(runs, start, strict=True)):
        axes.annotate(f"{run.elapsed_s:,.1f} s", (end, place), (5, 0), textcoords="offset points", va="center")
    axes.set_title("Where the time went", **_HEADLINE)
    axes.set_yticks(range(len(runs)), names)
    axes.set_ylim(len(runs) - 0.4, -0.6)  # the first on top
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.set_xlabel("share of the whole run")
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    return _png(figure)


# What to draw of a compressed model at one batch size and length: share removed, ratio, prediction.
Point = tuple[float, Spread, float | None]


def speedup_lines(run: Timing) -> dict[str, dict[str, list[Point]]]:
    """Return, for prefill and decoding, the points by rising share removed of every setting that has ratios."""
    lines: dict[str, dict[str, list[Point]]] = {stage: defaultdict(list) for stage in ("prefill", "decoding")}
    for cell in run.cells:
        model = run.models[cell.model]
        setting = f"batch {cell.batch_size}, {cell.prompt_length} + {cell.new_tokens} tokens"
        label = ", ".join([*_variant(model, run.models[0]), setting])
        for stage, spread, predicted in _ratios(cell):
            if spread is not None:
                lines[stage][label].append((model.achieved_sparsity_percent, spread, predicted))
    return {
        stage: {label: sorted(points, key=lambda point: point[0]) for label, points in settings.items()}
        for stage, settings in lines.items()
        if settings
    }


def _variant(model: Model, dense: Model) -> list[str]:
    """Return what a name says beside the dense model's and the share removed: ``m8`` of ``llama-20-m8``."""
    rest = re.sub(r"^-\d+-?", "", model.model.removeprefix(dense.model))
    return [rest] if rest else []


def _ratios(cell: Cell) -> Iterable[tuple[str, Spread | None, float | None]]:
    predicted = cell.predicted
    yield "prefill", cell.prefill_speedup, predicted.prefill_speedup_flops if predicted else None
    yield "decoding", cell.decode_speedup, predicted.decode_speedup_bytes if predicted else None


def draw_speedup(runs: Sequence[Timing]) -> bytes:
    """Draw speed-up over share removed, a row per run and a panel per stage, with quartiles; predictions are dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6 * len(runs)), layout="constrained")
    rows = figure.subfigures(len(runs), squeeze=False)[:, 0]
    for number, (row, run) in enumerate(zip(rows, runs, strict=True), 1):
        lines = speedup_lines(run)
        row.suptitle(_text(heading_of_timing(number, run), longest=90), **_HEADLINE)
        panels = row.subplots(1, len(lines), squeeze=False, sharey=True)[0]
        colors = {label: f"C{place}" for place, label in enumerate(lines["decoding"])}
        for axes, (stage, settings) in zip(panels, lines.items(), strict=True):
            _draw_speedup(axes, settings, colors)
            axes.set_title(stage)
        panels[0].set_ylabel("dense time / compressed time")
        panels[-1].plot([], [], color="0.4", linestyle="--", linewidth=1, label="predicted")
        handles, labels = panels[-1].get_legend_handles_labels()
        row.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return _png(figure)


def _draw_speedup(axes: "Axes", settings: Mapping[str, Sequence[Point]], colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    for label, points in settings.items():
        removed = [point[0] for point in points]
        median = [spread.median for _, spread, _ in points]
        below = [spread.median - spread.low for _, spread, _ in points]
        above = [spread.high - spread.median for _, spread, _ in points]
        axes.errorbar(removed, median, (below, above), color=colors[label], label=_text(label), marker="o", capsize=3)
        expected = [(x, predicted) for x, _, predicted in points if predicted is not None]
        if expected:
            axes.plot(*zip(*expected, strict=True), color=colors[label], linestyle="--", linewidth=1)
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set_xlim(0, 1.08 * max(point[0] for points in settings.values() for point in points))
    axes.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    axes.xaxis.set_major_locator(MultipleLocator(10))
    axes.set_xlabel("decoder-layer weights removed")
    _tidy(axes)


def _draw_kept_share(axes: "Axes", keep_by_target: Mapping[Any, Sequence[float]]) -> None:
    """Draw a line over the layers for every percentage removed."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for i, (percent, keep) in enumerate(sorted(keep_by_target.items())):
        color = colormaps["viridis"](0.85 * i / max(len(keep_by_target) - 1, 1))
        axes.plot(range(len(keep)), keep, color=color, label=f"{percent:g} %", **_MARKERS)
    num_layers = max(map(len, keep_by_target.values()))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.set_ylabel("share kept")
    axes.set_xlabel("decoder layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_xlim(0, max(num_layers - 1, 1))


def _tidy(axes: "Axes") -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _text(text: str, longest: int = 80) -> str:
    """Return ``text``, cut where it is very long, as matplotlib draws it and not as a formula."""
    short = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return short.replace("$", r"\$")


def _png(figure: "Figure") -> bytes:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()
