"""The walk every step shares: all windows of tokens through one decoder layer of a source after the other.

What is on the device is one layer and one batch, whatever the size of the model.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..utils.layer_utils import DecoderModule
from ..utils.processes import own_share
from ..utils.progress import progress
from ..utils.stopwatch import stage
from .memory import layer_arguments
from .protocols import LayerSource

HELD_OUT = 8  # every eighth window is one to check a fit with


class Walk:
    """The hidden states of this process's share of the windows (N, S) of all, first those that enter layer 0."""

    def __init__(self, source: LayerSource, windows: Tensor, batch_size: int) -> None:
        self.source, self.windows, self.batch_size = source, own_share(windows, batch_size), batch_size
        self.count = len(windows)
        self.is_held_out = own_share(torch.arange(len(windows)) % HELD_OUT == HELD_OUT - 1, batch_size)
        shape = (*self.windows.shape, source.config.hidden_size)
        self.states = source.storage.empty(shape, source.dtype, source.device)
        with source.embedding() as embed:
            for stored, ids in zip(self.states.split(batch_size), self.windows.split(batch_size), strict=True):
                stored.copy_(embed(ids))
        self._arguments = layer_arguments(source, windows.shape[1])

    def batches(self, stream: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield hidden states in order, (batch, S, D), on the device, each with its place in storage.

        They are the walk's own, or those of another stream of its windows.
        """
        states = self.states if stream is None else stream
        batches = states.split(self.batch_size) if len(states) else ()
        for stored in progress(batches, "windows", "batch") if stream is None else batches:
            yield stored.to(self.source.device, non_blocking=True), stored

    def room(self, width: int) -> Tensor | None:
        """Return uninitialised room for what each token has of that width, (n, S, width), if there is some at hand."""
        shape = (*self.windows.shape, width)
        return self.source.storage.spare(shape, self.source.dtype, self.source.device, 2 * self.states.nbytes)

    def split(self, read: Tensor | None) -> Iterable[Tensor | None]:
        """Return the batches of what is kept of each token, or None for each batch."""
        return itertools.repeat(None) if read is None else read.split(self.batch_size)

    def run(self, forward: Callable[..., Tensor], index: int, states: Tensor) -> Tensor:
        """Return what the layer at ``index``, or a part of it, makes of a batch, (batch, S, D), if it is finite."""
        with stage("forward"):
            outputs = forward(states, **self._arguments[index])
            check_finite(index, outputs)
        return outputs

    def advance(self, layer: nn.Module, index: int, part: str = "") -> None:
        """Lead all hidden states through ``layer``, at place ``index`` in the model, or through a part of it."""
        for states, stored in self.batches():
            stored.copy_(self.run(forward_of(layer, part), index, states))


def spread(windows: Tensor, count: int) -> Tensor:
    """Return ``count`` of the windows, (N, S), or all if there are fewer, evenly spread: they stand text by text."""
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // count]


@contextmanager
def lent_layer(source: LayerSource, index: int) -> Iterator[DecoderModule]:
    """Lend decoder layer ``index``; waiting for it counts as the stage ``read``."""
    with ExitStack() as stack:
        with stage("read"):
            layer = stack.enter_context(source.layer(index))
        yield layer


@contextmanager
def solves(index: int) -> Iterator[None]:
    """Turn numerical trouble with layer ``index`` into an InputError; the block counts as the stage of this name."""
    try:
        with stage("solves"):
            yield
    except (ArithmeticError, torch.linalg.LinAlgError) as error:
        raise InputError(f"layer {index} cannot be compressed: {error}") from error


def check_finite(index: int, found: Tensor, what: str = "activations") -> None:
    """Refuse what layer ``index`` gives if it is not finite."""
    # The extremes, in one pass over them; NaN is both.
    if found.numel() and not torch.stack(torch.aminmax(found)).isfinite().all():
        raise InputError(f"layer {index} gives NaN or infinite {what}; a wider dtype may help")


class _AllSeenError(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def tapped(layer: nn.Module, taps: Collection[str]) -> Iterator[Callable[[Callable[[], Any]], Mapping[str, Tensor]]]:
    """Lend a function that runs a forward pass, a call, as far as the last tap, and returns what passed them.

    Taps are a submodule's name and what of it, ``mlp.down_proj.input``, ``self_attn.v_proj.output``: (tokens, width).
    """
    seen: dict[str, Tensor] = {}

    def look(tap: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        seen[tap] = (inputs[0] if output is None else output).flatten(0, -2)
        if len(seen) == len(taps):
            raise _AllSeenError

    def run(forward: Callable[[], Any]) -> Mapping[str, Tensor]:
        seen.clear()
        try:
            forward()
        except _AllSeenError:
            return seen
        raise RuntimeError(f"the layer's forward pass does not come by {', '.join(set(taps) - seen.keys())}")

    with ExitStack() as stack:
        for tap in taps:
            name, _, side = tap.rpartition(".")
            module: Any = layer.get_submodule(name)
            register = module.register_forward_pre_hook if side == "input" else module.register_forward_hook
            stack.callback(register(partial(look, tap)).remove)
        yield run


def forward_of(layer: DecoderModule, part: str) -> Callable[..., Tensor]:
    """Return what a layer makes of the stream, or its ``self_attn`` or its ``mlp`` alone, with norm and residual."""
    if part == "self_attn":
        return lambda states, **arguments: states + layer.self_attn(layer.input_layernorm(states), **arguments)[0]
    if part == "mlp":
        return lambda states, **_: states + layer.mlp(layer.post_attention_layernorm(states))
    return layer
