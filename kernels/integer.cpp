// The part of the Python module mbm_cli._cpu that convolves with integer multipliers.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "integer.h"

namespace nb = nanobind;

namespace mbm {

#if defined(__x86_64__)
namespace integers::avx512vnni { extern const IntegerKernels kernels; }
namespace integers::avx2 { extern const IntegerKernels kernels; }
#endif
namespace integers::portable { extern const IntegerKernels kernels; }

namespace {

// Return the kernels that this CPU can run, the widest instruction set first.
std::vector<const IntegerKernels*> runnable() {
  std::vector<const IntegerKernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&integers::avx512vnni::kernels);
  if (__builtin_cpu_supports("avx2")) found.push_back(&integers::avx2::kernels);
#endif
  found.push_back(&integers::portable::kernels);
  return found;
}

std::atomic<const IntegerKernels*> chosen{runnable().front()};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const IntegerKernels* k : runnable()) names.push_back(k->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const IntegerKernels* k : runnable())
    if (name == k->name) {
      chosen = k;
      return;
    }
  throw std::invalid_argument("this CPU does not run the instruction set " + name);
}

std::array<double, 5> costs() {
  const IntegerCosts& c = chosen.load()->costs;
  return {double(c.lanes), c.term, c.vector, c.table, c.each};
}

// Below this many products, waking other threads costs more than it saves.
constexpr std::int64_t PARALLEL_FROM = 400'000;

using Pair = std::array<std::int64_t, 2>;

// Compute a convolution. The arguments are addresses of memory that the caller has checked and keeps alive, and those
// of a Geometry (backends/geometry.py). `terms` is 0 to look products up, and else how many terms `factors` (the
// addresses of u, v, f and g) have.
void integer_conv2d(std::uintptr_t input, std::uintptr_t weight, std::uintptr_t output, std::uintptr_t table,
                    std::array<std::uintptr_t, 4> factors, std::int64_t terms, std::array<std::int64_t, 4> counts,
                    Pair size, Pair kernel, Pair out_size, Pair stride, Pair padding, Pair dilation,
                    std::array<std::int64_t, 5> input_strides, std::array<std::int64_t, 3> output_strides,
                    std::uint8_t padding_code, int threads) {
  IntegerConv2d c{};
  c.input = reinterpret_cast<const std::uint8_t*>(input);
  c.weight = reinterpret_cast<const std::uint8_t*>(weight);
  c.output = reinterpret_cast<std::int32_t*>(output);
  c.table = reinterpret_cast<const std::int32_t*>(table);
  c.u = reinterpret_cast<const std::int8_t*>(factors[0]);
  c.v = reinterpret_cast<const std::int8_t*>(factors[1]);
  c.f = reinterpret_cast<const std::int64_t*>(factors[2]);
  c.g = reinterpret_cast<const std::int64_t*>(factors[3]);
  c.terms = terms;
  c.batch = counts[0], c.groups = counts[1], c.channels = counts[2], c.out_channels = counts[3];
  auto copy = [](const auto& from, std::int64_t* to) { std::copy(from.begin(), from.end(), to); };
  copy(size, c.size), copy(kernel, c.kernel), copy(out_size, c.out_size);
  copy(stride, c.stride), copy(padding, c.padding), copy(dilation, c.dilation);
  copy(input_strides, c.input_stride), copy(output_strides, c.output_stride);
  c.padding_code = padding_code;
  std::int64_t products =
      c.batch * c.groups * c.out_channels * out_size[0] * out_size[1] * c.channels * kernel[0] * kernel[1];
  c.threads = threads = products < PARALLEL_FROM ? 1 : threads;

  const IntegerKernels& kernels = *chosen.load();
  std::unique_ptr<void, void (*)(void*)> plan(kernels.make_plan(c), kernels.free_plan);
  std::int64_t jobs = kernels.jobs(plan.get()), packing_jobs = kernels.packing_jobs(plan.get());
  if (threads > jobs) threads = static_cast<int>(jobs);

  std::size_t scratch_bytes = (kernels.scratch_bytes(plan.get()) + 63) / 64 * 64;
  std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, scratch_bytes * threads), std::free);
  if (!scratch) throw std::bad_alloc();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (std::int64_t job = 0; job < packing_jobs; job++) kernels.pack(plan.get(), job);
#pragma omp for schedule(dynamic)
    for (std::int64_t job = 0; job < jobs; job++)
      kernels.run_job(plan.get(), job, static_cast<char*>(scratch.get()) + scratch_bytes * omp_get_thread_num());
  }
}

}  // namespace

void bind_integers(nb::module_& module) {
  module.def("integer_conv2d", &integer_conv2d, nb::call_guard<nb::gil_scoped_release>());
  module.def("integer_instruction_sets", &instruction_sets,
             "The instruction sets of the integer kernels that this CPU runs, the one chosen by default first.");
  module.def("use_integer_instruction_set", &use_instruction_set);
  module.def("integer_costs", &costs, "The costs of the chosen kernels (integer.h).");
}

}  // namespace mbm
