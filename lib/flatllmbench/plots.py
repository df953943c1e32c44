"""Pictures of what was measured."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from flatllmcore.utils.files import write_atomically


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
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)

    png = BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomically(path, png.getvalue())
