"""Step 1 of the method: how much each decoder layer matters, by the method's own score or by another."""

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.curve_allocation import Curves
from ..core.importance import angles_between
from ..layers import replacement
from ..utils.dimensions import Kept
from ..utils.layer_utils import DecoderModule
from ..utils.processes import all_reduce, own_share
from ..utils.progress import progress
from ..utils.stopwatch import stage
from .protocols import Evidence, LayerSource
from .walk import Walk, check_finite, forward_of, lent_layer, tapped

logger = logging.getLogger(__name__)

OUTPUT = ".output"  # of the layer itself
TRIED_TOKENS = 2048  # that weights are tried on whose damage has no closed form


@dataclass(frozen=True)
class LayerImportance:
    """Scores of all layers, and how many rows had no angle."""

    scores: tuple[float, ...]  # angular: mean angles in units of π, 0 to 0.5
    zero_rows: int
    curves: tuple[Curves, ...] | None = None  # of the damage that removing weights of each layer does


def layer_importance(source: LayerSource, windows: Tensor, batch_size: int, method: str = "angular") -> LayerImportance:
    """Score every decoder layer on token ids (N, S), and log the scores, which depend on batches only by rounding."""
    found = IMPORTANCE_METHODS[method](source, windows, batch_size)
    if found.zero_rows:
        logger.warning("%d rows of zeros have no angle and count as cosine 0.5", found.zero_rows)
    for index, score in enumerate(found.scores):
        logger.info("layer %d: importance %.4f", index, score)
    return found


@torch.no_grad()
def angular_importance(source: LayerSource, windows: Tensor, batch_size: int) -> LayerImportance:
    """Score every layer by the mean angle between its input and its output, residual included."""
    walk = Walk(source, windows, batch_size)
    sums = torch.zeros(2, source.num_layers, dtype=torch.float64, device=source.device)  # of angles; of rows of zeros
    for index in progress(range(source.num_layers), "importance", "layer"):
        with lent_layer(source, index) as layer:
            for states, stored in walk.batches():
                outputs = walk.run(layer, index, states)
                with stage("angles"):
                    angles, zero_rows = angles_between(states, outputs)
                    sums[0, index] += angles.sum()
                    sums[1, index] += zero_rows
                stored.copy_(outputs)
    all_reduce(sums)
    return LayerImportance(tuple((sums[0] / windows.numel()).tolist()), int(sums[1].sum()))


@torch.no_grad()
def damage_importance(source: LayerSource, windows: Tensor, batch_size: int, evidence: Evidence) -> LayerImportance:
    """Score every layer as :func:`angular_importance` does, and measure its curves of damage on the way."""
    walk = Walk(source, windows, batch_size)
    is_tried = own_share(torch.arange(len(windows)) * windows.shape[1] < TRIED_TOKENS, batch_size)
    found = torch.zeros(2, source.num_layers, dtype=torch.float64, device=source.device)  # of angles; of rows of zeros
    curves = []
    for index in progress(range(source.num_layers), "damage", "layer"):
        with lent_layer(source, index) as layer:
            sums = evidence.zeros(layer)
            tried = walk.states[is_tried]
            with tapped(layer, [*evidence.taps, OUTPUT]) as look:
                for states, stored in walk.batches():
                    seen = look(partial(walk.run, layer, index, states))
                    with stage("angles"):
                        angles, zero_rows = angles_between(states.flatten(0, 1), seen[OUTPUT])
                        found[0, index] += angles.sum()
                        found[1, index] += zero_rows
                    with stage("moments"):
                        evidence.add(layer, sums, seen)
                    stored.copy_(seen[OUTPUT].view_as(stored))
            for total in sums.values():
                all_reduce(total)
            with stage("solves"):
                curves.append(evidence.curves(layer, sums, partial(_damage_of, walk, layer, index, tried)))
    all_reduce(found)
    scores = tuple((found[0] / windows.numel()).tolist())
    return LayerImportance(scores, int(found[1].sum()), tuple(curves))


def _damage_of(
    walk: Walk, layer: DecoderModule, index: int, tried: Tensor, part: str, kept: Kept, weights: dict[str, Tensor]
) -> float:
    """Return the mean over tokens of ``‖y' - y‖² / ‖y‖²`` of what leaves a part of a layer with other weights."""
    config = replacement.compressed_config(walk.source.config, [kept] * walk.source.num_layers)
    whole = layer.get_submodule(part)
    modules = (whole, replacement.compress_decoder_layer(layer, config, index, weights, part))
    total = torch.zeros(2, dtype=torch.float64, device=walk.source.device)
    for batch in tried.split(walk.batch_size) if len(tried) else ():
        outputs = []
        for module in modules:
            layer.set_submodule(part, module)
            with forward_of(layer, part) as forward:
                outputs.append(walk.run(forward, index, batch.to(walk.source.device)).double().flatten(0, 1))
        layer.set_submodule(part, whole)
        dense, changed = outputs
        total[0] += ((changed - dense).square().sum(-1) / dense.square().sum(-1)).sum()
        total[1] += len(dense)
    all_reduce(total)
    return (total[0] / total[1]).item()


@torch.no_grad()
def gradient_importance(source: LayerSource, windows: Tensor, batch_size: int) -> LayerImportance:
    """Score every layer by the mean over tokens of ``Σ_d |∂loss/∂h_d · h_d|`` with ``h`` the layer's output.

    The first-order Taylor estimate of what taking away each hidden unit does to a window's mean next-token loss.
    Absolute values per unit: the final norm makes the loss blind to the length of the last layer's output, so there the
    products of a token sum to zero whatever the layer does.

    On the device are one batch's hidden states at every layer boundary, ``(L + 1)·batch·S·D`` numbers, and one layer,
    which runs again to carry the gradient back: every batch borrows each layer twice, not all of them together once.
    """
    arguments = source.layer_arguments(windows.shape[1])
    totals = torch.zeros(source.num_layers, dtype=torch.float64, device=source.device)
    for ids in progress(own_share(windows, batch_size).split(batch_size), "gradient importance", "batch"):
        with source.embedding() as embed:
            states = [embed(ids)]  # states[l + 1] is the output of layer l
        with stage("forward"):
            for index in range(source.num_layers):
                with lent_layer(source, index) as layer:
                    states.append(layer(states[index], **arguments[index]))
                check_finite(index, states[-1])
        with stage("backward"):
            gradient = _loss_gradient(source, states[-1], ids.to(source.device))
            for index in reversed(range(source.num_layers)):
                totals[index] += (gradient * states[index + 1]).abs().sum(dtype=torch.float64)
                if index > 0:
                    with lent_layer(source, index) as layer, torch.enable_grad():
                        inputs = states[index].detach().requires_grad_()
                        outputs = layer(inputs, **arguments[index])
                        (gradient,) = torch.autograd.grad(outputs, inputs, gradient)
    all_reduce(totals)
    return LayerImportance(tuple((totals / windows.numel()).tolist()), zero_rows=0)


IMPORTANCE_METHODS = {"angular": angular_importance, "gradient": gradient_importance}


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
