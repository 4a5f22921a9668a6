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
//   Limit: memory (on an H100, 64 channels of 56x56 b64 take 28 us, 2.7 TB/s).
//
// layer and layer_of_positions multiply.
//   Mapping: an implicit matrix product of output channels by pixels, over slabs of a position's chunks and kernel
//     elements. A block of 4 warps computes 64 by 256, 64 by 128 or 32 by 128. mma.sync.m16n8k16 takes weights from
//     shared memory as they are. Of a chunk's 8 channels, a lane has the codes of two, and the 4 numbers that the
//     instruction takes from it for a pixel are 4 slots of one of them: a shift of the activation's bits by 16 times
//     the slot. So activations never take more than 16 bits in memory. cp.async fetches 2 steps ahead. layer fetches
//     codes for each kernel element, layer_of_positions once for all of them, where they fit into shared memory.
//   Limit: the matrix units, as mma.sync drives them (270 TMAC/s on an H100), with 4 slots and more; 64 -> 64 3x3 56x56
//     b64 takes 178 us with 4 slots and 519 us with 16, 62 and 84 % of that. With one slot, memory: 85 us.
//   Tried: blocks of layer_of_positions that expand their input themselves, 133 us with one slot, as they wait for it;
//     sums written from registers, 8 bytes a lane, 94 us; blocks of 128 by 128, 139 us.
//
// The matrix units' sums do not depend on anything but the operands and the tile: repeats are bit-identical.
#include "entry.cuh"
#include "implicit_gemm.cuh"

namespace matrix {

extern __shared__ uint4 memory[];

constexpr int CHANNELS = 8;                                              // of a chunk's codes
constexpr int CHUNKS = SLOTS <= 4 ? 4 : SLOTS <= 8 ? 2 : 1;          // of a step's codes
constexpr int CODE_ROW = CHUNKS * CHUNK, WEIGHT_ROW = CODE_ROW * SLOTS;  // bytes of a step

// ---- Expansion -----------------------------------------------------------------------------------------------------

constexpr int EXPANDERS = 256, POSITIONS = 128, SEGMENT = 8;  // threads and positions of a block, chunks of a segment
constexpr int PITCH = SEGMENT + 1;                            // chunks of the tile's rows; odd, against bank conflicts
constexpr unsigned FRACTION = 0x7FFFFF, INFINITE = 0x7F800000;

// What a multiplier makes of an operand.
struct Factors {
  const unsigned* activations;  // for each fraction, the bits of u, with the slot in the lowest ones; or null
  const float* weights;         // v, for each slot by fraction
  unsigned kept, set;           // without `activations`: the bits of u that are the operand's, and those that are set
  int slot_shift;               // and the fraction's bits that are not the slot's
  int dropped;                  // bits of a fraction that are not looked at
  int keeps_subnormals;         // they count as zero otherwise

  DEVICE unsigned fraction(unsigned bits) const { return (bits & FRACTION) >> dropped; }
  // Return a number's power of two, infinite where the number is not finite, times a factor of its significand.
  DEVICE unsigned scaled(unsigned bits, float factor) const {
    float product;  // with a subnormal number's power, which is zero, it is zero
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(__uint_as_float(bits & ~FRACTION)), "f"(factor));
    bool whole = keeps_subnormals && (bits & INFINITE) == 0;
    return (whole ? bits >> dropped << dropped : __float_as_uint(product)) >> 16;
  }
  DEVICE unsigned code(float activation, const unsigned* table) const {
    unsigned bits = __float_as_uint(activation), exponent = bits & INFINITE;
    if (table) {
      unsigned entry = table[fraction(bits)];
      return scaled(bits, __uint_as_float(entry & ~0xFFFFu)) | (SLOTS == 1 ? 0 : entry & (SLOTS - 1));
    }
    unsigned cut = bits & kept | set;
    if (exponent == INFINITE || exponent == 0 && !keeps_subnormals) cut = bits & ~FRACTION;
    return cut >> 16 | (SLOTS == 1 ? 0 : (bits & FRACTION) >> slot_shift);
  }
};

