"""The private and version-dependent names of JAX that quake_jax needs, each under one name.

No other module uses `jax._src`, `jax.interpreters`, `jax.extend`, `jax.experimental` or jaxlib, or
asks what JAX has: when a new JAX moves something, this file alone changes.
"""

from __future__ import annotations

import contextlib
import functools
import os

import jax

from quake_jax._core import versions

try:
    from jaxlib.version import __version__ as jaxlib_version
except ImportError as error:
    raise versions.lacking(error) from error
versions.refuse_older(jaxlib_version)
try:
    from jax import make_user_context
    from jax._src import checkify, source_info_util
    from jax._src.config import _check_vma, trace_context, use_shardy_partitioner
    from jax._src.core import DebugInfo, auto_insert_reshard, extend_axis_env_nd
    from jax._src.dispatch import apply_primitive
    from jax._src.interpreters.mlir import lower_with_sharding_in_types, reshape
    from jax._src.lax.lax import _convert_element_type, broadcasting_sharding_rule
    from jax._src.lib import xla_client
    from jax._src.numpy.util import promote_args_inexact
    from jax._src.sharding_impls import (
        UNSPECIFIED,
        GSPMDSharding,
        ShardingContext,
        SPMDAxisContext,
    )
    from jax._src.state.types import AbstractRef
    from jax.core import Tracer
    from jax.experimental.custom_partitioning import custom_partitioning
    from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, Primitive, Var, jaxpr_as_fun
    from jax.interpreters import ad, batching, mlir, partial_eval

    # What is used of the modules among these; tests/core/test_versions.py finds what is missing.
    _USED_LATER = (
        ad.primitive_jvps,
        batching.primitive_batchers,
        checkify.error_checks,
        checkify.nan_error_check,
        mlir.ir,
        mlir.lower_fun,
        mlir.register_lowering,
        partial_eval.dce_jaxpr,
        source_info_util.user_frames,
        xla_client.HloSharding,
        xla_client.OpSharding.Type.REPLICATED,
    )
except (ImportError, AttributeError) as error:
    raise versions.lacking(error) from error
versions.warn_of_newer()

__all__ = [
    "INLINE",
    "UNSPECIFIED",
    "ClosedJaxpr",
    "DropVar",
    "GSPMDSharding",
    "Jaxpr",
    "Primitive",
    "ShardingContext",
    "Tracer",
    "Var",
    "ad",
    "apply_primitive",
    "auto_insert_reshard",
    "batching",
    "broadcasting_sharding_rule",
    "check_for_nan",
    "custom_partitioning",
    "equation_context",
    "has_unreduced_axes",
    "in_current_mesh",
    "is_high",
    "is_partitioned",
    "is_reference",
    "is_rule_of_jax",
    "is_unspecified",
    "jaxpr_as_fun",
    "lower_with_sharding_in_types",
    "make_user_context",
    "mlir",
    "only_names_mesh",
    "promote_args_inexact",
    "reshape",
    "scan_counts",
    "scan_with_more",
    "trace_context",
    "unnamed",
    "use_shardy_partitioner",
    "user_frames",
    "varying_as",
    "with_weak_type",
    "without_dead_code",
    "without_mesh",
    "xla_client",
]

# The value of jax.jit's `inline` that leaves no trace of a call in a jaxpr: newer JAX has a choice
# of moments, and True there keeps the call until the program is lowered.
INLINE = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


def has_unreduced_axes(aval) -> bool:
    """Whether an abstract value is a partial sum, still to be added up over some mesh axes."""
    return bool(aval.sharding.spec.unreduced) or bool(aval.manual_axis_type.unreduced)


def check_for_nan(primitive) -> None:
    """Let the float checks of jax.experimental.checkify see a NaN that a primitive makes."""
    checkify.error_checks[primitive] = functools.partial(checkify.nan_error_check, primitive)


def without_mesh():
    """A context manager: what is traced inside knows of no mesh."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def in_current_mesh(aval):
    """An abstract value as JAX's own functions give it: if it is of no mesh, of the one in force.

    That is so where no axis of the mesh is of type Explicit.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not mesh._are_all_axes_auto_or_manual or not aval.sharding.mesh.empty:
        return aval
    return aval.update(sharding=aval.sharding.update(mesh=mesh))


def with_weak_type(x: jax.Array, weak_type: bool) -> jax.Array:
    """Return x with a weak type, or with none."""
    return _convert_element_type(x, x.dtype, weak_type)


