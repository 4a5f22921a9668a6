// The CPU kernels of integer multipliers: sums of table entries. CMake compiles this file once for each instruction set
// (MBM_ISA). All results are those of integer additions modulo 2^32, in any order.
//
// Mapping: a job is a range of images, rows and columns of the output, one group, and a range of output channels. One
// thread computes it. It first copies the input elements that it needs, padding included, into a patch
// [image][row][column][channel], where an element is what the products need of its code. Then, for each block of output
// channels, lanes are channels, and a position's products come in one of three ways:
//   1. Terms (the multiplier is a sum of few products of looked-up operands): an implicit matrix product of int16 pairs
//      (vpmaddwd), or of four bytes (vpdpbusd). A tile is POSITIONS positions by two vectors of channels, whose sums
//      stay in registers; a step of a tile is a broadcast for each position and a load for each vector. f is summed
//      over windows of the patch's pixels, g over the weights. Cost: 1/16 multiply and 1/16 addition a product and a
//      term on AVX2, 1/64 instruction with VNNI.
//   2. Look-ups in tables of a step: for a step and 32 channels, the 256 rows of the channels' products lie side by
//      side, so a position loads one contiguous row. Four steps (64 KiB of tables) share the loads and stores of a
//      position's sums. Entries are 16 bits, less the lowest; wider tables take two passes. Cost of 16 products: a
//      load, a shift and two additions. To make a table costs as much as to use it for 400 positions.
//   3. Look-ups each on its own, where channels or positions are too few to make tables.
//
// GMAC/s of 32 to 64 channels, 3x3, 28x28, batch 64, one core of an EPYC (Zen 4, 1 MiB of L2 cache):
//               1 term  2 terms  4 terms  5 terms  8 terms  look-up  look-up, wide table
//   VNNI        116     77       46       38       26       21       11
//   AVX2        66      39       21       16       11       21       11
//   portable    5.5     2.8      1.4      1.1      0.7      7.7      3.9
// The inner loops of look-ups alone, without making tables: rows of 32-bit entries 18, and of 16-bit entries that are
// widened 19 (16 channels both); these rows 20 with 16 channels and 30 with 32, or 23 with two steps at a time; single
// loads of entries 2.3, vpgatherdd 2.7.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "integer.h"

namespace mbm::integers::MBM_ISA {
namespace {

using Int = std::int64_t;
using Byte = std::uint8_t;
using Word = std::uint32_t;

// The matrix products: LANES output channels a vector, and of each the GROUP consecutive factors that fill 32 bits.
// COSTS are nanoseconds on one core, measured on the EPYC (Zen 4) of the header.
#if defined(__AVX512VNNI__)
constexpr int LANES = 16, POSITIONS = 8;
using Factor = std::int8_t;
constexpr int U_OFFSET = 128;  // vpdpbusd multiplies unsigned by signed bytes
constexpr IntegerCosts COSTS{LANES, 0.005, 0.65, 260, 0.45};
#elif defined(__AVX2__)
constexpr int LANES = 8, POSITIONS = 6;  // 12 sums and what is added to them fill the 16 registers
using Factor = std::int16_t;
constexpr int U_OFFSET = 0;
constexpr IntegerCosts COSTS{LANES, 0.012, 0.65, 260, 0.45};
#else
constexpr int LANES = 4, POSITIONS = 4;
using Factor = std::int16_t;
constexpr int U_OFFSET = 0;
constexpr IntegerCosts COSTS{LANES, 0.18, 1.6, 1100, 0.45};
#endif
constexpr int VECTORS = 2;
constexpr int CHUNK = 8;            // bytes copied at a time
constexpr Int WEIGHTS = 256 << 10;  // bytes of packed weights that stay in the L2 cache
constexpr Int BATCH = 8 * POSITIONS;

// The look-ups: ENTRIES output channels a vector. Sums of 16-bit halves are exact for up to SPAN steps.
constexpr int ENTRIES = 16, STEPS = 4, SPAN = 256;

constexpr Int JOBS_PER_THREAD = 4;  // at least, so that no thread waits long for another
// Of a job. Positions share the packing of a step's table, and what of the weights is in the L2 cache. A patch need not
// be: each of its lines is read in consecutive steps. With 512 KiB, 512 channels ran at two thirds of the speed.
constexpr Int PATCH = 4 << 20, MOST_POSITIONS = 2048;
constexpr Int LEAST_OF_TERMS = 64, LEAST_OF_LOOK_UPS = 1024;  // positions of a job, where jobs are few

Int ceil_div(Int a, Int b) { return (a + b - 1) / b; }
Int least(Int a, Int b) { return a < b ? a : b; }
Int most(Int a, Int b) { return a > b ? a : b; }

// std::vector is not used: the linker could share its instances, compiled for this instruction set, with other code.
template <class T> struct Buffer {
  T* data = nullptr;
  Buffer() = default;
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  void allocate(Int count) {  // zeros
    std::size_t bytes = ceil_div(sizeof(T) * count + 1, 64) * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
    std::memset(data, 0, bytes);
  }
  T& operator[](Int i) const { return data[i]; }
};

template <class V, class T> V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T> void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }

// One axis of a job's patch, the elements that its outputs need: output y finds element k of the kernel at y * step +
// k * hop. Kernel elements share an input element that several of them need, unless so few are needed that to copy
// each element's own takes less room (large strides and dilations).
struct Axis {
  Int stride, dilation, padding, size, outputs, extent, step, hop;

