"""Tests of `python -m benchmarks attention`: its cases, its arithmetic, and tiny runs.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import quake_jax

ROOT = Path(__file__).resolve().parent.parent
# benchmarks is not installed; at the end of the path, the folder hides nothing that is.
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    attention,
    attention_cases,
    attention_report,
    attention_systems,
    ceilings,
    report,
    timing,
)
from benchmarks.attention_cases import MASKS, Case, Shape  # noqa: E402

SMALL = Shape.parse("2,21-30,4/2,16")
needs_attention = pytest.mark.skipif(
    not hasattr(quake_jax, "dot_product_attention"), reason="this quake_jax has no attention"
)


# --- Cases


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,197,12,64", (1, 197, 197, 12, 12, 64)),
        ("1,1-4096,12,64", (1, 1, 4096, 12, 12, 64)),
        ("1,2048,32/8,128", (1, 2048, 2048, 32, 8, 128)),
        ("2,3-5,4/1,7", (2, 3, 5, 4, 1, 7)),
    ],
)
def test_shapes_are_read_and_written(text, numbers):
    assert Shape.parse(text) == Shape(*numbers)
    assert Shape.parse(text).text == text


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,0", "1,2,6/4,8", "1,2-,3,4", "1,2,-3,4"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ValueError):
        Shape.parse(text)


@pytest.mark.parametrize("text", ["2,5,3,4", "3,1-8,2,4", "1,7-4,1,2", "1,4-7,6/2,2"])
@pytest.mark.parametrize("mask", MASKS)
def test_work_is_counted_by_the_pairs_that_the_mask_leaves(text, mask):
    case = Case(Shape.parse(text), mask, "float32")
    batch, queries, keys = case.shape.batch, case.shape.queries, case.shape.keys
    kept = np.ones((batch, queries, keys), bool)
    if mask.startswith("causal"):
        kept &= np.tri(queries, keys, dtype=bool)
    if mask == "padding":
        kept &= np.arange(keys) < np.array(case.key_lengths)[:, None, None]
    assert case.flops == 4 * kept.sum() * case.shape.heads * case.shape.head_size
    assert min(case.key_lengths) >= 1 and max(case.key_lengths) <= keys


def test_a_decode_step_has_no_causal_mask():
    assert attention_cases.masks(attention_cases.DECODE) == ("none", "padding", "bias")


def test_bytes_are_those_of_the_keys_and_values():
    shape = Shape.parse("1,1-8,6/2,4")
    assert Case(shape, "none", "float32").bytes_read == 2 * 8 * 2 * 4 * 4
    assert Case(shape, "padding", "bfloat16").bytes_read == 2 * 6 * 2 * 4 * 2


# --- Contestants


@pytest.mark.parametrize("dtype", attention_cases.DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_all_contestants_compute_the_same(mask, dtype):
    buffers = attention_systems.AttentionBuffers(Case(SMALL, mask, dtype))
    contestants = [attention_systems.xla(buffers)]
    if hasattr(quake_jax, "dot_product_attention"):
        contestants.append(attention_systems.quake(buffers, 5))
    if importlib.util.find_spec("torch"):
        contestants.append(attention_systems.Torch(1).contestant(buffers, target=1e-5))
    for contestant in contestants:
        buffers.target[...] = 0
        bound = 3e-5 if dtype == "float32" else 2e-2
        assert buffers.error_of(contestant) < bound, contestant.name
        contestant.run(3)  # raises if the donated buffer is not reused


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_another_mask_is_noticed(mask):
    buffers = attention_systems.AttentionBuffers(Case(SMALL, mask, "float32"))
    unmasked = buffers.runner(lambda q, k, v, *_: jax.nn.dot_product_attention(q, k, v))
    error = buffers.error_of(timing.Contestant("unmasked", unmasked))
    assert error > attention.SANE_ERROR


def test_masks_of_a_dtype_share_their_operands():
    shared = {}
    first, second = (
        attention_systems.AttentionBuffers(Case(SMALL, mask, "float32"), shared)
        for mask in ("none", "bias")
    )
    addresses = [[x.ctypes.data for x in b.sources[:3]] for b in (first, second)]
    assert addresses[0] == addresses[1]
    assert len(first.sources) == 3 and len(second.sources) == 4


def test_an_older_quake_jax_is_one_line(monkeypatch):
    monkeypatch.delattr(quake_jax, "dot_product_attention", raising=False)
    with pytest.raises(attention.BenchmarkError, match="no dot_product_attention"):
        attention_systems.attention_of_quake_jax()


# --- The limits of the hardware


@pytest.mark.parametrize("threads", [1, 2])
def test_ceilings_are_those_of_a_core(threads):
    limits = ceilings.Ceilings(quake_jax.isa(), threads)
    if limits.left_out:
        pytest.skip(limits.left_out)

    def seconds(run):
        return min(timing.read(run, 20).wall for _ in range(5)) / 20

    assert 1e9 < limits.flops_per_call / seconds(limits.fma().run) < 1e13
    arrays = [np.ones((1000, 1000), np.float32)] * 2
    assert 1e8 < 8e6 / seconds(limits.read("read", arrays).run) < 1e13


def test_no_ceilings_without_a_compiler(monkeypatch):
    monkeypatch.setattr(ceilings.shutil, "which", lambda name: None)
    assert "compiler" in ceilings.Ceilings("avx512", 1).left_out
    assert "AVX" in ceilings.Ceilings("neon", 1).left_out


# --- Bars


def test_bars_are_about_things_that_are_measured():
    for bar in attention_report.BARS:
        cases = attention_cases.choose(bar.shape, attention_cases.DTYPES, None)
        assert bar.shape in attention_cases.SHAPES
        assert Case(bar.shape, bar.mask, bar.dtype) in cases
        assert bar.kind in attention_report.KINDS
        # What the case is compared with is measured in the same rounds.
        wanted = {"unmasked": "none", "array": "causal", "float32": "float32"}.get(bar.kind)
        references = attention._references(Case(bar.shape, bar.mask, bar.dtype))
        assert wanted is None or references[wanted] in cases
    assert attention_cases.SUBJECT_ORDER in attention_cases.DEFAULT_ORDERS
    assert len(set(attention_report.BARS)) == len(attention_report.BARS)


def entry_of(bar, figure):
    """A result's case at which the bar's figure, and every other, is `figure`."""
    name = f"order {attention_cases.SUBJECT_ORDER}"
    share, ratio = {"median": figure / 100}, {"median": figure}
    return {
        "shape": bar.shape.text,
        "mask": bar.mask,
        "dtype": bar.dtype,
        "contestants": {name: {"share_of_peak": share, "share_of_read": share}},
        "ratios": {name: {"XLA": ratio, "torch": ratio}},
        "relative": {
            "none": {name: ratio},
            "causal": {name: ratio},
            "float32": {name: {"median": 1 / figure}},
        },
    }


def result_of(bar, figure, **conditions):
    return {
        "environment": {"threads": 1, "isa": bar.isa, **conditions},
        "cases": [entry_of(bar, figure)],
    }


@pytest.mark.parametrize(
    "bar",
    {bar.kind: bar for bar in attention_report.BARS}.values(),
    ids=lambda bar: bar.kind,
)
def test_bars_are_judged_by_their_threshold(bar):
    def met(factor):
        judged = attention_report.judge(result_of(bar, factor * bar.threshold))
        verdicts = {verdict["name"]: verdict for verdict in judged}
        assert verdicts[bar.name]["figure"] == pytest.approx(factor * bar.threshold)
        return verdicts[bar.name]["met"]

    at_least = attention_report.KINDS[bar.kind].at_least
    assert (met(1.01), met(0.99)) == (at_least, not at_least)


def test_bars_are_judged_under_their_conditions_alone():
    for bar in attention_report.BARS:
        assert attention_report.judge(result_of(bar, 9.0, isa="neon")) == []
        assert attention_report.judge(result_of(bar, 9.0, threads=2)) == []
        judged = attention_report.judge(result_of(bar, 9.0, isa="avx512bf16"))
        limits = [(verdict["name"], verdict["threshold"]) for verdict in judged]
        assert ((bar.name, bar.threshold) in limits) == (bar.isa != "avx2")


def test_what_was_not_measured_is_not_judged():
    for bar in attention_report.BARS:
        result = result_of(bar, 9.0)
        for case in result["cases"]:
            case["contestants"], case["ratios"], case["relative"] = {}, {}, {}
        assert attention_report.judge(result) == []


def test_the_geometric_mean_needs_all_cases():
    against_torch = [bar for bar in attention_report.BARS if bar.kind == "torch"]
    figures = np.geomspace(0.5, 4, len(against_torch))
    result = result_of(against_torch[0], 1.0)
    result["cases"] = [entry_of(b, f) for b, f in zip(against_torch, figures, strict=True)]
    mean = attention_report.judge(result)[-1]
    assert mean["name"] == attention_report.GEOMETRIC_MEAN_NAME
    assert mean["figure"] == pytest.approx(math.sqrt(0.5 * 4))
    result["cases"].pop()
    names = [verdict["name"] for verdict in attention_report.judge(result)]
    assert attention_report.GEOMETRIC_MEAN_NAME not in names


# --- Measuring


@pytest.fixture
def stand_in(monkeypatch):
    """XLA's attention in the place of ours."""

    def attention_with_order(*arrays, order, **options):
        return jax.nn.dot_product_attention(*arrays, **options)

    monkeypatch.setattr(attention_systems, "attention_of_quake_jax", lambda: attention_with_order)


