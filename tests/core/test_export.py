"""Programs that leave the process: exported ones, the persistent compilation cache, pickles."""

import functools
import pickle
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from support import inputs, run_python

import quake_jax
import quake_jax.linen
from quake_jax._core.constants import MAX_REL_ERROR

# Export: a Vision Transformer on the kernels, loaded where there is no Flax.

PLATFORMS = ("cpu", "cuda", "tpu")


def vision_transformer():
    """A ViT of Flax, small, and variables of its shapes."""
    nn = pytest.importorskip("flax.linen")
    from flax_models import key, variables_of

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(32, (4, 4), strides=(4, 4), name="patches")(images)
            x = x.reshape(x.shape[0], -1, 32)
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
                x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
            return nn.softmax(nn.Dense(10)(x.mean(1)))

    model = ViT()
    return model, variables_of(model.init, key(0), jnp.zeros((1, 16, 16, 3)))


LOAD = """
import sys
for name in ("flax", "optax"):
    sys.modules[name] = None  # importing it fails
import jax.export, numpy as np
exported = jax.export.deserialize(bytearray(open("vit.bin", "rb").read()))
data = np.load("data.npz")
try:  # without the kernels
    exported.call(data["images5"])
    raise SystemExit("it ran")
except Exception as error:
    assert "quake_jax_" in str(error), error
    print(type(error).__name__, str(error).splitlines()[0])
import quake_jax
for batch in (1, 5):
    for call in (exported.call, jax.jit(exported.call)):
        actual = np.asarray(call(data[f"images{batch}"]))
        print("largest difference", np.abs(actual - data[f"result{batch}"]).max())
print("platforms", *exported.platforms)
"""


def test_an_exported_vit_runs_in_a_process_without_flax(tmp_path):
    model, variables = vision_transformer()

    @jax.jit
    def f(images):
        with quake_jax.linen.substitute():
            return model.apply(variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 16, 16, 3), jnp.float32)
    checks = quake_jax.disabled_export_checks()
    exported = jax.export.export(f, platforms=PLATFORMS, disabled_checks=checks)(images)
    kernels = set(re.findall(r"@quake_jax_(\w+)", exported.mlir_module()))
    assert {"dot_product_attention", "bias_gelu_tanh"} <= kernels
    # Nothing but quake_jax's calls is excused, and each of them needs to be.
    assert set(exported.disabled_safety_checks) == set(checks)
    (tmp_path / "vit.bin").write_bytes(exported.serialize())
    data = {f"images{n}": np.asarray(inputs((n, 16, 16, 3))) / 8 for n in (1, 5)}
    for n in (1, 5):
        data[f"result{n}"] = np.asarray(exported.call(data[f"images{n}"]))
        # The order of the last softmax: f leaves that of so small a batch to jax.nn.
        expected = f(data[f"images{n}"])
        np.testing.assert_allclose(data[f"result{n}"], expected, atol=MAX_REL_ERROR["softmax"][3])
    np.savez(tmp_path / "data.npz", **data)
    out = run_python(LOAD, tmp_path).stdout
    differences = [float(d) for d in re.findall(r"largest difference (\S+)", out)]
    # Matrix products may be added up in another order there.
    assert len(differences) == 4 and max(differences) < 2.0**-20, out
    assert f"platforms {' '.join(PLATFORMS)}" in out


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_exported_vit_has_kernels_on_cpus_alone(platform):
    model, variables = vision_transformer()

    def f(images):
        with quake_jax.linen.substitute():
            return model.apply(variables, images)

    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    # Nothing has to be excused where no kernel is called.
    checks = quake_jax.disabled_export_checks() if platform == "cpu" else []
    exported = jax.export.export(jax.jit(f), platforms=[platform], disabled_checks=checks)(images)
    assert ("@quake_jax_" in exported.mlir_module()) == (platform == "cpu")


