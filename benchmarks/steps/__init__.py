"""What the steps of a generated attention map cost: time, latency and memory against T (training) and S (serving).

    genatt bench steps --out benchmarks/results/steps_cpu.json

`grid` says what is measured, `lengths` how long histories are, `work` what one step is, `child` measures in a process
of its own, `measure` runs the grid and writes rows, `draw` makes the picture.
"""
