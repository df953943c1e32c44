"""The library under the interface of FedCore's reassemblers, and as a subclass of theirs where FedCore is there.

FedCore is imported with this module; ``import flatllmcore`` leaves it alone.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .api import FlatLLMPruner, apply_flat_llm, compute_layer_importance
from .config import FlatLLMConfig
from .core.rank_allocation import allocate_keep_ratios
from .errors import InputError
from .utils.dispatch import is_spread_over_devices
from .utils.layer_utils import check_architecture, detect_architecture

__all__ = ["FlatLLMReassembler", "StandaloneReassembler", "apply_flat_llm", "compute_layer_importance"]

logger = logging.getLogger(__name__)

FEDCORE_REASSEMBLERS = "fedcore.algorithm.low_rank.reassembly.core_reassemblers"


class StandaloneReassembler:
    """What :class:`FlatLLMReassembler` takes from FedCore's ``Reassembler``, for where FedCore is not."""

    supported_layers: dict[type[nn.Module], Any] = {}
    supported_decomposed_layers: dict[type[nn.Module], Any] = {}

    @classmethod
    def get_module(cls, root: nn.Module, name: str) -> nn.Module:
        """Return the module at a dotted name."""
        return root.get_submodule(name)

    @classmethod
    def set_module(cls, root: nn.Module, name: str, module: nn.Module) -> None:
        """Put ``module`` at a dotted name."""
        root.set_submodule(name, module)

    @classmethod
    def _apply_additional_mapping(cls, model: nn.Module, mapping: Mapping[type[nn.Module], Any] | None) -> None:
        """Replace every module whose type is a key of ``mapping`` by what the value makes when it is called."""
        for name, module in list(model.named_modules()):
            if name and mapping and type(module) in mapping:
                cls.set_module(model, name, mapping[type(module)]())

    @classmethod
    def _validate_device_consistency(cls, model: nn.Module) -> None:
        """Raise RuntimeError if the parameters are on more than one device."""
        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) > 1:
            raise RuntimeError(f"the parameters are on several devices: {', '.join(sorted(devices))}")


def _base_class() -> Any:
    try:
        return importlib.import_module(FEDCORE_REASSEMBLERS).Reassembler
    except Exception as error:  # FedCore's own imports raise more kinds than ImportError
        logger.debug("FedCore is not used: %s: %s", type(error).__name__, error)
        return StandaloneReassembler


_Reassembler: Any = _base_class()


class FlatLLMReassembler(_Reassembler):
    """FLAT-LLM as a reassembler: no state, class methods only, and so the same on the class and on an instance."""

    @classmethod
    def reassemble(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: FlatLLMConfig | None = None,
        *,
        architecture: str | None = None,
        additional_mapping: Mapping[type[nn.Module], Any] | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Compress ``model`` in place and return it, the same object. See :class:`FlatLLMPruner`.

        Args:
            model: Dense, in memory.
            tokenizer: The model's.
            config: What is asked; the defaults for ``None``. ``target_sparsity`` is the share removed.
            architecture: The family the model is expected to be of.
            additional_mapping: Module types to replace afterwards, as FedCore's reassemblers do.
            **options: Those that are fields of :class:`FlatLLMConfig` take precedence over ``config``; the others
                come from the framework's callers and are ignored, with a log line.

        Raises:
            InputError: If the model, an option or the text is unusable; the model is then as it was.
            RuntimeError: If the model is on several devices without a ``device_map``.
        """
        check_architecture(model, architecture)
        if not is_spread_over_devices(model):
            cls._validate_device_consistency(model)
        known = {field.name for field in fields(FlatLLMConfig)}
        ignored = sorted(options.keys() - known)
        if ignored:
            logger.warning("ignored, since FLAT-LLM has no such option: %s", ", ".join(ignored))
        asked = {name: value for name, value in options.items() if name in known}
        FlatLLMPruner(model, tokenizer, config, **asked).prune_model()
        if additional_mapping:
            cls._apply_additional_mapping(model, additional_mapping)
        return model

    @classmethod
    def compute_importance_scores(cls, model: PreTrainedModel, *args: Any, **fields: Any) -> list[float]:
        """Return the importance of every decoder layer; takes what :func:`compute_layer_importance` does."""
        return compute_layer_importance(model, *args, **fields)

    @classmethod
    def allocate_ranks(cls, importance_scores: Sequence[float], target_sparsity: float = 0.5) -> list[float]:
        """Return the share of V, O and MLP that each layer keeps, in (0, 1], by Importance-Preserving Rank Selection.

        Scores alone do not say how large Q and K are, which stay whole and count in the total. The target is therefore
        applied to the pruned projections: the mean share is ``1 - target_sparsity``, and less of the whole model is
        removed. ``ImportancePreservingRankSelector`` makes ranks for a model of known sizes.

        Raises:
            InputError: If there is no score, one is not more than 0, or the target is outside [0, 1).
        """
        if len(importance_scores) == 0:
            raise InputError("there are no importance scores; give one per decoder layer")
        keep_ratio = FlatLLMConfig(target_sparsity=target_sparsity).keep_ratio
        return allocate_keep_ratios([float(score) for score in importance_scores], keep_ratio)

    @classmethod
    def _detect_model_architecture(cls, model: nn.Module) -> str:
        """Return the model's family, ``llama``, ``mistral`` and so on."""
        return detect_architecture(model)
