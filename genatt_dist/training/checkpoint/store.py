"""Where a run's checkpoints lie, which of them are complete, and which are kept.

    step-00000120/
        dense.safetensors                fp32 parameters, buffers, optimizer moments by name (ZeRO's parts gathered)
        table-00000-00.safetensors …     what lay of the sharded tables on a rank: rows and their optimizer state
        tables.json                      of which table, and which rows and columns, each of those files is
        progress.json                    cursor, counters, early stopping, what data it belongs to (`Progress`);
                                         progress-amended.json where the validation after it was done by a resumed run
        config.yaml                      the run's configuration
        COMPLETE                         sha256 of every other file

Nothing in it depends on the number of ranks or the ZeRO stage that wrote it, and nothing read is a pickle. A directory
without COMPLETE is unfinished: it counts for nothing, and the next save removes it.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import GenattError
from data_pipeline.filesystems import explaining, filesystem
from data_pipeline.storage import redact
from genatt_dist.training.checkpoint.files import COMPLETE, is_local
from genatt_dist.training.checkpoint.read import Checkpoint
from genatt_dist.training.options import CheckpointConfig

_FOLDER = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})")


def step_of(directory: str) -> int:
    """The update that the directory of a checkpoint is called by."""
    return int(directory.removeprefix("step-"))


@dataclass(frozen=True)
class Store:
    """A directory of checkpoints, local or on any fsspec URL; `run` is named in errors."""

    root: str
    run: str

    @staticmethod
    def of(run: Path, config: CheckpointConfig) -> Store:
        """The run's: below its directory, or where the configuration says."""
        return Store((config.path or str(run / _FOLDER)).rstrip("/"), str(run))

    def path(self, step: int) -> str:
        """Where the checkpoint of update `step` lies."""
        return f"{self.root}/step-{step:08d}"

    def contents(self) -> dict[str, dict[str, int]]:
        """Sizes in bytes of the files of all checkpoints, finished or not, by directory and name. What has another name
        (a copy somebody made) is none.
        """
        fs, root = filesystem(self.root)
        root = root.rstrip("/")
        found: dict[str, dict[str, int]] = {}
        with explaining(self.root, "read"), suppress(FileNotFoundError):
            for path, info in fs.find(root, detail=True).items():
                directory, _, name = path.removeprefix(f"{root}/").partition("/")
                if _STEP.fullmatch(directory) and name:
                    found.setdefault(directory, {})[name] = int(info["size"] or 0)
        return found

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints, rising."""
        return sorted(step_of(directory) for directory, names in self.contents().items() if COMPLETE in names)

    def newest(self) -> Checkpoint:
        """The newest complete checkpoint. Raises GenattError when there is none."""
        if not (steps := self.complete()):
            raise GenattError(
                f"{self.run} holds no complete checkpoint"
                + (f" in {redact(self.root)}" if not self.root.startswith(self.run) else "")
                + ": start the run again in another directory"
            )
        return self.at(steps[-1])

    def best(self) -> Checkpoint:
        """The checkpoint with the best validation metric, as the newest one says; before any validation the newest."""
        latest = self.newest()
        step = latest.progress.best_step
        if step < 0:
            return latest
        if step not in self.complete():
            raise GenattError(
                f"{self.run}: its best checkpoint step-{step:08d} is missing; bring it back, or train again"
            )
        return self.at(step)

    def at(self, step: int) -> Checkpoint:
        """The complete checkpoint of a step. Raises GenattError where it is none, or a link to another place."""
        path = self.path(step)
        if is_local(path):
            place, root = (Path(filesystem(one)[1]).resolve() for one in (path, self.root))
            if place.parent != root:
                raise GenattError(f"checkpoint {path} is a link to {place}, outside of the run; copy it here instead")
        return Checkpoint.open(path)

    def remove_unfinished(self) -> None:
        """Remove what a killed save left."""
        for directory, names in self.contents().items():
            if COMPLETE not in names:
                self._remove(directory, names)

    def keep(self, config: CheckpointConfig, best_step: int) -> None:
        """Remove all complete checkpoints but the newest `keep_last` and the best `keep_best`, `best_step` among them.

        To be called when the newest is complete. Of equal metrics the earlier one is the better.
        """
        contents, steps = self.contents(), self.complete()
        kept = {*steps[-config.keep_last :], best_step}
        if config.keep_best > 1:
            metrics = {step: self.at(step).progress.metric for step in steps}
            judged = [step for step in steps if metrics[step] is not None]
            kept |= set(sorted(judged, key=lambda step: -(metrics[step] or 0.0))[: config.keep_best])
        for step in set(steps) - kept:
            directory = f"step-{step:08d}"
            self._remove(directory, contents[directory])

    def _remove(self, directory: str, names: dict[str, int]) -> None:
        """COMPLETE goes first: what is left of a removal that was stopped is unfinished, not damaged."""
        fs, root = filesystem(self.root)
        place = f"{root.rstrip('/')}/{directory}"
        with explaining(f"{self.root}/{directory}", "remove"), suppress(FileNotFoundError):
            if COMPLETE in names:
                fs.rm(f"{place}/{COMPLETE}")
            if is_local(self.root):
                fs.rm(place, recursive=True)
            elif others := [f"{place}/{name}" for name in names if name != COMPLETE]:
                fs.rm(others)
