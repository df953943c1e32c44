"""Published figures, and the tables that put ours beside them; no figure in this file was measured by this package."""

from collections.abc import Iterator, Sequence
from itertools import product

from flatllmcore.utils.layer_utils import model_name

from .runs import Record, as_evaluation, evaluations, of_kind, settings
from .tables import NOT_RUN, NOT_THERE, figure, markdown_table

ABOUT = """\
20 % of the decoder layers' linear weights removed; WikiText-2 perplexity at length 4096; accuracy in percent, mean of
MMLU (5-shot) and PIQA, WinoGrande, HellaSwag, ARC-e, ARC-c, OpenBookQA (0-shot). Published: Tian et al., arXiv
2505.23966, Table 1. A run stands here when model, share removed, length and text are these, whatever came out: a
positive difference in perplexity, or a negative one in accuracy, is a miss. What was not run takes the weights and
`bash scripts/llama_7b.sh` or its siblings, then `scripts/eval.sh` for accuracy.

Outside the table, MoDeGPT (Lin et al., arXiv 2408.09632, 4 to 8 hours of calibration), perplexity at 10 to 50 %:
Llama-2 7B 5.48, 6.16, 7.51, 8.41, 11.88; 13B 4.83, 5.29, 6.10, 6.95, 8.95. Published minutes of calibration, Llama-2
13B on one A100: FLAT-LLM 15, SliceGPT 35, SVD-LLM 27, FLAP 10.
"""
ABOUT_SPEED = """\
Medians over interleaved repeats, quartiles in brackets; beside the ratios what arithmetic predicts, of prefill by
operations and of decoding by bytes. Peak memory: of a GPU. Published, by SliceGPT's protocol (Llama-2 7B, batch 128,
256 tokens): decoding 1.04, 1.10, 1.11, 1.17 and 1.23 times as fast at 10 to 50 %, the middle three read off a plot.
"""
MODELS = ("Llama-2-7b-hf", "Llama-2-13b-hf", "Llama-2-70b-hf", "Mistral-7B-v0.1", "Meta-Llama-3-8B")
# Perplexity and mean accuracy of MODELS.
TABLE_1: dict[str, tuple[tuple[float, float] | None, ...]] = {
    "dense": ((5.11, 62.14), (4.57, 65.70), (3.12, 71.38), (4.92, 68.14), (5.75, 68.14)),
    "LLM-Pruner": ((10.55, 53.89), (9.67, 55.45), None, None, None),
    "FLAP": ((6.76, 53.07), (5.90, 57.00), (8.76, 48.29), (7.11, 48.29), (8.42, 54.42)),
    "SliceGPT": ((8.24, 46.26), (7.10, 50.58), (5.76, 57.40), (9.06, 43.18), (16.62, 41.28)),
    "SVD-LLM": ((7.84, 52.32), (7.37, 55.86), (5.96, 61.07), (9.29, 50.23), (17.17, 47.06)),
    "FLAT-LLM": ((6.70, 55.16), (5.55, 63.00), (4.33, 67.98), (6.11, 58.54), (8.15, 61.47)),
}


def table_1(runs: Sequence[Record]) -> str:
    """Return the paper's Table 1 with our runs in it."""
    header = ("model", "method", "perplexity", "here", "difference", "accuracy", "here", "difference", "settings here")
    return markdown_table(header, _table_1_rows(runs))


def _beside(theirs: float, ours: float | None) -> tuple[str, str, str]:
    """Return a published figure, ours and the difference."""
    difference = None if ours is None else round(round(ours, 2) - theirs, 2) + 0.0  # no -0.00
    return figure(theirs), figure(ours), figure(difference, "+.2f")


def _table_1_rows(runs: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Yield a row per model and method, and where the method is ours or none, per run."""
    whole = (run for run in evaluations(runs) if run.get("zero_shot.mean_accuracy") is not None)
    accuracies = {_identity(run): run.number("zero_shot.mean_accuracy") for run in whole}
    for (place, model), (method, published) in product(enumerate(MODELS), TABLE_1.items()):
        if (theirs := published[place]) is None:
            continue
        if method not in ("dense", "FLAT-LLM"):
            yield model, method, figure(theirs[0]), *2 * (NOT_THERE,), figure(theirs[1]), *3 * (NOT_THERE,)
            continue
        for run in [run for run in of_kind(runs, "flatllm") if _is_as_published(run, model)] or (None,):
            perplexity, accuracy = None, accuracies.get((model, None, 0.0)) if method == "dense" else None
            if run is not None and method == "dense":
                perplexity = run.number("perplexity.dense")
            elif run is not None:
                perplexity, accuracy = (
                    run.number("perplexity.compressed"),
                    accuracies.get(_identity(as_evaluation(run))),
                )
            cells = (*_beside(theirs[0], perplexity), *_beside(theirs[1], accuracy))
            yield model, method, *cells, settings(run) if run else NOT_RUN


def _identity(run: Record) -> tuple[str, str | None, float]:
    """Return what tells an evaluated model from others: its name, its origin and the percent removed."""
    removed = run.number("model.achieved_sparsity_percent")
    return run["model.model"], run.get("model.base_model"), round(removed, 6)


def _is_as_published(run: Record, model: str) -> bool:
    """Tell whether a compression was of this model, to the published target, on the published text and length."""
    texts = run["dataset"], run["seqlen"], run["perplexity.dataset"], run["perplexity.seqlen"]
    return (model_name(run["base_model"]), run["sparsity_ratio"], *texts) == (model, 20, *2 * ("wikitext2", 4096))
