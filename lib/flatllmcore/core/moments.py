"""Step 3 of the method: second moments of activations, streamed.

Nothing is centred. Products are summed within a batch in at least float32 and over batches in float64.
"""

from torch import Tensor

from ..utils.devices import float32_product, product_operand

# Rows of the triangle computed at a time: wide enough to keep the matrix product at speed, while
# F / BLOCK strips leave out almost half of the symmetric product.
BLOCK = 512


def add_head_moments(total: Tensor, outputs: Tensor) -> None:
    """Add ``Σ v vᵀ`` of each head to ``total``, float64, (G, d, d), in place; outputs are (tokens, G·d)."""
    heads = outputs.view(len(outputs), *total.shape[:2]).transpose(0, 1)  # (G, tokens, d)
    total += float32_product(heads.mT, heads)


def add_moment(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of ``rowsᵀ rows`` to ``total``, float64, (F, F), in place; rows are (tokens, F)."""
    rows = product_operand(rows)
    for start in range(0, rows.shape[1], BLOCK):
        stop = min(start + BLOCK, rows.shape[1])
        total[start:stop, :stop] += float32_product(rows[:, start:stop].T, rows[:, :stop])


def mirror_lower_triangle(total: Tensor) -> None:
    """Copy the strips that :func:`add_moment` summed to their mirror images, in place."""
    for start in range(BLOCK, len(total), BLOCK):
        total[:start, start : start + BLOCK] = total[start : start + BLOCK, :start].T
