// CUDA on the CPU, as far as the kernels use it, to run them under AddressSanitizer and UndefinedBehaviorSanitizer.
//
// The threads of a block are fibers on one CPU thread: each runs until it waits for its warp or its block. A warp goes
// on for as long as it can before the next one runs, so that a missing barrier shows as memory that is not written yet.
// emulator.py replaces the kernels' PTX by calls of the functions below, with the outputs first. Shared memory has the
// exact size of the launch and is filled with 0xFF at the start of a block: as floats NaN, as codes the largest.
// Variables in static shared memory are static ones.
#pragma once

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

using std::isfinite;

struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Dimensions { unsigned x, y, z; };

inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline unsigned __umulhi(unsigned x, unsigned y) { return uint64_t(x) * y >> 32; }
template <class A, class B> std::common_type_t<A, B> min(A a, B b) {
  using Number = std::common_type_t<A, B>;
  return Number(a) < Number(b) ? a : b;
}
template <class A, class B> std::common_type_t<A, B> max(A a, B b) {
  using Number = std::common_type_t<A, B>;
  return Number(a) > Number(b) ? a : b;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t both = uint64_t(y) << 32 | x;
  unsigned permuted = 0;
  for (int i = 0; i < 4; i++) permuted |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return permuted;
}
template <class T> T __ldg(const T* from) { return *from; }
template <class T> T __ldcs(const T* from) { return *from; }
template <class T> void __stcs(T* to, T value) { *to = value; }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::exchange(*to, *to + value); }

inline void add_floats(float& sum, float x, float y) { sum = x + y; }
inline void multiply_floats(float& product, float x, float y) { product = x * y; }
inline void shift_wide(unsigned& low, unsigned& high, unsigned x, unsigned by) {
  uint64_t wide = by > 63 ? 0 : uint64_t(x) << by;
  low = unsigned(wide), high = unsigned(wide >> 32);
}
inline void add_dot_product(unsigned& sum, unsigned a, unsigned b, unsigned c) {
  sum = c;
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
}
inline void load_if_inside(unsigned& code, const unsigned char* from, int offset, unsigned row, unsigned rows,
                           unsigned column, unsigned columns, unsigned otherwise) {
  code = row < rows && column < columns ? from[offset] : otherwise;
}

// ---- Threads -------------------------------------------------------------------------------------------------------

enum class State { READY, AT_WARP, AT_BLOCK, DONE };

struct Copy {
  unsigned to;
  const char* from;
  bool exists;
};

struct Fiber {
  void* stack_pointer;
  Dimensions index;
  State state = State::READY;
  std::vector<Copy> copies;                // not committed yet
  std::vector<std::vector<Copy>> groups;  // committed ones
};

using Exchange = std::array<unsigned, 32>;  // a word of each lane, which the others of its warp read

inline Dimensions threadIdx, blockIdx, gridDim, blockDim;
inline uint4* shared_memory;
inline unsigned shared_bytes;
inline bool copies_are_late;  // copies as late as a wait allows; otherwise at once
inline std::vector<Fiber> fibers;
inline std::vector<Exchange> exchanges;
inline unsigned current;
inline void* scheduler_stack_pointer;
inline std::function<void()> kernel_call;
inline std::string errors;

inline void report(const char* error) {
  if (errors.size() < 4000) errors.append(error).append("\n");
}

