"""Carries out the recipes of docs/design.md in a copy of the tree: a function, and a family.

    pip install '.[test]' scikit-build-core nanobind cmake ninja && python tools/check_recipes.py

It adds a function `half_sigmoid` and a family `twice` there, exactly what the recipes name, builds
the kernels of the baseline alone (two minutes), and calls what was added: from Python, through
accelerate, the self-check, and the tests, which find the function by the table. The exit code is 1
if a step of a recipe no longer works.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What is put in front of which line of which file.
FUNCTION = (
    (
        "cpu_kernels/elementwise/activations-inl.h",
        "struct Silu {",
        """struct HalfSigmoid {
  template <int Order>
  QUAKE_INLINE vf apply(vf x) {
    return Sigmoid::apply<Order>(x) * 0.5f;
  }
};

""",
    ),
    (
        "cpu_kernels/elementwise/kernels.h",
        "  X(sigmoid, Sigmoid) ",
        "  X(half_sigmoid, HalfSigmoid) \\\n",
    ),
    (
        "cpu_kernels/accuracy/exact.h",
        "inline constexpr ExactFunction log_sigmoid",
        "inline constexpr ExactFunction half_sigmoid = {\n"
        "    [](double x) { return 0.5 / (1 + std::exp(-x)); }, true, 0, 0.5};\n",
    ),
    (
        "quake_jax/_elementwise/functions.py",
        "__all__ = ",
        '''@elementwise(
    Kernel(
        lambda m, x: 0.5 / (1 + m.exp(-x)),
        (0.25, 0.5, 0),
        lambda x, y, order: y * (1 - 2 * y),
        exact=lambda x: 0.5 * jax.nn.sigmoid(x),
    ),
)
def half_sigmoid(x: ArrayLike, *, order: Order | None = None) -> jax.Array:
    """Half of the logistic function with QuAKE (arXiv 2412.00408).

    Args:
      x: floating-point array of any shape.
      order: accuracy, as in `exp`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x is complex or no array.
      TypeError, ValueError: if order is not allowed.

    Example:
      >>> import jax.numpy as jnp, quake_jax
      >>> y = quake_jax.half_sigmoid(jnp.array([-1.0, 0.0, 1.0]))
    """
    return apply("half_sigmoid", order, x)


''',
    ),
    (
        "tools/derive_constants.py",
        '    add("silu", lambda o:',
        '    add("half_sigmoid", lambda o: bounds["sigmoid"][o])\n',
    ),
)

FAMILY = (
    ("cpu_kernels/table.h", "\nnamespace quake {", '#include "twice/kernels.h"\n'),
    ("cpu_kernels/table.h", "  AttentionKernels attention;", "  TwiceKernels twice;\n"),
    (
        "cpu_kernels/isa/kernels-inl.h",
        '#include "attention/tiles',
        '#include "twice/twice-inl.h"\n',
    ),
    ("cpu_kernels/isa/kernels-inl.h", '#include "attention/tiles', '#include "twice/fill-inl.h"\n'),
    ("cpu_kernels/isa/kernels-inl.h", "  fill_attention<", "  fill_twice(table.twice);\n"),
    ("cpu_kernels/targets.cc", "\nnamespace quake {", '#include "twice/xla.h"\n'),
    ("cpu_kernels/targets.cc", "attention_targets()}", "twice_targets(), "),
    ("CMakeLists.txt", "  ${QUAKE_KERNEL_OBJECTS})", "  cpu_kernels/twice/driver.cc\n"),
    ("CMakeLists.txt", "targets.cc xla/buffers.cc)", "twice/xla.cc "),
    (
        "quake_jax/__init__.py",
        "\n__version__ =",
        "from quake_jax._twice.api import *  # noqa: F403\n",
    ),
    ("pyproject.toml", '  "_elementwise",\n  "_core",', '  "_twice",\n'),
    ("tools/check_house.py", '"attention")', '"twice", '),
)

FILES = {
    "cpu_kernels/twice/kernels.h": """#ifndef QUAKE_TWICE_KERNELS_H_
#define QUAKE_TWICE_KERNELS_H_

#include "core/types.h"

namespace quake {

struct TwiceKernels {
  void (*twice)(const float* in, float* out, std::size_t count);
};

}  // namespace quake

#endif  // QUAKE_TWICE_KERNELS_H_
""",
    "cpu_kernels/twice/twice-inl.h": """
inline void twice(const float* in, float* out, std::size_t count) {
  for (std::size_t i = 0; i < count; i += kLanes) {
    const std::size_t n = count - i < kLanes ? count - i : kLanes;
    const vf x = load_partial(in + i, n);
    store_partial(out + i, x + x, n);
  }
}
""",
    "cpu_kernels/twice/fill-inl.h": """
inline void fill_twice(TwiceKernels& table) { table.twice = twice; }
""",
    "cpu_kernels/twice/driver.h": """#ifndef QUAKE_TWICE_DRIVER_H_
#define QUAKE_TWICE_DRIVER_H_

#include <cstddef>

#include "core/work.h"
#include "twice/kernels.h"

namespace quake {

const char* run_twice(const TwiceKernels& kernels, const float* in, float* out, std::size_t count,
                      ParallelFor parallel);

}  // namespace quake

#endif  // QUAKE_TWICE_DRIVER_H_
""",
    "cpu_kernels/twice/driver.cc": """#include "twice/driver.h"

#include <algorithm>

