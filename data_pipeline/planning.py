"""What is known of a preparation before Ray starts: `prepare` goes on from here, `--dry-run` shows it."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.append import Parent
from data_pipeline.config import PrepareConfig
from data_pipeline.readers import Plan, in_unit, plan
from data_pipeline.sources import Source, resolve
from data_pipeline.splits import TimePoint


@dataclass(frozen=True)
class Planned:
    """config: with the parent's choices, and the split's instants in the unit of the time column."""

    config: PrepareConfig
    parent: Parent | None
    source: Source
    plan: Plan


def look(config: PrepareConfig, workdir: Path) -> Planned:
    """Looks at the parent and the source; `workdir` takes what a source has to be made into, and is needed to read it.

    Raises
    ------
    GenattError
        Anything the user can mend and that shows before all rows are read; see `append`, `sources` and `readers`.
    """
    parent = None if config.append_to is None else Parent.load(config.append_to)
    if parent is not None:
        config = parent.inherited(config)
    source = resolve(config, workdir)
    planned = plan(source, config)
    if parent is not None:
        planned = parent.matched(planned)
    if isinstance(config.split, TimePoint):
        split = config.split.resolved(lambda time: in_unit(time, planned.time_unit, "split"))
        config = config.model_copy(update={"split": split})
    return Planned(config, parent, source, planned)
