"""The `ray:` section of a configuration: how Ray Train runs the ranks. No other launcher reads it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from genatt_dist.section import Section


class RayOptions(Section):
    """Workers of Ray Train, one a rank."""

    min_workers: int | None = Field(
        None,
        ge=1,
        description="Ranks to go on with while the cluster has no room for world_size of them; default: world_size.",
    )
    max_failures: int = Field(
        3, ge=-1, description="Times the workers are started again after one was lost; -1: without end."
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs a rank reserves.")
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs a rank reserves; default: 1 where the cluster has a GPU, else 0."
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Ray's strategy: ranks together on few nodes, or apart."
    )
