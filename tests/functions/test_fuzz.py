"""Generated shapes, dtypes, axes, masks, layouts, transformations and values, against float64.

An example has one shape, which is compiled once for every order, and several draws of data; a case
is one comparison of (function, shape, dtype, order, data) with NumPy in double precision. The suite
runs a few hundred cases, the same each time. `pytest -m fuzz tests/functions/test_fuzz.py` runs
more than 30,000 new ones in minutes, and prints how many; `--hypothesis-seed=N` repeats a run.
"""

import collections
import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_problems import HALF_ULP, normal, options, tolerance
from attention_problems import examples as derandomized
from attention_problems import operands as attention_operands
from hypothesis import strategies as st
from oracle import (
    FUNCTIONS,
    assert_between,
    exact_pointwise,
    exact_row,
    in_double,
    in_double_precision,
    pointwise_error,
    row_error,
)
from support import DTYPES, ORDERS, ROWS, takes

import quake_jax
from quake_jax._core.constants import MAX_REL_ERROR
from quake_jax._elementwise import table

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf and overflow

DRAWS = 8  # of data, for what is compiled once
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65, 127, 129, 260)

COUNTS: collections.Counter = collections.Counter()


def count(kind: str, result) -> None:
    """Count a case, unless there is nothing to compare in it."""
    COUNTS[kind] += bool(result.size)


@pytest.fixture(autouse=True, scope="module")
def _report(request):
    yield
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        total = f"{COUNTS.total():,} cases"
        print(f"\nfuzz: {total}: " + ", ".join(f"{n} {k}" for k, n in sorted(COUNTS.items())))


def at_length(check, problems, example_count: int, at_least: int) -> None:
    """Run `check` on many new examples, and assert that they were so many cases."""

    @hypothesis.settings(
        max_examples=example_count,
        deadline=None,
        database=None,
        print_blob=True,
        phases=(hypothesis.Phase.generate,),  # shrinking would compile a lot
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(problems)
    def run(problem):
        check(problem)

    before = COUNTS.total()
    run()
    assert COUNTS.total() - before >= at_least


# Data.

SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1.2e-38, -1e-40, 65504.0]
)


def values(rng, shape, dtype):
    """Values of one of several kinds, in a dtype."""
    dtype = jnp.dtype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind in "iu":
        large = rng.random() < 0.2
        limits = jnp.iinfo(dtype) if large else None
        low, high = (limits.min, limits.max) if large else (0 if dtype.kind == "u" else -20, 20)
        return rng.integers(low, high, shape, dtype)
    kind = rng.integers(7)
    if dtype == np.float64:  # XLA's own functions, whose special values are JAX's
        kind = rng.integers(2)
    if kind == 0:
        x = rng.uniform(-8, 8, shape)
    elif kind == 1:
        x = rng.normal(0, 10.0 ** rng.uniform(-3, 1), shape)
    elif kind == 2:
        x = rng.normal(0, 10.0 ** rng.uniform(-38, 38), shape)
    elif kind == 3:
        x = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)  # any bits
    elif kind == 4:
        x = rng.uniform(-110, 95, shape)  # where exponentials over- and underflow
    elif kind == 5:
        x = np.where(rng.random(shape) < 0.2, rng.choice(SPECIAL, shape), rng.normal(0, 3, shape))
    else:
        x = np.full(shape, rng.choice(SPECIAL))
    return np.asarray(x).astype(dtype)


# Layouts: what a program may do to an array before it calls a function, in JAX as in NumPy.

