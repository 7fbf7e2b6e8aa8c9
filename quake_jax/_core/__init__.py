"""What the families of kernels share; it imports nothing of quake_jax outside itself."""
