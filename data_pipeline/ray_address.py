"""RAY_ADDRESS: the Ray cluster that a process joins."""

from __future__ import annotations

import os
import socket

from data_pipeline.errors import GenattError
from data_pipeline.redaction import one_line, redact

ANSWER_SECONDS = 10.0


def ray_address() -> str | None:
    """What RAY_ADDRESS says, None where it is not set.

    Raises GenattError where nobody takes calls at such a HOST:PORT: Ray itself tries for minutes.
    """
    address = os.environ.get("RAY_ADDRESS") or None
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise GenattError(
                f"no Ray answers at RAY_ADDRESS={redact(address or '')}: {one_line(error)}: see whether it runs, or "
                "unset it"
            ) from None
    return address