// The layer's operands; backends/cuda_matrix.py mirrors the layout. Strides are in elements.
struct Operands {
  const float *input, *weight;
  uint4 *codes, *expanded;
  Factors factors;
  long long image_stride, group_stride, channel_stride, row_stride, column_stride;
  long long weight_group_stride, weight_row_stride, weight_channel_stride;
  int channels, chunks, slab, kernel[2];
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
DEVICE uint4 codes_of(const float (&numbers)[CHANNELS], const Factors& factors, const unsigned* table) {
  unsigned codes[CHANNELS];
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) codes[i] = factors.code(numbers[i], table);
  return make_uint4(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16, codes[4] | codes[5] << 16,
                    codes[6] | codes[7] << 16);
}

// Expand tiles of 128 positions by a segment of the channels.
template <bool IN_WORDS> DEVICE void expand_tiles(const Operands& o, const unsigned* table, uint4* tile) {
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
          float4 four = __ldcs(reinterpret_cast<const float4*>(origin[0] + offset));  // read once: it leaves L2 first
          numbers[0][i] = four.x, numbers[1][i] = four.y, numbers[2][i] = four.z, numbers[3][i] = four.w;
        } else {
#pragma unroll
          for (int p = 0; p < 4; p++) numbers[p][i] = __ldg(origin[p] + offset);
        }
      }
#pragma unroll
      for (int i = 0; i < CHANNELS; i++)
        if (chunk * CHANNELS + i >= o.channels)
#pragma unroll
          for (int p = 0; p < 4; p++) numbers[p][i] = 0;
#pragma unroll
      for (int p = 0; p < 4; p++) tile[(p * 32 + lane) * PITCH + warp] = codes_of(numbers[p], o.factors, table);
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
DEVICE void expand_rows(const Operands& o, const unsigned* table) {
  long long chunks = o.positions * (long long)o.chunks, threads = (gridDim.x - o.weight_blocks) * (long long)EXPANDERS;
  long long first = (blockIdx.x - o.weight_blocks) * (long long)EXPANDERS + threadIdx.x;
  for (long long i = first; i < chunks; i += threads) {
    unsigned position = o.of_chunk.divide(i);
    const float4* from = reinterpret_cast<const float4*>(o.origin(position)) + (i - position * o.chunks) * 2;
    float4 a = __ldcs(from), b = __ldcs(from + 1);
    o.codes[i] = codes_of({a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}, o.factors, table);
  }
}

