"""Step 1 of the method: angles between a layer's input and output, and files of scores, ours and the authors'."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..utils.dimensions import ModelDimensions, check_length

IMPORTANCE_FILE = "importance.json"
_SHARE_ROUNDING = 1e-6  # shares stored in float32 may pass 1 by their last digit


def angles_between(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, int]:
    """Return ``arccos(clamp(cos(x, y), 0, 1)) / π``, (...), of rows (..., D), and how many had a zero side: cosine 0.5.

    In float64: near cosine 1 the angle is ``√(2(1 - cos))``, and float32 would end at 3e-4. The angles are averaged, as
    the authors' program does; the paper's text takes the angle of the mean cosine.
    """
    x, y = inputs.double(), outputs.double()
    lengths = x.norm(dim=-1) * y.norm(dim=-1)
    is_zero = lengths == 0
    cosine = torch.where(is_zero, 0.5, (x * y).sum(-1) / torch.where(is_zero, 1.0, lengths))
    return cosine.clamp(0, 1).arccos() / math.pi, int(is_zero.sum())


@dataclass(frozen=True)
class ImportanceScores:
    """The content of ``importance.json``: one score per decoder layer, and all that is needed to compute them again.

    ``fingerprint`` names the weights; angular scores are mean angles in units of π; ``zero_rows`` had no angle.
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
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_length("scores", self.scores, self.dimensions.num_layers)
        _check_scores("'scores'", self.scores)

    def check_matches(self, dimensions: ModelDimensions, fingerprint: str | None) -> None:
        """Refuse a model that these scores are not about; None stands for weights that were not read."""
        if differences := self.dimensions.differences_from(dimensions):
            raise InputError(f"the scores belong to another model, {self.model_id}: {differences}")
        if fingerprint not in (None, self.fingerprint):
            raise InputError(
                f"the scores belong to other weights of the same sizes, {self.model_id} (fingerprint "
                f"{self.fingerprint}, not {fingerprint}); score this model anew"
            )


def read_author_scores(path: Path) -> list[float]:
    """Return each layer's importance from the authors' ``bi_score.pt``, never executed; InputError unless all >= 0."""
    scores = _read_numbers(path)
    _check_scores(str(path), scores)
    return scores


def read_author_keep_ratios(path: Path) -> list[float]:
    """Return the share kept of each layer from the authors' ``sparsity_score_88%.pt``, which is never executed.

    Their "sparsity" is the share of V, O and MLP that is *kept*, in (0, 1], and so is the percentage in the name: 88
    goes with ``--sparsity_ratio 10`` here.
    """
    shares = _read_numbers(path)
    for index, share in enumerate(shares):
        if not 0 < share <= 1 + _SHARE_ROUNDING:
            raise InputError(f"{path} keeps {share} of layer {index}; accepted: shares above 0 and at most 1")
    return [min(share, 1.0) for share in shares]


def _check_scores(what: str, scores: Sequence[float]) -> None:
    for index, score in enumerate(scores):
        if not 0 <= score < math.inf:
            raise InputError(f"{what}: the value of layer {index} is {score}; accepted: finite numbers of at least 0")


def _read_numbers(path: Path) -> list[float]:
    expected = "expected a list, a NumPy array or a tensor of one number per layer, saved by torch.save"
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise a dozen kinds, AssertionError and struct.error among them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read {path} ({reason}); {expected}") from error
    values = content.tolist() if hasattr(content, "tolist") else content
    if not isinstance(values, list) or not values:
        raise InputError(f"{path} holds {type(content).__name__}; {expected}")
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise InputError(f"{path} holds {type(value).__name__} entries; {expected}")
    return [float(value) for value in values]


def _numpy_globals() -> list[Any]:
    """Return what a pickle of NumPy numbers may name; NumPy 1 and 2 keep the two functions in different modules."""
    import numpy as np

    rebuild_array, rebuild_scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    functions = ((rebuild_array, "_reconstruct"), (rebuild_scalar, "scalar"))
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    renamed = [(function, f"{module}.{name}") for module in modules for function, name in functions]
    number_types = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int64")]
    return [*renamed, np.ndarray, np.dtype, *number_types]
