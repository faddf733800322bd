"""Ray jobs: entry points that run in a job on a cluster (`python -m jobs.train`), and `jobs.submit`, which sends them.

They call the packages; of the packages only the verbs `genatt submit` and `genatt jobs` call them.
"""
