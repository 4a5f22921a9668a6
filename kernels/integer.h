// The interface between the Python module (integer.cpp) and the SIMD variants of the integer kernels
// (integer_simd.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace mbm {

// A convolution of 8-bit codes, whose products stand in a table. Channels are counted per group; pairs are (height,
// width); strides are in elements.
struct IntegerConv2d {
  const std::uint8_t *input, *weight;  // the weight is contiguous
  std::int32_t* output;                // planes are contiguous
  std::int64_t batch, groups, channels, out_channels;
  std::int64_t size[2], kernel[2], out_size[2], stride[2], padding[2], dilation[2];
  std::int64_t input_stride[5];   // of image, group, channel, row, column
  std::int64_t output_stride[3];  // of image, group, channel
  const std::int32_t* table;      // [code of the input][code of the weight]
  // table[a][b] = sum of u[a][term] * v[term][b] + f[a] + g[b]. Without terms, products are looked up.
  std::int64_t terms;
  const std::int8_t *u, *v;
  const std::int64_t *f, *g;
  std::uint8_t padding_code;
  int threads;
};

// Nanoseconds, from which Python chooses between terms and look-ups, and a plan among look-ups.
struct IntegerCosts {
  int lanes;      // output channels come in multiples of these for terms, of 16 for vectors
  double term;    // of a product, and each channel
  double vector;  // of a step and a position, for 16 channels, from a table of the step
  double table;   // to make such a table
  double each;    // of a product looked up on its own
};

// The kernels of integer_simd.cpp, compiled for one instruction set. A plan divides a convolution into independent
// jobs, as in conv2d.h.
struct IntegerKernels {
  const char* name;
  IntegerCosts costs;
  void* (*make_plan)(const IntegerConv2d&);
  void (*free_plan)(void*);
  std::int64_t (*packing_jobs)(const void* plan);
  void (*pack)(const void* plan, std::int64_t job);
  std::int64_t (*jobs)(const void* plan);
  std::size_t (*scratch_bytes)(const void* plan);  // per job; run_job expects it aligned to 64 bytes
  void (*run_job)(const void* plan, std::int64_t job, void* scratch);
};

}  // namespace mbm
