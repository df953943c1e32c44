"""Step 1 of the method: how far each decoder layer turns its input."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibration import HiddenStates, LayerSource, progress
from .stopwatch import Stopwatch


@dataclass(frozen=True)
class LayerImportance:
    """Scores of all layers and the rows that had no angle.

    Attributes:
        scores: Mean angle over tokens in units of π, one per layer, 0 to 0.5.
        zero_rows: Input or output rows of zeros, counted as cosine 0.5.
    """

    scores: tuple[float, ...]
    zero_rows: int


def angles_between(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, int]:
    """Return ``arccos(clamp(cos(x, y), 0, 1)) / π`` for each row, and how many rows had no angle.

    In float64: near cosine 1 the angle is ``√(2(1 - cos))``, and float32 would end at 3e-4. The angles
    are averaged, as the authors' program does; the paper's text takes the angle of the mean cosine.

    Args:
        inputs: (..., D).
        outputs: Same shape.

    Returns:
        Angles, float64, (...), and the number of rows where either side is zero (cosine 0.5 there).
    """
    x, y = inputs.double(), outputs.double()
    lengths = x.norm(dim=-1) * y.norm(dim=-1)
    is_zero = lengths == 0
    cosine = torch.where(is_zero, 0.5, (x * y).sum(-1) / torch.where(is_zero, 1.0, lengths))
    return cosine.clamp(0, 1).arccos() / math.pi, int(is_zero.sum())


@torch.no_grad()
def layer_importance(source: LayerSource, windows: Tensor, batch_size: int, stopwatch: Stopwatch) -> LayerImportance:
    """Score every decoder layer by the angle between its input and its output, residual included.

    Args:
        source: The model, dense.
        windows: Token ids, (N, S).
        batch_size: Windows run at a time; the scores depend on it only by rounding.
        stopwatch: Counts the stages ``forward`` and ``angles``.

    Raises:
        InputError: If a layer's activations are not finite.
    """
    hidden = HiddenStates.embed(source, windows, batch_size)
    scores, zero_rows = [], 0
    for index in progress(source.num_layers, "importance"):
        total = 0.0
        with source.layer(index) as layer:
            for batch in hidden.batches():
                with stopwatch.stage("forward"):
                    outputs = hidden.run(layer, index, batch)
                with stopwatch.stage("angles"):
                    angles, zeros = angles_between(batch.states, outputs)
                    total += angles.sum().item()
                    zero_rows += zeros
                batch.replace(outputs)
        scores.append(total / windows.numel())
    return LayerImportance(tuple(scores), zero_rows)
