"""The whole method on a model in memory: calibration text, importance, ranks, compression, in place."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import FlatLLMConfig, merged_config
from ..errors import InputError
from ..utils.calibration_windows import (
    check_token_ids,
    padding_ids_of,
    read_calibration_data,
    window_length,
    windows_of_rows,
)
from ..utils.checkpoint import count_parameters
from ..utils.data_utils import TextDataset, calibration_statistics, sample_documents, sample_windows
from ..utils.devices import best_device, parse_device
from ..utils.dispatch import dispatch_hooks_lifted, is_spread_over_devices
from ..utils.layer_utils import check_causal_lm, dimensions_from_config
from .calibration import ModelInMemory, default_batch_size
from .importance import layer_importance
from .prune import LayerRecord, compress_layers
from .rank_allocation import ImportancePreservingRankSelector, RankAllocation, prunable_keep_ratio
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)

Sampler = Callable[[TextDataset, PreTrainedTokenizerBase, int, int, int], Tensor]


class FlatLLMPruner:
    """Compresses one model in place, and says what came of it.

    Args:
        model: A causal language model of a supported family, in memory: dense to be compressed, any to be scored.
            Weights keep their device and dtype; a ``device_map`` over several devices is fine, offloading is not.
        tokenizer: The model's; not needed where ``cal_dataset`` holds token ids.
        config: What is asked; the defaults for ``None``.
        **fields: Fields of :class:`FlatLLMConfig` that take precedence over ``config``.

    Raises:
        InputError: If the model or an option is unusable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: FlatLLMConfig | None = None,
        **fields: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = merged_config(config, fields)
        check_causal_lm(model)
        self.device = _device_for(model, self.config.device)
        self.stopwatch = Stopwatch(self.device)
        self._stats: dict[str, Any] | None = None

    def compute_importance_scores(self) -> list[float]:
        """Return the importance of every decoder layer; the model is unchanged.

        Raises:
            InputError: If the calibration data are unusable, or a layer's activations are not finite.
        """
        with dispatch_hooks_lifted(self.model):
            return self._score(ModelInMemory(self.model, self.device))

    def prune_model(self) -> PreTrainedModel:
        """Compress the model and return it, the same object, now of the compressed class.

        When anything fails, the model is as it was.

        Raises:
            InputError: If the model is compressed already or so much cannot be removed from it (the largest possible
                target is named), the calibration data are unusable, or a layer's activations are not finite.
        """
        target_percent = round(100 * self.config.target_sparsity, 9)
        selector = ImportancePreservingRankSelector(
            dimensions_from_config(self.model.config),
            rank_multiple=self.config.rank_multiple,
            prune_qk=not self.config.preserve_qk_layers,
        )
        prunable_keep_ratio(selector.dimensions, 1 - target_percent / 100, selector.prune_qk)  # refuses the impossible
        parameters_before = count_parameters(self.model)
        with dispatch_hooks_lifted(self.model):
            source = ModelInMemory(self.model, self.device)
            allocation = selector.allocate(self._score(source), target_percent)
            windows = self._windows(sample_documents)
            flat_config, layers = compress_layers(
                source,
                source,
                windows,
                allocation,
                batch_size=self._batch_size(windows),
                tolerance=self.config.tolerance,
                stopwatch=self.stopwatch,
            )
            source.adopt(flat_config)
        self._stats = _statistics(allocation, layers, parameters_before, count_parameters(self.model))
        logger.info(
            "asked to remove %g %% of %d decoder-layer weights; %.3f %% are removed",
            target_percent,
            allocation.parameters_before,
            100 * self._stats["sparsity"],
        )
        return self.model

    def get_compression_stats(self) -> dict[str, Any]:
        """Return what :meth:`prune_model` did, counted from the weights that are there.

        Returns:
            - ``sparsity``: share of the decoder layers' linear weights removed, in [0, 1).
            - ``compression_ratio``: those weights before over after, ``1 / (1 - sparsity)``.
            - ``parameters_before``, ``parameters_after``: ``{"decoder_linear": ..., "total": ...}``, numbers of
              weights; ``total`` has embeddings, norms and biases too, tied ones once.
            - ``layers``: per layer ``keep``, ``value_rank``, ``mlp_width`` and what else was done to it.

        Raises:
            RuntimeError: If the model has not been pruned yet.
        """
        if self._stats is None:
            raise RuntimeError("there are no statistics before prune_model() has been called")
        return self._stats

    @cached_property
    def _data(self) -> TextDataset | list[Tensor]:
        config = self.config
        return read_calibration_data(
            config.cal_dataset,
            nsamples=config.cal_nsamples,
            seqlen=self._seqlen,
            padding_ids=padding_ids_of(self.model.config, self.tokenizer),
            dataset_root=config.dataset_root,
            cache_dir=config.cache_dir,
        )

    @property
    def _seqlen(self) -> int:
        return window_length(self.config.seqlen, self.model.config.max_position_embeddings)

    def _score(self, source: ModelInMemory) -> list[float]:
        windows = self._windows(sample_windows)
        method = self.config.importance_method
        found = layer_importance(source, windows, self._batch_size(windows), self.stopwatch, method)
        return list(found.scores)

    def _windows(self, sample: Sampler) -> Tensor:
        """Return calibration windows, (N, S): sampled from a text, or the token ids given."""
        config, seqlen = self.config, self._seqlen
        data = self._data
        if isinstance(data, TextDataset):
            if self.tokenizer is None:
                raise InputError(f"a tokenizer is needed to calibrate on {data.name}; give one, or give token ids")
            windows = sample(data, self.tokenizer, config.cal_nsamples, seqlen, config.seed)
        else:
            if config.seqlen is None:
                seqlen = min(seqlen, max(len(row) for row in data))
            windows = windows_of_rows(data, seqlen)[: config.cal_nsamples]
        check_token_ids(windows, self.model.config.vocab_size)
        logger.info("calibration data: %s", calibration_statistics(windows))
        return windows

    def _batch_size(self, windows: Tensor) -> int:
        return self.config.batch_size or default_batch_size(windows.shape[1])


