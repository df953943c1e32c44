"""What a compression is asked for, checked when it is asked."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from .errors import InputError
from .utils.files import write_atomically
from .utils.json_fields import read_json_object


@dataclass(frozen=True)
class FlatLLMConfig:
    """How to compress a model, and on which text.

    Attributes:
        target_sparsity: Share of the decoder layers' linear weights to **remove**, more than 0 and less than 1. Q and K
            count in the total even where they stay whole.
        tolerance: Share of eigenvalue mass, in (0, 1], whose rank is logged beside the rank chosen; changes nothing.
        cal_dataset: Calibration text: the name of a dataset (``wikitext2``, ``c4``, ``alpaca``, ``pydocs``), a file or
            folder, a list of texts, token ids (a tensor or rows of one), or an iterable of batches of either such as a
            ``datasets.Dataset`` or a ``DataLoader``.
        cal_nsamples: Windows of text, for the importance scores and for the compression each. Of token ids given,
            the first this many rows.
        importance_method: ``angular`` (the published one) or ``gradient``.
        preserve_qk_layers: Whether Q and K stay whole, as published.
        seqlen: Tokens per window; ``None`` for 4096, or fewer if the model takes fewer.
        batch_size: Windows run at a time; ``None`` for about 4096 tokens.
        seed: Of the sampling of windows.
        rank_multiple: Ranks and widths are multiples of this; ``None`` for 8 where heads are 64 wide or more, else 1.
        device: Where layers run, ``cpu``, ``cuda`` or ``cuda:N``; ``None`` for where the model is, or the GPU if there
            is one and the model is in host memory.
        dataset_root: Folder with local copies of the named datasets.
        cache_dir: Where datasets from the hub are kept; the hub's own cache by default.

    Raises:
        InputError: Naming the field, what came and what is accepted.
    """

    target_sparsity: float = 0.5
    tolerance: float = 0.96
    cal_dataset: Any = "wikitext2"
    cal_nsamples: int = 128
    importance_method: str = "angular"
    preserve_qk_layers: bool = True
    seqlen: int | None = None
    batch_size: int | None = None
    seed: int = 42
    rank_multiple: int | None = None
    device: str | None = None
    dataset_root: Path | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in _PATHS:
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name, (is_accepted, accepted) in _ACCEPTED.items():
            value = getattr(self, name)
            if not is_accepted(value):
                raise InputError(f"{name} is {value!r}; accepted: {accepted}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON takes them.

        Raises:
            InputError: If ``cal_dataset`` is data itself and not the name of some.
        """
        if not isinstance(self.cal_dataset, str):
            kind = type(self.cal_dataset).__name__
            raise InputError(f"cal_dataset is a {kind}, which JSON cannot hold; accepted: a dataset's name or a path")
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in content.items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "FlatLLMConfig":
        """Return the config with these fields; the others keep their defaults.

        Raises:
            InputError: Naming options that do not exist, or the field whose value is unusable.
        """
        _check_names(content)
        return cls(**content)

    def save(self, path: str | Path) -> None:
        """Write the fields to a JSON file."""
        write_atomically(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "FlatLLMConfig":
        """Return what :meth:`save` wrote.

        Raises:
            InputError: Naming the file, and the field that cannot be used.
        """
        content = read_json_object(Path(path))
        try:
            return cls.from_dict(content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def merged_config(config: FlatLLMConfig | None, overrides: Mapping[str, Any]) -> FlatLLMConfig:
    """Return ``config``, or the defaults for ``None``, with some fields replaced.

    Raises:
        InputError: If ``config`` is something else, an option does not exist or a value is unusable.
    """
    if config is None:
        return FlatLLMConfig.from_dict(overrides)
    if not isinstance(config, FlatLLMConfig):
        raise InputError(
            f"config is a {type(config).__name__}; accepted: a FlatLLMConfig, or none and its fields by name"
        )
    _check_names(overrides)
    return replace(config, **overrides)


def _check_names(content: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(FlatLLMConfig)]
    unknown = [repr(name) for name in content if name not in known]
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; accepted: {', '.join(known)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer_from(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_none_or(is_accepted: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_accepted(value)


IMPORTANCE_METHODS = ("angular", "gradient")
_PATHS = ("dataset_root", "cache_dir")
_ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "target_sparsity": (
        lambda value: _is_number(value) and 0 < value < 1,
        "the share of weights to remove, more than 0 and less than 1",
    ),
    "tolerance": (lambda value: _is_number(value) and 0 < value <= 1, "a share above 0 and at most 1"),
    "cal_dataset": (
        lambda value: value != "" if isinstance(value, str) else isinstance(value, Iterable),
        "a dataset's name, a path as a string, texts, token ids, or an iterable of batches of them",
    ),
    "cal_nsamples": (_is_integer_from(1), "an integer, 1 or more"),
    "importance_method": (lambda value: value in IMPORTANCE_METHODS, " or ".join(IMPORTANCE_METHODS)),
    "preserve_qk_layers": (lambda value: isinstance(value, bool), "True or False"),
    "seqlen": (_is_none_or(_is_integer_from(2)), "None or an integer, 2 or more"),
    "batch_size": (_is_none_or(_is_integer_from(1)), "None or an integer, 1 or more"),
    "seed": (_is_integer_from(0), "an integer, 0 or more"),
    "rank_multiple": (_is_none_or(_is_integer_from(1)), "None or an integer, 1 or more"),
    "device": (_is_none_or(lambda value: isinstance(value, str)), "None, cpu, cuda or cuda:N"),
    "dataset_root": (_is_none_or(lambda value: isinstance(value, Path)), "None or a folder"),
    "cache_dir": (_is_none_or(lambda value: isinstance(value, Path)), "None or a folder"),
}
