"""What step 1 of the method finds, and files of it: ours, which are read without torch, and the authors'."""

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..utils.dimensions import ModelDimensions
from ..utils.names import GRADIENT
from .curve_allocation import Curves, check_curves


@dataclass(frozen=True)
class LayerImportance:
    """Scores of all layers, and how many rows had no angle."""

    scores: tuple[float, ...]  # angular: mean angles in units of π, 0 to 0.5
    zero_rows: int
    curves_in_nats: tuple[Curves, ...] | None = None  # of what removing weights costs at the output


@dataclass(frozen=True)
class ImportanceScores:
    """The content of ``importance.json``: one score per decoder layer, and all that is needed to compute them again.

    ``fingerprint`` names the model; angular scores are mean angles in units of π; ``zero_rows`` had no angle.
    """

    model_id: str
    fingerprint: str
    dimensions: ModelDimensions
    dataset: str
    nsamples: int
    seqlen: int
    seed: int
    scores: tuple[float, ...]
    method: str = "angular"
    zero_rows: int = 0
    curves_in_nats: tuple[Curves, ...] | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, score in enumerate(self.scores):
            if not 0 <= score < math.inf:
                raise InputError(f"the score of layer {index} is {score}; accepted: finite numbers of at least 0")
        if self.curves_in_nats is not None:
            check_curves(self.curves_in_nats, self.dimensions)

    def check_matches(self, dimensions: ModelDimensions, fingerprint: str | None) -> None:
        """Refuse a model that these scores are not about; None stands for weights that were not read."""
        if differences := self.dimensions.differences_from(dimensions):
            raise InputError(f"the scores belong to another model, {self.model_id}: {differences}")
        if fingerprint not in (None, self.fingerprint):
            other = differing_parts(self.fingerprint, fingerprint)
            raise InputError(f"the scores belong to other {other}, of {self.model_id}; score this model anew")


def check_importance_method(found: str, asked: str | None) -> None:
    """Refuse gradient scores where angular ones or curves are asked for, and the reverse: curves hold angles too."""
    if asked not in (None, found) and GRADIENT in (found, asked):
        raise InputError(f"the scores are by {found}, and here it is {asked}; give another --bi_score")


def differing_parts(fingerprint: str, other: str) -> str:
    """Return which parts of two models of the same sizes differ, by their fingerprints, in words."""
    parts = zip(("weights", "config", "tokenizer"), fingerprint.split("-"), other.split("-"), strict=False)
    return " and ".join(name for name, one, another in parts if one != another) or "weights"


def read_author_numbers(path: Path) -> list[float]:
    """Return the number of each layer from a file of the authors, ``bi_score.pt`` or ``sparsity_score_88%.pt``.

    The file is never executed. Their "sparsity" is the share of V, O and MLP that is *kept*, and so is the percentage
    in the name: 88 goes with ``--sparsity_ratio 10`` here.
    """
    import numpy as np
    import torch

    expected = "expected a list, a NumPy array or a tensor of one finite number per layer, saved by torch.save"
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, torch.Tensor | np.ndarray):
            content = content.tolist() if math.prod(content.shape) <= path.stat().st_size else ()
        numbers = array("d", content if isinstance(content, list | tuple) else ())  # takes neither text nor lists
    except Exception as error:  # damaged bytes raise a dozen kinds, AssertionError and struct.error among them
        # In torch's own words: how to load it unsafely.
        reason = error.strerror if isinstance(error, OSError) else "it is damaged, or holds something else"
        raise InputError(f"cannot read {path} ({reason}); {expected}") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        found = f"{len(numbers)} such numbers, {sum(map(math.isfinite, numbers))} of them finite"
        raise InputError(f"{path} holds {found}; {expected}")
    return numbers.tolist()


def _numpy_globals() -> list[Any]:
    """Return what a pickle of NumPy numbers may name; NumPy 1 and 2 keep the two functions in different modules."""
    import numpy as np

    functions = {"_reconstruct": np.zeros(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    renamed = [(function, f"{module}.{name}") for module in modules for name, function in functions.items()]
    number_types = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int64")]
    return [*renamed, np.ndarray, np.dtype, *number_types]
