"""A transformers model in memory as source and as sink of the walk."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig, PreTrainedModel

from ..layers.replacement import adopt_compressed_layers
from ..utils.devices import computed_in, retyped
from ..utils.layer_utils import DecoderModule, stored_tensors
from .protocols import LayerRecord, LayerSource


class ModelInMemory(LayerSource):
    """A causal language model as source and sink, unchanged until :meth:`adopt`; parts are lent on ``device``.

    They are lent in the type that the device computes in; those of a model of several types as they are.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        super().__init__(model, device)
        self.home, self.weights_dtype = self.decoder.embed_tokens.weight.device, self.decoder.embed_tokens.weight.dtype
        is_mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
        self.dtype = self.weights_dtype if is_mixed else computed_in(self.weights_dtype, device)
        self.finished: dict[int, LayerRecord] = {}
        self._compressed: dict[int, DecoderModule] = {}

    def lent(self, part: str, device: torch.device) -> AbstractContextManager[DecoderModule]:
        """Lend the part itself, whose tensors are put back."""
        types = self.weights_dtype, self.dtype
        return _lent(self.model.get_submodule(part), lambda home: retyped(home.to(device, non_blocking=True), *types))

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
