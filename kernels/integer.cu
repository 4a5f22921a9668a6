// The CUDA kernels of integer multipliers that are given as a table: an output is the sum of T[a, b] over the channels
// and kernel elements under it. a is the 8-bit code of the input element, or the padding's code outside the image; b
// is that of the weight. NVRTC compiles this file once; the table is an argument.
//
// Shared memory serves 32 banks of 4 bytes at a time, a wavefront; lanes of a warp that look up different words of one
// bank take several. All kernels but gather therefore fix a step of the sum and some output channels, whose weights
// are then known, and build what each code a selects: a vector of the channels' entries. A look-up yields several
// products.
//
// rows serves many channels and pixels.
//   Mapping: a block of 12 warps computes 64 channels by 768 pixels, a warp all channels of 64 pixels. Row a holds the
//     64 entries of 16 bits. A quarter of a warp reads one pixel's row, 16 bytes a lane, so that any codes are free of
//     bank conflicts; a thread has 8 channels by 16 pixels in registers. While one step's rows are read, the next
//     step's are built, out of the L1 cache. There is one barrier a step.
//   Cost of 64 products: 1 wavefront to read, 2/3 to build, and 2.5 instructions of a warp (a load and an address for
//     4 pixels; two for each word, see Sums). That is at most 38 products a clock and multiprocessor.
//   Limit: 74 % of the wavefronts that shared memory and L1 can serve, and 59 % of the issue slots. On an H100, 64 ->
//     64 3x3 56x56 b64 takes 1.25 ms and 64 -> 128 3x3 14x14 b256 0.62 ms: 5.9 TMAC/s each, whatever the codes.
//   Tried: a copy of the table in shared memory as well, 6.25 TMAC/s, but it fits few cards; one buffer and two
//     barriers a step, 5.4; DP2A for the upper half of a word, 5.5 instead of 5.6; unrolled building, 5 % faster with
//     one buffer and 3 % slower with two. Rows of 32 bits hold 32 channels, 2.0 TMAC/s.
//
// columns serves few channels, or few pixels.
//   Mapping: a block computes 2, 4 or 8 channels by up to 1024 pixels, a thread one pixel. It builds as many steps as
//     fit, reads them, and builds the next. With few pixels, parts of the steps go to several threads, whose sums are
//     added in a fixed order. A code selects one vector, so lanes conflict: a look-up by random codes takes 3.5, 6.3
//     and 10.6 wavefronts for 2, 4 and 8 channels, and building 9 a channel.
//   Limit: wavefronts and instructions in large layers (16 -> 16 3x3 32x32 b128 takes 91 us, 3.3 TMAC/s), latencies in
//     small ones: LeNet's convolutions at b64 take 7.4 to 7.8 us (1 -> 6) and 10.6 to 11.1 (6 -> 16) in a graph.
//   Tried: 3 pairs of channels in vectors of their own and two buffers, whose rows were fetched during the look-ups:
//     6.2 and 13.5 us; divisions by variables and bounds that are tested without padding, too: 7.5 and 14.9 us.
//
// gather serves dense layers and convolutions of so few pixels that building does not pay.
//   Mapping: a block computes 2 channels by 32 pixels. A lane is a pixel; the warps divide the steps among themselves,
//     and their sums are added in a fixed order. Entries are read through the L1 cache, from one line of 512 bytes.
//   Limit: latencies. LeNet's dense layers at b64 take 7.1 to 7.5, 4.1 to 4.5 and 3.9 to 4.3 us in a CUDA graph.
//   Tried: 1 channel, 10.4 us instead of 7.5; unrolling further, no change.
//
// Sums are integers modulo 2^32, so all kernels return the same. No kernel uses atomics.
#include "entry.cuh"
#include "implicit_gemm.cuh"

