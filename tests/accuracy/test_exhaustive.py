"""`python -m quake_jax.accuracy`: what it measures, writes and refuses; and, with
`pytest -m exhaustive`, every element-wise function on all 2^32 float32 inputs.
"""

import json
import math
import os
import pathlib
import shlex
import sys

import _quake_jax_cpu as cpu
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from support import KERNELS

import quake_jax
from quake_jax import accuracy
from quake_jax._core.constants import MAX_REL_ERROR
from quake_jax.accuracy import command, elementwise

SMALLEST_NORMAL = 2.0**-126
TRUTH = {f.name: f.truth for f in KERNELS}


@pytest.mark.exhaustive
@pytest.mark.parametrize("function", accuracy.FUNCTIONS)
def test_all_float32_inputs(function):
    results = accuracy.measure(function, stride=1, threads=os.cpu_count() or 1)
    assert len(results) == 5 * len(quake_jax.supported_isas())
    assert [f"{r.isa} order {r.order}: {r.failures}" for r in results if r.failures] == []


# ---- The exact functions ---------------------------------------------------------------------


def bits(x: float, dtype: str = "float32") -> int:
    return int(np.array(x, jnp.dtype(dtype)).view(np.uint32 if dtype == "float32" else np.uint16))


@pytest.mark.parametrize("function", accuracy.FUNCTIONS)
def test_double_precision_is_exact_enough_to_judge(function):
    """Relative error below 1e-12 against mpmath, down to results of 2^-126 on both sides."""
    magnitudes = np.concatenate([np.geomspace(1e-37, 1e37, 75), np.linspace(0.01, 130, 300)])
    inputs = [float(x) for size in np.float32(magnitudes) for x in (size, -size)]
    exact = cpu.evaluate(function, "float32", "", 1, [bits(x) for x in inputs])
    judged = 0
    with mpmath.workdps(120):  # log1p(e^x) of x = -90 keeps 80 of them
        for x, y in zip(inputs, exact, strict=True):
            truth = TRUTH[function](mpmath.mpf(x))
            if SMALLEST_NORMAL <= abs(truth) <= 2**128:
                assert abs(y / truth - 1) < 1e-12, x
                judged += 1
    assert judged > 300


def test_special_values_of_the_exact_functions():
    inputs = [bits(x) for x in (math.nan, math.inf, -math.inf, 2.0**-127)]
    for function in accuracy.FUNCTIONS:
        nan, top, bottom, flushed = cpu.evaluate(function, "float32", "", 1, inputs)
        assert math.isnan(nan) and not math.isnan(top) and not math.isnan(bottom)
        assert [flushed] == cpu.evaluate(function, "float32", "", 1, [0])


# ---- The measurement -------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["tanh", "exp", "silu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_measures_agree_with_their_definition(function, dtype):
    """The sweep's maxima and counts are those of plain numpy on all 65,536 inputs."""
    isa, order = quake_jax.supported_isas()[-1], 2
    [result] = accuracy.measure(function, dtype, orders=(order,), isas=(isa,))
    inputs = list(range(1 << 16))
    got = np.array(cpu.evaluate(function, dtype, isa, order, inputs))
    wanted = np.array(cpu.evaluate(function, dtype, "", order, inputs))
    info = jnp.finfo(dtype)
    tiny, largest = float(info.tiny), float(info.max)
    # Away from underflow and overflow, where the definition is simplest.
    inside = (np.abs(wanted) >= 2 * tiny) & (np.abs(wanted) <= largest) & np.isfinite(got)
    error = np.abs(got[inside] - wanted[inside])
    size = np.abs(wanted[inside])
    ulp = 2.0 ** (np.floor(np.log2(size)) - info.nmant)
    for measure, values in ("relative", error / size), ("absolute", error), ("ulp", error / ulp):
        assert result.worst[measure]["value"] == pytest.approx(values.max(), rel=1e-12)
    assert result.worst["relative"]["got"] in got and result.worst["relative"]["wanted"] in wanted
    assert result.inputs == 1 << 16 and not result.failures
    if result.increasing:
        up, down = got[: 1 << 15], got[1 << 15 :]  # the bits of negative numbers count down
        falls = np.count_nonzero(up[1:] < up[:-1]) + np.count_nonzero(down[1:] > down[:-1])
        assert result.counts["falls"] == falls


