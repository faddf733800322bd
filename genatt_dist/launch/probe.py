"""What a host says of itself before ranks are started on it: `python -m genatt_dist.launch.probe` prints JSON."""

from __future__ import annotations

import glob
import json
import platform
from importlib import metadata

from genatt_dist.launch.network import free_port


def installed() -> dict[str, str]:
    """Versions that all hosts of a run have to share."""
    packages = {name: metadata.version(name) for name in ("genatt-dist", "torch", "torchrec", "deepspeed")}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **packages}


def gpus() -> int:
    """GPUs that ranks can use here; torch is imported only where there may be one."""
    if not glob.glob("/dev/nvidia[0-9]*"):
        return 0
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    print(json.dumps({"installed": installed(), "gpus": gpus(), "port": free_port()}))
