"""JSON read as typed values; every complaint names the field, like ``cells[3].decode_ms.median``."""

import math
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from flatllmcore.errors import InputError


def read_as(kind: Any, value: Any, field: str = "") -> Any:
    """Return ``value``, out of JSON, as ``kind``: a dataclass, a plain type, or a list, dict or choice of them.

    Fields that a dataclass does not have are let be; those with a default may be missing.

    Args:
        kind: What is expected: a class, ``list[T]``, ``dict[str, T]`` or ``T | None``.
        value: What came; ``MISSING`` for nothing.
        field: Where, for complaints; the whole for nothing.

    Raises:
        InputError: If a field is missing or holds something else, by its name; NaN and infinity are no numbers.
    """
    if value is MISSING:
        raise InputError(f"the field {field!r} is missing")
    if isinstance(kind, UnionType):
        (kind,) = (choice for choice in get_args(kind) if choice is not NoneType)
        return None if value is None else read_as(kind, value, field)
    if is_dataclass(kind):
        return _read_object(kind, read_as(dict, value, field), field)
    if get_origin(kind) is list:
        (entry,) = get_args(kind)
        return [read_as(entry, part, f"{field}[{place}]") for place, part in enumerate(read_as(list, value, field))]
    if get_origin(kind) is dict:
        _, entry = get_args(kind)
        return {name: read_as(entry, part, f"{field}.{name}") for name, part in read_as(dict, value, field).items()}
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):  # the exact type: a bool is an int
        raise InputError(f"the field {field!r} is {value!r}; expected {_NAMES.get(kind, kind.__name__)}")
    return value


def _read_object(kind: Any, content: dict[str, Any], place: str) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for field in fields(kind):
        if field.name in content or field.default is MISSING:
            name = f"{place}.{field.name}" if place else field.name
            values[field.name] = read_as(hints[field.name], content.get(field.name, MISSING), name)
    return kind(**values)


_NAMES = {
    float: "a finite number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}
