// The CUDA kernels. NVRTC compiles this file once per multiplier, named by the macros FAMILY, BITS and RESULT_BITS. No
// branch on the multiplier is left at run time.
//
// conv2d_tiled is an implicit GEMM. Rows are the output channels of a group, columns are pixels (all output positions
// of the batch), and the steps of a sum run over channels, kernel rows and kernel columns.
//   Mapping: a team of BN threads computes a tile of BM channels by BN pixels, TM by TN per thread. The 128 threads of
//     a block form one team or, for few pixels, several teams. Several teams divide the steps of a sum among themselves
//     and add their partial sums in a fixed order. Long sums of few outputs are divided among blocks, too.
//   Tile: while the current 8 steps are multiplied, each thread fetches its own pixel and some weights for the next 8.
//     It then decodes them into the other half of the team's shared memory. There is one barrier per 8 steps.
//   Limit: instructions. In the 64 x 128 tile, 84 % of them compute products, 3 % load from shared memory, and the
//     others fetch and decode. On Hopper they issue at 3.2 per cycle out of 4, as in the ceiling kernel. The rest is
//     lost to register bank conflicts, which only the compiler could avoid. With 64 sums per thread, 12 warps fit on a
//     multiprocessor.
//
// conv2d_direct serves up to 8 output channels per group (first layers, depthwise).
//   Mapping: a thread computes all channels of 1 to 4 pixels. The pixels' operands stay in registers; the weights are
//     decoded into shared memory.
//   Limit: instructions, half of which fetch and decode. With one pixel per thread, reading the weights limits it, too.
//
// The gradients are the same convolution on other strides (backends/geometry.py): that of the input takes the
// gradient as its input and the weight with its channels exchanged; that of the weight takes channels as images, images
// as channels, and the gradient as its kernel. A dense layer is a 1x1 convolution of 1x1 images.
//
// Sums start at 0.0 and round to nearest. No kernel uses atomics, so the same inputs give the same bits.
#include "arithmetic.cuh"
#include "entry.cuh"

namespace mbm {

constexpr int SLICE = 8;          // steps of a sum between two barriers of a tiled kernel
constexpr int OUTSIDE = 1 << 29;  // a row outside any image, even after adding an image row or -2 * OUTSIDE

// With LAYOUT_IS_FREE, operands lie in memory in any order and blocks can divide the steps of a sum among themselves.
// Without it, only forward convolutions are computed, in whole sums: strides then follow from the sizes. That takes 2 to
// 6 % of a tile's time less. Each is a program of its own (backends/cuda.py).
constexpr bool FREE = LAYOUT_IS_FREE;

// The kernels' argument. backends/cuda.py mirrors its layout. Strides are in elements; a kernel and an output's plane are
// contiguous. Channels are counted per group. Where a layout is free, paddings and dilations may be negative.
struct Conv2d {
  const float *input, *weight, *bias;
  float* output;
  const TableEntry* table;
  long long image_stride;  // of the input
  int channel_stride, row_stride, column_stride;
  int channels, out_channels, groups;
  int size[2], kernel[2], out_size[2], stride[2], padding[2], dilation[2];
  int slice[3];     // SLICE steps, expressed as channels, kernel rows and kernel columns
  unsigned pixels;  // batch * out_size[0] * out_size[1]
  // Of a free layout only:
  long long input_group_stride, input_channel_stride;
  long long weight_group_stride, weight_row_stride;  // a row is an output channel
  long long out_image_stride, out_group_stride, out_channel_stride;
  long long part_stride;   // gridDim.y blocks divide the steps of a sum; each writes its part into an output of its own
  int part_slices;         // slices of SLICE steps in a part
  int weight_channel_gap;  // elements between two channels of the weight

  MBM_MEMBER int sum_length() const { return channels * kernel[0] * kernel[1]; }
  MBM_MEMBER int plane() const { return out_size[0] * out_size[1]; }
  MBM_MEMBER int slices() const { return (sum_length() + SLICE - 1) / SLICE; }

