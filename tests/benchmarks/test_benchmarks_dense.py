"""Tests of `python -m benchmarks dense`: its cases, its contestants, its bars, and tiny runs.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

import quake_jax
from benchmarks.dense import cases, goals, measure, peers, report, systems
from benchmarks.dense.cases import FORMATS, FORMS, PEERS, XLA, Case, Shape
from benchmarks.harness import bars, hardware, pages, timing
from benchmarks.harness.errors import BenchmarkError
from benchmarks.harness.frame import Settings
from benchmarks.harness.hardware import BFLOAT16, FMA, INT8, MATRIX_BFLOAT16

SMALL = Shape(3, 128, 40)
DECODED = ("int8 weights", "int4/32 weights")
WALKED = 100_000  # a few copies of all formats


def fitting(shape: Shape) -> list[str]:
    return [name for name in FORMATS if cases.fits(name, shape)]


# --- Cases


def test_work_and_bytes_are_those_of_the_product():
    assert Shape(2, 3, 5).flops == 60
    assert [cases.bytes_of(name) for name in FORMATS] == [
        *(4, 2, 2, 1, 0.5625, 0.515625),
        *(1, 0.5625),
    ]


@pytest.mark.parametrize(
    ("rows", "unfit"),
    [
        (1, {(192, "int4/128")} | {(k, name) for k, _ in cases.LAYERS for name in cases.X_DTYPES}),
        (197, {(192, "int4/128")} | {(k, n) for k, _ in cases.LAYERS for n in DECODED}),
    ],
)
def test_a_format_fits_where_its_groups_divide_the_rows_or_there_are_few(rows, unfit):
    shapes = [Shape(rows, k, n) for k, n in cases.LAYERS]
    assert {(s.k, name) for s in shapes for name in FORMATS if not cases.fits(name, s)} == unfit


@pytest.mark.parametrize(
    ("shape", "forms"),
    [
        (cases.FUSED, list(FORMS)),
        (Shape(8, 128, 40), ["bias", "gelu"]),
        (SMALL, ["bias"]),
        (Shape(1024, 4096, 4096), ["bias"]),
    ],
)
def test_which_forms_a_shape_has(shape, forms):
    assert [case.form for case in cases.choose(shape, None)] == forms
    assert [case.form for case in cases.choose(shape, ["all"])] == ["all"]


def test_large_shapes_have_fewer_rounds_and_the_largest_are_left_out():
    assert [cases.rounds(shape) for shape in (SMALL, cases.FUSED, cases.SHAPES[-1])] == [9, 6, 2]
    assert len(cases.ROWS) * len(cases.LAYERS) - len(cases.SHAPES) == 2


def test_the_packed_model_has_its_weights():
    assert round(sum(k * n * count for (k, n), count in cases.GPT2.items()), -6) == 124e6


def test_few_rows_walk_through_copies():
    assert systems.Layer(Shape(1, 128, 64), 10_000).count(0.5) == 3
    assert systems.Layer(Shape(1, 16, 16), 1 << 30).count(4) == cases.MOST_COPIES
    assert systems.Layer(Shape(17, 128, 64), 10_000).count(0.5) == 1
    assert systems.Layer(Shape(1, 128, 64)).count(4) == 1


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float32", "bfloat16"])
def test_copies_differ_and_the_last_one_is_the_weight(dtype):
    weight = np.asarray(jnp.full((3, 4), 3, dtype))
    made = list(systems.distinct(weight, 120))
    assert len({copy.tobytes() for copy in made}) == 120
    assert (made[-1] == weight).all()


# --- Contestants


def names_of(entries, layer, form):
    """The names of contestants, each of which has the right result."""
    names = []
    for entry in entries:
        layer.buffers("float32", "float32").target[...] = 0
        entry.contestant.run(1)
        bound = measure.SANE_ERROR[FORMATS[entry.format]["dtype"]]
        error = layer.error(form, entry.result(), entry.erf)
        assert error < bound, (entry.contestant.name, error)
        names.append(entry.contestant.name)
    return names


@pytest.mark.parametrize(
    ("form", "rows"), [*((form, 3) for form in FORMS), ("bias", 1), ("bias", 20), ("gelu", 20)]
)
def test_all_contestants_compute_the_same(form, rows):
    layer = systems.Layer(Shape(rows, 128, 40), WALKED)
    names = names_of(systems.in_jax(layer, form, 1e-5, 1), layer, form)
    xla = [] if form == "all" else [n for n in XLA if rows == 1 or "constants" not in n]
    assert sorted(names) == sorted([f"quake {name}" for name in fitting(layer.shape)] + xla)


def test_a_layer_with_other_rows_has_the_same_weights():
    first, second, other = (systems.Layer(Shape(m, 64, n)) for m, n in ((1, 32), (5, 32), (1, 48)))
    made = [layer.copies("a", 4, lambda: jnp.ones(3))[-1] for layer in (first, second)]
    assert first.weight is second.weight and made[0] is made[1]
    assert other.weight.shape == (64, 48)


@pytest.mark.parametrize("name", cases.NORMS)
@pytest.mark.parametrize("dtype", cases.NORM_DTYPES)
def test_norms_compute_the_same(name, dtype):
    ours, xla = systems.norm(name, dtype)
    assert (ours.name, xla.name) == (f"quake {name} {dtype}", f"XLA {name} {dtype}")


def test_a_model_is_packed_weight_by_weight(monkeypatch):
    monkeypatch.setattr(systems, "GPT2", {(64, 32): 2, (32, 48): 1})
    packed = []
    monkeypatch.setattr(quake_jax, "pack_weight", lambda w, **options: packed.append(w.shape))
    contestant = systems.packing("int8")
    contestant.run(2)
    assert contestant.calls == 1 and packed == 2 * [(64, 32), (64, 32), (32, 48)]


@pytest.mark.parametrize("form", ["bias", "gelu"])
def test_peers_compute_the_same(form):
    layer = systems.Layer(SMALL, WALKED)
    made = peers.Peers(1, 1e-5)
    names = names_of(made.entries(layer, form), layer, form)
    if not names:
        pytest.skip(str(made.left_out))
    libraries = {name.split()[0].lower() for name in names}
    assert libraries == {"torch", "onnxruntime", "openvino"} - set(made.left_out)
    assert set(names) <= set(PEERS)


def test_every_copy_has_its_turn():
    layer = systems.Layer(SMALL, WALKED)
    copies = [jnp.full((128, 40), float(i)) for i in range(4)]
    run = layer.buffers("float32", "float32").walker(lambda x, w, bias: x * 0 @ w + w[0, 0], copies)
    run(2)
    assert (layer.buffers("float32", "float32").target == 3).all()


def test_another_function_is_noticed():
    layer = systems.Layer(SMALL)
    rows, wanted = layer._exact["gelu", False]
    result = np.zeros((3, 40), np.float32)
    result[rows] = wanted
    assert layer.error("gelu", result, False) < 1e-6
    assert layer.error("gelu", result, True) > 1e-6
    assert layer.error("bias", result, False) > measure.SANE_ERROR["int4"]


# --- The limits of the hardware


def test_every_limit_can_be_timed():
    limits = hardware.Ceilings(quake_jax.isa(), 1)
    if limits.left_out:
        pytest.skip(limits.left_out)
    arrays = [np.ones(100_000, np.float32)]
    everyone = [limits.peak(name) for name in limits.peaks] + limits.reads(arrays)
    assert len({contestant.name for contestant in everyone}) == len(limits.peaks) + 12
    for contestant in everyone:
        assert timing.read(contestant.run, 3).wall > 0


@pytest.mark.parametrize(
    ("name", "peaks", "wanted"),
    [
        ("float32", {FMA}, FMA),
        ("int8 weights", {FMA, INT8}, FMA),
        ("bfloat16", {FMA, BFLOAT16}, BFLOAT16),
        ("bfloat16", {FMA, BFLOAT16, MATRIX_BFLOAT16}, MATRIX_BFLOAT16),
        ("bfloat16", {FMA}, FMA),
        ("int4/32", {FMA, INT8}, INT8),
        ("int8", {FMA}, None),
        ("float32", set(), None),
    ],
)
def test_the_peak_that_limits_a_format(name, peaks, wanted):
    assert measure.peak_of(name, peaks) == wanted


# --- Bars


def test_bars_are_about_things_that_are_measured():
    for bar in (*goals.BARS, *goals._GELU):
        if bar.kind in (goals.NORM, goals.PACKING):
            continue
        shape = bar.case.shape
        assert shape in cases.SHAPES
        assert bar.case in cases.choose(shape, None)
        assert cases.fits(bar.subject, shape)
    assert len(set(goals.BARS)) == len(goals.BARS)


KINDS = {bar.kind: bar for bar in goals.BARS}


def result_of(bar, figure, **conditions):
    """A result with one entry, at which the bar's figure, and every other, is `figure`."""
    ratio, name = {"median": figure}, f"quake {bar.subject}"
    share = {"median": figure / 100}
    others = [*XLA, *PEERS, "quake float32"]
    layer = bar.kind not in (goals.NORM, goals.PACKING)
    of = {**vars(bar.case.shape), "form": bar.case.form} if layer else {"case": bar.case}
    entry = {
        **of,
        "subject": bar.subject,
        "contestants": {name: {"share_of_peak": share, "share_of_read": share}},
        "ratios": {
            name: {**dict.fromkeys(others, ratio), "quake int8": {"median": 1 / figure}},
        },
        "relative": {name: {"median": 1 + figure / 100}},
        "speedup": ratio,
        "speed": ratio,
        "seconds": ratio,
    }
    environment = {"threads": bar.threads, "isa": bar.isa, **conditions}
    return {"environment": environment, **{kind.entries: [] for kind in KINDS}} | {
        bar.kind.entries: [entry]
    }


