"""Files of ranks, and the ranks of a model in a folder or file of scores and ranks, ours or the authors'."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import InputError
from ..utils.dimensions import Kept, ModelDimensions, check_length
from ..utils.files import digest, read_json, write_json
from .importance import IMPORTANCE_FILE, ImportanceScores, read_author_keep_ratios, read_author_scores
from .rank_allocation import ImportancePreservingRankSelector, RankAllocation

logger = logging.getLogger(__name__)

_PER_LAYER = ("keep", "value_rank", "mlp_width")  # the last fields of RanksFile
Allocate: TypeAlias = Callable[[Sequence[float], str | None], RankAllocation]  # of scores, and their file's digest


def ranks_file(sparsity_percent: float) -> str:
    """Return the name of the file of ranks for a percentage removed."""
    return f"ranks_{sparsity_percent:g}.json"


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


def save_ranks(allocation: RankAllocation, path: Path) -> None:
    """Write an allocation to a file that :func:`load_ranks` reads."""
    per_layer: dict[str, Any] = {name: [getattr(kept, name) for kept in allocation.layers] for name in _PER_LAYER}
    others = {field.name: getattr(allocation, field.name) for field in fields(RanksFile)[1 : -len(_PER_LAYER)]}
    write_json(path, RanksFile(allocation.sparsity_percent, **others, **per_layer))


def load_ranks(path: Path) -> RankAllocation:
    """Return the allocation that a ``ranks_<percent>.json`` holds; an InputError names an unusable field."""
    file = read_json(path, RanksFile)
    try:
        return _allocation_of(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _allocation_of(file: RanksFile) -> RankAllocation:
    sizes = file.dimensions
    for name in _PER_LAYER:
        check_length(name, getattr(file, name), sizes.num_layers)
    layers = tuple(
        Kept(keep, rank, width, sizes.query_key_rank(rank) if file.prune_qk else None)
        for keep, rank, width in zip(file.keep, file.value_rank, file.mlp_width, strict=True)
    )
    keep_ratio = 1 - file.sparsity_ratio / 100
    allocation = RankAllocation(keep_ratio, file.prune_qk, file.rank_multiple, layers, sizes, file.importance_sha256)
    for name in ("parameters_before", "parameters_after"):
        stated, counted = getattr(file, name), getattr(allocation, name)
        if stated != counted:
            raise InputError(f"{name!r} is {stated}, but the ranks and widths add up to {counted}")
    return allocation


def find_ranks(
    place: Path, selector: ImportancePreservingRankSelector, fingerprint: str, keep_ratio: float, allocate: Allocate
) -> RankAllocation | None:
    """Return the ranks that ``place`` holds for a model and a target, or ``None`` if it holds none.

    A file is used as it is. In a folder the first of these decides: ``ranks_<percent>.json``, ``importance.json``, the
    authors' ``sparsity_score_<percent kept of V, O and MLP>%.pt`` and their ``bi_score.pt``. An InputError names one
    that is damaged, or made for another model or from other scores.
    """
    authors = f"sparsity_score_{int(100 * selector.prunable_keep_ratio(keep_ratio) + 1e-9)}%.pt"
    names = (ranks_file(round(100 * (1 - keep_ratio), 9)), IMPORTANCE_FILE, authors, "bi_score.pt")
    for path in [place] if place.is_file() else [place / name for name in names]:
        if path.is_file():
            logger.info("ranks from %s", path)
            try:
                return _ranks_of(path, selector, fingerprint, allocate)
            except InputError as error:
                raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    return None


def _ranks_of(
    path: Path, selector: ImportancePreservingRankSelector, fingerprint: str, allocate: Allocate
) -> RankAllocation:
    if path.suffix == ".pt" and path.name.startswith("sparsity_score"):
        shares = read_author_keep_ratios(path)
        check_length("keep", shares, selector.dimensions.num_layers)
        return RankAllocation.of_layers(selector.dimensions, map(selector.floored, shares), prune_qk=selector.prune_qk)
    if path.suffix == ".pt":
        return allocate(read_author_scores(path), None)
    if "scores" in read_json(path, dict[str, Any]):
        scores = read_json(path, ImportanceScores)
        scores.check_matches(selector.dimensions, fingerprint)
        return allocate(scores.scores, digest(path.read_bytes()))
    allocation = load_ranks(path)
    _check_ranks(allocation, path.with_name(IMPORTANCE_FILE), selector, fingerprint)
    return allocation


def _check_ranks(
    allocation: RankAllocation, scores: Path, selector: ImportancePreservingRankSelector, fingerprint: str
) -> None:
    """Refuse ranks of another model, or made otherwise or from other scores than those that stand beside them."""
    if differences := allocation.dimensions.differences_from(selector.dimensions):
        raise InputError(f"the ranks belong to another model: {differences}")
    if allocation.prune_qk != selector.prune_qk:
        made, wanted, remedy = ("pruned", "whole", "give") if allocation.prune_qk else ("whole", "pruned", "drop")
        raise InputError(
            f"the ranks are for {made} Q and K, which are {wanted} here; {remedy} --prune_qk, or name other ranks"
        )
    if allocation.importance_sha256 is not None and scores.is_file():
        if allocation.importance_sha256 != digest(scores.read_bytes()):
            raise InputError(f"the ranks were made from other scores than {scores}; run compute_rank.py again")
        read_json(scores, ImportanceScores).check_matches(selector.dimensions, fingerprint)
