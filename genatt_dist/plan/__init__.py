"""What a configuration would take on a cluster, without one: memory, time of a step, who holds what.

A model, not a measurement. `benchmarks/plan_check.py` holds it against runs on this machine.
"""
