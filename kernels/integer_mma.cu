// The CUDA kernels of integer multipliers whose table has few terms: T[a, b] = sum over r of u[a, r] v[r, b] + f[a] +
// g[b], with u and v of 8 bits (see multipliers/factor.py). A layer is then a matrix product of codes that were looked
// up in u and v, as long as the sum times the terms, on int8 matrix units, plus sums of f and of g. NVRTC compiles this
// file once, for compute capability 8.0 and up; the terms are arguments.
//
// expand turns the codes of an operand into factors.
//   Mapping: a position is a pixel of the input, or a kernel element of an output channel. A block of 8 warps expands
//     128 positions by up to 64 channels at a time. A lane has 4 positions, a warp 2 blocks of 4 channels. It looks
//     up words of 4 terms in shared memory, transposes those of 4 channels to words of one term, and writes them to a
//     tile, which the block copies out. A position's words lie together: for each 4 terms, for each block of 4
//     channels, a word a term. Zeros fill it up to whole chunks of 16 bytes. Behind the input's last position is one of
//     padding. f and g are summed over the channels on the way.
//   Cost of 4 products' factors: a look-up a channel (3.5 wavefronts of a warp if codes are random), 8 byte
//     permutations for 4 of them, a store to shared memory for each term.
//   Limit: memory from 4 terms on (on an H100, 64 channels of 56x56 b64 take 28 us with 4 terms, 2.3 TB/s, and 15 us
//     with 1), otherwise look-ups and latencies.
//   Tried: 32 positions a block, bytes loaded one at a time, 45 us; the same with loads that do not wait for each
//     other, 38; 4 positions a lane in words, 24; packed codes and whole chunks copied out, 15. Quantising the input
//     here, 2 to 25 % slower than a kernel of its own: the divisions take registers, and so blocks, from the look-ups.
//
// layer multiplies.
//   Mapping: an implicit matrix product of output channels by pixels, over kernel rows, slabs of a position's chunks,
//     and kernel columns. A block of 4 warps computes 64 by 128 (64 by 64 and 32 by 128 for small layers) in steps of
//     64 bytes. A warp has 32 channels by 64 pixels: mma.sync.m16n8k32, fed by ldmatrix without bank conflicts.
//     cp.async fetches 2 steps ahead; elements outside the image come from the padding's position.
//   Cost of a step (64 x 128 x 64 products): 288 wavefronts of shared memory to write and to read operands, and 206
//     clocks of the matrix units as mma.sync drives them. 380 clocks were measured.
//   Limit: shared memory's wavefronts, in large layers 240 to 290 T int8 products a second on an H100; with one term,
//     the memory that takes the output as well. docs/integers.md has the times of layers.
//   Tried, with 5 terms: copies past the L1 cache, half as fast at 14x14, as all blocks read the padding's position
//     from one part of the L2 cache, and 12 % slower at 56x56; there, steps in the order of memory, another 5 %; 128 by
//     128 and 64 by 256 with 64 by 64 a warp, 3 % faster at best and up to 28 % slower; 4 stages, which leave less L1
//     cache, 2 to 4 % slower, and 2 stages, 6 %; steps of 128 bytes, 5 to 27 %; 4 blocks a multiprocessor, 1 to 14 %.
//
// Sums are integers modulo 2^32, so that they do not depend on the order. No kernel uses atomics.
#include "entry.cuh"
#include "implicit_gemm.cuh"

