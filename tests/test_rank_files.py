"""Which file of a folder decides the ranks, and which files are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import ranks_of, widths_of
from flatllmcore.core.importance import ImportanceScores
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.core.rank_files import find_ranks, load_ranks, ranks_file, save_ranks
from flatllmcore.errors import InputError
from flatllmcore.utils.dimensions import ModelDimensions
from flatllmcore.utils.files import digest, to_json_bytes, write_json

DIMENSIONS = ModelDimensions("llama", 2, 64, 4, 2, 16, 128)
SELECTOR = ImportancePreservingRankSelector(DIMENSIONS)
WEIGHTS = "0123456789abcdef"
# Q and K are 6144 of a layer's 36864 weights, so a total of 80 % is (0.8 · 36864 - 6144) / 30720 of the rest: 76 %.
AUTHORS_KEPT = "sparsity_score_76%.pt"


def scores(*values: float, **fields: object) -> ImportanceScores:
    known = {"model_id": "tiny", "fingerprint": WEIGHTS, "dimensions": DIMENSIONS, "dataset": "pydocs"}
    return ImportanceScores(scores=values, nsamples=1, seqlen=8, seed=42, **(known | fields))


def found(place: Path, percent: int = 20, selector: ImportancePreservingRankSelector = SELECTOR):
    return find(place, selector, WEIGHTS, percent)


def find(place: Path, selector: ImportancePreservingRankSelector, fingerprint: str, percent: int):
    keep_ratio = 1 - percent / 100

    def allocate(scores, sha256):
        return replace(selector.allocate(scores, keep_ratio), importance_sha256=sha256)

    return find_ranks(place, selector, fingerprint, keep_ratio, allocate)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Scores, and the ranks made of them, for 20 % removed."""
    write_json(tmp_path / "importance.json", scores(0.1, 0.2))
    sha256 = digest(to_json_bytes(scores(0.1, 0.2)))
    save_ranks(replace(SELECTOR.allocate([0.1, 0.2], 0.8), importance_sha256=sha256), tmp_path / "ranks_20.json")
    return tmp_path


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_most_specific_file_of_a_folder_decides(tmp_path):
    """Each file holds other scores, so what was used can be told from the ranks."""
    by_file = {
        "ranks_20.json": SELECTOR.allocate([0.1, 0.2], 0.8),
        "importance.json": SELECTOR.allocate([0.2, 0.1], 0.8),
        AUTHORS_KEPT: [0.625, 0.875],
        "bi_score.pt": SELECTOR.allocate([0.15, 0.16], 0.8),
    }
    save_ranks(by_file["ranks_20.json"], tmp_path / "ranks_20.json")
    save_ranks(SELECTOR.allocate([0.3, 0.1], 0.7), tmp_path / "ranks_30.json")
    write_json(tmp_path / "importance.json", scores(0.2, 0.1))
    torch.save(by_file[AUTHORS_KEPT], tmp_path / AUTHORS_KEPT)
    torch.save([0.15, 0.16], tmp_path / "bi_score.pt")
    for name, expected in by_file.items():
        ranks = ranks_of(expected) if isinstance(expected, RankAllocation) else (10, 14)
        assert ranks_of(found(tmp_path)) == ranks, name
        (tmp_path / name).unlink()
    assert found(tmp_path) is None


def test_a_file_given_by_name_is_used_whatever_stands_beside_it(folder):
    torch.save([0.625, 0.875], folder / AUTHORS_KEPT)
    assert [kept.keep for kept in found(folder / AUTHORS_KEPT).layers] == [0.625, 0.875]
    write_json(folder / "of_yesterday.json", scores(0.3, 0.1))
    assert found(folder / "of_yesterday.json").layers == SELECTOR.allocate([0.3, 0.1], 0.8).layers


def test_the_authors_shares_are_used_as_they_are(tmp_path):
    torch.save([0.5, 1.0], tmp_path / AUTHORS_KEPT)
    allocation = found(tmp_path)
    assert ranks_of(allocation) == (8, 16)
    assert widths_of(allocation) == (64, 128)
    assert allocation.sparsity_percent == pytest.approx(100 * 0.5 * 30720 / (2 * 36864))


def test_a_folder_that_is_not_there_or_holds_other_targets_has_no_ranks(tmp_path):
    assert found(tmp_path / "nosuch") is None
    save_ranks(SELECTOR.allocate([0.1, 0.2], 0.7), tmp_path / ranks_file(30))
    assert found(tmp_path) is None
    assert found(tmp_path, 30).sparsity_percent == 30


def test_ranks_made_of_other_scores_than_those_beside_them_are_refused(folder):
    assert found(folder) == load_ranks(folder / "ranks_20.json")
    write_json(folder / "importance.json", scores(0.1, 0.3))
    with pytest.raises(InputError, match=r"ranks_20\.json: .*other scores than .*importance\.json"):
        found(folder)
    (folder / "importance.json").unlink()
    assert found(folder) is not None


def test_scores_formatted_by_another_program_keep_their_ranks(folder):
    """The digest is of the file, as compute_rank.py takes it."""
    edit(folder / "importance.json")
    fresh = found(folder / "importance.json")
    save_ranks(fresh, folder / "ranks_20.json")
    assert found(folder) == fresh


@pytest.mark.parametrize("name", ["ranks_20.json", "importance.json"])
def test_other_weights_of_the_same_sizes_are_refused(folder, name):
    with pytest.raises(InputError, match=rf"{name}: .*other weights"):
        find(folder / name, SELECTOR, "f" * 16, 20)


@pytest.mark.parametrize("name", ["ranks_20.json", "importance.json"])
def test_another_model_is_refused_with_the_sizes_that_differ(folder, name):
    other = ImportancePreservingRankSelector(ModelDimensions("llama", 2, 64, 4, 2, 16, 96))
    with pytest.raises(InputError, match=rf"{name}: .*another model.*intermediate_size 128, not 96"):
        found(folder / name, selector=other)


def test_ranks_for_pruned_queries_and_keys_do_not_fit_a_run_that_keeps_them(tmp_path):
    pruning = ImportancePreservingRankSelector(DIMENSIONS, prune_qk=True)
    save_ranks(pruning.allocate([0.1, 0.2], 0.8), tmp_path / "ranks_20.json")
    with pytest.raises(InputError, match=r"ranks_20\.json: .*pruned Q and K, which are whole here"):
        found(tmp_path)
    assert found(tmp_path, selector=pruning).prune_qk


@pytest.mark.parametrize("name", ["ranks_20.json", "importance.json", AUTHORS_KEPT, "bi_score.pt"])
@pytest.mark.parametrize("content", [b"", b"{", b"5", b"[1, 2]", b"{}", b'{"scores": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        found(tmp_path)
    assert str(tmp_path / name) in str(refusal.value)


@pytest.mark.parametrize("name", [AUTHORS_KEPT, "bi_score.pt"])
def test_the_authors_files_for_another_number_of_layers_are_named(tmp_path, name):
    torch.save([0.5, 0.5, 0.5], tmp_path / name)
    with pytest.raises(InputError, match="has 3 entries; the model has 2 layers") as refusal:
        found(tmp_path)
    assert str(tmp_path / name) in str(refusal.value)


def test_ranks_out_of_bounds_are_named(folder):
    edit(folder / "ranks_20.json", value_rank=[17, 1])
    with pytest.raises(InputError, match=r"ranks_20\.json: 'value_rank' of layer 0 is 17; accepted: 1 to 16"):
        found(folder)