  // Offsets in elements.
  MBM_MEMBER long long input_of(int group) const {
    return FREE ? group * input_group_stride : (long long)group * channels * channel_stride;
  }
  MBM_MEMBER long long input_of(int channel, int down, int right) const {
    if constexpr (FREE)
      return channel * input_channel_stride + (long long)down * row_stride + (long long)right * column_stride;
    return channel * channel_stride + down * row_stride + right * column_stride;
  }
  MBM_MEMBER long long weight_row() const { return FREE ? weight_row_stride : sum_length(); }
  MBM_MEMBER long long weight_of(int group, int row) const {
    if constexpr (FREE) return group * weight_group_stride + row * weight_row_stride;
    return (long long)(group * out_channels + row) * sum_length();
  }
  MBM_MEMBER long long weight_gaps(int channels) const { return FREE ? (long long)channels * weight_channel_gap : 0; }
  MBM_MEMBER long long output_of(int group, unsigned image) const {
    if constexpr (FREE) return image * out_image_stride + group * out_group_stride + blockIdx.y * part_stride;
    return ((long long)image * groups + group) * out_channels * plane();
  }
  MBM_MEMBER long long output_image() const { return FREE ? out_image_stride : (long long)groups * out_channels * plane(); }
  MBM_MEMBER long long output_of(int channel) const {
    return FREE ? channel * out_channel_stride : (long long)channel * plane();
  }
  // The first part of a sum contains the bias.
  MBM_MEMBER float bias_of(int group, int channel) const {
    return bias && (!FREE || blockIdx.y == 0) ? bias[group * out_channels + channel] : 0.0f;
  }
};

// The steps of a sum that a block computes: from `first` to before `last`.
struct Range {
  int first, last;
};

// ---- Positions -----------------------------------------------------------------------------------------------------

// The addresses of one output position's input elements and outputs.
struct Position {
  const float* origin;  // the input element under the kernel's first element, possibly in the padding
  int row, column;      // of that input element
  long long output;     // offset of the output in the group's first channel

  Position() = default;
  MBM_MEMBER Position(const Conv2d& c, int group, unsigned pixel) {
    unsigned image = pixel / c.plane(), rest = pixel % c.plane();
    unsigned width = c.out_size[1];
    row = int(rest / width) * c.stride[0] - c.padding[0];
    column = int(rest % width) * c.stride[1] - c.padding[1];
    origin = c.input + image * c.image_stride + c.input_of(group) + (long long)row * c.row_stride +
             (long long)column * c.column_stride;
    output = c.output_of(group, image) + rest;
    if (pixel >= c.pixels) row = -2 * OUTSIDE;  // past the last pixel
  }
};

// Return the float at `base` plus `offset` bytes if x < limit_x and y < limit_y, else zero. This is PTX because the
// compiler would not emit predicated loads for a series of these; it would evaluate all their predicates first.
MBM_FN float load_if_below(const float* base, long long offset, unsigned x, unsigned limit_x, unsigned y,
                           unsigned limit_y) {
  float value;
  asm volatile(
      "{\n\t.reg .pred below;\n\t.reg .s64 address;\n\t"
      "setp.lt.u32 below, %3, %4;\n\tsetp.lt.and.u32 below, %5, %6, below;\n\t"
      "add.s64 address, %1, %2;\n\tmov.f32 %0, 0f00000000;\n\t@below ld.global.nc.f32 %0, [address];\n\t}"
      : "=f"(value)
      : "l"(base), "l"(offset), "r"(x), "r"(limit_x), "r"(y), "r"(limit_y));
  return value;
}

// Load a structure of 16 bytes with one instruction.
template <class T> MBM_FN T load16(const T& from) {
  static_assert(sizeof(T) == 16);
  int4 words = reinterpret_cast<const int4&>(from);
  return reinterpret_cast<const T&>(words);
}

// A step of a sum: the displacement of its input element from a position's origin.
struct __align__(16) Step {
  long long offset;  // in bytes
  int down, right;

