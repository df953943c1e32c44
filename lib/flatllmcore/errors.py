"""The exception that entry points turn into a line on stderr and exit status 2, and the doors that others pass by."""

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import Any

# Mistakes of a program; what else the system says of a file is of its place, and the user's to mend.
_MISTAKES = (None, errno.EBADF, errno.EFAULT, errno.EINVAL, errno.ENOTTY, errno.ESPIPE)


class InputError(ValueError):
    """What the caller gave cannot be used.

    The message is one line: what was wrong, what was given, what is accepted. Whatever takes input may raise it;
    docstrings mention it where it is not plain that it does.
    """


@contextmanager
def door(problem: str, remedy: str) -> Iterator[None]:
    """Raise an InputError, ``problem (reason); remedy``, for whatever a library raises over a user's file or flag.

    It stands around calls of libraries alone, which raise exceptions of all kinds; our own keep their traceback. A full
    memory or disk is no fault of the file's.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of Rust: no Exception, and from no module
        is_full = is_out_of_memory(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, InputError) or is_full or not (is_panic or isinstance(error, Exception)):
            raise
        words = " ".join(" ".join(str(error).split("\n")[:2]).split())
        where = traceback.extract_tb(error.__traceback__)[-1].line  # an assertion says no more than itself
        kind = "" if words and isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{problem} ({kind}{words or where:.300}); {remedy}") from error


class _Stream(FileIO):
    """Standard output or error; when nobody reads it any more, or it takes no more, what is written goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if error.errno == errno.EPIPE:
                return len(data)
            error.filename = "standard output or error"
            raise


def open_streams() -> None:
    """Let stdout and stderr be closed, now or later, and show by its number a character that their encoding lacks.

    Signals that end the program are exits from then on, so that temporary folders go.
    """
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is signal.SIG_DFL:  # nohup has the latter ignored
            with suppress(ValueError):  # not in the main thread
                signal.signal(ending, lambda number, _: sys.exit(128 + number))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed from the start: no file that is opened later gets its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            if stream is not None:
                stream.flush()
            encoding = None if stream is None else stream.encoding
            buffer = BufferedWriter(_Stream(number, "w", closefd=False))
            stream = TextIOWrapper(buffer, encoding, "backslashreplace", line_buffering=True)
        elif isinstance(stream, TextIOWrapper):  # the caller's, or ours already
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether there was too little memory for what was asked, on the host or a GPU."""
    words = "out of memory|allocate memory|ALLOC_FAILED"  # of torch's allocators, the system, CUDA and its libraries
    is_said = isinstance(error, RuntimeError | OSError) and re.search(words, str(error))
    return isinstance(error, MemoryError) or bool(is_said)


def mendable(error: Exception, place: Path | None) -> str:
    """Return in words what a user can mend of an error of the machine; any other is raised again.

    ``place``, where the program writes, is named when an error about a file does not say which.
    """
    if is_out_of_memory(error):
        words = ". ".join(str(error).split(". ")[:2]) or "of the host"
        remedy = "a smaller host_memory_gib takes less, or begin anew with a smaller batch_size"
        return f"out of memory ({words:.200}); {remedy}"
    if isinstance(error, OSError) and error.errno not in _MISTAKES:
        return f"{error.strerror}: {error.filename or place}"
    raise error


def run_program(work: Callable[[], object], place: Path | None = None) -> int:
    """Do a program's work; return its exit status: 0, or 2 after one line on stderr about what the user can mend.

    ``place`` is where it writes.
    """
    open_streams()
    try:
        work()
        sys.stdout.flush()
    except InputError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain("interrupted; run it again")
    except (OSError, MemoryError, RuntimeError) as error:
        return complain(mendable(error, place))
    return 0


def complain(message: str) -> int:
    """Say in one line what was unusable; return the exit status that goes with it."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2
