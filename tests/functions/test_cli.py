"""`python -m quake_jax`: what it prints and when it fails."""

import sys

import jax
import jax.numpy as jnp
import pytest
from support import run_python

import quake_jax
from quake_jax import __main__ as cli


@pytest.fixture
def quick(monkeypatch):
    """The self-check on small arrays, without repetitions."""
    monkeypatch.setattr(cli, "_SHAPE", (16, 64))
    monkeypatch.setattr(cli, "_SECONDS_PER_TIMING", 0.0)


@pytest.fixture
def few(quick, monkeypatch):
    """The same of one function of each kind."""
    names = ("tanh", "bias_silu", "swiglu", "softmax", "logsumexp")
    monkeypatch.setattr(cli, "_FUNCTIONS", {name: cli._FUNCTIONS[name] for name in names})


def test_report(quick, capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for fact in (quake_jax.__version__, jax.__version__, quake_jax.isa(), "threads"):
        assert fact in text
    assert {"exp", "gelu_erf", "swiglu", "logsumexp"} < set(cli._FUNCTIONS)
    for name in cli._FUNCTIONS:
        assert text.count(f" {name} ") >= 2, name
    assert "accuracy: ok" in text


def test_plain_text_without_rich(few, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isascii() for line in lines)
    header = next(line for line in lines if line.startswith("function"))
    assert header.split() == ["function", *"order 1 order 2 order 3 order 4 order 5".split()]
    assert any(line.startswith("softmax ") for line in lines)


def test_an_inaccurate_function_fails(few, capsys, monkeypatch):
    def wrong(x, order):
        return jnp.tanh(x) * 1.5

    monkeypatch.setitem(cli._FUNCTIONS, "tanh", cli._Function(wrong, jnp.tanh))
    assert cli.main([]) == 1
    text = capsys.readouterr().out
    assert "5.0e-01 !" in text and "FAILED" in text


def test_help_and_unknown_arguments(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0 and "Exit code 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--fast"])
    assert exit_info.value.code == 2


def test_the_module_runs(tmp_path):
    code = "import runpy; runpy.run_module('quake_jax', run_name='__main__')"
    result = run_python(code, tmp_path, QUAKE_JAX_DISABLE="1")
    assert quake_jax.isa() in result.stdout
    assert "QUAKE_JAX_DISABLE is set" in result.stdout
