"""What a model's config alone says of its family; the classes of each stand in :mod:`flatllmcore.layers.families`."""

from transformers import PreTrainedConfig

from ..errors import InputError

# The ``model_type`` of dense models.
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3")

# Before it in the ``model_type`` of compressed ones.
_COMPRESSED = "flat_"


def family_name(config: PreTrainedConfig) -> str:
    """Return the family of a dense or compressed model's config, one of ``FAMILY_NAMES``.

    Raises:
        InputError: If the family is not supported.
    """
    name = config.model_type.removeprefix(_COMPRESSED)
    if name not in FAMILY_NAMES:
        raise InputError(f"model family {config.model_type!r} is not supported; supported: {', '.join(FAMILY_NAMES)}")
    return name


def is_dense(config: PreTrainedConfig) -> bool:
    """Tell whether the config is a dense model's."""
    return not config.model_type.startswith(_COMPRESSED)


def check_is_dense(config: PreTrainedConfig) -> None:
    """Refuse the config of a model that cannot be compressed.

    Raises:
        InputError: If the family is not supported, or the model is compressed already.
    """
    family_name(config)
    if not is_dense(config):
        given = f"the model is compressed already ({config.model_type})"
        raise InputError(f"{given}; give one of: {', '.join(FAMILY_NAMES)}")


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of one head; some configs state it only when it is not ``hidden / heads``."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
