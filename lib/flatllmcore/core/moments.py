"""Step 3 of the method: second moments of a decoder layer's heads and MLP activations, streamed.

Nothing is centred. Products are summed within a batch in at least float32 and over batches in float64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..utils.devices import float32_product, product_operand
from ..utils.layer_utils import DecoderModule, ModelDimensions
from ..utils.processes import sum_of_numbers, sum_over_processes
from .stopwatch import Stopwatch

# Rows of the triangle computed at a time: wide enough to keep the matrix product at speed, while
# F / BLOCK strips leave out almost half of the symmetric product.
BLOCK = 512


@dataclass
class LayerMoments:
    """Sums over calibration tokens, float64, on the device of the activations.

    Attributes:
        value: ``Σ v_g v_gᵀ`` for each key/value head, (G, d, d).
        mlp: ``Σ z zᵀ`` of the input ``z`` of ``down_proj``, (F, F).
        query_key: What ``value`` is, of the outputs of ``q_proj``, (H, d, d), and ``k_proj``, (G, d, d), by these
            names; empty unless asked for.
        tokens: How many tokens were summed.
    """

    value: Tensor
    mlp: Tensor
    query_key: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0


def add_head_moments(total: Tensor, outputs: Tensor) -> None:
    """Add ``Σ v vᵀ`` per head to ``total`` in place.

    Args:
        total: float64, (G, d, d).
        outputs: Of ``v_proj``, ``q_proj`` or ``k_proj``, (tokens, G·d).
    """
    heads = outputs.view(len(outputs), *total.shape[:2]).transpose(0, 1)  # (G, tokens, d)
    total += float32_product(heads.mT, heads)


def add_moment(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of ``rowsᵀ rows`` to ``total`` in place, strip by strip.

    Args:
        total: float64, (F, F); what stands above the diagonal strips is left alone.
        rows: Activations, (tokens, F).
    """
    rows = product_operand(rows)
    for start in range(0, rows.shape[1], BLOCK):
        stop = min(start + BLOCK, rows.shape[1])
        total[start:stop, :stop] += float32_product(rows[:, start:stop].T, rows[:, :stop])


def mirror_lower_triangle(total: Tensor) -> None:
    """Copy the strips that :func:`add_moment` summed to their mirror images, in place."""
    for start in range(0, len(total), BLOCK):
        stop = min(start + BLOCK, len(total))
        total[:start, start:stop] = total[start:stop, :start].T


@contextmanager
def collect_moments(
    layer: DecoderModule, dimensions: ModelDimensions, stopwatch: Stopwatch, *, with_queries_and_keys: bool = False
) -> Iterator[LayerMoments]:
    """Sum the moments of everything that runs through ``layer`` inside the block.

    ``down_proj`` is stood in for meanwhile: its input is all that is wanted, so its product is not
    computed and the layer's output inside the block is not meaningful. The moments are complete, and
    the layer is as it was, when the block ends.
    """
    attention, down_proj = layer.self_attn, layer.mlp.down_proj
    zeros = partial(torch.zeros, dtype=torch.float64, device=down_proj.weight.device)
    width = dimensions.head_dim
    moments = LayerMoments(
        value=zeros(dimensions.num_kv_heads, width, width),
        mlp=zeros(dimensions.intermediate_size, dimensions.intermediate_size),
    )
    totals = {attention.v_proj: moments.value}
    if with_queries_and_keys:
        moments.query_key["q_proj"] = totals[attention.q_proj] = zeros(dimensions.num_heads, width, width)
        moments.query_key["k_proj"] = totals[attention.k_proj] = zeros(dimensions.num_kv_heads, width, width)

    def add_heads(projection: nn.Module, _inputs: tuple[Tensor], outputs: Tensor) -> None:
        with stopwatch.stage("moments"):
            add_head_moments(totals[projection], outputs.flatten(0, -2))

    hooks = [projection.register_forward_hook(add_heads) for projection in totals]
    layer.mlp.down_proj = _DownProjectionInput(moments, dimensions.hidden_size, stopwatch)
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()
        layer.mlp.down_proj = down_proj
    mirror_lower_triangle(moments.mlp)


def sum_moments(moments: LayerMoments) -> None:
    """Add up the moments of all processes in place."""
    for total in (moments.value, moments.mlp, *moments.query_key.values()):
        sum_over_processes(total)
    (tokens,) = sum_of_numbers(moments.tokens, device=moments.mlp.device)
    moments.tokens = int(tokens)


class _DownProjectionInput(nn.Module):
    """Stands where ``down_proj`` was, sums the moment of its input and returns zeros of its output's shape."""

    def __init__(self, moments: LayerMoments, hidden_size: int, stopwatch: Stopwatch) -> None:
        super().__init__()
        self.moments = moments
        self.hidden_size = hidden_size
        self.stopwatch = stopwatch

    def forward(self, activations: Tensor) -> Tensor:
        with self.stopwatch.stage("moments"):
            add_moment(self.moments.mlp, activations.flatten(0, -2))
            self.moments.tokens += activations.shape[:-1].numel()
        return activations.new_zeros(()).expand(*activations.shape[:-1], self.hidden_size)
