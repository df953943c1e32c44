"""The config classes of compressed models, made of the dense families'; light enough to be known from the start."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError


@dataclass(kw_only=True, repr=False, eq=False)  # those of PreTrainedConfig
class FlatConfig:  # noqa: PLW1641 (its fields change)
    """The fields that a family's compressed config has and its dense one has not; ``None`` leaves a part whole."""

    _auto_class: ClassVar[str] = "AutoConfig"
    model_classes: ClassVar[dict[str, str]]  # the family's, module and name, by auto class

    value_head_dim: int | None = None  # width of each value head
    query_key_rank: int | None = None  # of each head's rows in q_proj and in k_proj, kept as two factors
    query_key_pairs: int | None = None  # rotary pairs of each head's rows in q_proj and in k_proj
    dense_intermediate_size: int | None = None  # MLP width of the dense model

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        strict(cls)  # calls every method named validate_* when a config has been made
        # The family's own asks for all fields, and some of them differ from layer to layer.
        cls.__eq__ = FlatConfig.__eq__  # type: ignore[method-assign]

    def __eq__(self: Any, other: object) -> bool:
        return isinstance(other, type(self)) and self.to_dict() == other.to_dict()

    def __getattribute__(self, name: str) -> Any:
        """Have no width where layers differ in it, for ``hasattr`` and for ``getattr`` with a default."""
        try:
            return super().__getattribute__(name)
        except AmbiguousGlobalPerLayerAttributeError as error:
            raise AttributeError(str(error)) from error

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        """Name all the family's models, whichever of them is saved, for ``trust_remote_code=True``."""
        self.auto_map = dict(self.model_classes)
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def __post_init__(self: Any, **kwargs: Any) -> None:
        """Have a ``head_dim`` always; in some families it is stated only where it is not ``hidden / heads``.

        Whoever has a config may make a model of it: the family's models are made known here.
        """
        module, _, name = self.model_classes["AutoModel"].partition(".")
        getattr(import_module(f".{module}", __package__), name)
        stated = kwargs.pop("head_dim", None) or getattr(self, "head_dim", None)
        self.head_dim = stated or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[misc]

    def validate_widths(self: Any) -> None:
        """Refuse a rank or width that the dense model has not."""
        largest = {"value_head_dim": self.head_dim, "query_key_rank": self.head_dim}
        largest["query_key_pairs"] = self.head_dim // 2
        if self.dense_intermediate_size is not None:
            largest["intermediate_size"] = self.dense_intermediate_size
        for layer_idx, layer_config in enumerate(self.per_layer_config):
            for name, most in largest.items():
                width = getattr(layer_config, name)
                if width is not None and not 1 <= width <= most:
                    raise ValueError(f"layer {layer_idx}: {name} must be in 1..{most}, got {width}")


@cache
def flat_config(family: str) -> type[FlatConfig]:
    """Return the config class of a family's compressed models; ``family`` is the dense models' ``model_type``."""
    dense = CONFIG_MAPPING[family]
    body = dense.__name__.removesuffix("Config")  # "Llama", "Gemma3Text"
    head = body.removesuffix("Text")
    models = {
        "AutoModel": f"{body}Model",
        "AutoModelForCausalLM": f"{head}ForCausalLM",
        "AutoModelForSequenceClassification": f"{head}ForSequenceClassification",
    }
    members: dict[str, Any] = {
        "__module__": f"{__package__}.flat_models",  # where those who have no copy of this package look for it too
        "model_type": f"flat_{family}",
        "model_classes": {auto_class: f"flat_models.Flat{name}" for auto_class, name in models.items()},
    }
    return type(f"Flat{dense.__name__}", (FlatConfig, dense), members)
