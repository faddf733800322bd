"""The one exception whose message is written for the user."""


class GenattError(Exception):
    """Something the user can mend: one line that names the thing, its value, its place and the mend.

    Takes the message as its only argument, so that it survives pickling between processes.
    """
