"""A quiet Ray for one preparation: started here unless there is one, and errors of its tasks made plain."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import pyarrow as pa
import ray
import ray.data
from ray._private import worker as ray_worker
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.data import DataContext, Dataset
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, WorkerCrashedError

from data_pipeline.errors import GenattError
from data_pipeline.ray_address import ray_address
from data_pipeline.ray_head import RayHead
from data_pipeline.signals import own_sigterm
from data_pipeline.storage import check_access, one_line

# Read by the processes Ray starts. One Polars thread a task: Ray runs as many tasks as there are CPUs.
ENVIRONMENT = {
    "POLARS_MAX_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",  # many arenas of glibc keep memory of threads that are done with it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
RAY_POSTSCRIPT = "\nFailed to apply UDF transform"  # Ray Data appends advice to the message of every exception
CONTEXT = {
    "enable_progress_bars": False,
    "raise_original_map_exception": True,  # Ray Data's own wrapper loses what it wraps on the way here
    "target_max_block_size": 64 << 20,  # a text file is read in one task but leaves it in bounded blocks
}
LOGGERS = ("ray.data", "ray._private.worker")  # both report errors of tasks
STORE_BYTES = 3 << 26  # of the object store for each CPU, unless told otherwise; what does not fit is spilled to disk
LEAST_STORE_BYTES = 3 << 27
STORE_SHARE = 0.3  # of the machine's memory, at most
CPUS_PER_SPILLER = 4  # Ray's default is four processes that spill and four that read back, on a laptop too
WARM_SECONDS = 0.2
READER = "blocks of Ray Data"  # the thread that waits for them
TASKS_AHEAD = 2  # one that runs, and one whose arguments are fetched meanwhile
SPILL_DIRECTORY = "RAY_object_spilling_directory"  # Ray's own variable, set by whoever starts this
STALL_SECONDS = 1800.0  # no task of a stage ended for so long: something hangs
CANCEL_SECONDS = 10.0  # that Ray gets to end the workers of cancelled tasks


@contextmanager
def local_ray(
    num_cpus: int | None, object_store_bytes: int | None = None, paths: Sequence[str] = (), warm: bool = True
) -> Iterator[float]:
    """Ray, quiet, for the time of the block; yields the seconds its start took.

    paths: whose libraries are loaded by the workers that `warm` has started ahead.

    One that runs already is used as it is, whatever `num_cpus`, and stays; inside a Ray job that is the job's cluster
    (RAY_ADDRESS).

    Raises
    ------
    GenattError
        Ray cannot start.
    """
    context, loggers = DataContext.get_current(), [logging.getLogger(name) for name in LOGGERS]
    before = {name: getattr(context, name) for name in CONTEXT}
    preserve_order = context.execution_options.preserve_order
    levels, printed = [logger.level for logger in loggers], ray_worker.print_to_stdstream
    ours, began, head = not ray.is_initialized(), time.perf_counter(), None
    try:
        if ours:
            # Not public, but what the raylet has to say (tracebacks of it, pages of its log) goes to stdout otherwise.
            ray_worker.print_to_stdstream = lambda *_, **__: None
            head = _start(num_cpus, object_store_bytes)
        for name, value in CONTEXT.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = True  # ties of time are broken by the order of the source
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)  # an error is reported once, by us
        if ours and warm:
            _warm_up(paths)
        yield time.perf_counter() - began if ours else 0.0
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = preserve_order
        if ours:
            _end_executors()
            ray.shutdown()
            if head:
                head.end()
            ray_worker.print_to_stdstream = printed
        for thread in threading.enumerate():
            if thread.name == READER:  # of a stage that did not end: it has something to say, which nobody should hear
                thread.join(CANCEL_SECONDS)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _end_executors() -> None:
    """Ends the threads that schedule for Ray Data: one that asks about a task while Ray ends aborts this process."""
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread._shutdown = True  # not public; its own `shutdown` goes on after two seconds, ended or not
            thread.join(CANCEL_SECONDS)


def store_bytes(num_cpus: int | None) -> int:
    """Memory of the object store of a Ray with so many CPUs (None: the machine's)."""
    wanted = max(LEAST_STORE_BYTES, STORE_BYTES * (num_cpus or cpus()))
    return min(wanted, int(STORE_SHARE * psutil.virtual_memory().total))


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(num_cpus: int | None, object_store_bytes: int | None) -> RayHead | None:
    """Connect to the cluster of RAY_ADDRESS, or to a Ray that is started here, which is returned."""
    cluster, head = ray_address(), None
    if not cluster:
        own = {
            "num_cpus": num_cpus,
            "object_store_memory": object_store_bytes or store_bytes(num_cpus),
            "include_dashboard": False,
            "_system_config": {
                "max_io_workers": max(1, (num_cpus or cpus()) // CPUS_PER_SPILLER),
                "prestart_worker_first_driver": False,  # that one asks for none
            },
        }
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as Ray sets it where it starts a cluster in this process
        Config.initialize("")  # not public: reads that variable again
        head = RayHead(own, os.environ | ENVIRONMENT)
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        with own_sigterm():
            ray.init(
                address=head.address if head else cluster,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": ENVIRONMENT} if cluster else None,
            )
    except BaseException as error:
        if head:
            head.end()
        if not isinstance(error, Exception):  # ray raises half a dozen kinds of these
            raise
        raise GenattError(
            f"cannot connect to Ray at {head.address if head else cluster}: {one_line(error)}: see whether it runs"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return head


def _warm_up(paths: Sequence[str]) -> None:
    """Starts a worker for each CPU and Ray Data's own actors, so that their imports are not the first stage's time.

    The libraries that the stores of `paths` need are imported too, and their clients made.
    """
    count = max(1, int(ray.cluster_resources().get("CPU", 1)))

    def load(batch: pa.Table) -> pa.Table:
        import data_pipeline.tasks  # noqa: F401

        for path in paths:
            check_access(path)
        time.sleep(WARM_SECONDS)  # no worker takes two
        return batch

    list(outputs(numbered("n", count).map_batches(load, batch_format="pyarrow", batch_size=None), "start"))


def numbered(column: str, count: int) -> Dataset:
    """The numbers 0 to `count` - 1 in `column`, a block each: the tasks to do."""
    return ray.data.from_items([{column: number} for number in range(count)], override_num_blocks=count)


def outputs(dataset: Dataset, stage: str) -> Iterator[tuple[ray.ObjectRef, int, int]]:
    """Runs `dataset` and yields each block it makes, in order, with its rows and bytes, as soon as it is there.

    Raises
    ------
    GenattError
        The one a task raised, or one that names `stage` for any other failure; or no block came in `STALL_SECONDS`.
    """
    bundles: queue.SimpleQueue[Any] = queue.SimpleQueue()  # of references: they are small
    end, stop = object(), threading.Event()

    def read() -> None:  # the iterator knows no time limit
        try:
            for bundle in dataset.iter_internal_ref_bundles():
                bundles.put(bundle)
                if stop.is_set():
                    return
            bundles.put(end)
        except Exception as error:
            bundles.put(error)

    threading.Thread(target=read, name=READER, daemon=True).start()
    try:
        while True:
            try:
                bundle = bundles.get(timeout=STALL_SECONDS)
            except queue.Empty:
                raise GenattError(
                    f"stage {stage}: no block came within {STALL_SECONDS:.0f} s: see whether the Ray cluster has free "
                    "CPUs"
                ) from None
            if bundle is end:
                return
            if isinstance(bundle, Exception):
                raise _plain(bundle, stage) from bundle
            for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
                yield ref, metadata.num_rows or 0, metadata.size_bytes or 0
    finally:
        stop.set()


def run(
    start: Callable[[int], ray.ObjectRef], count: int, stage: str, ahead: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Starts tasks 0 to `count` - 1 and yields the number and value of each as it ends.

    Only `ahead` of them (by default `TASKS_AHEAD` for each CPU) are started and not ended: Ray fetches the arguments of
    waiting tasks, and with a store smaller than all of them it would read back from disk what it has to drop again.

    When one fails, or the caller stops, the workers of the others are ended: none writes anything afterwards. A worker
    asked to stop by itself would do so only when the call into a library it is in has returned.

    Raises
    ------
    GenattError
        As `outputs`; or none ended within `STALL_SECONDS`.
    """
    limit = ahead or TASKS_AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: dict[ray.ObjectRef, int] = {}
    started = 0
    try:
        while pending or started < count:
            while started < count and len(pending) < limit:
                pending[start(started)] = started
                started += 1
            ended, _ = ray.wait(list(pending), num_returns=1, timeout=STALL_SECONDS, fetch_local=False)
            if not ended:
                raise GenattError(
                    f"stage {stage}: none of {len(pending)} tasks ended within {STALL_SECONDS:.0f} s: "
                    "see Ray's own logs, then try again"
                )
            number = pending.pop(ended[0])
            yield number, value_of(ended.pop(), stage)
    finally:
        if pending:
            for ref in pending:
                ray.cancel(ref, force=True)
            ray.wait(list(pending), num_returns=len(pending), timeout=CANCEL_SECONDS, fetch_local=False)


def results(refs: Sequence[ray.ObjectRef], stage: str) -> Iterator[tuple[int, Any]]:
    """`run` of tasks that have been started: place and value of each of `refs`, as they come."""
    return run(refs.__getitem__, len(refs), stage, ahead=max(1, len(refs)))


def value_of(ref: ray.ObjectRef | None, stage: str) -> Any:
    """What a task returned; `GenattError` as `outputs`, and where it does not come within `STALL_SECONDS`."""
    try:
        return ray.get(ref, timeout=STALL_SECONDS)
    except Exception as error:
        raise _plain(error, stage) from error


def _plain(error: Exception, stage: str) -> GenattError:
    root = _root(error)
    said = " ".join(str(root).partition(RAY_POSTSCRIPT)[0].split())
    if type(root) is GenattError:
        return GenattError(said)
    if isinstance(root, OutOfDiskError | ObjectStoreFullError):
        return GenattError(
            f"stage {stage}: Ray's object store is full, and so is the disk of {_spill_directory()} that it spills to "
            f"(Ray stops at 95%): free some of it, name a directory on another disk in {SPILL_DIRECTORY}, or raise "
            "--object-store-bytes"
        )
    if isinstance(root, OutOfMemoryError | WorkerCrashedError):
        return GenattError(
            f"stage {stage}: the worker of a task was killed each time it was tried (out of memory?): free memory, or "
            "take smaller tasks (--rows-per-block, --num-shards), or fewer at once (--num-cpus)"
        )
    said = f"{type(root).__name__}: {said[:500]}"
    return GenattError(f"stage {stage} failed in Ray: {said}: see Ray's own logs, then try again")


def _spill_directory() -> str:
    node = ray_worker._global_node
    own = node and os.path.dirname(node.get_session_dir_path())
    return os.environ.get(SPILL_DIRECTORY) or own or "Ray's session"


def _root(error: BaseException) -> BaseException:
    """What a task raised, out of Ray's wrappers. One of these is itself a subclass of it, so the exact type counts."""
    while type(error) is not GenattError and isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    return error
