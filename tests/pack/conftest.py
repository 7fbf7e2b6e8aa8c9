import pytest

from quake_jax._rewrite import engine


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    """A pattern that fails on a program is an error here; users get the original program."""
    monkeypatch.setattr(engine, "RAISE_FAILURES", True)
