"""Tests of `python -m benchmarks approximations`: its errors, its substitution, and a tiny run."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest

nn = pytest.importorskip("flax.linen")
pytest.importorskip("optax")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")
pytest.importorskip("tokenizers")
pytest.importorskip("sklearn", reason="needs scikit-learn: pip install '.[examples]'")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import quake_jax.linen  # noqa: E402
from benchmarks.approximations import cases, command, errors, models, report  # noqa: E402
from benchmarks.harness.errors import BenchmarkError  # noqa: E402
from quake_jax import approximations as published  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def candidate(kind, name):
    (of_kind,) = cases.choose([kind], [1], None).values()
    return next(one for one in of_kind if one.name == name)


# --- Who is compared


def test_every_registered_one_is_a_candidate():
    candidates = cases.choose(command.KINDS, [1, 3], None)
    for kind, of_kind in candidates.items():
        names = [one.name for one in of_kind]
        ours = [] if kind == "layernorm" else ["QuAKE 1", "QuAKE 3"]
        assert names == ["exact", *ours, *(entry.name for entry in published.registry(kind))]
        assert [one.is_exact for one in of_kind] == [True] + [False] * (len(names) - 1)
    assert command.KINDS == tuple(dict.fromkeys(a.kind for a in published.registry()))
    described = candidate("softmax", "ratio").description()
    assert described["runs_as"] == "XLA" and described["derived"]
    assert candidate("gelu", "i_gelu").description()["runs_as"] == "emulation"
    assert candidate("gelu", "QuAKE 1").description()["runs_as"] == "kernel"


def test_names_choose():
    chosen = cases.choose(["softmax", "exp"], [], ["ratio"])
    assert {kind: [one.name for one in of] for kind, of in chosen.items()} == {
        "softmax": ["exact", "ratio"],
        "exp": ["exact", "ratio"],
    }
    with pytest.raises(BenchmarkError, match="--name: 'i_gelu' is none of e2softmax, "):
        cases.choose(["softmax", "exp"], [], ["i_gelu"])


# --- Errors


@pytest.mark.parametrize(
    ("kind", "make", "expected"),
    [
        # Half of the probability is gone.
        (
            "softmax",
            lambda exact: lambda x: exact(x) / 2,
            {"tv_128": 0.25, "tv_1024": 0.25, "row_sum": 0.5},
        ),
        ("sigmoid", lambda exact: lambda x: exact(x) * 1.25, {"max_rel": 0.25, "max_abs": 0.25}),
        ("exp", lambda exact: lambda x: exact(x) + 0.5, {"max_rel": 0.5 * np.exp(10)}),
        # Where GELU is small its relative error does not count.
        ("gelu", lambda exact: lambda x: jnp.where(x < -5, 0, exact(x)), {"max_rel": 0}),
        (
            "layernorm",
            lambda exact: lambda x: exact(x) + jnp.where(x > 0, 0.5, -0.5),
            {"rms_even": 0.5, "rms_uneven": 0.5},
        ),
    ],
)
def test_errors_are_those_put_in(kind, make, expected):
    exact = cases.exact(kind)
    (zero, found) = (
        errors.of(cases.Candidate(kind, "", function)) for function in (exact, make(exact))
    )
    # float32 of logits of up to 10, and of numbers up to 8 times as large as the deviation.
    assert all(error < 2e-6 for error in zero.values())
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=2e-6)


def test_levels_of_the_notes():
    """Total variation of 128 logits, N(0, 2²), as other seeds gave it."""
    for name, low, high in (("e2softmax", 0.07, 0.10), ("i_softmax", 0.0003, 0.002)):
        assert low < errors.of(candidate("softmax", name))["tv_128"] < high


# --- In models


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2)(nn.LayerNorm(epsilon=1e-5)(x))
        return nn.gelu(nn.Dense(32)(x))


def outputs_with(one, model, variables, x):
    """As the examples' models do it: with a substitution of their own, compiled inside."""

    @jax.jit
    def apply(variables, x):
        with quake_jax.linen.substitute(one.order or "exact"):
            return model.apply(variables, x)

    with models.substituting(one):
        jaxpr = str(jax.make_jaxpr(apply)(variables, x))
        return jaxpr, np.asarray(apply(variables, x))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("softmax", "e2softmax"),
        ("softmax", "QuAKE 1"),
        ("gelu", "i_gelu"),
        ("gelu", "QuAKE 1"),
        ("layernorm", "i_layernorm"),
    ],
)
def test_one_function_is_exchanged(kind, name):
    model = Model()
    # Arrays of less than 1024 elements have no kernel.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 32)), jnp.float32)
    variables = model.init(jax.random.key(0), x)
    before = quake_jax.linen.substitute
    exact_jaxpr, exact = outputs_with(candidate(kind, "exact"), model, variables, x)
    jaxpr, found = outputs_with(candidate(kind, name), model, variables, x)
    assert quake_jax.linen.substitute is before
    # The same model still: e2softmax is off by a quarter, of numbers of about 1.
    difference = np.abs(found - exact)
    assert difference.max() > 1e-5 and difference.mean() < 0.25
    # What stays is there as before; QuAKE's kernels are only those of the kind.
    assert ("quake_" in jaxpr) == (name == "QuAKE 1")
    if name == "QuAKE 1":
        kernels = re.findall(r"quake_\w+", jaxpr)
        assert all(kind in kernel for kernel in kernels), kernels
    remaining = {"softmax": " exp ", "gelu": " tanh ", "layernorm": " rsqrt "}
    for other, primitive in remaining.items():
        assert primitive in exact_jaxpr
        if other != kind:
            assert primitive in jaxpr


