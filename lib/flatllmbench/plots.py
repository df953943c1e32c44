"""Pictures of what was measured, as PNGs."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from flatllmcore.utils.names import model_name

from .records import Record, as_evaluation, dense_model, identity, mean_accuracy, of_kind, settings
from .tables import grouped

PICTURE_MARK = b"flatllmbench"  # in every picture


def draw_ranks(scores: Sequence[float], keep_by_target: Mapping[int, Sequence[float]], title: str) -> bytes:
    """Draw importance over kept share, layer by layer, one line per percentage removed."""
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
    return _png(figure)


def draw_perplexity(runs: Sequence[Record]) -> bytes:
    """Draw what compression leaves against the weights kept, a line per model and settings.

    A panel for each text has perplexity over the dense model's; the last one, where tasks were evaluated, mean accuracy
    with its standard error.
    """
    groups, evaluations = list(grouped(of_kind(runs, "compression")).values()), of_kind(runs, "zero_shot")
    panels: dict[str, list[tuple[Any, ...]]] = {}
    for i, group in enumerate(groups):
        for number, of in enumerate(group[0]["perplexity"]):
            kept, perplexities = zip(*curve(group, number), strict=True)
            ratios = [perplexity / perplexities[0] for perplexity in perplexities]
            name = f"{model_name(of['dataset'])}: perplexity, × dense"
            panels.setdefault(name, []).append((i, kept, ratios, None))
    for i, group in enumerate(groups):
        if len(accuracies := accuracy_curve(group, evaluations)) > 1:
            panels.setdefault("mean accuracy, %", []).append((i, *zip(*accuracies, strict=True)))
    rows, columns = -(-len(panels) // 2), min(len(panels), 2)
    figure = _figure(3.6 * rows + 0.25 * len(groups) + 0.6, "Perplexity and accuracy against size")
    for number, (name, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        for i, kept, values, errors in lines:
            label = f"{model_name(groups[i][0]['base_model'])}, {settings(groups[i][0])}"
            axes.errorbar(kept, values, errors, marker="o", color=f"C{i}", capsize=3, label=label)
        axes.set(xlabel="decoder-layer weights kept, %")
        axes.set_title(name, parse_math=False)
        axes.margins(0.08)
    shown = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for text in figure.legend(shown.values(), shown, loc="outside lower center", frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)
    return _png(figure)


def curve(runs: Sequence[Record], text: int) -> list[tuple[float, float]]:
    """Return percent of decoder-layer weights kept and perplexity on a text by its number, by falling size."""
    field, models = f"perplexity.{text}.compressed", (dense_model(runs[0]), *runs)
    return sorted(((100 - m["achieved_sparsity_percent"], m[field]) for m in models), reverse=True)


def accuracy_curve(runs: Sequence[Record], evaluations: Sequence[Record]) -> list[tuple[float, float, float]]:
    """Return percent kept, mean accuracy and its standard error of compressions and their dense model, by falling size.

    An evaluation is of a compression if both have one ``identity``. Of evaluations on different questions
    those on the first one's count; nothing if the runs were not evaluated.
    """
    of_these = {(model_name(runs[0]["base_model"]), None, 0.0), *map(identity, map(as_evaluation, runs))}
    found, questions = [], None
    for run in (one for one in evaluations if identity(one) in of_these):
        own = {name: task["samples"] for name, task in run["zero_shot.tasks"].items()}
        questions = questions or own
        if own == questions and (accuracy := mean_accuracy(run)) is not None:
            found.append((100 - run["model.achieved_sparsity_percent"], *accuracy))
    return sorted(found, reverse=True)


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
    figure.savefig(png, format="png", dpi=110, metadata={"Software": PICTURE_MARK.decode()})
    return png.getvalue()
