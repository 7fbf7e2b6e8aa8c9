"""Tests of `python -m benchmarks models`: its models, its arithmetic, and tiny runs.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
from collections import Counter

import jax
import numpy as np
import pytest

import quake_jax
import quake_jax.linen
from benchmarks.harness import bars, errors, pages, timing
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import Settings
from benchmarks.harness.peers import TORCH
from benchmarks.models import (
    cases,
    flax_models,
    goals,
    measure,
    memory,
    profile,
    report,
    systems,
)
from benchmarks.models.cases import (
    ACCELERATE,
    CALIBRATED,
    CASES,
    CEILING,
    FLAX,
    INTERCEPTOR,
    PACKED,
    PARTS,
    PEERS,
    STATIC,
    SYSTEMS,
)

needs_accelerate = pytest.mark.skipif(
    not (hasattr(quake_jax, "accelerate") and hasattr(quake_jax.linen, "interceptor")),
    reason="this quake_jax has no accelerate",
)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
OTHERS = [name for name in PEERS if name not in (TORCH, cases.FLAX_BFLOAT16)]


def small(name, dtype="float32"):
    (case,) = cases.choose([name], dtype, quick=True)
    return case


@functools.cache
def setting_of(case):
    """Weights take a second to draw: they are drawn once."""
    return systems.Setting(case)


# --- Cases and models


def test_a_run_has_the_named_cases():
    chosen = cases.choose(["vit-ti16-1", "bert-8x128"], "bfloat16", False)
    assert [case.label for case in chosen] == ["bert-8x128 bfloat16", "vit-ti16-1 bfloat16"]
    assert cases.choose(CASES, "float32", False) == list(CASES.values())
    assert len(CASES) == len(cases._ALL)


def test_padded_texts_have_from_half_to_all_of_the_tokens():
    assert CASES["bert-8x384"].lengths == [192, 219, 246, 274, 301, 329, 356, 384]
    assert CASES["gpt2-prefill-128"].lengths == [128]
    _, is_token = flax_models.inputs(small("bert-8x384"))
    assert is_token.sum(axis=1).tolist() == [16, 32]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2-prefill-1024", 124_439_808),
        # Without the pooling layers, which a language model's vectors do not pass.
        ("bert-8x384", 109_482_240 - 768 * 769),
        ("minilm-32x128", 22_713_216 - 384 * 385),
        ("vit-b16-8", 86_567_656),
        ("vit-ti16-8", 5_717_416),
    ],
)
def test_models_have_as_many_parameters_as_the_published_ones(name, published):
    case = CASES[name]
    module = flax_models.module(case)
    made = jax.eval_shape(module.init, jax.random.key(0), *flax_models.inputs(case))
    assert sum(x.size for x in jax.tree.leaves(made["params"])) == published


def test_a_decoded_token_is_the_next_one_of_a_prefill():
    """The cached form is the same model: filled token by token, it gives the prefill's logits."""
    whole, step = small("gpt2-prefill-128"), small("gpt2-decode-1024")
    prefill, one = setting_of(whole), setting_of(step)
    tokens, positions = prefill.inputs
    cache = jax.tree.map(np.zeros_like, one.cache)
    forward = jax.jit(one.forward())
    for t in range(whole.length):
        token = tokens[:, t : t + 1], positions[:, t : t + 1]
        logits, cache = forward(prefill.parameters, cache, *token)
    wanted, _ = jax.jit(prefill.forward())(prefill.parameters, {}, *prefill.inputs)
    assert systems.difference(np.asarray(logits), np.asarray(wanted)) < 1e-5


def test_a_decoding_model_starts_with_one_place_left_in_its_cache():
    setting = setting_of(small("gpt2-decode-1024"))
    indices = [x for x in jax.tree.leaves(setting.cache) if not x.ndim]
    assert [int(index) for index in indices] == [31, 31]
    assert setting.inputs[0].shape == (1, 1) and int(setting.inputs[1][0, 0]) == 31
    # A call may be given the cache to keep: the next one gets another.
    assert setting.arguments[1] is not setting.cache


# --- Systems


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


