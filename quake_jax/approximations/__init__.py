"""Published approximations of softmax, GELU, layer normalisation and exp, to compare QuAKE with.

Each is in jax.numpy, with the parameters of its paper, takes float arrays, which it quantises if
the method is one of integers, and has the derivative of the exact function. Functions whose names
end in `_int` take the integers. `registry` lists all; `find` looks one up by kind and name.

These are emulations for studies of quality: what their papers gain on hardware of their own, they
do not gain here.
"""

from quake_jax.approximations._exponentials import flash_attention4_exp as flash_attention4_exp
from quake_jax.approximations._exponentials import malossi_exp as malossi_exp
from quake_jax.approximations._exponentials import ratio_exp as ratio_exp
from quake_jax.approximations._exponentials import schraudolph_exp as schraudolph_exp
from quake_jax.approximations._fqvit import log_int_softmax as log_int_softmax
from quake_jax.approximations._fqvit import log_int_softmax_int as log_int_softmax_int
from quake_jax.approximations._fqvit import power_of_two_factor as power_of_two_factor
from quake_jax.approximations._fqvit import ptf_layernorm as ptf_layernorm
from quake_jax.approximations._fqvit import ptf_layernorm_int as ptf_layernorm_int
from quake_jax.approximations._front import softmax_from_exp as softmax_from_exp
from quake_jax.approximations._gemmlowp import gemmlowp_exp as gemmlowp_exp
from quake_jax.approximations._gemmlowp import gemmlowp_exp_int as gemmlowp_exp_int
from quake_jax.approximations._gemmlowp import gemmlowp_logistic as gemmlowp_logistic
from quake_jax.approximations._gemmlowp import gemmlowp_logistic_int as gemmlowp_logistic_int
from quake_jax.approximations._ibert import i_exp as i_exp
from quake_jax.approximations._ibert import i_exp_int as i_exp_int
from quake_jax.approximations._ibert import i_gelu as i_gelu
from quake_jax.approximations._ibert import i_gelu_int as i_gelu_int
from quake_jax.approximations._ibert import i_softmax as i_softmax
from quake_jax.approximations._ibert import i_softmax_int as i_softmax_int
from quake_jax.approximations._int_attention import index_softmax as index_softmax
from quake_jax.approximations._int_attention import index_softmax_int as index_softmax_int
from quake_jax.approximations._ivit import i_layernorm as i_layernorm
from quake_jax.approximations._ivit import i_layernorm_int as i_layernorm_int
from quake_jax.approximations._ivit import shift_exp as shift_exp
from quake_jax.approximations._ivit import shift_exp_int as shift_exp_int
from quake_jax.approximations._ivit import shiftgelu as shiftgelu
from quake_jax.approximations._ivit import shiftgelu_int as shiftgelu_int
from quake_jax.approximations._ivit import shiftmax as shiftmax
from quake_jax.approximations._ivit import shiftmax_int as shiftmax_int
from quake_jax.approximations._lut_softmax import lut2d_softmax as lut2d_softmax
from quake_jax.approximations._lut_softmax import lut2d_softmax_int as lut2d_softmax_int
from quake_jax.approximations._lut_softmax import rexp_softmax as rexp_softmax
from quake_jax.approximations._lut_softmax import rexp_softmax_int as rexp_softmax_int
from quake_jax.approximations._nn_lut import nn_lut_gelu as nn_lut_gelu
from quake_jax.approximations._nn_lut import nn_lut_layernorm as nn_lut_layernorm
from quake_jax.approximations._nn_lut import nn_lut_softmax as nn_lut_softmax
from quake_jax.approximations._nn_lut import nn_lut_table as nn_lut_table
from quake_jax.approximations._nn_lut_fit import LookupTable as LookupTable
from quake_jax.approximations._nn_lut_fit import ReluNetwork as ReluNetwork
from quake_jax.approximations._nn_lut_fit import fit_relu_network as fit_relu_network
from quake_jax.approximations._nn_lut_fit import lookup_table as lookup_table
from quake_jax.approximations._registry import Approximation as Approximation
from quake_jax.approximations._registry import find as find
from quake_jax.approximations._registry import registry as registry
from quake_jax.approximations._sole import ailayernorm as ailayernorm
from quake_jax.approximations._sole import ailayernorm_int as ailayernorm_int
from quake_jax.approximations._sole import e2softmax as e2softmax
from quake_jax.approximations._sole import e2softmax_int as e2softmax_int