  MBM_MEMBER bool inside(const Conv2d& c, const Position& at) const {
    return unsigned(at.row + down) < unsigned(c.size[0]) && unsigned(at.column + right) < unsigned(c.size[1]);
  }
  // Return the element, or zero in the padding.
  MBM_MEMBER float load(const Conv2d& c, const Position& at) const {
    return load_if_below(at.origin, offset, at.row + down, c.size[0], at.column + right, c.size[1]);
  }
};

// A step as a channel and a kernel element. The order of steps is that of the weights in memory.
struct Walk {
  int channel, row, column;

  MBM_MEMBER Walk(const Conv2d& c, unsigned step) {
    unsigned elements = c.kernel[0] * c.kernel[1], columns = c.kernel[1];
    channel = step / elements;
    row = step % elements / columns;
    column = step % elements % columns;
  }
  MBM_MEMBER void advance(const Conv2d& c, int channels, int rows, int columns) {
    channel += channels;
    row += rows;
    column += columns;
    if (column >= c.kernel[1]) {
      column -= c.kernel[1];
      row++;
    }
    if (row >= c.kernel[0]) {
      row -= c.kernel[0];
      channel++;
    }
  }
  // Return the offset of a step's weight in its row.
  MBM_MEMBER long long weight(const Conv2d& c, int step) const { return step + c.weight_gaps(channel); }
  MBM_MEMBER Step step(const Conv2d& c) const {
    int down = row * c.dilation[0], right = column * c.dilation[1];
    long long offset = c.input_of(channel, down, right);
    return {offset * (int)sizeof(float), channel < c.channels ? down : OUTSIDE, right};
  }
};

// Compute a part of an output's sum without the fast form, for operands with any exponents.
MBM_FN float sum_by_definition(const Conv2d& c, const Position& at, int group, int channel, Range steps) {
  const float* weight = c.weight + c.weight_of(group, channel);
  float sum = 0;
  Walk walk(c, steps.first);
#pragma unroll 1
  for (int k = steps.first; k < steps.last; k++, walk.advance(c, 0, 0, 1)) {
    Step step = walk.step(c);
    if (step.inside(c, at)) sum = add(sum, product<Lane>(step.load(c, at), weight[walk.weight(c, k)], with_table(c.table)));
  }
  return sum;
}

MBM_FN void write_by_definition(const Conv2d& c, const Position& at, int group, int channel, Range steps) {
  float sum = sum_by_definition(c, at, group, channel, steps);
  c.output[at.output + c.output_of(channel)] = add(sum, c.bias_of(group, channel));
}

// ---- Tiles ---------------------------------------------------------------------------------------------------------

// The decoded operands of one step of a tile's sums. The size is 4 words more than a multiple of 16, so that threads
// store a column of 4 weights by 8 steps without bank conflicts.
template <int BM, int BN> struct Planes {
  float power[BN];
  int fraction[BN];
  int bits[BM];
  int threshold[BM];
  float correction[CORRECTED ? BM + 4 : 4];
};

template <class T> MBM_FN void load4(T* to, const T* from) {
  struct __align__(16) Four { T x[4]; };
  *reinterpret_cast<Four*>(to) = *reinterpret_cast<const Four*>(from);
}

// The addresses of the outputs of 4 consecutive pixels. The first pixel's index is a multiple of 4.
struct Outputs4 {
  long long offset[4];  // of the pixels' outputs in the group's first channel
  int count;
  bool in_line;

  MBM_MEMBER Outputs4(const Conv2d& c, int group, unsigned pixel) {
    int plane = c.plane();
    count = pixel < c.pixels ? min(4u, c.pixels - pixel) : 0;
    in_line = plane % 4 == 0;
    unsigned image = pixel / plane;
    int rest = pixel % plane;
    long long first = c.output_of(group, image);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      offset[i] = first + rest;
      if (++rest == plane) {
        rest = 0;
        first += c.output_image();
      }
    }
  }
  MBM_MEMBER void write(const Conv2d& c, int group, int channel, const float* sums) const {
    if (channel >= c.out_channels) return;
    float* output = c.output + c.output_of(channel);
    float bias = c.bias_of(group, channel);
    if (in_line) {
      if (count > 0)
        *reinterpret_cast<float4*>(output + offset[0]) = {add(sums[0], bias), add(sums[1], bias), add(sums[2], bias),
                                                          add(sums[3], bias)};
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < count) output[offset[i]] = add(sums[i], bias);
    }
  }
};

