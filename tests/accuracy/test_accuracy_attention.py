"""The accuracy of attention: what `python -m quake_jax.accuracy` measures of it and states."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import DTYPES, ORDERS

import quake_jax
from quake_jax import accuracy, reference
from quake_jax._core.constants import MAX_REL_ERROR
from quake_jax.accuracy import attention as _accuracy_attention

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("dtype", [*DTYPES, _accuracy_attention.INT8])
@pytest.mark.parametrize("case", _accuracy_attention.CASES)
def test_attention_keeps_its_bound(case, dtype):
    shapes = ((197, 64), (300, 128))
    results = _accuracy_attention.measure(case, dtype, orders=ORDERS, shapes=shapes)
    assert [r.order for r in results] == [*ORDERS]
    for result in results:
        assert result.failures == [] and 0 <= result.error and result.share <= 1


def test_the_bound_of_attention_is_no_wider_than_needed():
    x = _accuracy_attention.operands("N(0, 1)", "float32", 197, 197, 64)
    exact, bounds = _accuracy_attention.exact_and_bounds(x, "float32", ORDERS)
    largest = np.abs(x["value"]).max()
    for order in ORDERS:
        error = MAX_REL_ERROR["exp"][order]
        assert bounds[order].max() <= 2 * error / (1 - error) * largest + 1e-4
        coarser = {2: 1, 3: 2}.get(order)
        if coarser:  # whose results are beyond it
            y = np.asarray(quake_jax.dot_product_attention(**x, order=coarser), np.float64)
            assert (np.abs(y - exact) > bounds[order]).any()
    # The exact values are those of another program. (jax.nn's weights are float32 throughout.)
    with jax.enable_x64(True):
        double = [jnp.asarray(x[name], jnp.float64) for name in ("query", "key", "value")]
        y, _ = reference.unfused_attention(*double, scale=1 / 8)
        np.testing.assert_allclose(y, exact, atol=1e-14)


def test_what_the_statement_says_of_attention():
    def errors(case, orders, attend=quake_jax.dot_product_attention):
        x = _accuracy_attention.operands(case, "float32", 197, 197, 64)
        exact, _ = _accuracy_attention.exact_and_bounds(x, "float32", ())
        keywords = [{"order": order} for order in orders] if orders else [{}]
        return [np.abs(np.asarray(attend(**x, **k), np.float64) - exact).max() for k in keywords]

    assert max(errors("all keys equal", ORDERS)) < 1e-6
    (of_jax,) = errors("logits of ±80", (), jax.nn.dot_product_attention)
    assert 2e-6 < of_jax and max(errors("logits of ±80", (4, 5))) < 8 * of_jax
    assert max(errors("N(0, 1)", (4, 5))) < of_jax


def test_the_command_measures_attention(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_accuracy_attention, "SHAPES", ((65, 32),))
    paths = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["--function", "dot_product_attention", "--dtype", "float32", "--dtype", "bfloat16"]
    arguments += ["--order", "3", "--order", "5", "--json", str(paths[0])]
    assert accuracy.main([*arguments, "--markdown", str(paths[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    dtypes = ("float32", "bfloat16", "int8")
    assert [line.split()[1:4] for line in lines[:6]] == [
        [dtype, "order", f"{order}:"] for dtype in dtypes for order in (3, 5)
    ]
    assert lines[6].startswith("accuracy: ok, 6 kernels")
    content = json.loads(paths[0].read_text())
    assert len(content["attention"]) == 3 * 2 * len(_accuracy_attention.CASES)
    text = paths[1].read_text()
    assert "## float32" not in text.splitlines() and "| inputs | order 3 | order 5 |" in text
    assert all(text.count(f"\n| {case} |") == 3 for case in _accuracy_attention.CASES)

    tight = {**MAX_REL_ERROR, "exp": dict.fromkeys(ORDERS, 1e-6)}
    monkeypatch.setattr(_accuracy_attention, "MAX_REL_ERROR", tight)
    assert accuracy.main([*arguments[:4], "--order", "1"]) == 1
    assert "FAILED: dot_product_attention float32 order 1" in capsys.readouterr().out


def test_attention_is_measured_with_the_instruction_set_in_use_alone(capsys):
    other = next((isa for isa in quake_jax.supported_isas() if isa != quake_jax.isa()), None)
    if other is None:
        pytest.skip("one instruction set")
    with pytest.raises(SystemExit):
        accuracy.main(["--function", "dot_product_attention", "--isa", other])
    assert "QUAKE_JAX_ISA chooses another" in capsys.readouterr().err
