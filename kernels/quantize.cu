// Quantisation on a GPU: codes, dequantised values, straight-through gradients, ranges and scales. Memory limits each
// kernel, or for small layers its launch, so that what can be fused into one is. Divisions and roundings are to nearest
// (ties to even), as on every device.
//
// A scale and a zero point belong to `row_length` elements: to one output channel of a weight, or to a whole tensor.

#include "entry.cuh"

struct Format {
  float least, most;  // codes
  int is_signed;
};

__device__ __forceinline__ float rounded(float x, float scale, float zero) {
  return __fadd_rn(rintf(__fdiv_rn(x, scale)), zero);
}

__device__ __forceinline__ float clamped(float code, Format f) {
  return code < f.least ? f.least : code > f.most ? f.most : code;  // NaN stays NaN
}

// The row of an element; a whole tensor needs no division.
__device__ __forceinline__ long long row_of(long long i, long long count, long long row_length) {
  return row_length == count ? 0 : i / row_length;
}

#define ELEMENTS(i, count) \
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += (long long)gridDim.x * blockDim.x

// The argument of the elementwise kernels; backends/cuda_quantize.py mirrors the layout.
struct Elementwise {
  const float *x, *grad, *scale, *zero;
  void* out;
  float* poison;  // numbers by which results are multiplied: NaN if an element is not finite, and so has no code
  long long count, row_length;
  Format format;
  int poisoned, in_fours;  // in_fours: four elements can be read and written at once, and share their scale
};

template <class Number, int N> struct __align__(sizeof(Number) * N) Numbers { Number of[N]; };
template <int N> using Floats = Numbers<float, N>;

// Call `function` with `Floats<4>`s, or one at a time, of x and of the gradient, and store what it returns.
template <class Out, class Function, int N> __device__ __forceinline__ void each(const Elementwise& e, Function of) {
  for (ELEMENTS(i, e.count / N)) {
    long long row = row_of(i * N, e.count, e.row_length);
    Floats<N> x = reinterpret_cast<const Floats<N>*>(e.x)[i], grad = {};
    if (e.grad) grad = reinterpret_cast<const Floats<N>*>(e.grad)[i];
    Numbers<Out, N> out;
#pragma unroll
    for (int k = 0; k < N; k++) out.of[k] = of(x.of[k], e.scale[row], e.zero[row], grad.of[k]);
    reinterpret_cast<Numbers<Out, N>*>(e.out)[i] = out;
  }
}

template <class Out, class Function> __device__ __forceinline__ void each(const Elementwise& e, Function of) {
  if (e.in_fours) return each<Out, Function, 4>(e, of);
  each<Out, Function, 1>(e, of);
}

__device__ __forceinline__ unsigned char code_of(float x, float scale, float zero, Format f) {
  return static_cast<unsigned char>(static_cast<int>(clamped(rounded(x, scale, zero), f)));
}

__device__ __forceinline__ void make_nan(float* numbers, long long count) {
  for (long long k = 0; k < count; k++) numbers[k] = __int_as_float(0x7FC00000);
}

extern "C" __global__ void quantize(__grid_constant__ const Elementwise e) {
  if (!wanted("quantize")) return;
  each<unsigned char>(e, [&](float x, float scale, float zero, float) {
    if (!isfinite(x)) make_nan(e.poison, e.poisoned);
    return code_of(x, scale, zero, e.format);
  });
}

extern "C" __global__ void fake_quantize(__grid_constant__ const Elementwise e) {
  if (!wanted("fake_quantize")) return;
  each<float>(e, [&](float x, float scale, float zero, float) {
    return __fmul_rn(__fsub_rn(clamped(rounded(x, scale, zero), e.format), zero), scale);
  });
}

extern "C" __global__ void quantize_grad(__grid_constant__ const Elementwise e) {
  if (!wanted("quantize_grad")) return;
  each<float>(e, [&](float x, float scale, float zero, float grad) {
    float code = rounded(x, scale, zero);
    return code >= e.format.least && code <= e.format.most ? grad : 0.0f;
  });
}

// ---- Ranges and scales ---------------------------------------------------------------------------------------------

struct Range {
  float low, high;
};

__device__ __forceinline__ Range join(Range a, Range b) {
  if (a.low != a.low || b.low != b.low) return {a.low + b.low, a.low + b.low};  // NaN: not finite
  return {fminf(a.low, b.low), fmaxf(a.high, b.high)};
}

