"""Tests of the benchmarks: their arithmetic, what they reject, and one tiny run from end to end.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# benchmarks is not installed; at the end of the path, the folder hides nothing that is.
sys.path.append(str(ROOT))

from benchmarks import bars, cases, peers, report, systems, timing  # noqa: E402
from benchmarks.timing import Contestant, Reading  # noqa: E402


def reading(wall=1e-3, faults=0, waited=0.0, calls=10):
    return Reading(calls=calls, wall=wall, cpu=wall, faults=faults, waited=waited)


# --- Arithmetic


def test_ratios_are_paired_by_round():
    # The second round was three times as slow for both: the ratio does not see it.
    ratio = timing.paired_ratio([4.0, 12.0, 4.0], [2.0, 6.0, 1.0])
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 3.0)


def test_quartiles_of_one_reading_are_that_reading():
    assert timing.Quartiles.of([3.0]) == timing.Quartiles(3.0, 3.0, 3.0)


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


# --- Contestants


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_contestants_share_one_output(dtype):
    case = cases.Case("sigmoid", (3, 33), dtype)
    buffers = systems.Buffers(case)
    systems.jax_nn(case, buffers).run(5)  # raises if the donated buffer is not reused
    assert buffers.error("sigmoid") < {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    for copy in systems.copies(buffers):
        buffers.target[:] = 0
        copy.run(2)
        np.testing.assert_array_equal(buffers.target, buffers.source)


def test_missing_peers_are_left_out_with_a_word(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert set(peers.Peers(threads=1).left_out) == set(peers.PEERS)


# --- Bars


def test_bars_are_about_things_that_are_measured():
    default = cases.choose(cases.FUNCTIONS, cases.DTYPES, None)
    for bar in bars.BARS:
        assert cases.Case(bar.function, bar.shape, bar.dtype) in default
        assert bar.order in cases.DEFAULT_ORDERS
        assert bar.threshold > 1
        assert bar.against in ("jax.nn", "fastest", *peers.PEERS)
    keys = [(bar.function, bar.shape, bar.dtype, bar.order, bar.against) for bar in bars.BARS]
    assert len(set(keys)) == len(keys)


def result_with(ratio, threads=1, isa="avx512"):
    bar = bars.BARS[0]
    entry = {"median": ratio, "low": ratio, "high": ratio}
    return {
        "environment": {"threads": threads, "isa": isa},
        "cases": [
            {
                "function": bar.function,
                "shape": list(bar.shape),
                "dtype": bar.dtype,
                "ratios": {f"order {bar.order}": {"jax.nn": entry}},
            }
        ],
        "call_overhead": {"tanh": {"difference_us": bars.CALL_OVERHEAD_US * 2}},
    }


def test_bars_are_judged_by_their_threshold():
    threshold = bars.BARS[0].threshold
    assert [v["met"] for v in bars.judge(result_with(threshold))] == [True, False]
    assert [v["met"] for v in bars.judge(result_with(0.99 * threshold))] == [False, False]


@pytest.mark.parametrize("conditions", [{"threads": 2}, {"isa": "avx2"}])
def test_bars_are_not_judged_under_other_conditions(conditions):
    assert bars.judge(result_with(9.0, **conditions)) == []


# --- The command


def run_benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("ops", "--shape", "12,no"), "'12,no'"),
        (("ops", "--shape", "0,4"), "'0,4'"),
        (("ops", "--rounds", "0"), "'0'"),
        (("ops", "--function", "sine"), "'sine'"),
        (("ops", "--order", "7"), "7"),
        (("ops", "--json", "/no/such/folder/x.json"), "/no/such/folder"),
        (("ops", "--json", "/"), "/"),
        (("nothing",), "'nothing'"),
    ],
)
def test_bad_values_are_one_line(arguments, named):
    done = run_benchmarks(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "error" in done.stderr and named in done.stderr


def test_a_quick_run_from_end_to_end(tmp_path):
    path, page = tmp_path / "ops.json", tmp_path / "ops.md"
    page.write_text("# Kept\n")
    done = run_benchmarks(
        "ops",
        "--quick",
        "--no-peers",
        "--function",
        "tanh",
        "--shape",
        "4,64",
        "--dtype",
        "float32",
        "--dtype",
        "float16",
        "--order",
        "3",
        "--json",
        str(path),
        "--markdown",
        str(page),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    environment = result["environment"]
    assert {"date", "cpu", "isa", "threads", "versions", "commit"} <= set(environment)
    assert environment["threads"] == 1
    assert environment["versions"]["jax"] and environment["versions"]["quake_jax"]
    assert [case["dtype"] for case in result["cases"]] == ["float32", "float16"]
    for case in result["cases"]:
        assert case["elements"] == 256
        assert case["copy"] in case["contestants"]
        assert {"order 3", "jax.nn"} <= set(case["contestants"])
        for entry in case["contestants"].values():
            assert {"ns_per_element", "rejected", "doubtful", "cpu_per_wall"} <= set(entry)
            assert entry["ns_per_element_low"] <= entry["ns_per_element"]
            assert entry["ns_per_element"] <= entry["ns_per_element_high"]
        assert set(case["ratios"]["order 3"]["jax.nn"]) == {"low", "median", "high"}
    assert set(result["call_overhead"]) == {"tanh", "softmax"}
    assert result["bars"] == []  # a quick run proves nothing
    # The page: the old text stays, a second run replaces the first one's section.
    once = page.read_text()
    assert once.startswith("# Kept\n") and "tanh 4×64 float16" in once
    report.to_markdown(result, page)
    assert page.read_text() == once


def test_plots_are_small_files(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    entry = {"ns_per_element": 0.2, "relative_error": 1e-4}
    copy = {"ns_per_element": 0.1, "relative_error": None}
    result = {
        "environment": {"threads": 1, "cpu": "a CPU"},
        "cases": [
            {
                "function": function,
                "shape": [4, 8],
                "dtype": "float32",
                "copy": "copy (NumPy)",
                "contestants": {"order 3": entry, "jax.nn": entry, "copy (NumPy)": copy},
            }
            for function in cases.FUNCTIONS
        ],
    }
    written = plots.draw(result, tmp_path / "plots")
    assert len(written) == 2
    assert all(0 < path.stat().st_size < 150_000 for path in written)
