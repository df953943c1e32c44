"""Step 5 of the method: Nyström selection of MLP channels by ridge leverage scores.

Everything is factorised by Cholesky in float64; no inverse is formed whole. In a group of processes all call these
functions with the same moment, and share out what they cost (``cholesky.py``). Shapes: D hidden size, F MLP width, k
kept channels.
"""

import logging

import torch
from torch import Tensor, nn

from ..utils.processes import all_reduce, own_share
from .cholesky import cholesky, inverse_column_energies

logger = logging.getLogger(__name__)

RIDGE = 1.0  # λ of the leverage scores, on the unnormalised sum
# Tried in turn, as shares of each channel's own energy: float32 sums can round a moment to one a little indefinite.
SUM_ROUNDING = (0.0, 1e-6, 1e-4)
# Tried in turn, where none is not enough, on the kept channels' correlation matrix: relative to each one's own energy.
JITTERS = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
# With few tokens per channel an exact solve fits their noise, worst where the kept channels are about as many as the
# tokens. A tenth of each channel's energy mends that (benchmarks/few_tokens.py); it is faded out, so that more tokens
# never do worse, and from four tokens per channel on the solve is exact.
FEW_TOKENS_JITTER = 0.1
ENOUGH_TOKENS_PER_CHANNEL = 4
# A squared pivot is the share of a channel's energy that earlier ones do not explain; float64 has lost it below this.
SMALLEST_PIVOT = 1e-11
_ROWS = 1024  # of down_proj at a time


def select_channels(second_moment: Tensor, width: int) -> Tensor:
    """Return the indices, rising, of the ``width`` channels with the highest ridge leverage score in ``C = Σ z zᵀ``.

    The score ``s_i = 1 - λ [(C + λI)⁻¹]_ii`` crowds against 1, so channels are ranked by the diagonal of the inverse,
    smallest first. Ties go to the lower index. A dead channel scores 0, the least there is.
    """
    return diagonal_of_ridge_inverse(second_moment).argsort(stable=True)[:width].sort().values


def channels_kept(mlp: nn.Module, stay: Tensor) -> dict[str, Tensor]:
    """Return the weights, and biases if there are some, of the ``gate_proj`` and ``up_proj`` of the channels that stay.

    They are named within the layer.
    """
    readers = {name: mlp.get_submodule(name) for name in ("gate_proj", "up_proj")}
    return {f"mlp.{name}.{of}": part[stay] for name, it in readers.items() for of, part in it.named_parameters()}


def diagonal_of_ridge_inverse(second_moment: Tensor) -> Tensor:
    """Return the diagonal of ``(C + λI)⁻¹``, (F,): squared lengths of the columns of ``L⁻¹``, where ``C + λI = L Lᵀ``.

    A ridge that would be lost to rounding beside ``C``, (F, F), is raised to what is not: 8 times the machine's epsilon
    of the trace. ArithmeticError if ``C`` is not positive semidefinite, by more than float32 sums round.
    """
    diagonal = second_moment.diagonal().clone()
    smallest = 8 * torch.finfo(diagonal.dtype).eps * second_moment.trace().item()
    for share in SUM_ROUNDING:
        second_moment.diagonal().mul_(1 + share).add_(max(RIDGE, smallest))
        factor = cholesky(second_moment)
        second_moment.diagonal().copy_(diagonal)  # back as it was: a copy of the whole would be as large as the factor
        if factor is not None:
            return inverse_column_energies(factor)
    raise ArithmeticError("the MLP moment is not positive semidefinite")


def few_tokens_jitter(tokens: int, channels: int) -> float:
    """Return the jitter for a moment of ``channels`` summed over ``tokens``: 0 if these are enough."""
    return FEW_TOKENS_JITTER * max(0.0, 1 - tokens / (ENOUGH_TOKENS_PER_CHANNEL * channels))


def reconstruct_down_projection(
    down_weight: Tensor, second_moment: Tensor, kept: Tensor, *, jitter: float = 0.0
) -> Tensor:
    """Return ``W_down C[:, I] C[I, I]⁻¹``, the least-squares fit of ``down_proj`` on kept channels, float64, (D, k).

    Written as ``W_down[:, I] + W_down[:, J] C[J, I] C[I, I]⁻¹`` with the dropped channels ``J``: cheaper,
    exact when nothing is dropped, and where ``C[I, I]`` is singular the part that the data does not
    determine stays what it was. A kept channel that is dead keeps its own weights in the same way. Rows of
    ``down_weight``, (D, F), have nothing to do with each other, and processes share them out.
    ``jitter`` is the share of each kept channel's energy added to it; where too little, ``JITTERS`` above it are tried,
    and where even the last leaves ``C[I, I]`` without a Cholesky factor an ArithmeticError says so.
    """
    is_dropped = torch.ones_like(second_moment[0], dtype=torch.bool).index_fill_(0, kept, False)
    (dropped,) = is_dropped.nonzero(as_tuple=True)
    energy = second_moment.diagonal()[kept]
    scale = torch.where(energy > 0, energy.rsqrt(), torch.ones_like(energy))
    # In place, and no name for what is done with: these are large. (k, k)
    factor = _cholesky_with_jitter(second_moment[kept[:, None], kept].mul_(scale[:, None]).mul_(scale), jitter)
    coupling = second_moment[dropped[:, None], kept].mul_(scale)  # (F - k, k)

    fitted = second_moment.new_zeros(len(down_weight), len(kept))
    for rows, place in zip(own_share(down_weight).split(_ROWS), own_share(fitted).split(_ROWS), strict=True):
        weight = rows.double()
        # Two triangular solves are what cholesky_solve does, on a copy of the factor.
        halfway = torch.linalg.solve_triangular(factor, (weight[:, dropped] @ coupling).T, upper=False)
        correction = torch.linalg.solve_triangular(factor.mT, halfway, upper=True).T * scale
        torch.add(weight[:, kept], correction, out=place)
    all_reduce(fitted)
    return fitted


def _cholesky_with_jitter(correlation: Tensor, least: float) -> Tensor:
    """Return the Cholesky factor of a correlation matrix plus ``least``, or the first larger jitter that is sound."""
    unit = correlation.diagonal().clone()
    for jitter in (least, *(larger for larger in JITTERS if larger > least)):
        correlation.diagonal().copy_(unit + jitter)
        factor = cholesky(correlation)
        if factor is not None and factor.diagonal().square().min().item() > SMALLEST_PIVOT:
            if jitter:
                logger.debug("the kept MLP channels' moment is solved with jitter %.1e", jitter)
            return factor
    raise ArithmeticError(f"the kept MLP channels' moment has no Cholesky factor even with jitter {jitter:.0e}")