namespace terms {

extern __shared__ uint4 memory[];

// ---- Expansion -----------------------------------------------------------------------------------------------------

constexpr int EXPANDERS = 256, WARPS = EXPANDERS / 32, POSITIONS = 128;  // threads, warps and positions of a block
constexpr int BLOCKS = 16, OF_THREAD = BLOCKS / WARPS;                   // of four channels
constexpr int CODES = 256, COPIERS = 4;                                  // threads that copy a row together

// An operand to expand; backends/cuda_terms.py mirrors the layout. Strides are in elements.
struct Operand {
  const unsigned char* codes;
  unsigned* expanded;       // for each position, `words`
  int* sums;                // for each segment and position, of the constants over its channels; or null
  const unsigned* factors;  // for four terms each, words by code
  const int* constants;     // by code
  long long image_stride, group_stride, row_stride, column_stride;
  int channel_stride;
  int channels, terms, words;
  int in_words;           // 1 where four positions lie in a word, 2 where four channels do, or 0
  unsigned count, total;  // positions of the operand, and with the one of padding
  unsigned padding_code;
  Divisor batch, plane, width, segments;
};

// What a thread looks up: for each of its blocks of four channels, and for each of those, a word of four positions'
// codes. Where four channels lie in a word, IN_WORDS == 2, channels and positions change places.
template <int IN_WORDS> struct Codes {
  unsigned words[OF_THREAD][4];

  // Load the codes of a segment's channels, at the positions from `first` on.
  DEVICE Codes(const Operand& o, unsigned first, int segment) {
    const unsigned char* origin[4];
#pragma unroll
    for (int p = 0; p < 4; p++) {
      unsigned position = min(first + p, o.count - (IN_WORDS == 1 ? 4 - p : 1)), image = o.plane.divide(position);
      unsigned rest = position - image * o.plane.size, group = o.batch.divide(image), row = o.width.divide(rest);
      origin[p] = o.codes + (image - group * o.batch.size) * o.image_stride + group * o.group_stride +
                  row * o.row_stride + (rest - row * o.width.size) * o.column_stride;
    }
    unsigned char bytes[OF_THREAD][4][4];  // loads are unconditional, so that all of them are on their way together
#pragma unroll
    for (int k = 0; k < OF_THREAD; k++) {
      int channel = 4 * min(block(segment, k), (o.channels - 1) / 4);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        long long offset = IN_WORDS == 2 ? channel : min(channel + i, o.channels - 1) * (long long)o.channel_stride;
        if constexpr (IN_WORDS == 0)
#pragma unroll
          for (int p = 0; p < 4; p++) bytes[k][i][p] = __ldg(origin[p] + offset);
        else
          words[k][i] = *reinterpret_cast<const unsigned*>(origin[IN_WORDS == 1 ? 0 : i] + offset);
      }
    }
    if constexpr (IN_WORDS == 0)
#pragma unroll
      for (int k = 0; k < OF_THREAD; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const unsigned char* four = bytes[k][i];
          words[k][i] = four[0] | four[1] << 8 | four[2] << 16 | four[3] << 24;
        }
    if (first + 4 <= o.count) return;
#pragma unroll
    for (int k = 0; k < OF_THREAD; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        unsigned outside = 0;
        for (int p = 0; p < 4; p++)
          if (first + (IN_WORDS == 2 ? i : p) >= o.count) outside |= 255u << 8 * p;
        words[k][i] = words[k][i] & ~outside | o.padding_code * 0x01010101 & outside;
      }
  }
  static DEVICE int block(int segment, int k) { return segment * BLOCKS + threadIdx.x / 32 + k * WARPS; }
  DEVICE unsigned code(int k, int channel, int p) const {
    if constexpr (IN_WORDS == 2) return __byte_perm(words[k][p], 0, 0x4440 + channel);
    return __byte_perm(words[k][channel], 0, 0x4440 + p);
  }