@pytest.mark.parametrize(
    "version",
    range(
        jax.export.minimum_supported_calling_convention_version,
        jax.export.maximum_supported_calling_convention_version + 1,
    ),
)
def test_every_calling_convention(version):
    def f(query, x):
        return quake_jax.dot_product_attention(query, query, query), quake_jax.softmax(x)

    (batch,) = jax.export.symbolic_shape("b")
    shapes = (batch, 4, 2, 8), (batch, 16)
    types = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    old = jax.config.jax_export_calling_convention_version
    jax.config.update("jax_export_calling_convention_version", version)
    try:
        exported = jax.export.export(
            jax.jit(f), disabled_checks=quake_jax.disabled_export_checks()
        )(*types)
    finally:
        jax.config.update("jax_export_calling_convention_version", old)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.calling_convention_version == version
    x = inputs((3, 4, 2, 8)), inputs((3, 16))
    for actual, expected in zip(loaded.call(*x), f(*x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2.0**-18, atol=2.0**-20)


# The persistent compilation cache.

CACHED = """
import os, sys
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import quake_jax
jax.config.update("jax_compilation_cache_dir", os.path.join(os.getcwd(), "cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", IGNORES_NUMBERS)
found = {"cache_hits": 0, "cache_misses": 0}
def count(event, **_):
    name = event.rsplit("/", 1)[-1]
    if "compilation_cache" in event and name in found:
        found[name] += 1
jax.monitoring.register_event_listener(count)

rng = np.random.default_rng(0)
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def split(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))
q, k, v = (rng.standard_normal((4, 16, 4, 8), np.float32) for _ in range(3))
x = rng.standard_normal((8, 512), np.float32)
heads = [split(a, "a", None, "b") for a in (q, k, v)]

# Of one shape, and different: on a mesh each of the first holds a call that JAX knows by a number.
def attention(causal, order, scale):
    return lambda *x: quake_jax.dot_product_attention(
        *x, is_causal=causal, order=order, scale=scale)
programs = {
    "plain": (attention(False, 5, None), heads),
    "causal": (attention(True, 5, None), heads),
    "order 1": (attention(False, 1, None), heads),
    "scaled": (attention(False, 5, 0.5), heads),
    "on one device": (attention(True, 5, None), [q, k, v]),
    "softmax": (quake_jax.softmax, [split(x, "a")]),
    "softmax 1": (lambda x: quake_jax.softmax(x, order=1), [split(x, "a")]),
    "accelerated": (quake_jax.accelerate(jax.nn.gelu), [x]),
}
names = list(programs)
if os.environ.get("REVERSE"):
    names.reverse()  # the numbers of the calls are then another's
results = {}
for name in names:
    f, operands = programs[name]
    before = dict(found)
    results[name] = np.asarray(jax.jit(lambda *x, f=f: f(*x))(*operands))
    print(name, *(f"{key}={found[key] - before[key]}" for key in found), sep=";")
np.savez(os.environ["RESULT"], **results)
print("isa", quake_jax.isa(), sep=";")
"""


NUMBERED = ("plain", "causal", "order 1", "scaled")


def cached_run(folder, ignores_numbers=True, **environment):
    """Results and (hits, misses) of each program, and the instruction set."""
    code = f"IGNORES_NUMBERS = {ignores_numbers}\n{CACHED}"
    result = f"{len(list(folder.iterdir()))}.npz"
    out = run_python(code, folder, RESULT=result, **environment).stdout
    rows = [line.split(";") for line in out.splitlines()]
    counts = {name: tuple(int(c.split("=")[1]) for c in rest) for name, *rest in rows[:-1]}
    return dict(np.load(folder / result)), counts, rows[-1][1]


def test_the_compilation_cache_serves_other_processes(tmp_path):
    first, counts, isa = cached_run(tmp_path)
    # Each program makes an entry of its own, and finds no other's.
    assert set(counts.values()) == {(0, 1)}, counts
    for i, name in enumerate(NUMBERED):
        assert not any(np.array_equal(first[name], first[other]) for other in NUMBERED[:i])
    np.testing.assert_allclose(first["causal"], first["on one device"], atol=2.0**-20)
    np.testing.assert_allclose(first["softmax"].sum(-1), 1, rtol=2.0**-12)

    # Another process, in another order, so that the numbers of its calls are others.
    second, counts, _ = cached_run(tmp_path, REVERSE="1")
    assert set(counts.values()) == {(1, 0)}, counts
    for name, y in first.items():
        np.testing.assert_array_equal(second[name], y, err_msg=name)

    # The kernels are not in the entries, so another instruction set takes them too.
    other = next((name for name in quake_jax.supported_isas() if name != isa), None)
    if other is not None:
        third, counts, other_isa = cached_run(tmp_path, QUAKE_JAX_ISA=other)
        assert set(counts.values()) == {(1, 0)} and other_isa == other != isa
        for name, y in first.items():
            np.testing.assert_allclose(third[name], y, rtol=2.0**-16, atol=2.0**-16, err_msg=name)


def test_jax_finds_split_attention_in_the_cache_only_if_it_ignores_numbers(tmp_path):
    # JAX's default: the numbers count, so it compiles such programs anew; they are right, too.
    first, _, _ = cached_run(tmp_path, ignores_numbers=False)
    second, counts, _ = cached_run(tmp_path, ignores_numbers=False, REVERSE="1")
    assert {name for name, (hits, _) in counts.items() if hits} == set(counts) - set(NUMBERED)
    for name, y in first.items():
        np.testing.assert_array_equal(second[name], y, err_msg=name)


# Pickles and copies. (Interceptors and what nnx.substitute puts in: in the tests of these.)


@quake_jax.accelerate
def decorated(x):
    return jax.nn.softmax(x)


def plain(x):
    return jax.nn.softmax(x)


def picklable():
    from quake_jax._flax import substitutes

    functions = substitutes.table({}, None)
    return {
        "a public function": quake_jax.softmax,
        "attention_fn": quake_jax.linen.attention_fn,
        "an accelerated function that is a module's": decorated,
        "a report": quake_jax.explain(plain, inputs((64, 64))),
        "a substitute": substitutes.substitute_of(jax.nn.gelu, functions, 3),
        "an interceptor with approximations": quake_jax.linen.interceptor(
            2, {"softmax", "gelu"}, softmax="e2softmax", gelu="shiftgelu"
        ),
    }


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_what_can_be_pickled(protocol):
    pytest.importorskip("flax")
    for name, value in picklable().items():
        copied = pickle.loads(pickle.dumps(value, protocol))
        assert type(copied) is type(value), name
        assert str(copied) == str(value) if "report" in name else copied == value, name


def test_what_cannot_be_pickled_says_so():
    # Contexts belong to a thread, and functions made on the spot to no module: as in Python.
    pytest.importorskip("flax")
    contexts = quake_jax.default_order(5), quake_jax.linen.substitute()
    for value in (*contexts, quake_jax.accelerate(plain), quake_jax.accelerate(lambda x: x)):
        with pytest.raises((TypeError, pickle.PicklingError, AttributeError), match="pickle"):
            pickle.dumps(value)


READ_ELSEWHERE = """
import pickle, jax.numpy as jnp, numpy as np, quake_jax, quake_jax.linen
function, interceptor, x, expected = pickle.load(open("pickled", "rb"))
np.testing.assert_array_equal(function(x), expected)
print(interceptor)
"""


def test_pickles_are_good_in_another_process(tmp_path):
    pytest.importorskip("flax")
    x = np.asarray(inputs((8, 16)))
    function = functools.partial(quake_jax.softmax, order=1)
    interceptor = quake_jax.linen.interceptor(1, only=["softmax"])
    value = function, interceptor, x, np.asarray(function(x))
    (tmp_path / "pickled").write_bytes(pickle.dumps(value))
    out = run_python(READ_ELSEWHERE, tmp_path).stdout
    assert out.strip() == str(interceptor)
