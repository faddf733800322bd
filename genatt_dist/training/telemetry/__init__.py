"""What a run tells while it runs: one object, and behind it a writer for each place where numbers go."""

from genatt_dist.training.telemetry.environment import write_environment
from genatt_dist.training.telemetry.facade import Telemetry

__all__ = ["Telemetry", "write_environment"]
