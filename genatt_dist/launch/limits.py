"""What this process may use: cores and memory, as its affinity and its container (cgroup v2) limit them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def available_cores() -> float:
    """Cores this process may use: its affinity, and its cgroup's quota, which cpu_count() ignores in a container."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else cores


def available_memory() -> int:
    """Bytes of memory this process may use: the machine's, or its cgroup's limit."""
    limit = read("/sys/fs/cgroup/memory.max")
    return min(psutil.virtual_memory().total, int(limit)) if limit.isdigit() else psutil.virtual_memory().total


def read(path: str) -> str:
    """A small file's content, stripped; empty where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