namespace integer {

typedef unsigned char Code;

constexpr int CODES = 256;

// The kernels' argument. backends/cuda_integers.py mirrors its layout. Strides are in elements; weight and output are
// contiguous. Channels are counted per group.
struct Conv2d {
  const Code *input, *weight;
  int* output;         // sums, or the bits of scaled sums
  const uint4* table;  // a line for each b: words of two entries, for a and a + 128, less the least; or 32-bit entries
  const float *scale, *bias;  // of each output channel, or null
  int image_stride, group_stride, channel_stride, row_stride, column_stride;
  int channels, out_channels, groups;
  int size[2], kernel[2], out_size[2], stride[2], padding[2], dilation[2];
  unsigned pixels;  // batch * out_size[0] * out_size[1]
  unsigned offset;  // of a whole sum, modulo 2^32
  unsigned padding_code;
  int buffer;                                           // steps that a block of columns holds in shared memory
  Divisor plane, width, kernel_elements, kernel_width;  // plane and width are the output's
  int padded;                                           // whether some elements lie outside the image
  int in_words;  // whether this is a dense layer whose operands can be read as words of four codes

  DEVICE int sum_length() const { return channels * kernel_elements.size; }
  // Return where the weights of an output channel lie. Past the last channel, it is the last one once more.
  DEVICE int weight_row(int group, int channel) const {
    return (group * out_channels + min(channel, out_channels - 1)) * sum_length();
  }
};

// ---- Operands and outputs ------------------------------------------------------------------------------------------

// A step of a sum, as a channel and a kernel element. The order of steps is that of the weights in memory.
struct Walk {
  int channel, row, column;

  DEVICE Walk(const Conv2d& c, unsigned step) {
    channel = c.kernel_elements.divide(step);
    unsigned element = step - channel * c.kernel_elements.size;
    row = c.kernel_width.divide(element);
    column = element - row * c.kernel[1];
  }
  DEVICE void advance(const Conv2d& c) {
    if (++column < c.kernel[1]) return;
    column = 0;
    if (++row < c.kernel[0]) return;
    row = 0;
    channel++;
  }
};

// The displacement of a step's input element from a position's origin.
struct __align__(16) Step {
  int offset, down, right;

  Step() = default;
  DEVICE Step(const Conv2d& c, const Walk& walk) : down(walk.row * c.dilation[0]), right(walk.column * c.dilation[1]) {
    offset = walk.channel * c.channel_stride + down * c.row_stride + right * c.column_stride;
  }
};

// An output position. Past the last pixel, it is the last one once more.
struct Position {
  int origin;       // offset of the input element under the kernel's first element, possibly in the padding
  int row, column;  // of that input element

  Position() = default;
  DEVICE Position(const Conv2d& c, int group, unsigned pixel) {
    pixel = min(pixel, c.pixels - 1);
    unsigned image = c.plane.divide(pixel), rest = pixel - image * c.plane.size, line = c.width.divide(rest);
    row = int(line) * c.stride[0] - c.padding[0];
    column = int(rest - line * c.width.size) * c.stride[1] - c.padding[1];
    origin = image * c.image_stride + group * c.group_stride + row * c.row_stride + column * c.column_stride;
  }

  DEVICE unsigned code_inside(const Conv2d& c, const Step& step) const { return c.input[origin + step.offset]; }

  // Return a step's code. This is PTX because the compiler would not emit predicated loads for a series of these.
  DEVICE unsigned code(const Conv2d& c, const Step& step) const {
    unsigned code;
    asm volatile(
        "{\n\t.reg .pred inside;\n\t.reg .s64 address;\n\t"
        "setp.lt.u32 inside, %3, %4;\n\tsetp.lt.and.u32 inside, %5, %6, inside;\n\tcvt.s64.s32 address, %2;\n\t"
        "add.s64 address, address, %1;\n\tmov.u32 %0, %7;\n\t@inside ld.global.nc.u8 %0, [address];\n\t}"
        : "=r"(code)
        : "l"(c.input), "r"(origin + step.offset), "r"(row + step.down), "r"(c.size[0]), "r"(column + step.right),
          "r"(c.size[1]), "r"(c.padding_code));
    return code;
  }
};

// Return what is written of a sum: the sum, or the bits of the scaled sum. These round to nearest and are not fused.
DEVICE int finished(const Conv2d& c, int channel, unsigned sum) {
  int value = int(sum + c.offset);
  if (!c.scale) return value;
  float scaled = __fmul_rn(__int2float_rn(value), c.scale[channel]);
  return __float_as_int(c.bias ? __fadd_rn(scaled, c.bias[channel]) : scaled);
}

// Where the outputs of a pixel lie.
struct Output {
  int* first;  // in the group's first channel; null past the last pixel
  int group;

