"""Cholesky factors of matrices of tens of thousands of rows, shared out over processes where there are several.

In a group of processes all call these functions with the same matrix, and all end with the same result. What a block
costs shrinks or grows along the matrix, so blocks are dealt out there and back.
"""

import torch
from torch import Tensor

from ..utils.processes import all_reduce, broadcast, is_own_turn

BLOCK = 256  # columns


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of a symmetric matrix (n, n), in memory of its own; None if it has none.

    Right-looking: each panel of ``BLOCK`` columns is factorised by the process whose turn it is and sent to the others,
    and every process takes it off its own later panels: n³/3 operations. What stands above the diagonal blocks has no
    meaning. One process takes the same way: LAPACK's factor is no faster, and rounds otherwise.
    """
    factor = matrix.clone(memory_format=torch.contiguous_format)
    starts = range(0, len(factor), BLOCK)
    for turn, start in enumerate(starts):
        panel = factor[start:, start : start + BLOCK]
        if is_own_turn(turn):
            block, failed_at = torch.linalg.cholesky_ex(panel[:BLOCK])
            panel[:BLOCK] = torch.nan if failed_at.item() else block
            panel[BLOCK:] = torch.linalg.solve_triangular(block.mT, panel[BLOCK:], upper=True, left=False)
        broadcast(panel, turn)
        if panel[0, 0].isnan():
            return None
        for later_turn, later in enumerate(starts[turn + 1 :], turn + 1):
            if is_own_turn(later_turn):
                rest = panel[later - start :]
                factor[later:, later : later + BLOCK].addmm_(rest, rest[:BLOCK].mT, alpha=-1)
    return factor


def inverse_column_energies(factor: Tensor) -> Tensor:
    """Return the squared length of each column of ``L⁻¹``, (n,); what stands above the diagonal blocks does not count.

    Column ``i`` is zero above row ``i``, so a strip of columns needs only the trailing block of ``L``: n³/3 operations,
    and n × ``BLOCK`` numbers of memory.
    """
    energies = factor.new_zeros(len(factor))
    for turn, start in enumerate(range(0, len(factor), BLOCK)):
        if is_own_turn(turn):
            energies[start : start + BLOCK] = _first_columns_of_inverse(factor[start:, start:]).square_().sum(0)
    all_reduce(energies)
    return energies


def _first_columns_of_inverse(factor: Tensor) -> Tensor:
    """Return ``BLOCK`` columns, by forward substitution; torch's own would copy a factor that is part of another."""
    columns = torch.eye(len(factor), min(BLOCK, len(factor)), dtype=factor.dtype, device=factor.device)
    for row in range(0, len(factor), BLOCK):
        rows = slice(row, row + BLOCK)
        if row > 0:
            columns[rows] = (factor[rows, :row] @ columns[:row]).neg_()
        columns[rows] = torch.linalg.solve_triangular(factor[rows, rows], columns[rows], upper=False)
    return columns
