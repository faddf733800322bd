"""The loop of one training run on one rank: what it owns, its epochs and updates, and when it ends.

Global batches → joint step → (each epoch) full-ranking validation → checkpoint → stop early or go on.

A request to stop (preemption.py) is agreed upon after an update or a batch of the validation. Then the run writes a
checkpoint and raises StoppedError on all ranks. Resumed, it is the run that never stopped, its log included: losses of
updates between two records are in the checkpoint, and a validation that was begun is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist

from genatt_dist.config import RunConfig
from genatt_dist.data.batches import Batch, TrainingBatches
from genatt_dist.data.sequences import Sequences
from genatt_dist.embedding.collisions import collisions
from genatt_dist.training import preemption, resuming
from genatt_dist.training.checkpoint.progress import Progress
from genatt_dist.training.checkpoint.store import Store
from genatt_dist.training.checkpointing import Checkpointing
from genatt_dist.training.engine import sum_over_ranks
from genatt_dist.training.learner import Learner
from genatt_dist.training.mark import Mark
from genatt_dist.training.saving import Saver
from genatt_dist.training.schedule import gamma_factor, rate_factor
from genatt_dist.training.signs import END
from genatt_dist.training.step import Losses
from genatt_dist.training.stopping import Agreement
from genatt_dist.training.summary import Summary
from genatt_dist.training.telemetry import Telemetry, write_environment
from genatt_dist.training.update_log import UpdateLog
from genatt_dist.training.validation import AbandonedError, Validation

_FEW_SEQUENCES = 8  # of a rank, below which its step is mostly overhead


class Feed(Protocol):
    """What gives a rank its parts of the global batches of an epoch: `TrainingBatches`, or Ray Data's."""

    def iterate(
        self, epoch: int, first_batch: int, rank: int, world_size: int, device: torch.device
    ) -> Iterator[Batch]: ...


