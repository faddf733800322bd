"""`genatt`: one verb, one function call. torch, deepspeed and ray are imported inside the verbs that need them."""

# In the order of the help.
from genatt_dist.cli import benchmarks, data, training, evaluation, machines, jobs  # noqa: F401, I001
from genatt_dist.cli.app import app, main

__all__ = ["app", "main"]
