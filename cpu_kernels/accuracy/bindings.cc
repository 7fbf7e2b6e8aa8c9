#include "accuracy/bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "accuracy/sweep.h"
#include "accuracy/exact.h"

namespace nb = nanobind;

namespace quake {
namespace {

nb::dict as_dict(const Extreme& extreme) {
  nb::dict fields;
  fields["value"] = extreme.value;
  fields["input"] = extreme.input;
  fields["got"] = extreme.got;
  fields["wanted"] = extreme.wanted;
  return fields;
}

// See accuracy.h; runs without the GIL.
nb::list measure(const std::string& function, const std::string& dtype, std::uint64_t first,
                 std::uint64_t count, std::uint64_t stride, const std::vector<std::string>& isas,
                 const std::vector<int>& orders) {
  std::vector<const KernelTable*> tables;
  for (const std::string& isa : isas) tables.push_back(find_table(isa));
  for (const int order : orders) check_order(order);
  const Unary function_id = find_function(function);
  const DType dtype_id = find_dtype(dtype);
  std::vector<KernelAccuracy> measured;
  {
    const nb::gil_scoped_release release;
    measured = measure_accuracy(function_id, dtype_id, {first, count, stride}, tables, orders);
  }
  nb::list results;
  for (const KernelAccuracy& kernel : measured) {
    nb::dict fields;
    fields["isa"] = kernel.isa;
    fields["order"] = kernel.order;
    fields["relative"] = as_dict(kernel.relative);
    fields["absolute"] = as_dict(kernel.absolute);
    fields["ulp"] = as_dict(kernel.ulp);
    fields["fall"] = as_dict(kernel.fall);
    fields["falls"] = kernel.falls;
    fields["nan_made"] = kernel.nan_made;
    fields["nan_lost"] = kernel.nan_lost;
    fields["out_of_range"] = kernel.out_of_range;
    fields["denormal"] = kernel.denormal;
    results.append(fields);
  }
  return results;
}

// An empty instruction set means the exact function.
std::vector<double> evaluate_all(const std::string& function, const std::string& dtype, const std::string& isa,
                                 int order, const std::vector<std::uint32_t>& inputs) {
  check_order(order);
  return evaluate(find_function(function), find_dtype(dtype), isa.empty() ? nullptr : find_table(isa), order,
                  inputs);
}

}  // namespace

void bind_accuracy(nb::module_& m) {
  // By name, whether the function is increasing.
  m.def("elementwise_functions", [] {
    nb::dict functions;
    for (int i = 0; i < static_cast<int>(Unary::kCount); ++i) {
      functions[kFunctionNames[i]] = kExactFunctions[i].increasing;
    }
    return functions;
  });
  m.def("measure_accuracy", measure, nb::arg("function"), nb::arg("dtype"), nb::arg("first"), nb::arg("count"),
        nb::arg("stride"), nb::arg("isas"), nb::arg("orders"));
  m.def("evaluate", evaluate_all, nb::arg("function"), nb::arg("dtype"), nb::arg("isa"), nb::arg("order"),
        nb::arg("inputs"));
}

}  // namespace quake