  Axis(const IntegerConv2d& c, int axis, Int outputs)
      : stride(c.stride[axis]), dilation(c.dilation[axis]), padding(c.padding[axis]), size(c.size[axis]),
        outputs(outputs), extent((outputs - 1) * stride + (c.kernel[axis] - 1) * dilation + 1), step(stride),
        hop(dilation) {
    if (extent > outputs * c.kernel[axis]) extent = outputs * c.kernel[axis], step = 1, hop = outputs;
  }
  bool shared() const { return step == stride && hop == dilation; }
  // Return the input's position of the patch's position q, for outputs from `first` on; -1 outside the image.
  Int source(Int first, Int q) const {
    Int at = shared() ? first * stride + q : (first + q % outputs) * stride + q / outputs * dilation;
    at -= padding;
    return at < 0 || at >= size ? -1 : at;
  }
};

struct Plan {
  const IntegerConv2d c;
  const Int elements, steps;       // of a kernel, of a sum
  const Int pitch, pixel;          // bytes of an element and of a pixel in a patch
  const Int block, blocks;         // output channels form `blocks` blocks of at most `block`
  Int images, rows, columns;       // of a job's outputs
  Int block_count;                 // of a job
  Axis high, wide;
  Buffer<Int> offsets;             // bytes from a position's first element to those of each step, or of each run
  Int row_bytes;                   // of input_rows and weight_rows, whole chunks
  Buffer<Byte> input_rows;         // what a patch holds for a code: its factors, or the place of a row in a table
  Buffer<Word> bias;               // [group][channel]
  // Look-ups
  std::int32_t lowest = 0;         // entry of the table
  Int halves = 0;                  // 16-bit numbers that an entry above the lowest takes; 0 where tables do not pay
  Buffer<std::uint16_t> entries;   // [half][code of the weight][code of the input]
  // Terms. A run is a range of words, of which each position has one in the same place.
  Int run_pixels = 0, runs = 0, run_words = 0;
  Buffer<Byte> weight_rows;        // factors by code
  Buffer<Word> f, g;               // by code
  bool windows = false;            // whether f is not zero
  Buffer<Int> window;              // from a position's first pixel to those of its window
  Buffer<Word> weights;            // [group][block][run][word][channel of the block]

  explicit Plan(const IntegerConv2d& conv)
      : c(conv), elements(c.kernel[0] * c.kernel[1]), steps(c.channels * elements),
        pitch(c.terms ? c.terms * sizeof(Factor) : sizeof(std::uint16_t)), pixel(c.channels * pitch),
        block(VECTORS * (c.terms ? LANES : ENTRIES)), blocks(ceil_div(c.out_channels, block)), images(1),
        rows(c.out_size[0]), columns(c.out_size[1]), block_count(blocks), high(c, 0, rows), wide(c, 1, columns),
        row_bytes(ceil_div(pitch, CHUNK) * CHUNK) {
    divide();
    input_rows.allocate(256 * row_bytes), f.allocate(256), bias.allocate(c.groups * c.out_channels);
    c.terms ? plan_terms() : plan_look_ups();
  }

