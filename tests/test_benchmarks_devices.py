"""Tests of `python -m benchmarks devices`: what it shows, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")

from benchmarks import devices, report  # noqa: E402
from benchmarks.errors import BenchmarkError  # noqa: E402

ROOT = Path(__file__).parents[1]

ENVIRONMENT = {
    "cpu": "A CPU",
    "isa": "avx2",
    "threads": 2,
    "versions": {"jax": "1.2"},
    "date": "2026-01-01T00:00:00+00:00",
    "commit": None,
    "load_average": 0.5,
}


def result(doubtful=0):
    names = [way.name for way in devices.WAYS]
    quartiles = {"low": 1.4, "median": 1.5, "high": 1.6}
    cases = [
        {
            "name": case.name,
            "divided": devices.DIVIDED[case.axis],
            "calls": 3,
            "seconds": {name: [0.002 * (i + 1)] * 3 for i, name in enumerate(names)},
            "doubtful": doubtful,
            "speed": dict.fromkeys(names, quartiles),
        }
        for case in devices.CASES
    ]
    settings = {"rounds": 3, "reading_seconds": 0.1, "quick": False}
    return {
        "benchmark": "devices",
        "environment": ENVIRONMENT,
        "settings": settings,
        "cases": cases,
    }


def test_tables_show_every_case_in_every_way():
    (_, times), (_, speed) = devices.tables(result())
    assert times[0][2:] == ["1 thread", "2 threads", "2 devices", "2 processes"]
    assert len(times) == len(speed) == 1 + len(devices.CASES)
    assert times[1][1:] == ["batch", "2", "4", "6", "8"]
    assert speed[1][1:] == ["batch", *["1.50 (1.40–1.60)"] * 3]
    assert not any("†" in line for line in devices.remarks(result()))
    assert devices.tables(result(1))[0][1][1][2] == "2†"
    assert any(line.startswith("† 6 disturbed") for line in devices.remarks(result(1)))


def test_the_section_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Kept\n")
    for _ in range(2):
        made = devices.tables(result()), devices.remarks(result())
        report.write_section(result(), page, "Threads", *made)
    text = page.read_text()
    assert text.startswith("# Kept\n") and text.count("### Threads, 2 threads, avx2") == 1


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that processes can be tied to",
)
def test_processes_answer_together_until_one_fails():
    pytest.importorskip("jax")
    team = devices.Team(devices.WAYS[-1], quick=True)
    try:
        team.prepare(devices.CASES[0])
        seconds, _ = team.read(2)
        assert seconds > 0
        described = team.describe()
        assert described["threads"] == 1 and described["xla_pool_threads"] in (1, None)
        worker = team._workers[0]
        worker.kill()
        worker.join()
        with pytest.raises(BenchmarkError, match="2 processes: a process failed"):
            team.read(2)
    finally:
        team.stop()
    assert not any(worker.is_alive() for worker in team._workers)


@pytest.mark.parametrize("case", devices.CASES, ids=lambda case: f"{case.name} {case.axis}")
def test_cases_have_a_split_for_each_operand(case):
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    f, operands, specs, _ = devices._function(case.name.split()[0], quick=True)
    jax.tree.map(lambda x, spec: None, operands, specs)  # raises for another structure
    y = jax.eval_shape(f, *operands)
    assert y.dtype == np.float32


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("--rounds", "0"), "'0'"), (("--json", "/no/such/folder/x.json"), "/no/such/folder")],
)
def test_bad_values_are_one_line(arguments, named):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "devices", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and named in done.stderr