  DEVICE Output(const Conv2d& c, int group, unsigned pixel) : first(nullptr), group(group) {
    unsigned image = c.plane.divide(pixel), rest = pixel - image * c.plane.size;
    if (pixel < c.pixels)
      first = c.output + ((long long)image * c.groups + group) * c.out_channels * c.plane.size + rest;
  }
  DEVICE void write(const Conv2d& c, int channel, unsigned sum) const {
    if (first && channel < c.out_channels)
      first[(long long)channel * c.plane.size] = finished(c, group * c.out_channels + channel, sum);
  }
};

// The sums of a word's channels: two of 16 bits, or one of 32. The sum of whole words holds, modulo 2^32, that of the
// lower halves and 2^16 times that of the upper ones.
template <bool WIDE> struct Sums {
  unsigned words = 0, upper = 0;

  DEVICE void add(unsigned word) {
    words += word;
    if constexpr (!WIDE) upper += word >> 16;  // one instruction, LEA.HI
  }
  DEVICE unsigned operator[](int half) const { return half == 1 ? upper : words - (upper << 16); }
};

// Consecutive words, loaded and stored by one instruction.
template <int WORDS> struct __align__(4 * WORDS) Vector { unsigned word[WORDS]; };

// Build the 16 bytes that codes from `a` on select; with entries of 16 bits, also those from a + 128 on. A code selects
// the entries for some channels' weights, which are given as bytes from the table's beginning to their lines.
template <int WORDS, bool WIDE>
DEVICE void build(uint4* built, int pitch, const Conv2d& c, const unsigned* lines, int a) {
  constexpr int CHANNELS = WIDE ? WORDS : 2 * WORDS, AT_ONCE = 4 / WORDS;  // codes
  Vector<AT_ONCE> entries[CHANNELS];
#pragma unroll
  for (int i = 0; i < CHANNELS; i++)
    entries[i] = *reinterpret_cast<const Vector<AT_ONCE>*>(reinterpret_cast<const char*>(c.table) + (lines[i] + 4 * a));
  Vector<4> first, second;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int m = i % WORDS, code = i / WORDS;
    if constexpr (WIDE) {
      first.word[i] = entries[m].word[code];
    } else {
      first.word[i] = __byte_perm(entries[2 * m].word[code], entries[2 * m + 1].word[code], 0x5410);
      second.word[i] = __byte_perm(entries[2 * m].word[code], entries[2 * m + 1].word[code], 0x7632);
    }
  }
  Vector<4>* at = reinterpret_cast<Vector<4>*>(built + a / AT_ONCE * pitch);
  *at = first;
  if constexpr (!WIDE) at[CODES / 2 / AT_ONCE * pitch] = second;
}

extern __shared__ uint4 memory[];

// ---- Rows: many channels and pixels --------------------------------------------------------------------------------

constexpr int WARPS = 12, OF_QUARTER = 16, OF_WARP = 4 * OF_QUARTER;  // of a block; pixels of a quarter of a warp
constexpr int CHUNKS = 8;              // of 16 bytes in a row, for as many lanes
constexpr int PITCH = CHUNKS + 1;      // chunks between two rows, so that lanes write them without conflicts
constexpr int LOOKUP = CODES * PITCH;  // chunks of all rows

