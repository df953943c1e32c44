"""Pictures of what was measured."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from flatllmcore.utils.files import write_atomically

if TYPE_CHECKING:  # matplotlib loads where it is used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_ranks(scores: Sequence[float], keep_by_target: Mapping[int, Sequence[float]], title: str, path: Path) -> None:
    """Draw importance over kept share, layer by layer, one line per percentage removed, into a PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    layers = range(len(scores))
    markers = {"marker": "o", "markersize": 4, "linewidth": 1.6, "clip_on": False}
    figure = Figure(figsize=(8, 6), layout="constrained")  # not pyplot: no global state, and Agg for a PNG
    importance, kept = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    figure.suptitle(f"Importance and share kept per layer: {title}", fontsize="large", fontweight="bold")

    importance.plot(layers, scores, color="0.2", **markers)
    importance.set_ylim(0, 1.1 * max(scores))
    importance.set_ylabel("importance")

    for i, (percent, keep) in enumerate(sorted(keep_by_target.items())):
        color = colormaps["viridis"](0.85 * i / max(len(keep_by_target) - 1, 1))
        kept.plot(layers, keep, color=color, label=f"{percent} %", **markers)
    kept.set_ylim(0, 1)
    kept.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    kept.set_ylabel("share kept")
    kept.set_xlabel("decoder layer")
    kept.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    kept.set_xlim(0, max(len(scores) - 1, 1))
    figure.align_ylabels()
    figure.legend(title="removed", loc="outside right center", frameon=False)

    for axes in (importance, kept):
        _tidy(axes)
    _save(figure, path)


def plot_perplexity(curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], path: Path) -> None:
    """Draw perplexity against size into a PNG.

    Args:
        curves: Per model its label and its points, the dense model's first: percent of decoder-layer
            weights kept, perplexity.
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(curves):
        color = f"C{index}"
        axes.plot(*zip(*points, strict=True), color=color, label=label, marker="o", linewidth=1.6)
        axes.plot(*points[0], color=color, marker="o", markersize=9, markerfacecolor="white")
        for kept, value in points:
            axes.annotate(f"{value:.2f}", (kept, value), (5, 5), textcoords="offset points", color=color)
    axes.plot([], [], color="0.4", marker="o", markersize=9, markerfacecolor="white", linestyle="", label="dense")
    axes.set_title("Perplexity against size", fontsize="large", fontweight="bold")
    axes.margins(x=0.06, y=0.12)
    axes.xaxis.set_major_formatter(PercentFormatter(symbol=" %"))
    axes.set_xlabel("decoder-layer weights kept")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8))
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("perplexity (logarithmic)")
    axes.legend(frameon=False)
    _tidy(axes)
    _save(figure, path)


def _tidy(axes: "Axes") -> None:
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", path: Path) -> None:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomically(path, png.getvalue())
