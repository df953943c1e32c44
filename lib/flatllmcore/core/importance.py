"""Step 1 of the method: how much each decoder layer matters.

``angular`` is the method's own: how far a layer turns its input. ``gradient`` is the first-order estimate of what
the loss would change by if a layer's output were taken away.
"""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import InputError
from ..utils.processes import own_share, sum_of_numbers
from ..utils.progress import progress
from .calibration import LayerSource, lent_layer
from .hidden_states import HiddenStates, checked
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerImportance:
    """Scores of all layers and the rows that had no angle.

    Attributes:
        scores: One per layer. Angular: mean angle over tokens in units of π, 0 to 0.5.
        zero_rows: Tokens whose input or output was all zeros; they count as cosine 0.5.
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


def layer_importance(
    source: LayerSource, windows: Tensor, batch_size: int, stopwatch: Stopwatch, method: str = "angular"
) -> LayerImportance:
    """Score every decoder layer, and log the scores.

    Args:
        source: The model, dense.
        windows: Token ids, (N, S).
        batch_size: Windows run at a time; the scores depend on it only by rounding.
        stopwatch: Counts the stages ``read``, ``forward`` and ``angles`` or ``backward``.
        method: ``angular`` or ``gradient``.

    Raises:
        InputError: If the method is unknown, or a layer's activations are not finite.
    """
    if method not in METHODS:
        raise InputError(f"importance method {method!r} is unknown; accepted: {', '.join(METHODS)}")
    found = METHODS[method](source, windows, batch_size, stopwatch)
    if found.zero_rows:
        logger.warning("%d rows of zeros have no angle and count as cosine 0.5", found.zero_rows)
    for index, score in enumerate(found.scores):
        logger.info("layer %d: importance %.4f", index, score)
    return found


@torch.no_grad()
def angular_importance(source: LayerSource, windows: Tensor, batch_size: int, stopwatch: Stopwatch) -> LayerImportance:
    """Score every layer by the mean angle between its input and its output, residual included."""
    hidden = HiddenStates.embed(source, own_share(windows), batch_size)
    scores, zero_rows = [], 0.0
    for index in progress(range(source.num_layers), "importance", "layer"):
        total, zeros = 0.0, 0
        with lent_layer(source, index, stopwatch) as layer:
            for batch in hidden.batches():
                with stopwatch.stage("forward"):
                    outputs = hidden.run(layer, index, batch)
                with stopwatch.stage("angles"):
                    angles, batch_zeros = angles_between(batch.states, outputs)
                    total += angles.sum().item()
                    zeros += batch_zeros
                batch.replace(outputs)
        total, layer_zeros = sum_of_numbers(total, zeros, device=source.device)
        scores.append(total / windows.numel())
        zero_rows += layer_zeros
    return LayerImportance(tuple(scores), int(zero_rows))


@torch.no_grad()
def gradient_importance(source: LayerSource, windows: Tensor, batch_size: int, stopwatch: Stopwatch) -> LayerImportance:
    """Score every layer by the mean over tokens of ``Σ_d |∂loss/∂h_d · h_d|`` with ``h`` the layer's output.

    This is the first-order Taylor estimate of what taking away each hidden unit does to a window's mean next-token
    loss. The absolute value is taken per unit: the final norm makes the loss blind to the length of the last
    layer's output, so there the products of a token sum to zero whatever the layer does.

    What is kept at a time are one batch's hidden states at every layer boundary, ``(L + 1)·batch·S·D`` numbers on the
    device, and one layer: its forward pass is run again to carry the gradient back through it. So every batch borrows
    each layer twice (the first, below which nothing is asked, once), where the angular score borrows it once for all
    windows. Weights that are in host memory cross to the device as often: for 128 windows of 4096 tokens one at a time
    those of Llama-2 7B, 13 GB in bf16, some 250 times. A larger batch divides that number and multiplies the states.
    """
    arguments = source.layer_arguments(windows.shape[1])
    totals = [0.0] * source.num_layers
    for ids in progress(own_share(windows).split(batch_size), "gradient importance", "batch"):
        with source.embedding() as embed:
            states = [embed(ids)]  # states[l + 1] is the output of layer l
        with stopwatch.stage("forward"):
            for index in range(source.num_layers):
                with lent_layer(source, index, stopwatch) as layer:
                    states.append(checked(layer(states[index], **arguments[index]), index))
        with stopwatch.stage("backward"):
            gradient = _loss_gradient(source, states[-1], ids.to(source.device))
            for index in reversed(range(source.num_layers)):
                totals[index] += (gradient * states[index + 1]).abs().sum(dtype=torch.float64).item()
                if index > 0:
                    with lent_layer(source, index, stopwatch) as layer, torch.enable_grad():
                        inputs = states[index].detach().requires_grad_()
                        outputs = layer(inputs, **arguments[index])
                        (gradient,) = torch.autograd.grad(outputs, inputs, gradient)
    totals = sum_of_numbers(*totals, device=source.device)
    return LayerImportance(tuple(total / windows.numel() for total in totals), zero_rows=0)


METHODS = {"angular": angular_importance, "gradient": gradient_importance}


def _loss_gradient(source: LayerSource, states: Tensor, ids: Tensor) -> Tensor:
    """Return the gradient of each window's mean loss at the last layer's output, window by window, (batch, S, D)."""
    gradient = torch.zeros_like(states)
    with source.head() as logits_of, torch.enable_grad():
        for window, targets, part in zip(states, ids, gradient, strict=True):
            inputs = window[:-1].detach().requires_grad_()
            logits = logits_of(inputs)
            loss = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[1:])
            part[:-1] = torch.autograd.grad(loss, inputs)[0]
    return gradient
