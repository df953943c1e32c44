"""What becomes a line, and what keeps its traceback."""

import pytest

from flatllmcore.errors import InputError, door


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
