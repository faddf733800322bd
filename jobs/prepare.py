"""Job `prepare`: a raw log to sequence shards, on the cluster's Ray. Done once: shards of the same configuration stay.

`python -m jobs.prepare [job.yaml]`
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline import known, synthetic
from data_pipeline.config import PrepareConfig
from data_pipeline.errors import GenattError
from data_pipeline.filesystems import explaining, filesystem
from data_pipeline.format import MANIFEST, Manifest, load_manifest, manifest_hash
from data_pipeline.redaction import redact
from data_pipeline.splits import TimePoint
from data_pipeline.storage import check_access, check_free, write_bytes
from genatt_dist.training.checkpoint.files import is_local, read_if_there
from jobs import driver, options

_WHOLE = "_SUCCESS"  # as Hadoop and Spark say it


def reachable(config: PrepareConfig) -> PrepareConfig:
    """The preparation with a source that every node can read: a known or synthetic set lies beside the shards."""
    name = config.source.partition(":")[0]
    if config.source not in known.NAMES and name != "synthetic":
        return config
    which = hashlib.sha256(config.source.encode()).hexdigest()[:8]
    return config.model_copy(update={"source": f"{config.out}-source-{which}", "name": config.name or name})


def prepare(asked: PrepareConfig, run: str) -> str:
    """Prepare, and remove first what an earlier attempt of this very job left of it. Returns a line about the shards.

    A preparation that was killed on object storage leaves files that no later one may touch, for another may be at work
    there. So a job notes beside the directory, where it found nothing, that it begins; what an attempt finds under its
    own run's note is its own, as a job is not submitted twice. Of several runs that prepare one place the first does.
    """
    from data_pipeline.prepare import prepare as made

    config = reachable(asked)
    check_access(config.out)
    if config.source != asked.source:
        _materialise(asked.source, config.source)
    if is_local(config.out):  # written elsewhere and renamed: nothing can be left
        return _told(made(config), config)
    note = f"{config.out}.preparing.json"
    if (found := read_if_there(note)) is not None:
        if (other := json.loads(found).get("run", redact(run))) != redact(run):
            raise GenattError(
                f"prepare.out {redact(config.out)}: the job of run {other} prepares there, or was ended in it: wait "
                f"for it, or submit that one again; if it is given up, remove {redact(note)} and what is in prepare.out"
            )
        _remove(config.out)
    check_free(config.out, "prepare.out")
    write_bytes(note, json.dumps({"config": config.hash(), "run": redact(run)}).encode())
    manifest = made(config)
    _remove(note)
    return _told(manifest, config)


def already(asked: PrepareConfig) -> str | None:
    """A line about the shards where they are there. Raises GenattError where those of another configuration are."""
    config = reachable(asked)
    check_access(config.out)
    if read_if_there(f"{config.out}/{MANIFEST}") is None:
        return None
    manifest = load_manifest(config.out)
    if not _same(config, manifest):
        raise GenattError(
            f"output {redact(config.out)} holds shards of another configuration: choose another place, or remove it"
        )
    return _told(manifest, config)


def _same(config: PrepareConfig, manifest: Manifest) -> bool:
    if config.append_to is None and not isinstance(config.split, TimePoint):
        return config.hash() == manifest.config_hash
    from data_pipeline.planning import look  # what source and parent decide is part of the configuration here

    with tempfile.TemporaryDirectory(prefix="genatt-") as directory:
        resolved = look(config, Path(directory)).config
    parent = None if config.append_to is None else manifest_hash(config.append_to)
    return resolved.hash() == manifest.config_hash and parent == manifest.parent


def _materialise(source: str, place: str) -> None:
    """Write a known or synthetic set to `place`, unless all of it is there."""
    if read_if_there(f"{place}/{_WHOLE}") is not None:
        return
    name, _, chosen = source.partition(":")
    if name == "synthetic":
        synthetic.write_to(synthetic.Options.parse(chosen), place)
    else:
        with tempfile.TemporaryDirectory(prefix="genatt-") as directory:
            known.write(source, Path(directory))
            for path in Path(directory).iterdir():
                write_bytes(f"{place}/{path.name}", path.read_bytes())
    write_bytes(f"{place}/{_WHOLE}", b"")


def _told(manifest: Manifest, config: PrepareConfig) -> str:
    return (
        f"{redact(config.out)} has {manifest.num_users:,} users, {manifest.num_items:,} items, "
        f"{manifest.num_interactions:,} interactions"
    )


def _remove(path: str) -> None:
    fs, inner = filesystem(path)
    with explaining(path, "remove"), suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)


def work(config: dict[str, Any], run: str) -> None:
    """The job; its run is where the shards go."""
    wanted = options.of_prepare(config)
    driver.stage("prepare", lambda: already(wanted), lambda: prepare(wanted, run))


if __name__ == "__main__":
    driver.main(work, __doc__ or "")
