"""The option --record, and what is recorded: the kernels that each model gets."""

import json
import pathlib

import pytest

from quake_jax._rewrite import engine

RECORD = pathlib.Path(__file__).with_name("kernels.json")


def pytest_addoption(parser):
    parser.addoption(
        "--record",
        action="store_true",
        help=f"write what is found in other people's models to {RECORD.name}, without pytest-xdist",
    )


@pytest.fixture(autouse=True)
def failures(monkeypatch):
    """A pattern that fails on a program is an error here; users get the original program."""
    monkeypatch.setattr(engine, "RAISE_FAILURES", True)


@pytest.fixture
def recorded(request):
    """Compare a test's result with what is recorded under a name, or record it."""

    def check(name: str, result) -> None:
        records = json.loads(RECORD.read_text())
        if not request.config.getoption("--record", default=False):
            assert result == records.get(name), f"--record writes {RECORD.name} anew"
        elif result != records.get(name):
            records[name] = result
            lines = (f"{json.dumps(n)}: {json.dumps(r)}" for n, r in sorted(records.items()))
            RECORD.write_text("{\n" + ",\n".join(f"  {line}" for line in lines) + "\n}\n")

    return check
