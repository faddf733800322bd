"""One training run on one rank, from its run directory to its best checkpoint. Every launcher calls `train`.

The loop: global batches → joint step → (each epoch) full-ranking validation → checkpoint → stop early or go on.

A request to stop (training/preemption.py) is agreed upon after an update or a batch of the validation. Then the run
writes a checkpoint and raises StoppedError on all ranks. Resumed, it is the run that never stopped, its log included:
losses of updates between two records are in the checkpoint, and a validation that was begun is done again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import torch
import torch.distributed as dist

from genatt_dist import run_storage
from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.collisions import collisions
from genatt_dist.embedding.features import sharded_specs, with_features
from genatt_dist.embedding.table import ItemTable
from genatt_dist.evaluation.diagnose import diagnose
from genatt_dist.evaluation.evaluate import Parts, Result, evaluate
from genatt_dist.loss.objective import Candidature
from genatt_dist.training import preemption
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.engine import Engine, init_process_group, select_device, sum_over_ranks
from genatt_dist.training.mark import Mark
from genatt_dist.training.nonfinite import NotFiniteError, Trail
from genatt_dist.training.performance import Performance
from genatt_dist.training.resuming import resume as resumed
from genatt_dist.training.saving import WRITE_SECONDS, Saver
from genatt_dist.training.schedule import gamma_factor, rate_factor
from genatt_dist.training.signs import CHECKPOINT, END, VALIDATION, Limits
from genatt_dist.training.step import DenseModel, JointStep, Losses
from genatt_dist.training.stopped import STOPPED, StoppedError, advice, write_stopped
from genatt_dist.training.stopping import Agreement, control_group
from genatt_dist.training.telemetry import Telemetry, write_environment
from genatt_dist.training.warnings import FailureSigns
from genatt_dist.training.watchdog import Watchdog, watched

SELECTION = "ndcg@10"
_LOG_STEPS = 10


@dataclass(frozen=True)
class Summary:
    """What a finished run reports: the best validation metrics, how the training went, and how fast its steps were."""

    valid: dict[str, float]
    train: dict[str, float | int | str]
    performance: dict[str, Any]


class Feed(Protocol):
    """What gives a rank its parts of the global batches of an epoch: `TrainingBatches`, or Ray Data's."""

    def iterate(
        self, epoch: int, first_batch: int, rank: int, world_size: int, device: torch.device
    ) -> Iterator[Batch]: ...


def train(
    config: RunConfig,
    run: Path,
    launcher: str,
    resume: bool = False,
    feed: Callable[[TrainingBatches], Feed] | None = None,
) -> Summary:
    """Train `config` into the directory `run`; the process group's variables are in the environment.

    feed: makes of the plan what feeds the ranks; default: the plan itself, which reads the shards.
    Raises GenattError with one line for the user, a ResumableError where the run can go on, on all ranks. Writes
    `summary.json` when done, `stopped.json` when stopped. A rank that is lost or hangs ends the process (watchdog.py).
    """
    training, device = config.training, select_device()
    limits = Limits.of(training.silence_seconds, training.collective_seconds, WRITE_SECONDS)
    init_process_group(device, limits.longest + 2 * limits.silence)
    together = device.type == "cpu"
    try:
        rank, world_size, mark = dist.get_rank(), dist.get_world_size(), Mark()
        if rank == 0:
            (run / STOPPED).unlink(missing_ok=True)
        if config.table.kind == "sharded":  # loading its kernels holds Python's lock: no sign of life meanwhile
            import genatt_dist.embedding.sharded  # noqa: F401
        group, store = control_group(limits.longest + 2 * limits.silence), Store.of(run, training.checkpoint)
        watchdog = Watchdog(mark, run, store, limits, training.stop_seconds, rank, world_size)
        with preemption.serving(), watched(watchdog, group):
            summary = Trainer(run, config, device, launcher, resume, feed, mark, group).run()
        together = True
        return summary
    except StoppedError:
        together = True
        raise
    finally:
        if together:  # NCCL would wait, unwatched, for collectives that ranks elsewhere never join
            dist.destroy_process_group()


class _AbandonedError(Exception):
    """All ranks agreed to stop in the middle of a validation."""


