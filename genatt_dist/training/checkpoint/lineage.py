"""Whether a checkpoint belongs to a data set: the one it was trained on, or a version that descends from it."""

from __future__ import annotations

from data_pipeline.errors import GenattError
from data_pipeline.format import Manifest
from data_pipeline.storage import redact
from genatt_dist.training.checkpoint.read import Checkpoint


def has_grown(source: Checkpoint, manifest: Manifest, manifest_hash: str, path: str) -> bool:
    """False where the data at `path` are those of the checkpoint, True where they grew from them: known items keep
    their ids, new ones have the ids that follow.

    Raises GenattError naming both hashes, of manifests and vocabularies, where they are neither.
    """
    progress = source.progress
    if progress.manifest_hash == manifest_hash:
        return False
    if progress.manifest_hash in manifest.lineage:
        return True
    raise GenattError(
        f"checkpoint {redact(source.path)} was trained on data with manifest {progress.manifest_hash[:12]}… "
        f"(vocabulary {progress.vocabulary_hash[:12] or 'unknown'}…), {redact(path)} has {manifest_hash[:12]}… "
        f"(vocabulary {manifest.vocabulary.sha256[:12]}…) and does not descend from it: resume with the data it began "
        "with, or with what `genatt prepare --append-to` made of them"
    )