@pytest.mark.parametrize("bar", KINDS.values(), ids=lambda bar: bar.kind.what)
def test_bars_are_judged_by_their_threshold(bar):
    def met(factor):
        judged = goals.judge(result_of(bar, factor * bar.threshold))
        found = [verdict for verdict in judged if verdict["name"] == bar.name]
        assert found[0]["figure"] == pytest.approx(factor * bar.threshold)
        return found[0]["met"]

    at_least = bar.kind.at_least
    assert (met(1.01), met(0.99)) == (at_least, not at_least)


def test_what_was_not_measured_or_not_judged_is_counted():
    bar = goals.BARS[0]
    result = result_of(bar, 99.0, isa="avx512bf16")
    of_one_thread = sum(bar.threads == 1 for bar in goals.BARS)
    of_avx2 = sum(bar.isa == "avx2" for bar in goals.BARS)
    assert bars.not_judged(goals.BARS, result) == {"avx2": of_avx2}
    unmeasured = sum(goals.not_measured(result).values())
    result["cases"] = []
    assert goals.judge(result) == []
    assert sum(goals.not_measured(result).values()) == of_one_thread - of_avx2 > unmeasured
    result = result_of(bar, 99.0, isa="neon")
    assert goals.judge(result) == []
    assert set(bars.not_judged(goals.BARS, result)) == {"avx512", "avx512bf16", "avx2"}
    assert sum(goals.not_measured(result).values()) == 2  # norms and packing