// The range of a block's elements, in its first thread. Blocks have 256 threads.
__device__ Range of_block(Range mine) {
  __shared__ Range of_warps[8];
  for (int offset = 16; offset > 0; offset /= 2)
    mine = join(mine, {__shfl_down_sync(~0u, mine.low, offset), __shfl_down_sync(~0u, mine.high, offset)});
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int i = 1; i < 8; i++) mine = threadIdx.x == 0 ? join(mine, of_warps[i]) : mine;
  return mine;
}

// As scale_of in quantize.py.
__device__ void write_scale(Range r, float* scale, float* zero, Format f) {
  if (f.is_signed) {
    float s = __fdiv_rn(fmaxf(fabsf(r.low), fabsf(r.high)), f.most);
    if (r.low != r.low) s = r.low;
    *scale = s == 0.0f ? 1.0f : s;
    *zero = 0.0f;
  } else {
    float low = r.low > 0.0f ? 0.0f : r.low, high = r.high < 0.0f ? 0.0f : r.high;
    float s = __fdiv_rn(__fsub_rn(high, low), f.most);
    *scale = s = s == 0.0f ? 1.0f : s;
    *zero = clamped(rintf(__fdiv_rn(-low, s)), f);
  }
}

// The range of each block's elements of a tensor.
extern "C" __global__ void range_parts(const float* x, Range* parts, long long count) {
  if (!wanted("range_parts")) return;
  Range mine{__int_as_float(0x7F800000), __int_as_float(0xFF800000)};
  long long fours = reinterpret_cast<unsigned long long>(x) % sizeof(Floats<4>) == 0 ? count / 4 : 0;
  for (ELEMENTS(i, fours)) {
    Floats<4> four = reinterpret_cast<const Floats<4>*>(x)[i];
#pragma unroll
    for (int k = 0; k < 4; k++) mine = join(mine, {four.of[k], four.of[k]});
  }
  for (ELEMENTS(i, count - 4 * fours)) mine = join(mine, {x[4 * fours + i], x[4 * fours + i]});
  mine = of_block(mine);
  if (threadIdx.x == 0) parts[blockIdx.x] = mine;
}

// One block: move a running range towards that of the parts, and write its scale and zero point.
extern "C" __global__ void update_range(const Range* parts, int count, Range* running, float momentum, float* scale,
                                        Format f) {
  if (!wanted("update_range")) return;
  Range mine{__int_as_float(0x7F800000), __int_as_float(0xFF800000)};
  for (int i = threadIdx.x; i < count; i += blockDim.x) mine = join(mine, parts[i]);
  mine = of_block(mine);
  if (threadIdx.x == 0) {
    Range r = *running;
    r.low = __fadd_rn(r.low, __fmul_rn(momentum, __fsub_rn(mine.low, r.low)));
    r.high = __fadd_rn(r.high, __fmul_rn(momentum, __fsub_rn(mine.high, r.high)));
    *running = r;
    write_scale(r, scale, scale + 1, f);
  }
}

// A block a row: the scale and the zero point of its current range.
extern "C" __global__ void row_scales(const float* x, float* scales, long long row_length, Format f) {
  if (!wanted("row_scales")) return;
  Range mine{__int_as_float(0x7F800000), __int_as_float(0xFF800000)};
  const float* row = x + blockIdx.x * row_length;
  for (long long i = threadIdx.x; i < row_length; i += blockDim.x) mine = join(mine, {row[i], row[i]});
  mine = of_block(mine);
  if (threadIdx.x == 0) write_scale(mine, scales + blockIdx.x, scales + gridDim.x + blockIdx.x, f);
}

// ---- Unsigned codes ------------------------------------------------------------------------------------------------
//
// Mapping: a block has `blockDim.x` positions of images, and `blockDim.y` threads share the channels of each, so that
// neighbouring threads have neighbours in memory: positions, or channels where a plane is small. An image has the
// channels of one group, which lie together. Past the last position, it is the last one's once more.
//
// What limits them: of large layers the memory, 5 bytes an element of `quantize_and_sum` and 8 of `scale_sums`; sums of
// codes are read and written once for all channels. Of small layers latency, so that a thread has several loads in
// flight, and the fewer positions there are, the more threads share each.

constexpr int AT_ONCE = 8;  // loads of a thread

// The sum over the threads of a position. Blocks have 256 threads.
__device__ unsigned of_position(unsigned mine) {
  __shared__ unsigned parts[256];
  unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  parts[thread] = mine;
  for (unsigned n = 128; n >= blockDim.x; n /= 2) {
    __syncthreads();
    if (thread < n) parts[thread] += parts[thread + n];
  }
  __syncthreads();
  return parts[threadIdx.x];
}