LAYOUTS = {
    "plain": lambda x, np: x,
    "transposed": lambda x, np: x.T,
    "reversed": lambda x, np: x[..., ::-1] if x.ndim else x,
    "every other": lambda x, np: x[::2] if x.ndim else x,
    "broadcast": lambda x, np: np.broadcast_to(x, (2, *x.shape)),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    name: str
    shape: tuple
    dtype: str
    transform: str
    layout: str
    seed: int
    axis: int | tuple | None = None
    options: tuple = ()

    def rng(self):
        return np.random.default_rng([self.seed, *self.shape])


TRANSFORMS = ("eager", "jit", "jit", "vmap", "scan")


@st.composite
def shapes(draw, least_rank=0, most=6000):
    rank = draw(st.integers(least_rank, 5))
    shape, total = [], 1
    for _ in range(rank):
        shape.append(draw(st.sampled_from([n for n in SIZES if total * n <= most])))
        total *= shape[-1]
    if shape and draw(st.integers(0, 14)) == 0:
        shape[-1] = 0
    return tuple(draw(st.permutations(shape)))


INTEGERS = ("int32", "int8", "uint8", "bool")
# Some functions refuse some of them, as jax.nn does; test_errors.py.
TAKEN = {name: [d for d in INTEGERS if takes(f, d)] for name, f in FUNCTIONS.items()}


@st.composite
def pointwise_problems(draw):
    name = draw(st.sampled_from(sorted(FUNCTIONS)))
    dtype = draw(st.sampled_from((*DTYPES * 4, "float64", *TAKEN[name])))
    fused = name in table.FUSED
    shape = draw(shapes(least_rank=int(fused)))
    transform = draw(st.sampled_from(TRANSFORMS))
    layout = "plain" if fused else draw(st.sampled_from(sorted(LAYOUTS)))
    axis = draw(st.integers(0, 4))
    return Problem(name, shape, dtype, transform, layout, draw(st.integers(0, 2**32 - 1)), axis)


def mapped_axis(problem, rank: int) -> int | None:
    """An axis that vmap and scan may take away, or None."""
    # The last one is that of a bias, and of a gate beside its value.
    available = rank - (problem.name in table.FUSED)
    return None if available <= 0 else problem.axis % available


def transformed(function, problem):
    """function(*x) -> results of all orders, as the problem calls it."""

    def call(*x):
        x = [LAYOUTS[problem.layout](a, jnp) for a in x]
        axis = mapped_axis(problem, x[0].ndim)
        axes = [axis if a.ndim == x[0].ndim else None for a in x]  # a bias has none
        if problem.transform == "vmap" and axis is not None:
            return [jax.vmap(functools.partial(function, order=n), axes, axis)(*x) for n in ORDERS]
        if problem.transform == "scan" and axis is not None and x[0].shape[axis]:
            moved = [
                a if k is None else jnp.moveaxis(a, k, 0) for a, k in zip(x, axes, strict=True)
            ]

            def step(_, i):
                parts = [a if k is None else a[i] for a, k in zip(moved, axes, strict=True)]
                return None, [function(*parts, order=n) for n in ORDERS]

            _, results = jax.lax.scan(step, None, jnp.arange(x[0].shape[axis]))
            return [jnp.moveaxis(y, 0, axis) for y in results]
        return [function(*x, order=n) for n in ORDERS]

    return call if problem.transform == "eager" else jax.jit(call)


def check_pointwise(problem: Problem) -> None:
    function, rng = FUNCTIONS[problem.name], problem.rng()
    with jax.enable_x64(problem.dtype == "float64"):
        call = transformed(function.quake, problem)
        for _ in range(DRAWS):
            x = [values(rng, s, problem.dtype) for s in function.operands(problem.shape)]
            given = [LAYOUTS[problem.layout](a, np) for a in x]
            is_double = problem.dtype == "float64"
            wide = given if is_double else in_double_precision(given)
            expected, slack = exact_pointwise(problem.name, wide, is_double)
            expected = np.asarray(expected)
            for order, y in zip(ORDERS, call(*x), strict=True):
                count(f"{problem.transform} of element-wise functions", y)
                if is_double:
                    assert y.dtype == np.float64
                    error = 1e-9 * np.abs(expected) + 1e-11
                else:
                    is_float = problem.dtype in DTYPES
                    assert y.dtype == jnp.dtype(problem.dtype if is_float else "float32")
                    error = pointwise_error(problem.name, expected, slack, order)
                assert_between(y, expected, error, (problem, order))


# Reductions.


@st.composite
def row_problems(draw):
    name = draw(st.sampled_from([f.name for f in ROWS]))
    shape = draw(shapes(least_rank=0))
    if shape and draw(st.integers(0, 9)) == 0:
        shape = (draw(st.sampled_from((1, 3))), draw(st.sampled_from((4095, 4097, 8192))))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    rank = LAYOUTS[layout](np.zeros(shape), np).ndim
    kinds = ("last", "any", "any", "several", "all") if rank else ("all",)
    kind = draw(st.sampled_from(kinds))
    if kind == "all":
        axis = None
    elif kind == "several":
        count = draw(st.integers(0, rank))
        axis = tuple(draw(st.permutations(range(rank)))[:count])
        axis = tuple(a - rank * draw(st.integers(0, 1)) for a in axis)
    else:
        axis = -1 if kind == "last" else draw(st.integers(-rank, rank - 1))
    where = draw(st.sampled_from((None, None, "whole", "broadcast")))
    chosen = [("where", where)]
    if name == "logsumexp":
        chosen.append(("keepdims", draw(st.booleans())))
        chosen.append(("b", draw(st.booleans())))
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = draw(st.sampled_from((*DTYPES * 4, "float64", "int32", "int8")))
    transform = draw(st.sampled_from(("eager", "jit", "jit", "vmap")))
    return Problem(name, shape, dtype, transform, layout, seed, axis, tuple(chosen))


def row_call(problem):
    """A function of x, and of a mask and weights if there are any, giving the results by order."""
    function, chosen = getattr(quake_jax, problem.name), dict(problem.options)
    more = {"keepdims": chosen["keepdims"]} if problem.name == "logsumexp" else {}

    def results(x, where, b, axis):
        keywords = more if b is None else {**more, "b": b}
        return [function(x, axis=axis, where=where, **keywords, order=n) for n in ORDERS]

    def call(x, where, b):
        x = LAYOUTS[problem.layout](x, jnp)
        axis = problem.axis
        one = isinstance(axis, int)
        if problem.transform == "vmap" and one and x.ndim > 1 and not more.get("keepdims"):
            axis %= x.ndim
            mapped = (axis + 1) % x.ndim
            whole = [None if a is None else jnp.broadcast_to(a, x.shape) for a in (where, b)]
            axes = (mapped, *(None if a is None else mapped for a in whole))
            out = mapped - (problem.name == "logsumexp" and axis < mapped)
            inner = axis - (mapped < axis)
            return jax.vmap(functools.partial(results, axis=inner), axes, out)(x, *whole)
        return results(x, where, b, axis)

    return call if problem.transform == "eager" else jax.jit(call)


def check_rows(problem: Problem) -> None:
    rng, chosen = problem.rng(), dict(problem.options)
    is_double = problem.dtype == "float64"
    with jax.enable_x64(is_double):
        call = row_call(problem)
        for _ in range(DRAWS):
            x = values(rng, problem.shape, problem.dtype)
            given = LAYOUTS[problem.layout](x, np)
            mask_shape = given.shape
            if chosen["where"] == "broadcast":
                mask_shape = tuple(n if rng.random() < 0.5 else 1 for n in given.shape)
            where = rng.random(mask_shape) < rng.choice((0.1, 0.6)) if chosen["where"] else None
            b = None
            if chosen.get("b"):
                dtype = "float32" if x.dtype.kind in "iu" else problem.dtype
                b = rng.uniform(0.1, 2, given.shape).astype(jnp.dtype(dtype))
            wide = given if is_double else in_double_precision([given])[0]
            wide_b = None if b is None else b.astype(np.float64)
            more = {"keepdims": chosen["keepdims"]} if "keepdims" in chosen else {}
            expected = exact_row(problem.name, wide, problem.axis, where, wide_b, **more)
            for order, y in zip(ORDERS, call(x, where, b), strict=True):
                count(f"{problem.transform} of reductions", y)
                if is_double:
                    error = 1e-9 * np.abs(expected) + 1e-11
                else:
                    error = row_error(
                        problem.name, expected, wide, where, wide_b, problem.axis, order
                    )
                assert_between(y, expected, error, (problem, order))


# Derivatives, against central differences of the oracle in double precision.


@st.composite
def derivative_problems(draw):
    name = draw(st.sampled_from((*sorted(FUNCTIONS), *(f.name for f in ROWS))))
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.sampled_from((1, 2, 5, 8, 17, 33))) for _ in range(rank))
    dtype = draw(st.sampled_from(DTYPES))
    transform = draw(st.sampled_from(("jit", "vmap")))
    return Problem(name, shape, dtype, transform, "plain", draw(st.integers(0, 2**32 - 1)))