def is_partitioned(context) -> bool:
    """Whether XLA may split the arrays of a program that is being lowered over several devices.

    Not so within `jax.shard_map` over all axes of its mesh: there an array is what one device has.
    """
    axes = context.module_context.axis_context
    if isinstance(axes, ShardingContext):
        return axes.num_devices > 1
    if isinstance(axes, SPMDAxisContext):
        return axes.mesh.size > 1 and set(axes.mesh.axis_names) != set(axes.manual_axes)
    return False


# Jaxprs, which quake_jax._rewrite edits.

_JAX_FOLDER = os.path.join(jax.__path__[0], "")


def unnamed(function: str, inputs: int, results: int):
    """The debug information of a jaxpr whose inputs and results have no names."""
    return DebugInfo(function, function, ("",) * inputs, ("",) * results)


def without_dead_code(jaxpr) -> tuple[object, list[bool]]:
    """An open jaxpr without what its results do not need, and which of its inputs are left."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def is_high(equations) -> bool:
    """Whether JAX must take some of these equations apart before it lowers them (jnp.ldexp's).

    It does so only in a jaxpr whose own `is_high` is True.
    """
    return any(e.primitive.is_high(*(v.aval for v in e.invars), **e.params) for e in equations)


def scan_counts(equation) -> tuple[int, int]:
    """How many of a scan equation's operands are constants, and how many are carried."""
    params = equation.params
    if "ft_in" not in params:
        return params["num_consts"], params["num_carry"]
    # A newer JAX: a tree for each kind of operand.
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def scan_with_more(equation, consts: int, stacked: int) -> dict:
    """A scan equation's parameters with more constants behind its own, and more to go over."""
    params = equation.params
    if "ft_in" not in params:
        return params | {"num_consts": params["num_consts"] + consts}
    from jax._src import flattree  # an older JAX has none

    own, carry, over = params["ft_in"].unpack()
    trees = ((own, flattree.nones(consts)), carry, (over, flattree.nones(stacked)))
    return params | {"ft_in": flattree.pack(trees)}


def is_unspecified(sharding) -> bool:
    """Whether an element of a jit equation's in_shardings or out_shardings says nothing."""
    return type(sharding).__name__ == "UnspecifiedValue"


def is_rule_of_jax(rule) -> bool:
    """Whether the differentiation rule of a custom_jvp_call equation is one of JAX's own."""
    function = getattr(rule.debug_info, "func_src_info", None) or ""
    _, _, place = function.partition(" at ")
    # `defjvps` makes a rule there of those that it is given.
    return place.startswith(_JAX_FOLDER) and "custom_derivatives.py" not in place


def only_names_mesh(equation) -> bool:
    """Whether an equation does no more than say that an array of no mesh is one of some mesh.

    Under `jax.set_mesh` jax.numpy has these where it broadcasts an argument made outside.
    """
    if equation.primitive.name != "reshard":
        return False
    (before,), (after,) = equation.invars, equation.outvars
    return before.aval.sharding.mesh.empty and not any(after.aval.sharding.spec)


def user_frames(source_info) -> list[tuple[str, int, str]]:
    """File, line and function of the frames outside JAX that made an equation, innermost first."""
    return [
        (frame.file_name, frame.start_line, frame.function_name)
        for frame in source_info_util.user_frames(source_info.traceback)
    ]


@contextlib.contextmanager
def equation_context(equation):
    """A context manager: the mesh and other settings that an equation was traced in."""
    avals = (v.aval for v in (*equation.invars, *equation.outvars))
    # Within shard_map types may say along which axes of the mesh arrays vary; equations there are
    # traced so that those of their results do too.
    types = [getattr(aval, "manual_axis_type", None) for aval in avals]
    varies = any(kind is not None and kind.varying for kind in types)
    with equation.ctx.manager, _check_vma(varies):
        mesh = jax.sharding.get_abstract_mesh()
        axes = [(name, mesh.shape[name]) for name in mesh.manual_axes] if varies else []
        with extend_axis_env_nd(axes):
            yield


def varying_as(x, aval):
    """An array, within shard_map, as one that varies along the axes of a mesh that aval does."""
    axes = aval.manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def is_reference(x) -> bool:
    """Whether x is a mutable array."""
    return isinstance(getattr(x, "aval", None), AbstractRef)