template <bool WIDE, int BUFFERS> DEVICE void rows(const Conv2d& c) {
  constexpr int OF_WORD = WIDE ? 1 : 2, CHANNELS = CHUNKS * 4 * OF_WORD;
  constexpr unsigned WORDS = CODES / OF_WORD, LINE = 4 * WORDS;  // of a line of the table; bytes
  __shared__ __align__(16) Code codes[WARPS][OF_WARP];
  __shared__ __align__(16) unsigned lines[2][CHANNELS];

  int first_channel = blockIdx.y * CHANNELS, group = blockIdx.z;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = c.sum_length();
  unsigned first_pixel = (blockIdx.x * WARPS + warp) * OF_WARP;

  // A thread fetches the codes of two pixels, and the first threads that of a channel's weight.
  Position at[2] = {{c, group, first_pixel + lane}, {c, group, first_pixel + lane + 32}};
  Walk walk(c, 0);
  Step step(c, walk);
  codes[warp][lane] = at[0].code(c, step);
  codes[warp][lane + 32] = at[1].code(c, step);
  bool fetches_weights = threadIdx.x < CHANNELS;
  int weight = c.weight_row(group, first_channel + threadIdx.x);
  if (fetches_weights) {
    lines[0][threadIdx.x] = c.weight[weight] * LINE;
    lines[1][threadIdx.x] = c.weight[weight + min(1, length - 1)] * LINE;
  }
  // Build the rows of a step: row a holds the entries of the block's channels. A warp builds a chunk of 32 or 64 rows.
  auto build_rows = [&](int k) {
#pragma unroll 1
    for (int task = warp; task < CHUNKS * WORDS / 32; task += WARPS) {
      int chunk = task / (WORDS / 32), a = task % (WORDS / 32) * 32 + lane;
      build<4, WIDE>(memory + k % BUFFERS * LOOKUP + chunk, PITCH, c, &lines[k % 2][chunk * 4 * OF_WORD], a);
    }
  };
  __syncthreads();
  build_rows(0);
  __syncthreads();

  Sums<WIDE> sums[OF_QUARTER][4];
#pragma unroll 1
  for (int k = 0; k < length; k++) {
    walk.advance(c);
    step = Step(c, walk);
    unsigned next[2], next_weight = 0;
    bool more = k + 1 < length;
    if (more) {
      if constexpr (BUFFERS == 2) build_rows(k + 1);
#pragma unroll
      for (int i = 0; i < 2; i++) next[i] = at[i].code(c, step);
      if (fetches_weights) next_weight = c.weight[weight + min(k + 2, length - 1)];
    }
    uint4 now = reinterpret_cast<const uint4*>(codes)[threadIdx.x / CHUNKS];
    unsigned base = (k % BUFFERS * LOOKUP + lane % CHUNKS) * sizeof(uint4);
#pragma unroll
    for (int i = 0; i < OF_QUARTER; i++) {
      // The product of a code and the pitch in bytes: of four codes, the others are multiplied by zero.
      unsigned four = i < 4 ? now.x : i < 8 ? now.y : i < 12 ? now.z : now.w, offset;
      asm("dp4a.u32.u32 %0, %1, %2, %3;"
          : "=r"(offset)
          : "r"(four), "r"(int(PITCH * sizeof(uint4)) << i % 4 * 8), "r"(base));
      uint4 row = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(memory) + offset);
      sums[i][0].add(row.x);
      sums[i][1].add(row.y);
      sums[i][2].add(row.z);
      sums[i][3].add(row.w);
    }
    __syncwarp();
    if (more) {
#pragma unroll
      for (int i = 0; i < 2; i++) codes[warp][lane + 32 * i] = next[i];
      if (fetches_weights) lines[k % 2][threadIdx.x] = next_weight * LINE;
    }
    __syncthreads();
    if constexpr (BUFFERS == 1) {
      if (more) build_rows(k + 1);
      __syncthreads();
    }
  }

  // Write through shared memory, so that the lanes of a warp are pixels. The pitch keeps it free of bank conflicts.
  constexpr int OUT_PITCH = OF_WARP + 4;
  static_assert(WARPS * CHUNKS * OUT_PITCH <= LOOKUP * 4, "the sums of a channel of each chunk need the room");
  unsigned* sums_of_warp = reinterpret_cast<unsigned*>(memory) + warp * CHUNKS * OUT_PITCH;
  Output outputs[2] = {{c, group, first_pixel + lane}, {c, group, first_pixel + lane + 32}};
