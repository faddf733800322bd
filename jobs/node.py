"""Work of a job that wants a node to itself: a Ray task, for the job's own process may run on a head without CPUs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from data_pipeline.errors import GenattError
from data_pipeline.redaction import one_line
from data_pipeline.signals import own_sigterm
from jobs.driver import say
from jobs.options import OnNode

_LINE_SECONDS = 60.0
RETRIES = 3  # of a task whose worker was lost


def on_node(what: str, place: OnNode, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns, done in a task that reserves what `place` says.

    A task whose worker is lost is done again: it must not mind. Raises GenattError: the one the task raised, one about
    the worker, or the time limit, waiting for a node included.
    """
    with own_sigterm():
        ray.init(ignore_reinit_error=True, logging_level=logging.ERROR)  # RAY_ADDRESS, or a Ray of this machine
    cpus, gpus, limit_seconds = place.cpus, place.gpus, place.limit_seconds
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    task = ray.remote(work).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
    result, began = task.remote(*arguments), time.monotonic()
    while not ray.wait([result], timeout=min(_LINE_SECONDS, limit_seconds))[0]:
        passed = time.monotonic() - began
        if passed >= limit_seconds:
            ray.cancel(result, force=True)
            raise GenattError(
                f"{what}: not done in {limit_seconds:.0f} s: see that a node has {cpus:g} CPUs and {gpus:g} GPUs free "
                "(`ray status`), or raise limit_seconds"
            )
        say(f"{what}: {passed:.0f} s")
    try:
        return ray.get(result)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, GenattError):
            raise cause from None
        if cause is not None:
            raise  # a bug keeps its traceback
        raise GenattError(f"{what}: its worker was lost {1 + RETRIES} times: {one_line(error)[:400]}") from None
