// Forward convolutions and dense layers of float multipliers on bfloat16 matrix units, with float32 sums. The table of
// a multiplier's significand products is T[a, b] = u[a] v[slot[a], b] with few slots, and all factors are exact in
// bfloat16 (see backends/cuda_matrix.py): a layer is then a matrix product, SLOTS times as long. With one slot, as
// drum-k6 has, both operands are cut to bfloat16. Otherwise u is 1: an activation is its power of two in one of SLOTS
// places and zero in the others, and a weight is a column of v times its power of two. NVRTC compiles this file for
// each number of slots, 1, 4, 8, 16 or 32, for compute capability 8.0 and up.
//
// expand turns operands into factors.
//   Mapping: an activation becomes a code of 16 bits, the bfloat16 number and in its lowest bits the slot. A position
//     is a pixel of the input; its channels lie together, zeros fill them up to whole chunks of 16 bytes. A block of 8
//     warps has 128 positions by up to 64 channels at a time, a warp 8 channels, a lane 4 positions; rows of chunks are
//     put together in shared memory. Where channels lie next to each other already, a thread has a chunk. A weight
//     becomes SLOTS numbers, in the order in which steps of the layer read them.
//   Limit: memory.
//
// layer multiplies.
//   Mapping: an implicit matrix product of output channels by pixels, over kernel rows, slabs of a position's chunks,
//     and kernel columns. mma.sync.m16n8k16 takes weights from shared memory as they are. Of a chunk's 8 channels, a
//     lane has the codes of two, and the 4 numbers that the instruction takes from it for a pixel are 4 slots of one
//     of them: a shift of the activation's bits by 16 times the slot. So activations never take more than 16 bits in
//     memory. cp.async fetches 2 steps ahead, and writes zeros for elements outside the image.
//
// The matrix units' sums do not depend on anything but the operands and the tile: repeats are bit-identical.
#define DEVICE __device__ __forceinline__

namespace matrix {

// A size that positions are divided by: the hardware has no integer division. Exact below 2^31.
struct Divisor {
  unsigned size, reciprocal, shift;

  DEVICE unsigned divide(unsigned n) const { return size == 1 ? n : __umulhi(n, reciprocal) >> shift; }
};

extern __shared__ uint4 memory[];

constexpr int CHUNK = 16, CHANNELS = 8;                              // bytes of a chunk, and channels of codes
constexpr int CHUNKS = SLOTS <= 4 ? 4 : SLOTS <= 8 ? 2 : 1;          // of a step's codes
constexpr int CODE_ROW = CHUNKS * CHUNK, WEIGHT_ROW = CODE_ROW * SLOTS;  // bytes of a step

// ---- Expansion -----------------------------------------------------------------------------------------------------

constexpr int EXPANDERS = 256, POSITIONS = 128, SEGMENT = 8;  // threads and positions of a block, chunks of a segment
constexpr int PITCH = SEGMENT + 1;                            // chunks of the tile's rows; odd, against bank conflicts
constexpr unsigned FRACTION = 0x7FFFFF, INFINITE = 0x7F800000;

// What a multiplier makes of a fraction's leading bits.
struct Factors {
  const unsigned* activations;  // for each fraction, the bits of u, with the slot in the lowest ones
  const float* weights;         // v, for each slot by fraction
  int dropped;                  // bits of a fraction that are not looked at
  int keeps_subnormals;         // they count as zero otherwise

  // Return a number's power of two, infinite where the number is not finite, times a factor of its significand.
  DEVICE unsigned scaled(unsigned bits, float factor) const {
    float product;  // with a subnormal number's power, which is zero, it is zero
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(__uint_as_float(bits & ~FRACTION)), "f"(factor));
    bool kept = keeps_subnormals && (bits & INFINITE) == 0;
    return (kept ? bits >> dropped << dropped : __float_as_uint(product)) >> 16;
  }
  DEVICE unsigned fraction(unsigned bits) const { return (bits & FRACTION) >> dropped; }
};

// The layer's operands; backends/cuda_matrix.py mirrors the layout. Strides are in elements.
struct Operands {
  const float *input, *weight;
  uint4 *codes, *expanded;
  Factors factors;
  long long image_stride, group_stride, channel_stride, row_stride, column_stride;
  long long weight_group_stride, weight_row_stride, weight_channel_stride;
  int channels, chunks, slab, slabs, kernel[2];
  int in_words;        // 1 where four positions lie in a float4, 2 where eight channels lie in two, or 0
  int weight_blocks;   // the first ones, which expand the weight
  unsigned positions;  // of the input
  unsigned entries;    // chunks of codes of a whole sum, in whole steps, for all output channels
  Divisor batch, plane, width, segments, whole, out_channels, of_chunk;

