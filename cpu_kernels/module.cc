// The Python extension module: hands the FFI targets and the build's identity to quake_jax.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "accuracy/bindings.h"
#include "isa/dispatch.h"
#include "targets.h"

namespace nb = nanobind;

NB_MODULE(_quake_jax_cpu, m) {
  m.doc() = "CPU kernels of quake_jax, as XLA FFI targets.";
  // Chosen now, so that a wrong QUAKE_JAX_ISA is an error of the import and not of the first call.
  try {
    quake::active_table();
  } catch (const std::runtime_error& error) {
    throw nb::import_error(error.what());
  }
  m.def("registrations", [] {
    nb::dict targets;
    for (const quake::FfiTarget& target : quake::ffi_targets()) {
      targets[target.name] = nb::capsule(reinterpret_cast<void*>(target.handler));
    }
    return targets;
  });
  m.def("isa", [] { return std::string(quake::active_table().isa); });
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const quake::KernelTable* table : quake::supported_tables()) names.push_back(table->isa);
    return names;
  });
  m.def("version", [] { return std::string(QUAKE_VERSION); });
  m.def("source_digest", [] { return std::string(QUAKE_SOURCE_DIGEST); });
  quake::bind_accuracy(m);
}