namespace quake {

const char* run_twice(const TwiceKernels& kernels, const float* in, float* out, std::size_t count,
                      ParallelFor parallel) {
  const auto kernel = kernels.twice;
  if (!kernel) return kNoKernel;
  parallel(ceil_div(count, kChunkElements), [=](std::size_t chunk) {
    const std::size_t begin = chunk * kChunkElements;
    kernel(in + begin, out + begin, std::min(kChunkElements, count - begin));
  });
  return nullptr;
}

}  // namespace quake
""",
    "cpu_kernels/twice/xla.h": """#ifndef QUAKE_TWICE_XLA_H_
#define QUAKE_TWICE_XLA_H_

#include "xla/targets.h"

namespace quake {

FfiTargets twice_targets();

}  // namespace quake

#endif  // QUAKE_TWICE_XLA_H_
""",
    "cpu_kernels/twice/xla.cc": """#include "twice/xla.h"

#include "isa/dispatch.h"
#include "twice/driver.h"
#include "xla/binding.h"
#include "xla/buffers.h"
#include "xla/ffi/api/ffi.h"
#include "xla/pool.h"

namespace quake {
namespace {

using namespace handlers;

constexpr const char* kName = "quake_jax_twice";

ffi::Error call_twice(ffi::ThreadPool pool, std::int32_t order, ffi::AnyBuffer x,
                      ffi::Result<ffi::AnyBuffer> y) {
  const ffi::ErrorOr<Call> call = check(kName, order, x, {&*y});
  if (call.has_error()) return call.error();
  if (!same_dimensions(x, *y)) return mismatch(kName, x, *y, "the same shape");
  if (x.element_type() != ffi::F32) return invalid(kName, "expected float32, got " + describe(x));
  return outcome(kName, run_twice(active_table().twice, static_cast<const float*>(x.untyped_data()),
                                  static_cast<float*>(y->untyped_data()), x.element_count(),
                                  on_pool(pool)));
}

XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  static auto* bound = bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().To(call_twice).release();
  return bound->Call(frame);
}

}  // namespace

FfiTargets twice_targets() { return {{kName, handler}}; }

}  // namespace quake
""",
    "quake_jax/_twice/__init__.py": '"""Twice an array."""\n',
    "quake_jax/_twice/reference.py": '''"""The algorithm in jax.numpy."""


def twice(x, *, order: int):
    return x + x
''',
    "quake_jax/_twice/primitive.py": '''"""The primitive."""

from quake_jax._core.primitive import custom_call, make_primitive, typed
from quake_jax._twice import reference


def _lower(context, x, *, target: str, order: int):
    return typed(context, custom_call(context, x, target=target, order=order))


twice = make_primitive(
    "twice",
    shape=lambda x, order: x.update(),
    lower=_lower,
    batch=lambda bind, operands, axes, order: (bind(*operands, order=order), axes[0]),
    elsewhere=reference.twice,
)
''',
    "quake_jax/_twice/derivative.py": '''"""The differentiable kernel."""

from quake_jax._core.drop_in import unary
from quake_jax._twice import primitive

twice = unary("twice", primitive.twice, lambda x, y, order: 2 + 0 * x)
''',
    "quake_jax/_twice/api.py": '''"""The public function."""

from quake_jax._core.exports import defined_in
from quake_jax._twice import derivative


def twice(x):
    """Return 2 x for a float32 array."""
    return derivative.twice(x, order=1)


__all__ = defined_in(globals())
''',
}

CALLS = """
import jax, jax.numpy as jnp, numpy as np, quake_jax
x = jnp.linspace(-8, 8, 4096, dtype=jnp.float32)
exact = 0.5 * jax.nn.sigmoid(x)
np.testing.assert_allclose(quake_jax.half_sigmoid(x, order=5), exact, 1e-6)
slope = jax.grad(lambda x: quake_jax.half_sigmoid(x, order=5).sum())(x)
np.testing.assert_allclose(slope, exact * (1 - 2 * exact), 1e-5, 1e-7)
(found,) = quake_jax.explain(lambda x: 0.5 * jax.nn.sigmoid(x), x).replaced
assert found.name == "half_sigmoid", found
rows = x.reshape(8, -1)
np.testing.assert_array_equal(jax.jit(jax.vmap(quake_jax.twice))(rows), 2 * rows)
np.testing.assert_array_equal(jax.grad(lambda x: quake_jax.twice(x).sum())(x), 2 + 0 * x)
print("the function and the family work")
"""


def apply(folder: pathlib.Path, edits) -> None:
    """Put each text in front of its line; the recipes name the places."""
    for name, line, text in edits:
        path = folder / name
        content = path.read_text()
        if content.count(line) != 1:
            raise SystemExit(
                f"{name}: the recipe's line {line!r} stands there {content.count(line)} times"
            )
        path.write_text(content.replace(line, text + line))


def main() -> int:
    """Carry out the recipes; return the exit code."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch, "tree")
        files = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
        apply(folder, FUNCTION)
        apply(folder, FAMILY)
        for name, text in FILES.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

        built = pathlib.Path(scratch, "built")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(folder), str(built))),
            "JAX_PLATFORMS": "cpu",
        }
        options = [
            "--config-settings=cmake.define.QUAKE_ONLY_ISAS=baseline",
            "--target",
            str(built),
        ]
        tests = ["-q", "-p", "no:cacheprovider", "-k", "half_sigmoid", "tests/functions"]
        for command in (
            ["tools/derive_constants.py"],
            ["tools/check_house.py"],
            ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", *options, "."],
            ["-c", CALLS],
            ["-m", "quake_jax"],
            ["-m", "pytest", *tests],
        ):
            print("== python", *(command if command[0] != "-c" else ["-c", "…"]), flush=True)
            done = subprocess.run(
                [sys.executable, *command], cwd=folder, env=environment, check=False
            )
            if done.returncode:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
