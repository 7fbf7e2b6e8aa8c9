"""`quake_jax.pack`: a function of parameters becomes one of packed parameters.

One file each: `rules` says which format a parameter gets; `codes` packs what is quantised already;
`plan` is what functions share that take the same packed parameters; `api` makes functions of it;
`report` says what was done; `files` writes packed parameters to files and reads them.
"""