def check_derivatives(problem: Problem) -> None:
    """Forward mode against differences; reverse mode as its transpose."""
    name, rng, is_row = problem.name, problem.rng(), problem.name not in FUNCTIONS
    shapes = (problem.shape,) if is_row else FUNCTIONS[name].operands(problem.shape)
    function = getattr(quake_jax, name) if is_row else FUNCTIONS[name].quake
    keywords = {"axis": -1} if is_row else {}

    def derivatives(x, t, c, order):
        call = functools.partial(function, **keywords, order=order)
        y, dy = jax.jvp(call, x, t)
        return dy, jax.vjp(call, *x)[1](c.astype(y.dtype))

    @jax.jit
    def call(x, t, c):
        results = []
        for order in ORDERS:
            f = functools.partial(derivatives, order=order)
            results.append(f(x, t, c) if problem.transform == "jit" else jax.vmap(f)(x, t, c))
        return results

    if problem.transform == "vmap":
        shapes = [(2, *s) for s in shapes]

    def exact(x):
        if problem.transform == "vmap":
            return np.stack([of_one([a[i] for a in x]) for i in range(2)])
        return of_one(x)

    def of_one(x):
        return exact_row(name, x[0], -1) if is_row else smooth(name, x)

    dtype = jnp.dtype(problem.dtype)
    for _ in range(DRAWS):
        x = tuple(rng.uniform(-6, 6, s).astype(dtype) for s in shapes)
        t = tuple(rng.uniform(-1, 1, s).astype(dtype) for s in shapes)
        wide, wide_t = ([a.astype(np.float64) for a in arrays] for arrays in (x, t))
        h = 1e-6
        ahead, behind = (
            exact([a + d * b for a, b in zip(wide, wide_t, strict=True)]) for d in (h, -h)
        )
        expected = (ahead - behind) / (2 * h)
        c = rng.uniform(-1, 1, expected.shape).astype(dtype)
        # Some factors of the derivative carry the error of an exponential each, whose values and
        # arguments are at most so large.
        size = max(np.abs(expected).max(initial=1), *(np.abs(a).max(initial=1) for a in wide))
        if name in ("exp", "exp2", "expm1"):
            size = np.abs(expected).max(initial=1)
        for order, (dy, gradients) in zip(ORDERS, call(x, t, c), strict=True):
            count(f"{problem.transform} of derivatives", dy)
            e = MAX_REL_ERROR["softmax"][order]
            rounding = 4 * HALF_ULP[problem.dtype]
            atol = (4 * e + rounding + 2.0**-18) * size
            got = np.asarray(dy, np.float64)
            np.testing.assert_allclose(
                got, expected, rtol=0, atol=atol, err_msg=f"{problem} {order}"
            )
            pairs = zip(gradients, wide_t, strict=True)
            forward = (c.astype(np.float64) * got).sum()
            backward = sum((np.asarray(g, np.float64) * b).sum() for g, b in pairs)
            atol = (rounding + 2.0**-20) * 8 * size * max(got.size, 1)
            np.testing.assert_allclose(backward, forward, atol=atol, err_msg=f"{problem} {order}")


