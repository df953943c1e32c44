"""The file of importance scores, ours as JSON and the authors' as pickled lists, arrays or tensors."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..utils.files import write_atomically
from ..utils.json_fields import read_dimensions, read_field, read_json_object, read_sequence
from ..utils.layer_utils import ModelDimensions

_SHARE_ROUNDING = 1e-6  # shares stored in float32 may pass 1 by their last digit


@dataclass(frozen=True)
class ImportanceScores:
    """One score per decoder layer, with all that is needed to compute them again.

    ``fingerprint`` names the weights that were scored; ``zero_rows`` counts the tokens whose hidden state was zero
    and therefore had no angle.
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
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.scores) != self.dimensions.num_layers:
            raise InputError(
                f"'scores' has {len(self.scores)} entries; the model has {self.dimensions.num_layers} layers"
            )
        _check_range("'scores'", self.scores, math.inf)

    def to_bytes(self) -> bytes:
        """Return the content of the file, the same bytes for equal scores."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    def sha256(self) -> str:
        """Return the digest of the file's content, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: Path) -> None:
        write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> "ImportanceScores":
        """Return the scores an ``importance.json`` holds.

        Raises:
            InputError: Naming the file and the field that cannot be used.
        """
        content = read_json_object(path)
        try:
            return cls(
                model_id=read_field(content, "model_id", str),
                fingerprint=read_field(content, "fingerprint", str),
                dimensions=read_dimensions(content),
                dataset=read_field(content, "dataset", str),
                nsamples=read_field(content, "nsamples", int),
                seqlen=read_field(content, "seqlen", int),
                seed=read_field(content, "seed", int),
                scores=read_sequence(content, "scores", float),
                method=read_field(content, "method", str),
                zero_rows=read_field(content, "zero_rows", int),
                versions=read_field(content, "versions", dict),
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def check_matches(self, dimensions: ModelDimensions, fingerprint: str | None) -> None:
        """Refuse a model that these scores are not about; None stands for weights that were not read.

        Raises:
            InputError: Naming the sizes that differ, or the weights.
        """
        differences = self.dimensions.differences_from(dimensions)
        if differences:
            raise InputError(f"the scores belong to another model, {self.model_id}: {differences}")
        if fingerprint not in (None, self.fingerprint):
            raise InputError(
                f"the scores belong to other weights of the same sizes, {self.model_id} (fingerprint "
                f"{self.fingerprint}, not {fingerprint}); score this model anew"
            )


def read_author_scores(path: Path) -> list[float]:
    """Return the importance of each layer from the authors' ``bi_score.pt``.

    Raises:
        InputError: If the file holds anything but one-dimensional finite numbers >= 0. It is never executed.
    """
    scores = _read_numbers(path)
    _check_range(str(path), scores, math.inf)
    return scores


def read_author_keep_ratios(path: Path) -> list[float]:
    """Return the share kept of each layer from the authors' ``sparsity_score_88%.pt``.

    Their "sparsity" is the share of V, O and MLP that is *kept*, and so is the percentage in the file's name: 88
    goes with ``--sparsity_ratio 10`` here.

    Raises:
        InputError: If the file holds anything but one-dimensional shares in (0, 1]. It is never executed.
    """
    shares = _read_numbers(path)
    _check_range(str(path), shares, 1 + _SHARE_ROUNDING)
    if 0 in shares:
        raise InputError(f"{path} keeps nothing of layer {shares.index(0)}; shares must be more than 0")
    return [min(share, 1.0) for share in shares]


def _read_numbers(path: Path) -> list[float]:
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise a dozen kinds, AssertionError and struct.error among them
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"cannot read {path} ({reason}); expected a list, a NumPy array or a tensor of numbers saved by torch.save"
        ) from error
    values = content.tolist() if hasattr(content, "tolist") else content
    if not isinstance(values, list) or not values:
        raise InputError(f"{path} holds {type(content).__name__}; expected one number per layer")
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise InputError(f"{path} holds {type(value).__name__} entries; expected one number per layer")
    return [float(value) for value in values]


def _numpy_globals() -> list[Any]:
    """Return what a pickle of NumPy numbers may name; NumPy 1 and 2 keep the two functions in different modules."""
    import numpy as np

    rebuild_array, rebuild_scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    renamed = [
        (function, f"{package}.multiarray.{name}")
        for package in ("numpy.core", "numpy._core")
        for function, name in ((rebuild_array, "_reconstruct"), (rebuild_scalar, "scalar"))
    ]
    number_types = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int64")]
    return [*renamed, np.ndarray, np.dtype, *number_types]


def _check_range(what: str, values: tuple[float, ...] | list[float], most: float) -> None:
    for layer_idx, value in enumerate(values):
        if not 0 <= value <= most or value == math.inf:
            accepted = "finite numbers of at least 0" if most == math.inf else "0 to 1"
            raise InputError(f"{what}: the value of layer {layer_idx} is {value}; accepted: {accepted}")
