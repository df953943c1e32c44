"""The walk every step shares: windows of tokens through the decoder layers, one layer at a time.

A *source* gives the layers of a model one by one; hidden states of all windows are kept between them.
Importance, compression and perplexity are three visitors of this walk, so what runs on one device is
one decoder layer and one batch, whatever the size of the model.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import InputError
from ..layers.flat_attention import FlatDecoderLayer
from ..layers.replacement import adopt_compressed_layers
from ..utils.devices import GIB, free_device_memory
from ..utils.layer_utils import DecoderModule

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096
# The rest is for a layer and its solves: at the widths of a 70B model about 20 GiB beside 16 GiB of states.
_SHARE_OF_DEVICE_FOR_STATES = 0.25


class LayerSource(Protocol):
    """Where the walk gets a model's parts from; each comes ready to run on ``device``."""

    config: PretrainedConfig
    device: torch.device
    num_layers: int

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states that enter layer 0, (batch, S, D), for ids (batch, S)."""

    def layer_arguments(self, seqlen: int) -> list[dict[str, Any]]:
        """Return, per layer, what the model passes to it beside the hidden states."""

    def layer(self, index: int) -> AbstractContextManager[DecoderModule]:
        """Lend decoder layer ``index``."""

    def head(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Lend the function from the last layer's output to logits, final norm included."""


class LayerSink(Protocol):
    """Where compressed layers go."""

    def put(self, index: int, layer: FlatDecoderLayer) -> None:
        """Take compressed layer ``index``; layers come in order."""


@dataclass
class Batch:
    """Some windows' hidden states on the device, and the place they came from."""

    states: Tensor  # (batch, S, D)
    stored: Tensor

    def replace(self, outputs: Tensor) -> None:
        """Store ``outputs`` as these windows' hidden states."""
        self.stored.copy_(outputs)


class HiddenStates:
    """The hidden states of all windows between two layers, (N, S, D).

    They stay on the device while they take no more than a quarter of its free memory, else in host memory.
    """

    def __init__(self, states: Tensor, source: LayerSource, batch_size: int) -> None:
        self.states = states
        self.batch_size = batch_size
        self._device = source.device
        self._arguments = source.layer_arguments(states.shape[1])

    @classmethod
    def embed(cls, source: LayerSource, windows: Tensor, batch_size: int) -> "HiddenStates":
        """Return the hidden states that enter layer 0 for token ids (N, S)."""
        first = source.embed(windows[:batch_size])
        shape = (*windows.shape, first.shape[-1])
        size = torch.Size(shape).numel() * first.element_size()
        host = torch.device("cpu")
        fits = source.device == host or size < _SHARE_OF_DEVICE_FOR_STATES * free_device_memory(source.device)
        place = source.device if fits else host
        logger.info("hidden states of %d windows: %.2f GiB on %s", len(windows), size / GIB, place)
        states = torch.empty(shape, dtype=first.dtype, device=place)
        for stored, ids in zip(states.split(batch_size), windows.split(batch_size), strict=True):
            stored.copy_(source.embed(ids))
        return cls(states, source, batch_size)

    def batches(self) -> Iterator[Batch]:
        """Yield the windows in order, ``batch_size`` at a time, on the device."""
        for stored in self.states.split(self.batch_size):
            yield Batch(stored.to(self._device, non_blocking=True), stored)

    def run(self, layer: nn.Module, index: int, batch: Batch) -> Tensor:
        """Return what ``layer``, at place ``index`` in the model, makes of a batch, (batch, S, D).

        Raises:
            InputError: If the result is not finite.
        """
        return checked(layer(batch.states, **self._arguments[index]), index)