@pytest.mark.parametrize("name", [FLAX, ACCELERATE])
def test_the_weights_are_arguments_of_the_program(name):
    setting = setting_of(small("vit-ti16-1"))
    function = systems.TRANSFORMS[name](setting.forward())
    traced = jax.jit(function).trace(*setting.arguments)
    assert len(traced.jaxpr.jaxpr.invars) == len(jax.tree.leaves(setting.arguments))
    assert sum(np.size(x) for x in traced.jaxpr.consts) < 1000


def test_memory_is_what_a_call_allocates():
    def call():
        return len([np.ones(4_000_000, np.float32), np.ones(4_000_000, np.float32)])

    result, grown = memory.growth(call)
    assert result == 2
    assert grown is None or 30e6 < grown < 40e6


def test_memory_is_unknown_without_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "none")
    assert memory.growth(lambda: 1) == (1, None)


@pytest.mark.parametrize("name", ["gpt2-prefill-128", "gpt2-decode-1024", "minilm-32x128"])
def test_the_ceiling_keeps_all_products_but_those_of_attention(name):
    setting = setting_of(small(name))

    def found(system):
        function = systems.TRANSFORMS[system](setting.forward())
        return Counter(primitives(jax.make_jaxpr(function)(*setting.arguments).jaxpr))

    before, after = found(FLAX), found(CEILING)
    assert before["dot_general"] - after["dot_general"] == 2 * setting.case.sizes.layers
    assert {"exp", "tanh", "erfc", "erf"} & set(before)
    assert not {"exp", "tanh", "erfc", "erf"} & set(after)
    # Outside, everything is as it was.
    assert found(FLAX) == before


@needs_torch
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gpt2-prefill-128", "float32"),
        ("gpt2-decode-1024", "float32"),
        ("minilm-32x128", "float32"),
        ("vit-b16-8", "float32"),
        ("bert-8x128", "bfloat16"),
    ],
)
def test_torch_computes_the_same(name, dtype):
    from benchmarks.models import torch_models

    case = small(name, dtype)
    setting = setting_of(case)
    result, _ = jax.jit(setting.forward())(*setting.arguments)
    torch_result = torch_models.build(setting, TORCH, 1).result
    difference = systems.difference(torch_result, np.asarray(result, np.float32))
    assert 0 < difference < systems.tolerance(case, TORCH)


@pytest.mark.parametrize("model", ["gpt2-decode-1024", "minilm-32x128", "vit-b16-8"])
@pytest.mark.parametrize("name", [n for n in OTHERS if n[:4] == "onnx" or n[:4] == "open"])
def test_other_libraries_compute_the_same(name, model):
    case = small(model)
    if reason := cases.not_for(name, case) or measure.cannot_run(name):
        pytest.skip(reason)
    setting, built = setting_of(case), {}
    for one in (FLAX, name):
        measure._add(built, setting, one, 1)
    assert name == STATIC or name in built  # calibrated, so small a model is further off
    if name in built:
        assert 0 < built[name].difference["difference"]
        for calls in (40, 1, 2):  # a decoding one starts over
            built[name].run(calls)


@pytest.mark.parametrize("name", cases.ATTENTION)
def test_a_cache_in_low_precision_stays_full(name):
    setting, built = setting_of(small("gpt2-decode-1024")), {}
    for one in (FLAX, name):
        assert measure._add(built, setting, one, 1) is None  # its result is right
    cached = setting.with_cache(cases.ATTENTION[name])
    function, cache = jax.jit(cached.forward()), cached.cache
    for _ in range(2):  # of a cache that grows the second would be NaN
        result, cache = function(cached.parameters, cache, *cached.inputs)
        assert np.isfinite(np.asarray(result)).all()


def test_systems_are_chosen_by_their_weights():
    assert cases.systems(None, None) == list(SYSTEMS)
    of_int8 = [name for name, weights in (PACKED | PEERS).items() if weights == "int8"]
    assert cases.systems(None, ["int8"]) == [FLAX, *of_int8]
    assert cases.systems([TORCH], ["int8"]) == [FLAX, TORCH]
    assert set(cases.systems(None, ["int4", "bfloat16"])) > {"pack-int4", "pack-bfloat16"}


