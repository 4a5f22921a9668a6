// The CPU kernels. CMake compiles this file once for each instruction set, each time into its own namespace (MBM_ISA).
//
// Mapping: a job is one image, one group, a range of output rows and a range of output channels. One thread computes it.
//   1. The thread decodes the input rows that it needs once, padding included, into planes of powers of two and planes
//      of fractions. With a stride, rows and columns of equal phase lie side by side, so that neighbouring outputs read
//      neighbouring elements whatever the stride. Narrow images get one plane per kernel column.
//   2. Lanes are consecutive positions of a plane. A tile is VECTORS vectors by up to BLOCK output channels. Its
//      accumulators stay in registers while the loop walks the kernel's elements. Each step costs two loads per vector
//      and two broadcasts per channel. Positions past the last output column of a row are computed and dropped.
//   3. Where the operands' exponents do not rule out a product outside the normal range, the job's tiles compute each
//      product by definition instead. This is several times slower, and rare.
//
// Cost of a product and its addition: for mbm 6 instructions on AVX2 (integer add, compare, and, float add, multiply,
// fused multiply-add), and 5 on AVX-512, where the correction is one masked addition. For mitchell it is 3. The limit
// is vector arithmetic, not memory.
// A table lookup costs 4 permutations and 3 blends on AVX-512 if a row fits its registers (LOOKUP), else a load. These
// are then the limit. With a table, the planes of fractions hold table columns and the weights hold table rows.
//
// With MBM_FUNCTION defined, this file holds only the kernels of that user's function (compiled by backends/cpu.py).
#if defined(__SSE2__)
#include <immintrin.h>
#else
#include <cfenv>
#endif

#include <cstdlib>
#include <cstring>
#include <new>

#include "conv2d.h"

namespace mbm::MBM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
// Vectors and output channels of a tile. Eight accumulators and what a product needs fill the 16 registers of AVX2.
// With one vector by eight channels, the broadcasts would cost a sixth of the speed.
constexpr int VECTORS = 2, BLOCK = 4;
constexpr std::int64_t SCRATCH_TARGET = 384 << 10;  // bytes of a job's planes, so that they stay in the L2 cache
constexpr int JOBS_PER_THREAD = 4;                  // at least, so that no thread waits long for another
constexpr int LEAST_BLOCKS = 4;                     // of a job, so that decoding its planes pays

enum RoundingMode { TO_NEAREST, TOWARD_ZERO };

// Sets this rounding mode, keeps subnormals and masks traps. The destructor restores the caller's environment.
class Rounding {
#if defined(__SSE2__)  // <cfenv> costs a few hundred cycles more, because it also sets the x87 unit
  unsigned saved_ = _mm_getcsr();

 public:
  explicit Rounding(RoundingMode mode) {
    _mm_setcsr(_MM_MASK_MASK | (mode == TOWARD_ZERO ? _MM_ROUND_TOWARD_ZERO : _MM_ROUND_NEAREST));
  }
  ~Rounding() { _mm_setcsr(saved_); }
#else
  std::fenv_t saved_;

 public:
  explicit Rounding(RoundingMode mode) {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
    if (mode == TOWARD_ZERO) std::fesetround(FE_TOWARDZERO);
  }
  ~Rounding() { std::fesetenv(&saved_); }
#endif
  Rounding(const Rounding&) = delete;
};

struct Lanes {
  typedef float F __attribute__((vector_size(LANES * sizeof(float))));
  typedef int I __attribute__((vector_size(LANES * sizeof(int))));