  Int positions() const { return images * rows * columns; }
  Int patch_pixels() const { return images * high.extent * wide.extent; }
  Int row_ranges() const { return ceil_div(c.out_size[0], rows); }
  Int column_ranges() const { return ceil_div(c.out_size[1], columns); }
  Int block_ranges() const { return ceil_div(blocks, block_count); }
  Int job_count() const {
    return ceil_div(c.batch, images) * c.groups * row_ranges() * column_ranges() * block_ranges();
  }
  Int block_size(Int b) const { return least(block, c.out_channels - b * block); }
  Int offset_of(Int i, Int j) const { return (i * high.hop * wide.extent + j * wide.hop) * pixel; }
  // Return whether it pays to look products up in tables of a step.
  bool tabulate(Int channels) const {
    return channels * COSTS.each > ceil_div(channels, ENTRIES) * (COSTS.vector + COSTS.table / double(positions()));
  }

  // Choose the outputs of a job.
  void divide() {
    Int few = c.terms ? LEAST_OF_TERMS : LEAST_OF_LOOK_UPS;
    auto halve = [](Int& count, Int of) { count = ceil_div(of, 2 * ceil_div(of, count)); };
    auto halve_rows = [&] { halve(rows, c.out_size[0]), high = Axis(c, 0, rows); };
    while (rows > 1 && patch_pixels() * pixel > PATCH) halve_rows();
    while (columns > 1 && patch_pixels() * pixel > PATCH) halve(columns, c.out_size[1]), wide = Axis(c, 1, columns);
    if (rows == c.out_size[0] && columns == c.out_size[1])
      images = most(1, least(c.batch, least(PATCH / (patch_pixels() * pixel), MOST_POSITIONS / positions())));
    auto few_jobs = [&] { return c.threads > 1 && job_count() < JOBS_PER_THREAD * c.threads; };
    while (images > 1 && few_jobs() && positions() >= 2 * few) halve(images, c.batch);
    while (block_count > 1 && few_jobs()) halve(block_count, blocks);
    while (rows > 1 && few_jobs() && positions() >= 2 * LEAST_OF_TERMS) halve_rows();
  }

  void plan_look_ups() {
    offsets.allocate(steps);
    for (Int a = 0; a < 256; a++)
      store(&input_rows[a * row_bytes], std::uint16_t(a * ENTRIES * sizeof(std::uint16_t)));
    for (Int k = 0; k < steps; k++)
      offsets[k] = offset_of(k % elements / c.kernel[1], k % c.kernel[1]) + k / elements * pitch;
    if (!tabulate(block_size(0)) && !tabulate(block_size(blocks - 1))) return;
    std::int32_t highest = lowest = c.table[0];
    for (Int i = 0; i < 1 << 16; i++) {
      lowest = c.table[i] < lowest ? c.table[i] : lowest;
      highest = c.table[i] > highest ? c.table[i] : highest;
    }
    halves = Word(highest - lowest) >> 16 ? 2 : 1;
    entries.allocate(halves << 16);
    for (Int i = 0; i < c.groups * c.out_channels; i++) bias[i] = Word(steps) * lowest;
  }

  void plan_terms() {
    run_pixels = wide.hop == 1 ? c.kernel[1] : 1;
    runs = elements / run_pixels, run_words = ceil_div(run_pixels * pixel, sizeof(Word));
    weight_rows.allocate(256 * row_bytes), g.allocate(256), offsets.allocate(runs), window.allocate(elements);
    weights.allocate(c.groups * blocks * runs * run_words * block);
    for (Int run = 0, k = 0; run < runs; run++, k += run_pixels)
      offsets[run] = offset_of(k / c.kernel[1], k % c.kernel[1]);
    for (Int k = 0; k < elements; k++) window[k] = offset_of(k / c.kernel[1], k % c.kernel[1]) / pixel;
    for (Int code = 0; code < 256; code++) {
      f[code] = Word(c.f[code]), g[code] = Word(c.g[code]), windows |= f[code] != 0;
      for (Int r = 0; r < c.terms; r++) {
        std::int8_t u = c.u[code * c.terms + r], v = c.v[r * 256 + code];
        store(&input_rows[code * row_bytes + r * sizeof(Factor)], Factor(u + U_OFFSET));
        store(&weight_rows[code * row_bytes + r * sizeof(Factor)], Factor(v));
        g[code] -= Word(U_OFFSET * v);
      }
    }
  }

