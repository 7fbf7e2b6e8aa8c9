"""Measurements of quake_jax against jax.nn and other libraries: `python -m benchmarks --help`.

A folder per subject, each with the same files: `command` (options; imports no JAX), `cases` (what
is measured), `systems` (who takes part), `measure` (the run), `goals` (the bars), `report` (the
tables; `remarks.txt` has the prose beside them) and `plots`. What they share is in `harness`.
Nothing here is installed with the package; run it from the root of the repository.
"""