def smooth(name, x):
    """The exact value of what is differentiated."""
    return np.asarray(exact_pointwise(name, x, is_double=True)[0])


# Attention.


@dataclasses.dataclass(frozen=True)
class AttentionProblem:
    shapes: tuple
    dtype: str
    case: dict
    transform: str
    seed: int


@st.composite
def attention_problems(draw):
    x = draw(attention_operands())
    case = draw(options(x))
    transform = draw(st.sampled_from(("jit", "jit", "vmap", "scan", "packed", "derivative")))
    seed = draw(st.integers(0, 2**32 - 1))
    dtype = str(x[0].dtype)
    shapes = [a.shape for a in x]
    if transform == "packed":
        x = draw(attention_operands(packed=True))
        case, shapes, dtype = draw(options(x)), [a.shape for a in x], str(x[0].dtype)
    if transform == "derivative":
        dtype = "float32"
    return AttentionProblem(tuple(shapes), dtype, case, transform, seed)


ATTENTION_DRAWS = 4


def attention_call(problem):
    """A function of stacks of queries, keys and values (2, …) or of one each; results by order."""
    quake, case = quake_jax.dot_product_attention, problem.case

    def one(q, k, v):
        return [quake(q, k, v, **case, order=n) for n in ORDERS]

    def packed(q, k, v):
        qkv = jnp.stack((q, k, v), 2)
        return [quake_jax.packed_dot_product_attention(qkv, **case, order=n) for n in ORDERS]

    def scanned(*x):
        return jax.lax.scan(lambda _, parts: (None, one(*parts)), None, x)[1]

    calls = {"jit": one, "packed": packed, "vmap": jax.vmap(one), "scan": scanned}
    return jax.jit(calls[problem.transform])