@pytest.mark.parametrize("text", ["2,12,4/2,8", "1,1-20,2,8"])
def test_the_cases_of_a_shape_are_compared_round_by_round(stand_in, text):
    limits = ceilings.Ceilings(quake_jax.isa(), 1)
    cases = attention_cases.choose(Shape.parse(text), ["bfloat16", "float32"], None)
    settings = {"orders": [3, 5], "rounds": 2, "reading_seconds": 1e-5, "allocator": "keep"}
    shares = []
    entries = attention.measure_shape(cases, settings, 1, limits, None, shares.append)
    assert sum(shares) == pytest.approx(1)
    assert [(e["dtype"], e["mask"]) for e in entries] == [(c.dtype, c.mask) for c in cases]
    for entry in entries:
        assert list(entry["contestants"]) == ["order 3", "order 5", "XLA"]
        assert set(entry["ratios"]["order 5"]) == {"XLA"}
        assert ("none" in entry["relative"]) == (entry["mask"] != "none")
        assert ("float32" in entry["relative"]) == (entry["dtype"] == "bfloat16")
        for one in entry["contestants"].values():
            assert one["ms"]["low"] <= one["ms"]["median"] <= one["ms"]["high"]
            assert one["error"] < attention.SANE_ERROR
            if not limits.left_out:
                assert one["share_of_peak"]["median"] > 0
                assert ("share_of_read" in one) == entry["shape"].startswith("1,1-")
    assert json.dumps(entries)


