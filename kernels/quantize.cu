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

extern "C" __global__ void quantize(__grid_constant__ const Elementwise e) {
  if (!wanted("quantize")) return;
  each<unsigned char>(e, [&](float x, float scale, float zero, float) {
    if (!isfinite(x))
      for (int k = 0; k < e.poisoned; k++) e.poison[k] = __int_as_float(0x7FC00000);
    return static_cast<unsigned char>(static_cast<int>(clamped(rounded(x, scale, zero), e.format)));
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

// A block a row of a weight's codes: z_a times (steps times z_b less the codes' sum), modulo 2^32.
extern "C" __global__ void row_offsets(const unsigned char* codes, const float* input_zero, const float* weight_zero,
                                       unsigned* offsets, long long steps) {
  if (!wanted("row_offsets")) return;
  __shared__ unsigned sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  unsigned mine = 0;
  for (long long i = threadIdx.x; i < steps; i += blockDim.x) mine += codes[blockIdx.x * steps + i];
  atomicAdd(&sum, mine);  // of integers, so that the order does not matter
  __syncthreads();
  if (threadIdx.x == 0)
    offsets[blockIdx.x] = static_cast<unsigned>(*input_zero) *
                          (static_cast<unsigned>(steps) * static_cast<unsigned>(weight_zero[blockIdx.x]) - sum);
}

// Sums of T[a, b] without the codes' zero points, scaled. `windows` are sums of a, of each group.
extern "C" __global__ void scale_sums(const unsigned* sums, const unsigned* windows, const unsigned* offsets,
                                      const float* weight_zero, const float* scale, const float* bias, float* out,
                                      long long count, long long plane, int channels, int of_group) {
  if (!wanted("scale_sums")) return;
  for (ELEMENTS(i, count)) {
    long long channel_of_image = i / plane;
    int channel = channel_of_image % channels;
    long long window = channel_of_image / of_group * plane + i % plane;
    unsigned sum = sums[i] - static_cast<unsigned>(weight_zero[channel]) * windows[window] + offsets[channel];
    float scaled = __fmul_rn(__int2float_rn(static_cast<int>(sum)), scale[channel]);
    out[i] = bias ? __fadd_rn(scaled, bias[channel]) : scaled;
  }
}
