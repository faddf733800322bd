"""`python -m benchmarks.steps …` is `genatt bench steps …`: one surface, one help."""

import sys

from genatt_dist.cli import main

sys.argv[1:1] = ["bench", "steps"]
main()