def test_a_geometric_mean_needs_all_shapes():
    name, of, _ = goals.MEANS[0]
    wanted = [bar for bar in of if bar.subject == "float32"]
    figures = np.geomspace(0.5, 4, len(wanted))
    result = result_of(wanted[0], 1.0)
    result["cases"] = [result_of(b, f)["cases"][0] for b, f in zip(wanted, figures, strict=True)]
    means = {v["name"]: v["figure"] for v in goals.judge(result)}
    assert means[f"float32, {name}"] == pytest.approx(math.sqrt(0.5 * 4))
    result["cases"].pop()
    assert f"float32, {name}" not in {v["name"] for v in goals.judge(result)}


# --- Measuring


def test_the_forms_of_a_layer_are_compared_round_by_round():
    limits = hardware.Ceilings(quake_jax.isa(), 1)
    run = measure.Run(Settings(rounds=2, reading_seconds=1e-5), limits, walked=WALKED)
    shares = []
    entries = run.measure(cases.choose(SMALL, ["bias", "all"]), shares.append)
    assert sum(shares) == pytest.approx(1)
    assert [entry["form"] for entry in entries] == ["bias", "all"]
    for entry in entries:
        assert set(entry["contestants"]) >= {f"quake {name}" for name in fitting(SMALL)}
        assert ("quake int8" in entry["relative"]) == (entry["form"] == "all")
        assert "quake float32" in entry["ratios"]["quake int8"]
        for one in entry["contestants"].values():
            assert one["ms"]["low"] <= one["ms"]["median"] <= one["ms"]["high"]
            assert ("share_of_read" in one) == (not limits.left_out)
        assert entry["contestants"]["quake int8"]["copies"] > 1
    assert json.dumps(entries)


def test_wrong_results_end_the_run(monkeypatch):
    monkeypatch.setattr(quake_jax, "dense", lambda x, w, bias, **options: x @ w.unpack() - bias)
    run = measure.Run(Settings(1, 1e-5), hardware.Ceilings(None, 1), walked=WALKED)
    with pytest.raises(BenchmarkError, match="quake float32 is wrong at 3, 128→40 bias"):
        run.measure([Case(SMALL, "bias")], lambda share: None)


# --- The command


def test_a_quick_run_from_end_to_end(run_benchmarks, tmp_path):
    path, page, folder = tmp_path / "dense.json", tmp_path / "dense.md", tmp_path / "plots"
    options = ["--quick", "--no-peers", "--rows", "20", "--layer", "64,48"]
    files = ["--json", str(path), "--markdown", str(page), "--plot", str(folder)]
    done = run_benchmarks("dense", *options, *files)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["benchmark"] == "dense"
    assert [case["form"] for case in result["cases"]] == ["bias", "gelu"]
    assert result["bars"] == []  # a quick run proves nothing
    once = page.read_text()
    assert "### Dense layers, one thread" in once and "20, 64→48 gelu" in once
    made = pages.Page(report.HEADING, report.tables(result), report.remarks(result))
    pages.to_markdown(result, made, page)
    assert page.read_text() == once
    assert [file.name.startswith("dense_roofline") for file in folder.iterdir()] == [True]