  Int packing_jobs() const { return c.terms ? c.groups * blocks : halves ? 256 / ENTRIES : 0; }
  void pack(Int job) const { c.terms ? pack_weights(job / blocks, job % blocks) : pack_entries(job * ENTRIES); }
  void pack_entries(Int first) const;
  void pack_weights(Int group, Int b) const;
};

// Write the rows of codes one after another, and return the sum of their `terms`. What a row's chunks have in excess,
// the next row overwrites.
template <bool ONE_CHUNK>
Word expand_rows(const Byte* codes, Int stride, Int count, const Byte* rows, Int row_bytes, Int pitch,
                 const Word* terms, Byte* to) {
  if (ONE_CHUNK) row_bytes = CHUNK;
  Word sum = 0;
  for (Int i = 0; i < count; i++, codes += stride, to += pitch) {
    sum += terms[*codes];
    for (Int at = 0; at < row_bytes; at += CHUNK) std::memcpy(to + at, rows + *codes * row_bytes + at, CHUNK);
  }
  return sum;
}

Word expand(const Byte* codes, Int stride, Int count, const Byte* rows, const Plan& p, const Word* terms, Byte* to) {
  auto expand = p.row_bytes == CHUNK ? expand_rows<true> : expand_rows<false>;
  return expand(codes, stride, count, rows, p.row_bytes, p.pitch, terms, to);
}

void Plan::pack_entries(Int first) const {
  for (Int half = 0; half < halves; half++)
    for (Int a = 0; a < 256; a++)
      for (Int b = first; b < first + ENTRIES; b++)
        entries[(half * 256 + b) * 256 + a] = Word(c.table[a * 256 + b] - lowest) >> 16 * half;
}

void Plan::pack_weights(Int group, Int b) const {
  Buffer<Byte> factors;
  factors.allocate(run_words * sizeof(Word) + row_bytes);
  Word* to = &weights[(group * blocks + b) * runs * run_words * block];
  for (Int n = 0; n < block_size(b); n++) {
    Int channel = group * c.out_channels + b * block + n;
    const Byte* codes = c.weight + channel * steps;
    for (Int run = 0; run < runs; run++, codes += run_pixels) {
      for (Int j = 0; j < run_pixels; j++)
        bias[channel] += expand(codes + j, elements, c.channels, weight_rows.data, *this, g.data, &factors[j * pixel]);
      std::memset(&factors[run_pixels * pixel], 0, sizeof(Word) - 1);  // of the last word
      for (Int t = 0; t < run_words; t++)
        to[(run * run_words + t) * block + n] = load<Word>(&factors[t * sizeof(Word)]);
    }
  }
}

// A job's memory. Without a start, it only counts the bytes.
struct Scratch {
  Byte* patch;                       // [image][row][column][channel]
  Word* pixel_terms;                 // of each pixel the sum of f
  Int *at, *out;                     // of each position the first pixel, and the place in a channel of the output
  Word* windows;                     // of each position the sum of f
  Int* from_columns;                 // of each column of the patch
  std::uint16_t *tables, *sums;      // [step][code of the input][channel]; [position][vector][low, high][channel]
  std::size_t bytes = 0;

