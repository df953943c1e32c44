"""The library under the interface of FedCore's reassemblers, and as a subclass of theirs where FedCore is there.

FedCore is imported when ``FlatLLMReassembler`` is first asked for; ``import flatllmcore`` leaves it alone.
"""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import new_class
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .api import apply_flat_llm, compute_layer_importance, is_spread_over_devices
from .config import FlatLLMConfig
from .core.rank_allocation import allocate_keep_ratios
from .errors import InputError
from .utils.layer_utils import check_architecture, detect_architecture

logger = logging.getLogger(__name__)


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
    def _apply_additional_mapping(cls, model: nn.Module, mapping: Mapping[type[nn.Module], Any]) -> None:
        """Replace every module whose type is a key of ``mapping`` by what the value makes when it is called."""
        for name, module in list(model.named_modules()):
            if name and type(module) in mapping:
                cls.set_module(model, name, mapping[type(module)]())

    @classmethod
    def _validate_device_consistency(cls, model: nn.Module) -> None:
        devices = {str(parameter.device) for parameter in model.parameters()}
        if len(devices) > 1:
            raise RuntimeError(f"the parameters are on several devices: {', '.join(sorted(devices))}")


class FlatLLMMethods:
    """FLAT-LLM as a reassembler: no state, and so the same on the class and on an instance."""

    compute_importance_scores = staticmethod(compute_layer_importance)
    _detect_model_architecture = staticmethod(detect_architecture)

    @classmethod
    def reassemble(
        cls: Any,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: FlatLLMConfig | None = None,
        *,
        architecture: str | None = None,
        additional_mapping: Mapping[type[nn.Module], Any] | None = None,
        **options: Any,
    ) -> PreTrainedModel:
        """Compress ``model`` in place and return it, the same object, as :class:`FlatLLMPruner` does.

        Args:
            architecture: The family the model is expected to be of.
            additional_mapping: Module types to replace afterwards, as FedCore's reassemblers do.
            **options: Those of :class:`FlatLLMPruner`, fields of :class:`FlatLLMConfig` among them, take precedence
                over ``config``; the others come from the framework's callers and are ignored, with a log line.

        Raises:
            InputError: If the model, an option or the text is unusable; the model is then as it was.
            RuntimeError: If the model is on several devices without a ``device_map``.
        """
        check_architecture(model, architecture)
        if not is_spread_over_devices(model):
            cls._validate_device_consistency(model)
        known = {"importance_scores", "rank_allocation", *(field.name for field in fields(FlatLLMConfig))}
        if ignored := sorted(options.keys() - known):
            logger.warning("ignored, since FLAT-LLM has no such option: %s", ", ".join(ignored))
        apply_flat_llm(model, tokenizer, config=config, **{name: options[name] for name in options.keys() & known})
        if additional_mapping:
            cls._apply_additional_mapping(model, additional_mapping)
        return model

    @classmethod
    def allocate_ranks(cls, importance_scores: Sequence[float], target_sparsity: float = 0.5) -> list[float]:
        """Return a list of shares in (0, 1], of six digits: what each layer is to keep of its V, O and MLP weights.

        Importance-Preserving Rank Selection; ``reassemble`` takes it as ``rank_allocation``. Scores alone do not say
        how large Q and K are, which stay whole and count in the total. The target is therefore applied to the pruned
        projections: the mean share is ``1 - target_sparsity``, and less of the whole model is removed.
        ``ImportancePreservingRankSelector`` makes ranks for a model of known sizes.

        Raises:
            InputError: If a score is not more than 0, or the target is outside [0, 1).
        """
        if not 0 <= target_sparsity < 1:
            raise InputError(f"target_sparsity is {target_sparsity}; accepted: 0 or more, less than 1")
        keep = allocate_keep_ratios([float(score) for score in importance_scores], 1 - float(target_sparsity))
        return [float(f"{share:.6g}") for share in keep]


def __getattr__(name: str) -> Any:
    """Make ``FlatLLMReassembler`` when it is first asked for, which FedCore's file may do while it is imported here."""
    if name != "FlatLLMReassembler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base: Any = StandaloneReassembler
    try:
        base = importlib.import_module("fedcore.algorithm.low_rank.reassembly.core_reassemblers").Reassembler
    except Exception as error:  # FedCore's own imports raise more kinds than ImportError
        logger.debug("FedCore is not used: %s: %s", type(error).__name__, error)
    about = {"__doc__": FlatLLMMethods.__doc__, "__module__": __name__}
    made = new_class(name, (FlatLLMMethods, base), {}, lambda members: members.update(about))
    return globals().setdefault(name, made)
