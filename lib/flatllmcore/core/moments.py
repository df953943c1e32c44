"""Step 3 of the method: second moments of activations, streamed.

Nothing is centred. Products are summed within a batch in at least float32, those of massive tokens and all over batches
in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..utils.devices import at_least_float32, float32_product, product_operand

# Rows of the triangle computed at a time: wide enough to keep the matrix product at speed, while
# F / BLOCK strips leave out almost half of the symmetric product.
BLOCK = 512
# Some models give a few tokens activations a thousand times as large, beside which a sum in float32 loses the others'.
# Summed apart, what these tell is exact to 1e-5 of their energy.
MASSIVE = 30  # times the median length of a batch's rows


def add_head_moments(total: Tensor, outputs: Tensor) -> None:
    """Add ``Σ v vᵀ`` of each head to ``total``, float64, (G, d, d), in place; outputs are (tokens, G·d)."""
    for rows in _without_massive(outputs, len(total)):
        heads = rows.view(len(rows), *total.shape[:2]).transpose(0, 1)  # (G, tokens, d)
        total += float32_product(heads.mT, heads)


def add_moment(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of ``rowsᵀ rows`` to ``total``, float64, (F, F), in place; rows are (tokens, F)."""
    for operand in map(product_operand, _without_massive(rows)):
        for start in range(0, len(total), BLOCK):
            stop = min(start + BLOCK, len(total))
            total[start:stop, :stop] += float32_product(operand[:, start:stop].T, operand[:, :stop])


def inverse_length(stream: Tensor) -> Tensor:
    """Return the weights, (tokens, 1), that bring each token of the stream, (tokens, D), to a mean square of 1."""
    wide = at_least_float32(stream)  # float16 has no squares of 256 and more
    least = max(torch.finfo(stream.dtype).tiny ** 2, torch.finfo(wide.dtype).tiny)  # its inverse root fits that type
    return wide.square().mean(-1, keepdim=True).clamp(min=least).rsqrt().to(stream.dtype)


def mirror_lower_triangle(total: Tensor) -> None:
    """Copy the strips that :func:`add_moment` summed to their mirror images, in place."""
    for start in range(BLOCK, len(total), BLOCK):
        total[:start, start : start + BLOCK] = total[start : start + BLOCK, :start].T


def _without_massive(rows: Tensor, num_heads: int = 1) -> Iterator[Tensor]:
    """Yield rows (tokens, width) in parts: as they are, or those with a massive head in float64 and the others."""
    if rows.dtype != torch.float64:
        lengths = torch.linalg.vector_norm(rows.unflatten(1, (num_heads, -1)), dim=-1, dtype=torch.float32)
        is_massive = (lengths > MASSIVE * lengths.median(0).values).any(1)  # (tokens,)
        if is_massive.any():
            yield rows[is_massive].double()
            rows = rows.masked_fill(is_massive[:, None], 0)
    yield rows