  Scratch(const Plan& p, void* start) {
    auto take = [&](auto*& pointer, Int count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(static_cast<char*>(start) + bytes);
      bytes += ceil_div(count * sizeof *pointer, 64) * 64;
    };
    take(patch, p.patch_pixels() * p.pixel + p.row_bytes), take(pixel_terms, p.patch_pixels());
    take(at, p.positions()), take(out, p.positions()), take(windows, p.positions());
    take(from_columns, p.wide.extent);
    take(tables, p.halves ? STEPS * 256 * p.block : 0), take(sums, p.halves ? p.positions() * p.block * 2 : 0);
  }
};

typedef Word Four __attribute__((vector_size(16)));

inline void transpose(Four (&x)[4]) {
  constexpr Four EVEN = {0, 4, 2, 6}, ODD = {1, 5, 3, 7}, LOW = {0, 1, 4, 5}, HIGH = {2, 3, 6, 7};
  Four a = __builtin_shuffle(x[0], x[1], EVEN), b = __builtin_shuffle(x[0], x[1], ODD);
  Four c = __builtin_shuffle(x[2], x[3], EVEN), d = __builtin_shuffle(x[2], x[3], ODD);
  x[0] = __builtin_shuffle(a, c, LOW), x[1] = __builtin_shuffle(b, d, LOW);
  x[2] = __builtin_shuffle(a, c, HIGH), x[3] = __builtin_shuffle(b, d, HIGH);
}

// The outputs of a job, and its memory.
struct Job {
  const Plan& p;
  const Scratch s;
  Int image, images, group, row, rows, column, columns, first_block, last_block, positions;

  Job(const Plan& p, Int index, void* scratch) : p(p), s(p, scratch) {
    const IntegerConv2d& c = p.c;
    auto next = [&](Int ranges) {
      Int i = index % ranges;
      index /= ranges;
      return i;
    };
    first_block = next(p.block_ranges()) * p.block_count, last_block = least(first_block + p.block_count, p.blocks);
    column = next(p.column_ranges()) * p.columns, columns = least(p.columns, c.out_size[1] - column);
    row = next(p.row_ranges()) * p.rows, rows = least(p.rows, c.out_size[0] - row);
    group = next(c.groups);
    image = index * p.images, images = least(p.images, c.batch - image);
    positions = images * rows * columns;
  }

  Byte* start(Int position) const { return s.patch + s.at[position] * p.pixel; }

  void fill_patch() const {
    const IntegerConv2d& c = p.c;
    Byte* to = s.patch;
    Word* terms = s.pixel_terms;
    for (Int x = 0; x < p.wide.extent; x++) s.from_columns[x] = p.wide.source(column, x);
    for (Int n = image; n < image + images; n++)
      for (Int y = 0; y < p.high.extent; y++) {
        Int from_row = p.high.source(row, y);
        const Byte* from = c.input + n * c.input_stride[0] + group * c.input_stride[1] + from_row * c.input_stride[3];
        for (Int x = 0; x < p.wide.extent; x++, to += p.pixel) {
          bool inside = from_row >= 0 && s.from_columns[x] >= 0;
          const Byte* codes = inside ? from + s.from_columns[x] * c.input_stride[4] : &c.padding_code;
          *terms++ = expand(codes, inside ? c.input_stride[2] : 0, c.channels, p.input_rows.data, p, p.f.data, to);
        }
      }
    std::memset(to, 0, p.row_bytes);
  }

  void locate_positions() const {
    const IntegerConv2d& c = p.c;
    const Int step = p.wide.step;
    Int i = 0;
    for (Int n = 0; n < images; n++)
      for (Int y = 0; y < rows; y++, i += columns) {
        const Int first = (n * p.high.extent + y * p.high.step) * p.wide.extent;
        for (Int x = 0; x < columns; x++) {
          s.at[i + x] = first + x * step;
          s.out[i + x] = (image + n) * c.output_stride[0] + (row + y) * c.out_size[1] + column + x;
          s.windows[i + x] = 0;
        }
        for (Int k = 0; p.windows && k < p.elements; k++) {
          const Word* terms = s.pixel_terms + first + p.window[k];
          for (Int x = 0; x < columns; x++) s.windows[i + x] += terms[x * step];
        }
      }
  }

