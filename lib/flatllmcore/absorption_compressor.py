"""The interface by which FedCore's own FLAT-LLM reassembler asks for a compression, layer by layer.

In this file ``sparsity_ratio`` and ``target_sparsity`` are the share **kept**, as FedCore means them; everywhere
else they are the share removed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .config import FlatLLMConfig
from .core.rank_allocation import ImportancePreservingRankSelector
from .engine.memory import ModelInMemory
from .engine.walk import tapped
from .errors import InputError
from .methods.flatllm import FlatLLMStep
from .pipeline import Pipeline
from .utils.data_utils import check_token_ids, padding_ids_of, real_rows, windows_of_rows
from .utils.devices import parse_device
from .utils.dimensions import Kept
from .utils.dispatch import dispatch_hooks_lifted
from .utils.layer_utils import DecoderModule, check_causal_lm, dimensions_from_config


class AbsorptionCompressor:
    """Compresses chosen layers of a model by shares that the caller chooses, one call after the other.

    A layer's statistics must see what the compressed layers before it give, so the calls say what is wanted and
    :meth:`patch_compressed_layers` walks through the model once and changes it. Until then it is as it was.

    Args:
        model: A dense causal language model of a supported family, in memory; it keeps its device and dtype.
        target_sparsity: Share of V, O and MLP that a layer **keeps** where a call gives none, in (0, 1].
        tolerance: Share of eigenvalue mass whose rank is logged; changes nothing.
        device: Where layers run; where the model is, by default.

    Raises:
        InputError: If the model or a share is unusable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        target_sparsity: float = 0.3,
        tolerance: float = 0.96,
        device: str | torch.device | None = None,
    ) -> None:
        check_causal_lm(model)
        self.model = model
        self.dimensions = dimensions_from_config(model.config)
        self.target_sparsity = _checked_share("target_sparsity", target_sparsity)
        self.tolerance = _checked_share("tolerance", tolerance)
        self.device = model.get_output_embeddings().weight.device if device is None else parse_device(str(device))
        self._layers: set[int] = set()
        self._windows = torch.empty(0, 0, dtype=torch.int64)
        self._kept_of_mlp: dict[int, float] = {}
        self._kept_of_attention: dict[int, float] = {}

    def collect_all_activations(
        self, layer_indices: Sequence[int], calibration_input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Take the calibration data for the layers that are going to be compressed.

        Padding is no data: it is cut off, and rows of unequal length are joined and cut into windows as long as the
        longest, or as the model takes.

        Args:
            layer_indices: The layers.
            calibration_input_ids: Token ids, int64, (N, S), rows may be padded at either end.
            attention_mask: 0 for padding, (N, S). Without it, what the model's padding id (or where it has none,
                the id that ends a text) fills at the ends of a row is padding.

        Raises:
            InputError: If a layer does not exist, or the ids are unusable.
        """
        for layer_idx in layer_indices:
            if not 0 <= layer_idx < self.dimensions.num_layers:
                last = self.dimensions.num_layers - 1
                raise InputError(f"there is no layer {layer_idx}; the model has layers 0 to {last}")
        rows = real_rows(calibration_input_ids, attention_mask, padding_ids_of(self.model.config))
        longest = max(len(row) for row in rows)
        windows = windows_of_rows(rows, min(longest, self.model.config.max_position_embeddings))
        check_token_ids(windows, self.model.config.vocab_size)
        self._layers, self._windows = set(layer_indices), windows

    def apply_absorption_mlp(self, layer_idx: int, sparsity_ratio: float | None = None) -> None:
        """Have ``layer_idx`` keep the share ``sparsity_ratio``, in (0, 1], of its MLP's channels."""
        self._kept_of_mlp[self._collected(layer_idx)] = self._share(sparsity_ratio)

    def apply_absorption_attention(self, layer_idx: int, sparsity_ratio: float | None = None) -> None:
        """Have ``layer_idx`` keep the share ``sparsity_ratio``, in (0, 1], of the directions of each value head."""
        self._kept_of_attention[self._collected(layer_idx)] = self._share(sparsity_ratio)

    def patch_compressed_layers(self, layer_indices: Sequence[int]) -> None:
        """Compress these layers as asked, in place; the model becomes one of the compressed class.

        Layers that are not named, and parts for which nothing was asked, stay whole.

        Raises:
            InputError: If no activations are collected for a layer, or a layer's are not finite; the model is then
                as it was.
        """
        chosen = {self._collected(layer_idx) for layer_idx in layer_indices}
        shares = [
            [kept.get(index, 1.0) if index in chosen else 1.0 for index in range(self.dimensions.num_layers)]
            for kept in (self._kept_of_mlp, self._kept_of_attention)
        ]
        allocation = ImportancePreservingRankSelector(self.dimensions).floored(*shares)
        pipeline = Pipeline(self.model.config, FlatLLMConfig(tolerance=self.tolerance))
        with dispatch_hooks_lifted(self.model):
            source = ModelInMemory(self.model, self.device)
            flat_config, _ = pipeline.compress(source, source, self._windows, allocation)
            source.adopt(flat_config)

    def _share(self, sparsity_ratio: float | None) -> float:
        return self.target_sparsity if sparsity_ratio is None else _checked_share("sparsity_ratio", sparsity_ratio)

    def _collected(self, layer_idx: int) -> int:
        if layer_idx not in self._layers:
            raise InputError(f"no activations are collected for layer {layer_idx}; name it to collect_all_activations")
        return layer_idx


class ActivationCollector:
    """Sums the moments of what runs through one dense decoder layer, batch by batch.

    ``sums`` holds them in float64: ``self_attn.v_proj.output``, (G, d, d), and the lower triangle of
    ``mlp.down_proj.input``, (F, F). FedCore gives a tolerance and a device too, on which they do not depend.
    """

    def __init__(
        self, layer: DecoderModule, num_heads: int, tolerance: float = 0.96, device: str | torch.device | None = None
    ) -> None:
        dimensions = dimensions_from_config(layer.self_attn.config)
        if num_heads != dimensions.num_heads:
            raise InputError(f"num_heads is {num_heads}; the layer has {dimensions.num_heads}")
        self._layer = layer
        self._step = FlatLLMStep(dimensions, Kept(1.0, dimensions.head_dim, dimensions.intermediate_size))
        self.sums = self._step.zeros(layer)

    def collect(self, forward: Callable[[], Any]) -> None:
        """Add what passes in one forward pass of the layer, given as a call without arguments."""
        with torch.no_grad(), tapped(self._layer, self._step.taps) as look:
            self._step.add(self.sums, look(forward))


def _checked_share(name: str, share: float) -> float:
    if not 0 < share <= 1:
        raise InputError(f"{name} is {share}; accepted: a share above 0 and at most 1")
    return share