def test_who_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(measure, "missing", lambda *names: [n for n in names if n != "torch"])
    monkeypatch.setattr(measure.peers, "cpu_has", lambda *flags: False)
    reasons = {name: measure.cannot_run(name) for name in SYSTEMS}
    assert not any(reasons[name] for name in SYSTEMS if name not in OTHERS)
    assert reasons["onnxruntime"] == "onnxruntime and onnx not installed"
    assert reasons["openvino-int8"] == "openvino and nncf not installed"
    assert reasons["zentorch-bfloat16"] == "zentorch not installed"
    assert "without instructions" in reasons["torch-bfloat16"]
    monkeypatch.setattr(measure, "missing", lambda *names: [])
    monkeypatch.setattr(measure.peers, "cpu_has", lambda *flags: True)
    assert not any(measure.cannot_run(name) for name in SYSTEMS)
    peers = [name for name in SYSTEMS if measure.cannot_run(name, "bfloat16")]
    assert peers == [name for name in PEERS if name != TORCH]


def test_a_peer_that_fails_or_is_wrong_is_left_out(monkeypatch):
    case, right = small("vit-ti16-1"), np.linspace(-1, 1, 50, dtype=np.float32)
    results = {FLAX: right, ACCELERATE: right, TORCH: right * 1.001, "onnxruntime": right}

    def build(setting, name, threads):
        if name == "openvino":
            raise RuntimeError("no such operator\nat some line")
        return systems.System(name, lambda calls: None, results[name])

    monkeypatch.setattr(measure, "_build", build)
    monkeypatch.setattr(systems, "explained", lambda setting: {"replaced": {}, "left": {}})
    left_out, wanted = {}, [*results, "openvino", "onnxruntime-int4"]
    settings = Settings(1, 1e-5)
    entry = measure.measure_case(case, wanted, settings, lambda share: None, left_out)
    assert list(entry["contestants"]) == [FLAX, ACCELERATE, "onnxruntime"]
    at = "at vit-ti16-1"
    assert "differs by 0.001, may by" in left_out.pop(f"torch {at}")
    assert left_out == {
        f"openvino {at}": "RuntimeError: no such operator",
        f"onnxruntime-int4 {at}": "its fused attention has no 4 bits",
    }


@needs_accelerate
def test_systems_are_measured_together():
    case = small("bert-8x128")
    wanted = [one for one in SYSTEMS if one != TORCH and one not in OTHERS]
    shares = []
    entry = measure.measure_case(case, wanted, Settings(2, 1e-5), shares.append)
    assert sum(shares) == pytest.approx(1)
    assert list(entry["contestants"]) == wanted
    assert entry["replaced"] == {"dot_product_attention": 2, "bias_gelu": 2}
    assert entry["left"] == {}
    for system, one in entry["contestants"].items():
        assert 0 < one["ms"]["low"] <= one["ms"]["median"] <= one["ms"]["high"]
        assert one["trace_seconds"] > 0 and one["compile_seconds"] > 0
        assert ("difference" in one) == (system not in (FLAX, CEILING))
        if system in (PARTS, ACCELERATE, INTERCEPTOR):
            assert 0 < one["difference"] <= one["tolerance"] < 1e-3
    assert json.dumps(entry)


def test_wrong_results_end_the_run():
    case, right = small("vit-ti16-1"), np.linspace(-1, 1, 50, dtype=np.float32)

    def checked(result):
        return measure.checked(case, ACCELERATE, result, right)

    tolerance = systems.tolerance(case, ACCELERATE)
    near = checked(right * (1 + 0.9 * tolerance))
    assert near == {"difference": pytest.approx(0.9 * tolerance, rel=1e-2), "tolerance": tolerance}
    for wrong in (right * (1 + 1.1 * tolerance), np.full_like(right, np.nan)):
        with pytest.raises(BenchmarkError, match="accelerate is wrong at vit-ti16-1 float3"):
            checked(wrong)


def test_tolerances_grow_with_the_bounds_of_what_is_replaced():
    case = CASES["bert-8x384"]
    torch, ours, parts = (systems.tolerance(case, n) for n in (TORCH, ACCELERATE, PARTS))
    assert 0 < torch < ours < parts < 1e-2
    half = dataclasses.replace(case, dtype="bfloat16")
    assert systems.tolerance(half, TORCH) == 12 * 2.0**-7
    assert systems.tolerance(case, "torch-bfloat16") == 12 * 2.0**-7
    assert systems.tolerance(case, "torch-compiled") == torch
    by_bits = [systems.tolerance(case, f"openvino-{bits}") for bits in ("bfloat16", "int8", "int4")]
    assert by_bits == sorted(by_bits)


