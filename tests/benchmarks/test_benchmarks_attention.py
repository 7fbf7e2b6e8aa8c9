"""Tests of `python -m benchmarks attention`: its cases, its arithmetic, and tiny runs.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

import quake_jax
from benchmarks.attention import cases, goals, measure, report, systems
from benchmarks.attention.cases import MASKS, Case, Shape
from benchmarks.attention.peers import Peers
from benchmarks.harness import hardware, pages, timing
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import Settings

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
    assert cases.masks(cases.DECODE) == ("none", "padding", "bias", *cases.CACHES)


def test_bytes_are_those_of_the_keys_and_values():
    shape = Shape.parse("1,1-8,6/2,4")
    assert Case(shape, "none", "float32").bytes_read == 2 * 8 * 2 * 4 * 4
    assert Case(shape, "padding", "bfloat16").bytes_read == 2 * 6 * 2 * 4 * 2
    assert Case(shape, "int8 cache", "float32").bytes_read == 2 * 8 * 2 * (4 + 4)


# --- Contestants


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_all_contestants_compute_the_same(mask, dtype):
    buffers = systems.Buffers(Case(SMALL, mask, dtype))
    contestants = [systems.xla(buffers)]
    if hasattr(quake_jax, "dot_product_attention"):
        contestants.append(systems.quake(buffers, 5))
        contestants += [systems.quake(buffers, None, name) for name in cases.PRODUCTS]
    contestants += Peers(1).contestants(buffers, target=1e-5)
    for contestant in contestants:
        buffers.target[...] = 0
        is_float32 = dtype == "float32" and contestant.name not in cases.PRODUCTS
        bound = 3e-5 if is_float32 else 4e-2 if contestant.name == "int8 products" else 2e-2
        assert buffers.error_of(contestant) < bound, contestant.name
        contestant.run(3)  # raises if the donated buffer is not reused


@pytest.mark.parametrize("shape", ["2,1-9,2,16", "2,12,2,16", "1,12,4/2,16"])
def test_every_installed_peer_takes_part(shape):
    peers = Peers(1)
    for dtype in cases.DTYPES:
        # Causal, onnxruntime has another operator for as many keys as queries.
        for mask in ("none", "causal", "padding"):
            buffers = systems.Buffers(Case(Shape.parse(shape), mask, dtype))
            named = {}
            for contestant in peers.contestants(buffers, target=1e-5):
                named[contestant.name] = buffers.error_of(contestant)
            lacking = {name.removesuffix(f" {dtype}") for name in peers.left_out}
            assert named.keys() == {"torch", "onnxruntime", "openvino"} - lacking
            assert all(error < (3e-5 if dtype == "float32" else 2e-2) for error in named.values())


@needs_attention
@pytest.mark.parametrize("mask", cases.CACHES)
def test_a_cache_is_read(mask):
    case = Case(Shape.parse("2,1-30,4/2,16"), mask, "float32")
    buffers = systems.Buffers(case)
    contestant = systems.cached(buffers, 5)
    bound = {"float32": 3e-5, "bfloat16": 2e-2, "int8": 4e-2}[case.stored]
    assert buffers.error_of(contestant) < bound
    assert sum(x.nbytes for x in buffers.read) == case.bytes_read


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
def test_another_mask_is_noticed(mask):
    buffers = systems.Buffers(Case(SMALL, mask, "float32"))
    unmasked = buffers.runner(lambda q, k, v, *_: jax.nn.dot_product_attention(q, k, v))
    error = buffers.error_of(timing.Contestant("unmasked", unmasked))
    assert error > measure.SANE_ERROR


def test_masks_of_a_dtype_share_their_operands():
    shared = {}
    first, second = (
        systems.Buffers(Case(SMALL, mask, "float32"), shared) for mask in ("none", "bias")
    )
    addresses = [[x.ctypes.data for x in b.sources[:3]] for b in (first, second)]
    assert addresses[0] == addresses[1]
    assert len(first.sources) == 3 and len(second.sources) == 4


# --- The limits of the hardware


@pytest.mark.parametrize("threads", [1, 2])
def test_ceilings_are_those_of_a_core(threads):
    limits = hardware.Ceilings(quake_jax.isa(), threads)
    if limits.left_out:
        pytest.skip(limits.left_out)

    def seconds(run):
        return min(timing.read(run, 20).wall for _ in range(5)) / 20

    assert 1e9 < limits.flops_per_call / seconds(limits.fma().run) < 1e13
    arrays = [np.ones((1000, 1000), np.float32)] * 2
    assert 1e8 < 8e6 / seconds(limits.read("read", arrays).run) < 1e13


def test_no_ceilings_without_a_compiler(monkeypatch):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    assert "compiler" in hardware.Ceilings("avx512", 1).left_out
    assert "AVX" in hardware.Ceilings("neon", 1).left_out


# --- Bars


def test_bars_are_about_things_that_are_measured():
    for bar in goals.BARS:
        measured = cases.choose(bar.case.shape, cases.DTYPES, None)
        assert bar.case.shape in cases.SHAPES
        assert bar.case in measured
        # What the case is compared with is measured in the same rounds.
        wanted = {goals.UNMASKED: "none", goals.ARRAY: "causal", goals.FLOAT32: "float32"}
        if bar.kind in wanted:
            assert bar.case.references[wanted[bar.kind]] in measured
    assert cases.SUBJECT_ORDER in cases.DEFAULT_ORDERS
    assert len(set(goals.BARS)) == len(goals.BARS)


def entry_of(bar, figure):
    """A result's case at which the bar's figure, and every other, is `figure`."""
    name = bar.subject
    share, ratio = {"median": figure / 100}, {"median": figure}
    return {
        "shape": bar.case.shape.text,
        "mask": bar.case.mask,
        "dtype": bar.case.dtype,
        "contestants": {name: {"share_of_peak": share, "share_of_read": share}},
        "ratios": {
            name: {
                "XLA": ratio,
                "torch": ratio,
                **dict.fromkeys(cases.PRODUCTS, {"median": 1 / figure}),
            }
        },
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
    {bar.kind: bar for bar in goals.BARS}.values(),
    ids=lambda bar: bar.kind.what,
)
def test_bars_are_judged_by_their_threshold(bar):
    def met(factor):
        judged = goals.judge(result_of(bar, factor * bar.threshold))
        verdicts = {verdict["name"]: verdict for verdict in judged}
        assert verdicts[bar.name]["figure"] == pytest.approx(factor * bar.threshold)
        return verdicts[bar.name]["met"]

    at_least = bar.kind.at_least
    assert (met(1.01), met(0.99)) == (at_least, not at_least)


def test_bars_are_judged_under_their_conditions_alone():
    for bar in goals.BARS:
        assert goals.judge(result_of(bar, 9.0, isa="neon")) == []
        assert goals.judge(result_of(bar, 9.0, threads=2)) == []
        judged = goals.judge(result_of(bar, 9.0, isa="avx512bf16"))
        limits = [(verdict["name"], verdict["threshold"]) for verdict in judged]
        assert ((bar.name, bar.threshold) in limits) == (bar.isa != "avx2")


def test_what_was_not_measured_is_not_judged():
    for bar in goals.BARS:
        result = result_of(bar, 9.0)
        for case in result["cases"]:
            case["contestants"], case["ratios"], case["relative"] = {}, {}, {}
        assert goals.judge(result) == []


def test_the_geometric_mean_needs_all_cases():
    against_torch = [bar for bar in goals.BARS if bar.kind == goals.TORCH]
    figures = np.geomspace(0.5, 4, len(against_torch))
    result = result_of(against_torch[0], 1.0)
    result["cases"] = [entry_of(b, f) for b, f in zip(against_torch, figures, strict=True)]
    mean = goals.judge(result)[-1]
    assert mean["name"] == goals.GEOMETRIC_MEAN_NAME
    assert mean["figure"] == pytest.approx(math.sqrt(0.5 * 4))
    result["cases"].pop()
    names = [verdict["name"] for verdict in goals.judge(result)]
    assert goals.GEOMETRIC_MEAN_NAME not in names


# --- Measuring


@pytest.fixture
def stand_in(monkeypatch):
    """XLA's attention in the place of ours."""

    def attention_with_order(*arrays, order, compute_dtype, **options):
        return jax.nn.dot_product_attention(*arrays, **options)

    monkeypatch.setattr(quake_jax, "dot_product_attention", attention_with_order)