def test_a_fall_between_two_ranges_is_counted_once():
    """Cutting the inputs into ranges does not change the result."""
    arguments = "tanh", "float32"
    kernel = [quake_jax.supported_isas()[0]], [5]
    first = bits(0.5)
    whole = cpu.measure_accuracy(*arguments, first, 3000, 1, *kernel)[0]
    parts = [
        cpu.measure_accuracy(*arguments, first + k, 100, 1, *kernel)[0] for k in range(0, 3000, 100)
    ]
    assert whole["falls"] > 0
    assert whole["falls"] == sum(part["falls"] for part in parts)
    for measure in ("relative", "absolute", "ulp", "fall"):
        assert whole[measure]["value"] == max(part[measure]["value"] for part in parts)


# ---- The command -----------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A thin sample of the float32 inputs."""
    monkeypatch.setattr(command, "SAMPLE_STRIDE", 10007)


TWO = ["--function", "tanh", "--function", "silu"]


def test_command_writes_json_and_markdown(quick, tmp_path, capsys):
    paths = tmp_path / "accuracy.json", tmp_path / "accuracy.md"
    assert accuracy.main([*TWO, "--json", str(paths[0]), "--markdown", str(paths[1])]) == 0
    printed = capsys.readouterr().out
    assert printed.count("relative error") == 2 * 3 * 5 and "accuracy: ok" in printed

    content = json.loads(paths[0].read_text())
    assert content["failures"] == [] and content["float32_stride"] == 10007
    assert content["versions"]["quake_jax"] == quake_jax.__version__
    assert {"command", "date", "cpu", "system", "threads", "seconds"} <= content.keys()
    isas = quake_jax.supported_isas()
    kernels = {(r["function"], r["dtype"], r["order"], r["isa"]) for r in content["results"]}
    assert kernels == {
        (function, dtype, order, isa)
        for function in ("tanh", "silu")
        for dtype in accuracy.DTYPES
        for order in range(1, 6)
        for isa in isas
    }
    for result in content["results"]:
        assert 0 < result["worst"]["relative"]["value"] <= result["bound"]
        assert set(result["worst"]) == {"relative", "absolute", "ulp", "fall"}
        assert set(result["worst"]["ulp"]) == {"value", "x", "bits", "got", "wanted"}
        assert result["counts"]["nan_made"] == 0 and len(result["special"]) == 10
        if result["dtype"] == "float32":
            assert result["inputs"] == -(-(2**32) // 10007)
            assert result["bound"] == MAX_REL_ERROR[result["function"]][result["order"]]

    text = paths[1].read_text()
    for line in ("# Accuracy", "## float32", "## Monotonicity, float32", "## float16"):
        assert f"\n{line}\n" in f"\n{text}"
    assert f"| function | order | bound | {' | '.join(isas)} |" in text
    assert text.count("\n| tanh | 3 |") == 5 and text.count("\n| silu | 3 |") == 4


def test_a_result_beyond_its_bound_fails(quick, tmp_path, capsys, monkeypatch):
    wrong = {**MAX_REL_ERROR, "tanh": {**MAX_REL_ERROR["tanh"], 2: 1e-5}}
    monkeypatch.setattr(elementwise, "MAX_REL_ERROR", wrong)
    path = tmp_path / "accuracy.md"
    assert accuracy.main([*TWO, "--dtype", "float32", "--markdown", str(path)]) == 1
    failures = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAILED: ")]
    assert len(failures) == len(quake_jax.supported_isas())
    assert all("tanh float32 order 2" in x and "exceeds 1e-05" in x for x in failures)
    assert "kernels fail" in path.read_text()


def test_options_select(quick, capsys):
    arguments = ["--function", "exp", "--order", "2", "--isa", "baseline", "--dtype", "float16"]
    assert accuracy.main([*arguments, "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "exp" in lines[0] and "float16" in lines[0] and "order 2" in lines[0]
    assert lines[1].startswith("accuracy: ok, 1 kernels")


def test_progress_bar_on_a_terminal(quick, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert accuracy.main(["--function", "exp", "--dtype", "float16"]) == 0
    captured = capsys.readouterr()
    assert "1/1" in captured.err
    assert len(captured.out.splitlines()) == 6 and "relative error" in captured.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--function", "sine"], "sine"),
        (["--order", "6"], "6"),
        (["--isa", "sse9"], "sse9"),
        (["--dtype", "float64"], "float64"),
        (["--threads", "0"], "'0' is not a positive number"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
        (["--fast"], "--fast"),
    ],
)
def test_a_bad_value_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        accuracy.main(arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_function_without_a_bound_is_one_line(monkeypatch, capsys):
    without = {name: bounds for name, bounds in MAX_REL_ERROR.items() if name != "tanh"}
    monkeypatch.setattr(command, "MAX_REL_ERROR", without)
    with pytest.raises(SystemExit):
        accuracy.main(["--function", "tanh"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "tanh has no bound" in error


def test_the_published_table_covers_every_function_and_keeps_the_bounds():
    path = pathlib.Path(__file__).parent.parent.parent / "docs" / "results" / "accuracy.md"
    table = path.read_text().partition("\n## float32\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    published = {}
    for function, order, _, *errors in rows:
        published[function.removeprefix("| "), int(order)] = [float(e.split()[0]) for e in errors]
    assert set(published) == {(f, order) for f in accuracy.FUNCTIONS for order in range(1, 6)}
    for (function, order), errors in published.items():
        # The table has three digits.
        assert max(errors) <= MAX_REL_ERROR[function][order] * 1.005, (function, order)


# ---- The kernels of a program ----------------------------------------------------------------

# A program in place of the extension module: here one that has the same kernels.
PROGRAM = """
import json, sys, _quake_jax_cpu as cpu
name, *words = sys.argv[1:]
if name == "measure_accuracy":
    function, dtype, first, count, stride, isas, orders = words
    orders = [int(order) for order in orders.split(",")]
    isas = isas.split(",")
    words = function, dtype, int(first), int(count), int(stride), isas, orders
elif name == "evaluate":
    function, dtype, isa, order, inputs = words
    isa = "" if isa == "exact" else isa
    words = function, dtype, isa, int(order), [int(x) for x in inputs.split(",")]
print(json.dumps(getattr(cpu, name)(*words)))
"""


def test_kernels_of_a_program(tmp_path, capsys):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = shlex.join([sys.executable, str(tmp_path / "program.py")])
    options = dict(orders=(2, 3), isas=(quake_jax.isa(),))
    for dtype, stride in (("bfloat16", 1), ("float32", 400_009)):
        actual = accuracy.measure(
            "exp", dtype, stride=stride, kernels=accuracy.Program(command), **options
        )
        expected = accuracy.measure("exp", dtype, stride=stride, **options)
        assert repr(actual) == repr(expected)  # NaN is not equal to itself

    page = tmp_path / "page.md"
    page.write_text("# Accuracy\n\nSome words.\n\n## Attention\n\nMore words.\n")
    line = ["--program", command, "--function", "exp", "--order", "3", "--dtype", "bfloat16"]
    heading = f"## Another processor: {', '.join(quake_jax.supported_isas())}"
    for _ in range(2):  # the second time in place of the first
        assert accuracy.main([*line, "--markdown", str(page)]) == 0
        text = page.read_text()
        assert text.startswith("# Accuracy\n\nSome words.\n\n## Attention\n\nMore words.\n\n## ")
        assert text.count(heading) == 1 and text.count("\n| exp | 3 | ") == 1
    page.write_text(text.replace("| exp |", "| old |") + "\n## After\n\nwords\n")
    assert accuracy.main([*line, "--markdown", str(page)]) == 0
    assert page.read_text().count("| old |") == 0 and "\n\n## After\n\nwords\n" in page.read_text()

    capsys.readouterr()
    (tmp_path / "program.py").write_text("import sys; sys.exit('no such kernel')")
    with pytest.raises(SystemExit):
        accuracy.main(line)
    assert "argument --program" in (text := capsys.readouterr().err) and "no such kernel" in text
    with pytest.raises(SystemExit):
        accuracy.main(["--program", "/no/such/program"])
    assert "argument --program" in capsys.readouterr().err
