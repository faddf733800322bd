"""Raw interaction logs to sequence shards: clean, k-core, vocabulary, per-user sequences, split rule, manifest.

`prepare(PrepareConfig(source=..., out=...))` runs all of it; `data_pipeline.format` reads what it wrote.
"""