def test_wrong_results_end_the_run(monkeypatch):
    monkeypatch.setattr(
        attention_systems,
        "attention_of_quake_jax",
        lambda: lambda q, k, v, order, **options: jax.nn.dot_product_attention(-q, k, v),
    )
    limits = ceilings.Ceilings(None, 1)
    settings = {"orders": [5], "rounds": 1, "reading_seconds": 1e-5, "allocator": "keep"}
    with pytest.raises(attention.BenchmarkError, match="order 5 is wrong at 1,6,1,8 float32 none"):
        attention.measure_shape(
            [Case(Shape.parse("1,6,1,8"), "none", "float32")],
            *(settings, 1, limits, None, lambda share: None),
        )


# --- The command


def run_benchmarks(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "attention", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--shape", "12,no"), "'12,no'"),
        (("--shape", "1,8,6/4,8"), "'1,8,6/4,8'"),
        (("--mask", "round"), "'round'"),
        (("--rounds", "0"), "'0'"),
        (("--order", "7"), "7"),
        (("--json", "/no/such/folder/x.json"), "/no/such/folder"),
    ],
)
def test_bad_values_are_one_line(arguments, named):
    done = run_benchmarks(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "error" in done.stderr and named in done.stderr


def test_either_allocator_has_a_section_of_its_own(tmp_path):
    page = tmp_path / "attention.md"
    conditions = {"threads": 1, "isa": "avx512", "cpu": "a CPU", "versions": {}, "date": "today"}
    for benchmark in ("attention", "attention, system allocator", "attention"):
        result = {"benchmark": benchmark, "environment": {**conditions, "commit": None}}
        report.write_section(result, page, attention_report.heading(result), [], [])
    headings = [line for line in page.read_text().splitlines() if line.startswith("###")]
    assert headings == [
        "### Attention, one thread, avx512",
        "### Attention, system allocator, one thread, avx512",
    ]


@needs_attention
def test_a_quick_run_from_end_to_end(tmp_path):
    path, page = tmp_path / "attention.json", tmp_path / "attention.md"
    page.write_text("# Kept\n")
    options = ["--quick", "--no-peers", "--order", "5", "--mask", "causal", "--mask", "none"]
    files = ["--json", str(path), "--markdown", str(page)]
    done = run_benchmarks(*options, *files)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["benchmark"] == "attention"
    assert result["environment"]["threads"] == 1
    assert [case["mask"] for case in result["cases"]] == ["none", "causal"]
    assert result["bars"] == []  # a quick run proves nothing
    # The page: the old text stays, a second run replaces the first one's section.
    once = page.read_text()
    assert once.startswith("# Kept\n") and "### Attention, one thread" in once
    assert "2,48,4/2,32 causal" in once
    tables, remarks = attention_report.tables(result), attention_report.remarks(result)
    report.write_section(result, page, attention_report.heading(result), tables, remarks)
    assert page.read_text() == once
