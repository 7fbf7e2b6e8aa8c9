"""Tests of `python -m benchmarks devices`: what it shows, and what it refuses."""

import os

import numpy as np
import pytest

pytest.importorskip("rich")

from benchmarks.devices import measure, programs, report  # noqa: E402
from benchmarks.harness import pages  # noqa: E402
from benchmarks.harness.errors import BenchmarkError  # noqa: E402

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
    names = [way.name for way in measure.WAYS]
    quartiles = {"low": 1.4, "median": 1.5, "high": 1.6}
    cases = [
        {
            "name": case.name,
            "divided": programs.DIVIDED[case.axis],
            "calls": 3,
            "seconds": {name: [0.002 * (i + 1)] * 3 for i, name in enumerate(names)},
            "doubtful": doubtful,
            "speed": dict.fromkeys(names, quartiles),
        }
        for case in programs.CASES
    ]
    settings = {"rounds": 3, "reading_seconds": 0.1, "quick": False}
    return {
        "benchmark": "devices",
        "environment": ENVIRONMENT,
        "settings": settings,
        "cases": cases,
    }


def test_tables_show_every_case_in_every_way():
    (_, times), (_, speed) = report.tables(result())
    assert times[0][2:] == ["1 thread", "2 threads", "2 devices", "2 processes"]
    assert len(times) == len(speed) == 1 + len(programs.CASES)
    assert times[1][1:] == ["batch", "2", "4", "6", "8"]
    assert speed[1][1:] == ["batch", *["1.50 (1.40–1.60)"] * 3]
    assert not any("†" in line for line in report.remarks(result()))
    assert report.tables(result(1))[0][1][1][2] == "2†"
    assert any(line.startswith("† 6 disturbed") for line in report.remarks(result(1)))


def test_the_section_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Kept\n")
    for _ in range(2):
        made = pages.Page("Threads", report.tables(result()), report.remarks(result()))
        pages.to_markdown(result(), made, page)
    text = page.read_text()
    assert text.startswith("# Kept\n") and text.count("### Threads, 2 threads, avx2") == 1


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs two cores that processes can be tied to",
)
def test_processes_answer_together_until_one_fails():
    pytest.importorskip("jax")
    (team,) = measure.start(True, measure.WAYS[-1:])
    try:
        team.prepare(programs.CASES[0])
        seconds, _ = team.read(2)
        assert seconds > 0
        described = team.describe()
        assert described["threads"] == 1
        worker = team._workers[0]
        worker.kill()
        worker.join()
        with pytest.raises(BenchmarkError, match="2 processes: a process failed"):
            team.read(2)
    finally:
        team.stop()
    assert not any(worker.is_alive() for worker in team._workers)


@pytest.mark.parametrize("case", programs.CASES, ids=lambda case: f"{case.name} {case.axis}")
def test_cases_have_a_split_for_each_operand(case):
    jax = pytest.importorskip("jax")
    pytest.importorskip("flax")
    f, operands, specs, _ = programs.function(case.name.split()[0], quick=True)
    jax.tree.map(lambda x, spec: None, operands, specs)  # raises for another structure
    y = jax.eval_shape(f, *operands)
    assert y.dtype == np.float32
