"""Files of scores and ranks: ours come back equal, which of a folder decides, and which are refused."""

import functools
import json
import math
import re
import reprlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import edit
from flatllmcore.core.importance import ImportanceScores, read_author_numbers
from flatllmcore.core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from flatllmcore.core.rank_files import find_ranks, read_ranks, save_ranks
from flatllmcore.errors import InputError
from flatllmcore.utils.dimensions import Kept, ModelDimensions
from flatllmcore.utils.files import digest, read_json, to_json_bytes, write_json
from flatllmcore.utils.names import ranks_file

DIMENSIONS = ModelDimensions("llama", 2, 64, 4, 2, 16, 128)
SELECTOR = ImportancePreservingRankSelector(DIMENSIONS)
PRUNING = ImportancePreservingRankSelector(DIMENSIONS, prune_qk=True)
WEIGHTS = "0123456789abcdef"
# Q and K are 6144 of a layer's 36864 weights, so a total of 80 % is (0.8 · 36864 - 6144) / 30720 of the rest: 76 %.
AUTHORS_KEPT = "sparsity_score_76%.pt"


def scores(*values: float) -> ImportanceScores:
    return ImportanceScores("tiny", WEIGHTS, DIMENSIONS, "pydocs", nsamples=1, seqlen=8, seed=42, scores=values)


def found(place: Path, percent: int = 20, selector=SELECTOR, fingerprint: str = WEIGHTS) -> RankAllocation | None:
    keep_ratio = 1 - percent / 100

    def allocate(scores, curves, sha256):
        return replace(selector.allocate(scores, keep_ratio), importance_sha256=sha256)

    return find_ranks(place, selector, fingerprint, keep_ratio, allocate)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Scores, and the ranks made of them, for 20 % removed."""
    write_json(tmp_path / "importance.json", scores(0.1, 0.2))
    sha256 = digest(to_json_bytes(scores(0.1, 0.2)))
    save_ranks(replace(SELECTOR.allocate([0.1, 0.2], 0.8), importance_sha256=sha256), tmp_path / "ranks_20.json")
    return tmp_path


@pytest.mark.parametrize("selector", [SELECTOR, PRUNING])
def test_what_is_saved_comes_back_equal_to_the_last_bit(tmp_path, selector):
    allocation = replace(selector.allocate([0.1, 0.2], 0.8), importance_sha256="ab" * 32, fingerprint=WEIGHTS)
    path = tmp_path / "new" / "ranks_20.json"
    save_ranks(allocation, path)
    assert read_ranks(path) == allocation
    content = json.loads(path.read_text())
    assert (content["sparsity_ratio"], content["parameters_before"]) == (20, 2 * 36864)
    assert content["parameters_after"] == allocation.parameters_after
    assert content["achieved_sparsity_percent"] == allocation.achieved_sparsity_percent
    written = replace(scores(0.1 + 0.2, 1 / 3), zero_rows=2, versions={"torch": "2.6.0"})
    write_json(tmp_path / "importance.json", written)
    assert read_json(tmp_path / "importance.json", ImportanceScores) == written


@pytest.mark.parametrize("pairs", [(None, None), (None, 4), (2, 3)])
def test_rotary_pairs_come_back_also_where_all_stay(tmp_path, pairs):
    layers = tuple(Kept(0.8, 12, 96, query_key_pairs=left) for left in pairs)
    allocation = RankAllocation(20.0, True, 1, DIMENSIONS, layers)
    save_ranks(allocation, tmp_path / "ranks_20.json")
    assert read_ranks(tmp_path / "ranks_20.json") == allocation


def test_the_most_specific_file_of_a_folder_decides(tmp_path):
    """Each file holds other scores, so what was used can be told from the ranks."""
    assert found(tmp_path / "nosuch") is None
    save_ranks(SELECTOR.allocate([0.1, 0.2], 0.8), tmp_path / "ranks_20.json")
    save_ranks(SELECTOR.allocate([0.3, 0.1], 0.7), tmp_path / ranks_file(30))
    write_json(tmp_path / "importance.json", scores(0.2, 0.1))
    torch.save([0.625, 0.875], tmp_path / AUTHORS_KEPT)
    torch.save([0.15, 0.16], tmp_path / "bi_score.pt")
    for name, expected in {
        "ranks_20.json": SELECTOR.allocate([0.1, 0.2], 0.8),
        "importance.json": SELECTOR.allocate([0.2, 0.1], 0.8),
        AUTHORS_KEPT: SELECTOR.floored([0.625, 0.875]),
        "bi_score.pt": SELECTOR.allocate([0.15, 0.16], 0.8),
    }.items():
        assert found(tmp_path).layers == expected.layers, name
        (tmp_path / name).unlink()
    assert found(tmp_path) is None
    assert found(tmp_path, 30).sparsity_ratio == 30


def test_a_file_given_by_name_is_used_as_it_is_whatever_stands_beside_it(folder):
    torch.save([0.5, 1 + 1e-7], folder / AUTHORS_KEPT)  # above 1 by rounding
    allocation = found(folder / AUTHORS_KEPT)
    assert allocation.layers == (Kept(0.5, 8, 64), Kept(1.0, 16, 128))
    assert allocation.sparsity_ratio == pytest.approx(100 * 0.5 * 30720 / (2 * 36864))
    write_json(folder / "of_yesterday.json", scores(0.3, 0.1))
    assert found(folder / "of_yesterday.json").layers == SELECTOR.allocate([0.3, 0.1], 0.8).layers


def test_ranks_made_of_other_scores_than_those_beside_them_are_refused(folder):
    assert found(folder) == read_ranks(folder / "ranks_20.json")
    edit(folder / "importance.json")  # formatted by another program: the digest is of the file
    with pytest.raises(InputError, match=r"ranks_20\.json: .*other scores than .*importance\.json"):
        found(folder)
    save_ranks(found(folder / "importance.json"), folder / "ranks_20.json")
    assert found(folder) is not None
    (folder / "importance.json").unlink()
    assert found(folder) is not None


def test_ranks_for_pruned_queries_and_keys_do_not_fit_a_run_that_keeps_them(folder, tmp_path):
    with pytest.raises(InputError, match="made with prune_qk False, not True"):
        found(folder, selector=PRUNING)
    save_ranks(PRUNING.allocate([0.1, 0.2], 0.8), folder / "ranks_20.json")
    with pytest.raises(InputError, match=r"ranks_20\.json: .* prune_qk True, not False"):
        found(folder)
    assert found(folder, selector=PRUNING).prune_qk


@pytest.mark.parametrize("name", ["ranks_20.json", "importance.json", AUTHORS_KEPT, "bi_score.pt"])
@pytest.mark.parametrize("content", [b"", b"{", b"5", b"[1, 2]", b"{}", b'{"scores": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        found(tmp_path)
    assert str(refusal.value).count(str(tmp_path / name)) == 1
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("ranks_20.json", {"value_rank": [1]}, "'value_rank' has 1 entries; the model has 2 layers"),
        ("ranks_20.json", {"value_rank": [16, 2.5]}, r"Expected `int`, got `float` - at `\$\.value_rank\[1\]`"),
        ("ranks_20.json", {"value_rank": [16, 17]}, "'value_rank' of layer 1 is 17; .* more than 0, at most 16"),
        ("ranks_20.json", {"sparsity_ratio": 1e9}, r"the ranks are to remove 1e\+09 %, and here it is 20 %"),
        ("importance.json", {"scores": [0.1]}, "'scores' has 1 entries; the model has 2 layers"),
        ("importance.json", {"scores": [0.1, -0.2]}, "the score of layer 1 is -0.2; accepted: finite"),
        ("importance.json", {"dimensions": vars(DIMENSIONS) | {"head_dim": 10**9}}, "head_dim is 1,000,000,000; acc"),
        (AUTHORS_KEPT, [0.5, 1.01], "'keep' of layer 1 is 1.01; accepted: more than 0, at most 1"),
        ("bi_score.pt", [0.5, -0.1], "the score of layer 1 is -0.1; scores must be finite and more than 0"),
    ],
)
def test_what_does_not_fit_is_named(folder, name, content, complaint):
    edit(folder / name, **content) if name.endswith("json") else torch.save(content, folder / name)
    with pytest.raises(InputError, match=complaint) as refusal:
        found(folder / name)
    assert str(refusal.value).startswith(f"{folder / name}: ")
    assert "\n" not in str(refusal.value)


# The authors' files, which are read without being trusted


NUMBERS = [0.75, 0.5, 0.125]  # exact in every binary format
EXPANDING = functools.reduce(lambda inner, _: [inner, inner], range(32), 0.5)  # each list is stored once


def save_numbers(content: object, folder: Path) -> Path:
    torch.save(content, folder / "bi_score.pt")
    return folder / "bi_score.pt"


@pytest.mark.parametrize(
    "content",
    [
        tuple(NUMBERS),
        [np.float64(x) for x in NUMBERS],
        np.array(NUMBERS, dtype=np.float16),
        torch.tensor(NUMBERS, dtype=torch.bfloat16),
        [torch.tensor(x) for x in NUMBERS],
    ],
    ids=["tuple", "float64s", "array16", "bfloat16", "tensors"],
)
def test_every_format_in_the_wild_gives_plain_floats(content, tmp_path):
    numbers = read_author_numbers(save_numbers(content, tmp_path))
    assert numbers == NUMBERS
    assert {type(x) for x in numbers} == {float}


@pytest.mark.parametrize("content", [np.array(NUMBERS), [np.float64(x) for x in NUMBERS]], ids=["array", "scalars"])
def test_files_of_the_other_numpy_version_are_read(content, tmp_path):
    """With the module names that the other major version writes, in torch's older file format."""
    path = tmp_path / "bi_score.pt"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    written, other = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    if written not in path.read_bytes():
        written, other = other, written
    renamed = path.read_bytes().replace(written, other)
    assert other in renamed
    path.write_bytes(renamed)
    assert read_author_numbers(path) == NUMBERS


