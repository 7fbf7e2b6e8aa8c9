"""Fused attention: its arguments, derivative, primitive and reference."""