// What UndefinedBehaviorSanitizer calls; the description of an error begins with its place.
struct Place { const char* file; unsigned line, column; };
#define UNDEFINED(kind)                                                                                     \
  extern "C" __attribute__((visibility("hidden"))) inline void __ubsan_handle_##kind(const Place* place) { \
    report((place->file + (":" + std::to_string(place->line)) + ": " #kind).c_str());                      \
  }
UNDEFINED(type_mismatch_v1)  // also null and misaligned pointers
UNDEFINED(shift_out_of_bounds)
UNDEFINED(out_of_bounds)
UNDEFINED(add_overflow)
UNDEFINED(sub_overflow)
UNDEFINED(mul_overflow)
UNDEFINED(negate_overflow)
UNDEFINED(divrem_overflow)
UNDEFINED(pointer_overflow)
UNDEFINED(load_invalid_value)

extern "C" void switch_stack(void** saved, void* to);
asm(R"(
switch_stack:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

inline void wait(State state) {
  fibers[current].state = state;
  switch_stack(&fibers[current].stack_pointer, scheduler_stack_pointer);
}
inline void __syncthreads() { wait(State::AT_BLOCK); }
inline void __syncwarp() { wait(State::AT_WARP); }

inline Exchange& of_warp() { return exchanges[current / 32]; }

inline float __shfl_down_sync(unsigned, float value, unsigned offset) {
  unsigned lane = current % 32;
  of_warp()[lane] = __float_as_uint(value);
  __syncwarp();
  float other = __uint_as_float(of_warp()[lane + offset < 32 ? lane + offset : lane]);
  __syncwarp();
  return other;
}

// ---- Shared memory -------------------------------------------------------------------------------------------------

constexpr unsigned FIRST_ADDRESS = 1 << 20;  // not zero, so that other numbers are not mistaken for addresses

inline uint64_t __cvta_generic_to_shared(const void* pointer) {
  return static_cast<const char*>(pointer) - reinterpret_cast<char*>(shared_memory) + FIRST_ADDRESS;
}

inline char* chunk_at(unsigned address) {
  static uint4 elsewhere;
  unsigned offset = address - FIRST_ADDRESS;
  if (address >= FIRST_ADDRESS && offset % 16 == 0 && offset + 16 <= shared_bytes)
    return reinterpret_cast<char*>(shared_memory) + offset;
  report("16 bytes outside of the shared memory, or not aligned");
  return reinterpret_cast<char*>(&elsewhere);
}

inline void complete(std::vector<Copy>& copies) {
  for (const Copy& copy : copies)
    if (copy.exists)
      *reinterpret_cast<uint4*>(chunk_at(copy.to)) = *reinterpret_cast<const uint4*>(copy.from);
    else
      memset(chunk_at(copy.to), 0, 16);
  copies.clear();
}

inline void copy_async(unsigned to, const char* from, int bytes) {
  std::vector<Copy>& copies = fibers[current].copies;
  copies.push_back({to, from, bytes > 0});
  memset(chunk_at(to), 0xFF, 16);  // may be overwritten from now on
  if (!copies_are_late) complete(copies);
}
inline void commit_copies() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::exchange(fiber.copies, {}));
}
inline void await_copies(size_t pending) {
  auto& groups = fibers[current].groups;
  while (groups.size() > pending) complete(groups.front()), groups.erase(groups.begin());
}
inline void await_all_copies() {
  commit_copies();
  await_copies(0);
}

// ---- Matrix units --------------------------------------------------------------------------------------------------

// ldmatrix: lane 8 m + r has the address of row r of matrix m.
inline void load_matrices(unsigned& w0, unsigned& w1, unsigned& w2, unsigned& w3, unsigned from) {
  unsigned lane = current % 32, *words[4] = {&w0, &w1, &w2, &w3};
  of_warp()[lane] = from;
  __syncwarp();
  for (int m = 0; m < 4; m++) memcpy(words[m], chunk_at(of_warp()[m * 8 + lane / 4]) + lane % 4 * 4, 4);
  __syncwarp();
}

// What the lanes of a warp multiply: both matrices by rows of DEPTH elements.
template <class Number, int DEPTH> struct Matrices { Number a[16][DEPTH], b[8][DEPTH]; };
template <class Number, int DEPTH> inline Matrices<Number, DEPTH> matrices[32];

inline void set_element(float& element, unsigned word, int i) {
  element = bits_as<float>(i ? word & ~0xFFFFu : word << 16);
}
inline void set_element(int& element, unsigned word, int i) { element = static_cast<signed char>(word >> 8 * i); }

// mma.sync. A word has elements of consecutive k. Lane 4 r + k has of A the rows r and r + 8, of B the column r, at k
// and at k + 4 words, and of the sums the columns 2 k and 2 k + 1 of both rows. Without sanitizers this is much faster.
template <class Number, int ELEMENTS, class Sum>
__attribute__((no_sanitize("address", "undefined"), optimize("O3")))
void multiply_matrices(Sum* const (&sums)[4], const unsigned (&words)[6]) {
  constexpr int DEPTH = 8 * ELEMENTS;
  Matrices<Number, DEPTH>& of_warp = matrices<Number, DEPTH>[current / 32];
  unsigned lane = current % 32, row = lane / 4;
  for (int word = 0; word < 6; word++)
    for (int i = 0; i < ELEMENTS; i++) {
      int k = ((word < 4 ? word / 2 : word - 4) * 4 + lane % 4) * ELEMENTS + i;
      set_element(word < 4 ? of_warp.a[row + word % 2 * 8][k] : of_warp.b[row][k], words[word], i);
    }
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const Number *a = of_warp.a[row + i / 2 * 8], *b = of_warp.b[lane % 4 * 2 + i % 2];
    Number sum = 0;
    for (int k = 0; k < DEPTH; k++) sum += a[k] * b[k];
    *sums[i] += sum;
  }
  __syncwarp();
}

