"""`python -m benchmarks.scaling …` is `genatt bench scaling …`: one surface, one help."""

import sys

from genatt_dist.cli import main

sys.argv[1:1] = ["bench", "scaling"]
main()
