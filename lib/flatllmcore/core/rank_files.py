"""Finds the ranks of a model in a folder or file of scores and ranks, ours or the authors'."""

import json
import logging
from pathlib import Path

from ..errors import InputError
from ..utils.layer_utils import ModelDimensions
from .importance_scores import ImportanceScores, read_author_keep_ratios, read_author_scores
from .rank_allocation import (
    ImportancePreservingRankSelector,
    RankAllocation,
    prunable_keep_ratio,
    ranks_from_keep_ratios,
)

logger = logging.getLogger(__name__)

IMPORTANCE_FILE = "importance.json"


def ranks_file(sparsity_ratio: int) -> str:
    """Return the name of the file of ranks for a percentage removed."""
    return f"ranks_{sparsity_ratio}.json"


def find_ranks(
    place: Path, selector: ImportancePreservingRankSelector, fingerprint: str, sparsity_ratio: int
) -> RankAllocation | None:
    """Return the ranks that ``place`` holds for a model and a target, or ``None`` if it holds none.

    A file is used as it is. In a folder the first of these decides: ``ranks_<percent>.json``,
    ``importance.json``, the authors' ``sparsity_score_<percent kept of V, O and MLP>%.pt`` and their
    ``bi_score.pt``; scores are allocated by ``selector``.

    Raises:
        InputError: If a file is damaged, or made for another model or from other scores.
    """
    if place.is_file():
        return _read(place, selector, fingerprint, sparsity_ratio)
    kept = prunable_keep_ratio(selector.dimensions, 1 - sparsity_ratio / 100, selector.prune_qk)
    authors = f"sparsity_score_{int(100 * kept + 1e-9)}%.pt"
    for name in (ranks_file(sparsity_ratio), IMPORTANCE_FILE, authors, "bi_score.pt"):
        if (place / name).is_file():
            return _read(place / name, selector, fingerprint, sparsity_ratio)
    return None


def _read(
    path: Path, selector: ImportancePreservingRankSelector, fingerprint: str, sparsity_ratio: int
) -> RankAllocation:
    logger.info("ranks from %s", path)
    if path.suffix == ".pt" and path.name.startswith("sparsity_score"):
        return ranks_from_keep_ratios(selector.dimensions, read_author_keep_ratios(path))
    if path.suffix == ".pt":
        return selector.allocate(read_author_scores(path), sparsity_ratio)
    if _holds_scores(path):
        scores = ImportanceScores.load(path)
        scores.check_matches(selector.dimensions, fingerprint)
        return selector.allocate(scores.scores, sparsity_ratio, scores.sha256())
    allocation = RankAllocation.load(path)
    _check_ranks(allocation, path, selector.dimensions)
    return allocation


def _holds_scores(path: Path) -> bool:
    try:
        return "scores" in json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not a JSON file of scores or ranks: {error}") from error


def _check_ranks(allocation: RankAllocation, path: Path, dimensions: ModelDimensions) -> None:
    if allocation.dimensions != dimensions:
        raise InputError(f"{path} is for another model: {allocation.dimensions}, not {dimensions}")
    scores = path.with_name(IMPORTANCE_FILE)
    digest = allocation.importance_sha256
    if digest and scores.is_file() and ImportanceScores.load(scores).sha256() != digest:
        raise InputError(f"{path} was made from other scores than {scores}; run compute_rank.py again")
