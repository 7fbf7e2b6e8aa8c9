// The accuracy sweep as a program, for `python -m quake_jax.accuracy --program`: the kernels of a processor
// that Python does not run on, here or under an emulator. One question a call, answered in JSON:
//   sweep supported_isas
//   sweep measure_accuracy FUNCTION DTYPE FIRST COUNT STRIDE ISA,… ORDER,…
//   sweep evaluate FUNCTION DTYPE ISA|exact ORDER BITS,…

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "accuracy/sweep.h"
#include "isa/dispatch.h"

namespace quake {
namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> words;
  std::stringstream stream(list);
  for (std::string word; std::getline(stream, word, ',');) words.push_back(word);
  return words;
}

std::uint64_t whole_number(const std::string& text) {
  std::size_t read = 0;
  const std::uint64_t number = std::stoull(text, &read);
  if (read != text.size()) throw std::invalid_argument("not a number: " + text);
  return number;
}

int order_of(const std::string& text) {
  const int order = static_cast<int>(whole_number(text));
  check_order(order);
  return order;
}

// Python's json module reads NaN and Infinity as they are written here.
void print_number(double x) {
  if (std::isnan(x)) {
    std::printf("NaN");
  } else if (std::isinf(x)) {
    std::printf(x < 0 ? "-Infinity" : "Infinity");
  } else {
    std::printf("%.17g", x);
  }
}

void print_extreme(const char* name, const Extreme& extreme) {
  std::printf("\"%s\": {\"input\": %u", name, extreme.input);
  const std::pair<const char*, double> fields[] = {
      {"value", extreme.value}, {"got", extreme.got}, {"wanted", extreme.wanted}};
  for (const auto& [field, value] : fields) {
    std::printf(", \"%s\": ", field);
    print_number(value);
  }
  std::printf("}, ");
}

void print_kernel(const KernelAccuracy& kernel) {
  std::printf("{\"isa\": \"%s\", \"order\": %d, ", kernel.isa, kernel.order);
  print_extreme("relative", kernel.relative);
  print_extreme("absolute", kernel.absolute);
  print_extreme("ulp", kernel.ulp);
  print_extreme("fall", kernel.fall);
  std::printf(
      "\"falls\": %llu, \"nan_made\": %llu, \"nan_lost\": %llu, \"out_of_range\": %llu, \"denormal\": %llu}",
      static_cast<unsigned long long>(kernel.falls), static_cast<unsigned long long>(kernel.nan_made),
      static_cast<unsigned long long>(kernel.nan_lost), static_cast<unsigned long long>(kernel.out_of_range),
      static_cast<unsigned long long>(kernel.denormal));
}

template <class T, class Print>
void print_list(const std::vector<T>& items, const Print& print) {
  std::printf("[");
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0) std::printf(", ");
    print(items[i]);
  }
  std::printf("]\n");
}

void answer(const std::vector<std::string>& question) {
  const auto asks = [&](const char* name, std::size_t arguments) {
    return !question.empty() && question[0] == name && question.size() == 1 + arguments;
  };
  if (asks("supported_isas", 0)) {
    print_list(supported_tables(), [](const KernelTable* table) { std::printf("\"%s\"", table->isa); });
  } else if (asks("measure_accuracy", 7)) {
    std::vector<const KernelTable*> tables;
    for (const std::string& isa : split(question[6])) tables.push_back(find_table(isa));
    std::vector<int> orders;
    for (const std::string& order : split(question[7])) orders.push_back(order_of(order));
    const InputRange range = {whole_number(question[3]), whole_number(question[4]), whole_number(question[5])};
    print_list(measure_accuracy(find_function(question[1]), find_dtype(question[2]), range, tables, orders),
               print_kernel);
  } else if (asks("evaluate", 5)) {
    std::vector<std::uint32_t> inputs;
    for (const std::string& bits : split(question[5])) {
      inputs.push_back(static_cast<std::uint32_t>(whole_number(bits)));
    }
    const KernelTable* table = question[3] == "exact" ? nullptr : find_table(question[3]);
    print_list(
        evaluate(find_function(question[1]), find_dtype(question[2]), table, order_of(question[4]), inputs),
        print_number);
  } else {
    throw std::invalid_argument(
        "supported_isas, measure_accuracy or evaluate with its arguments (see sweep.cc)");
  }
}

}  // namespace
}  // namespace quake

int main(int count, char** arguments) {
  try {
    quake::answer({arguments + 1, arguments + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "sweep: %s\n", error.what());
    return 2;
  }
  return 0;
}