// Fetches a team's operands into registers, one slice at a time, and stores them decoded in shared memory.
template <int BM, int BN> struct Fetch {
  static constexpr int ROWS = BN / SLICE;       // rows of weights that the team fetches at a time
  static constexpr int WEIGHTS = BM / ROWS;     // weights per thread and slice
  const Conv2d& c;
  Position at;          // this thread's pixel
  int row, k;           // this thread's first weight: its row in the tile, its step in the slice
  int rows_left;        // output channels from that row on
  Walk walk;            // that weight's step in the sum
  const float* weight;  // that weight's address
  float pixel_next[SLICE], weight_next[WEIGHTS];

  MBM_MEMBER Fetch(const Conv2d& c, int group, int first_row, unsigned first_pixel, int first, int thread)
      : c(c), at(c, group, first_pixel + thread), row(thread / SLICE), k(thread % SLICE),
        rows_left(max(c.out_channels - first_row - row, 0)), walk(c, first + k),
        weight(c.weight + c.weight_of(group, first_row + row) + walk.weight(c, first + k)) {}

  // Publish the steps of the next slice to the team.
  MBM_MEMBER void announce(Step (&steps)[SLICE]) const {
    if (row == 0) steps[k] = walk.step(c);
  }

  MBM_MEMBER void fetch(const Step (&steps)[SLICE]) {
#pragma unroll
    for (int i = 0; i < SLICE; i++) pixel_next[i] = load16(steps[i]).load(c, at);
    long long row_bytes = (long long)ROWS * sizeof(float) * c.weight_row();
#pragma unroll
    for (int i = 0; i < WEIGHTS; i++)
      weight_next[i] = load_if_below(weight, i * row_bytes, i * ROWS, rows_left, walk.channel, c.channels);
    weight += SLICE - c.weight_gaps(walk.channel);
    walk.advance(c, c.slice[0], c.slice[1], c.slice[2]);
    weight += c.weight_gaps(walk.channel);
  }

  MBM_MEMBER void store(Planes<BM, BN> (&slice)[SLICE], int thread, Exponents& pixels, Exponents& weights) const {
#pragma unroll
    for (int i = 0; i < SLICE; i++) {
      pixels.add(pixel_next[i]);
      Pixel a = decode_pixel(pixel_next[i]);
      slice[i].power[thread] = a.power;
      if constexpr (!WHOLE) slice[i].fraction[thread] = a.fraction;
    }
#pragma unroll
    for (int i = 0; i < WEIGHTS; i++) {
      weights.add(weight_next[i]);
      Weight b = decode_weight(weight_next[i]);
      slice[k].bits[row + i * ROWS] = b.bits;
      if constexpr (CORRECTED || is_lookup(M) || M.form == CALL) slice[k].threshold[row + i * ROWS] = b.threshold;
      if constexpr (CORRECTED) slice[k].correction[row + i * ROWS] = b.correction;
    }
  }
};

template <int TEAM> MBM_FN void team_barrier() {
  static_assert(TEAM == 32 || TEAM == THREADS);
  if constexpr (TEAM == 32)
    __syncwarp();
  else
    __syncthreads();
}

