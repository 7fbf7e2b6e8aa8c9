"""`python -m quake_jax.accuracy`."""

import sys

from quake_jax.accuracy.command import main

sys.exit(main())