  DEVICE const float* origin(unsigned position) const {
    unsigned image = plane.divide(position), rest = position - image * plane.size, group = batch.divide(image);
    unsigned row = width.divide(rest);
    return input + (image - group * batch.size) * image_stride + group * group_stride + row * row_stride +
           (rest - row * width.size) * column_stride;
  }
};

// Return the codes of eight channels as a chunk.
DEVICE uint4 codes_of(const float (&numbers)[CHANNELS], const Factors& factors, const unsigned* activations) {
  unsigned codes[CHANNELS];
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) {
    unsigned bits = __float_as_uint(numbers[i]), entry = activations[factors.fraction(bits)];
    unsigned slot = SLOTS == 1 ? 0 : entry & (SLOTS - 1);
    codes[i] = factors.scaled(bits, __uint_as_float(entry & ~0xFFFFu)) | slot;
  }
  return make_uint4(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16, codes[4] | codes[5] << 16,
                    codes[6] | codes[7] << 16);
}

// Expand every `step`-th tile: 128 positions of a segment of the channels.
template <bool IN_WORDS> DEVICE void expand_tiles(const Operands& o, const unsigned* activations, uint4* tile) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned tiles = (o.positions + POSITIONS - 1) / POSITIONS * o.segments.size;
  for (unsigned item = blockIdx.x - o.weight_blocks; item < tiles; item += gridDim.x - o.weight_blocks) {
    unsigned of_positions = o.segments.divide(item), start = of_positions * POSITIONS;
    int first_chunk = (item - of_positions * o.segments.size) * SEGMENT, chunk = first_chunk + warp;
    if (chunk < o.chunks) {
      float numbers[4][CHANNELS];
      const float* origin[4];
#pragma unroll
      for (int p = 0; p < (IN_WORDS ? 1 : 4); p++)
        origin[p] = o.origin(min(start + 4 * lane + p, o.positions - (IN_WORDS ? 4 : 1)));
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) {
        long long offset = min(chunk * CHANNELS + i, o.channels - 1) * o.channel_stride;
        if constexpr (IN_WORDS) {
          float4 four = __ldg(reinterpret_cast<const float4*>(origin[0] + offset));
          numbers[0][i] = four.x, numbers[1][i] = four.y, numbers[2][i] = four.z, numbers[3][i] = four.w;
        } else {
#pragma unroll
          for (int p = 0; p < 4; p++) numbers[p][i] = __ldg(origin[p] + offset);
        }
      }
#pragma unroll
      for (int i = 0; i < CHANNELS; i++)
        if (chunk * CHANNELS + i >= o.channels)
          for (int p = 0; p < 4; p++) numbers[p][i] = 0;
#pragma unroll
      for (int p = 0; p < 4; p++)
        tile[(p * 32 + lane) * PITCH + warp] = codes_of(numbers[p], o.factors, activations);
    }
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < POSITIONS * SEGMENT; i += EXPANDERS) {
      int row = i / SEGMENT, in_segment = i % SEGMENT;
      unsigned position = start + row;
      if (position < o.positions && first_chunk + in_segment < o.chunks)
        o.codes[position * (long long)o.chunks + first_chunk + in_segment] =
            tile[(row % 4 * 32 + row / 4) * PITCH + in_segment];
    }
    __syncthreads();
  }
}