class Trainer:
    """One rank of one run. batches: the plan of its epochs. learner: what its updates change."""

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
        self._sequences = sequences = Sequences.read(
            config.data.path, prefetch_bytes=config.data.prefetch_bytes, features=config.features
        )
        self.batches = TrainingBatches.plan(sequences, config.data, config.training)
        self._feed: Feed = feed(self.batches) if feed else self.batches
        self.learner = learner = Learner(config, sequences, device)
        self._mark, self._agreement = mark or Mark(), Agreement(group)
        self._mark.section = lambda: learner.performance.timer.current

        manifest, path = sequences.manifest, config.data.path
        self._progress = Progress(sequences.manifest_hash, vocabulary_hash=manifest.vocabulary.sha256)
        shared_rows = collisions(path, manifest) if self._rank == 0 else None
        self._notes = [str(shared_rows)] if shared_rows else []
        batch, ranks = config.training.batch_sequences, self._world_size
        if ranks > 2 and batch < _FEW_SEQUENCES * ranks:
            self._notes.append(
                f"training.batch_sequences={batch} is the global batch, {batch / ranks:.1f} for each of {ranks} ranks: "
                "raise it"
            )
        store = Store.of(run, config.training.checkpoint)
        if resume:
            source = resuming.newest(store, group)
            found = resuming.resume(source, config, sequences, learner.engine, learner.sharded)
            self._progress = found.progress
            self._notes += [f"goes on from the checkpoint of step {self._progress.step}", *found.notes]
        saver = Saver(store, config, learner.engine, learner.sharded, device, group)
        self._checkpointing = Checkpointing(run, saver, self._mark, group, self._progress.step if resume else None)
        begun, left = self._progress.begun_step, config.training.epochs - self._progress.begun_epoch
        self._total_steps = begun + left * self.batches.num_batches // config.training.accumulation_steps

    def run(self) -> Summary:
        """All epochs that are left."""
        config, progress, total, rank = self._config, self._progress, self._total_steps, self._rank
        name = config.model.attention.type
        with Telemetry(self._run, name, total, rank == 0, progress.step) as telemetry, self._checkpointing.saver:
            if rank == 0:
                write_environment(self._run, self._device)
            for note in self._notes:
                telemetry.say(f"note: {note}")
            performance = self.learner.performance
            self._telemetry = telemetry
            self._log = UpdateLog(self._run, telemetry, performance, config.training.learning_rate, progress)
            self._validation = Validation(
                config, self._sequences, self.learner, self._device, self._mark, self._agreement, telemetry, total
            )
            self._started = time.perf_counter() - progress.seconds
            # An epoch that was begun is ended, as it would have been without the stop, and none ends unevaluated.
            last = progress.batch == 0 and progress.best_step >= 0 and self._finished()
            while not last:
                self._train_epoch()
                progress.epoch, progress.batch = progress.epoch + 1, 0
                last = self._end_epoch()
            self._agreement.close()
            self._checkpointing.wait()
            self._mark.at(END)
            measured = performance.summary(sum_over_ranks)
            telemetry.finish(progress.step, measured)
        summary = Summary.of(config, progress, self._launcher, self._world_size, measured)
        if rank == 0:
            summary.write(self._run)
        return summary

    def _finished(self) -> bool:
        """Whether epochs, patience or time have run out; rank 0's clock decides for all. Collective."""
        if self._progress.epoch >= self._config.training.epochs:
            return True
        limit = self._config.training.max_seconds
        late = torch.tensor(float(limit is not None and self._progress.seconds >= limit), device=self._device)
        dist.broadcast(late, 0)
        return self._progress.stale >= self._config.training.patience or bool(late)

    def _train_epoch(self) -> None:
        training, progress, mark, log = self._config.training, self._progress, self._mark, self._log
        self.learner.set_training()
        part: list[Batch] = []
        rate = rate_factor(training, max(0, progress.step - 1), self._total_steps)
        log.start()
        over = progress.batch == self.batches.num_batches  # a run that was stopped then, and only its end is left
        where = (progress.epoch, progress.batch, self._rank, self._world_size, self._device)
        batches = self.learner.performance.timer.waiting(iter(()) if over else self._feed.iterate(*where))

        mark.epoch, mark.step = progress.epoch, progress.step + 1
        mark.at(None)
        for batch in batches:
            part.append(batch)
            if len(part) < training.accumulation_steps:
                continue
            rate = rate_factor(training, progress.step, self._total_steps)
            losses = self.update(part, rate)
            progress.step += 1
            log.add(losses, part, progress)
            progress.batch += len(part)
            progress.sequences += sum(one.num_sequences for one in part)
            progress.metric = None
            part = []
            self._checkpointing.saver.check()
            self._telemetry.advance(progress.step)
            # At an epoch's end `_end_epoch` saves, after validation if there is one.
            save = self._is_due() and progress.batch < self.batches.num_batches
            if save or log.is_full:
                log.tell(progress, rate)
            if self._agreement.reached():
                self._stop()
            if save:
                self._save()
                mark.at(None)
                log.start()
            mark.step = progress.step + 1
        mark.step = progress.step
        if not log.is_empty:
            log.tell(progress, rate)

    def update(self, batches: list[Batch], rate: float) -> Losses:
        """One update of table and dense parameters at `rate` of their peak learning rates."""
        generative, step = self._config.model.generative, self._progress.step
        gamma = 0.0
        if generative is not None:
            gamma = generative.gamma * gamma_factor(generative.gamma_warmup, step, self._total_steps)
        return self.learner.update(batches, step, rate, gamma)

    def _end_epoch(self) -> bool:
        """Validate and save where that is due. Returns whether training ends, which patience decides only after the
        validation.
        """
        progress, training = self._progress, self._config.training
        for line in self.learner.performance.slow_ranks(sum_over_ranks):
            self._telemetry.say(f"note: {line}")
        self._set_seconds()
        last = self._finished()
        if last or progress.epoch % training.evaluate_every == 0:
            try:
                found = self._validation.rank(progress)
            except AbandonedError:
                progress.epoch, progress.batch = progress.epoch - 1, self.batches.num_batches
                self._stop()
            self._set_seconds()
            last = self._finished()
            self._validation.tell(found, progress, last)
            self._save()
        elif self._is_due():
            self._save()
        return last

    def _is_due(self) -> bool:
        """Whether this update is one to save after."""
        every = self._config.training.checkpoint_every
        return every is not None and self._progress.step % every == 0

    def _save(self) -> None:
        self._set_seconds()
        self._checkpointing.save(self._progress, self._log)

    def _stop(self) -> NoReturn:
        """End with a checkpoint, as all ranks have agreed to. Ray's order is its own: there is none inside an epoch."""
        reason = self._agreement.reason()
        preemption.request(reason)  # a rank that was not asked itself has a deadline too, from now on
        goes_on = self._config.data.feed != "ray" or self._progress.batch == self.batches.num_batches
        self._set_seconds()
        self._checkpointing.stop(self._progress, self._log, reason, save=goes_on)

    def _set_seconds(self) -> None:
        self._progress.seconds = time.perf_counter() - self._started