// A thread's operands of one step: TM weights and TN pixels, in blocks of 4 spread over the tile.
template <int TM, int TN> struct Operands {
  __align__(16) float power[TN], correction[TM];
  __align__(16) int fraction[TN], bits[TM], threshold[TM];

  template <int BM, int BN> MBM_MEMBER void load(const Planes<BM, BN>& from, int row, int column) {
#pragma unroll
    for (int n = 0; n < TN; n += 4) {
      load4(power + n, &from.power[column + n * (BN / TN)]);
      load4(fraction + n, &from.fraction[column + n * (BN / TN)]);
    }
#pragma unroll
    for (int m = 0; m < TM; m += 4) {
      load4(bits + m, &from.bits[row + m * (BM / TM)]);
      load4(threshold + m, &from.threshold[row + m * (BM / TM)]);
      if constexpr (CORRECTED) load4(correction + m, &from.correction[row + m * (BM / TM)]);
    }
  }
  MBM_MEMBER void multiply(float (&sums)[TM][TN], const BlockTable& table) const {
#pragma unroll
    for (int m = 0; m < TM; m++)
#pragma unroll
      for (int n = 0; n < TN; n++)
        sums[m][n] = accumulate(sums[m][n], {power[n], fraction[n]}, {bits[m], threshold[m], correction[m]}, table);
  }
};

template <int BM, int BN, int TM, int TN> MBM_FN void conv2d_tiled(const Conv2d& c) {
  constexpr int TEAM = BN, TEAMS = THREADS / TEAM;
  static_assert(BM / TM * (BN / TN) == TEAM, "TM by TN outputs for each thread of the team");
  __shared__ __align__(16) Planes<BM, BN> slices[TEAMS][2][SLICE];
  __shared__ Step steps[TEAMS][2][SLICE];
  BlockTable table(c.table);
  static_assert(TEAMS == 1 || sizeof(slices) >= TEAMS * BM * BN * sizeof(float), "the partial sums need the room");

  // Consecutive blocks share pixels.
  unsigned row_tiles = (c.out_channels + BM - 1) / BM, column_tile = blockIdx.x / row_tiles;
  int first_row = blockIdx.x % row_tiles * BM;
  int group = column_tile % unsigned(c.groups);
  unsigned first_pixel = column_tile / unsigned(c.groups) * BN;

  int team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM;
  int begin = FREE ? blockIdx.y * c.part_slices : 0, end = FREE ? min(begin + c.part_slices, c.slices()) : c.slices();
  int first = begin + team * (end - begin) / TEAMS, last = begin + (team + 1) * (end - begin) / TEAMS;
  Fetch<BM, BN> next(c, group, first_row, first_pixel, first * SLICE, thread);

  // A warp is 4 rows by 8 columns of threads. With a table in shared memory it is one row, if the tile is wide enough.
  constexpr int WARP_WIDTH = SHARED_TABLE && BN / TN >= 32 ? 32 : 8, WARP_COLUMNS = BN / TN / WARP_WIDTH;
  int warp = thread / 32, lane = thread % 32;
  int row = 4 * (warp / WARP_COLUMNS * (32 / WARP_WIDTH) + lane / WARP_WIDTH);
  int column = 4 * (warp % WARP_COLUMNS * WARP_WIDTH + lane % WARP_WIDTH);

  float sums[TM][TN] = {};
  Exponents exponents[2];
  Exponents &pixels = exponents[0], &weights = exponents[1];
  next.announce(steps[team][first % 2]);
  team_barrier<TEAM>();
  next.fetch(steps[team][first % 2]);
  for (int s = first; s < last; s++) {
    next.store(slices[team][s % 2], thread, pixels, weights);
    next.announce(steps[team][(s + 1) % 2]);
    team_barrier<TEAM>();
    if (s + 1 < last) next.fetch(steps[team][(s + 1) % 2]);
    // Unrolling further would spill registers.
#pragma unroll(M.form == LOOKUP_WIDE || M.form == CALL ? 1 : TM * TN > 32 ? 2 : TM * TN > 16 ? 8 : 4)
    for (int k = 0; k < SLICE; k++) {
      Operands<TM, TN> operands;
      operands.load(slices[team][s % 2][k], row, column);
      operands.multiply(sums, table);
    }
  }

  combine(exponents);
  if (!in_range(pixels, weights)) {
    for (int i = threadIdx.x; i < BM * BN; i += THREADS) {
      int channel = first_row + i / BN;
      unsigned pixel = first_pixel + i % BN;
      if (channel < c.out_channels && pixel < c.pixels)
        write_by_definition(c, Position(c, group, pixel), group, channel,
                            {begin * SLICE, min(end * SLICE, c.sum_length())});
    }
    return;
  }

  if constexpr (TEAMS == 1) {
#pragma unroll
    for (int n = 0; n < TN; n += 4) {
      Outputs4 outputs(c, group, first_pixel + column + n * (BN / TN));
#pragma unroll
      for (int m = 0; m < TM; m++)
        outputs.write(c, group, first_row + row + m / 4 * 4 * (BM / TM) + m % 4, &sums[m][n]);
    }
  } else {
    float(&partial)[TEAMS][BM][BN] = reinterpret_cast<float(&)[TEAMS][BM][BN]>(slices);
    __syncthreads();  // all slices have been read, so their memory can be reused
#pragma unroll
    for (int m = 0; m < TM; m++)
#pragma unroll
      for (int n = 0; n < TN; n += 4)
        load4(&partial[team][row + m / 4 * 4 * (BM / TM) + m % 4][column + n * (BN / TN)], &sums[m][n]);
    __syncthreads();
    for (int i = 4 * threadIdx.x; i < BM * BN; i += 4 * THREADS) {
      __align__(16) float sum[4];
      load4(sum, &partial[0][i / BN][i % BN]);
#pragma unroll
      for (int t = 1; t < TEAMS; t++) {
        __align__(16) float more[4];
        load4(more, &partial[t][i / BN][i % BN]);
#pragma unroll
        for (int n = 0; n < 4; n++) sum[n] = add(sum[n], more[n]);
      }
      Outputs4(c, group, first_pixel + i % BN).write(c, group, first_row + i / BN, sum);
    }
  }
}