class Bomb:
    """Unpickles by creating a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    proof = tmp_path / "executed"
    path = save_numbers([Bomb(proof)], tmp_path)
    with pytest.raises(InputError, match="cannot read") as caught:
        read_author_numbers(path)
    assert not re.search("\n|load|trust|weights_only", str(caught.value))  # torch's own message says how to run it
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists()  # the file was dangerous indeed


@pytest.mark.parametrize(
    "content",
    [
        *({"scores": NUMBERS}, "0.5", 0.5, [], torch.tensor(0.5), torch.zeros(2, 2), [[0.5], [0.5]], ["0.5"], [None]),
        *([0.5, math.nan], np.array([0.5, math.inf]), [10**400], torch.tensor([1j]), torch.eye(3).to_sparse()),
        *(torch.empty(3, device="meta"), torch.zeros(1).expand(10**9), torch.zeros(1).expand(2, 10**9)),
        *([torch.zeros(1).expand(10**9)], EXPANDING),
    ],
    ids=reprlib.repr,
)
def test_anything_but_a_row_of_finite_numbers_is_refused(content, tmp_path):
    """Also a few bytes that stand for billions of numbers: they are not made. Nobody is told to load it unsafely."""
    with pytest.raises(InputError, match="of one finite number per layer") as refusal:
        read_author_numbers(save_numbers(content, tmp_path))
    assert "\n" not in str(refusal.value)
    assert "load" not in str(refusal.value)
