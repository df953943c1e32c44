"""Pictures of what was measured, as PNGs."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from flatllmcore.utils.files import write_atomically
from flatllmcore.utils.layer_utils import model_name

from .records import Record, dense_model, of_kind, settings
from .tables import grouped


def plot_ranks(scores: Sequence[float], keep_by_target: Mapping[int, Sequence[float]], title: str, path: Path) -> None:
    """Draw importance over kept share, layer by layer, one line per percentage removed, into a PNG."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = _figure(6, f"Importance and share kept per layer: {title}")
    importance, kept = figure.subplots(2, sharex=True, height_ratios=(2, 3))
    importance.plot(scores, color="0.2", marker="o")
    importance.set(ylabel="importance", ylim=(0, 1.1 * max(scores)))
    for i, (percent, keep) in enumerate(sorted(keep_by_target.items())):
        color = colormaps["viridis"](0.85 * i / max(len(keep_by_target) - 1, 1))
        kept.plot([100 * share for share in keep], color=color, label=f"{percent} %", marker="o")
    kept.set(ylabel="share kept, %", xlabel="decoder layer", ylim=(0, 103))
    kept.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    figure.legend(title="removed", loc="outside right center", frameon=False)
    write_atomically(path, _png(figure))


def draw_perplexity(runs: Sequence[Record]) -> bytes:
    """Draw perplexity over the dense model's against weights kept, a line per model and settings."""
    groups = grouped(of_kind(runs, "flatllm")).values()
    figure = _figure(5 + 0.25 * len(groups), "Perplexity against size")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        kept, perplexities = zip(*curve(group), strict=True)
        ratios = [perplexity / perplexities[0] for perplexity in perplexities]
        label = f"{model_name(group[0]['base_model'])}, {settings(group[0])}"
        axes.plot(kept, ratios, marker="o", color=f"C{i}", label=label)
        for x, y, perplexity in zip(kept, ratios, perplexities, strict=True):
            axes.annotate(f"{perplexity:.2f}", (x, y), (5, 5), textcoords="offset points", color=f"C{i}")
    axes.set(xlabel="decoder-layer weights kept, %", ylabel="ratio to the dense model's perplexity")
    axes.margins(0.08)
    for text in figure.legend(loc="outside lower center", frameon=False).get_texts():
        text.set_parse_math(False)
    return _png(figure)


def curve(runs: Sequence[Record]) -> list[tuple[float, float]]:
    """Return percent of decoder-layer weights kept and perplexity, the dense model's first, then by falling size."""
    models = (dense_model(runs[0]), *runs)
    return sorted(((100 - m["achieved_sparsity_percent"], m["perplexity.compressed"]) for m in models), reverse=True)


def _figure(height: float, title: str) -> Any:
    from matplotlib.figure import Figure  # here, as above: it is an extra

    figure = Figure(figsize=(9, height), layout="constrained")  # not pyplot: no global state, and Agg for a PNG
    figure.suptitle(title, fontweight="bold", parse_math=False)
    return figure


def _png(figure: Any) -> bytes:
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    png = BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()
