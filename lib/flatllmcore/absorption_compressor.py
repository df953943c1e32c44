"""The interface by which FedCore's own FLAT-LLM reassembler asks for a compression, layer by layer.

In this file ``sparsity_ratio`` and ``target_sparsity`` are the share **kept**, as FedCore means them; everywhere
else they are the share removed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .api import in_memory
from .config import FlatLLMConfig, checked
from .core.rank_allocation import ImportancePreservingRankSelector
from .errors import InputError
from .pipeline import Pipeline
from .utils.data_utils import check_token_ids, padding_ids_of, real_rows, windows_of_rows
from .utils.devices import parse_device, usual_torch
from .utils.layer_utils import check_causal_lm, dimensions_from_config

_SHARE = FlatLLMConfig.__dataclass_fields__["tolerance"]  # an option that takes a share above 0 and at most 1


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
        self.model, self.dimensions = model, dimensions_from_config(model.config)
        self.target_sparsity = checked(_SHARE, target_sparsity, "target_sparsity")
        self.config = FlatLLMConfig(tolerance=tolerance)
        self.device = model.get_output_embeddings().weight.device if device is None else parse_device(str(device))
        self._windows: Tensor | None = None
        self._kept_of_mlp = [1.0] * self.dimensions.num_layers
        self._kept_of_attention = [1.0] * self.dimensions.num_layers

    def collect_all_activations(
        self, layer_indices: Sequence[int], calibration_input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> None:
        """Take the calibration data, which serve all layers alike.

        Padding is no data: it is cut off, and rows of unequal length are joined and cut into windows as long as the
        longest, or as the model takes.

        Args:
            layer_indices: Layers that are going to be compressed, as FedCore says beforehand.
            calibration_input_ids: Token ids, int64, (N, S), rows may be padded at either end.
            attention_mask: 0 for padding, (N, S). Without it, what the model's padding id (or where it has none,
                the id that ends a text) fills at the ends of a row is padding, and so is what follows the first of
                several ids that end a text at a row's end: tokenizers often pad by that id, whatever the model says.

        Raises:
            InputError: If the ids are unusable.
        """
        config = self.model.config
        rows = real_rows(calibration_input_ids, attention_mask, padding_ids_of(config))
        if attention_mask is None and config.eos_token_id is not None:
            rows = [_ended_once(row, torch.tensor(config.eos_token_id)) for row in rows]
        self._windows = windows_of_rows(rows, min(max(map(len, rows)), config.max_position_embeddings))
        check_token_ids(self._windows, config.vocab_size)

    def apply_absorption_mlp(self, layer_idx: int, sparsity_ratio: float | None = None) -> None:
        """Have ``layer_idx`` keep the share ``sparsity_ratio``, in (0, 1], of its MLP's channels."""
        self._kept_of_mlp[self._checked(layer_idx)] = self._share(sparsity_ratio)

    def apply_absorption_attention(self, layer_idx: int, sparsity_ratio: float | None = None) -> None:
        """Have ``layer_idx`` keep the share ``sparsity_ratio``, in (0, 1], of the directions of each value head."""
        self._kept_of_attention[self._checked(layer_idx)] = self._share(sparsity_ratio)

    @usual_torch()
    def patch_compressed_layers(self, layer_indices: Sequence[int]) -> None:
        """Compress these layers as asked, in place; the model becomes one of the compressed class.

        Layers that are not named, and parts for which nothing was asked, stay whole.

        Raises:
            InputError: If a layer's activations are not finite; the model is then as it was.
            RuntimeError: If :meth:`collect_all_activations` has not been called.
        """
        if self._windows is None:
            raise RuntimeError("there are no calibration data before collect_all_activations() has been called")
        chosen = set(map(self._checked, layer_indices))
        shares = [
            [share if index in chosen else 1.0 for index, share in enumerate(kept)]
            for kept in (self._kept_of_mlp, self._kept_of_attention)
        ]
        allocation = ImportancePreservingRankSelector(self.dimensions).floored(*shares)
        with in_memory(self.model, self.device) as source:
            pipeline = Pipeline(self.model.config, self.config)
            flat_config, _ = pipeline.compress(source, source, self._windows, allocation)
            source.adopt(flat_config)

    def _checked(self, layer_idx: int) -> int:
        if layer_idx not in range(self.dimensions.num_layers):
            raise InputError(f"layer_idx is {layer_idx}; accepted: 0 to {self.dimensions.num_layers - 1}")
        return int(layer_idx)

    def _share(self, sparsity_ratio: float | None) -> float:
        return self.target_sparsity if sparsity_ratio is None else checked(_SHARE, sparsity_ratio, "sparsity_ratio")


def _ended_once(row: Tensor, end_ids: Tensor) -> Tensor:
    """Return a row of ids, (n,), without the ids that end a text behind the first of those at its end."""
    others = torch.isin(row, end_ids, invert=True).nonzero()
    return row[: int(others[-1]) + 2] if len(others) else row[:1]


class ActivationCollector:
    """Only to be imported, as FedCore does; :meth:`AbsorptionCompressor.collect_all_activations` takes the data."""
