// Adds the accuracy sweep to the Python module: what `python -m quake_jax.accuracy` runs.

#ifndef QUAKE_ACCURACY_BINDINGS_H_
#define QUAKE_ACCURACY_BINDINGS_H_

#include <nanobind/nanobind.h>

namespace quake {

// elementwise_functions(), measure_accuracy() and evaluate().
void bind_accuracy(nanobind::module_& m);

}  // namespace quake

#endif  // QUAKE_ACCURACY_BINDINGS_H_