#pragma unroll
  for (int m = 0; m < 4 * OF_WORD; m++) {
#pragma unroll
    for (int i = 0; i < OF_QUARTER; i++)
      sums_of_warp[lane % CHUNKS * OUT_PITCH + lane / CHUNKS * OF_QUARTER + i] = sums[i][m / OF_WORD][m % OF_WORD];
    __syncwarp();
#pragma unroll 1
    for (int chunk = 0; chunk < CHUNKS; chunk++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        outputs[i].write(c, first_channel + chunk * 4 * OF_WORD + m, sums_of_warp[chunk * OUT_PITCH + lane + 32 * i]);
    __syncwarp();
  }
}

// ---- Columns: few channels -----------------------------------------------------------------------------------------

// Blocks of blockDim.x pixels, by blockDim.y parts of the steps.
template <int WORDS, bool WIDE> DEVICE void columns(const Conv2d& c) {
  constexpr int OF_WORD = WIDE ? 1 : 2, CHANNELS = WORDS * OF_WORD, LINE = 4 * CODES / OF_WORD;
  int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y, length = c.sum_length();
  Vector<WORDS>* built = reinterpret_cast<Vector<WORDS>*>(memory);  // of each step, one for each code
  Step* steps = reinterpret_cast<Step*>(built + c.buffer * CODES);
  unsigned* lines = reinterpret_cast<unsigned*>(steps + c.buffer);

  int first_channel = blockIdx.y * CHANNELS, group = blockIdx.z;
  unsigned pixel = blockIdx.x * blockDim.x + threadIdx.x;
  Position at(c, group, pixel);

  Sums<WIDE> sums[WORDS];
#pragma unroll 1
  for (int first = 0; first < length; first += c.buffer) {
    int count = min(c.buffer, length - first);
    for (int s = thread; s < count; s += threads) {
      steps[s] = Step(c, Walk(c, first + s));
#pragma unroll
      for (int i = 0; i < CHANNELS; i++)
        lines[s * CHANNELS + i] = c.weight[c.weight_row(group, first_channel + i) + first + s] * LINE;
    }
    __syncthreads();
    constexpr int TASKS = LINE / 4 * WORDS / 4;  // of a step
#pragma unroll 2
    for (int i = thread; i < count * TASKS; i += threads)
      build<WORDS, WIDE>(memory + i / TASKS * (CODES * WORDS / 4), 1, c, lines + i / TASKS * CHANNELS,
                         i % TASKS * (4 / WORDS));
    __syncthreads();
    int begin = count * threadIdx.y / blockDim.y, end = count * (threadIdx.y + 1) / blockDim.y;
    auto look_up = [&](auto code) {
#pragma unroll 4
      for (int s = begin; s < end; s++) {
        int4 step = reinterpret_cast<const int4&>(steps[s]);
        Vector<WORDS> words = built[s * CODES + code(reinterpret_cast<const Step&>(step))];
#pragma unroll
        for (int m = 0; m < WORDS; m++) sums[m].add(words.word[m]);
      }
    };
    if (c.padded)
      look_up([&](const Step& step) { return at.code(c, step); });
    else
      look_up([&](const Step& step) { return at.code_inside(c, step); });
    __syncthreads();
  }

  Output output(c, group, pixel);
  unsigned* partial = reinterpret_cast<unsigned*>(memory);
#pragma unroll
  for (int m = 0; m < CHANNELS; m++) {
    unsigned sum = sums[m / OF_WORD][m % OF_WORD];
    if (blockDim.y > 1) {
      partial[thread] = sum;
      __syncthreads();
      for (int part = 1; part < blockDim.y; part++) sum += partial[part * blockDim.x + threadIdx.x];
      __syncthreads();
    }
    if (threadIdx.y == 0) output.write(c, first_channel + m, sum);
  }
}

