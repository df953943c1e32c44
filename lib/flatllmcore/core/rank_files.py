"""Files of ranks, and the ranks of a model in a folder or file of scores and ranks, ours or the authors'."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import InputError
from ..utils.dimensions import ModelDimensions, check_length
from ..utils.files import digest, read_json, write_json
from ..utils.names import ANGULAR, IMPORTANCE_FILE, ranks_file
from .curve_allocation import Curves
from .importance import ImportanceScores, check_importance_method, differing_parts, read_author_numbers
from .rank_allocation import ImportancePreservingRankSelector, RankAllocation

logger = logging.getLogger(__name__)

SHARE_ROUNDING = 1e-6  # the authors' shares, stored in float32, may pass 1 by their last digit
# Of scores, curves of damage where there are some, and the digest of their file.
Allocate: TypeAlias = Callable[[Sequence[float], Sequence[Curves] | None, str | None], RankAllocation]


@dataclass(frozen=True)
class RanksFile:
    """The content of ``ranks_<percent>.json``; lists have one entry per layer."""

    sparsity_ratio: float
    achieved_sparsity_percent: float
    prune_qk: bool
    rank_multiple: int
    parameters_before: int
    parameters_after: int
    importance_sha256: str | None
    dimensions: ModelDimensions
    keep: list[float]
    value_rank: list[int]
    mlp_width: list[int]
    fingerprint: str | None = None  # of the model; ranks of the authors' scores have none
    query_key_pairs: list[int | None] | None = None  # None for all in a layer; no list where they are not counted
    importance_method: str | None = None  # that the ranks go by


_PER_LAYER = ("keep", "value_rank", "mlp_width")


def save_ranks(allocation: RankAllocation, path: Path) -> None:
    """Write an allocation to a file that :func:`read_ranks` reads."""
    per_layer = {name: allocation.per_layer(name) for name in _PER_LAYER}
    if allocation.prune_qk and not any(allocation.per_layer("query_key_rank")):  # by pairs, also where all stay
        per_layer["query_key_pairs"] = allocation.per_layer("query_key_pairs")
    names = [row.name for row in fields(RanksFile) if hasattr(allocation, row.name)]
    write_json(path, {name: getattr(allocation, name) for name in names} | per_layer)


def read_ranks(path: Path) -> RankAllocation:
    """Return the allocation in a file of ranks; what it says of parameters is counted anew."""
    file = read_json(path, RanksFile)
    for name in _PER_LAYER:
        check_length(name, getattr(file, name), file.dimensions.num_layers)
    sizes = zip(file.keep, file.value_rank, file.mlp_width, strict=True)
    layers = [file.dimensions.kept(*layer, file.prune_qk and file.query_key_pairs is None) for layer in sizes]
    if file.query_key_pairs is not None:
        check_length("query_key_pairs", file.query_key_pairs, file.dimensions.num_layers)
        pairs = zip(layers, file.query_key_pairs, strict=True)
        layers = [replace(kept, query_key_pairs=left) for kept, left in pairs]
    asked = (file.sparsity_ratio, file.prune_qk, file.rank_multiple)
    made_from = (file.importance_sha256, file.fingerprint, file.importance_method)
    return RankAllocation(*asked, file.dimensions, tuple(layers), *made_from)


def find_ranks(
    place: Path, selector: ImportancePreservingRankSelector, fingerprint: str, keep_ratio: float, allocate: Allocate
) -> RankAllocation | None:
    """Return the ranks that ``place`` holds for a model and a target, or ``None`` if it holds none.

    A file is used as it is. In a folder the first of these decides: ``ranks_<percent>.json``, ``importance.json``, the
    authors' ``sparsity_score_<percent kept of V, O and MLP>%.pt`` and their ``bi_score.pt``. An InputError names one
    that is damaged, or made for another model or target (the authors' state neither) or from other scores.
    """
    authors = f"sparsity_score_{int(100 * selector.prunable_keep_ratio(keep_ratio) + 1e-9)}%.pt"
    percent = round(100 * (1 - keep_ratio), 9)
    names = (ranks_file(percent), IMPORTANCE_FILE, authors, "bi_score.pt")
    for path in [place] if place.is_file() else [place / name for name in names]:
        if path.is_file():
            logger.info("ranks from %s", path)
            try:
                return _ranks_of(path, selector, fingerprint, percent, allocate)
            except InputError as error:
                raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return None


def _ranks_of(
    path: Path, selector: ImportancePreservingRankSelector, fingerprint: str, percent: float, allocate: Allocate
) -> RankAllocation:
    if path.suffix == ".pt":
        numbers = read_author_numbers(path)
        if not path.name.startswith("sparsity_score"):
            allocation = allocate(numbers, None, None)
            check_importance_method(ANGULAR, allocation.importance_method)
            return allocation
        shares = [1.0 if 1 < share < 1 + SHARE_ROUNDING else share for share in numbers]
        return replace(selector.floored(shares), importance_method=ANGULAR)
    if "scores" in read_json(path, dict[str, Any]):
        scores = _scores_for(selector, path, fingerprint)
        allocation = allocate(scores.scores, scores.curves_in_nats, digest(path.read_bytes()))
        check_importance_method(scores.method, allocation.importance_method)
        return allocation
    allocation, scores_file = read_ranks(path), path.with_name(IMPORTANCE_FILE)
    allocation.check_matches(selector.dimensions)
    if allocation.fingerprint is not None and allocation.fingerprint != fingerprint:
        other = differing_parts(allocation.fingerprint, fingerprint)
        raise InputError(f"the ranks belong to other {other}; score this model anew")
    if allocation.sparsity_ratio != percent:
        raise InputError(f"the ranks are to remove {allocation.sparsity_ratio:g} %, and here it is {percent:g} %")
    if (made := allocation.prune_qk) != selector.prune_qk:
        raise InputError(f"the ranks are made with prune_qk {made}, not {selector.prune_qk}; give another --bi_score")
    if allocation.importance_sha256 is not None and scores_file.is_file():
        if allocation.importance_sha256 != digest(scores_file.read_bytes()):
            raise InputError(f"the ranks were made from other scores than {scores_file}; run compute_rank.py again")
        _scores_for(selector, scores_file, fingerprint)
    return allocation


def _scores_for(selector: ImportancePreservingRankSelector, path: Path, fingerprint: str) -> ImportanceScores:
    """Return the scores in a file if they are of this model, and log what they were measured on."""
    scores = read_json(path, ImportanceScores)
    scores.check_matches(selector.dimensions, fingerprint)
    logger.info("scores by %s on %d x %d tokens of %s", scores.method, scores.nsamples, scores.seqlen, scores.dataset)
    return scores