def check_attention(problem: AttentionProblem) -> None:
    if problem.transform == "derivative":
        check_attention_derivative(problem)
        return
    rng = np.random.default_rng(problem.seed)
    stacked = problem.transform in ("vmap", "scan")
    call = attention_call(problem)
    for _ in range(ATTENTION_DRAWS):
        parts = [
            [normal(*s, seed=rng.integers(2**32), dtype=problem.dtype) for s in problem.shapes]
            for _ in range(1 + stacked)
        ]
        x = [np.stack(arrays) for arrays in zip(*parts, strict=True)] if stacked else parts[0]
        expected = [in_double(*p, **problem.case)[0] for p in parts]
        for order, out in zip(ORDERS, call(*x), strict=True):
            results = np.asarray(out) if stacked else np.asarray(out)[None]
            for p, e, y in zip(parts, expected, results, strict=True):
                count(f"{problem.transform} of attention", y)
                error = tolerance(p, order, problem.dtype, problem.case.get("logits_soft_cap"))
                assert_between(y, e, error, (problem, order))


def check_attention_derivative(problem: AttentionProblem) -> None:
    """Against differences of the oracle, along random directions of query, key and value."""
    rng, case = np.random.default_rng(problem.seed), problem.case
    quake = functools.partial(quake_jax.dot_product_attention, **case)

    @jax.jit
    def call(x, t, c):
        tangent = jax.jvp(quake, x, t)[1]
        return tangent, jax.vjp(quake, *x)[1](c)

    for _ in range(ATTENTION_DRAWS):
        x, t = (
            tuple(normal(*s, seed=rng.integers(2**32)) for s in problem.shapes) for _ in range(2)
        )
        h = 1e-6
        ahead, behind = (
            in_double(*(a + d * b.astype(np.float64) for a, b in zip(x, t, strict=True)), **case)[0]
            for d in (h, -h)
        )
        expected = (ahead - behind) / (2 * h)
        c = normal(*expected.shape, seed=rng.integers(2**32))
        tangent, gradients = call(x, t, c)
        count("derivative of attention", tangent)
        size = max(1.0, np.abs(expected).max(initial=0))
        got = np.asarray(tangent, np.float64)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4 * size, err_msg=str(problem))
        pairs = zip(gradients, t, strict=True)
        backward = sum((np.asarray(g, np.float64) * b).sum() for g, b in pairs)
        forward = (c * got).sum()
        atol = 1e-5 * size * np.sqrt(got.size) * 10
        np.testing.assert_allclose(backward, forward, rtol=1e-4, atol=atol, err_msg=str(problem))


# A few hundred cases, always the same; and many new ones.


@derandomized(20)
@hypothesis.given(pointwise_problems())
def test_elementwise(problem):
    check_pointwise(problem)


@derandomized(15)
@hypothesis.given(row_problems())
def test_reductions(problem):
    check_rows(problem)


@derandomized(3)
@hypothesis.given(derivative_problems())
def test_derivatives(problem):
    check_derivatives(problem)


@derandomized(8)
@hypothesis.given(attention_problems())
def test_attention(problem):
    check_attention(problem)


@pytest.mark.fuzz
def test_elementwise_at_length():
    at_length(check_pointwise, pointwise_problems(), 600, at_least=15_000)


@pytest.mark.fuzz
def test_reductions_at_length():
    at_length(check_rows, row_problems(), 400, at_least=10_000)


@pytest.mark.fuzz
def test_derivatives_at_length():
    at_length(check_derivatives, derivative_problems(), 150, at_least=5_000)


@pytest.mark.fuzz
def test_attention_at_length():
    at_length(check_attention, attention_problems(), 300, at_least=4_500)
