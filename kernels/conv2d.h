// The interface between the Python module (conv2d.cpp) and the SIMD variants of the kernels (conv2d_simd.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "multiplier.h"

namespace mbm {

// A convolution whose operands lie in memory in any order. With other strides it is a gradient or a dense layer
// (backends/geometry.py). Channels are counted per group; pairs are (height, width); strides are in elements.
struct Conv2d {
  const float *input, *weight, *bias;  // a kernel is contiguous, bias may be null
  float* output;
  std::int64_t batch, groups, channels, out_channels;
  std::int64_t size[2], kernel[2], out_size[2], stride[2], padding[2], dilation[2];  // padding may be negative
  std::int64_t input_stride[5];   // of image, group, channel, row, column
  std::int64_t weight_stride[3];  // of group, output channel, channel
  std::int64_t output_stride[5];  // of image, group, channel, row, column
  Multiplier multiplier;
  int threads;
};

// The kernels of conv2d_simd.cpp, compiled for one instruction set.
struct Kernels {
  const char* name;
  // A plan divides a convolution into independent jobs and holds its packed weights, which other jobs pack before.
  void* (*make_plan)(const Conv2d&);
  void (*free_plan)(void*);
  std::int64_t (*packing_jobs)(const void* plan);
  void (*pack)(const void* plan, std::int64_t job);
  std::int64_t (*jobs)(const void* plan);
  std::size_t (*scratch_bytes)(const void* plan);  // per job; run_job expects it aligned to 64 bytes
  void (*run_job)(const void* plan, std::int64_t job, void* scratch);
  void (*multiply)(const Multiplier&, const float* a, const float* b, float* out, std::int64_t count);
  // Run the inner loop's arithmetic `rounds` times on registers alone, and return the multiply-accumulates done.
  std::int64_t (*ceiling)(const Multiplier&, std::int64_t rounds);
};

}  // namespace mbm