  // Write the sums of a block's channels, [position][pitch], or add them to what other calls have written.
  void write(Int b, Int first, Int count, const Word* sums, Int pitch, bool add) const {
    const IntegerConv2d& c = p.c;
    const Int size = p.block_size(b), stride = c.output_stride[2];
    const Word* bias = &p.bias[group * c.out_channels + b * p.block];
    std::int32_t* out = c.output + group * c.output_stride[1] + b * p.block * stride;
    auto write_one = [&](Int i, Int n) {
      std::int32_t& to = out[s.out[first + i] + n * stride];
      to = sums[i * pitch + n] + (add ? Word(to) : bias[n] + s.windows[first + i]);
    };
    if (stride == 1) {
      for (Int i = 0; i < count; i++)
        for (Int n = 0; n < size; n++) write_one(i, n);
      return;
    }
    for (Int n = 0; n < size; n += 4)
      for (Int i = 0; i < count; i += 4) {
        Int channels = least(4, size - n);
        if (i + 4 <= count && s.out[first + i + 3] - s.out[first + i] == 3) {
          Four sum[4];
          for (Int j = 0; j < 4; j++) sum[j] = load<Four>(sums + (i + j) * pitch + n);
          transpose(sum);
          for (Int j = 0; j < channels; j++) {
            std::int32_t* to = out + s.out[first + i] + (n + j) * stride;
            store(to, sum[j] + (add ? load<Four>(to) : load<Four>(&s.windows[first + i]) + bias[n + j]));
          }
        } else {
          for (Int k = i; k < least(i + 4, count); k++)
            for (Int j = 0; j < channels; j++) write_one(k, n + j);
        }
      }
  }

  void run() const {
    fill_patch();
    locate_positions();
    for (Int b = first_block; b < last_block; b++)
      if (p.c.terms)
        multiply(b);
      else if (p.tabulate(p.block_size(b)))
        p.block_size(b) > ENTRIES ? look_up<2>(b) : look_up<1>(b);
      else
        look_up_each(b);
  }

