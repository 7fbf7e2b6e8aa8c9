"""QuAKE kernels for JAX on CPUs: fast approximate exponentials, softmax and activation functions.

Each function has the signature of the one in jax.nn or jax.numpy that it replaces, and takes a
keyword `order`, from 1 (fastest) to 5 (float32-accurate).

Three environment variables are read once, at import. QUAKE_JAX_DISABLE=1 turns every function into
the exact one that it replaces. QUAKE_JAX_ISA forces an instruction set (see `supported_isas`).
QUAKE_JAX_SILENCE_VERSION_WARNING=1 imports without a warning beside a JAX that is newer than those
that quake_jax has been tested with.
"""

# First of all: says so if JAX is too old or too new for what follows.
from quake_jax import _compat as _compat
from quake_jax import approximations as approximations
from quake_jax import reference as reference
from quake_jax._config import default_order as default_order
from quake_jax._config import set_default_order as set_default_order
from quake_jax._extension import disabled_export_checks as disabled_export_checks
from quake_jax._extension import isa as isa
from quake_jax._extension import supported_isas as supported_isas
from quake_jax._extension import version as _version
from quake_jax.accelerate import accelerate as accelerate
from quake_jax.accelerate import explain as explain
from quake_jax.activations import celu as celu
from quake_jax.activations import elu as elu
from quake_jax.activations import exp as exp
from quake_jax.activations import exp2 as exp2
from quake_jax.activations import expm1 as expm1
from quake_jax.activations import gelu as gelu
from quake_jax.activations import log_sigmoid as log_sigmoid
from quake_jax.activations import mish as mish
from quake_jax.activations import quick_gelu as quick_gelu
from quake_jax.activations import selu as selu
from quake_jax.activations import sigmoid as sigmoid
from quake_jax.activations import silu as silu
from quake_jax.activations import softplus as softplus
from quake_jax.activations import swish as swish
from quake_jax.activations import tanh as tanh
from quake_jax.attention import dot_product_attention as dot_product_attention
from quake_jax.attention import packed_dot_product_attention as packed_dot_product_attention
from quake_jax.gated import bias_gelu as bias_gelu
from quake_jax.gated import bias_silu as bias_silu
from quake_jax.gated import geglu as geglu
from quake_jax.gated import glu as glu
from quake_jax.gated import swiglu as swiglu
from quake_jax.logsumexp import logaddexp as logaddexp
from quake_jax.logsumexp import logsumexp as logsumexp
from quake_jax.softmax import log_softmax as log_softmax
from quake_jax.softmax import softmax as softmax

__version__ = _version()
