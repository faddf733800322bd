"""Weak and strong scaling of the training step over ranks, T and the catalogue, and a cost model held against it.

    genatt bench scaling --out benchmarks/results/scaling.json

`grid` says what is measured and which rows the model may see, `work` is one rank's part of a row, `worker` is what a
launcher starts, `pool` speaks to the workers, `measure` takes the rows of a cell in turns, `collectives` times what
ranks exchange, `breakdown` reads profiles, `features` asks the plan what a row computes and exchanges, `model` fits
seconds to it, `judge` holds it against rows it has not seen, `extrapolate` goes to clusters, `growth` tells what more
ranks cost by part, `draw` makes pictures, `run` is all of it in order.
"""