def test_layer_norms_parameters_are_used():
    module, x = nn.LayerNorm(), jnp.arange(24.0).reshape(4, 6) ** 2
    variables = {"params": {"scale": jnp.arange(6.0), "bias": jnp.arange(6.0) - 3}}
    exact = published.registry("layernorm")[-1].function  # NN-LUT, 32 entries: float arithmetic
    with nn.intercept_methods(models.layer_norm_interceptor(exact)):
        found = module.apply(variables, x)
        assert set(module.init(jax.random.key(0), x)["params"]) == {"scale", "bias"}
        with pytest.raises(NotImplementedError, match="another form"):
            nn.LayerNorm(reduction_axes=0).apply(variables, x)
    expected = module.apply(variables, x)
    np.testing.assert_allclose(found, expected, atol=0.3)
    assert np.abs(found - expected).max() > 1e-6


# --- The report


def made_up_result():
    interval = {"value": -1e-9, "low": -0.5, "high": 0.25}

    def row(name, runs_as, order=None, derived=False, tasks=True, **errors):
        description = {"name": name, "runs_as": runs_as, "order": order, "derived": derived}
        if runs_as == "emulation" or derived:
            description |= {"paper": "Somebody, 2020", "year": 2020}
        made = {"description": description, "errors": errors, "tasks": {}}
        doubtful = int(name == "i_exp")
        time = {"median": 1.5, "low": 1.0, "high": 2.0}
        made["time"] = {"ns_per_element": time, "rejected": {}, "doubtful": doubtful}
        if tasks:
            digits, text = {"accuracy": {"value": 98.0}}, {}
            if name != "exact":
                digits |= {"changed": 3, "distorted_changed": 4}
                digits["distorted_accuracy_change"] = interval
                text = {"perplexity_change": interval, "same_greedy": {"value": 97.5}}
            made["tasks"] = {"digits": digits, "text": text}
        return made

    softmax = {"tv_128": 1e-3, "tv_1024": 2e-3, "row_sum": 0.5}
    exp = {"max_abs": 0.1, "max_rel": 0.2}
    sets = {"digits": {"digits": 450, "distorted digits": 1800}}
    sets["text"] = {"windows": 32, "tokens per window": 256, "text of training": True}
    sets["text"]["generations"] = 0
    shape = {"shape": [128, 1024], "rounds": 7, "quick": False}
    return {
        "benchmark": "approximations",
        "environment": {"isa": "avx512", "threads": 1},
        "settings": shape | {"errors": errors.SETS},
        "sets": sets,
        "kinds": {
            "softmax": [
                row("exact", "XLA", **softmax),
                row("QuAKE 1", "kernel", 1, **softmax),
                row("shiftmax", "emulation", **softmax),
                row("ratio", "XLA", derived=True, **softmax),
            ],
            "exp": [
                row("exact", "XLA", tasks=False, **exp),
                row("i_exp", "emulation", tasks=False, **exp),
            ],
        },
    }


