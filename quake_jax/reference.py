"""The algorithms of the CPU kernels, written in jax.numpy: the fallback on other platforms and the
oracle of the tests.

Arithmetic is float32, rounded once to the input's dtype: float32, bfloat16 or float16. `order`
(1 to 5) is the degree of the polynomial for 2^f on [0, 1), in e^x = 2^n · 2^f. The method is QuAKE
(Narayanaswami, Srinivasan, Ravindran, arXiv 2412.00408, 2024). No step depends on whether the
compiler fuses a multiplication with an addition.
"""

from quake_jax._attention.masks import MASKED_LOGIT as MASKED_LOGIT
from quake_jax._attention.masks import kept_keys as kept_keys
from quake_jax._attention.reference import attention_logits as attention_logits
from quake_jax._attention.reference import dot_product_attention as dot_product_attention
from quake_jax._attention.reference import grouped as grouped
from quake_jax._attention.reference import unfused_attention as unfused_attention
from quake_jax._elementwise.reference import *  # noqa: F403
from quake_jax._rows.reference import *  # noqa: F403
