"""The one exception for bad input."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where (file, line, name), and what to do. The command
    line prints it without a traceback and exits with code 2.
    """
