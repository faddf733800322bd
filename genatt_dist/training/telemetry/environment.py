"""The file that says what a run ran on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

_SECRET = re.compile(r"(--redis-(?:username|password)=)\S*")  # which Ray puts on the command lines of its workers


def write_environment(run: Path, device: torch.device) -> None:
    """environment.json: versions and hardware of this run. No variables of the environment: they may hold
    credentials.
    """
    command = " ".join(Path(part).name if index == 0 else part for index, part in enumerate(sys.argv))
    packages = ("torch", "torchrec", "deepspeed", "ray", "pyarrow", "numpy", "genatt-dist")
    environment: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "command": _SECRET.sub(r"\1***", command),
    }
    (run / "environment.json").write_text(json.dumps(environment, indent=2))