// ---- Gather: few pixels --------------------------------------------------------------------------------------------

constexpr int GATHERED = 2, MOST_PARTS = 32;  // output channels of a thread; warps of a block

template <bool WIDE> DEVICE void gather(const Conv2d& c) {
  __shared__ unsigned partial[MOST_PARTS][GATHERED][32];
  int first_channel = blockIdx.y * GATHERED, group = blockIdx.z;
  int part = threadIdx.x / 32, lane = threadIdx.x % 32, parts = blockDim.x / 32, length = c.sum_length();
  unsigned pixel = blockIdx.x * 32 + lane;
  int fours = (length + 3) / 4, begin = fours * part / parts * 4, end = min(fours * (part + 1) / parts * 4, length);

  Position at(c, group, pixel);
  Walk walk(c, begin);
  int weight[GATHERED];
#pragma unroll
  for (int m = 0; m < GATHERED; m++) weight[m] = c.weight_row(group, first_channel + m);
  unsigned sums[GATHERED] = {};
#pragma unroll 2
  for (int k = begin; k < end; k += 4) {
    unsigned a4 = 0, b4[GATHERED] = {};
    if (c.in_words) {
      a4 = *reinterpret_cast<const unsigned*>(c.input + at.origin + k);
#pragma unroll
      for (int m = 0; m < GATHERED; m++) b4[m] = *reinterpret_cast<const unsigned*>(c.weight + weight[m] + k);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (k + i >= end) break;
        a4 |= at.code(c, Step(c, walk)) << 8 * i;
#pragma unroll
        for (int m = 0; m < GATHERED; m++) b4[m] |= c.weight[weight[m] + k + i] << 8 * i;
        walk.advance(c);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (k + i >= end) break;
      unsigned a = a4 >> 8 * i & 255;
#pragma unroll
      for (int m = 0; m < GATHERED; m++) {
        unsigned row = (b4[m] >> 8 * i & 255) * CODES;
        sums[m] += WIDE ? reinterpret_cast<const unsigned*>(c.table)[row + a]
                        : reinterpret_cast<const unsigned short*>(c.table)[row + (a << 1 & 255 | a >> 7)];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < GATHERED; m++) partial[part][m][lane] = sums[m];
  __syncthreads();
  for (int m = part; m < GATHERED; m += parts) {
    unsigned sum = 0;
    for (int p = 0; p < parts; p++) sum += partial[p][m][lane];
    Output(c, group, pixel).write(c, first_channel + m, sum);
  }
}

}  // namespace integer

// ---- Entry points --------------------------------------------------------------------------------------------------

#define KERNEL(NAME, THREADS, BLOCKS, ...)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ integer::Conv2d c) { \
    if constexpr (wanted(#NAME)) integer::__VA_ARGS__(c);                                                          \
  }

KERNEL(rows, 32 * integer::WARPS, 1, rows<false, 2>)
KERNEL(rows_unbuffered, 32 * integer::WARPS, 1, rows<false, 1>)
KERNEL(rows_wide, 32 * integer::WARPS, 1, rows<true, 2>)
KERNEL(rows_wide_unbuffered, 32 * integer::WARPS, 1, rows<true, 1>)
KERNEL(columns_2, 1024, 1, columns<1, false>)
KERNEL(columns_4, 1024, 1, columns<2, false>)
KERNEL(columns_8, 1024, 1, columns<4, false>)
KERNEL(columns_wide_1, 1024, 1, columns<1, true>)
KERNEL(columns_wide_4, 1024, 1, columns<4, true>)
KERNEL(gather, 32 * integer::MOST_PARTS, 1, gather<false>)
KERNEL(gather_wide, 32 * integer::MOST_PARTS, 1, gather<true>)