class ModelInMemory:
    """A transformers model as source and as sink. The model is unchanged until :meth:`adopt`.

    Args:
        model: A causal language model, on any one device.
        device: Where its parts run; weights not there are lent a copy on it, one layer at a time.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.config = model.config
        self.device = device
        self.decoder = model.get_decoder()
        self.num_layers = len(self.decoder.layers)
        self._compressed: list[FlatDecoderLayer] = []

    def embed(self, ids: Tensor) -> Tensor:
        embedding = self.model.get_input_embeddings()
        return embedding(ids.to(embedding.weight.device)).to(self.device)

    def layer_arguments(self, seqlen: int) -> list[dict[str, Any]]:
        return _to_device(record_layer_arguments(self.decoder, seqlen), self.device, {})

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderModule]:
        with _lent(self.decoder.layers[index], self.device) as layer:
            yield layer

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        with _lent(self.decoder.norm, self.device) as norm, _lent(self.model.lm_head, self.device) as lm_head:
            yield lambda states: lm_head(norm(states))

    def put(self, index: int, layer: FlatDecoderLayer) -> None:
        dense = self.decoder.layers[index]
        home = next(dense.parameters()).device
        self._compressed.append(layer.to(home).train(dense.training))  # it was compressed in evaluation mode

    def adopt(self, flat_config: PretrainedConfig) -> PreTrainedModel:
        """Put the compressed layers into the model, which becomes the flat class; return the same object."""
        return adopt_compressed_layers(self.model, flat_config, self._compressed)


def record_layer_arguments(decoder: DecoderModule, seqlen: int) -> list[dict[str, Any]]:
    """Return the keyword arguments that ``decoder`` passes to each of its layers for one window.

    Masks, positions and rotary embeddings are the model's own business, so the model is asked: it runs
    once on one window while its layers only note what they are given. They broadcast over a batch.
    """
    recorded: list[dict[str, Any]] = []

    def note_arguments(hidden_states: Tensor, **arguments: Any) -> Tensor:
        recorded.append(arguments)
        return hidden_states

    device = decoder.get_input_embeddings().weight.device
    replaced = {layer: layer.__dict__.get("forward") for layer in decoder.layers}  # one's own is a user's patch
    try:
        for layer in decoder.layers:
            layer.forward = note_arguments
        with torch.no_grad(), evaluation_mode(decoder):
            decoder(torch.zeros(1, seqlen, dtype=torch.long, device=device), use_cache=False)
    finally:
        for layer, forward in replaced.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward
    return recorded


def checked(outputs: Tensor, index: int) -> Tensor:
    """Return what layer ``index`` gave, if it is finite.

    Raises:
        InputError: If it is not.
    """
    if not torch.isfinite(outputs).all():
        raise InputError(
            f"layer {index} gives NaN or infinite activations in {outputs.dtype}; "
            "check the checkpoint, or use a wider --dtype (float32, bfloat16)"
        )
    return outputs


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout and the like off inside the block; every submodule's mode is restored after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield module
    finally:
        for part, mode in modes.items():
            part.training = mode


def default_batch_size(seqlen: int) -> int:
    """Return how many windows make up about 4096 tokens, at least 1."""
    return max(1, TOKENS_PER_BATCH // seqlen)


def progress(count: int, stage: str) -> tqdm:
    """Return ``range(count)`` behind a progress bar that is silent when nobody watches."""
    return tqdm(range(count), desc=stage, unit="layer", disable=None)


@contextmanager
def _lent(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Lend a module on ``device``, in evaluation mode, without gradients; its own tensors come back untouched."""
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device, non_blocking=True)
        with torch.no_grad(), evaluation_mode(module):
            yield module
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


def _to_device(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """Return ``value`` with every tensor in it on ``device``; one that occurs many times is copied once.

    Args:
        value: Anything; lists, tuples and dicts are searched.
        device: Where the tensors go.
        moved: What was moved so far, by the ``id`` of the original, which ``value`` keeps alive.
    """
    if isinstance(value, Tensor):
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, list | tuple):
        return type(value)(_to_device(part, device, moved) for part in value)
    if isinstance(value, dict):
        return {name: _to_device(part, device, moved) for name, part in value.items()}
    return value
