"""What is run on threads, devices and processes; JAX is imported where that has been arranged."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import peers


@dataclass(frozen=True)
class Case:
    """What is run, and along which axis of the mesh it is divided: "data" or "model"."""

    name: str
    axis: str = "data"


CASES = (
    Case("softmax 8×12×197×197"),
    Case("gelu 8×197×3072"),
    Case("attention 8×197×12×64"),
    Case("attention 8×197×12×64", "model"),
    Case("GPT prefill 8×256"),
    Case("GPT prefill 8×256", "model"),
)
DIVIDED = {"data": "batch", "model": "heads"}


def make(case: Case, quick: bool) -> Callable[[int], None]:
    """A function that runs a case so many times on all devices."""
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = jax.device_count()
    shape = (devices, 1) if case.axis == "data" else (1, devices)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    f, operands, specs, result = function(case.name.split()[0], quick)

    def place(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec or P()))

    operands = jax.tree.map(place, operands, specs)
    compiled = jax.jit(f, out_shardings=NamedSharding(mesh, result))

    # Each: calls on several devices need not end in the order in which they began.
    return peers.repeat(lambda: compiled(*operands).block_until_ready(), operands)


def function(name: str, quick: bool):
    """A function, its operands and how they and its result are divided."""
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import quake_jax

    def normal(*shape):
        if quick:
            shape = tuple(min(n, 16) for n in shape)
        return np.random.default_rng(0).standard_normal(shape, np.float32)

    rows, heads = P("data"), P("data", None, "model")
    if name == "softmax":
        return quake_jax.softmax, (normal(8, 12, 197, 197),), (rows,), rows
    if name == "gelu":
        return quake_jax.gelu, (normal(8, 197, 3072),), (rows,), rows
    if name == "attention":
        x = normal(8, 197, 12, 64)
        return quake_jax.dot_product_attention, (x, x, x), (heads,) * 3, heads
    return _prefill(quick)


def _prefill(quick: bool):
    """The logits after eight texts, by a GPT of four layers with random weights."""
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    import quake_jax.linen
    from benchmarks.models import cases, flax_models

    sizes = cases.Sizes(layers=4, width=256, heads=8, vocabulary=1024, positions=256)
    if quick:
        sizes = cases.Sizes(layers=1, width=32, heads=2, vocabulary=64, positions=16)
    case = cases.Case("gpt", "GPT", "gpt2", sizes, 8, sizes.positions)
    model = flax_models.module(case)
    parameters, _ = flax_models.variables(case)

    def spec(path, _):
        """Heads and hidden units: outputs of what makes them, inputs of what reads them."""
        module, leaf = path[-2].key, path[-1].key
        if module in ("query", "key", "value", "Dense_0"):
            return P(None, "model") if leaf == "kernel" else P("model")
        return P("model") if module in ("out", "Dense_1") and leaf == "kernel" else P()

    def f(parameters, tokens, places):
        with quake_jax.linen.substitute():
            return model.apply({"params": parameters}, tokens, places)

    parameters = jax.tree.map(np.asarray, parameters)
    specs = jax.tree_util.tree_map_with_path(spec, parameters)
    tokens, places = map(np.asarray, flax_models.inputs(case))
    return f, (parameters, tokens, places), (specs, P("data"), P()), P("data")