inline void multiply_bfloat16(float& s0, float& s1, float& s2, float& s3, unsigned a0, unsigned a1, unsigned a2,
                              unsigned a3, unsigned b0, unsigned b1) {
  multiply_matrices<float, 2, float>({&s0, &s1, &s2, &s3}, {a0, a1, a2, a3, b0, b1});
}
inline void multiply_int8(unsigned& s0, unsigned& s1, unsigned& s2, unsigned& s3, unsigned a0, unsigned a1, unsigned a2,
                          unsigned a3, unsigned b0, unsigned b1) {
  multiply_matrices<int, 4, unsigned>({&s0, &s1, &s2, &s3}, {a0, a1, a2, a3, b0, b1});
}

// ---- Launches ------------------------------------------------------------------------------------------------------

inline void run_fiber() {
  kernel_call();
  wait(State::DONE);
}

// Run a warp's threads until they are done or at a barrier of the block; return whether any has run.
inline bool run_warp(unsigned first, unsigned lanes, bool backwards) {
  for (bool has_run = false;; has_run = true) {
    unsigned ready = 0, waiting = 0, done = 0;
    for (unsigned i = 0; i < lanes; i++) {
      current = first + (backwards ? lanes - 1 - i : i);
      Fiber& fiber = fibers[current];
      threadIdx = fiber.index;
      if (fiber.state == State::READY) ready++, switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
      waiting += fiber.state == State::AT_WARP, done += fiber.state == State::DONE;
    }
    if (waiting == 32)
      for (unsigned i = 0; i < lanes; i++) fibers[first + i].state = State::READY;
    else if (ready == 0 && waiting > 0)
      return report("a warp waits for lanes that do not come"), false;
    else if (ready == 0)
      return has_run;
  }
}

inline void run_block(std::vector<std::vector<void*>>& stacks) {
  static unsigned random = 1;
  unsigned threads = fibers.size(), warps = (threads + 31) / 32, waiting;
  std::fill_n(reinterpret_cast<char*>(shared_memory), shared_bytes, -1);
  for (unsigned i = 0; i < threads; i++) {
    // switch_stack takes six registers and its return address from here; at run_fiber, the stack is as after a call.
    void** top = stacks[i].data() + stacks[i].size() - 8;
    top -= reinterpret_cast<uintptr_t>(top) % 16 / sizeof(void*);
    top[-2] = reinterpret_cast<void*>(run_fiber);
    fibers[i] = {top - 8, {i % blockDim.x, i / blockDim.x, 0}, State::READY, {}, {}};
  }
  exchanges.assign(warps, {});
  do {
    random = random * 1664525 + 1013904223;
    bool has_run = false;
    for (unsigned i = 0; i < warps; i++) {
      unsigned first = (i + (random >> 16)) % warps * 32;
      has_run |= run_warp(first, min(threads - first, 32u), random >> 30 & 1);
    }
    waiting = 0;
    for (Fiber& fiber : fibers) waiting += fiber.state == State::AT_BLOCK;
    if (!has_run || waiting > 0 && waiting < threads) return report("a block waits for threads that do not come");
    for (Fiber& fiber : fibers)
      if (fiber.state == State::AT_BLOCK) fiber.state = State::READY;
  } while (waiting > 0);
}

struct Launch {
  Dimensions grid, block;
  unsigned shared_bytes;
  int copies_are_late;
};

// Run a kernel on the arguments at these addresses; return what was wrong.
template <class... Parameters, size_t... I>
const char* run_kernel(void (*kernel)(Parameters...), std::index_sequence<I...>, const Launch& launch,
                       void** arguments) {
  kernel_call = [=] { kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[I])...); };
  errors.clear();
  __asan_set_error_report_callback(report);
  gridDim = launch.grid, blockDim = launch.block, shared_bytes = launch.shared_bytes;
  copies_are_late = launch.copies_are_late;
  std::vector<char> memory(shared_bytes);
  shared_memory = reinterpret_cast<uint4*>(memory.data());
  fibers.resize(blockDim.x * blockDim.y);
  static std::vector<std::vector<void*>> stacks;
  while (stacks.size() < fibers.size()) stacks.emplace_back(1 << 14);
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
      for (blockIdx.x = 0; blockIdx.x < gridDim.x && errors.empty(); blockIdx.x++) run_block(stacks);
  if (!errors.empty()) stacks.clear();  // they are left as they were
  return errors.c_str();
}

template <class... Parameters>
const char* run_kernel(void (*kernel)(Parameters...), const Launch& launch, void** arguments) {
  return run_kernel(kernel, std::index_sequence_for<Parameters...>(), launch, arguments);
}

#define EXPORT(kernel)                                                                \
  extern "C" const char* run_##kernel(const Launch* launch, void** arguments) { \
    return run_kernel(kernel, *launch, arguments);                                    \
  }
