"""A quiet Ray for one preparation: started here unless there is one, and errors of its tasks made plain."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data
from ray.data import DataContext, Dataset

from data_pipeline.errors import GenattError
from data_pipeline.storage import one_line

# Read by the processes Ray starts. One Polars thread a task: Ray runs as many tasks as there are CPUs.
ENVIRONMENT = {
    "POLARS_MAX_THREADS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
RAY_POSTSCRIPT = "\nFailed to apply UDF transform"  # Ray Data appends advice to the message of every exception
CONTEXT = {
    "enable_progress_bars": False,
    "raise_original_map_exception": True,  # Ray Data's own wrapper loses what it wraps on the way here
    "target_max_block_size": None,  # a shard stays one block, however large
}


@contextmanager
def local_ray(num_cpus: int | None) -> Iterator[None]:
    """Ray, quiet, for the time of the block. One that runs already is used as it is, whatever `num_cpus`, and stays.

    Raises
    ------
    GenattError
        Ray cannot start.
    """
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    before = {name: getattr(context, name) for name in CONTEXT}
    level = logger.level
    ours = not ray.is_initialized()
    try:
        if ours:
            _start(num_cpus)
        for name, value in CONTEXT.items():
            setattr(context, name, value)
        logger.setLevel(logging.CRITICAL)  # an error is reported once, by us
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        logger.setLevel(level)
        if ours:
            ray.shutdown()


def _start(num_cpus: int | None) -> None:
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # ray raises half a dozen kinds here
        raise GenattError(
            f"Ray cannot start: {one_line(error)}: end other Ray processes or free memory and disk, then try again"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def outputs(dataset: Dataset, stage: str) -> Iterator[tuple[ray.ObjectRef, int]]:
    """Runs `dataset` and yields each block it makes, with its number of rows, as soon as it is there.

    Raises
    ------
    GenattError
        The one a task raised, or one that names `stage` for any other failure.
    """
    try:
        for bundle in dataset.iter_internal_ref_bundles():
            for ref, metadata in zip(bundle.block_refs, bundle.metadata, strict=True):
                yield ref, metadata.num_rows or 0
    except Exception as error:
        root = _root(error)
        said = " ".join(str(root).partition(RAY_POSTSCRIPT)[0].split())
        if type(root) is GenattError:
            raise GenattError(said) from None
        said = f"{type(root).__name__}: {said[:500]}"
        raise GenattError(f"stage {stage} failed in Ray: {said}: see Ray's own logs, then try again") from error


def numbered(column: str, count: int) -> Dataset:
    """The numbers 0 to `count` - 1 in `column`, a block each: the tasks to do."""
    return ray.data.from_items([{column: number} for number in range(count)], override_num_blocks=count)


def _root(error: BaseException) -> BaseException:
    """What a task raised, out of Ray's wrappers. One of these is itself a subclass of it, so the exact type counts."""
    while type(error) is not GenattError and isinstance(inner := getattr(error, "cause", None), BaseException):
        error = inner
    return error
