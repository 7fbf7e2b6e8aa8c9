"""Measurements of quake_jax against jax.nn and other libraries: `python -m benchmarks --help`.

Nothing here is installed with the package; run it from the root of the repository.
"""
