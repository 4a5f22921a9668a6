/* The minimally biased multiplier in C, on the bit patterns of float32 numbers: `c:examples/mbm.h:mbm`.
 *
 * It is compiled for the CPU and for CUDA, so it uses integers only and calls no library. A C function handles all special
 * values itself. This one equals the built-in mbm bit for bit. */
#include <stdint.h>

static inline uint32_t mbm(uint32_t a, uint32_t b) {
  const uint32_t sign = (a ^ b) & 0x80000000u, infinity = 0x7F800000u, nan = 0x7FC00000u;
  const int32_t ea = (a >> 23) & 255, eb = (b >> 23) & 255;
  const uint32_t x = a & 0x7FFFFFu, y = b & 0x7FFFFFu;
  if ((ea == 255 && x != 0) || (eb == 255 && y != 0)) return nan;
  if (ea == 255 || eb == 255) return ea == 0 || eb == 0 ? nan : sign | infinity;
  if (ea == 0 || eb == 0) return sign;

  const uint32_t sum = x + y, carry = sum >> 23, fraction = sum & 0x7FFFFFu;
  uint32_t corrected = fraction + (655360u >> carry); /* (2^-4 + 2^-6) * 2^23, halved after a carry */
  if (carry && corrected >= 0x800000u) corrected = fraction;
  int32_t e = ea + eb - 127 + (int32_t)carry;
  if (corrected >= 0x800000u) {
    e += 1;
    corrected = (corrected - 0x800000u) >> 1;
  }
  if (e <= 0) return sign;
  if (e >= 255) return sign | infinity;
  return sign | (uint32_t)e << 23 | corrected;
}