  // Call the user's function for each lane.
  MBM_FN I call(I a, I b) {
    int x[LANES], y[LANES];
    std::memcpy(x, &a, sizeof a);
    std::memcpy(y, &b, sizeof b);
#if defined(MBM_FUNCTION)
    for (int i = 0; i < LANES; i++) x[i] = int(MBM_FUNCTION((unsigned)x[i], (unsigned)y[i]));
#endif
    std::memcpy(&a, x, sizeof a);
    return a;
  }
  // Look up in a row of 128 entries.
  MBM_FN F look_up_row(const float* row, I index) {
#if defined(__AVX512F__)
    __m512i i = (__m512i)index;
    auto of_32 = [&](int first) {
      return _mm512_permutex2var_ps(_mm512_loadu_ps(row + first), i, _mm512_loadu_ps(row + first + 16));
    };
    __mmask16 odd_32 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    __mmask16 odd_64 = _mm512_test_epi32_mask(i, _mm512_set1_epi32(64));
    return (F)_mm512_mask_blend_ps(odd_64, _mm512_mask_blend_ps(odd_32, of_32(0), of_32(32)),
                                   _mm512_mask_blend_ps(odd_32, of_32(64), of_32(96)));
#else
    return gather(row, index);
#endif
  }
  MBM_FN F gather(const float* from, I index) {
#if defined(__AVX512F__)
    return (F)_mm512_i32gather_ps((__m512i)index, from, sizeof(float));
#elif defined(__AVX2__)
    // On processors without AVX-512, single loads are faster than the gather instruction.
    alignas(sizeof index) int i[LANES];
    std::memcpy(i, &index, sizeof index);
    return F{from[i[0]], from[i[1]], from[i[2]], from[i[3]], from[i[4]], from[i[5]], from[i[6]], from[i[7]]};
#else
    F found;
    for (int lane = 0; lane < LANES; lane++) found[lane] = from[index[lane]];
    return found;
#endif
  }
};
using F = Lanes::F;
using I = Lanes::I;

template <class V, class T> MBM_FN V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> MBM_FN void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }

// Products of drum with many bits are truncated to a float. Sums then use the same rounding mode.
RoundingMode rounding_of_products(const Multiplier& m) { return is_rounded(m) ? TOWARD_ZERO : TO_NEAREST; }