// ---- Few output channels -------------------------------------------------------------------------------------------

template <int CHANNELS, int PIXELS> MBM_FN void conv2d_direct(const Conv2d& c) {
  constexpr int STEPS = CHANNELS == 1 ? 512 : 1024 / CHANNELS;  // steps of a sum held in shared memory at a time
  __shared__ Weight decoded[STEPS][CHANNELS];
  __shared__ Step steps[STEPS];
  BlockTable table(c.table);
  int group = blockIdx.x % unsigned(c.groups);
  unsigned pixel = blockIdx.x / unsigned(c.groups) * THREADS * PIXELS + threadIdx.x;
  Position at[PIXELS];
#pragma unroll
  for (int p = 0; p < PIXELS; p++) at[p] = Position(c, group, pixel + p * THREADS);
  int length = c.sum_length();

  float sums[PIXELS][CHANNELS] = {};
  Exponents pixels[PIXELS], weights[1];
  for (int first = 0; first < length; first += STEPS) {
    int count = min(STEPS, length - first);
    __syncthreads();  // the previous steps have been read
    for (int k = threadIdx.x; k < count; k += THREADS) steps[k] = Walk(c, first + k).step(c);
    for (int i = threadIdx.x; i < count * CHANNELS; i += THREADS) {
      int k = i / CHANNELS, m = i % CHANNELS;
      long long offset = c.weight_of(group, m) + (FREE ? Walk(c, first + k).weight(c, first + k) : first + k);
      float b = m < c.out_channels ? c.weight[offset] : 0.0f;
      weights[0].add(b);
      decoded[k][m] = decode_weight(b);
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < count; k++) {
      Step step = load16(steps[k]);
      Pixel a[PIXELS];
#pragma unroll
      for (int p = 0; p < PIXELS; p++) {
        float x = step.load(c, at[p]);
        pixels[p].add(x);
        a[p] = decode_pixel(x);
      }
#pragma unroll
      for (int m = 0; m < CHANNELS; m++) {
        Weight b = load16(decoded[k][m]);
#pragma unroll
        for (int p = 0; p < PIXELS; p++) sums[p][m] = accumulate(sums[p][m], a[p], b, table);
      }
    }
  }

  combine(weights);
#pragma unroll
  for (int p = 0; p < PIXELS; p++) {
    if (pixel + p * THREADS >= c.pixels) break;
    if (in_range(pixels[p], weights[0])) {
      float* output = c.output + at[p].output;
#pragma unroll
      for (int m = 0; m < CHANNELS; m++)
        if (m < c.out_channels)
          output[c.output_of(m)] = add(sums[p][m], c.bias_of(group, m));
    } else {
#pragma unroll 1
      for (int m = 0; m < c.out_channels; m++) write_by_definition(c, at[p], group, m, {0, length});
    }
  }
}

