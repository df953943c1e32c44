"""The authors' files of scores and shares are read without being trusted."""

import functools
import math
import re
import reprlib
from pathlib import Path

import numpy as np
import pytest
import torch

from flatllmcore.core.importance import read_author_numbers
from flatllmcore.errors import InputError

NUMBERS = [0.75, 0.5, 0.125]  # exact in every binary format


EXPANDING = functools.reduce(lambda inner, _: [inner, inner], range(32), 0.5)  # each list is stored once


def save(content: object, folder: Path) -> Path:
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
    numbers = read_author_numbers(save(content, tmp_path))
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
    path = save([Bomb(proof)], tmp_path)
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
        read_author_numbers(save(content, tmp_path))
    assert "\n" not in str(refusal.value)
    assert "load" not in str(refusal.value)
