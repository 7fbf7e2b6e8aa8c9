"""What quake_jax.linen and quake_jax.nnx share; it imports no Flax."""
