"""What checkpoints a run has: `genatt checkpoints`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.errors import GenattError
from data_pipeline.storage import check_access, redact
from genatt_dist import runs
from genatt_dist.training.checkpoint.bundle import export
from genatt_dist.training.checkpoint.files import COMPLETE, is_local
from genatt_dist.training.checkpoint.store import Store, step_of


@dataclass(frozen=True)
class Listed:
    """A checkpoint of the run; of an unfinished one only step and bytes are known. metric: validation NDCG@10."""

    step: int
    bytes: int
    complete: bool
    epoch: int | None = None
    metric: float | None = None
    newest: bool = False
    best: bool = False


@dataclass(frozen=True)
class Inventory:
    """verified: steps whose files all have the sha256 they were written with. bundle: the step exported, and where."""

    place: str
    checkpoints: list[Listed]
    verified: list[int]
    bundle: dict[str, Any] | None

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


def checkpoints(run: Path, verify: bool = False, out: str | None = None, step: int | None = None) -> Inventory:
    """List what the run has; check sums of all (or of `step`), and export the best (or `step`) to `out`.

    Raises GenattError: no checkpoint, damage (the file is named), an `out` that cannot be written.
    """
    store = Store.of(run, runs.read_config(run).training.checkpoint)
    if (run / COMPLETE).exists():
        raise GenattError(f"{run} is an exported bundle: `genatt recommend` checks its files; name the run for a list")
    check_access(store.root)
    if not (listed := _list(store)):
        store.newest()  # says that there is none
    steps = [one.step for one in listed if one.complete]
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise GenattError(f"{run} has no complete checkpoint of step {step}: it has those of steps {known}")
    verified = (steps if step is None else [step]) if verify else []
    for one in verified:
        store.at(one).verify()
    bundle = None
    if out is not None:
        source = store.best() if step is None else store.at(step)
        export(source, out)
        bundle = {"step": source.progress.step, "out": redact(out)}
    return Inventory(redact(store.root), listed, verified, bundle)


def show(found: Inventory, console: Console) -> None:
    """A table for the terminal."""
    table = Table(title=f"checkpoints in {found.place}")
    for name in ("step", "epoch", "valid ndcg@10", "MiB", "state"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for one in found.checkpoints:
        words = [word for word, true in (("newest", one.newest), ("best", one.best)) if true]
        words += ["verified"] if one.step in found.verified else []
        table.add_row(
            str(one.step),
            "" if one.epoch is None else str(one.epoch),
            "" if one.metric is None else f"{one.metric:.4f}",
            f"{one.bytes / 2**20:,.1f}",
            ", ".join(words or ["complete"]) if one.complete else "unfinished: the next save removes it",
        )
    console.print(table)
    if found.bundle:
        out = found.bundle["out"]
        there = f"genatt recommend {out} --users …" if is_local(out) else "copy it to a disk, then genatt recommend"
        console.print(
            f"step {found.bundle['step']} exported to {out}. Next: {there}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _list(store: Store) -> list[Listed]:
    contents, steps = store.contents(), store.complete()
    sources = {step: store.at(step) for step in steps}
    best = sources[steps[-1]].progress.best_step if steps else -1
    listed = []
    for directory, names in sorted(contents.items()):
        step, size = step_of(directory), sum(names.values())
        if step not in sources or COMPLETE not in names:
            listed.append(Listed(step, size, complete=False))
            continue
        progress = sources[step].progress
        listed.append(Listed(step, size, True, progress.epoch, progress.metric, step == steps[-1], step == best))
    return listed
