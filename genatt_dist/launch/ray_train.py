"""A run under Ray Train: the same training function in each of its workers, started again where one is lost.

Ray Train places the ranks, makes their process group and starts them again after a failure, on as many nodes as there
are (`ray.min_workers`); a run goes on from its own checkpoints, which fit any number of ranks, so none is given to Ray.
What it does not do is stop in order: see `ray_control` for what driver and ranks say to each other.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import GenattError, ResumableError
from data_pipeline.redaction import redact
from data_pipeline.storage import write_bytes
from genatt_dist import config as configuration
from genatt_dist import run_storage
from genatt_dist.config import RunConfig
from genatt_dist.embedding.feature_options import ContextFeature
from genatt_dist.launch.ending import FAILED

if TYPE_CHECKING:
    from genatt_dist.launch.ray_control import News

ROOM_SECONDS = 900.0  # without a single rank at work: an autoscaler brings up a machine in less
_GRACE_SECONDS = 20.0  # beyond `training.stop_seconds`: until Ray Train has noticed that the ranks ended
_LOOK_SECONDS = 0.5
_RESIZE_SECONDS = 300.0  # between looks whether there is room for more ranks: a new start costs a good part of a minute
_SUMMARY, _STOPPED, _CONFIG = "summary.json", "stopped.json", "config.yaml"


def fit(config: RunConfig, run: Path, resume: bool | None = None, storage: str | None = None) -> dict[str, Any]:
    """Train `config` in workers of Ray Train, and return what `summary.json` holds.

    run: the directory of its results here, which all nodes see, unless `storage`, a URL, is where the run lies: then
    its files are brought here at the end. resume: whether there has to be a checkpoint to go on from (True), none
    (False), or either. The cluster is RAY_ADDRESS's, or the one this process is connected to, or one of this run's own.

    Raises ResumableError where it was stopped, ranks were lost too often, or the cluster has no room; else GenattError.
    """
    from data_pipeline.local_ray import cpus, local_ray

    config = run_storage.stored_at(config, storage) if storage else config
    run = run.absolute()
    run.mkdir(parents=True, exist_ok=True)
    _check_checkpoints(config, run, resume)
    for name in (_STOPPED, FAILED, _SUMMARY):
        (run / name).unlink(missing_ok=True)
        if storage:
            run_storage.remove(storage, name)
    if storage:
        write_bytes(f"{storage.rstrip('/')}/{_CONFIG}", configuration.dump(config).encode())
    config = _absolute(config)
    # Ray Data reads in processes of its own, beside the ranks.
    own = math.ceil(config.world_size * config.ray.cpus_per_worker) + (config.data.feed == "ray")
    try:
        with local_ray(max(cpus(), own), warm=False), _signals() as received:
            without: set[str] = set()
            while drained := _attempt(config, run, storage, without, received):
                without |= drained
    except BaseException:
        if storage:
            with suppress(GenattError):  # what failed is the news
                run_storage.fetch(storage, run)
        raise
    if storage:
        run_storage.fetch(storage, run)
    summary: dict[str, Any] = json.loads((run / _SUMMARY).read_text())
    return summary


def _attempt(config: RunConfig, run: Path, storage: str | None, without: set[str], received: list[int]) -> set[str]:
    """Train to the end. Returns nothing, or the ids of nodes that Ray takes away, where others have room to go on.

    without: ids of nodes to count no more.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from genatt_dist.launch.ray_control import Control
    from genatt_dist.launch.ray_room import room

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Control).options(num_cpus=0, scheduling_strategy=here, max_concurrency=config.world_size + 100)
    control = actor.remote()
    try:
        with tempfile.TemporaryDirectory(prefix="genatt-ray-") as scratch:
            failure, drained = _follow(_trainer(config, run, storage, control, scratch), control, config, received)
        if failure is None:
            return set()
        failure = _plain(failure, config)
        if drained and isinstance(failure, ResumableError) and not received:
            gone = without | set(drained)
            if (number := room(config, gone)) >= (config.ray.min_workers or config.world_size):
                _say(f"{failure}: going on with up to {min(number, config.world_size)} ranks elsewhere")
                return gone
        raise failure
    finally:
        ray.kill(control)  # a rank that trains all the same stops then


