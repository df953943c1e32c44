"""Files as a whole: atomic writes, typed reading of our JSON, and whether there is room."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from ..errors import InputError
from .devices import GIB

T = TypeVar("T")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend the name of a file to write, which takes the place of ``path`` when it is on the disk; folders are made.

    When anything fails ``path`` is as it was. What a kill leaves has a name that begins with ``.tmp``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp.{path.name}.{os.getpid()}")
    try:
        with naming_place(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, which is as it was when anything fails; missing folders are made."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write a file of :func:`to_json_bytes`, atomically."""
    write_atomically(path, to_json_bytes(content))


def to_json_bytes(content: Any) -> bytes:
    """Return what JSON takes, and dataclasses as objects of their fields, indented; equal content, equal bytes."""
    return (json.dumps(content, indent=1, default=asdict) + "\n").encode()


def read_json(path: Path, kind: type[T]) -> T:
    """Return what a JSON file holds as ``kind``, a dataclass or ``dict[str, Any]``.

    Fields that a dataclass does not have are let be; those with a default may be missing. NaN and infinity are no JSON.
    """
    import msgspec  # no reader of JSON is needed to compress a model in memory

    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: this is not JSON: {error}") from error


def digest(content: bytes) -> str:
    """Return the SHA-256 of ``content``, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def naming_place(path: Path) -> Iterator[None]:
    """Let an OSError name ``path``, and be one when the disk is full: safetensors hides the number in its message."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a folder, present or still to be made, whose file system has too little room left."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        needed, free = needed_bytes / GIB, free_bytes / GIB
        raise InputError(f"{folder} needs {needed:.3g} GiB of disk and {free:.3g} GiB are free")