// Outputs per thread in the largest tile. With a table in shared memory, TM = 16 makes a warp one row of threads.
constexpr int TM = SHARED_TABLE ? 16 : 8, TN = 64 / TM;

}  // namespace mbm

// ---- Entry points --------------------------------------------------------------------------------------------------

#define KERNEL(NAME, BLOCKS, ...)                                                                                 \
  extern "C" __global__ void __launch_bounds__(mbm::THREADS, BLOCKS) NAME(const __grid_constant__ mbm::Conv2d c) { \
    if constexpr (wanted(#NAME)) mbm::__VA_ARGS__(c);                                                             \
  }

KERNEL(conv2d_64x128, mbm::M.form == mbm::LOOKUP_WIDE ? 2 : 3, conv2d_tiled<64, 128, mbm::TM, mbm::TN>)
KERNEL(conv2d_32x128, 4, conv2d_tiled<32, 128, 8, 4>)
KERNEL(conv2d_16x32, 4, conv2d_tiled<16, 32, 4, 4>)
KERNEL(conv2d_direct_1x4, 4, conv2d_direct<1, 4>)
KERNEL(conv2d_direct_4x2, 4, conv2d_direct<4, 2>)
KERNEL(conv2d_direct_6x1, 4, conv2d_direct<6, 1>)
KERNEL(conv2d_direct_6x2, 4, conv2d_direct<6, 2>)
KERNEL(conv2d_direct_8x2, 4, conv2d_direct<8, 2>)

extern "C" __global__ void multiply(const float* a, const float* b, float* output, const mbm::TableEntry* table,
                                    long long count) {
  if (!wanted("multiply")) return;
  mbm::Multiplier m = mbm::with_table(table);
  long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
    output[i] = mbm::product<mbm::Lane>(a[i], b[i], m);
}

// Compute the products of a 64 x 128 tile's threads and nothing else. This is the ceiling that the kernels are measured
// against. Only some rounds reload the operands. The compiler cannot know which ones, so it cannot merge the others.
extern "C" __global__ void __launch_bounds__(mbm::THREADS, 3)
    ceiling(const float* numbers, float* output, const mbm::TableEntry* table, int rounds, int mask) {
  if (!wanted("ceiling")) return;
  using namespace mbm;
  __shared__ __align__(16) Planes<64, 128> slice[SLICE];
  for (int k = 0; k < SLICE; k++) {
    Pixel a = decode_pixel(numbers[k * THREADS + threadIdx.x]);
    slice[k].power[threadIdx.x] = a.power;
    slice[k].fraction[threadIdx.x] = a.fraction;
    Weight b = decode_weight(numbers[(SLICE + k) * THREADS + threadIdx.x]);
    int row = threadIdx.x % 64;
    slice[k].bits[row] = b.bits;
    slice[k].threshold[row] = b.threshold;
    if (CORRECTED) slice[k].correction[row] = b.correction;
  }
  BlockTable block_table(table);
  __syncthreads();
  constexpr int WIDTH = 128 / TN;
  int slice_of_thread = SHARED_TABLE ? 0 : threadIdx.x % SLICE;  // with a table, a warp shares weights as in the tile
  float sums[TM][TN] = {};
  Operands<TM, TN> operands;
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
    if ((round & mask) == 0) operands.load(slice[slice_of_thread], threadIdx.x / WIDTH * 4, threadIdx.x % WIDTH * 4);
    operands.multiply(sums, block_table);
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < TM * TN; i++) total = add(total, sums[i / TN][i % TN]);
  output[blockIdx.x * THREADS + threadIdx.x] = total;
}