  void multiply(Int b) const;
  template <int V> void look_up(Int b) const;
  void look_up_each(Int b) const;
  template <int N> void look_up_each(Int b, Int first) const;
};

// Terms

#if defined(__AVX512VNNI__)
using Lanes = __m512i;
Lanes all(Word x) { return _mm512_set1_epi32(x); }
Lanes dot(Lanes sum, Lanes u, Lanes v) { return _mm512_dpbusd_epi32(sum, u, v); }
#elif defined(__AVX2__)
using Lanes = __m256i;
Lanes all(Word x) { return _mm256_set1_epi32(x); }
Lanes dot(Lanes sum, Lanes u, Lanes v) { return _mm256_add_epi32(sum, _mm256_madd_epi16(u, v)); }
#else
typedef std::int32_t Lanes __attribute__((vector_size(4 * LANES)));
Lanes all(Word x) { return Lanes{} + std::int32_t(x); }
Lanes dot(Lanes sum, Lanes u, Lanes v) { return sum + (u << 16 >> 16) * (v << 16 >> 16) + (u >> 16) * (v >> 16); }
#endif

// Compute the sums of POSITIONS positions by V vectors of channels, [position][channel].
template <int V>
void tile(const Byte* const* starts, const Int* offsets, Int runs, Int run_words, const Word* weights, Word* sums) {
  Lanes sum[POSITIONS][V] = {};
  for (Int run = 0; run < runs; run++) {
    const Byte* u[POSITIONS];
#pragma GCC unroll 8
    for (int i = 0; i < POSITIONS; i++) u[i] = starts[i] + offsets[run];
    for (Int t = 0; t < run_words; t++, weights += VECTORS * LANES) {
      Lanes v[V];
#pragma GCC unroll 2
      for (int j = 0; j < V; j++) v[j] = load<Lanes>(weights + j * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < POSITIONS; i++) {
        Lanes factors = all(load<Word>(u[i] + t * sizeof(Word)));
#pragma GCC unroll 2
        for (int j = 0; j < V; j++) sum[i][j] = dot(sum[i][j], factors, v[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < POSITIONS; i++)
#pragma GCC unroll 2
    for (int j = 0; j < V; j++) store(sums + (i * V + j) * LANES, sum[i][j]);
}

void Job::multiply(Int b) const {
  const Int channels = p.block_size(b) <= LANES ? LANES : VECTORS * LANES;
  const Word* weights = &p.weights[(group * p.blocks + b) * p.runs * p.run_words * p.block];
  const Int at_once = most(1, WEIGHTS / (p.run_words * p.block * sizeof(Word)));
  alignas(64) Word sums[BATCH * VECTORS * LANES];
  for (Int run = 0; run < p.runs; run += at_once, weights += at_once * p.run_words * p.block)
    for (Int first = 0; first < positions; first += BATCH) {
      Int count = least(BATCH, positions - first);
      for (Int i = 0; i < count; i += POSITIONS) {
        const Byte* starts[POSITIONS];
        for (Int j = 0; j < POSITIONS; j++) starts[j] = start(least(first + i + j, positions - 1));
        (channels == LANES ? tile<1> : tile<VECTORS>)(starts, &p.offsets[run], least(at_once, p.runs - run),
                                                      p.run_words, weights, sums + i * channels);
      }
      write(b, first, count, sums, channels, run > 0);
    }
}

// Look-ups

typedef std::uint16_t Halves __attribute__((vector_size(2 * ENTRIES)));
typedef Word Words __attribute__((vector_size(4 * ENTRIES)));

// Write the columns of ENTRIES rows of 256 entries each one after another, `pitch` entries apart.
void transpose(const std::uint16_t* const* rows, std::uint16_t* to, Int pitch) {
#if defined(__AVX2__)
  // Four times, interleave the first half of the vectors with the second half, within lanes of 128 bits.
  for (Int a = 0; a < 256; a += ENTRIES) {
    __m256i x[ENTRIES], y[ENTRIES];
#pragma GCC unroll 16
    for (int i = 0; i < ENTRIES; i++) x[i] = load<__m256i>(rows[i] + a);
    auto interleave = [](const __m256i* from, __m256i* into) {
#pragma GCC unroll 8
      for (int i = 0; i < ENTRIES / 2; i++) {
        into[2 * i] = _mm256_unpacklo_epi16(from[i], from[i + ENTRIES / 2]);
        into[2 * i + 1] = _mm256_unpackhi_epi16(from[i], from[i + ENTRIES / 2]);
      }
    };
    interleave(x, y), interleave(y, x), interleave(x, y), interleave(y, x);
#pragma GCC unroll 8
    for (int i = 0; i < ENTRIES / 2; i++) {
      store(to + (a + i) * pitch, _mm256_permute2x128_si256(x[2 * i], x[2 * i + 1], 0x20));
      store(to + (a + i + ENTRIES / 2) * pitch, _mm256_permute2x128_si256(x[2 * i], x[2 * i + 1], 0x31));
    }
  }
#else
  for (Int a = 0; a < 256; a++)
    for (int i = 0; i < ENTRIES; i++) to[a * pitch + i] = rows[i][a];
#endif
}

// Add the products of N steps to the sums of V vectors of channels, for each position. The sum of 16-bit products
// follows from two sums of 16 bits: that of the products, modulo 2^16, and that of their high bytes.
template <int V, int N>
void add_steps(const Job& job, const Int* offsets) {
  constexpr Int TABLE = 256 * V * sizeof(Halves);
  const Byte *tables = reinterpret_cast<const Byte*>(job.s.tables), *patch = job.s.patch;
  const Int *at = job.s.at, pixel = job.p.pixel;
  std::uint16_t* sums = job.s.sums;
  for (Int i = 0; i < job.positions; i++, sums += V * 2 * ENTRIES) {
    Halves low[V], high[V];
    for (int v = 0; v < V; v++) {
      low[v] = load<Halves>(sums + v * 2 * ENTRIES);
      high[v] = load<Halves>(sums + v * 2 * ENTRIES + ENTRIES);
    }
    const Byte* start = patch + at[i] * pixel;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const Byte* row = tables + n * TABLE + Int(load<std::uint16_t>(start + offsets[n])) * V;
      for (int v = 0; v < V; v++) {
        Halves products = load<Halves>(row + v * sizeof(Halves));
        low[v] += products, high[v] += products >> 8;
      }
    }
    for (int v = 0; v < V; v++) {
      store(sums + v * 2 * ENTRIES, low[v]);
      store(sums + v * 2 * ENTRIES + ENTRIES, high[v]);
    }
  }
}

template <int V> void Job::look_up(Int b) const {
  constexpr void (*ADD[STEPS])(const Job&, const Int*) = {add_steps<V, 1>, add_steps<V, 2>, add_steps<V, 3>,
                                                          add_steps<V, 4>};
  const Byte* weight = p.c.weight + (group * p.c.out_channels + b * p.block) * p.steps;
  for (Int half = 0; half < p.halves; half++)
    for (Int first = 0; first < p.steps; first += SPAN) {
      Int last = least(first + SPAN, p.steps);
      std::memset(s.sums, 0, positions * V * 2 * sizeof(Halves));
      for (Int k = first; k < last; k += STEPS) {
        Int count = least(STEPS, last - k);
        for (Int n = 0; n < count; n++)
          for (int v = 0; v < V; v++) {
            const std::uint16_t* rows[ENTRIES];  // channels past the last one repeat it
            for (Int i = 0; i < ENTRIES; i++) {
              Int channel = least(v * ENTRIES + i, p.block_size(b) - 1);
              rows[i] = &p.entries[(half * 256 + weight[channel * p.steps + k + n]) * 256];
            }
            transpose(rows, s.tables + n * 256 * V * ENTRIES + v * ENTRIES, V * ENTRIES);
          }
        ADD[count - 1](*this, &p.offsets[k]);
      }
      for (Int i = 0; i < positions * V; i++) {
        std::uint16_t* sums = s.sums + i * 2 * ENTRIES;
        Halves high = load<Halves>(sums + ENTRIES), low = load<Halves>(sums) - (high << 8);
        store(sums, (__builtin_convertvector(low, Words) + (__builtin_convertvector(high, Words) << 8)) << 16 * half);
      }
      write(b, 0, positions, reinterpret_cast<const Word*>(s.sums), V * ENTRIES, half || first);
    }
}

// Look up the products of N output channels from `first` on at every position.
template <int N> void Job::look_up_each(Int b, Int first) const {
  const IntegerConv2d& c = p.c;
  const Byte* weight = c.weight + (group * c.out_channels + b * p.block + first) * p.steps;
  std::int32_t* out = c.output + group * c.output_stride[1] + (b * p.block + first) * c.output_stride[2];
  for (Int i = 0; i < positions; i++) {
    Word sum[N] = {};
    const Byte* from = start(i);
    for (Int k = 0; k < p.steps; k++) {
      const std::int32_t* row = c.table + load<std::uint16_t>(from + p.offsets[k]) / sizeof(Halves) * 256;
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[n] += row[weight[n * p.steps + k]];
    }
    for (Int n = 0; n < N; n++) out[n * c.output_stride[2] + s.out[i]] = sum[n];
  }
}

void Job::look_up_each(Int b) const {
  Int n = 0, size = p.block_size(b);
  for (; n + 4 <= size; n += 4) look_up_each<4>(b, n);
  for (; n < size; n++) look_up_each<1>(b, n);
}

void* make_plan(const IntegerConv2d& c) { return new Plan(c); }
void free_plan(void* plan) { delete static_cast<Plan*>(plan); }
Int packing_jobs(const void* plan) { return static_cast<const Plan*>(plan)->packing_jobs(); }
void pack(const void* plan, Int job) { static_cast<const Plan*>(plan)->pack(job); }
Int jobs(const void* plan) { return static_cast<const Plan*>(plan)->job_count(); }
std::size_t scratch_bytes(const void* plan) { return Scratch(*static_cast<const Plan*>(plan), nullptr).bytes; }
void run_job(const void* plan, Int job, void* scratch) { Job(*static_cast<const Plan*>(plan), job, scratch).run(); }

#define MBM_STRING(x) #x
#define MBM_NAME(x) MBM_STRING(x)

}  // namespace

extern const IntegerKernels kernels;
const IntegerKernels kernels{MBM_NAME(MBM_ISA), COSTS, make_plan,     free_plan, packing_jobs,
                             pack,              jobs,  scratch_bytes, run_job};

}  // namespace mbm::integers::MBM_ISA
