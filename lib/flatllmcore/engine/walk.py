"""The walk every step shares: all windows of tokens through one decoder layer of a source after the other.

What is on the device is one layer and one batch, whatever the size of the model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..utils.layer_utils import DecoderModule
from ..utils.processes import own_share
from ..utils.progress import progress
from ..utils.stopwatch import stage
from .protocols import LayerSource


def default_batch_size(seqlen: int) -> int:
    """Return how many windows make up about 4096 tokens, at least 1."""
    return max(1, 4096 // seqlen)


@dataclass
class Batch:
    """Some windows' hidden states, (batch, S, D), on the device, and the place they came from."""

    states: Tensor
    stored: Tensor

    def replace(self, outputs: Tensor) -> None:
        """Store ``outputs`` as these windows' hidden states."""
        self.stored.copy_(outputs)


class Walk:
    """The hidden states of this process's share of the windows (N, S) of all, first those that enter layer 0.

    Stages counted: ``read``, waiting for a layer to be read or copied, and ``forward``.
    """

    def __init__(self, source: LayerSource, windows: Tensor, batch_size: int) -> None:
        self.source, self.windows, self.batch_size = source, own_share(windows), batch_size
        shape = (*self.windows.shape, source.config.hidden_size)
        self.states = source.storage.empty(shape, source.dtype, source.device)
        with source.embedding() as embed:
            for stored, ids in zip(self.states.split(batch_size), self.windows.split(batch_size), strict=True):
                stored.copy_(embed(ids))
        self._arguments = source.layer_arguments(windows.shape[1])

    def batches(self) -> Iterator[Batch]:
        """Yield the windows in order, ``batch_size`` at a time, on the device."""
        batches = self.states.split(self.batch_size) if len(self.states) else ()
        for stored in progress(batches, "windows", "batch"):
            yield Batch(stored.to(self.source.device, non_blocking=True), stored)

    def run(self, layer: nn.Module, index: int, batch: Batch) -> Tensor:
        """Return what ``layer``, at place ``index`` in the model, makes of a batch, (batch, S, D), if it is finite."""
        with stage("forward"):
            outputs = layer(batch.states, **self._arguments[index])
            check_finite(index, outputs)
        return outputs

    def advance(self, layer: nn.Module, index: int) -> None:
        """Lead all hidden states through ``layer``, at place ``index`` in the model."""
        for batch in self.batches():
            batch.replace(self.run(layer, index, batch))


@contextmanager
def lent_layer(source: LayerSource, index: int) -> Iterator[DecoderModule]:
    """Lend decoder layer ``index``; waiting for it counts as the stage ``read``."""
    with ExitStack() as stack:
        with stage("read"):
            layer = stack.enter_context(source.layer(index))
        yield layer


def check_finite(index: int, activations: Tensor) -> None:
    """Refuse what layer ``index`` gives if it is not finite."""
    if not torch.isfinite(activations).all():
        remedy = "check the checkpoint, or use a wider --dtype (float32, bfloat16)"
        raise InputError(f"layer {index} gives NaN or infinite activations in {activations.dtype}; {remedy}")
