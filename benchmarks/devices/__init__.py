"""Two cores as threads, devices and processes."""
