"""Step 5 of the method: Nyström selection of MLP channels by ridge leverage scores.

Everything is factorised by Cholesky in float64; no inverse is formed. Shapes: D hidden size, F MLP
width, k kept channels.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

RIDGE = 1.0  # λ of the leverage scores, on the unnormalised sum
# Jitter tried in turn on the correlation matrix of the kept channels (unit diagonal, so it is relative
# to each channel's own energy).
JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)
# With fewer tokens than channels the moment is singular, and an exact solve fits the few tokens' noise:
# worst where the kept channels are about as many as the tokens. Measured (benchmarks/few_tokens.py), a tenth
# of each channel's energy mends that; with tokens enough the solve stays exact.
FEW_TOKENS_JITTERS = (0.1,)
# A squared pivot is the share of a channel's energy that earlier channels do not explain; below this,
# float64 has lost it and the factor is no basis for a solve.
SMALLEST_PIVOT = 1e-11
_COLUMNS = 1024  # of the triangular inverse at a time


def select_channels(second_moment: Tensor, width: int) -> Tensor:
    """Return the indices of the ``width`` channels with the highest ridge leverage score, rising.

    The score ``s_i = 1 - λ [(C + λI)⁻¹]_ii`` crowds against 1, so channels are ranked by the diagonal
    of the inverse, smallest first. Ties go to the lower index. A dead channel scores 0, the least there is.

    Args:
        second_moment: ``C = Σ z zᵀ``, float64, (F, F).
        width: ``1 <= width <= F``.

    Returns:
        int64, (width,).

    Raises:
        ValueError: If ``C`` is not finite or ``width`` is out of range.
    """
    channels = len(second_moment)
    if not 1 <= width <= channels:
        raise ValueError(f"an MLP width between 1 and {channels} can be kept, not {width}")
    if not torch.isfinite(second_moment).all():
        raise ValueError("the MLP moment is not finite")
    diagonal = diagonal_of_ridge_inverse(second_moment)
    return diagonal.argsort(stable=True)[:width].sort().values


def diagonal_of_ridge_inverse(second_moment: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the diagonal of ``(C + λI)⁻¹``, float64, (F,).

    With ``C + λI = L Lᵀ`` entry ``i`` is the squared length of column ``i`` of ``L⁻¹``. That column is
    zero above row ``i``, so a strip of columns needs only the trailing block of ``L``: F³/3 operations
    in all and F × 1024 numbers of memory.
    """
    shifted = second_moment.clone()
    shifted.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(shifted, out=shifted)
    diagonal = torch.empty(len(factor), dtype=factor.dtype, device=factor.device)
    for start in range(0, len(factor), _COLUMNS):
        trailing = factor[start:, start:]
        columns = torch.eye(len(trailing), min(_COLUMNS, len(trailing)), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(trailing, columns, upper=False)
        diagonal[start : start + _COLUMNS] = inverse.square().sum(0)
    return diagonal


def reconstruct_down_projection(
    down_weight: Tensor, second_moment: Tensor, kept: Tensor, *, is_singular: bool = False
) -> Tensor:
    """Return ``W_down C[:, I] C[I, I]⁻¹``, the least-squares fit of ``down_proj`` on the kept channels.

    Written as ``W_down[:, I] + W_down[:, J] C[J, I] C[I, I]⁻¹`` with the dropped channels ``J``: cheaper,
    exact when nothing is dropped, and where ``C[I, I]`` is singular the part that the data does not
    determine stays what it was. A kept channel that is dead keeps its own weights in the same way.

    Args:
        down_weight: (D, F).
        second_moment: ``C``, float64, (F, F).
        kept: Rising indices ``I``, (k,).
        is_singular: Whether ``C`` sums fewer tokens than it has channels; ``C[I, I]`` is then solved with
            ``FEW_TOKENS_JITTERS``.

    Returns:
        float64, (D, k).

    Raises:
        ValueError: If even the last jitter leaves ``C[I, I]`` without a Cholesky factor.
    """
    weight = down_weight.double()
    is_dropped = torch.ones(len(second_moment), dtype=torch.bool, device=second_moment.device)
    is_dropped[kept] = False
    moment = second_moment[kept][:, kept]  # (k, k)
    cross = weight[:, is_dropped] @ second_moment[is_dropped][:, kept]  # (D, k)

    energy = moment.diagonal()
    scale = torch.where(energy > 0, energy.rsqrt(), torch.ones_like(energy))
    jitters = FEW_TOKENS_JITTERS if is_singular else JITTERS
    factor = _cholesky_with_jitter(moment * scale[:, None] * scale, jitters)
    fitted = torch.cholesky_solve((cross * scale).T, factor).T * scale
    return weight[:, kept] + fitted


def _cholesky_with_jitter(correlation: Tensor, jitters: Sequence[float]) -> Tensor:
    """Return the Cholesky factor of a correlation matrix plus the first of ``jitters`` that makes it sound."""
    unit = correlation.diagonal().clone()
    for jitter in jitters:
        correlation.diagonal().copy_(unit + jitter)
        factor, failed_at = torch.linalg.cholesky_ex(correlation)
        if failed_at.item() == 0 and factor.diagonal().square().min().item() > SMALLEST_PIVOT:
            if jitter:
                logger.debug("the kept MLP channels' moment is solved with jitter %.0e", jitter)
            return factor
    raise ValueError(f"the kept MLP channels' moment has no Cholesky factor even with jitter {jitters[-1]:.0e}")