def test_an_older_quake_jax_is_one_line(monkeypatch):
    monkeypatch.delattr(quake_jax, "accelerate", raising=False)
    with pytest.raises(BenchmarkError, match="no accelerate"):
        errors.quake_jax("accelerate")


# --- Times


def test_instructions_have_kinds():
    program = """
  %quake_dense.3 = (f32[1,8]) custom-call(%x), custom_call_target="quake_jax_dense", api_version=4
  %quake_packed.1 = f32[8] custom-call(%x), custom_call_target="quake_jax_dot_product_attention"
  %norm = f32[8] custom-call(%x), custom_call_target="quake_jax_layer_norm"
  %transpose_copy_fusion.2 = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused
  ROOT %add_fusion = f32[8]{0} fusion(%y), kind=kLoop, calls=%fused
"""
    kinds = profile.DENSE, profile.ATTENTION, profile.OTHERS, profile.COPIES, profile.XLA
    assert tuple(profile.kinds_of(program).values()) == kinds


def test_a_loop_does_not_count_what_its_body_does():
    events = [("loop", 0, 100), ("a", 10, 20), ("inner", 40, 50), ("b", 45, 5), ("a", 100, 7)]
    assert profile.own_times(events) == {"loop": 30, "a": 27, "inner": 45, "b": 5}


@needs_accelerate
def test_a_profile_is_of_the_whole_time():
    system = systems.build(setting_of(small("bert-8x128")), "pack-int8")
    shares = profile.shares(system)
    assert list(shares) == list(profile.KINDS)
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[kind] for kind in (profile.DENSE, profile.ATTENTION, profile.XLA)) > 0


def test_the_rounds_are_compared():
    times = {
        FLAX: [4.0, 8.0],
        ACCELERATE: [2.0, 4.0],
        INTERCEPTOR: [2.2, 4.0],
        CEILING: [1.0, 4.0],
        TORCH: [3.0, 8.0],
    }
    made = measure.compare(times)
    assert {name: one["median"] for name, one in made["speed"].items()} == pytest.approx(
        {ACCELERATE: 2, INTERCEPTOR: (4 / 2.2 + 2) / 2, CEILING: 3, TORCH: (4 / 3 + 1) / 2}
    )
    assert made["over_ours"][TORCH]["median"] == pytest.approx(1.75)
    assert made["share"]["median"] == pytest.approx((2 / 3 + 1) / 2)


def test_there_is_no_share_without_a_ceiling_below_the_model():
    times = {FLAX: [4.0, 8.0], ACCELERATE: [2.0, 4.0], CEILING: [1.0, 8.0]}
    assert measure.compare(times)["share"] is None
    assert measure.compare({FLAX: [4.0], ACCELERATE: [2.0]})["share"] is None
    assert measure.compare({FLAX: [4.0], CEILING: [2.0]})["over_ours"] == {}


def test_disturbed_readings_are_repeated_as_often_as_asked(monkeypatch):
    monkeypatch.setattr(timing, "disturbance", lambda reading, max_faults: "preempted")
    calls = []
    contestant = timing.Contestant("x", calls.append, calls=1)
    (series,) = timing.measure([contestant], rounds=1, target=0.0, threads=1, attempts=3).values()
    assert (len(calls), series.doubtful, series.rejected["preempted"]) == (3, 1, 3)


# --- Bars and tables