// The same where channels lie next to each other.
DEVICE void expand_rows(const Operands& o, const unsigned* activations) {
  long long chunks = o.positions * (long long)o.chunks, threads = (gridDim.x - o.weight_blocks) * (long long)EXPANDERS;
  long long first = (blockIdx.x - o.weight_blocks) * (long long)EXPANDERS + threadIdx.x;
  for (long long i = first; i < chunks; i += threads) {
    unsigned position = o.of_chunk.divide(i);
    const float4* from = reinterpret_cast<const float4*>(o.origin(position)) + (i - position * o.chunks) * 2;
    float4 a = __ldg(from), b = __ldg(from + 1);
    o.codes[i] = codes_of({a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, o.factors, activations);
  }
}

// Expand the weight: a thread has 16 bytes, of a chunk of a sum's codes.
DEVICE void expand_weight(const Operands& o) {
  for (unsigned i = blockIdx.x * EXPANDERS + threadIdx.x; i < o.entries * SLOTS; i += o.weight_blocks * EXPANDERS) {
    unsigned entry = i / SLOTS, row = o.whole.divide(entry), at = entry - row * o.whole.size;
    int piece = i % SLOTS, group = o.out_channels.divide(row), in_slab = at % o.slab, rest = at / o.slab;
    int column = rest % o.kernel[1];
    rest /= o.kernel[1];
    int chunk = rest % o.slabs * o.slab + in_slab, y = rest / o.slabs;
    const float* weight = o.weight + group * o.weight_group_stride +
                          (row - group * o.out_channels.size) * o.weight_row_stride + y * o.kernel[1] + column;
    unsigned numbers[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      // As layer() takes codes apart: a step of the matrix units has 4 slots of a channel of each of 4 lanes.
      constexpr int STEPS = SLOTS / 4 > 0 ? SLOTS / 4 : 1;
      int parity = piece / 2 / STEPS, slot = SLOTS == 1 ? 0 : piece / 2 % STEPS * 4 + piece % 2 * 2 + j % 2;
      int channel = chunk * CHANNELS + (SLOTS == 1 ? j : j / 2 * 2 + parity);
      numbers[j] = 0;
      if (y < o.kernel[0] && channel < o.channels) {
        unsigned bits = __float_as_uint(weight[channel * o.weight_channel_stride]);
        float factor = __ldg(o.factors.weights + (slot << 23 - o.factors.dropped) + o.factors.fraction(bits));
        numbers[j] = o.factors.scaled(bits, factor);
      }
    }
    o.expanded[i] = make_uint4(numbers[0] | numbers[1] << 16, numbers[2] | numbers[3] << 16,
                               numbers[4] | numbers[5] << 16, numbers[6] | numbers[7] << 16);
  }
}

// ---- Products ------------------------------------------------------------------------------------------------------

constexpr int THREADS = 128, STAGES = 3, OF_WARP = 64;  // pixels of a warp

// A layer on expanded operands; backends/cuda_matrix.py mirrors the layout. Channels are counted per group.
struct Layer {
  const char *codes, *weight;
  const float* bias;  // or null
  float* output;
  int chunks, slab, slabs;  // of a position; of a slab, which lies within a step; slabs of a position
  int length, steps;        // slabs and steps of a whole sum
  int out_channels, groups, batch;
  int size[2], kernel[2], stride[2], padding[2], dilation[2];
  unsigned pixels;                                   // batch * output height * output width
  Divisor plane, width, channel_tiles, pixel_tiles;  // plane and width are the output's
};

// An output pixel's window. Past the last pixel, it is the last one's once more.
struct Window {
  int origin, row, column;  // of the input under the kernel's first element, as a position

  Window() = default;
  DEVICE Window(const Layer& c, int group, unsigned pixel) {
    pixel = min(pixel, c.pixels - 1);
    unsigned image = c.plane.divide(pixel), rest = pixel - image * c.plane.size, line = c.width.divide(rest);
    row = int(line) * c.stride[0] - c.padding[0];
    column = int(rest - line * c.width.size) * c.stride[1] - c.padding[1];
    origin = ((group * c.batch + int(image)) * c.size[0] + row) * c.size[1] + column;
  }
  DEVICE bool inside(const Layer& c, int down, int right) const {
    return unsigned(row + down) < unsigned(c.size[0]) && unsigned(column + right) < unsigned(c.size[1]);
  }
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
template <int ROW> DEVICE int swapped(int row) {
  constexpr int OF_BANKS = 128 / ROW > 0 ? 128 / ROW : 1, OF_ROW = ROW / CHUNK < 8 ? ROW / CHUNK : 8;
  return row / OF_BANKS % OF_ROW;
}

DEVICE void copy(unsigned to, const char* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? CHUNK : 0));
}

DEVICE void load(unsigned (&words)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from));
}

DEVICE void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Shift by any number of bits; beyond 63, and by less than none, nothing remains.
DEVICE void shift_left(unsigned& low, unsigned& high, unsigned x, int by) {
  asm("{\n\t.reg .b64 wide;\n\tcvt.u64.u32 wide, %2;\n\tshl.b64 wide, wide, %3;\n\tmov.b64 {%0, %1}, wide;\n\t}"
      : "=r"(low), "=r"(high)
      : "r"(x), "r"(by));
}

DEVICE float add(float a, float b) {  // subnormals survive CuPy's option -ftz=true
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}