def test_tables_have_a_row_for_each():
    result = made_up_result()
    (softmax_title, softmax), (exp_title, exp), (_, sources) = report.tables(result)
    assert softmax_title == "Softmax" and exp_title == "exp, of numbers from -10 to 0"
    assert [row[0] for row in softmax] == ["", "exact", "QuAKE 1", "shiftmax", "ratio *"]
    assert all(len(row) == len(rows[0]) for rows in (softmax, exp) for row in rows)
    # What rounds to zero has no minus.
    change = softmax[0].index("perplexity change, %")
    assert softmax[1][change] == "–" and softmax[2][change] == "+0.00 (-0.50 to +0.25)"
    assert softmax[2][1:4] == ["1.0e-03", "2.0e-03", "5.0e-01"]
    assert [row[-1] for row in softmax[1:]] == ["1.50", "1.50", "1.50 (emulated)", "1.50"]
    assert exp[2] == ["i_exp", "1.0e-01", "2.0e-01", "1.50† (emulated)"]
    assert sources[1:] == [["shiftmax, ratio, i_exp", "Somebody, 2020"]]
    remarks = " ".join(report.remarks(result))
    assert "450" in remarks and "1800" in remarks and "32 windows" in remarks
    assert "† 1 disturbed" in remarks and "Search" not in remarks and "quick" not in remarks
    assert "have been in its training" not in remarks


def test_plots_are_small_files(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.approximations import plots as approximations_plots
    from benchmarks.harness import plots

    written = plots.draw(made_up_result(), approximations_plots, tmp_path / "plots")
    names = ["approximations_quality_avx512_t1.png", "approximations_time_avx512_t1.png"]
    assert [path.name for path in written] == names
    assert all(0 < path.stat().st_size < 60_000 for path in written)
    result = made_up_result()
    del result["kinds"]["softmax"]  # no model was run
    (only,) = plots.draw(result, approximations_plots, tmp_path / "other")
    assert only.name == "approximations_time_avx512_t1.png"
    (tmp_path / "file").touch()
    with pytest.raises(BenchmarkError, match="file"):
        plots.draw(made_up_result(), approximations_plots, tmp_path / "file")


def test_the_pages_example_runs():
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "approximations.md").read_text(), re.DOTALL
    )
    exec(compile(block, "docs/approximations.md", "exec"), {})


# --- The command


def test_an_unknown_name_is_one_line(run_benchmarks):
    done = run_benchmarks("approximations", "--name", "softermax")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert "error" in line and "'softermax' is none of e2softmax" in line
    assert "Traceback" not in done.stderr


def test_options_have_defaults():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args([])
    assert vars(args) == {
        **dict.fromkeys(("kind", "name", "order", "embedding_checkpoint"), None),
        **dict.fromkeys(("json", "markdown", "plot"), None),
        "quick": False,
    }


def test_a_quick_run_from_end_to_end(run_benchmarks, tmp_path):
    path, page = tmp_path / "approximations.json", tmp_path / "approximations.md"
    page.write_text("# Kept\n")
    options = ["--quick", "--order", "1", "--kind", "softmax", "--kind", "layernorm"]
    names = ["--kind", "exp", "--name", "shiftmax", "--name", "i_layernorm", "--name", "ratio"]
    done = run_benchmarks(
        "approximations", *options, *names, "--json", str(path), "--markdown", str(page)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    rows = {
        kind: {row["description"]["name"]: row for row in of_kind}
        for kind, of_kind in result["kinds"].items()
    }
    assert {kind: list(of_kind) for kind, of_kind in rows.items()} == {
        "softmax": ["exact", "QuAKE 1", "shiftmax", "ratio"],
        "layernorm": ["exact", "i_layernorm"],
        "exp": ["exact", "QuAKE 1", "ratio"],
    }
    for of_kind in rows.values():
        assert all(row["time"]["ns_per_element"]["median"] > 0 for row in of_kind.values())
    assert rows["softmax"]["exact"]["tasks"]["digits"]["accuracy"]["value"] > 97
    changes = {
        name: abs(row["tasks"]["text"]["perplexity_change"]["value"])
        for kind in ("softmax", "layernorm")
        for name, row in rows[kind].items()
        if name != "exact"
    }
    assert 0 < changes["QuAKE 1"] < 0.5 and changes["shiftmax"] > changes["QuAKE 1"]
    assert changes["i_layernorm"] > 0
    assert all(not row["tasks"] for row in rows["exp"].values())
    written = page.read_text()
    assert written.startswith("# Kept\n") and "### Approximations, one thread" in written
    assert "| ratio * |" in written and "A quick run" in written
    assert "layernorm, i_layernorm" in done.stderr  # the progress
