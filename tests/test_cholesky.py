"""Blocked factors against LAPACK's, alone and by turns of a group."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatllmcore.core import cholesky
from flatllmcore.core.cholesky import inverse_column_energies
from flatllmcore.utils import processes


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 8)


def positive_definite(size: int) -> torch.Tensor:
    rows = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return rows.T @ rows


@given(size=st.integers(1, 50))
def test_factor_and_inverse_are_lapack_s(size):
    matrix = positive_definite(size)
    factor = cholesky.cholesky(matrix)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(matrix))
    torch.testing.assert_close(inverse_column_energies(factor), torch.linalg.inv(matrix).diagonal())


@pytest.mark.parametrize("place", [0, 7, 8, 29])
def test_a_matrix_that_is_not_positive_definite_is_told(place):
    matrix = positive_definite(30)
    matrix[place, place] = -1
    assert cholesky.cholesky(matrix) is None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_turns_go_there_and_back_and_every_item_has_one_process(monkeypatch, count):
    monkeypatch.setattr(processes, "_store", object())
    monkeypatch.setattr(processes, "world_size", lambda: count)
    dealt = []
    for rank in range(count):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        dealt.append(processes.own_turns(range(10)))
    assert sorted(item for own in dealt for item in own) == list(range(10))
    if count == 3:
        assert dealt == [[0, 5, 6], [1, 4, 7], [2, 3, 8, 9]]
