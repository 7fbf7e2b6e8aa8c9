"""Tests of `python -m benchmarks ops`: its contestants, its arithmetic, and a tiny run.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.harness import errors, pages
from benchmarks.ops import (
    cases,
    goals,
    instructions,
    measure,
    peers,
    report,
    systems,
)
from benchmarks.ops.operators import FUNCTIONS, OPERATORS
from quake_jax._elementwise import table

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


@pytest.mark.parametrize("function", FUNCTIONS)
def test_all_contestants_compute_the_same_function(function):
    buffers = systems.Buffers(cases.Case(function, (5, 70), "float32"))
    others = peers.Peers(threads=1).contestants(buffers, target=1e-5)
    for contestant in [systems.quake(buffers, 5), systems.jax_nn(buffers), *others]:
        buffers.target[...] = 0
        contestant.run(1)
        assert buffers.error() < 1e-3, contestant.name


def test_every_function_of_the_package_is_measured():
    """A new row needs one here too: what it is in the other libraries."""
    assert set(table.FUNCTIONS) <= set(FUNCTIONS)


def test_errors_are_large_for_another_function():
    buffers = systems.Buffers(cases.Case("gelu_erf", (5, 70), "float32"))
    wrong = OPERATORS["silu"].exact(*buffers.sources)
    assert systems.relative_error("gelu_erf", buffers._exact, wrong) > 0.1


def test_copies_of_functions_with_unlike_arrays_have_arrays_of_their_own():
    for function in ("logsumexp", "glu"):
        buffers = systems.Buffers(cases.Case(function, (3, 32), "float32"))
        for copy in systems.copies(systems.for_copies(buffers)):
            copy.run(1)
    assert cases.Case("glu", (3, 32), "float32").traffic == 1.5
    assert cases.Case("logsumexp", (3, 32), "float32").traffic == pytest.approx(0.5, rel=0.1)


def test_a_library_without_an_operator_takes_no_part():
    found = peers.Peers(threads=1, wanted=())
    found._makers["other"] = lambda buffers: None
    buffers = systems.Buffers(cases.Case("tanh", (2, 8), "float32"))
    assert found.contestants(buffers, target=1e-5) == []


def test_missing_peers_are_left_out_with_a_word(monkeypatch):
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
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


# --- Bars and default orders


def test_bars_are_about_things_that_are_measured():
    default = cases.choose(FUNCTIONS, cases.DTYPES, None)
    for bar in goals.BARS:
        assert bar.case in default
        assert int(bar.subject.removeprefix("order ")) in cases.orders(bar.case)
        assert bar.threshold > 1
        if bar.kind == goals.BOUND:
            assert bar.case.operator.functor
        if bar.kind == goals.SCALING:
            assert measure.scaled([bar.case]) == [bar.case] and bar.threads == 2
    assert len(set(goals.BARS)) == len(goals.BARS)


def entry_of(bar, figure, other=None):
    """A result's entry at which the bar's figure is `figure`, with orders 3, 4 and 5."""
    ratio = {"median": figure, "low": figure, "high": figure}
    slow = {"median": 2 * figure, "low": 2 * figure, "high": 2 * figure}
    ours = {
        "ns": {"median": 1.0},
        "relative_error": 1e-4,
        "cycles_per_16": 2.0 * figure,
        "bound_cycles_per_16": 2.0,
    }
    return {
        "function": bar.case.function,
        "shape": list(bar.case.shape),
        "dtype": bar.case.dtype,
        "copy": "copy (XLA)",
        "traffic": 2.0,
        "contestants": {
            bar.subject: ours,
            "copy (XLA)": {"ns": {"median": figure / 200}},
        },
        "ratios": {bar.subject: {other or "jax.nn": ratio, "torch": slow}},
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


@pytest.mark.parametrize(
    "bar", {bar.kind: bar for bar in goals.BARS}.values(), ids=lambda bar: bar.kind.what
)
def test_bars_are_judged_by_their_threshold(bar):
    def met(figure):
        judged = {verdict["name"]: verdict for verdict in goals.judge(result_of(bar, figure))}
        assert judged[bar.name]["figure"] == pytest.approx(figure)
        return judged[bar.name]["met"]

    above, below = met(1.01 * bar.threshold), met(0.99 * bar.threshold)
    assert (above, below) == ((False, True) if not bar.kind.at_least else (True, False))


def test_bars_are_judged_under_their_conditions_alone():
    for bar in goals.BARS:
        conditions = {"threads": 3 - bar.threads} if bar.kind == goals.SCALING else {"isa": "neon"}
        names = [verdict["name"] for verdict in goals.judge(result_of(bar, 9.0, **conditions))]
        assert bar.name not in names


def test_extensions_of_an_instruction_set_are_judged_by_its_bars():
    bar = goals.BARS[0]
    assert goals.judge(result_of(bar, 9.0, isa=f"{bar.isa}bf16"))


def test_call_overhead_is_judged():
    result = result_of(goals.BARS[0], 9.0)
    cost = {"16": {"difference": {"median": goals.CALL_OVERHEAD_US * 2}}}
    result["call_overhead"] = dict.fromkeys(goals.JUDGED_CALLS, cost)
    assert goals.judge(result)[-1]["met"] is False


def test_what_was_not_measured_is_not_judged():
    for bar in goals.BARS:
        result = result_of(bar, 9.0)
        for case in result["cases"]:
            case["contestants"], case["ratios"] = {}, {}
        assert bar.kind == goals.SCALING or goals.judge(result) == []


def test_the_fastest_of_the_others_is_compared_with():
    ratios = {"jax.nn": {"median": 3.0}, "torch": {"median": 2.0}}
    assert goals.fastest(ratios) == ("torch", {"median": 2.0})
    assert goals.fastest({}) is None


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

    decided = goals.default_orders([case("exp", cases.L2_SHAPE), case("tanh", cases.VIT_SHAPE)])
    assert [(one["function"], one["default"]) for one in decided] == [("exp", default)]


def test_the_default_needs_all_candidates():
    case = {
        "function": "exp",
        "shape": list(cases.L2_SHAPE),
        "dtype": "float32",
        "relative_times": {"order 3": {"median": 1.0}, "order 5": {"median": 1.0}},
    }
    assert goals.default_orders([case]) == []


# --- The command


def test_a_quick_run_from_end_to_end(run_benchmarks, tmp_path):
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
            assert {"ns", "rejected", "doubtful", "cpu_per_wall"} <= set(entry)
            assert entry["ns"]["low"] <= entry["ns"]["median"] <= entry["ns"]["high"]
        assert set(case["ratios"]["order 3"]["jax.nn"]) == {"low", "median", "high"}
    assert set(result["call_overhead"]) == {"tanh", "softmax"}
    assert result["bars"] == []  # a quick run proves nothing
    # The page: the old text stays, a second run replaces the first one's section.
    once = page.read_text()
    assert once.startswith("# Kept\n") and "float16: ns per element" in once
    assert "tanh 4×64" in once
    made = pages.Page(report.HEADING, report.tables(result), report.remarks(result))
    pages.to_markdown(result, made, page)
    assert page.read_text() == once
    # A full run decides defaults too.
    times = {name: {"low": 1.0, "median": 1.0, "high": 1.0} for name in ("order 3", "order 4")}
    result["default_orders"] = [{"function": "tanh", "times": times, "default": 4}]
    assert ["tanh", "1.00 (1.00–1.00)", "1.00 (1.00–1.00)", "4"] in report.tables(result)[-1][1]


def test_plots_are_small_files(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.harness import plots
    from benchmarks.ops import plots as ops_plots

    times = ({"low": 0.9 * ns, "median": ns, "high": 1.1 * ns} for ns in (0.2, 20.0, 0.1))
    entry, slow, copy = ({"ns": ns, "relative_error": 1e-4} for ns in times)  # slow: a cut bar
    del copy["relative_error"]
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
            for case in cases.choose(FUNCTIONS, ["float32"], None)
        ],
    }
    written = plots.draw(result, ops_plots, tmp_path / "plots")
    assert [path.name.split("_")[1] for path in written] == ["time"]
    assert all(0 < path.stat().st_size < 200_000 for path in written)
