"""QuAKE kernels for JAX on CPUs: fast approximate exponentials, softmax and activation functions.

Each function has the signature of the one in jax.nn or jax.numpy that it replaces, and takes a
keyword `order`, from 1 (fastest) to 5 (float32-accurate).

Three environment variables are read once, at import. QUAKE_JAX_DISABLE=1 turns every function into
the exact one that it replaces. QUAKE_JAX_ISA forces an instruction set (see `supported_isas`).
QUAKE_JAX_SILENCE_VERSION_WARNING=1 imports without a warning beside a JAX that is newer than those
that quake_jax has been tested with.
"""

import importlib as _importlib

# First of all: says so if JAX is too old or too new for what follows.
from quake_jax._core import jax_names as _jax_names  # noqa: F401

# isort: split
from quake_jax import approximations as approximations
from quake_jax import kv_cache as kv_cache
from quake_jax import reference as reference
from quake_jax._attention.api import *  # noqa: F403
from quake_jax._core.config import default_order as default_order
from quake_jax._core.config import set_default_order as set_default_order
from quake_jax._core.extension import disabled_export_checks as disabled_export_checks
from quake_jax._core.extension import isa as isa
from quake_jax._core.extension import supported_isas as supported_isas
from quake_jax._core.extension import version as _version
from quake_jax._dense.api import *  # noqa: F403
from quake_jax._dense.norms import *  # noqa: F403
from quake_jax._dense.packed import *  # noqa: F403
from quake_jax._elementwise.functions import *  # noqa: F403
from quake_jax._elementwise.gated import *  # noqa: F403
from quake_jax._pack.api import PackedFunction as PackedFunction
from quake_jax._pack.api import pack as pack
from quake_jax._pack.files import load_packed as load_packed
from quake_jax._pack.files import save_packed as save_packed
from quake_jax._pack.plan import PackedLeaf as PackedLeaf
from quake_jax._pack.report import PackReport as PackReport
from quake_jax._pack.shardings import packed_shardings as packed_shardings
from quake_jax._rewrite.api import accelerate as accelerate
from quake_jax._rewrite.api import explain as explain
from quake_jax._rows.api import *  # noqa: F403
from quake_jax._rows.norms import *  # noqa: F403

__version__ = _version()

# Imported on first use: they need Flax.
_ON_USE = ("linen", "nnx")


def __getattr__(name: str):
    if name in _ON_USE:
        return _importlib.import_module(f"quake_jax.{name}")
    raise AttributeError(f"module 'quake_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_USE])
