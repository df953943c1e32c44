"""Finds the ranks of a model in a folder or file of scores and ranks, ours or the authors'."""

import logging
from hashlib import sha256
from pathlib import Path

from ..errors import InputError
from ..utils.json_fields import read_json_object
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
    try:
        return _ranks_of(path, selector, fingerprint, sparsity_ratio)
    except InputError as error:
        message = str(error)
        raise InputError(message if str(path) in message else f"{path}: {message}") from error


def _ranks_of(
    path: Path, selector: ImportancePreservingRankSelector, fingerprint: str, sparsity_ratio: int
) -> RankAllocation:
    if path.suffix == ".pt" and path.name.startswith("sparsity_score"):
        return ranks_from_keep_ratios(selector.dimensions, read_author_keep_ratios(path), prune_qk=selector.prune_qk)
    if path.suffix == ".pt":
        return selector.allocate(read_author_scores(path), sparsity_ratio)
    if "scores" in read_json_object(path):
        scores = ImportanceScores.load(path)
        scores.check_matches(selector.dimensions, fingerprint)
        return selector.allocate(scores.scores, sparsity_ratio, _digest(path))
    allocation = RankAllocation.load(path)
    _check_ranks(allocation, path, selector, fingerprint)
    return allocation


def _check_ranks(
    allocation: RankAllocation, path: Path, selector: ImportancePreservingRankSelector, fingerprint: str
) -> None:
    differences = allocation.dimensions.differences_from(selector.dimensions)
    if differences:
        raise InputError(f"the ranks belong to another model: {differences}")
    if allocation.prune_qk != selector.prune_qk:
        made, wanted = ("pruned", "whole") if allocation.prune_qk else ("whole", "pruned")
        remedy = "give" if allocation.prune_qk else "drop"
        raise InputError(
            f"the ranks are for {made} Q and K, which are {wanted} here; {remedy} --prune_qk, or name other ranks"
        )
    scores = path.with_name(IMPORTANCE_FILE)
    if allocation.importance_sha256 is None or not scores.is_file():
        return
    if allocation.importance_sha256 != _digest(scores):
        raise InputError(f"the ranks were made from other scores than {scores}; run compute_rank.py again")
    ImportanceScores.load(scores).check_matches(selector.dimensions, fingerprint)


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