def apply_flat_llm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target_sparsity: float | None = None,
    cal_dataset: Any = None,
    *,
    config: FlatLLMConfig | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Compress ``model`` in place and return it, the same object.

    Args:
        model: As for :class:`FlatLLMPruner`.
        tokenizer: As there.
        target_sparsity: Share of the decoder layers' linear weights to remove; ``None`` for the config's.
        cal_dataset: Calibration text, as in :class:`FlatLLMConfig`; ``None`` for the config's.
        config: What is asked where no argument says otherwise; the defaults for ``None``.
        **fields: Further fields of :class:`FlatLLMConfig`; they take precedence over ``config``.

    Raises:
        InputError: If the model, an option or the text is unusable; the model is then as it was.
    """
    named = {"target_sparsity": target_sparsity, "cal_dataset": cal_dataset}
    fields |= {name: value for name, value in named.items() if value is not None}
    return FlatLLMPruner(model, tokenizer, config, **fields).prune_model()


def compute_layer_importance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    config: FlatLLMConfig | None = None,
    **fields: Any,
) -> list[float]:
    """Return the importance of every decoder layer; the model is unchanged.

    Args and errors are those of :class:`FlatLLMPruner`.
    """
    return FlatLLMPruner(model, tokenizer, config, **fields).compute_importance_scores()


def _device_for(model: PreTrainedModel, name: str | None) -> torch.device:
    """Return where the layers run. Of a model spread over devices it is the last part's, whose hooks stay on."""
    home = model.get_output_embeddings().weight.device
    if is_spread_over_devices(model):
        if name is not None and parse_device(name) != home:
            raise InputError(f"device is {name!r}, but the model is spread over devices; leave it None")
        return home
    if name is not None:
        return parse_device(name)
    return best_device() if home.type == "cpu" else home


def _statistics(
    allocation: RankAllocation, layers: list[LayerRecord], before: dict[str, int], after: dict[str, int]
) -> dict[str, Any]:
    remaining = after["decoder_linear"] / before["decoder_linear"]
    return {
        "target_sparsity": allocation.sparsity_ratio / 100,
        "sparsity": 1 - remaining,
        "compression_ratio": 1 / remaining,
        "parameters_before": before,
        "parameters_after": after,
        "layers": [asdict(layer) for layer in layers],
    }