def entry_of(bar, figure):
    """A result's case at which the bar's figure, and every other, is `figure`."""
    one = {
        "ms": {"low": 1.0, "median": 1.0, "high": 1.0},
        "memory_bytes": 2_000_000,
        "trace_seconds": 1.0,
        "compile_seconds": 1.0,
        "difference": 1e-5,
        "doubtful": 0,
        "rejected": {"faults": 0, "preempted": 0},
    }
    ratio = {"low": figure, "median": figure, "high": figure}
    return {
        "model": bar.case.name,
        "title": bar.case.title,
        "dtype": "float32",
        "replaced": {"dot_product_attention": 12},
        "left": {},
        "contestants": {
            name: {**one, "trace_seconds": 1.0 + figure} if name == ACCELERATE else one
            for name in SYSTEMS
        },
        "speed": {name: ratio for name in SYSTEMS if name != FLAX},
        "over_ours": {name: ratio for name in SYSTEMS if name != ACCELERATE},
        "ratios": {
            ours: {name: ratio for name in PEERS if PEERS[name] == PACKED[ours]} for ours in PACKED
        },
        "share": {name: value / 100 for name, value in ratio.items()},
        "profile": {"pack-int8": dict.fromkeys(profile.KINDS, 1 / 6)},
    }


def result_of(bar, figure, **conditions):
    made = {"threads": 1, "isa": bar.isa, "cpu": "a CPU", "versions": {}, "date": "today"}
    return {
        "benchmark": "models, float32",
        "environment": {**made, "commit": None, **conditions},
        "settings": {
            "dtype": "float32",
            "rounds": 3,
            "reading_seconds": 0.1,
            "allocator": "keep",
        },
        "left_out": {},
        "cases": [entry_of(bar, figure)],
        "bars": [],
        "bars_not_judged": {},
    }


def test_bars_are_about_things_that_are_measured():
    assert all(bar.case in CASES.values() for bar in goals.BARS)
    assert len(set(goals.BARS)) == len(goals.BARS)
    assert set(cases.MEANING) == set(SYSTEMS) == set(systems.TRANSFORMS) | set(PACKED) | set(PEERS)


@pytest.mark.parametrize(
    "bar",
    {bar.kind: bar for bar in goals.BARS}.values(),
    ids=lambda bar: bar.kind.what,
)
def test_bars_are_judged_by_their_threshold(bar):
    def met(factor):
        judged = goals.judge(result_of(bar, factor * bar.threshold))
        (verdict,) = (
            verdict
            for verdict in judged
            if (verdict["name"], verdict["threshold"]) == (bar.name, bar.threshold)
        )
        assert verdict["figure"] == pytest.approx(factor * bar.threshold)
        return verdict["met"]

    at_least = bar.kind.at_least
    assert (met(1.01), met(0.99)) == (at_least, not at_least)


def test_bars_are_judged_under_their_conditions_alone():
    for bar in goals.BARS:
        assert goals.judge(result_of(bar, 9.0, isa="avx2")) == []
        assert goals.judge(result_of(bar, 9.0, threads=2)) == []
        judged = goals.judge(result_of(bar, 9.0, isa="avx512bf16"))
        assert bar.name in [verdict["name"] for verdict in judged]
        half = result_of(bar, 9.0)
        half["settings"]["dtype"] = "bfloat16"
        assert goals.judge(half) == []


def test_the_fastest_peer_is_one_that_quantises_in_the_call():
    case = {"ratios": {"pack-int8": {"openvino-int8": {"median": 1.4}, STATIC: {"median": 0.9}}}}
    case["ratios"][CALIBRATED] = case["ratios"]["pack-int8"]
    assert goals.fastest(case, "pack-int8") == (1.4, "openvino-int8")
    assert goals.fastest(case, CALIBRATED) == (0.9, STATIC)
    assert goals.fastest(case, "pack-int4") is None


def test_the_mean_against_accelerate_needs_every_model():
    those, _ = goals.MEANS["pack-float32 against accelerate"]
    result = result_of(those[0], 1 / 1.1)
    assert not [one for one in goals.judge(result) if "mean" in one["name"]]
    result["cases"] = [entry_of(bar, 1 / 1.1) for bar in those]
    (mean,) = (one for one in goals.judge(result) if "mean" in one["name"])
    assert mean["figure"] == pytest.approx(1.1) and mean["met"]


def test_bars_for_other_instructions_are_counted():
    remark = "Bars not judged, which need other instructions: "
    result = result_of(goals.BARS[0], 1.5, isa="avx2", isa_forced=False)
    result["bars_not_judged"] = bars.not_judged(goals.BARS, result)
    assert sum(result["bars_not_judged"].values()) == len(goals.BARS)
    (said,) = (line for line in report.remarks(result) if line.startswith(remark))
    assert said.endswith("for avx512bf16.")


