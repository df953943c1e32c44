"""Step 1 of the method: how much each decoder layer matters, by the method's own score or by another."""

import logging
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.curve_allocation import scaled
from ..core.importance import LayerImportance
from ..core.refit import factored, with_ridge
from ..errors import InputError
from ..utils.names import ANGULAR, DAMAGE, GRADIENT
from ..utils.processes import all_reduce, own_share
from ..utils.progress import progress
from ..utils.stopwatch import stage
from .damage import LayerDamage, OutputCost
from .memory import layer_arguments
from .protocols import LayerSource
from .walk import Walk, check_finite, lent_layer, solves, tapped

logger = logging.getLogger(__name__)

OUTPUT = ".output"  # of the layer itself


def layer_importance(source: LayerSource, windows: Tensor, batch_size: int, method: str = ANGULAR) -> LayerImportance:
    """Score every decoder layer on token ids (N, S), and log the scores, which depend on batches only by rounding."""
    if method == GRADIENT:
        found = gradient_importance(source, windows, batch_size)
    else:
        found = angular_importance(source, windows, batch_size, with_curves=method == DAMAGE)
    if found.zero_rows:
        logger.warning("%d rows of zeros have no angle and count as cosine 0.5", found.zero_rows)
    for index, score in enumerate(found.scores):
        logger.info("layer %d: importance %.4f", index, score)
    return found


def angles_between(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, int]:
    """Return ``arccos(clamp(cos(x, y), 0, 1)) / π``, (...), of rows (..., D), and how many had a zero side: cosine 0.5.

    In float64: near cosine 1 the angle is ``√(2(1 - cos))``, and float32 would end at 3e-4. The angles are averaged, as
    the authors' program does; the paper's text takes the angle of the mean cosine.
    """
    x, y = inputs.double(), outputs.double()
    lengths = x.norm(dim=-1) * y.norm(dim=-1)
    is_zero = lengths == 0
    cosine = torch.where(is_zero, 0.5, (x * y).sum(-1) / torch.where(is_zero, 1.0, lengths))
    return cosine.clamp(0, 1).arccos() / math.pi, int(is_zero.sum())


@torch.no_grad()
def angular_importance(source: LayerSource, windows: Tensor, batch_size: int, *, with_curves: bool) -> LayerImportance:
    """Score every layer by the mean angle between its input and its output, residual included.

    With curves, those of the damage that removing weights does are measured in the same pass, in nats at the output.
    """
    walk = Walk(source, windows, batch_size)
    sums = torch.zeros(2, source.num_layers, dtype=torch.float64, device=source.device)  # of angles; of rows of zeros
    curves, cost = [], OutputCost(source, windows, batch_size) if with_curves else None
    for index in progress(range(source.num_layers), "importance", "layer"):
        with lent_layer(source, index) as layer:
            damage = LayerDamage(walk, cost.walk, layer, index) if cost else None
            with tapped(layer, [*(damage.taps if damage else ()), OUTPUT]) as look:
                for states, stored in walk.batches():
                    seen = look(partial(walk.run, layer, index, states))
                    outputs = seen[OUTPUT].view_as(states)
                    check_finite(index, outputs)
                    with stage("angles"):
                        angles, zero_rows = angles_between(states, outputs)
                        sums[0, index] += angles.sum()
                        sums[1, index] += zero_rows
                    if damage is not None:
                        damage.add(seen)
                    stored.copy_(outputs)
            if damage is not None and cost is not None:
                curves.append(damage.curves())
                cost.advance(layer, index, damage.ablation_mask())
    all_reduce(sums)
    scores = tuple((sums[0] / windows.numel()).tolist())
    in_nats = None if cost is None else tuple(map(scaled, curves, cost.per_damage()))
    return LayerImportance(scores, int(sums[1].sum()), in_nats)


def gradient_importance(source: LayerSource, windows: Tensor, batch_size: int) -> LayerImportance:
    """Score every layer by the mean over tokens of ``Σ_d |∂loss/∂h_d · h_d|`` with ``h`` the layer's output.

    The first-order Taylor estimate of what taking away each hidden unit does to a window's mean next-token loss.
    Absolute values per unit: the final norm makes the loss blind to the length of the last layer's output, so there the
    products of a token sum to zero whatever the layer does.
    """
    totals = torch.zeros(source.num_layers, dtype=torch.float64, device=source.device)
    for index, outputs, gradient in _loss_gradients(source, windows, batch_size):
        totals[index] += (gradient * outputs).abs().sum(dtype=torch.float64)
    all_reduce(totals)
    return LayerImportance(tuple((totals / (windows.numel() * (windows.shape[1] - 1))).tolist()), zero_rows=0)


def loss_metrics(source: LayerSource, windows: Tensor, batch_size: int) -> Tensor:
    """Return what errors of each layer's output cost by direction: ``U`` with ``Uᵀ U = Γ``, (L, D, D), float64.

    ``Γ = Σ g gᵀ`` of the gradients ``g`` of each window's next-token loss at the tokens of ``windows``, (N, S), over
    the mean of its diagonal. They are where hidden states would be. InputError if a layer's gradients vanish or have no
    bounds.
    """
    shape = (source.num_layers, *2 * [source.config.hidden_size])
    metrics = source.storage.empty(shape, torch.float64, source.device, "what errors cost").zero_()
    for index, _, gradient in _loss_gradients(source, windows, batch_size):
        rows = gradient.flatten(0, 1).double()  # of few tokens float32 sums are too far from positive definite
        metrics[index] += (rows.mT @ rows).to(metrics.device)
    for index, metric in enumerate(metrics):
        all_reduce(metric)
        mean = metric.diagonal().mean().item()
        if not 0 < mean < math.inf:
            raise InputError(f"layer {index} has gradients of mean square {mean} in {source.dtype}; try a wider dtype")
        with solves(index):
            damped = with_ridge(metric.to(source.device) / mean, 1e-6)  # few tokens may make it singular
            metric.copy_(factored(damped).mT)
    return metrics


@torch.no_grad()
def _loss_gradients(source: LayerSource, windows: Tensor, batch_size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield, batch by batch, from the last layer to the first, its index, its output and the gradient there, (b, S, D).

    On the device are one batch's hidden states at every layer boundary, ``(L + 1)·batch·S·D`` numbers, and one layer,
    which runs again to carry the gradient back: every batch borrows each layer twice, not all of them together once.
    """
    arguments = layer_arguments(source, windows.shape[1])
    share = own_share(windows, batch_size)
    for ids in progress(share.split(batch_size) if len(share) else (), "gradients", "batch"):
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
                yield index, states[index + 1], gradient
                if index > 0:
                    with lent_layer(source, index) as layer, torch.enable_grad():
                        inputs = states[index].detach().requires_grad_()
                        outputs = layer(inputs, **arguments[index])
                        (gradient,) = torch.autograd.grad(outputs, inputs, gradient)


def _loss_gradient(source: LayerSource, states: Tensor, ids: Tensor) -> Tensor:
    """Return the gradient of each window's summed loss at the last layer's output, window by window, (batch, S, D)."""
    gradient = torch.zeros_like(states)
    with source.head() as logits_of, torch.enable_grad():
        for window, targets, part in zip(states, ids, gradient, strict=True):
            inputs = window[:-1].detach().requires_grad_()
            logits = logits_of(inputs)
            loss = cross_entropy(logits, targets[1:], reduction="sum")
            part[:-1] = torch.autograd.grad(loss, inputs)[0]
    return gradient
