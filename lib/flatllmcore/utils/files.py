"""Files as a whole: atomic writes, typed reading of our JSON, and whether there is room."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock

from ..errors import InputError

T = TypeVar("T")
GIB = 2**30
LEFT_OVER = ".tmp." + 16 * "[0-9a-f]"  # how :func:`replacing` names what it lends
_LOCK = ".flat-llm.lock"  # not .lock, which other programs put into folders of theirs


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Lend an empty file to write, which takes the place of ``path`` when it is on the disk; folders are made.

    When anything fails ``path`` is as it was. What a kill leaves is deleted when the next file is written beside it.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left_over in path.parent.glob(LEFT_OVER):
        with suppress(OSError), left_over.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError while it is written
            left_over.unlink()
    with naming_place(path), _temporary_file(path) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            with temporary.open("rb") as written:  # safetensors puts another file there, that it alone may read
                temporary.chmod(os.fstat(file.fileno()).st_mode)
                os.fsync(written.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary_file(path: Path) -> BinaryIO:
    """Return a new file beside ``path``, locked."""
    while True:
        file = path.with_name(f".tmp.{token_hex(8)}").open("xb")  # exclusively: through no link
        with suppress(OSError):  # of file systems without locks, where what a kill leaves stays
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # another process took none for left over before it was locked
            return file
        file.close()


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``, which is as it was when anything fails; missing folders are made."""
    with replacing(path) as file:
        file.write(content)


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


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, which is not read to memory as a whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming_place(path: Path) -> Iterator[None]:
    """Let an OSError name ``path``, and be one where a library in Rust hides the number in the message of its own."""
    try:
        yield
    except Exception as error:  # the tokenizers library raises Exception itself
        if isinstance(error, OSError):
            error.filename = str(path)
        elif hidden := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(hidden[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Lend a folder in ``parent``, deleted at the end, as are those of killed runs."""
    prefix = "flat-llm-"
    parent.mkdir(parents=True, exist_ok=True)
    for lock in parent.glob(f"{prefix}*/{_LOCK}"):
        with suppress(OSError), FileLock(lock, timeout=0):  # an OSError while it is in use, or if it is another user's
            shutil.rmtree(lock.parent)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as made, FileLock(Path(made, _LOCK)):
        yield Path(made)


def _nearest(folder: Path) -> Path:
    """Return a folder, or what there is of the folders around it where it is still to be made."""
    return next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))


def check_writable(folder: Path) -> None:
    """Refuse a folder, present or still to be made, where no file can be made."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error


def check_replaceable(path: Path) -> None:
    """Refuse a folder or a pipe where a file is going to be written."""
    if path.is_dir() or path.is_fifo():
        kind = "folder" if path.is_dir() else "pipe"
        raise InputError(f"cannot write {path}: it is a {kind}; move it, or give another place")


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Refuse a folder, present or still to be made, whose file system has too little room left."""
    free_bytes = shutil.disk_usage(_nearest(folder)).free
    if free_bytes < needed_bytes:
        needed, free = needed_bytes / GIB, free_bytes / GIB
        raise InputError(f"{folder} needs {needed:.3g} GiB of disk and {free:.3g} GiB are free")