def test_what_was_not_measured_is_not_judged():
    for bar in goals.BARS:
        result = result_of(bar, 9.0)
        for case in result["cases"]:
            case.update(contestants={}, speed={}, over_ours={}, ratios={}, share=None)
        assert goals.judge(result) == []


def test_tables_show_what_was_measured():
    result = result_of(goals.BARS[0], 1.5)
    result["bars"] = goals.judge(result)
    titles = [title.partition(",")[0] for title, _ in report.tables(result)]
    assert titles[:3] == ["Time", "Time", "Speed"]
    times, others, speeds, packed, shares, memory, theirs, programs, differences, _, judged = (
        dict(_columns(rows)) for _, rows in report.tables(result)
    )
    assert times["flax"] == ["1.00"] and times["ceiling (not a model)"] == ["1.00"]
    assert not set(others) & set(times) - {"model"} and others[STATIC] == ["1.00"]
    assert shares["weights"] == ["int8"] and shares["dense layers"] == ["17 %"]
    named = ["int8, calibrated", "int8, attention", "int4, attention"]
    assert packed["weights"] == [*cases.WEIGHTS, *named]
    assert packed["fastest peer of the same precision / ours"][2] == "1.50 onnxruntime-int8"
    assert packed["fastest peer of the same precision / ours"][4] == f"1.50 {STATIC}"
    assert packed[f"{STATIC} / ours"] == ["–", "–", "1.50", "–", "1.50", "1.50", "–"]
    assert speeds["accelerate (quartiles)"] == ["1.50 (1.50–1.50)"]
    assert speeds["torch / accelerate"] == ["1.50"] and speeds["share of the ceiling"] == ["2 %"]
    assert memory["accelerate"] == theirs["torch"] == ["2"]
    assert programs["calls put in"] == ["12 dot_product_attention"] and "left" not in programs
    assert programs["traced, s"] == ["1.00 → 2.50"] and programs["compiled, s"] == ["1.00 → 1.00"]
    assert differences["interceptor"] == ["1.0e-05"]
    assert {"met", "MISSED"} == set(judged[""])
    assert any("random" in line for line in report.remarks(result))


def _columns(rows):
    return [(column[0], list(column[1:])) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("names", [(FLAX,), (FLAX, ACCELERATE), (FLAX, TORCH), (FLAX, CEILING)])
def test_tables_do_without_the_other_systems(names):
    result = copy.deepcopy(result_of(goals.BARS[0], 1.5))
    (case,) = result["cases"]
    case["contestants"] = {name: case["contestants"][name] for name in names}
    case.update(measure.compare({name: [1.0, 2.0] for name in names}), replaced={}, left={})
    for _, rows in report.tables(result):
        assert len({len(row) for row in rows}) == 1
        assert len(rows[0]) > 1
    assert report.remarks(result)


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.harness import plots
    from benchmarks.models import plots as models_plots

    assert set(models_plots.COLOURS) == set(SYSTEMS)
    (path,) = plots.draw(result_of(goals.BARS[0], 1.5), models_plots, tmp_path / "plots")
    assert path.name == "models_float32_avx512_t1.png" and path.stat().st_size > 1000


# --- The command


@needs_accelerate
def test_a_quick_run_from_end_to_end(run_benchmarks, tmp_path):
    path, page = tmp_path / "models.json", tmp_path / "models.md"
    page.write_text("# Kept\n")
    options = ["--quick", "--model", "vit-ti16-1", "--system", ACCELERATE]
    done = run_benchmarks("models", *options, "--json", str(path), "--markdown", str(page))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["environment"]["versions"]["flax"]
    assert list(result["cases"][0]["contestants"]) == [FLAX, ACCELERATE]
    assert result["bars"] == []  # a quick run proves nothing
    # The page: the old text stays, a second run replaces the first one's section.
    once = page.read_text()
    assert once.startswith("# Kept\n") and "### Models, float32, one thread" in once
    assert "2 dot_product_attention, 2 bias_gelu" in once
    made = pages.Page(report.HEADING, report.tables(result), report.remarks(result))
    pages.to_markdown(result, made, page)
    assert page.read_text() == once
