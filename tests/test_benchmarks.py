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

from benchmarks import (  # noqa: E402
    bars,
    cases,
    clock,
    defaults,
    figures,
    instructions,
    operators,
    peers,
    report,
    scaling,
    systems,
    timing,
)
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
    systems.jax_nn(buffers).run(5)  # raises if the donated buffer is not reused
    assert buffers.error() < {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
    for copy in systems.copies(buffers):
        buffers.target[:] = 0
        copy.run(2)
        np.testing.assert_array_equal(buffers.target, buffers.sources[0])


@pytest.mark.parametrize("function", cases.FUNCTIONS)
def test_all_contestants_compute_the_same_function(function):
    buffers = systems.Buffers(cases.Case(function, (5, 70), "float32"))
    others = peers.Peers(threads=1).contestants(buffers, target=1e-5)
    for contestant in [systems.quake(buffers, 5), systems.jax_nn(buffers), *others]:
        buffers.target[...] = 0
        contestant.run(1)
        assert buffers.error() < 1e-3, contestant.name


def test_errors_are_large_for_another_function():
    buffers = systems.Buffers(cases.Case("gelu_erf", (5, 70), "float32"))
    wrong = operators.exact("silu", buffers.sources)
    assert operators.relative_error("gelu_erf", buffers._exact, wrong) > 0.1


def test_copies_of_functions_with_unlike_arrays_have_arrays_of_their_own():
    for function in ("logsumexp", "glu"):
        buffers = systems.Buffers(cases.Case(function, (3, 32), "float32"))
        for copy in systems.copies(systems.for_copies(buffers)):
            copy.run(1)
    assert cases.Case("glu", (3, 32), "float32").traffic == 1.5
    assert cases.Case("logsumexp", (3, 32), "float32").traffic == pytest.approx(0.5, rel=0.1)


def test_missing_operators_are_named():
    found = peers.Peers(threads=1, wanted=())
    found._makers["other"] = lambda buffers: None
    buffers = systems.Buffers(cases.Case("tanh", (2, 8), "float32"))
    for _ in range(2):
        assert found.contestants(buffers, target=1e-5) == []
    assert found.lacking == {"other": ["tanh float32"]}


def test_missing_peers_are_left_out_with_a_word(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert set(peers.Peers(threads=1).left_out) == set(peers.PEERS)


# --- The counted bound

# What objdump prints for a small kernel: a loop of two vectors, with a branch for stores past the
# caches in it, then a loop of one vector, then a masked rest that a jump back reaches.
LISTING = """
0000000000000000 <void quake::(anonymous namespace)::map<quake::(anonymous namespace)::Twice, \
float, 3>(void const*, void*, unsigned long, quake::Stores)>:
   0:\tvbroadcastss 0x0(%rip),%zmm5        # 8 <constant>
   8:\tvmovaps %zmm4,%zmm8
   e:\tvmulps -0x100(%rdi,%rax,4),%zmm5,%zmm6
  16:\tvscalefps %zmm6,%zmm8,%zmm8
  1c:\tvfmadd132ps %zmm0,%zmm3,%zmm9
  1e:\tvpaddd %zmm0,%zmm3,%zmm9
  20:\tvmovaps %zmm9,-0x40(%rsp)
  22:\tjne    40 <void quake::map+0x40>
  2a:\tvmovups %zmm8,-0x100(%rsi,%rax,4)
  32:\tvmovups %zmm9,-0xc0(%rsi,%rax,4)
  36:\tjmp    50 <void quake::map+0x50>
  40:\tvmovntps %zmm8,-0x100(%rsi,%rax,4)
  48:\tvmovntps %zmm9,-0xc0(%rsi,%rax,4)
  50:\tlea    0x40(%rax),%rax
  58:\tjae    8 <void quake::map+0x8>
  60:\tvmovups (%rdi),%zmm0
  66:\tvmovups %zmm0,(%rsi)
  6c:\tjae    60 <void quake::map+0x60>
  70:\tvmovups %zmm0,(%rsi,%r9,1){%k1}
  78:\tvaddps %zmm0,%zmm0,%zmm0
  7a:\tvaddps %zmm0,%zmm0,%zmm0
  7c:\tvaddps %zmm0,%zmm0,%zmm0
  7e:\tvaddps %zmm0,%zmm0,%zmm0
  80:\tjmp    70 <void quake::map+0x70>

0000000000000090 <something else>:
  90:\tret
""".replace("\\\n", "")


def test_the_hot_loop_is_found_and_added_up():
    kernels = instructions.parse(LISTING.splitlines())
    assert list(kernels) == ["map<Twice, float, 3>"]
    loop = instructions.hot_loop(kernels["map<Twice, float, 3>"])
    assert (loop[0].address, loop[-1].address) == (0x8, 0x58)
    assert instructions.operations(loop) == {
        "multiply": 2,  # vmulps, vfmadd
        "add": 2,  # vscalefps is two
        "vector": 5,  # these and vpaddd; the copy of a register is free
        "load": 1,
        "store": 3,  # one of them spills a register
        "instruction": 12,
    }
    # Three stores, one a cycle, take longest; two of them are results, 16 floats each.
    assert instructions.bound(kernels["map<Twice, float, 3>"], element_bytes=4) == 1.5
    # The same bytes are 64 elements of 16 bits.
    assert instructions.bound(kernels["map<Twice, float, 3>"], element_bytes=2) == 0.75


@pytest.mark.parametrize(
    ("name", "operands", "written"),
    [
        ("vmovups", ("%zmm1", "(%rsi)"), 64),
        ("vmovdqu", ("%ymm1", "0x20(%rsi,%rax,2)"), 32),
        ("vpmovdw", ("%zmm1", "(%rsi)"), 32),
        ("vcvtps2ph", ("$0x0", "%zmm1", "(%rsi)"), 32),
        ("vmovups", ("%zmm1", "(%rsi){%k1}"), 0),
        ("vmovups", ("(%rsi)", "%zmm1"), 0),
        ("mov", ("%rax", "(%rsi)"), 0),
    ],
)
def test_stores_are_counted_in_bytes(name, operands, written):
    assert instructions.Instruction(0, name, operands).stores == written


def test_no_bound_without_the_model_or_for_several_loops():
    bounds = instructions.Bounds("avx2")
    assert bounds.left_out
    assert bounds.cycles(cases.Case("tanh", (2, 8), "float32"), 3) is None
    assert bounds.cycles(cases.Case("softmax", (2, 8), "float32"), 3) is None


def test_the_clock_is_that_of_a_core():
    contestant = clock.contestant()
    if contestant is None:
        pytest.skip("no C compiler, or not x86-64")
    contestant.run(10)
    seconds = min(timing.read(contestant.run, 10).wall for _ in range(5)) / 10
    assert 0.2e9 < clock.CYCLES_PER_CALL / seconds < 10e9


# --- Bars and default orders


def test_bars_are_about_things_that_are_measured():
    default = cases.choose(cases.FUNCTIONS, cases.DTYPES, None)
    for bar in bars.BARS:
        case = cases.Case(bar.function, bar.shape, bar.dtype)
        assert case in default
        assert bar.order in cases.orders(case)
        assert bar.kind in bars.KINDS and bar.threshold > 1
        assert bar.against in ("jax.nn", "fastest", *peers.PEERS)
        if bar.kind == "bound":
            assert bar.function in instructions.FUNCTORS
        if bar.kind == "scaling":
            assert scaling.choose([case]) == [case] and bar.threads == 2
    assert len(set(bars.BARS)) == len(bars.BARS)


def entry_of(bar, figure, other=None):
    """A result's entry at which the bar's figure is `figure`, with orders 3, 4 and 5."""
    shape = list(bar.shape)
    ratio = {"median": figure, "low": figure, "high": figure}
    slow = {"median": 2 * figure, "low": 2 * figure, "high": 2 * figure}
    ours = {
        "ns_per_element": 1.0,
        "relative_error": 1e-4,
        "cycles_per_16": 2.0 * figure,
        "bound_cycles_per_16": 2.0,
    }
    return {
        "function": bar.function,
        "shape": shape,
        "dtype": bar.dtype,
        "copy": "copy (XLA)",
        "traffic": 2.0,
        "contestants": {
            f"order {bar.order}": ours,
            "copy (XLA)": {"ns_per_element": figure / 200},
        },
        "ratios": {f"order {bar.order}": {other or "jax.nn": ratio, "torch": slow}},
        "speedup": ratio,
    }


def result_of(bar, figure, **conditions):
    entry = entry_of(bar, figure)
    return {
        "environment": {"threads": bar.threads, "isa": bar.isa, **conditions},
        "cases": [entry],
        "scaling": [entry],
        "call_overhead": None,
    }


@pytest.mark.parametrize("bar", {bar.kind: bar for bar in bars.BARS}.values(), ids=lambda b: b.kind)
def test_bars_are_judged_by_their_threshold(bar):
    def met(figure):
        judged = {verdict["name"]: verdict for verdict in bars.judge(result_of(bar, figure))}
        assert judged[bar.name]["figure"] == pytest.approx(figure)
        return judged[bar.name]["met"]

    above, below = met(1.01 * bar.threshold), met(0.99 * bar.threshold)
    assert (above, below) == ((False, True) if bar.kind == "bound" else (True, False))


def test_bars_are_judged_under_their_conditions_alone():
    for bar in bars.BARS:
        conditions = {"threads": 3 - bar.threads} if bar.kind == "scaling" else {"isa": "neon"}
        names = [verdict["name"] for verdict in bars.judge(result_of(bar, 9.0, **conditions))]
        assert bar.name not in names


def test_extensions_of_an_instruction_set_are_judged_by_its_bars():
    bar = bars.BARS[0]
    assert bars.judge(result_of(bar, 9.0, isa=f"{bar.isa}bf16"))


def test_call_overhead_is_judged():
    result = result_of(bars.BARS[0], 9.0)
    result["call_overhead"] = {"tanh": {"difference_us": bars.CALL_OVERHEAD_US * 2}}
    assert bars.judge(result)[-1]["met"] is False


def test_what_was_not_measured_is_not_judged():
    for bar in bars.BARS:
        result = result_of(bar, 9.0)
        for case in result["cases"]:
            case["contestants"], case["ratios"] = {}, {}
        assert bar.kind == "scaling" or bars.judge(result) == []


def test_the_fastest_of_the_others_is_compared_with():
    ratios = {"jax.nn": {"median": 3.0}, "torch": {"median": 2.0}}
    assert figures.fastest(ratios) == ("torch", {"median": 2.0})
    assert figures.fastest({}) is None


@pytest.mark.parametrize(
    ("fourth", "fifth", "default"), [(1.3, 1.4, 3), (1.04, 1.2, 4), (1.2, 1.05, 5)]
)
def test_the_default_is_the_highest_order_that_costs_little(fourth, fifth, default):
    def case(function, shape):
        times = {"order 3": 1.0, "order 4": fourth, "order 5": fifth}
        return {
            "function": function,
            "shape": list(shape),
            "dtype": "float32",
            "relative_times": {name: {"median": time} for name, time in times.items()},
        }

    decided = defaults.decide([case("exp", cases.L2_SHAPE), case("tanh", cases.VIT_SHAPE)])
    assert [(one["function"], one["default"]) for one in decided] == [("exp", default)]


def test_the_default_needs_all_candidates():
    case = {
        "function": "exp",
        "shape": list(cases.L2_SHAPE),
        "dtype": "float32",
        "relative_times": {"order 3": {"median": 1.0}, "order 5": {"median": 1.0}},
    }
    assert defaults.decide([case]) == []


# --- Threads


def test_workers_with_one_and_two_threads_take_turns():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    script = (
        "from benchmarks import scaling\n"
        "from benchmarks.cases import Case\n"
        "import json\n"
        "if __name__ == '__main__':\n"
        "    cases = [Case('exp', (64, 64), 'float32'), Case('softmax', (8, 64), 'float32')]\n"
        "    print(json.dumps(scaling.measure(cases, rounds=3, target=1e-4)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert [entry["function"] for entry in measured] == ["exp", "softmax"]
    for entry in measured:
        assert [len(entry["seconds"][threads]) for threads in "12"] == [3, 3]
        assert entry["speedup"]["low"] <= entry["speedup"]["median"] <= entry["speedup"]["high"]


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
    assert once.startswith("# Kept\n") and "float16: ns per element" in once
    assert "tanh 4×64" in once
    report.to_markdown(result, page)
    assert page.read_text() == once
    # A full run decides defaults too.
    times = {name: {"low": 1.0, "median": 1.0, "high": 1.0} for name in ("order 3", "order 4")}
    result["default_orders"] = [{"function": "tanh", "times": times, "default": 4}]
    assert ["tanh", "1.00 (1.00–1.00)", "1.00 (1.00–1.00)", "4"] in report.tables(result)[-1][1]


def test_plots_are_small_files(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    entry = {"ns_per_element": 0.2, "relative_error": 1e-4}
    slow = {"ns_per_element": 20.0, "relative_error": 1e-7}  # its bar is cut
    copy = {"ns_per_element": 0.1}
    result = {
        "environment": {"threads": 1, "isa": "avx512", "cpu": "a CPU"},
        "cases": [
            {
                "function": case.function,
                "shape": list(case.shape),
                "dtype": case.dtype,
                "copy": "copy (NumPy)",
                "traffic": case.traffic,
                "contestants": {"order 3": entry, "jax.nn": slow, "copy (NumPy)": copy},
            }
            for case in cases.choose(cases.FUNCTIONS, ["float32"], None)
        ],
    }
    written = plots.draw(result, tmp_path / "plots")
    assert [path.name.split("_")[1] for path in written] == ["time", "large", "error"]
    assert all(0 < path.stat().st_size < 200_000 for path in written)
