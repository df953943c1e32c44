"""What becomes a line, and what keeps its traceback."""

import errno
import os
import subprocess
import sys

import pytest

from flatllmcore.errors import InputError, door, mendable
from python_process import LIBRARY


class PanicException(BaseException):
    """As Rust's panics are called in Python."""


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ValueError("two\nlines\nand more"), "two lines"),
        (OSError(5, "Input/output error", "x"), "[Errno 5] Input/output error: 'x'"),
        (KeyError("factor"), "KeyError: 'factor'"),
        (Exception("of tokenizers"), "Exception: of tokenizers"),
        (PanicException("in Rust"), "PanicException: in Rust"),
        (AssertionError(), "AssertionError: raise raised"),  # the line of the source
        (RuntimeError(1000 * "x"), f"RuntimeError: {300 * 'x'}"),
        (InputError("as it was"), None),
        (KeyboardInterrupt(), None),
        (SystemExit(3), None),
    ],
)
def test_what_a_library_raises_becomes_one_line_and_what_ends_a_program_passes(raised, reason):
    with pytest.raises(BaseException) as caught, door("this is wrong", "that is accepted"):  # noqa: PT011
        raise raised
    if reason is None:
        assert caught.value is raised
    else:
        assert (type(caught.value), str(caught.value)) == (InputError, f"this is wrong ({reason}); that is accepted")
        assert caught.value.__cause__ is raised


OPENED = """
import sys
print("before", flush=False)
from flatllmcore.errors import open_streams
open_streams()
print("behind")
with open({name!r}, "w") as file:
    file.write(str(file.fileno()))
os._exit(0)
"""


@pytest.mark.parametrize("is_closed", [False, True])
def test_streams_lose_no_line_and_no_file_gets_the_number_of_one_that_was_closed(tmp_path, is_closed):
    code = "import os\n" + OPENED.format(name=str(tmp_path / "number"))
    closing = (lambda: os.closerange(0, 3)) if is_closed else None
    environment = os.environ | {"PYTHONPATH": str(LIBRARY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=closing, env=environment)
    assert done.stdout == ("" if is_closed else "before\nbehind\n")
    assert int((tmp_path / "number").read_text()) > 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_no_fault_of_a_file(number):
    with pytest.raises(OSError, match=os.strerror(number)), door("x is unusable", "mend it"):
        raise OSError(number, os.strerror(number), "x")


@pytest.mark.parametrize(("number", "is_of_the_place"), [(errno.ENOTCONN, True), (errno.EINVAL, False), (None, False)])
def test_what_the_system_says_of_a_place_is_a_line_and_a_mistake_is_none(number, is_of_the_place):
    error = OSError(number, "said", "x") if number else OSError("said")
    if is_of_the_place:
        assert mendable(error, None) == "said: x"
    else:
        with pytest.raises(OSError, match="said"):
            mendable(error, None)