  // Write up to four terms, whose words are `factors`, to the tile: a row a position, for each block a word a term.
  DEVICE void look_up(unsigned* tile, int pitch, int terms, const Operand& o, int segment, const unsigned* factors) {
#pragma unroll
    for (int k = 0; k < OF_THREAD; k++) {
      int channels = o.channels - 4 * block(segment, k);
      if (channels <= 0) continue;
#pragma unroll
      for (int p = 0; p < 4; p++) {
        unsigned w[4], t[4], *to = tile + (p * 32 + threadIdx.x % 32) * pitch + block(0, k) * terms;
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = i < channels ? factors[code(k, i, p)] : 0;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {  // from a word a channel to a word a term
          unsigned a = __byte_perm(w[0], w[1], i ? 0x7362 : 0x5140), b = __byte_perm(w[2], w[3], i ? 0x7362 : 0x5140);
          t[i] = __byte_perm(a, b, 0x5410), t[i + 1] = __byte_perm(a, b, 0x7632);
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (i < terms) to[i] = t[i];
      }
    }
  }

  // Add up a position's constants over the thread's channels.
  DEVICE unsigned sum(int p, const Operand& o, int segment, const unsigned* constants) const {
    unsigned sum = 0;
#pragma unroll
    for (int k = 0; k < OF_THREAD; k++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (4 * block(segment, k) + i < o.channels) sum += constants[code(k, i, p)];
    return sum;
  }
};

// Copy the tile's rows of `there` words out, and zeros behind them.
DEVICE void copy_out(const unsigned* tile, int pitch, int there, int length, const Operand& o, unsigned start,
                     int from) {
#pragma unroll 2
  for (int row = threadIdx.x / COPIERS; row < POSITIONS; row += EXPANDERS / COPIERS) {
    unsigned position = start + row % 32 * 4 + row / 32;
    if (position >= o.total) continue;
    uint4* to = reinterpret_cast<uint4*>(o.expanded + position * (long long)o.words + from);
    for (int i = threadIdx.x % COPIERS; i < length / 4; i += COPIERS) {
      unsigned words[4];
#pragma unroll
      for (int j = 0; j < 4; j++) words[j] = 4 * i + j < there ? tile[row * pitch + 4 * i + j] : 0;
      to[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// Expand every `step`-th item: 128 positions of a segment of the channels.
template <int IN_WORDS> DEVICE void expand(const Operand& o, unsigned item, unsigned step) {
  int quads = (o.terms + 3) / 4, all_blocks = (o.channels + 3) / 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned* factors = reinterpret_cast<unsigned*>(memory);
  unsigned* constants = factors + quads * CODES;
  unsigned* tile = constants + CODES;  // and, when it is copied out, the warps' sums
  auto parts = reinterpret_cast<unsigned(*)[POSITIONS]>(tile);
  for (int i = threadIdx.x; i < quads * CODES; i += EXPANDERS) factors[i] = o.factors[i];
  for (int i = threadIdx.x; i < CODES; i += EXPANDERS) constants[i] = o.constants[i];
  __syncthreads();

  for (unsigned tiles = (o.total + POSITIONS - 1) / POSITIONS; item < tiles * o.segments.size; item += step) {
    unsigned start = o.segments.divide(item) * POSITIONS;
    int segment = item - start / POSITIONS * o.segments.size, blocks = min(BLOCKS, all_blocks - segment * BLOCKS);
    Codes<IN_WORDS> codes(o, start + 4 * lane, segment);
    for (int term = 0; term < o.terms; term += 4) {
      int terms = min(4, o.terms - term), there = blocks * terms, pitch = there | 1;  // odd, against bank conflicts
      int from = term * all_blocks + segment * BLOCKS * terms;
      bool last = term + 4 >= o.terms && segment + 1 == o.segments.size;
      codes.look_up(tile, pitch, terms, o, segment, factors + term / 4 * CODES);
      __syncthreads();
      copy_out(tile, pitch, there, last ? o.words - from : there, o, start, from);
      __syncthreads();
    }
    if (!o.sums) continue;
#pragma unroll
    for (int p = 0; p < 4; p++) parts[warp][4 * lane + p] = codes.sum(p, o, segment, constants);
    __syncthreads();
    if (threadIdx.x < POSITIONS && start + threadIdx.x < o.total) {
      unsigned sum = 0;
      for (int i = 0; i < WARPS; i++) sum += parts[i][threadIdx.x];
      o.sums[segment * (long long)o.total + start + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

DEVICE void expand(const Operand& o, unsigned item, unsigned step) {
  if (o.in_words == 1) return expand<1>(o, item, step);
  if (o.in_words == 2) return expand<2>(o, item, step);
  expand<0>(o, item, step);
}

// ---- Products ------------------------------------------------------------------------------------------------------

constexpr int THREADS = 128, STAGES = 3, ROW = 64;               // bytes of a step
constexpr int OF_WARP = 64;                                      // pixels
constexpr int OF_ROW = ROW / CHUNK, LOADERS = THREADS / OF_ROW;  // chunks of a step; rows that are copied at once

// A layer on expanded operands; backends/cuda_terms.py mirrors the layout. Channels are counted per group.
struct Layer {
  const char *input, *weight;
  int* output;  // sums, or the bits of scaled sums
  const int *input_sums, *weight_sums;  // of f and g, for each segment of the channels and position; or null
  const float *scale, *bias;            // of each output channel, or null
  int chunks, slab, slabs;              // of a position; of a slab, which lies within a step; slabs of a position
  int length, steps, segments;          // slabs and steps of a whole sum
  int out_channels, groups, batch;
  int size[2], kernel[2], stride[2], padding[2], dilation[2];
  unsigned pixels;   // batch * output height * output width
  unsigned outside;  // the position of padding
  Divisor plane, width, channel_tiles, pixel_tiles;  // plane and width are the output's
};

// A slab of the sum. The kernel's columns change first: their windows overlap, so that L1 has most of the next slab.
struct Walk {
  int row = 0, column = 0, slab = 0;

  DEVICE void advance(const Layer& c, int slabs) {
    for (column += slabs; column >= c.kernel[1]; column -= c.kernel[1]) {
      if (++slab < c.slabs) continue;
      slab = 0;
      row++;
    }
  }
};

// Chunks are exchanged within a row of shared memory, so that eight rows' same chunks lie in different banks.
DEVICE int swapped(int row) { return row / (128 / ROW) % OF_ROW; }

DEVICE void multiply(unsigned (&sums)[4], const unsigned (&a)[4], const unsigned* b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Return what is written of a sum. Scaled sums round to nearest after each operation and are not fused.
DEVICE int finished(const Layer& c, int channel, unsigned sum) {
  if (!c.scale) return int(sum);
  float scaled = __fmul_rn(__int2float_rn(int(sum)), c.scale[channel]);
  return __float_as_int(c.bias ? __fadd_rn(scaled, c.bias[channel]) : scaled);
}

// A block of 4 warps, DOWN by ACROSS, computes DOWN * TILES * 16 channels by ACROSS * 64 pixels.
template <int TILES, int DOWN, int ACROSS> DEVICE void layer(const Layer& c) {
  constexpr int CHANNELS = DOWN * TILES * 16, PIXELS = ACROSS * OF_WARP, STAGE = (CHANNELS + PIXELS) * ROW;
  static_assert(DOWN * ACROSS * 32 == THREADS);
  __shared__ unsigned of_channel[CHANNELS], of_pixel[PIXELS];

  unsigned tile = c.channel_tiles.divide(blockIdx.x), group = c.pixel_tiles.divide(tile);
  int first_channel = (blockIdx.x - tile * c.channel_tiles.size) * CHANNELS;
  unsigned first_pixel = (tile - group * c.pixel_tiles.size) * PIXELS;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, elements = c.kernel[0] * c.kernel[1];

  // A thread copies the same chunk of the step for several rows.
  int row = threadIdx.x / OF_ROW, chunk = threadIdx.x % OF_ROW;
  unsigned start = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  unsigned slot = start + row * ROW + (chunk ^ swapped(row)) * CHUNK;
  const char* weights[CHANNELS / LOADERS];
  Window windows[PIXELS / LOADERS];
#pragma unroll
  for (int i = 0; i < CHANNELS / LOADERS; i++) {
    int channel = group * c.out_channels + min(first_channel + row + i * LOADERS, c.out_channels - 1);
    weights[i] = c.weight + channel * (long long)(elements * c.chunks) * CHUNK;
  }
#pragma unroll
  for (int i = 0; i < PIXELS / LOADERS; i++) windows[i] = {c, int(group), first_pixel + row + i * LOADERS};
  Walk walk;
  int at_once = OF_ROW / c.slab, in_slab = chunk % c.slab, next = chunk / c.slab, left = c.steps;
  walk.advance(c, next);

  auto fetch = [&](int stage) {
    if (left-- > 0) {
      unsigned to = slot + stage * STAGE;
      int at = (walk.slab * c.slab + in_slab) * CHUNK, pitch = c.chunks * CHUNK;
      int of_weight = (walk.row * c.kernel[1] + walk.column) * pitch + at;
#pragma unroll
      for (int i = 0; i < CHANNELS / LOADERS; i++)
        copy(to + i * LOADERS * ROW, weights[i] + of_weight, next < c.length);
      int down = walk.row * c.dilation[0], right = walk.column * c.dilation[1];
#pragma unroll
      for (int i = 0; i < PIXELS / LOADERS; i++) {
        long long position = windows[i].position(c, down, right, c.outside);
        copy(to + (CHANNELS + i * LOADERS) * ROW, c.input + at + position * pitch, true);
      }
      next += at_once;
      walk.advance(c, at_once);
    }
    asm volatile("cp.async.commit_group;");
  };

  for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);

  // The sums of g for each channel, and of f for each pixel.
  for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
    int channel = group * c.out_channels + min(first_channel + i, c.out_channels - 1);
    unsigned sum = 0;
    for (int s = 0; c.weight_sums && s < c.segments; s++)
      for (int k = 0; k < elements; k++)
        sum += c.weight_sums[(s * c.groups * c.out_channels + channel) * elements + k];
    of_channel[i] = sum;
  }
  for (int i = threadIdx.x; i < PIXELS; i += THREADS) {
    Window window(c, group, first_pixel + i);
    unsigned sum = 0;
    for (int y = 0; c.input_sums && y < c.kernel[0]; y++)
      for (int x = 0; x < c.kernel[1]; x++)
        for (int s = 0; s < c.segments; s++)
          sum += c.input_sums[s * (c.outside + 1) + window.position(c, y * c.dilation[0], x * c.dilation[1], c.outside)];
    of_pixel[i] = sum;
  }

  unsigned sums[TILES][OF_WARP / 8][4] = {};
  int channel = warp / ACROSS * TILES * 16, pixel = warp % ACROSS * OF_WARP, swap = swapped(lane);
  unsigned a_row = start + (channel + lane % 16) * ROW, a_chunk = lane / 16;
  unsigned b_row = start + (CHANNELS + pixel + lane % 8 + lane / 16 * 8) * ROW, b_chunk = lane / 8 % 2;
  int stage = 0;
  for (int step = 0; step < c.steps; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    fetch(stage == 0 ? STAGES - 1 : stage - 1);
#pragma unroll
    for (int k = 0; k < OF_ROW; k += 2) {
      unsigned a[TILES][4], b[OF_WARP / 16][4];
#pragma unroll
      for (int i = 0; i < TILES; i++) load(a[i], a_row + stage * STAGE + i * 16 * ROW + ((a_chunk + k) ^ swap) * CHUNK);
#pragma unroll
      for (int j = 0; j < OF_WARP / 16; j++)
        load(b[j], b_row + stage * STAGE + j * 16 * ROW + ((b_chunk + k) ^ swap) * CHUNK);
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < OF_WARP / 8; j++) multiply(sums[i][j], a[i], &b[j / 2][j % 2 * 2]);
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  __syncthreads();  // of_channel and of_pixel are there, even without terms

  // A thread has two neighbouring pixels of a channel, four lanes a sector of 32 bytes of the output.
#pragma unroll
  for (int j = 0; j < OF_WARP / 8; j++) {
    int at = pixel + j * 8 + lane % 4 * 2;
    unsigned number = first_pixel + at, image = c.plane.divide(number), rest = number - image * c.plane.size;
    long long of_image = (long long)c.groups * c.out_channels * c.plane.size;
    int* to = c.output + image * of_image + (long long)group * c.out_channels * c.plane.size + rest;
    long long next_pixel = rest + 1 < c.plane.size ? 1 : of_image - rest;
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
      int in_tile = channel + i * 8 + lane / 4, of_group = first_channel + in_tile;
      if (of_group >= c.out_channels || number >= c.pixels) continue;
      int values[2];
      for (int k = 0; k < 2; k++) {
        unsigned sum = sums[i / 2][j][i % 2 * 2 + k] + of_channel[in_tile] + of_pixel[at + k];
        values[k] = finished(c, group * c.out_channels + of_group, sum);
      }
      int* first = to + (long long)of_group * c.plane.size;
      if (c.plane.size % 2 == 0) {
        *reinterpret_cast<int2*>(first) = make_int2(values[0], values[1]);
      } else {
        first[0] = values[0];
        if (number + 1 < c.pixels) first[next_pixel] = values[1];
      }
    }
  }
}

}  // namespace terms

// The first blocks expand the weight, and the others the input.
extern "C" __global__ void __launch_bounds__(terms::EXPANDERS, 4)
    expand(__grid_constant__ const terms::Operand input, __grid_constant__ const terms::Operand weight, int of_weight) {
  if (!wanted("expand")) return;
  if (blockIdx.x < of_weight) return terms::expand(weight, blockIdx.x, of_weight);
  terms::expand(input, blockIdx.x - of_weight, gridDim.x - of_weight);
}

#define LAYER(name, blocks, ...)                                                                                      \
  extern "C" __global__ void __launch_bounds__(terms::THREADS, blocks) name(__grid_constant__ const terms::Layer c) { \
    if constexpr (wanted(#name)) terms::layer<__VA_ARGS__>(c);                                                        \
  }

LAYER(layer_64x128, 3, 2, 2, 2)
LAYER(layer_64x64, 4, 1, 4, 1)
LAYER(layer_32x128, 4, 1, 2, 2)

// Multiply on registers and nothing else: the ceiling that layers are measured against.
extern "C" __global__ void __launch_bounds__(terms::THREADS, 4) ceiling(int* output, int rounds) {
  if (!wanted("ceiling")) return;
  unsigned sums[16][4] = {}, a[4], b[2];
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = threadIdx.x * (i + 1), b[i / 2] = ~a[i];
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
#pragma unroll
    for (int i = 0; i < 16; i++) terms::multiply(sums[i], a, b);
  }
  unsigned total = 0;
#pragma unroll
  for (int i = 0; i < 64; i++) total += sums[i / 4][i % 4];
  output[blockIdx.x * terms::THREADS + threadIdx.x] = total;
}
