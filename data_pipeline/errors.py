"""The exceptions whose messages are written for the user."""

from typing import ClassVar


class GenattError(Exception):
    """Something the user can mend: one line that names the thing, its value, its place and the mend.

    Takes the message as its only argument, so that it survives pickling between processes. exit_code: of the program
    that ends with it.
    """

    exit_code: ClassVar[int] = 2


class ResumableError(GenattError):
    """The work was stopped from outside and nothing is lost: the same command with --resume goes on.

    The code is EX_TEMPFAIL of sysexits.h, by which schedulers can tell "run it again" from a failure.
    """

    exit_code: ClassVar[int] = 75