def _trainer(config: RunConfig, run: Path, storage: str | None, control: Any, scratch: str) -> Any:
    """Ray Train's trainer of this run. scratch: where it may keep files of its own."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from genatt_dist.launch.ray_control import SaveFirst, Verdict
    from genatt_dist.launch.ray_room import environment_of_rank, resources_of_rank
    from genatt_dist.launch.ray_worker import Task, rank_loop

    options, resources = config.ray, resources_of_rank(config)
    least = options.min_workers
    elastic = least is not None and least < config.world_size
    task = Task(configuration.dump(config), str(run), storage, control)
    datasets = _datasets(config) if config.data.feed == "ray" else {}
    return TorchTrainer(
        rank_loop,
        train_loop_config={"task": task},
        torch_config=TorchConfig(timeout_s=math.ceil(config.training.collective_seconds)),
        scaling_config=ScalingConfig(
            num_workers=(least, config.world_size) if elastic else config.world_size,
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=resources,
            placement_strategy=options.placement,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        ),
        run_config=TrainConfig(
            name=run.name,
            storage_path=scratch,  # nothing is reported to Ray Train: checkpoints and results are our own
            failure_config=FailureConfig(max_failures=options.max_failures),
            callbacks=[Verdict(control, options.max_failures), SaveFirst(control, _stop_seconds(config))],
            worker_runtime_env={"env_vars": environment_of_rank(config, resources)},
            logging_config=LoggingConfig(log_level="CRITICAL"),
        ),
        **datasets,
    )


def _datasets(config: RunConfig) -> dict[str, Any]:
    """What gives Ray Train the windows of the shards."""
    from ray.data import DataContext

    from genatt_dist.data.ray_dataset import every_row, ray_dataset

    DataContext.get_current().execution_options.preserve_order = False  # the order is Ray's own, so it need not wait
    timed = any(isinstance(feature, ContextFeature) for feature in config.features)
    return {"datasets": {"train": ray_dataset(config.data.path, config.data, timed)}, "dataset_config": every_row()}


def _follow(
    trainer: Any, control: Any, config: RunConfig, received: list[int]
) -> tuple[BaseException | None, tuple[str, ...]]:
    """Run `trainer` to its end, tell what the ranks say, and pass on the wish to stop. Returns what failed, and the
    nodes that Ray takes away.
    """
    from ray.exceptions import RayError

    from genatt_dist.launch.ray_control import News, ask

    failures: list[BaseException] = []

    def run() -> None:  # in a thread: Ray's own handling of signals ends the ranks without a checkpoint
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="ray train", daemon=True)
    thread.start()
    news, stop_by, idle_since = News((), 0, None), None, time.monotonic()
    while True:
        thread.join(_LOOK_SECONDS)
        alive = thread.is_alive()
        with suppress(RayError):
            news = ask(control.news.remote())
            _tell(news)
        now = time.monotonic()
        if not alive:
            return (failures[0] if failures else None), news.drained[1] if news.drained else ()
        idle_since = now if news.ranks else idle_since
        if now - idle_since > ROOM_SECONDS:
            raise _no_room(config)
        if received:  # each time: ranks that a resize had stopped are let go on
            with suppress(RayError):
                ask(control.stop.remote(signal.Signals(received[0]).name))
            stop_by = stop_by or now + _stop_seconds(config)
        if stop_by and (now > stop_by or received.count(signal.SIGINT) > 1):
            raise ResumableError(
                f"{signal.Signals(received[0]).name}: the ranks did not end in time; the same command with --resume "
                "goes on from the newest checkpoint"
            )


def _tell(news: News) -> None:
    for line in news.lines:
        _say(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plain(failure: BaseException, config: RunConfig) -> BaseException:
    """What fit raised, as the user should read it; a bug keeps what Ray Train says of it."""
    from ray.train import TrainingFailedError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from genatt_dist.launch.ray_control import describe

    inner = getattr(failure, "cause", failure)
    if isinstance(inner, ControllerError):
        cause = inner.controller_failure
        if isinstance(cause, GenattError):
            return type(cause)(str(cause))
        return GenattError(f"Ray Train failed: {' '.join(str(cause).split())[:300]}: see Ray's own logs")
    if isinstance(inner, WorkerGroupError):
        errors = inner.worker_failures
        said = describe(errors, {})
        if said.endswith(" lost") or any(isinstance(error, ResumableError) for error in errors.values()):
            return ResumableError(
                f"{said}, and ray.max_failures={config.ray.max_failures} new starts are used up: the same command with "
                "--resume goes on"
            )
    if isinstance(inner, TrainingFailedError):
        return inner
    return failure


def _no_room(config: RunConfig) -> ResumableError:
    from genatt_dist.launch.ray_room import resources_of_rank, room

    least = config.ray.min_workers or config.world_size
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in resources_of_rank(config).items())
    return ResumableError(
        f"no rank could start for {ROOM_SECONDS:.0f} s: {least} with {wanted} each are wanted, and the Ray cluster has "
        f"room for {room(config, set())}: add nodes, or lower world_size, ray.min_workers or ray.cpus_per_worker"
    )


def _stop_seconds(config: RunConfig) -> float:
    return config.training.stop_seconds + _GRACE_SECONDS


def _absolute(config: RunConfig) -> RunConfig:
    """Local paths in full: a worker has a working directory of its own."""
    tree = config.model_dump(mode="json")
    for section, key in ((tree["data"], "path"), (tree["training"]["checkpoint"], "path")):
        if section[key] is not None and not run_storage.is_url(section[key]):
            section[key] = os.path.abspath(section[key])
    return configuration.parse(tree, "of the run")


def _check_checkpoints(config: RunConfig, run: Path, resume: bool | None) -> None:
    from genatt_dist.training.checkpoint.store import Store

    store = Store.of(run, config.training.checkpoint)
    if resume is True:
        store.newest()
    elif resume is False and store.contents():
        raise GenattError(
            f"{redact(store.root)} holds checkpoints already: choose another --run, or go on with that run by --resume"
        )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT as they come, instead of what they would do: the ranks stop first."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may ask for signals
        yield received
        return
    watched = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in watched]
    try:
        yield received
    finally:
        for number, handler in zip(watched, before, strict=True):
            signal.signal(number, handler)