@pytest.mark.parametrize("text", ["2,12,4/2,8", "1,1-20,2,8"])
def test_the_cases_of_a_shape_are_compared_round_by_round(stand_in, text):
    limits = hardware.Ceilings(quake_jax.isa(), 1)
    chosen = cases.choose(Shape.parse(text), ["bfloat16", "float32"], None)
    shares = []
    run = measure.Run(Settings(rounds=2, reading_seconds=1e-5), [3, 5], limits)
    entries = run.measure(chosen, shares.append)
    assert sum(shares) == pytest.approx(1)
    assert [(e["dtype"], e["mask"]) for e in entries] == [(c.dtype, c.mask) for c in chosen]
    for entry in entries:
        others = [*cases.PRODUCTS] if entry["dtype"] == "float32" else []
        others = [] if entry["mask"] in cases.CACHES else [*others, "XLA"]
        assert list(entry["contestants"]) == ["order 3", "order 5", *others]
        assert set(entry["ratios"]["order 5"]) == {*others}
        assert ("none" in entry["relative"]) == (entry["mask"] != "none")
        assert ("float32" in entry["relative"]) == (entry["dtype"] == "bfloat16")
        for one in entry["contestants"].values():
            assert one["ms"]["low"] <= one["ms"]["median"] <= one["ms"]["high"]
            assert one["error"] < measure.SANE_ERROR
            if not limits.left_out:
                assert one["share_of_peak"]["median"] > 0
                assert ("share_of_read" in one) == entry["shape"].startswith("1,1-")
    assert json.dumps(entries)


