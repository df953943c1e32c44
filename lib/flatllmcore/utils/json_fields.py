"""Read fields of our own JSON files; every complaint names the field."""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from .layer_utils import ModelDimensions

T = TypeVar("T")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object a JSON file holds.

    Raises:
        InputError: If there is no such file, it cannot be read, or it holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def read_field(content: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """Return one field as ``kind``; an integer is accepted as a float, infinity and NaN are not."""
    if name not in content:
        raise InputError(f"the field {name!r} is missing")
    return _checked(content[name], name, kind)


def read_sequence(content: Mapping[str, Any], name: str, kind: type[T]) -> tuple[T, ...]:
    """Return a field that is a list, each entry as ``kind``."""
    values = read_field(content, name, list)
    return tuple(_checked(value, f"{name}[{i}]", kind) for i, value in enumerate(values))


def read_dimensions(content: Mapping[str, Any]) -> ModelDimensions:
    """Return the field ``dimensions``, sizes all positive."""
    sizes = read_field(content, "dimensions", dict)
    architecture = read_field(sizes, "architecture", str)
    names = [field.name for field in fields(ModelDimensions) if field.name != "architecture"]
    values = {name: read_field(sizes, name, int) for name in names}
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name!r} is {value}; expected at least 1")
    return ModelDimensions(architecture, **values)


def _checked(value: Any, name: str, kind: type[T]) -> T:
    if kind is float and type(value) is int:
        value = float(value)
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) is not kind or not is_finite:  # the exact type, since a bool passes for an int
        raise InputError(f"{name!r} is {value!r}; expected {'a finite number' if kind is float else kind.__name__}")
    return value
