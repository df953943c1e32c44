"""A transformers model in memory as source and as sink of the walk."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..layers.replacement import adopt_compressed_layers
from ..utils.devices import at_least_float32, computed_in, retyped
from ..utils.layer_utils import DecoderModule, stored_tensors
from .protocols import LayerRecord, LayerSource
from .storage import StatesStorage


class ModelInMemory:
    """A causal language model as source and sink, unchanged until :meth:`adopt`; parts are lent on ``device``.

    They are lent in the type that the device computes in; those of a model of several types as they are.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.config, self.decoder = model, model.config, model.get_decoder()
        self.num_layers = len(self.decoder.layers)
        self.device, self.weights_dtype = device, model.get_input_embeddings().weight.dtype
        is_mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
        self.dtype = self.weights_dtype if is_mixed else computed_in(self.weights_dtype, device)
        self.storage = StatesStorage()
        self.finished: dict[int, LayerRecord] = {}
        self._compressed: dict[int, DecoderModule] = {}

    @contextmanager
    def embedding(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the embedding at its home: the rows that are looked up are less to move."""
        home = self.model.get_input_embeddings().weight.device
        with self._lent(self.model.get_input_embeddings(), home) as embedding:
            yield lambda ids: entering(self.decoder, embedding(ids.to(home))).to(self.device)

    def layer(self, index: int) -> AbstractContextManager[DecoderModule]:
        """Lend decoder layer ``index``."""
        return self._lent(self.decoder.layers[index])

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Lend the function from hidden states to logits."""
        with self._lent(self.decoder.norm) as norm, self._lent(self.model.lm_head) as lm_head:
            yield logits_of(self.model, norm, lm_head)

    def put(self, index: int, layer: DecoderModule, record: LayerRecord) -> None:
        """Keep compressed layer ``index`` at its dense one's home, in its mode."""
        dense = self.decoder.layers[index]
        layer.to(next(dense.parameters()).device).train(dense.training)  # it was compressed in evaluation mode
        self._compressed[index], self.finished[index] = layer, record

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a compressed layer."""
        return stored_tensors(self._compressed[index])

    def adopt(self, flat_config: PretrainedConfig) -> PreTrainedModel:
        """Put the compressed layers into the model, which becomes the flat class; return the same object."""
        return adopt_compressed_layers(self.model, flat_config, [self._compressed[i] for i in range(self.num_layers)])

    def _lent(self, module: nn.Module, device: torch.device | None = None) -> AbstractContextManager[nn.Module]:
        place, types = device or self.device, (self.weights_dtype, self.dtype)
        return _lent(module, lambda home: retyped(home.to(place, non_blocking=True), *types))


def entering(decoder: DecoderModule, embeddings: Tensor) -> Tensor:
    """Return what enters layer 0 of a decoder that has these embeddings: Granite's makes them larger."""
    return embeddings * getattr(decoder, "embedding_multiplier", 1)


def logits_of(model: PreTrainedModel, norm: nn.Module, lm_head: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model's own function from the last layer's output, (rows, D), to logits: some scale or cap these.

    They are in float32 at least.
    """
    head: Any = copy.copy(model)  # without its modules
    head._modules = {"lm_head": lm_head}
    head.model = lambda inputs_embeds, **_: BaseModelOutputWithPast(last_hidden_state=norm(inputs_embeds))
    forward = partial(type(model).forward, head, return_dict=True)
    return lambda states: at_least_float32(forward(inputs_embeds=states[None]).logits[0])


def layer_arguments(source: LayerSource, seqlen: int) -> list[dict[str, Any]]:
    """Return the keyword arguments that the decoder passes to each layer for a window; they broadcast over a batch.

    Masks, positions and rotary embeddings are the model's own business, so it runs once on a window of embeddings
    while its layers only note what they are given.
    """
    decoder, recorded = source.decoder, list[dict[str, Any]]()

    def note_arguments(hidden_states: Tensor, **arguments: Any) -> Tensor:
        recorded.append(arguments)
        return hidden_states

    example = decoder.norm.weight  # there even where the embeddings are not
    window = example.new_zeros(1, seqlen, decoder.config.hidden_size, dtype=source.dtype)
    with _lent(decoder, lambda home: home), ExitStack() as stack:
        for layer in decoder.layers:  # one that stands on a layer is put back
            stack.enter_context(patch.object(layer, "forward", note_arguments))
        decoder(inputs_embeds=window, use_cache=False)
    moved = cache(lambda tensor: tensor.to(source.device))  # most occur in the arguments of every layer
    return tree_map_only(Tensor, moved, recorded)


@contextmanager
def _lent(module: nn.Module, brought: Callable[[Tensor], Tensor]) -> Iterator[nn.Module]:
    """Lend a module with its tensors ``brought``, without dropout or gradients; tensors and modes are put back."""
    homes = {tensor: tensor.data for tensor in (*module.parameters(), *module.buffers())}
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        for tensor, home in homes.items():
            tensor.data = brought(home)
        with torch.no_grad():
            yield module
    finally:
        for tensor, home in homes.items():
            tensor.data = home
        for part, mode in modes.items():
            part.training = mode
