"""The method on a model in memory, in place: the names of the library's user document."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import FlatLLMConfig
from .core.importance import LayerImportance
from .core.rank_allocation import RankAllocation
from .engine.memory import ModelInMemory
from .errors import InputError, door
from .pipeline import TO_COMPRESS, TO_SCORE, Pipeline
from .utils.devices import parse_device, usual_torch
from .utils.layer_utils import check_causal_lm, check_is_dense, count_parameters
from .utils.names import STOCK


class FlatLLMPruner:
    """Compresses one model in place, and says what came of it.

    Args:
        model: A causal language model of a supported family, in memory: dense to be compressed, any to be scored.
            Weights keep their device and dtype; a ``device_map`` over several devices is fine, offloading is not.
        tokenizer: The model's; not needed where ``cal_dataset`` holds token ids.
        config: What is asked; the defaults for ``None``.
        importance_scores: Of every layer, computed before; measured when they are needed for ``None``, in the stock
            shape never.
        rank_allocation: What layers keep, whatever ``target_sparsity`` says: of
            :meth:`ImportancePreservingRankSelector.allocate`, or shares of :meth:`FlatLLMReassembler.allocate_ranks`.
        **fields: Fields of :class:`FlatLLMConfig` that take precedence over ``config``.

    Raises:
        InputError: If the model or an option is unusable.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: FlatLLMConfig | None = None,
        *,
        importance_scores: Sequence[float] | None = None,
        rank_allocation: RankAllocation | Sequence[float] | None = None,
        **fields: Any,
    ) -> None:
        # By what they do: another copy of this package has a config class of its own.
        needed = ((config, "a FlatLLMConfig", "changed"), (tokenizer, "a tokenizer", "convert_ids_to_tokens"))
        for given, kind, does in needed:
            if not (given is None or hasattr(given, does)):
                raise InputError(f"{given!r:.80} is of {type(given)}; accepted: {kind}")
        self.config = config.changed(**fields) if config else FlatLLMConfig(**fields)
        check_causal_lm(model)
        asked, home = self.config.device, model.get_output_embeddings().weight.device
        is_spread = is_spread_over_devices(model)
        if is_spread and asked is not None and parse_device(asked) != home:
            raise InputError(f"device is {asked!r}, but the model is spread over devices; leave it None")
        # Layers of a model that is spread run where its last part is, whose hooks stay on.
        is_at_home = is_spread or (asked is None and home.type != "cpu")
        self.model, self.device = model, home if is_at_home else parse_device(asked)
        self._pipeline = Pipeline(model.config, self.config, tokenizer)
        self._scores, self._ranks = importance_scores, rank_allocation
        self._stats: dict[str, Any] | None = None

    @usual_torch()
    def compute_importance_scores(self) -> list[float]:
        """Return the importance of every decoder layer; the model is unchanged."""
        return list(self._importance().scores)

    @usual_torch()
    def prune_model(self) -> PreTrainedModel:
        """Compress the model and return it, the same object, now of the compressed class, or of its own in stock shape.

        When anything fails, the model is as it was.

        Raises:
            InputError: If the model is compressed already or so much cannot be removed from it (the largest possible
                target is named), the calibration data are unusable, or a layer's activations are not finite.
        """
        check_is_dense(self.model.config)
        if self.model.config is not self._pipeline.model_config:  # of the stock shape, which is a dense model's
            raise InputError("the model is compressed already; make another FlatLLMPruner to compress it again")
        pipeline, before = self._pipeline, count_parameters(self.model)
        pipeline.check_method()
        allocation = self._allocation()
        with in_memory(self.model, self.device) as source:
            flat_config, layers = pipeline.compress(source, source, pipeline.windows(TO_COMPRESS), allocation)
            source.adopt(flat_config)
        after = count_parameters(self.model)
        remaining = after["decoder_linear"] / before["decoder_linear"]
        self._stats = {
            "target_sparsity": allocation.sparsity_ratio / 100,
            "sparsity": 1 - remaining,
            "compression_ratio": 1 / remaining,
            "parameters_before": before,
            "parameters_after": after,
            "layers": [asdict(layer) for layer in layers],
        }
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

    def _allocation(self) -> RankAllocation:
        pipeline, ranks = self._pipeline, self._ranks
        if ranks is not None:
            if isinstance(ranks, RankAllocation):
                allocation = ranks
            else:
                with door("rank_allocation is unusable", "accepted: a RankAllocation, or shares to keep"):
                    shares = [float(share) for share in ranks]
                allocation = pipeline.selector.floored(shares)
            allocation.check_matches(pipeline.selector.dimensions)
            if allocation.shape != self.config.shape:
                raise InputError(f"rank_allocation is of the shape {allocation.shape!r}, not {self.config.shape!r}")
            return allocation
        pipeline.check_target(self.config.keep_ratio)
        if self.config.shape == STOCK:
            return pipeline.selector.stock(self.config.keep_ratio)
        if self._scores is None:
            found = self._importance()
        else:
            with door("importance_scores are unusable", "accepted: a number for each layer"):
                found = LayerImportance(tuple(map(float, self._scores)), 0)
        return pipeline.allocate(self.config.keep_ratio, found.scores, found.curves_in_nats)

    def _importance(self) -> LayerImportance:
        with in_memory(self.model, self.device) as source:
            return self._pipeline.score(source, self._pipeline.windows(TO_SCORE))


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


def is_spread_over_devices(model: PreTrainedModel) -> bool:
    """Tell whether a ``device_map`` put parts of the model on different devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


@contextmanager
def in_memory(model: PreTrainedModel, device: torch.device) -> Iterator[ModelInMemory]:
    """Give the model as source and sink, its decoder layers without accelerate's hooks until the end of the block.

    The hooks would send a layer's input to the layer's home while the layer itself is on loan elsewhere.
    """
    layers = model.get_decoder().layers
    hooks = {name: module._hf_hook for name, module in layers.named_modules() if hasattr(module, "_hf_hook")}
    if hooks:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_submodules

        remove_hook_from_submodules(layers)
    try:
        yield ModelInMemory(model, device)
    finally:
        for name, hook in hooks.items():
            for part in getattr(hook, "hooks", (hook,)):
                # Knows tied weights by address, and new weights may lie where old ones were. Layers tie none.
                part.tied_params_map = None
            add_hook_to_module(model.get_decoder().layers.get_submodule(name), hook)
