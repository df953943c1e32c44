"""The steps of a compression: windows → importance → allocation → compression.

The library and the FedCore adapters take them on a model in memory, ``checkpoint_run.py`` from a checkpoint on disk to
another, for ``main.py``.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .config import FlatLLMConfig
from .core.curve_allocation import Curves, outlines
from .core.importance import LayerImportance
from .core.rank_allocation import ImportancePreservingRankSelector, RankAllocation
from .core.rotary_pairs import has_free_pairs
from .engine.compress import compress_layers
from .engine.importance import layer_importance, loss_metrics
from .engine.protocols import LayerRecord, LayerSink, LayerSource
from .engine.walk import spread
from .errors import InputError
from .methods import METHODS
from .utils import data_utils
from .utils.devices import parse_device
from .utils.layer_utils import dimensions_from_config, family_name, find_decoder_layers
from .utils.loading import empty_causal_lm
from .utils.names import DAMAGE, PLAIN_FAMILIES, STOCK, text_names
from .utils.stopwatch import stage
from .utils.text_sources import TextDataset, load_text

logger = logging.getLogger(__name__)

TO_SCORE, TO_COMPRESS = 128, 256  # windows in the published setting, to score layers on and to compress them on


@dataclass
class Pipeline:
    """The steps of one compression; no tokenizer is needed where the calibration data are token ids."""

    model_config: PretrainedConfig
    config: FlatLLMConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    _metrics: Tensor | None = field(default=None, init=False)  # of the dense model, for all ratios

    def __post_init__(self) -> None:
        family, method, scores = family_name(self.model_config), self.config.method, self.config.importance_method
        if family not in PLAIN_FAMILIES and (METHODS[method].follows_dense or scores == DAMAGE):
            raise InputError(
                f"{method} by {scores} takes what attention and MLP write for what the stream gains, but layers of "
                f"{family} norm or scale that, or run both at once; accepted: flatllm, by angular or gradient scores"
            )

    @cached_property
    def selector(self) -> ImportancePreservingRankSelector:
        """What allocates ranks to the model; made when the model is known to be a dense one."""
        return ImportancePreservingRankSelector(
            dimensions_from_config(self.model_config),
            rank_multiple=self.config.rank_multiple,
            width_multiple=self.config.width_multiple,
            prune_qk=not self.config.preserve_qk_layers,
            shape=self.config.shape,
        )

    def check_target(self, keep_ratio: float) -> None:
        """Refuse a model that is compressed already, or that has not so much to remove."""
        is_by_damage = self.config.importance_method == DAMAGE and self.config.shape != STOCK
        self.selector.check_target(keep_ratio, self._outlines if is_by_damage else None)

    def check_method(self) -> None:
        """Refuse what the method does not do."""
        method, scores = self.config.method, self.config.importance_method
        if not self.config.preserve_qk_layers and METHODS[method].prunes_pairs != (scores == DAMAGE):
            remedy = "leave them whole (--no-prune_qk, preserve_qk_layers=True), or take another importance_method"
            raise InputError(f"{method} does not prune Q and K by {scores} ranks; {remedy}")
        if self.config.gradient_nsamples and not METHODS[method].weighs_errors:
            raise InputError(f"{method} weighs no errors by gradients; leave gradient_nsamples at 0")

    @cached_property
    def _outlines(self) -> list[Curves]:
        """How far curves of damage will go."""
        layers = find_decoder_layers(empty_causal_lm(self.model_config))
        return outlines(self.selector.dimensions, [has_free_pairs(layer.self_attn) for layer in layers])

    def score(self, source: LayerSource, windows: Tensor) -> LayerImportance:
        """Return the importance of every decoder layer."""
        return layer_importance(source, windows, self.batch_size(windows), self.config.importance_method)

    def allocate(
        self,
        keep_ratio: float,
        scores: Sequence[float],
        curves: Sequence[Curves] | None,
        importance_sha256: str | None = None,
    ) -> RankAllocation:
        """Return what each layer keeps by its scores, or by the curves; the digest is that of the file of both."""
        is_by_damage = self.config.importance_method == DAMAGE
        if is_by_damage and curves is None:
            raise InputError("there are scores, no curves of damage; score elsewhere by damage, or allocate by angular")
        method = METHODS[self.config.method]
        allocation = method.allocate(self.selector, scores, curves if is_by_damage else None, keep_ratio)
        return replace(allocation, importance_sha256=importance_sha256, importance_method=self.config.importance_method)

    def compress(
        self, source: LayerSource, sink: LayerSink, windows: Tensor, allocation: RankAllocation
    ) -> tuple[PretrainedConfig, list[LayerRecord]]:
        """Compress all layers of ``source`` into ``sink``; return the compressed config and a record of each."""
        method, count = METHODS[self.config.method], self.config.gradient_nsamples
        how: dict[str, Any] = {"batch_size": self.batch_size(windows), "tolerance": self.config.tolerance}
        if count and self._metrics is None and len(sink.finished) < source.num_layers:
            self._metrics = loss_metrics(source, spread(windows, count), how["batch_size"])
        return compress_layers(source, sink, windows, method, allocation, **how, metrics=self._metrics)

    def batch_size(self, windows: Tensor) -> int:
        """Return how many windows run at a time."""
        return self.config.batch_size or max(1, 4096 // windows.shape[1])  # about 4096 tokens

    @property
    def seqlen(self) -> int:
        """Tokens per window."""
        return data_utils.window_length(self.config.seqlen, self.model_config.max_position_embeddings)

    @cached_property
    def _data(self) -> tuple[list[TextDataset], list[Tensor]]:
        """Texts, or else rows of token ids."""
        config = self.config
        if isinstance(config.cal_dataset, str):
            names = text_names(config.cal_dataset)
            places = {"dataset_root": config.dataset_root, "cache_dir": config.cache_dir}
            return [load_text(name, "train", **places, tokenizer=self.tokenizer) for name in names], []
        padding_ids = data_utils.padding_ids_of(self.model_config, self.tokenizer)
        most = config.cal_nsamples or TO_COMPRESS
        how = (padding_ids, self.tokenizer, config.seqlen)
        data = data_utils.read_calibration_data(config.cal_dataset, most, *how)
        return ([data], []) if isinstance(data, TextDataset) else ([], data)

    def windows(self, published: int) -> Tensor:
        """Return calibration windows, (N, S), of texts or token ids; ``published`` if no number is asked for."""
        config, seqlen = self.config, self.seqlen
        nsamples = config.cal_nsamples or published
        with stage("data"):
            texts, rows = self._data
            if rows:
                longest = max(map(len, rows)) if config.seqlen is None else seqlen
                windows = data_utils.windows_of_rows(rows, min(seqlen, longest))[:nsamples]
            elif self.tokenizer is None:
                raise InputError(f"a tokenizer is needed to calibrate on {texts[0].name}; give one, or give token ids")
            else:
                windows = data_utils.sample_mixture(texts, self.tokenizer, nsamples, seqlen, config.seed)
            data_utils.check_token_ids(windows, self.model_config.vocab_size)
        logger.info("calibration data: %s", data_utils.calibration_statistics(windows))
        hours = 24 * windows.numel() * self.model_config.num_hidden_layers * self.model_config.hidden_size**2 / 3.6e14
        if hours > 0.25 and parse_device(config.device).type == "cpu":
            time = f"about {hours:.1f} hours per pass through the model, at 1e11 operations/s"
            fewer = "fewer by cal_nsamples and seqlen (--nsamples, --seqlen)"
            logger.warning("%d x %d tokens take a CPU %s; %s", *windows.shape, time, fewer)
        return windows