class Trainer:
    """One rank of one run: what it owns, and the loop over epochs."""

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        device: torch.device,
        launcher: str,
        resume: bool,
        feed: Callable[[TrainingBatches], Feed] | None = None,
        mark: Mark | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """mark: where it tells what it is doing. group: of all ranks, for what is not training; None on one rank."""
        self._run, self._config, self._device, self._launcher = run, config, device, launcher
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._sequences = Sequences.read(
            config.data.path, prefetch_bytes=config.data.prefetch_bytes, features=config.features
        )
        feature_rows = self._sequences.features.num_rows
        self.batches = TrainingBatches.plan(self._sequences, config.data, config.training)
        self._feed: Feed = feed(self.batches) if feed else self.batches

        torch.manual_seed(config.training.seed)  # fresh dense weights; all later draws are keyed
        self._engine = Engine(DenseModel(config, self._sequences.num_items, feature_rows), config.training)
        self._dense = cast(DenseModel, self._engine.module)
        self._sharded = None
        if config.table.kind == "sharded":
            from genatt_dist.embedding.sharded import ShardedTable

            self._sharded = ShardedTable(
                self._sequences.num_items,
                config.model.hidden_size,
                config.table,
                config.table_learning_rate,
                config.training.seed,
                device,
                sharded_specs(config, feature_rows),
            )
        dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self._performance = Performance(device, dtype, self._rank, self._world_size)
        self._mark, self._group, self._agreement = mark or Mark(), group, Agreement(group)
        self._mark.section = lambda: self._performance.timer.current
        self._step = JointStep(
            config,
            self._engine,
            Candidature(
                config.loss, self._sequences.num_items, torch.from_numpy(self._sequences.popularity[1:]), device
            ),
            self._sharded,
            self._world_size,
            sum_over_ranks,
            self._performance.timer,
        )
        self._store = store = Store.of(run, config.training.checkpoint)
        self._saver = Saver(store, config, self._engine, self._sharded, device, group)
        self._saved_step = -1
        self._progress = Progress(
            self._sequences.manifest_hash, vocabulary_hash=self._sequences.manifest.vocabulary.sha256
        )
        shared_rows = collisions(config.data.path, self._sequences.manifest) if self._rank == 0 else None
        self._notes = [str(shared_rows)] if shared_rows else []
        if resume:
            found = resumed(self._newest(), config, self._sequences, self._engine, self._sharded)
            self._progress, self._saved_step = found.progress, found.progress.step
            self._notes += found.notes
        begun, left = self._progress.begun_step, config.training.epochs - self._progress.begun_epoch
        self._total_steps = begun + left * self.batches.num_batches // config.training.accumulation_steps

    def _newest(self) -> Checkpoint:
        """The newest complete checkpoint that rank 0 sees: a shared file system may show others an older one for some
        seconds. Collective.
        """
        steps = [self._store.complete()[-1:] if self._rank == 0 else []]
        if self._world_size > 1:
            dist.broadcast_object_list(steps, 0, group=self._group)
        return self._store.at(steps[0][0]) if steps[0] else self._store.newest()

    @property
    def _table(self) -> ItemTable:
        table = self._sharded or self._dense.items
        assert table is not None
        return with_features(table, self._dense.features)

    def run(self) -> Summary:
        """All epochs that are left."""
        title = self._config.model.attention.type
        with (
            Telemetry(
                self._run, title, self._total_steps, active=self._rank == 0, first_step=self._progress.step
            ) as self._telemetry,
            self._saver,
        ):
            if self._rank == 0:
                write_environment(self._run, self._device)
            for note in self._notes:
                self._telemetry.say(f"note: {note}")
            self._signs = FailureSigns(self._config, self._total_steps, self._telemetry.records())
            self._started = time.perf_counter() - self._progress.seconds
            # An epoch that was begun is ended, as it would have been without the stop, and none ends unevaluated.
            last = self._progress.batch == 0 and self._progress.best_step >= 0 and self._finished()
            while not last:
                self._train_epoch()
                self._progress.epoch, self._progress.batch = self._progress.epoch + 1, 0
                self._progress.seconds = time.perf_counter() - self._started
                last = self._finished()
                if last or self._progress.epoch % self._config.training.evaluate_every == 0:
                    try:
                        last = self._validate()
                    except _AbandonedError:
                        self._progress.epoch, self._progress.batch = self._progress.epoch - 1, self.batches.num_batches
                        self._stop()
                    self._save()
                elif self._is_due():
                    self._save()
            self._agreement.close()
            self._mark.at(CHECKPOINT)  # the last one may be under way, and longer than another operation may last
            self._saver.wait()
            if self._group is not None:
                dist.barrier(self._group)
            self._mark.at(END)
            performance = self._performance.summary(sum_over_ranks)
            self._telemetry.finish(self._progress.step, performance)
        return self._summarise(performance)

    def _finished(self) -> bool:
        """Whether epochs, patience or time have run out; rank 0's clock decides for all. Collective."""
        if self._progress.epoch >= self._config.training.epochs:
            return True
        limit = self._config.training.max_seconds
        late = torch.tensor(float(limit is not None and self._progress.seconds >= limit), device=self._device)
        dist.broadcast(late, 0)
        return self._progress.stale >= self._config.training.patience or bool(late)

    def _train_epoch(self) -> None:
        training, progress, mark = self._config.training, self._progress, self._mark
        self.set_training()
        part: list[Batch] = []
        self._trail, progress.pending = Trail(self._run, progress.pending), []
        rate = rate_factor(training, max(0, progress.step - 1), self._total_steps)
        self._since = time.perf_counter()  # the first update began that the log has not told
        over = progress.batch == self.batches.num_batches  # a run that was stopped then, and only its end is left
        where = (progress.epoch, progress.batch, self._rank, self._world_size, self._device)
        batches = self._performance.timer.waiting(iter(()) if over else self._feed.iterate(*where))

        def log() -> None:
            speed: dict[str, float] = {}
            if self._trail.num_updates:
                seconds, speed = self._performance.interval(self._since)
                progress.step_seconds += seconds
            self._log(rate, speed)
            self._since = time.perf_counter()

        mark.epoch, mark.step = progress.epoch, progress.step + 1
        mark.at(None)
        for batch in batches:
            part.append(batch)
            if len(part) < training.accumulation_steps:
                continue
            rate = rate_factor(training, progress.step, self._total_steps)
            losses = self.update(part, rate)
            progress.step += 1
            self._trail.add(losses, part, progress.step, progress.epoch, progress.batch)
            progress.batch += len(part)
            progress.sequences += sum(one.num_sequences for one in part)
            progress.metric = None
            part = []
            self._saver.check()
            self._telemetry.advance(progress.step)
            # Every rank logs at the same steps: the losses are summed over ranks.
            # At an epoch's end `run` saves, after validation if there is one.
            save = self._is_due() and progress.batch < self.batches.num_batches
            if save or len(self._trail) == _LOG_STEPS:
                log()
            if self._agreement.reached():
                self._stop()
            if save:
                self._save()
                mark.at(None)
                self._since = time.perf_counter()
            mark.step = progress.step + 1
        mark.step = progress.step
        if len(self._trail):
            log()

    def set_training(self) -> None:
        """Dropout on, samples drawn as in training."""
        self._engine.train(True)

    def update(self, batches: list[Batch], rate: float) -> Losses:
        """One update of table and dense parameters at `rate` of their peak learning rates."""
        generative, step = self._config.model.generative, self._progress.step
        gamma = 0.0
        if generative is not None:
            gamma = generative.gamma * gamma_factor(generative.gamma_warmup, step, self._total_steps)
        if self._sharded:
            self._sharded.set_learning_rate(self._config.table_learning_rate * rate)
            self._sharded.set_updates(self._progress.step)
        self._engine.set_learning_rate(self._config.training.learning_rate * rate)
        with self._performance.step(batches):
            return self._step(batches, step, gamma)

    def _log(self, rate: float, speed: dict[str, float]) -> None:
        """Record the updates since the last record. speed: what `Performance.interval` measured of them.

        Raises GenattError when a loss is not finite.
        """
        recommendation, generative = torch.tensor(self._trail.losses()).mean(0).tolist()
        self._trail.clear()
        progress = self._progress
        self._telemetry.record(
            "train",
            progress.step,
            {
                "epoch": progress.epoch,
                "loss": recommendation,
                "generative_loss": generative,
                "learning_rate": self._config.training.learning_rate * rate,
                **speed,
            },
        )
        self._telemetry.advance(
            progress.step,
            f"epoch {progress.epoch + 1} loss {recommendation:.4f} {speed.get('sequences_per_second', 0.0):,.0f} "
            "sequences/s",
        )

    def _validate(self) -> bool:
        """Rank the validation targets, look at the maps, and tell both. Returns whether training ends with this, which
        patience decides only now. Raises _AbandonedError when the ranks agree to stop in it.
        """
        self._mark.at(VALIDATION)
        self._engine.train(False)
        parts = Parts(self._rank, self._world_size, sum_over_ranks)
        with self._engine.gathered():
            of = (self._dense.backbone, self._table, self._sequences, "valid", self._config, self._device, parts)
            result: Result = evaluate(*of, self._ranked)
            diagnosis = diagnose(*of)
        progress, metric = self._progress, result.metrics[SELECTION]
        metrics = result.metrics | diagnosis.values
        improved = metric > progress.best_metric
        progress.metric = metric
        if improved:
            progress.best_metric, progress.best_step, progress.best_metrics = metric, progress.step, metrics
        progress.stale = 0 if improved else progress.stale + 1
        progress.seconds = time.perf_counter() - self._started
        last = self._finished()
        record: dict[str, float | list[float]] = {"epoch": progress.epoch, **metrics, **diagnosis.vectors}
        self._telemetry.record("valid", progress.step, record)
        self._telemetry.say(
            f"{self._config.model.attention.type}: epoch {progress.epoch}/{self._config.training.epochs}  "
            f"valid {SELECTION} {metric:.4f}  recall@10 "
            f"{result.metrics['recall@10']:.4f}{'  best so far' if improved else ''}  "
            f"[{progress.seconds:.0f} s, {progress.sequences / max(progress.step_seconds, 1e-9):,.0f} sequences/s]"
        )
        for sign in self._signs.look({"step": progress.step, **record}, last):
            self._telemetry.warn(progress.step, sign)
        return last

    def _ranked(self, users: int) -> None:
        """After each batch of a validation; all ranks have the same number of them."""
        self._mark.at(VALIDATION)
        if self._agreement.reached():
            raise _AbandonedError

    def _stop(self) -> NoReturn:
        """Write a checkpoint where the cursor is, say so in the run directory, and raise StoppedError. Collective."""
        progress, reason = self._progress, self._agreement.reason()
        preemption.request(reason)  # a rank that was not asked itself has a deadline too, from now on
        inside = progress.batch < self.batches.num_batches
        if self._saved_step != progress.step and not (inside and self._config.data.feed == "ray"):
            progress.pending = self._trail.losses()
            if self._trail.num_updates:
                progress.step_seconds += time.perf_counter() - self._since
            self._save()
        self._saver.wait()
        newest = self._saved_step if self._saved_step >= 0 else None
        if self._rank == 0:
            write_stopped(self._run, reason, progress.step, progress.epoch, newest)
        if self._group is not None:
            dist.barrier(self._group)  # behind it the checkpoint is complete, and told, for all ranks
        raise StoppedError(
            f"stopped by {reason} after step {progress.step} (epoch {progress.epoch + 1}); {advice(newest)}"
        )

    def _is_due(self) -> bool:
        """Whether this update is one to save after."""
        every = self._config.training.checkpoint_every
        return every is not None and self._progress.step % every == 0

    def _save(self) -> None:
        """Write a checkpoint, or begin to. Collective. Raises GenattError, also where weights are not finite."""
        self._progress.seconds = time.perf_counter() - self._started
        self._mark.at(CHECKPOINT)
        if self._saved_step == self._progress.step:  # before a validation that was stopped, and done when resumed
            self._saver.amend(self._progress)
            return
        if self._rank == 0:
            run_storage.send(self._run)
        try:
            self._saver.save(self._progress)
        except NotFiniteError as error:
            raise self._trail.explain(error) from None
        self._saved_step = self._progress.step

    def _summarise(self, performance: dict[str, Any]) -> Summary:
        progress, config = self._progress, self._config
        summary = Summary(
            valid=progress.best_metrics,
            train={
                "seconds": round(progress.seconds, 1),
                "epochs": progress.epoch,
                "sequences_per_second": round(progress.sequences / max(progress.step_seconds, 1e-9), 1),
                "world_size": self._world_size,
                "launcher": self._launcher,
                "table": config.table.kind,
                "zero_stage": config.training.zero_stage,
            },
            performance=performance,
        )
        if self._rank == 0:
            temporary = self._run / f".summary.{os.getpid()}"
            temporary.write_text(json.dumps(asdict(summary), indent=2))
            temporary.rename(self._run / "summary.json")
        return summary
