"""Figures that tests of faults and launchers leave where FAULT_RESULTS=FILE asks for them.

One JSON for all of them: each test has a key of its own in it, which says on what and how it was measured, so that a
file can be made of several runs of pytest.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchrec", "deepspeed", "ray", "genatt-dist")


def surroundings() -> dict[str, Any]:
    """The machine, without a name, and the versions."""
    return {
        "machine": {"architecture": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


@contextmanager
def figures(key: str | None) -> Iterator[dict[str, Any]]:
    """What the block puts into the dictionary is kept, with how the block ended: `status` is `ok`, or its error.

    key: None for a short variant, whose figures are not the ones to keep.
    """
    found: dict[str, Any] = {}
    try:
        yield found
    finally:
        error = sys.exception()
        found["status"] = "ok" if error is None else type(error).__name__
        print(key, found)
        if key and (path := os.environ.get("FAULT_RESULTS")):
            _keep(Path(path), key, found)


def _keep(path: Path, key: str, found: dict[str, Any]) -> None:
    everything = json.loads(path.read_text()) if path.exists() else {}
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    everything[key] = {"command": f"pytest -m '' '{test}'", **surroundings(), **found}
    path.write_text(json.dumps(dict(sorted(everything.items())), indent=1) + "\n")
