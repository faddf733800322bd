"""`python -m genatt_dist.cli`."""

from genatt_dist.cli import main

main()
