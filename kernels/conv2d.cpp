// The Python module mbm_cli._cpu, which chooses the instruction set at run time and distributes jobs over threads.
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

#include "conv2d.h"

namespace nb = nanobind;

namespace mbm {

#if defined(__x86_64__)
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace portable { extern const Kernels kernels; }

void bind_integers(nb::module_& module);  // integer.cpp

// Return the kernels that this CPU can run, the widest instruction set first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    found.push_back(&avx512::kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kernels);
#endif
  found.push_back(&portable::kernels);
  return found;
}

std::atomic<const Kernels*> chosen{runnable().front()};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.push_back(k->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const Kernels* k : runnable())
    if (name == k->name) {
      chosen = k;
      return;
    }
  throw std::invalid_argument("this CPU does not run the instruction set " + name);
}

// A multiplier and its kernels: `own` are those compiled for a user's function; null stands for the chosen ones.
struct NativeMultiplier {
  Multiplier multiplier;
  const Kernels* own;
  const Kernels& kernels() const { return own ? *own : *chosen.load(); }
};

NativeMultiplier make(const std::string& family, int bits, int result_bits, std::uintptr_t table, std::uintptr_t own) {
  for (int f = EXACT; f <= FUNCTION; f++)
    if (family == FAMILY_NAMES[f]) {
      Multiplier m = make_multiplier(Family(f), bits, result_bits);
      m.table = reinterpret_cast<const float*>(table);
      return {m, reinterpret_cast<const Kernels*>(own)};
    }
  throw std::invalid_argument("the kernels know no family " + family);
}

// Below this many products (about 30 us of work), waking other threads costs more than it saves.
constexpr std::int64_t PARALLEL_FROM = 200'000;

using Pair = std::array<std::int64_t, 2>;
template <std::size_t N> using Strides = std::array<std::int64_t, N>;

// Compute a convolution. The pointers are addresses of float32 memory that the caller has checked and keeps alive; the
// other arguments are those of a Geometry (backends/geometry.py), and the strides of the output's rows and columns.
void conv2d(std::uintptr_t input, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t output,
            std::array<std::int64_t, 4> counts, Pair size, Pair kernel, Pair out_size, Pair stride, Pair padding,
            Pair dilation, Strides<5> input_strides, Strides<3> weight_strides, Strides<5> output_strides,
            const NativeMultiplier& native, int threads) {
  Conv2d c{};
  c.input = reinterpret_cast<const float*>(input);
  c.weight = reinterpret_cast<const float*>(weight);
  c.bias = reinterpret_cast<const float*>(bias);
  c.output = reinterpret_cast<float*>(output);
  c.batch = counts[0], c.groups = counts[1], c.channels = counts[2], c.out_channels = counts[3];
  auto copy = [](const auto& from, std::int64_t* to) { std::copy(from.begin(), from.end(), to); };
  copy(size, c.size), copy(kernel, c.kernel), copy(out_size, c.out_size);
  copy(stride, c.stride), copy(padding, c.padding), copy(dilation, c.dilation);
  copy(input_strides, c.input_stride), copy(weight_strides, c.weight_stride), copy(output_strides, c.output_stride);
  c.multiplier = native.multiplier;
  std::int64_t products =
      c.batch * c.groups * c.out_channels * out_size[0] * out_size[1] * c.channels * kernel[0] * kernel[1];
  if (products < PARALLEL_FROM) threads = 1;
  c.threads = threads;

  const Kernels& kernels = native.kernels();
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

void multiply(std::uintptr_t a, std::uintptr_t b, std::uintptr_t out, std::int64_t count,
              const NativeMultiplier& native, int threads) {
  constexpr std::int64_t CHUNK = 1 << 14;
  const Kernels& kernels = native.kernels();
  std::int64_t chunks = (count + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= PARALLEL_FROM && threads > 1)
  for (std::int64_t chunk = 0; chunk < chunks; chunk++) {
    std::int64_t from = chunk * CHUNK, size = count - from < CHUNK ? count - from : CHUNK;
    kernels.multiply(native.multiplier, reinterpret_cast<const float*>(a) + from,
                     reinterpret_cast<const float*>(b) + from, reinterpret_cast<float*>(out) + from, size);
  }
}

std::int64_t ceiling(const NativeMultiplier& native, std::int64_t rounds, int threads) {
  const Kernels& kernels = native.kernels();
  std::int64_t done = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : done)
  for (int thread = 0; thread < threads; thread++) done += kernels.ceiling(native.multiplier, rounds);
  return done;
}

}  // namespace mbm

NB_MODULE(_cpu, module) {
  using namespace mbm;
  nb::set_leak_warnings(false);  // backends/cpu.py caches Multiplier objects until the process ends
  using nogil = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<NativeMultiplier>(module, "Multiplier")
      .def("__init__", [](NativeMultiplier* to, const std::string& family, int bits, int result_bits,
                          std::uintptr_t table, std::uintptr_t kernels) {
        new (to) NativeMultiplier(make(family, bits, result_bits, table, kernels));
      }, nb::arg("family"), nb::arg("bits"), nb::arg("result_bits"), nb::arg("table") = 0, nb::arg("kernels") = 0);
  module.def("conv2d", &conv2d, nogil());
  module.def("multiply", &mbm::multiply, nogil());
  module.def("ceiling", &ceiling, nogil(),
             "Multiply-accumulates done by `rounds` rounds of register-only arithmetic on each thread.");
  module.def("instruction_sets", &instruction_sets,
             "The instruction sets that this CPU runs, the one chosen by default first.");
  module.def("use_instruction_set", &use_instruction_set);
  bind_integers(module);
}
