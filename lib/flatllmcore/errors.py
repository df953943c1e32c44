"""The one exception that entry points turn into a line on stderr and exit status 2."""


class InputError(ValueError):
    """What the caller gave cannot be used.

    The message is one line: what was wrong, what was given, what is accepted. Whatever takes input may raise it;
    docstrings mention it where it is not plain that it does.
    """
