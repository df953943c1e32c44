"""The method on a model in memory, in place: the names of the library's user document."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import FlatLLMConfig, merged_config
from .engine.memory import ModelInMemory
from .errors import InputError
from .pipeline import Pipeline
from .utils.devices import best_device, parse_device
from .utils.dispatch import dispatch_hooks_lifted, is_spread_over_devices
from .utils.layer_utils import check_causal_lm, count_parameters
from .utils.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


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
        self.config = merged_config(config, fields)
        check_causal_lm(model)
        self.device = device_for(model, self.config.device)
        self.stopwatch = Stopwatch(self.device)
        self._pipeline = Pipeline(model.config, self.config, tokenizer)
        self._stats: dict[str, Any] | None = None

    def compute_importance_scores(self) -> list[float]:
        """Return the importance of every decoder layer; the model is unchanged."""
        with self._source() as source:
            return list(self._pipeline.score(source, self._pipeline.windows_to_score()).scores)

    def prune_model(self) -> PreTrainedModel:
        """Compress the model and return it, the same object, now of the compressed class.

        When anything fails, the model is as it was.

        Raises:
            InputError: If the model is compressed already or so much cannot be removed from it (the largest possible
                target is named), the calibration data are unusable, or a layer's activations are not finite.
        """
        pipeline = self._pipeline
        pipeline.announce_target()
        before = count_parameters(self.model)
        with self._source() as source:
            scores = pipeline.score(source, pipeline.windows_to_score()).scores
            allocation = pipeline.allocate(scores)
            flat_config, layers = pipeline.compress(source, source, pipeline.windows_to_compress(), allocation)
            source.adopt(flat_config)
        after = count_parameters(self.model)
        remaining = after["decoder_linear"] / before["decoder_linear"]
        self._stats = {
            "target_sparsity": self.config.target_sparsity,
            "sparsity": 1 - remaining,
            "compression_ratio": 1 / remaining,
            "parameters_before": before,
            "parameters_after": after,
            "layers": [asdict(layer) for layer in layers],
        }
        logger.info(
            "asked to remove %g %% of %d decoder-layer weights; %.3f %% are removed",
            allocation.sparsity_ratio,
            allocation.parameters_before,
            100 * (1 - remaining),
        )
        return self.model

    def get_compression_stats(self) -> dict[str, Any]:
        """Return what :meth:`prune_model` did, counted from the weights that are there; RuntimeError before it.

        ``sparsity`` is the share of the decoder layers' linear weights removed, ``compression_ratio`` is
        ``1 / (1 - sparsity)``, ``parameters_before`` and ``parameters_after`` are as :func:`count_parameters` has them,
        and ``layers`` has per layer ``keep``, ``value_rank``, ``mlp_width`` and what else was done to it.
        """
        if self._stats is None:
            raise RuntimeError("there are no statistics before prune_model() has been called")
        return self._stats

    @contextmanager
    def _source(self) -> Iterator[ModelInMemory]:
        with dispatch_hooks_lifted(self.model), self.stopwatch.running():
            yield ModelInMemory(self.model, self.device)


def apply_flat_llm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target_sparsity: float | None = None,
    cal_dataset: Any = None,
    *,
    config: FlatLLMConfig | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Compress ``model`` in place and return it, the same object; see :meth:`FlatLLMPruner.prune_model`.

    ``target_sparsity`` (share removed), ``cal_dataset`` and other fields take precedence over ``config``.
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
    """Return the importance of every decoder layer; the model is unchanged. See :class:`FlatLLMPruner`."""
    return FlatLLMPruner(model, tokenizer, config, **fields).compute_importance_scores()


def device_for(model: PreTrainedModel, name: str | None) -> torch.device:
    """Return where the layers run. Of a model spread over devices it is the last part's, whose hooks stay on.

    Raises:
        InputError: If the named device is not there, or is named for a model that is spread over devices.
    """
    home = model.get_output_embeddings().weight.device
    if is_spread_over_devices(model):
        if name is not None and parse_device(name) != home:
            raise InputError(f"device is {name!r}, but the model is spread over devices; leave it None")
        return home
    if name is not None:
        return parse_device(name)
    return best_device() if home.type == "cpu" else home
