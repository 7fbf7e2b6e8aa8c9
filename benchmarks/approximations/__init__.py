"""The published approximations."""
