"""What ties the engine's parts together: where layers come from, where they go, and what is said of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..layers.flat_attention import FlatDecoderLayer
from ..utils.dimensions import Kept
from ..utils.layer_utils import DecoderModule
from .storage import StatesStorage


@dataclass(frozen=True, kw_only=True)
class LayerRecord(Kept):
    """What was done to one layer."""

    layer: int
    rank_at_tolerance: float | None = None  # would keep the monitored share of eigenvalue mass; None for a whole layer
    elapsed_s: float | None = None  # None for a layer that an earlier run finished


class LayerSource(Protocol):
    """Where the walk gets a model's parts from; each comes ready to run on ``device``."""

    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype
    num_layers: int
    storage: StatesStorage

    def embedding(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Lend the function from ids, (batch, S), to the hidden states that enter layer 0, (batch, S, D)."""

    def layer_arguments(self, seqlen: int) -> list[dict[str, Any]]:
        """Return, per layer, what the model passes to it beside the hidden states."""

    def layer(self, index: int) -> AbstractContextManager[DecoderModule]:
        """Lend decoder layer ``index``."""

    def head(self) -> AbstractContextManager[Callable[[Tensor], Tensor]]:
        """Lend the function from the last layer's output to logits, final norm included."""


class LayerSink(Protocol):
    """Where compressed layers go."""

    @property
    def finished(self) -> Mapping[int, LayerRecord]:
        """Layers that are there, the same in every process; an earlier run may have put them."""

    def put(self, index: int, layer: FlatDecoderLayer, record: LayerRecord) -> None:
        """Take compressed layer ``index``."""

    def weights(self, index: int) -> dict[str, Tensor]:
        """Return the parameters of a finished layer."""
