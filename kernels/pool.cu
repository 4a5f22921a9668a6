// ReLU and max-pooling in one pass, and the gradient of both in another. Memory limits them, or for small layers their
// launch. Values, and which element of a window the gradient goes to, are those of PyTorch's two layers.

#include "entry.cuh"

// A convolution's output, planes of height x width, whose windows of side `kernel` do not overlap. The last ones of a row
// or column may be cut off; they have no output.
struct Windows {
  int height, width, kernel, down, across;  // windows down and across that have an output
};

// Find the largest element of a window after ReLU, the first of equal ones, NaN before all; return its place.
__device__ __forceinline__ int largest(const float* first, const Windows& w, float* value) {
  int place = 0;
  float most = __int_as_float(0xFF800000);
  for (int y = 0; y < w.kernel; y++)
    for (int x = 0; x < w.kernel; x++) {
      float one = first[y * w.width + x];
      one = one != one || one > 0.0f ? one : 0.0f;
      if (one > most || one != one) most = one, place = y * w.kernel + x;
    }
  *value = most;
  return place;
}

// A thread an output.
extern "C" __global__ void relu_max_pool(const float* input, float* output, unsigned count, Windows w) {
  if (!wanted("relu_max_pool")) return;
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  unsigned row = i / w.across, plane = row / w.down;
  const float* first = input + (plane * (long long)w.height + (row - plane * w.down) * w.kernel) * w.width;
  largest(first + (i - row * w.across) * w.kernel, w, output + i);
}

// A thread a window, also of those that are cut off: it writes all gradients of its elements.
extern "C" __global__ void relu_max_pool_grad(const float* grad, const float* input, float* output, unsigned count,
                                              Windows w) {
  if (!wanted("relu_max_pool_grad")) return;
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  unsigned columns = (w.width + w.kernel - 1) / w.kernel, rows = (w.height + w.kernel - 1) / w.kernel;
  unsigned down = i / columns, across = i - down * columns, plane = down / rows;
  down -= plane * rows;
  long long start = (plane * (long long)w.height + down * w.kernel) * w.width + across * w.kernel;
  int place = -1;
  float value = 0.0f, passed = 0.0f;
  if (down < w.down && across < w.across) {
    place = largest(input + start, w, &value);
    if (!(value <= 0.0f)) passed = 0.0f + grad[(plane * (long long)w.down + down) * w.across + across];  // no -0
  }
  for (int y = 0; y < min(w.kernel, w.height - int(down) * w.kernel); y++)
    for (int x = 0; x < min(w.kernel, w.width - int(across) * w.kernel); x++)
      output[start + y * w.width + x] = y * w.kernel + x == place ? passed : 0.0f;
}