// A block of 4 warps, DOWN by ACROSS, computes DOWN * TILES * 16 channels by ACROSS * 64 pixels.
template <int TILES, int DOWN, int ACROSS> DEVICE void layer(const Layer& c) {
  constexpr int ROWS = DOWN * TILES * 16, PIXELS = ACROSS * OF_WARP, CODES = ROWS * WEIGHT_ROW;
  constexpr int STAGE = CODES + PIXELS * CODE_ROW;
  constexpr int WEIGHT_CHUNKS = WEIGHT_ROW / CHUNK, WEIGHT_LOADERS = THREADS / WEIGHT_CHUNKS;
  constexpr int CODE_LOADERS = THREADS / CHUNKS;  // rows that are copied at once
  static_assert(DOWN * ACROSS * 32 == THREADS);

  unsigned tile = c.channel_tiles.divide(blockIdx.x), group = c.pixel_tiles.divide(tile);
  int first_channel = (blockIdx.x - tile * c.channel_tiles.size) * ROWS;
  unsigned first_pixel = (tile - group * c.pixel_tiles.size) * PIXELS;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // A thread copies the same chunk of the step for several rows.
  unsigned start = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  int weight_row = threadIdx.x / WEIGHT_CHUNKS, weight_chunk = threadIdx.x % WEIGHT_CHUNKS;
  int code_row = threadIdx.x / CHUNKS, code_chunk = threadIdx.x % CHUNKS;
  unsigned code_slot = start + CODES + code_row * CODE_ROW + (code_chunk ^ swapped<CODE_ROW>(code_row)) * CHUNK;
  const char* weights = c.weight + group * c.out_channels * (long long)c.steps * WEIGHT_ROW + weight_chunk * CHUNK;
  Window windows[PIXELS / CODE_LOADERS];
#pragma unroll
  for (int i = 0; i < PIXELS / CODE_LOADERS; i++)
    windows[i] = {c, int(group), first_pixel + code_row + i * CODE_LOADERS};
  Walk walk;
  int at_once = CHUNKS / c.slab, in_slab = code_chunk % c.slab, next = code_chunk / c.slab, fetched = 0;
  walk.advance(c, next);

  auto fetch = [&](int stage) {
    if (fetched < c.steps) {
#pragma unroll
      for (int i = 0; i < ROWS / WEIGHT_LOADERS; i++) {
        int row = weight_row + i * WEIGHT_LOADERS, channel = min(first_channel + row, c.out_channels - 1);
        unsigned to = start + stage * STAGE + row * WEIGHT_ROW + (weight_chunk ^ swapped<WEIGHT_ROW>(row)) * CHUNK;
        copy(to, weights + (channel * (long long)c.steps + fetched) * WEIGHT_ROW, true);
      }
      int at = (walk.slab * c.slab + in_slab) * CHUNK, pitch = c.chunks * CHUNK;
      int down = walk.row * c.dilation[0], right = walk.column * c.dilation[1], shift = down * c.size[1] + right;
#pragma unroll
      for (int i = 0; i < PIXELS / CODE_LOADERS; i++) {
        bool exists = next < c.length && windows[i].inside(c, down, right);
        long long position = exists ? windows[i].origin + shift : 0;
        copy(code_slot + stage * STAGE + i * CODE_LOADERS * CODE_ROW, c.codes + at + position * pitch, exists);
      }
      next += at_once;
      fetched++;
      walk.advance(c, at_once);
    }
    asm volatile("cp.async.commit_group;");
  };

  for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);

  float sums[TILES][OF_WARP / 8][4] = {};
  int channel = warp / ACROSS * TILES * 16, pixel = warp % ACROSS * OF_WARP;
  unsigned a_row = start + (channel + lane % 16) * WEIGHT_ROW, a_swap = swapped<WEIGHT_ROW>(lane % 16);
  auto load_weights = [&](unsigned (&a)[TILES][4], unsigned stage, int chunk) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
      load(a[i], a_row + stage + i * 16 * WEIGHT_ROW + ((lane / 16 + chunk) ^ a_swap) * CHUNK);
  };

  int stage = 0;
  for (int step = 0; step < c.steps; step++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
    __syncthreads();
    fetch(stage == 0 ? STAGES - 1 : stage - 1);
    unsigned at = stage * STAGE;
    if constexpr (SLOTS == 1) {
      int row = lane % 8 + lane / 16 * 8, swap = swapped<CODE_ROW>(row);
      unsigned b_row = start + at + CODES + (pixel + row) * CODE_ROW;
#pragma unroll
      for (int k = 0; k < CHUNKS; k += 2) {
        unsigned a[TILES][4], b[OF_WARP / 16][4];
        load_weights(a, at, k);
#pragma unroll
        for (int j = 0; j < OF_WARP / 16; j++)
          load(b[j], b_row + j * 16 * CODE_ROW + ((lane / 8 % 2 + k) ^ swap) * CHUNK);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
          for (int j = 0; j < OF_WARP / 8; j++) multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    } else {
      unsigned b_row = start + at + CODES + (pixel + lane) * CODE_ROW;
#pragma unroll
      for (int k = 0; k < CHUNKS; k++) {
        unsigned codes[2][4];  // of each 8 pixels, those of a lane's two channels
#pragma unroll
        for (int j = 0; j < 2; j++)
          load(codes[j], b_row + j * 32 * CODE_ROW + (k ^ swapped<CODE_ROW>(lane)) * CHUNK);
#pragma unroll
        for (int parity = 0; parity < 2; parity++) {
          unsigned power[OF_WARP / 8], place[OF_WARP / 8];
#pragma unroll
          for (int j = 0; j < OF_WARP / 8; j++) {
            unsigned code = codes[j / 4][j % 4] >> 16 * parity;
            power[j] = code & 0xFF80, place[j] = code * 16 & (SLOTS - 1) * 16;
          }
#pragma unroll
          for (int quad = 0; quad < SLOTS / 4; quad++) {
            unsigned a[TILES][4];
            load_weights(a, at, ((k * 2 + parity) * (SLOTS / 4) + quad) * 2);
#pragma unroll
            for (int j = 0; j < OF_WARP / 8; j++) {
              unsigned low, high;
              shift_left(low, high, power[j], place[j] - 64 * quad);
#pragma unroll
              for (int i = 0; i < TILES; i++) multiply(sums[i][j], a[i], low, high);
            }
          }
        }
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }

  // A thread has two neighbouring pixels of a channel, four lanes a sector of 32 bytes of the output.
#pragma unroll
  for (int j = 0; j < OF_WARP / 8; j++) {
    unsigned number = first_pixel + pixel + j * 8 + lane % 4 * 2;
    unsigned image = c.plane.divide(number), rest = number - image * c.plane.size;
    long long of_image = (long long)c.groups * c.out_channels * c.plane.size;
    float* to = c.output + image * of_image + (long long)group * c.out_channels * c.plane.size + rest;
    long long next_pixel = rest + 1 < c.plane.size ? 1 : of_image - rest;
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
      int of_group = first_channel + channel + i * 8 + lane / 4;
      if (of_group >= c.out_channels || number >= c.pixels) continue;
      float values[2] = {sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]};
      if (c.bias) {
        float bias = c.bias[group * c.out_channels + of_group];
        values[0] = add(values[0], bias), values[1] = add(values[1], bias);
      }
      float* first = to + (long long)of_group * c.plane.size;
      if (c.plane.size % 2 == 0) {
        *reinterpret_cast<float2*>(first) = make_float2(values[0], values[1]);
      } else {
        first[0] = values[0];
        if (number + 1 < c.pixels) first[next_pixel] = values[1];
      }
    }
  }
}

}  // namespace matrix

extern "C" __global__ void __launch_bounds__(matrix::EXPANDERS, 2)
    expand(__grid_constant__ const matrix::Operands operands) {
  if (blockIdx.x < operands.weight_blocks) return matrix::expand_weight(operands);
  __shared__ unsigned activations[128];
  __shared__ uint4 tile[matrix::POSITIONS * matrix::PITCH];
  for (int i = threadIdx.x; i < 1 << 23 - operands.factors.dropped; i += matrix::EXPANDERS)
    activations[i] = operands.factors.activations[i];
  __syncthreads();
  if (operands.in_words == 2) return matrix::expand_rows(operands, activations);
  if (operands.in_words == 1) return matrix::expand_tiles<true>(operands, activations, tile);
  matrix::expand_tiles<false>(operands, activations, tile);
}

#define LAYER(name, blocks, ...)                                                                 \
  extern "C" __global__ void __launch_bounds__(matrix::THREADS, blocks)                          \
      name(__grid_constant__ const matrix::Layer c) {                                            \
    matrix::layer<__VA_ARGS__>(c);                                                               \
  }

LAYER(layer_64x256, 2, 4, 1, 4)
LAYER(layer_64x128, 3, 2, 2, 2)
LAYER(layer_32x128, 4, 1, 2, 2)