// Expand the weight: a thread has 16 bytes, of a chunk of a sum's codes.
DEVICE void expand_weight(const Operands& o) {
  for (unsigned i = blockIdx.x * EXPANDERS + threadIdx.x; i < o.entries * SLOTS; i += o.weight_blocks * EXPANDERS) {
    unsigned entry = i / SLOTS, row = o.whole.divide(entry), at = entry - row * o.whole.size;
    int piece = i % SLOTS, group = o.out_channels.divide(row), elements = o.kernel[0] * o.kernel[1];
    int slab = at / (o.slab * elements), element = at / o.slab % elements, chunk = slab * o.slab + at % o.slab;
    const float* weight = o.weight + group * o.weight_group_stride +
                          (row - group * o.out_channels.size) * o.weight_row_stride + element;
    unsigned numbers[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      // As layer() takes codes apart: a step of the matrix units has 4 slots of a channel of each of 4 lanes.
      constexpr int STEPS = SLOTS / 4 > 0 ? SLOTS / 4 : 1;
      int parity = piece / 2 / STEPS, slot = SLOTS == 1 ? 0 : piece / 2 % STEPS * 4 + piece % 2 * 2 + j % 2;
      int channel = chunk * CHANNELS + (SLOTS == 1 ? j : j / 2 * 2 + parity);
      numbers[j] = 0;
      if (channel < o.channels) {
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

constexpr int THREADS = 128, OF_WARP = 64;                // pixels of a warp
constexpr int STAGES = 3, WEIGHT_STAGES = SLOTS == 1 ? 4 : 3;  // of all operands, and of weights alone

// A layer on expanded operands; backends/cuda_matrix.py mirrors the layout. Channels are counted per group.
struct Layer {
  const char *codes, *weight;
  const float* bias;  // or null
  float* output;
  int chunks, slab;   // of a position; of a slab, of which a step has some, or which has some steps
  int length, steps;  // slabs and steps of a whole sum
  int capacity;       // positions in shared memory
  int out_channels, groups, batch;
  int size[2], kernel[2], stride[2], padding[2], dilation[2];
  unsigned pixels;                                   // batch * output height * output width
  Divisor plane, width, channel_tiles, pixel_tiles;  // plane and width are the output's
};

// A slab of the sum. The kernel's elements change first: their windows overlap, so that L1 has most of the next slab.
struct Walk {
  int row = 0, column = 0, slab = 0;

  DEVICE void advance(const Layer& c, int slabs) {
    for (column += slabs; column >= c.kernel[1]; column -= c.kernel[1]) {
      if (++row < c.kernel[0]) continue;
      row = 0;
      slab++;
    }
  }
};

// Chunks are exchanged within a row of shared memory, so that eight rows' same chunks lie in different banks.
template <int ROW> DEVICE int swapped(int row) {
  constexpr int OF_BANKS = 128 / ROW > 0 ? 128 / ROW : 1, OF_ROW = ROW / CHUNK < 8 ? ROW / CHUNK : 8;
  return row / OF_BANKS % OF_ROW;
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

// The outputs of a warp, TILES * 16 channels by 64 pixels, from a channel and a pixel of the block's on.
template <int TILES> struct Products {
  static constexpr int GROUPS = SLOTS == 1 ? 4 : 2;  // of pixels whose rows ldmatrix reads together
  float sums[TILES][OF_WARP / 8][4] = {};
  int lane, channel, pixel;

  DEVICE Products(int channel, int pixel) : lane(threadIdx.x % 32), channel(channel), pixel(pixel) {}

  // Return the pixel, and of its codes the chunk, that a lane reads for a group.
  DEVICE int pixel_of(int j) const { return pixel + (SLOTS == 1 ? j * 16 + lane % 8 + lane / 16 * 8 : j * 32 + lane); }
  DEVICE int chunk_of(int chunk) const { return SLOTS == 1 ? chunk + lane / 8 % 2 : chunk; }

  DEVICE void load_weights(unsigned (&a)[TILES][4], unsigned from, int chunk) const {
    unsigned row = channel + lane % 16, at = (lane / 16 + chunk) ^ swapped<WEIGHT_ROW>(lane % 16);
#pragma unroll
    for (int i = 0; i < TILES; i++) load(a[i], from + (row + i * 16) * WEIGHT_ROW + at * CHUNK);
  }

  // Add a step, with the addresses of its weights and of the chunk for a group of pixels.
  template <class Address> DEVICE void step(unsigned weights, const Address& address) {
#pragma unroll
    for (int k = 0; k < CHUNKS; k += SLOTS == 1 ? 2 : 1) {
      unsigned codes[GROUPS][4];  // of each 8 pixels, those of a lane's two channels
#pragma unroll
      for (int j = 0; j < GROUPS; j++) load(codes[j], address(j, chunk_of(k)));
      if constexpr (SLOTS == 1) {
        unsigned a[TILES][4];
        load_weights(a, weights, k);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
          for (int j = 0; j < OF_WARP / 8; j++)
            multiply(sums[i][j], a[i], codes[j / 2][j % 2 * 2], codes[j / 2][j % 2 * 2 + 1]);
      } else {
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
            load_weights(a, weights, ((k * 2 + parity) * (SLOTS / 4) + quad) * 2);
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
  }

  // A warp turns 16 channels by 64 pixels at a time in shared memory, and writes lines of 256 bytes.
  DEVICE void write(const Layer& c, unsigned group, int first_channel, unsigned first_pixel) const {
    constexpr int LINE = OF_WARP + 8;  // against bank conflicts
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    float* turned = reinterpret_cast<float*>(memory) + threadIdx.x / 32 * 16 * LINE;
    unsigned number = first_pixel + pixel + lane % 16 * 4;
    long long offset[4];  // of four neighbouring pixels' outputs in the first channel
#pragma unroll
    for (int k = 0; k < 4; k++) {
      unsigned image = c.plane.divide(number + k), of_images = image * c.groups + group;
      offset[k] = (of_images * (long long)c.out_channels - image) * c.plane.size + number + k;
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < OF_WARP / 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          *reinterpret_cast<float2*>(turned + (lane / 4 + half * 8) * LINE + j * 8 + lane % 4 * 2) =
              make_float2(sums[i][j][half * 2], sums[i][j][half * 2 + 1]);
      __syncwarp();
#pragma unroll
      for (int row = lane / 16; row < 16; row += 2) {
        int of_group = first_channel + channel + i * 16 + row;
        if (of_group >= c.out_channels || number >= c.pixels) continue;
        float4 four = *reinterpret_cast<const float4*>(turned + row * LINE + lane % 16 * 4);
        if (c.bias) {
          float bias = c.bias[group * c.out_channels + of_group];
          four = make_float4(add(four.x, bias), add(four.y, bias), add(four.z, bias), add(four.w, bias));
        }
        float* to = c.output + of_group * (long long)c.plane.size;
        if (c.plane.size % 4 == 0) {
          __stcs(reinterpret_cast<float4*>(to + offset[0]), four);
        } else {
          to[offset[0]] = four.x;
          if (number + 1 < c.pixels) to[offset[1]] = four.y;
          if (number + 2 < c.pixels) to[offset[2]] = four.z;
          if (number + 3 < c.pixels) to[offset[3]] = four.w;
        }
      }
    }
  }
};

// A block's tile of ROWS channels by PIXELS pixels, and its weights.
template <int ROWS, int PIXELS> struct Block {
  static constexpr int OF_ROW = WEIGHT_ROW / CHUNK, LOADERS = THREADS / OF_ROW;  // chunks; rows copied at once
  unsigned group, first_pixel;
  int first_channel, row, chunk;
  const char* weights;

  DEVICE Block(const Layer& c) : row(threadIdx.x / OF_ROW), chunk(threadIdx.x % OF_ROW) {
    unsigned tile = c.channel_tiles.divide(blockIdx.x);
    group = c.pixel_tiles.divide(tile);
    first_channel = (blockIdx.x - tile * c.channel_tiles.size) * ROWS;
    first_pixel = (tile - group * c.pixel_tiles.size) * PIXELS;
    weights = c.weight + group * c.out_channels * (long long)c.steps * WEIGHT_ROW + chunk * CHUNK;
  }
  // A thread copies the same chunk of a step for several rows.
  DEVICE void fetch_weights(const Layer& c, int step, unsigned to) const {
#pragma unroll
    for (int i = 0; i < ROWS / LOADERS; i++) {
      int in_tile = row + i * LOADERS, channel = min(first_channel + in_tile, c.out_channels - 1);
      copy(to + in_tile * WEIGHT_ROW + (chunk ^ swapped<WEIGHT_ROW>(in_tile)) * CHUNK,
           weights + (channel * (long long)c.steps + step) * WEIGHT_ROW, true);
    }
  }
};

// Wait until a step's operands are there, and until all warps are done with the step before.
template <int AHEAD> DEVICE void await_step() {
  asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 2));
  __syncthreads();
}

// A block of 4 warps, DOWN by ACROSS, computes DOWN * TILES * 16 channels by ACROSS * 64 pixels.
template <int TILES, int DOWN, int ACROSS> DEVICE void layer(const Layer& c) {
  constexpr int ROWS = DOWN * TILES * 16, PIXELS = ACROSS * OF_WARP, CODES = ROWS * WEIGHT_ROW;
  constexpr int STAGE = CODES + PIXELS * CODE_ROW, LOADERS = THREADS / CHUNKS;  // rows of codes copied at once
  static_assert(DOWN * ACROSS * 32 == THREADS);

  Block<ROWS, PIXELS> block(c);
  unsigned start = static_cast<unsigned>(__cvta_generic_to_shared(memory));
  int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
  unsigned slot = start + CODES + row * CODE_ROW + (chunk ^ swapped<CODE_ROW>(row)) * CHUNK;
  Window windows[PIXELS / LOADERS];
#pragma unroll
  for (int i = 0; i < PIXELS / LOADERS; i++) windows[i] = {c, int(block.group), block.first_pixel + row + i * LOADERS};
  Walk walk;
  int at_once = CHUNKS / c.slab, in_slab = chunk % c.slab, next = chunk / c.slab, fetched = 0;
  walk.advance(c, next);

  auto fetch = [&](int stage) {
    if (fetched < c.steps) {
      block.fetch_weights(c, fetched++, start + stage * STAGE);
      int at = (walk.slab * c.slab + in_slab) * CHUNK, pitch = c.chunks * CHUNK;
      int down = walk.row * c.dilation[0], right = walk.column * c.dilation[1], shift = down * c.size[1] + right;
#pragma unroll
      for (int i = 0; i < PIXELS / LOADERS; i++) {
        bool exists = next < c.length && windows[i].inside(c, down, right);
        long long position = exists ? windows[i].origin + shift : 0;
        copy(slot + stage * STAGE + i * LOADERS * CODE_ROW, c.codes + (exists ? at : 0) + position * pitch, exists);
      }
      next += at_once;
      walk.advance(c, at_once);
    }
    asm volatile("cp.async.commit_group;");
  };

  for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);
  int warp = threadIdx.x / 32;
  Products<TILES> products(warp / ACROSS * TILES * 16, warp % ACROSS * OF_WARP);
  for (int step = 0, stage = 0; step < c.steps; step++, stage = stage == STAGES - 1 ? 0 : stage + 1) {
    await_step<STAGES>();
    fetch(stage == 0 ? STAGES - 1 : stage - 1);
    unsigned at = start + stage * STAGE;
    products.step(at, [&](int j, int chunk) {
      int row = products.pixel_of(j);
      return at + CODES + row * CODE_ROW + (chunk ^ swapped<CODE_ROW>(row)) * CHUNK;
    });
  }
  products.write(c, block.group, block.first_channel, block.first_pixel);
}

// The same where all positions under the windows of the block's pixels fit into shared memory, a slab at a time.
template <int TILES, int DOWN, int ACROSS> DEVICE void layer_of_positions(const Layer& c) {
  constexpr int ROWS = DOWN * TILES * 16, PIXELS = ACROSS * OF_WARP, STAGE = ROWS * WEIGHT_ROW;
  constexpr int GROUPS = Products<TILES>::GROUPS;
  static_assert(DOWN * ACROSS * 32 == THREADS);

  Block<ROWS, PIXELS> block(c);
  unsigned start = static_cast<unsigned>(__cvta_generic_to_shared(memory)), codes = start + WEIGHT_STAGES * STAGE;
  int warp = threadIdx.x / 32, fetched = 0;
  auto fetch = [&](int stage) {
    if (fetched < c.steps) block.fetch_weights(c, fetched++, start + stage * STAGE);
    asm volatile("cp.async.commit_group;");
  };

  // From the first row under the first pixel's window, to the last one under the last pixel's.
  Window first(c, block.group, block.first_pixel), last(c, block.group, block.first_pixel + PIXELS - 1);
  int top = max(min(first.row, c.size[0] - 1), 0);
  int bottom = max(min(last.row + (c.kernel[0] - 1) * c.dilation[0], c.size[0] - 1), 0);
  int low = first.origin - first.column + (top - first.row) * c.size[1];
  int count = last.origin - last.column + (bottom - last.row + 1) * c.size[1] - low;
  auto fill = [&](int slab) {  // a position has 8 chunks, exchanged against bank conflicts
    int in_slab = threadIdx.x % SEGMENT, chunk = slab * c.slab + in_slab;
    const char* from = c.codes + (low * (long long)c.chunks + min(chunk, c.chunks - 1)) * CHUNK;
    if (in_slab < c.slab)
      for (int position = threadIdx.x / SEGMENT; position < count; position += THREADS / SEGMENT)
        copy(codes + (position * SEGMENT + (in_slab ^ position % SEGMENT)) * CHUNK,
             from + position * (long long)c.chunks * CHUNK, chunk < c.chunks);
  };
  fill(0);
  for (int stage = 0; stage < WEIGHT_STAGES - 1; stage++) fetch(stage);

  Products<TILES> products(warp / ACROSS * TILES * 16, warp % ACROSS * OF_WARP);
  Window windows[GROUPS];
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    windows[j] = {c, int(block.group), block.first_pixel + products.pixel_of(j)};
    windows[j].origin -= low;
  }
  if (threadIdx.x < SEGMENT)  // of padding
    memory[(WEIGHT_STAGES * STAGE) / CHUNK + c.capacity * SEGMENT + threadIdx.x] = make_uint4(0, 0, 0, 0);

  Walk walk;
  int in_slab = 0;
  for (int step = 0, stage = 0; step < c.steps; step++, stage = stage == WEIGHT_STAGES - 1 ? 0 : stage + 1) {
    if (step > 0 && in_slab == 0 && walk.row == 0 && walk.column == 0) {
      __syncthreads();
      fill(walk.slab);
      asm volatile("cp.async.wait_all;");
    }
    await_step<WEIGHT_STAGES>();
    fetch(stage == 0 ? WEIGHT_STAGES - 1 : stage - 1);
    int down = walk.row * c.dilation[0], right = walk.column * c.dilation[1], shift = down * c.size[1] + right;
    int positions[GROUPS];
#pragma unroll
    for (int j = 0; j < GROUPS; j++)
      positions[j] = windows[j].inside(c, down, right) ? windows[j].origin + shift : c.capacity;
    products.step(start + stage * STAGE, [&](int j, int chunk) {
      return codes + (positions[j] * SEGMENT + ((in_slab + chunk) ^ positions[j] % SEGMENT)) * CHUNK;
    });
    in_slab += CHUNKS;
    if (in_slab == c.slab) {
      in_slab = 0;
      walk.advance(c, 1);
    }
  }
  products.write(c, block.group, block.first_channel, block.first_pixel);
}

}  // namespace matrix

// The first blocks expand the weight, and the others the input.
extern "C" __global__ void __launch_bounds__(matrix::EXPANDERS, 3)
    expand(__grid_constant__ const matrix::Operands operands) {
  if (!wanted("expand")) return;
  __shared__ unsigned activations[128];
  __shared__ uint4 tile[matrix::POSITIONS * matrix::PITCH];
  if (blockIdx.x < operands.weight_blocks) return matrix::expand_weight(operands);
  const unsigned* table = operands.factors.activations;
  if (table) {
    for (int i = threadIdx.x; i < 1 << 23 - operands.factors.dropped; i += matrix::EXPANDERS) activations[i] = table[i];
    __syncthreads();
    table = activations;
  }
  if (operands.in_words == 2) return matrix::expand_rows(operands, table);
  if (operands.in_words == 1) return matrix::expand_tiles<true>(operands, table, tile);
  matrix::expand_tiles<false>(operands, table, tile);
}

#define LAYER(kind, name, blocks, ...)                                                                         \
  extern "C" __global__ void __launch_bounds__(matrix::THREADS, blocks)                                        \
      name(__grid_constant__ const matrix::Layer c) {                                                          \
    if constexpr (wanted(#name)) matrix::kind<__VA_ARGS__>(c);                                                 \
  }

LAYER(layer_of_positions, positions_64x256, 2, 4, 1, 4)
LAYER(layer_of_positions, positions_64x128, 3, 2, 2, 2)
LAYER(layer, layer_64x256, 2, 4, 1, 4)
LAYER(layer, layer_64x128, 3, 2, 2, 2)
LAYER(layer, layer_32x128, 4, 1, 2, 2)

// Measure the matrix units alone, all operands in registers.
extern "C" __global__ void __launch_bounds__(matrix::THREADS, 3) ceiling(float* output, int rounds) {
  if (!wanted("ceiling")) return;
  unsigned a[4] = {threadIdx.x, 1, 2, 3};
  float sums[16][4] = {};
  for (int round = 0; round < rounds; round++)
#pragma unroll
    for (int i = 0; i < 16; i++) matrix::multiply(sums[i], a, round, i);
  float sum = 0;
  for (int i = 0; i < 64; i++) sum += sums[i / 4][i % 4];
  output[blockIdx.x * matrix::THREADS + threadIdx.x] = sum;
}
