"""Studies: several arms trained under one protocol through a queue that can be stopped and resumed."""
