"""What a compression is asked for, checked when it is asked."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import InputError
from .utils.calibration_windows import Rereadable
from .utils.devices import DEVICE_NAMES, is_device_name
from .utils.files import write_atomically
from .utils.json_fields import read_json_object


@dataclass(frozen=True, eq=False, repr=False)
class FlatLLMConfig:
    """How to compress a model, and on which text.

    Two configs are equal when all their fields are; calibration data given directly are equal to themselves alone.

    Attributes:
        target_sparsity: Share of the decoder layers' linear weights to **remove**, 0 to 1; 0 leaves the model's
            function as it is. Q and K count in the total even where they stay whole, and then limit what can be
            removed; a target beyond is refused, with the largest possible one, when the model is known.
        tolerance: Share of eigenvalue mass, in (0, 1], whose rank is logged beside the rank chosen; changes nothing.
        cal_dataset: Calibration text: the name of a dataset (``wikitext2``, ``c4``, ``alpaca``, ``pydocs``), a file or
            folder, a list of texts, token ids (a tensor or rows of one), or an iterable of batches of either such as a
            ``datasets.Dataset``, streamed or not, or a ``DataLoader``. A generator can be used more than once: the
            config keeps what has been read of it.
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
        for name, (is_accepted, convert, accepted) in _ACCEPTED.items():
            value = getattr(self, name)
            if not is_accepted(value):
                raise InputError(f"{name} is {_shown(value)}; accepted: {accepted}")
            object.__setattr__(self, name, convert(value))

    def __repr__(self) -> str:
        values = {field.name: repr(getattr(self, field.name)) for field in fields(self) if field.name != "cal_dataset"}
        data = self.cal_dataset
        values["cal_dataset"] = repr(data) if isinstance(data, str) else f"<{type(data).__name__}>"
        return f"{type(self).__name__}({', '.join(f'{field.name}={values[field.name]}' for field in fields(self))})"

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, FlatLLMConfig) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        data = self.cal_dataset
        others = (getattr(self, field.name) for field in fields(self) if field.name != "cal_dataset")
        return (data if isinstance(data, str) else id(data), *others)

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
    if type(config).__name__ != FlatLLMConfig.__name__ or not is_dataclass(config):
        raise InputError(
            f"config is a {type(config).__name__}; accepted: a FlatLLMConfig, or none and its fields by name"
        )
    if not isinstance(config, FlatLLMConfig):  # that of another copy of this package in the process
        config = FlatLLMConfig.from_dict({field.name: getattr(config, field.name) for field in fields(config)})
    _check_names(overrides)
    return replace(config, **overrides)


def _check_names(content: Mapping[str, Any]) -> None:
    known = [field.name for field in fields(FlatLLMConfig)]
    unknown = [repr(name) for name in content if name not in known]
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}; accepted: {', '.join(known)}")


def _shown(value: Any) -> str:
    """Return how an error names a value: on one line, however large it is."""
    text = repr(value)
    return text if len(text) <= 80 and text.isprintable() else f"a {type(value).__name__}"


# What a field takes, what makes of it the type that the field has, and what is accepted in words.
_Accepted = tuple[Callable[[Any], bool], Callable[[Any], Any], str]


def _number(is_in_range: Callable[[Any], bool], accepted: str) -> _Accepted:
    return (
        lambda value: isinstance(value, Real) and not isinstance(value, bool) and is_in_range(value),
        float,
        accepted,
    )


def _integer(least: int, accepted: str, most: float = float("inf")) -> _Accepted:
    return (
        lambda value: isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most,
        int,
        accepted,
    )


def _one_of(is_accepted: Callable[[Any], bool], accepted: str) -> _Accepted:
    return is_accepted, lambda value: value, accepted


def _none_or(field: _Accepted) -> _Accepted:
    is_accepted, convert, accepted = field
    return (
        lambda value: value is None or is_accepted(value),
        lambda value: None if value is None else convert(value),
        f"None or {accepted}",
    )


def _calibration_data(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return Rereadable(value) if isinstance(value, Iterator) else value


IMPORTANCE_METHODS = ("angular", "gradient")
_FOLDER: _Accepted = (lambda value: isinstance(value, str | os.PathLike), Path, "a folder")
_ACCEPTED: dict[str, _Accepted] = {
    "target_sparsity": _number(lambda value: 0 <= value <= 1, "the share of weights to remove, 0 to 1"),
    "tolerance": _number(lambda value: 0 < value <= 1, "a share above 0 and at most 1"),
    "cal_dataset": (
        lambda value: value != "" if isinstance(value, str) else isinstance(value, Iterable | os.PathLike),
        _calibration_data,
        "a dataset's name, a path, texts, token ids, or an iterable of batches of them",
    ),
    "cal_nsamples": _integer(1, "an integer, 1 or more"),
    "importance_method": _one_of(
        lambda value: isinstance(value, str) and value in IMPORTANCE_METHODS, " or ".join(IMPORTANCE_METHODS)
    ),
    "preserve_qk_layers": _one_of(lambda value: isinstance(value, bool), "True or False"),
    "seqlen": _none_or(_integer(2, "an integer, 2 or more")),
    "batch_size": _none_or(_integer(1, "an integer, 1 or more")),
    "seed": _integer(0, "an integer, 0 to 2^63 - 1", most=2**63 - 1),
    "rank_multiple": _none_or(_integer(1, "an integer, 1 or more")),
    "device": _none_or(_one_of(is_device_name, DEVICE_NAMES)),
    "dataset_root": _none_or(_FOLDER),
    "cache_dir": _none_or(_FOLDER),
}
