"""The exception that entry points turn into a line on stderr and exit status 2, and the doors that others pass by."""

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path

# What a user can mend about a place: where it is, what it is called, who may use it, its room, the disk under it.
UNUSABLE_PLACE = {
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EXDEV, errno.EBUSY),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY, errno.ENOLCK),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK, errno.EMFILE, errno.ENFILE, errno.EOPNOTSUPP),
    *(errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
}


class InputError(ValueError):
    """What the caller gave cannot be used.

    The message is one line: what was wrong, what was given, what is accepted. Whatever takes input may raise it;
    docstrings mention it where it is not plain that it does.
    """


@contextmanager
def door(problem: str, remedy: str) -> Iterator[None]:
    """Raise an InputError, ``problem (reason); remedy``, for whatever a library raises over a user's file or flag.

    It stands around calls of libraries alone, which raise exceptions of all kinds; our own keep their traceback.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of Rust: no Exception, and from no module
        if isinstance(error, InputError) or not (is_panic or isinstance(error, Exception)):
            raise
        words = " ".join(" ".join(str(error).split("\n")[:2]).split())
        where = traceback.extract_tb(error.__traceback__)[-1].line  # an assertion says no more than itself
        kind = "" if words and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{problem} ({kind}{words or where:.300}); {remedy}") from error


def show_all_characters() -> None:
    """Let stdout show by its number a character that its encoding lacks, as stderr does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def run_program(work: Callable[[], object], place: Path | None = None) -> int:
    """Do a program's work; return its exit status: 0, or 2 after one line on stderr about what the user can mend.

    ``place``, where it writes, is named when an error about a file does not say which.
    """
    show_all_characters()
    try:
        work()
    except InputError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain("interrupted; run it again")
    except OSError as error:
        if error.errno not in UNUSABLE_PLACE:
            raise
        return complain(f"{error.strerror}: {error.filename or place}")
    return 0


def complain(message: str) -> int:
    """Say in one line what was unusable; return the exit status that goes with it."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2