// std::vector is not used: the linker could share its instances, compiled for this instruction set, with other code.
template <class T> struct Buffer {
  T* data;
  explicit Buffer(std::int64_t count) : data(static_cast<T*>(std::malloc(sizeof(T) * (count > 0 ? count : 1)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  T& operator[](std::int64_t i) const { return data[i]; }
};

// The range of exponents of the normal operands in a set, as the bits of the smallest and the largest magnitude. If
// there are no normal operands, highest < CARRY.
struct Exponents {
  int lowest = INFINITE, highest = 0;

  bool special() const { return highest >= INFINITE; }
  bool empty() const { return highest < CARRY; }
};

// Collects the exponents of vectors of operands.
struct Range {
  I lowest = I{} + INFINITE, highest = {};

  void add(F x) {
    I magnitude = bits<Lanes>(x) & ~SIGN;
    I normal = magnitude < CARRY ? I{} + INFINITE : magnitude;
    lowest = normal < lowest ? normal : lowest;
    highest = magnitude > highest ? magnitude : highest;
  }
  Exponents exponents() const {
    Exponents e;
    for (int lane = 0; lane < LANES; lane++) {
      e.lowest = lowest[lane] < e.lowest ? lowest[lane] : e.lowest;
      e.highest = highest[lane] > e.highest ? highest[lane] : e.highest;
    }
    return e;
  }
};

// Return whether all products of the two sets and the intermediate A * B stay in the normal range.
bool in_range(const Exponents& a, const Exponents& b) {
  if (a.special() || b.special()) return false;
  if (a.empty() || b.empty()) return true;
  int lowest = (a.lowest >> FRACTION_BITS) + (b.lowest >> FRACTION_BITS) - BIAS;
  int highest = (a.highest >> FRACTION_BITS) + (b.highest >> FRACTION_BITS) - BIAS + 1;
  return lowest >= 1 && highest <= 254;
}

// A decoded weight. The forms that multiply whole operands (IEEE, TRUNCATED, CALL) store the operand as its power.
struct Weight {
  float power;
  int one_plus_fraction;  // with a table, the start of its row
};

template <Form FORM, bool MASKED>
MBM_FN F accumulate(F sum, F power, I fraction, const Weight& w, const Multiplier& m) {
  if constexpr (FORM == CALL) {
    return sum + from_bits<Lanes>(call<Lanes>(bits<Lanes>(power), bits<Lanes>(F{} + w.power)));
  } else if constexpr (FORM == IEEE || (FORM == TRUNCATED && MASKED)) {
    return sum + ieee_product<Lanes>(power, F{} + w.power, m);
  } else if constexpr (FORM == TRUNCATED) {
    return sum + power * w.power;
  } else if constexpr (FORM == LOOKUP) {
    return sum + (power * w.power) * Lanes::look_up_row(m.table + w.one_plus_fraction, fraction);
  } else if constexpr (FORM == LOOKUP_WIDE) {
    return sum + (power * w.power) * Lanes::gather(m.table + w.one_plus_fraction, fraction);
  } else {
    return sum + (power * w.power) * significand<Lanes, FORM, MASKED>(fraction, I{} + w.one_plus_fraction, m);
  }
}

// Compute sums of `steps` products for V vectors of positions and N output channels. The weights are [step][N].
using Tile = void (*)(const float* power, const int* fraction, const std::int64_t* offsets, std::int64_t steps,
                      const Weight* weights, const Multiplier& m, float* sums, std::int64_t sums_stride);

template <Form FORM, bool MASKED, int V, int N>
void tile(const float* power, const int* fraction, const std::int64_t* offsets, std::int64_t steps,
          const Weight* weights, const Multiplier& shared, float* sums, std::int64_t sums_stride) {
  const Multiplier m = shared;  // a local copy, whose constants no store can alias
  F sum[N * V];
#pragma GCC unroll 8
  for (F& s : sum) s = F{};
  for (std::int64_t k = 0; k < steps; k++, weights += N) {
    F a[V];
    I x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      a[v] = load<F>(power + offsets[k] + v * LANES);
      x[v] = load<I>(fraction + offsets[k] + v * LANES);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N * V; i++) sum[i] = accumulate<FORM, MASKED>(sum[i], a[i % V], x[i % V], weights[i / V], m);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N * V; i++) store(sums + i / V * sums_stride + i % V * LANES, sum[i]);
}

struct TileSet {
  Tile of_size[VECTORS][BLOCK];  // [vectors - 1][channels - 1]
};

// Call What::of<FORM, MASKED>(args...) with the multiplier's form.
template <class What, class... Args> auto for_form(const Multiplier& m, const Args&... args) {
#if defined(MBM_FUNCTION)
  return What::template of<CALL, false>(args...);
#else
  bool masked = result_is_masked(m);
  switch (m.form) {
    case IEEE: return What::template of<IEEE, true>(args...);
    case PLAIN: return masked ? What::template of<PLAIN, true>(args...) : What::template of<PLAIN, false>(args...);
    case ONE_LEVEL:
      return masked ? What::template of<ONE_LEVEL, true>(args...) : What::template of<ONE_LEVEL, false>(args...);
    case TWO_LEVELS:
      return masked ? What::template of<TWO_LEVELS, true>(args...) : What::template of<TWO_LEVELS, false>(args...);
    case TRUNCATED:
      return masked ? What::template of<TRUNCATED, true>(args...) : What::template of<TRUNCATED, false>(args...);
    case LOOKUP: return What::template of<LOOKUP, false>(args...);
    default: return What::template of<LOOKUP_WIDE, false>(args...);
  }
#endif
}

struct Tiles {
  template <Form FORM, bool MASKED> static TileSet of() {
    return {{{tile<FORM, MASKED, 1, 1>, tile<FORM, MASKED, 1, 2>, tile<FORM, MASKED, 1, 3>, tile<FORM, MASKED, 1, 4>},
             {tile<FORM, MASKED, 2, 1>, tile<FORM, MASKED, 2, 2>, tile<FORM, MASKED, 2, 3>, tile<FORM, MASKED, 2, 4>}}};
  }
};

// Decode a vector of weights into powers and, as Weight has them, the others.
void decode_weights(F w, const Multiplier& m, F& power, I& rest) {
  I fraction = bits<Lanes>(w) & FRACTION;
  power = w, rest = I{};
  switch (m.form) {
    case CALL: return;
    case IEEE: power = truncate_finite<Lanes>(w, m.operand_keep); return;
    case TRUNCATED: power = decode_truncated<Lanes>(w, m); return;
    case LOOKUP:
    case LOOKUP_WIDE: power = decode_power<Lanes>(w), rest = table_row(fraction, m); return;
    default: power = decode_power<Lanes>(w), rest = ONE + decode_fraction<Lanes>(w, m);
  }
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The planes along one axis (height or width). Position q of a plane holds the image's position q * stride + phase.
// Shared planes have one phase for each remainder modulo the stride that the kernel touches. Kernel elements with equal
// remainders read the same plane, starting at different positions. Without sharing, each kernel element has its own
// plane.
struct Axis {
  std::int64_t stride, dilation, kernel, phases = 0;
  bool shared;
  Buffer<std::int64_t> phase;

  Axis(const Conv2d& c, int axis, bool shared)
      : stride(c.stride[axis]), dilation(c.dilation[axis]), kernel(c.kernel[axis]), shared(shared), phase(kernel) {
    for (std::int64_t k = 0; k < kernel; k++)
      if (index(k) == phases) phase[phases++] = phase_of(k);
  }
  std::int64_t phase_of(std::int64_t k) const { return shared ? k * dilation % stride : k * dilation; }
  std::int64_t index(std::int64_t k) const {
    std::int64_t i = 0;
    while (i < phases && phase[i] != phase_of(k)) i++;
    return i;
  }
  std::int64_t start(std::int64_t k) const { return shared ? k * dilation / stride : 0; }
  std::int64_t extent(std::int64_t outputs) const { return outputs + start(kernel - 1); }
};

// Return whether kernel columns share planes. A row of a shared plane is longer than a row of outputs, and the surplus
// positions are computed for nothing. If sharing costs over a fifth more than one plane per kernel column, the separate
// planes are used, although each must be gathered and decoded. Both sides count products for one output row; gathering
// and decoding an element costs about as much as four products.
bool share_columns(const Conv2d& c) {
  std::int64_t row = c.out_size[1] + (c.kernel[1] - 1) * c.dilation[1] / c.stride[1];
  std::int64_t products = c.out_channels * c.kernel[0] * c.kernel[1];
  return 5 * row * (products + 4) <= 6 * c.out_size[1] * (products + 4 * c.kernel[1]);
}

// Return whether kernel rows share planes. Shared rows cost only their gathering and decoding. If the kernel's rows are
// far apart, most shared rows would not be needed.
bool share_rows(const Conv2d& c) {
  Axis shared(c, 0, true);
  return shared.phases * shared.extent(c.out_size[0]) <= c.kernel[0] * c.out_size[0];
}

struct Plan {
  Conv2d c;
  Axis high, wide;
  std::int64_t steps;                         // products per sum
  std::int64_t rows;                          // output rows per job
  std::int64_t block_count;                   // blocks of output channels per job
  std::int64_t columns, plane, plane_count;   // elements per plane row, elements per plane, planes per job
  std::int64_t positions;                     // positions per job, rounded up to whole vectors
  std::int64_t blocks, block;                 // output channels form `blocks` blocks of at most `block`
  Buffer<std::int64_t> offsets;               // from an output's position to each step's element
  Buffer<Weight> weights;                     // [group][block][step][channel of the block]
  Buffer<Exponents> weight_exponents;         // [group][block]
  TileSet tile_set;

  explicit Plan(const Conv2d& conv)
      : c(conv), high(c, 0, share_rows(c)), wide(c, 1, share_columns(c)),
        steps(c.channels * c.kernel[0] * c.kernel[1]), rows(c.out_size[0]), block_count(ceil_div(c.out_channels, BLOCK)),
        columns(wide.extent(c.out_size[1])),
        plane_count(c.channels * high.phases * wide.phases), blocks(ceil_div(c.out_channels, BLOCK)),
        block(ceil_div(c.out_channels, blocks)), offsets(steps), weights(c.groups * c.out_channels * steps),
        weight_exponents(c.groups * blocks), tile_set(for_form<Tiles>(c.multiplier)) {
    auto planes_bytes = [&] {
      return std::int64_t(sizeof(float) + sizeof(int)) * plane_count * high.extent(rows) * columns;
    };
    while (rows > 1 && planes_bytes() > SCRATCH_TARGET) rows = ceil_div(rows, 2);
    // Both gather and decode some rows more than once. Fewer positions than a tile has would leave lanes idle.
    auto few_jobs = [&] { return c.threads > 1 && job_count() < JOBS_PER_THREAD * c.threads; };
    while (rows > 1 && few_jobs() && rows * columns > VECTORS * LANES) rows = ceil_div(rows, 2);
    while (block_count > LEAST_BLOCKS && few_jobs()) block_count = ceil_div(block_count, 2);
    plane = high.extent(rows) * columns;
    positions = ceil_div((rows - 1) * columns + c.out_size[1], LANES) * LANES;
    locate_steps();
  }

  std::int64_t row_ranges() const { return ceil_div(c.out_size[0], rows); }
  std::int64_t block_ranges() const { return ceil_div(blocks, block_count); }
  std::int64_t job_count() const { return c.batch * c.groups * row_ranges() * block_ranges(); }
  std::int64_t block_start(std::int64_t b) const { return b * block; }
  std::int64_t block_size(std::int64_t b) const {
    std::int64_t left = c.out_channels - b * block;
    return left < block ? left : block;
  }
  std::int64_t planes_elements() const { return (plane_count * plane + 2 * LANES - 1) / LANES * LANES; }

  void locate_steps() {
    std::int64_t k = 0;
    for (std::int64_t ch = 0; ch < c.channels; ch++)
      for (std::int64_t i = 0; i < c.kernel[0]; i++)
        for (std::int64_t j = 0; j < c.kernel[1]; j++)
          offsets[k++] = ((ch * high.phases + high.index(i)) * wide.phases + wide.index(j)) * plane +
                         high.start(i) * columns + wide.start(j);
  }

  // Pack the weights of one block of one group.
  void pack(std::int64_t job) const {
    const Multiplier m = c.multiplier;
    std::int64_t g = job / blocks, b = job % blocks, size = block_size(b), elements = c.kernel[0] * c.kernel[1];
    Weight* to = &weights[(g * c.out_channels + block_start(b)) * steps];
    Range range;
    for (std::int64_t n = 0; n < size; n++) {
      const float* row = c.weight + g * c.weight_stride[0] + (block_start(b) + n) * c.weight_stride[1];
      std::int64_t channel = 0, element = 0;
      for (std::int64_t k = 0; k < steps; k += LANES) {
        std::int64_t count = steps - k < LANES ? steps - k : LANES;
        float w[LANES] = {};
        for (std::int64_t i = 0; i < count; i++) {
          w[i] = row[channel + element];
          if (++element == elements) element = 0, channel += c.weight_stride[2];
        }
        F power;
        I rest;
        decode_weights(load<F>(w), m, power, rest);
        range.add(load<F>(w));
        for (std::int64_t i = 0; i < count; i++) to[(k + i) * size + n] = {power[i], rest[i]};
      }
    }
    weight_exponents[job] = range.exponents();
  }
};

// Copy the input elements for the output rows from `row` on into their planes; padding is zero. If `inside` is given,
// set it to -1 for elements of the input and to 0 for padding.
void gather_planes(const Plan& p, const float* image, std::int64_t row, float* plane, int* inside) {
  const Conv2d& c = p.c;
  std::int64_t plane_rows = p.high.extent(p.rows), column_step = c.input_stride[4] * c.stride[1];
  if (inside) std::memset(inside, 0, p.planes_elements() * sizeof(int));
  for (std::int64_t ch = 0; ch < c.channels; ch++)
    for (std::int64_t i = 0; i < p.high.phases; i++)
      for (std::int64_t j = 0; j < p.wide.phases; j++) {
        // Plane column q is image column q * stride + left. Columns from first to before last are inside the image.
        std::int64_t left = p.wide.phase[j] - c.padding[1];
        std::int64_t first = left < 0 ? ceil_div(-left, c.stride[1]) : 0;
        std::int64_t last = c.size[1] > left ? ceil_div(c.size[1] - left, c.stride[1]) : 0;
        first = first < p.columns ? first : p.columns;
        last = last < first ? first : last < p.columns ? last : p.columns;
        for (std::int64_t r = 0; r < plane_rows; r++, plane += p.columns) {
          std::int64_t y = (row + r) * c.stride[0] + p.high.phase[i] - c.padding[0];
          std::int64_t end = y >= 0 && y < c.size[0] ? last : first;
          const float* x = image + ch * c.input_stride[2] + y * c.input_stride[3] + left * c.input_stride[4];
          for (std::int64_t q = 0; q < first; q++) plane[q] = 0;
          if (column_step == 1)
            std::memcpy(plane + first, x + first, (end - first) * sizeof(float));
          else
            for (std::int64_t q = first; q < end; q++) plane[q] = x[q * column_step];
          for (std::int64_t q = end; q < p.columns; q++) plane[q] = 0;
          if (inside) {
            for (std::int64_t q = first; q < end; q++) inside[q] = -1;
            inside += p.columns;
          }
        }
      }
  // The last tile reads up to one vector past the planes. Stale bits there could be subnormals, which are slow.
  std::memset(plane, 0, (p.planes_elements() - p.plane_count * p.plane) * sizeof(float));
}

// Decode the operands: in place into powers of two (or whole operands, depending on the form), and into fractions.
// Return the range of their exponents.
Exponents decode_planes(const Plan& p, float* power, int* fraction) {
  const Multiplier m = p.c.multiplier;
  Range range;
  for (std::int64_t i = 0; i < p.planes_elements(); i += LANES) {
    F x = load<F>(power + i);
    range.add(x);
    if (m.form == CALL) continue;
    if (m.form == IEEE) {
      store(power + i, truncate_finite<Lanes>(x, m.operand_keep));
    } else if (m.form == TRUNCATED) {
      store(power + i, decode_truncated<Lanes>(x, m));
    } else {
      I column = is_lookup(m) ? table_column(bits<Lanes>(x) & FRACTION, m) : decode_fraction<Lanes>(x, m);
      store(power + i, decode_power<Lanes>(x));
      store(fraction + i, column);
    }
  }
  return range.exponents();
}

// Compute the sums of one vector and one output channel, each product by definition. `operands` and `weight` are not
// decoded. The mask `inside` excludes padding, which contributes nothing, although padding times an infinite weight is
// NaN.
void tile_by_definition(const float* operands, const int* inside, const Plan& p, const float* weight, float* sums) {
  F sum = {};
  std::int64_t k = 0;
  for (std::int64_t ch = 0; ch < p.c.channels; ch++, weight += p.c.weight_stride[2])
    for (std::int64_t i = 0; i < p.c.kernel[0] * p.c.kernel[1]; i++, k++) {
      F product_of_step = product<Lanes>(load<F>(operands + p.offsets[k]), F{} + weight[i], p.c.multiplier);
      sum += from_bits<Lanes>(bits<Lanes>(product_of_step) & load<I>(inside + p.offsets[k]));
    }
  store(sums, sum);
}

struct Job {
  std::int64_t image, group, row, rows, first_block, last_block;
};

// Write a block's sums to the output and add the bias, rounding to nearest.
void write_block(const Plan& p, const Job& job, std::int64_t b, const float* sums) {
  const Conv2d& c = p.c;
  Rounding nearest(TO_NEAREST);
  for (std::int64_t n = 0; n < p.block_size(b); n++) {
    float* out = c.output + job.image * c.output_stride[0] + job.group * c.output_stride[1] +
                 (p.block_start(b) + n) * c.output_stride[2] + job.row * c.output_stride[3];
    float bias = c.bias ? c.bias[job.group * c.out_channels + p.block_start(b) + n] : 0.0f;
    for (std::int64_t r = 0; r < job.rows; r++, out += c.output_stride[3]) {
      const float* sum = sums + n * p.positions + r * p.columns;
      if (c.output_stride[4] != 1)
        for (std::int64_t q = 0; q < c.out_size[1]; q++) out[q * c.output_stride[4]] = c.bias ? sum[q] + bias : sum[q];
      else if (c.bias)
        for (std::int64_t q = 0; q < c.out_size[1]; q++) out[q] = sum[q] + bias;
      else
        std::memcpy(out, sum, c.out_size[1] * sizeof(float));
    }
  }
}

void run_job(const void* plan, std::int64_t index, void* scratch) {
  const Plan& p = *static_cast<const Plan*>(plan);
  const Conv2d& c = p.c;
  std::int64_t range = index % p.block_ranges(), rows = index / p.block_ranges(), image_and_group = rows / p.row_ranges();
  Job job{image_and_group / c.groups, image_and_group % c.groups, rows % p.row_ranges() * p.rows, p.rows,
          range * p.block_count,      (range + 1) * p.block_count};
  if (job.row + job.rows > c.out_size[0]) job.rows = c.out_size[0] - job.row;
  if (job.last_block > p.blocks) job.last_block = p.blocks;
  const float* image = c.input + job.image * c.input_stride[0] + job.group * c.input_stride[1];

  float* power = static_cast<float*>(scratch);
  int* fraction = reinterpret_cast<int*>(power + p.planes_elements());
  float* sums = power + 2 * p.planes_elements();
  Rounding rounding(rounding_of_products(c.multiplier));
  gather_planes(p, image, job.row, power, nullptr);
  Exponents e = decode_planes(p, power, fraction);
  auto is_fast = [&](std::int64_t b) {
    const Exponents& w = p.weight_exponents[job.group * p.blocks + b];
    // The IEEE form is correct for finite operands. Padding must not meet an infinite weight, and this processor's NaN
    // for infinity times zero is not the definition's.
    if (c.multiplier.form == IEEE) return !e.special() && !w.special();
    if (c.multiplier.form == CALL) return !w.special();
    return in_range(e, w);
  };

  bool all_fast = true;
  for (std::int64_t b = job.first_block; b < job.last_block; b++) {
    if (!is_fast(b)) {
      all_fast = false;
      continue;
    }
    std::int64_t first = job.group * c.out_channels + p.block_start(b), size = p.block_size(b);
    for (std::int64_t q = 0, vectors; q < p.positions; q += vectors * LANES) {
      vectors = p.positions - q >= VECTORS * LANES ? VECTORS : 1;
      p.tile_set.of_size[vectors - 1][size - 1](power + q, fraction + q, p.offsets.data, p.steps,
                                                &p.weights[first * p.steps], c.multiplier, sums + q, p.positions);
    }
    write_block(p, job, b, sums);
  }
  if (all_fast) return;

  int* inside = fraction;
  gather_planes(p, image, job.row, power, inside);
  for (std::int64_t b = job.first_block; b < job.last_block; b++) {
    if (is_fast(b)) continue;
    for (std::int64_t n = 0; n < p.block_size(b); n++) {
      const float* weight = c.weight + job.group * c.weight_stride[0] + (p.block_start(b) + n) * c.weight_stride[1];
      for (std::int64_t q = 0; q < p.positions; q += LANES)
        tile_by_definition(power + q, inside + q, p, weight, sums + n * p.positions + q);
    }
    write_block(p, job, b, sums);
  }
}

void multiply(const Multiplier& m, const float* a, const float* b, float* out, std::int64_t count) {
  Rounding rounding(rounding_of_products(m));
  std::int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(out + i, product<Lanes>(load<F>(a + i), load<F>(b + i), m));
  if (i == count) return;
  float rest[3][LANES] = {};
  std::memcpy(rest[0], a + i, (count - i) * sizeof(float));
  std::memcpy(rest[1], b + i, (count - i) * sizeof(float));
  store(rest[2], product<Lanes>(load<F>(rest[0]), load<F>(rest[1]), m));
  std::memcpy(out + i, rest[2], (count - i) * sizeof(float));
}

// Keep a value in a register and hide it from the compiler.
#if defined(__x86_64__)
#define MBM_OPAQUE(v) asm volatile("" : "+v"(v))
#elif defined(__aarch64__)
#define MBM_OPAQUE(v) asm volatile("" : "+w"(v))
#else
#define MBM_OPAQUE(v) asm volatile("" : "+m"(v))
#endif

struct Ceiling {
  template <Form FORM, bool MASKED> static std::int64_t of(const Multiplier& shared, std::int64_t rounds) {
    const Multiplier m = shared;
    F sum[VECTORS * BLOCK] = {}, a = F{} + 1.0f;
    I x = {};
    for (int lane = 0; lane < LANES; lane++) x[lane] = is_lookup(m) ? lane : CARRY / 4;
    Weight w{1.0f, is_lookup(m) ? 0 : ONE + CARRY / 2};
    asm volatile("" : "+m"(w));  // hides the factor 1, which the compiler would drop
    for (std::int64_t r = 0; r < rounds; r++) {
#pragma GCC unroll 8
      for (F& s : sum) {
        MBM_OPAQUE(a);
        MBM_OPAQUE(x);
        s = accumulate<FORM, MASKED>(s, a, x, w, m);
      }
    }
    for (F& s : sum) MBM_OPAQUE(s);
    return rounds * VECTORS * BLOCK * LANES;
  }
};

std::int64_t ceiling(const Multiplier& m, std::int64_t rounds) {
  Rounding rounding(rounding_of_products(m));
  return for_form<Ceiling>(m, m, rounds);
}

std::int64_t packing_jobs(const void* plan) {
  const Plan& p = *static_cast<const Plan*>(plan);
  return p.c.groups * p.blocks;
}
void pack(const void* plan, std::int64_t job) { static_cast<const Plan*>(plan)->pack(job); }
void* make_plan(const Conv2d& c) { return new Plan(c); }
void free_plan(void* plan) { delete static_cast<Plan*>(plan); }
std::int64_t jobs(const void* plan) { return static_cast<const Plan*>(plan)->job_count(); }
std::size_t scratch_bytes(const void* plan) {
  const Plan& p = *static_cast<const Plan*>(plan);
  return (2 * p.planes_elements() + p.block * p.positions) * sizeof(float);
}

#define MBM_STRING(x) #x
#define MBM_NAME(x) MBM_STRING(x)

}  // namespace

extern const Kernels kernels;
const Kernels kernels{MBM_NAME(MBM_ISA), make_plan,     free_plan, packing_jobs, pack,
                      jobs,             scratch_bytes, run_job,   multiply,     ceiling};

}  // namespace mbm::MBM_ISA

#if defined(MBM_FUNCTION)
extern "C" __attribute__((visibility("default"))) const mbm::Kernels* mbm_kernels() { return &mbm::MBM_ISA::kernels; }
#endif
