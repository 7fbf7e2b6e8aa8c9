"""Tests of what the benchmarks share: the stopwatch, what it rejects, the clock, processes, bars.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import hardware, pages, timing
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import Settings
from benchmarks.harness.timing import Contestant, Reading

ROOT = Path(__file__).resolve().parents[2]


def reading(wall=1e-3, faults=0, waited=0.0, calls=10):
    return Reading(calls=calls, wall=wall, cpu=wall, faults=faults, waited=waited)


@pytest.mark.parametrize(
    ("isa", "forced", "lines"), [("avx2", True, 1), ("avx2", False, 0), ("avx512", True, 0)]
)
def test_only_a_forced_instruction_set_is_ours_alone(isa, forced, lines):
    result = {"environment": {"isa": isa, "isa_forced": forced}}
    assert len(pages.isa_remarks(result)) == lines


def test_prose_has_its_values_and_leaves_out_what_does_not_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "TEXTS", tmp_path)
    (tmp_path / "a.txt").write_text("[b] {c} of\n{settings[d]:g}.\n\nAlways.\n\n[e] {c} never.\n")
    result = {"settings": {"d": 2.0}}
    assert pages.prose("a.txt", result, b=True, c="x", e=[]) == ["x of 2.", "Always."]


# --- Arithmetic


def test_ratios_are_paired_by_round():
    # The second round was three times as slow for both: the ratio does not see it.
    ratio = timing.paired_ratio([4.0, 12.0, 4.0], [2.0, 6.0, 1.0])
    assert ratio == {"low": 2.0, "median": 2.0, "high": 3.0}


def test_quartiles_of_one_reading_are_that_reading():
    assert timing.quartiles([3.0], 2.0) == dict.fromkeys(("low", "median", "high"), 6.0)


def test_ratio_of_unequal_series_is_refused():
    with pytest.raises(ValueError):
        timing.paired_ratio([1.0, 2.0], [1.0])


def test_overhead_is_subtracted_per_call(monkeypatch):
    monkeypatch.setattr(timing, "read", lambda run, calls: reading(wall=calls * 5e-4, calls=calls))
    runs = [
        Contestant("with", lambda calls: None, overhead=1e-4),
        Contestant("without", lambda calls: None),
    ]
    series = timing.measure(runs, rounds=3, target=2e-3, threads=1)
    assert series["with"].times == pytest.approx([4e-4] * 3)
    assert series["without"].times == pytest.approx([5e-4] * 3)


def test_readings_are_as_long_as_asked(monkeypatch):
    monkeypatch.setattr(timing, "read", lambda run, calls: reading(wall=calls * 1e-6, calls=calls))
    calls = timing.calibrate(lambda calls: None, 2e-3)
    assert 2000 <= calls <= 8 * 2000


# --- Disturbed readings


def test_a_reading_counts_its_page_faults():
    pages = 64

    def touch_fresh_pages(calls):
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            for page in range(pages):
                memory[page * mmap.PAGESIZE] = 1

    taken = timing.read(touch_fresh_pages, 1)
    assert taken.faults >= pages
    assert timing.disturbance(taken) == "faults"


@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        (reading(), None),
        (reading(faults=timing.MAX_FAULTS), None),
        (reading(faults=timing.MAX_FAULTS + 1), "faults"),
        (reading(waited=0.5e-3), "preempted"),
        (reading(wall=1.0, waited=0.5 * timing.MAX_WAIT_SHARE), None),
    ],
)
def test_disturbance(taken, reason):
    assert timing.disturbance(taken) == reason


def test_only_workers_count_as_waiting():
    # Thread 2 worked and waited a little, thread 3 only wanted to run for an instant.
    before = {2: (1.0, 0.0), 3: (1.0, 0.0)}
    after = {2: (1.9, 0.1), 3: (1.001, 0.8)}
    assert timing.waiting(before, after, wall=1.0) == pytest.approx(0.1)


def test_a_disturbed_reading_is_repeated_and_counted(monkeypatch):
    monkeypatch.setattr(timing, "NAP_SECONDS", 0)
    monkeypatch.setattr(timing, "calibrate", lambda run, target: 10)
    script = iter(
        [
            reading(faults=999),
            reading(waited=1.0),
            reading(wall=2e-3),
            reading(wall=4e-3),
        ]
    )
    monkeypatch.setattr(timing, "read", lambda run, calls: next(script))
    runs = [Contestant("one", lambda calls: None)]
    series = timing.measure(runs, rounds=2, target=1e-3, threads=1)["one"]
    assert series.rejected == {"faults": 1, "preempted": 1}
    assert series.doubtful == 0
    assert series.times == pytest.approx([2e-4, 4e-4])


def test_a_round_without_a_good_reading_is_marked(monkeypatch):
    monkeypatch.setattr(timing, "NAP_SECONDS", 0)
    monkeypatch.setattr(timing, "calibrate", lambda run, target: 10)
    monkeypatch.setattr(timing, "read", lambda run, calls: reading(faults=999))
    runs = [Contestant("one", lambda calls: None)]
    series = timing.measure(runs, rounds=1, target=1e-3, threads=1)["one"]
    assert series.rejected["faults"] == timing.MAX_ATTEMPTS
    assert series.doubtful == 1
    assert len(series.times) == 1


def test_the_clock_is_that_of_a_core():
    contestant = hardware.clock()
    if contestant is None:
        pytest.skip("no C++ compiler, or not x86-64")
    contestant.run(10)
    seconds = min(timing.read(contestant.run, 10).wall for _ in range(5)) / 10
    assert 0.2e9 < hardware.CYCLES_PER_CALL / seconds < 10e9


# --- Threads


def test_workers_with_one_and_two_threads_take_turns():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    script = (
        "import json\n"
        "from benchmarks.harness.frame import Settings\n"
        "from benchmarks.ops import measure\n"
        "from benchmarks.ops.cases import Case\n"
        "if __name__ == '__main__':\n"
        "    cases = [Case('exp', (64, 64), 'float32'), Case('softmax', (8, 64), 'float32')]\n"
        "    found = measure.measure_scaling(cases, Settings(3, 1e-4))\n"
        "    print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert [entry["function"] for entry in measured] == ["exp", "softmax"]
    for entry in measured:
        assert [len(times) for times in entry["seconds"].values()] == [3, 3]
        assert entry["speedup"]["low"] <= entry["speedup"]["median"] <= entry["speedup"]["high"]


# --- A run that adds to another


def test_a_run_adds_to_an_earlier_one(tmp_path):
    path = tmp_path / "models.json"
    words = ["models", "--quick", "--resume", "--json", str(path)]
    found = {"benchmark": "models, float32", "cases": [1], "left_out": {"a": "b"}, "bars": [3]}

    def result():
        settings = Settings.of(command.parse(words), (0.1, 0.1))
        return settings.result({}, None, cases=[2], left_out={"c": "d"})

    assert result()["cases"] == [2]  # there is no file yet
    path.write_text(json.dumps(found))
    assert result()["cases"] == [1, 2] and result()["left_out"] == {"a": "b", "c": "d"}
    assert result()["benchmark"] == "models, float32" and result()["bars"] == []
    words += ["--allocator", "system"]
    with pytest.raises(BenchmarkError, match="'models, float32', not of 'models, float32, system"):
        result()