__device__ __forceinline__ long long position_of_thread(long long count) {
  return min(blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x, count - 1);
}

// backends/cuda_quantize.py mirrors the layout.
struct Images {
  const float *x, *scale, *zero;
  unsigned char* codes;
  unsigned* sums;
  float* poison;               // as in Elementwise
  long long images, of_scale;  // images that share a scale
  long long size[2], padding[2];
  Format format;
  int channels, poisoned;
};

// Codes of images with a border of the code of zero, and their sums over the channels.
extern "C" __global__ void quantize_and_sum(__grid_constant__ const Images e) {
  if (!wanted("quantize_and_sum")) return;
  long long columns = e.size[1] + 2 * e.padding[1], plane = (e.size[0] + 2 * e.padding[0]) * columns;
  long long position = position_of_thread(e.images * plane), image = position / plane, rest = position - image * plane;
  long long line = rest / columns, row = line - e.padding[0], column = rest - line * columns - e.padding[1];
  bool is_inside = row >= 0 && row < e.size[0] && column >= 0 && column < e.size[1], is_finite = true;
  long long area = e.size[0] * e.size[1], first_channel = image * e.channels + threadIdx.y;
  long long from = first_channel * area + row * e.size[1] + column, to = first_channel * plane + rest;
  long long of_scale = row_of(image, e.images, e.of_scale);
  float scale = e.scale[of_scale], zero = e.zero[of_scale];
  unsigned sum = 0, channels = e.channels;
  for (unsigned first = threadIdx.y; first < channels; first += AT_ONCE * blockDim.y) {
    float x[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++, from += blockDim.y * area)
      x[k] = is_inside && first + k * blockDim.y < channels ? e.x[from] : 0.0f;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++, to += blockDim.y * plane) {
      if (first + k * blockDim.y >= channels) break;
      unsigned char code = code_of(x[k], scale, zero, e.format);
      e.codes[to] = code;
      sum += code;
      is_finite = is_finite && isfinite(x[k]);
    }
  }
  if (!is_finite) make_nan(e.poison, e.poisoned);
  sum = of_position(sum);
  if (threadIdx.y == 0) e.sums[position] = sum;
}

// backends/cuda_quantize.py mirrors the layout.
struct Sums {
  const unsigned *sums, *of_positions, *of_rows;  // of the table's entries; of codes of the input and of the weight
  const float *input_zero, *weight_zero, *scale, *bias;
  float* out;
  long long images, size[2], out_size[2], kernel[2], stride[2], dilation[2];
  int groups, channels;
  unsigned steps;
};

// Sums of T[a, b] without the codes' zero points, modulo 2^32, scaled.
extern "C" __global__ void scale_sums(__grid_constant__ const Sums s) {
  if (!wanted("scale_sums")) return;
  long long plane = s.out_size[0] * s.out_size[1], position = position_of_thread(s.images * plane);
  long long image = position / plane, rest = position - image * plane;
  long long row = rest / s.out_size[1], column = rest - row * s.out_size[1];
  long long corner = (image * s.size[0] + row * s.stride[0]) * s.size[1] + column * s.stride[1];
  unsigned window = 0;
  for (long long i = threadIdx.y; i < s.kernel[0]; i += blockDim.y) {
    const unsigned* from = s.of_positions + corner + i * s.dilation[0] * s.size[1];
#pragma unroll 4
    for (long long j = 0; j < s.kernel[1]; j++) window += from[j * s.dilation[1]];
  }
  window = of_position(window);
  unsigned input_zero = static_cast<unsigned>(*s.input_zero), channels = s.channels;
  unsigned group = static_cast<unsigned>(image % s.groups);
  long long at = (image * channels + threadIdx.y) * plane + rest;
  for (unsigned first = threadIdx.y; first < channels; first += AT_ONCE * blockDim.y) {
    unsigned sums[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
      sums[k] = first + k * blockDim.y < channels ? s.sums[at + k * blockDim.y * plane] : 0;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++, at += blockDim.y * plane) {
      if (first + k * blockDim.y >= channels) break;
      unsigned channel = group * channels + first + k * blockDim.y;
      unsigned weight_zero = static_cast<unsigned>(__ldg(s.weight_zero + channel));
      unsigned constant = input_zero * (s.steps * weight_zero - __ldg(s.of_rows + channel));
      unsigned sum = sums[k] - weight_zero * window + constant;
      float scaled = __fmul_rn(__int2float_rn(static_cast<int>(sum)), __ldg(s.scale + channel));
      s.out[at] = s.bias ? __fadd_rn(scaled, __ldg(s.bias + channel)) : scaled;
    }
  }
}
