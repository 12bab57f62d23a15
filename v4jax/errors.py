"""The error a person can mend: one sentence of what, where, expected, found and what to do."""


class InputError(ValueError):
    """Bad input from outside: a config, a file, a prompt, a flag.

    The command line prints its message on one line and exits with status 2; anything else is our
    own fault and keeps its traceback.
    """


class ChecksumError(InputError):
    """A tensor whose bytes are not those that were written."""