def test_wrong_results_end_the_run(monkeypatch):
    monkeypatch.setattr(
        quake_jax,
        "dot_product_attention",
        lambda q, k, v, order, **options: jax.nn.dot_product_attention(-q, k, v),
    )
    run = measure.Run(Settings(1, 1e-5), [5], hardware.Ceilings(None, 1))
    with pytest.raises(BenchmarkError, match="order 5 is wrong at 1,6,1,8 float32 none"):
        run.measure([Case(Shape.parse("1,6,1,8"), "none", "float32")], lambda share: None)


# --- The command


def test_either_allocator_has_a_section_of_its_own(tmp_path):
    page = tmp_path / "attention.md"
    conditions = {"threads": 1, "isa": "avx512", "cpu": "a CPU", "versions": {}, "date": "today"}
    for benchmark in ("attention", "attention, system allocator", "attention"):
        result = {"benchmark": benchmark, "environment": {**conditions, "commit": None}}
        pages.to_markdown(result, pages.Page(report.HEADING, [], []), page)
    headings = [line for line in page.read_text().splitlines() if line.startswith("###")]
    assert headings == [
        "### Attention, one thread, avx512",
        "### Attention, system allocator, one thread, avx512",
    ]


@needs_attention
def test_a_quick_run_from_end_to_end(run_benchmarks, tmp_path):
    path, page = tmp_path / "attention.json", tmp_path / "attention.md"
    page.write_text("# Kept\n")
    options = ["--quick", "--no-peers", "--order", "5", "--mask", "causal", "--mask", "none"]
    files = ["--json", str(path), "--markdown", str(page)]
    done = run_benchmarks("attention", *options, *files)
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
    made = pages.Page(report.HEADING, report.tables(result), report.remarks(result))
    pages.to_markdown(result, made, page)
    assert page.read_text() == once
