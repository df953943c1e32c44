"""What families, ways, places and texts are called. No torch here: command lines are read before it is imported."""

import os
from pathlib import Path

PLAIN_FAMILIES = (  # whose layers add attention and then MLP to the stream as they are
    *("llama", "mistral", "ministral", "qwen2", "qwen3"),
    *("ernie4_5", "helium", "hunyuan_v1_dense", "seed_oss", "smollm3"),
)
FAMILY_NAMES = (  # the ``model_type`` of dense models
    *PLAIN_FAMILIES,
    *("cohere2", "exaone4", "gemma2", "gemma3_text", "granite", "olmo2", "olmo3"),
)
SHAPES = PER_LAYER, STOCK = "per-layer", "stock"  # of compressed models; the latter is the dense family's own
IMPORTANCE_METHODS = ANGULAR, GRADIENT, DAMAGE = "angular", "gradient", "damage"  # the last has curves beside scores
DEVICE_NAMES = "cpu, cuda or cuda:N"
IMPORTANCE_FILE = "importance.json"


def ranks_file(sparsity_percent: float) -> str:
    """Return the name of the file of ranks for a percentage removed."""
    return f"ranks_{sparsity_percent:g}.json"


def model_name(model: str | Path) -> str:
    """Return the last part of a model's folder or hub id, and of a GGUF file its name without the suffix."""
    return os.path.basename(os.path.abspath(model)).removesuffix(".gguf")  # absolute: "." is no name


def public_name(model: str) -> str:
    """Return a hub id, or a name, as it is, and of a path here its last part: what may be published."""
    return model_name(model) if os.path.exists(model) else model


def text_names(mixture: str) -> list[str]:
    """Return the names and paths that ``+`` joins, a ~ written out; a path that is there is one, whatever is in it."""
    whole = os.path.expanduser(mixture)
    return [whole] if os.path.exists(whole) else [os.path.expanduser(name) for name in mixture.split("+")]


def public_text(mixture: str) -> str:
    """Return a mixture of texts as it may be published: of every path here its last part."""
    return "+".join(map(public_name, text_names(mixture)))
