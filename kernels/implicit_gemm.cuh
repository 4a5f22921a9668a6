// What the kernels of implicit matrix products share: they sum over channels, kernel rows and kernel columns without
// unfolding the input.
#pragma once

#define DEVICE __device__ __forceinline__

// A size that positions are divided by: the hardware has no integer division. n / size is the upper half of n times the
// reciprocal, shifted; exact below 2^31.
struct Divisor {
  unsigned size, reciprocal, shift;

  DEVICE unsigned divide(unsigned n) const { return size == 1 ? n : __umulhi(n, reciprocal) >> shift; }
};

constexpr int CHUNK = 16;  // bytes of an asynchronous copy

// Start to copy a chunk to shared memory, or zeros.
DEVICE void copy(unsigned to, const char* from, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? CHUNK : 0));
}

// Load four matrices of 8 rows by 16 bytes, as the matrix units take them.
DEVICE void load(unsigned (&words)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from));
}

// An output pixel's window. Past the last pixel, it is the last one's once more.
struct Window {
  int origin, row, column;  // of the input under the kernel's first element, as a position

  Window() = default;
  template <class Layer> DEVICE Window(const Layer& c, int group, unsigned pixel) {
    pixel = min(pixel, c.pixels - 1);
    unsigned image = c.plane.divide(pixel), rest = pixel - image * c.plane.size, line = c.width.divide(rest);
    row = int(line) * c.stride[0] - c.padding[0];
    column = int(rest - line * c.width.size) * c.stride[1] - c.padding[1];
    origin = ((group * c.batch + int(image)) * c.size[0] + row) * c.size[1] + column;
  }
  template <class Layer> DEVICE bool inside(const Layer& c, int down, int right) const {
    return unsigned(row + down) < unsigned(c.size[0]) && unsigned(column + right) < unsigned(c.size[1]);
  }
  // Return the position under a kernel element, or `outside`.
  template <class Layer> DEVICE unsigned position(const Layer& c, int down, int right, unsigned outside) const {
    return inside(c, down, right) ? origin + down * c.size[1] + right : outside;
  }
};
