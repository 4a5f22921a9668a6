// The arithmetic of the CUDA kernels: how operands are decoded, a product added to a sum, and when this form holds.
//
// For mbm, a product and its addition to the sum cost 4 instructions (2 for mitchell):
//   w = fraction of a + bits of b       integer addition: Mitchell's product of a's significand and b
//   p = w below a threshold of b        true unless the correction is skipped
//   if p: w = w + correction of b       float addition, rounded toward zero: c times b's power of two
//   sum = power of a * w + sum          fused multiply-add: multiplying by a signed power of two is exact
// What depends on one operand alone (a: fraction, power; b: bits, threshold, correction) is decoded once per tile.
// drum costs one instruction, because operands with few bits multiply exactly, or three where a product must be cut.
//
// A table of up to 7 bits lies in shared memory, one byte per entry. The row for one weight is 128 bytes, one word in
// each bank, so a warp whose threads share their weights looks up without bank conflicts. A product costs four
// instructions: address, load, shift and add, multiply-add. A multiprocessor issues only one such load per cycle.
//
// Zeros need no special case. A zero a has power 0. A zero b leaves w subnormal, and the float instructions take it for
// zero (.ftz). They would flush a subnormal sum, too, so no sum may be subnormal. Where the operands' exponents do not
// rule out products below 2^-103 or above the largest float, the tile is computed again, each product by definition.
// This is several times slower, and rare.
//
// With MBM_FUNCTION defined, FAMILY is FUNCTION and the user's source text precedes this one (backends/cuda.py). In the
// fast form the compiler may assume normal operands, so it can drop the function's code for other operands. Those
// are decoded as 1, and a mask clears their products.
#pragma once

#include "multiplier.h"

#define MBM_MEMBER __device__ __forceinline__

namespace mbm {

struct Lane {
  typedef int I;
  typedef float F;
};

__device__ constexpr Multiplier M = make_multiplier(FAMILY, BITS, RESULT_BITS);
constexpr bool MASKED = result_is_masked(M);
constexpr bool CORRECTED = M.form == ONE_LEVEL || M.form == TWO_LEVELS;
constexpr bool WHOLE = M.form == IEEE || M.form == TRUNCATED;  // operands are multiplied as whole floats
constexpr bool SHARED_TABLE = M.form == LOOKUP;
constexpr int THREADS = 128;  // per block
constexpr float UNIT = 1.0f / CARRY;

// ---- The table -----------------------------------------------------------------------------------------------------

// A row of zeros follows the entries, for weights that are zero.
constexpr int ENTRIES = is_lookup(M) ? 1 << 2 * M.table_bits : 1;
constexpr int COLUMNS = is_lookup(M) ? 1 << M.table_bits : 1;

MBM_FN Multiplier with_table(const TableEntry* table) {
  Multiplier m = M;
  m.table = table;
  return m;
}

// A block's view of the table. With up to 7 bits, the block copies the table to shared memory as bytes.
struct BlockTable {
  const TableEntry* entries;
  const unsigned char* shared;

  MBM_MEMBER BlockTable(const TableEntry* entries) : entries(entries) {
    __shared__ __align__(16) unsigned char copy[SHARED_TABLE ? ENTRIES + COLUMNS : 16];
    shared = copy;
    if constexpr (SHARED_TABLE) {
      for (int i = threadIdx.x; i < (ENTRIES + COLUMNS) / 2; i += THREADS) {
        unsigned two = reinterpret_cast<const unsigned*>(entries)[i];
        reinterpret_cast<unsigned short*>(copy)[i] = two | two >> 8;
      }
      __syncthreads();
    }
  }
  MBM_MEMBER int operator[](int index) const {
    if constexpr (SHARED_TABLE) return shared[index];
    return entries[index];
  }
};

// ---- The product ---------------------------------------------------------------------------------------------------

// These are in PTX to fix the treatment of subnormals. C operators would follow CuPy's option -ftz=true.
MBM_FN float add(float a, float b) {
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}
MBM_FN float multiply_add_ftz(float a, float b, float c) {
  float sum;
  asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(a), "f"(b), "f"(c));
  return sum;
}
// Add c to w if sum < threshold, by one predicated addition. The compiler would emit an addition and a select.
MBM_FN void add_below_ftz(float& w, int sum, int threshold, float c) {
  asm("{\n\t.reg .pred below;\n\tsetp.lt.u32 below, %1, %2;\n\t@below add.rz.ftz.f32 %0, %0, %3;\n\t}"
      : "+f"(w)
      : "r"(sum), "r"(threshold), "f"(c));
}

MBM_FN float multiply_toward_zero_ftz(float a, float b) {
  float product;
  asm("mul.rz.ftz.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}

// A decoded pixel, operand a.
// - WHOLE: power is the truncated operand, fraction is unused.
// - Table: fraction is the table column.
// - Function: power is the operand, fraction a mask, 0 unless the operand is normal.
struct Pixel {
  float power;
  int fraction;
};
// A decoded weight, operand b.
// - WHOLE: bits are those of the truncated operand.
// - Sum of fractions: bits are those of the truncated operand, 0 for a zero; without a correction only they are used.
// - Table: bits are those of the power of two, threshold is the start of the table row.
// - Function: bits are those of the operand, threshold is the mask.
struct __align__(16) Weight {
  int bits;
  int threshold;
  float correction;
};

MBM_FN bool is_normal(float x) {
  int exponent = bits<Lane>(x) & INFINITE;
  return exponent != 0 && exponent != INFINITE;
}

MBM_FN float decode_whole(float x) {
  if constexpr (M.form == TRUNCATED) return decode_truncated<Lane>(x, M);
  return truncate_finite<Lane>(x, M.operand_keep);
}

MBM_FN Pixel decode_pixel(float a) {
  if constexpr (WHOLE) return {decode_whole(a), 0};
  if constexpr (M.form == CALL) return {is_normal(a) ? a : 1.0f, is_normal(a) ? ~0 : 0};
  if constexpr (is_lookup(M)) return {decode_power<Lane>(a), table_column(bits<Lane>(a) & FRACTION, M)};
  return {decode_power<Lane>(a), decode_fraction<Lane>(a, M)};
}

MBM_FN Weight decode_weight(float b) {
  if constexpr (WHOLE) return {bits<Lane>(decode_whole(b)), 0, 0};
  if constexpr (M.form == CALL) return {is_normal(b) ? bits<Lane>(b) : ONE, is_normal(b) ? ~0 : 0, 0};
  if constexpr (is_lookup(M)) {
    int power = bits<Lane>(decode_power<Lane>(b));
    return {power, (power & INFINITE) != 0 ? table_row(bits<Lane>(b) & FRACTION, M) : ENTRIES, 0};
  }
  constexpr int THRESHOLD = M.correction_carry == 0 ? CARRY : 2 * CARRY - M.correction_carry;
  constexpr float C = UNIT * (M.form == TWO_LEVELS ? 2 * M.correction_carry : M.correction);
  float power = decode_power<Lane>(b);
  int normal = (bits<Lane>(b) & INFINITE) != 0;
  return {normal ? bits<Lane>(power) | decode_fraction<Lane>(b, M) : 0, bits<Lane>(power) + THRESHOLD, power * C};
}

MBM_FN float accumulate(float sum, const Pixel& a, const Weight& b, const BlockTable& table) {
  if constexpr (M.form == CALL) {
    int x = bits<Lane>(a.power), y = b.bits;
    unsigned ex = unsigned(x) >> FRACTION_BITS & 255, ey = unsigned(y) >> FRACTION_BITS & 255;
    __builtin_assume(ex > 0);
    __builtin_assume(ex < 255);
    __builtin_assume(ey > 0);
    __builtin_assume(ey < 255);
    return add(sum, from_bits<Lane>(call<Lane>(x, y) & a.fraction & b.threshold));
  }
  if constexpr (M.form == IEEE) return add(sum, ieee_product<Lane>(a.power, from_bits<Lane>(b.bits), M));
  if constexpr (M.form == TRUNCATED && MASKED) {
    float product = multiply_toward_zero_ftz(a.power, from_bits<Lane>(b.bits));
    return add(sum, from_bits<Lane>(bits<Lane>(product) & (M.result_keep | ~FRACTION)));
  }
  if constexpr (M.form == TRUNCATED) return multiply_add_ftz(a.power, from_bits<Lane>(b.bits), sum);
  if constexpr (is_lookup(M)) {
    int entry = table[b.threshold + a.fraction];
    float w = from_bits<Lane>(b.bits + (entry << (FRACTION_BITS - M.table_bits)));  // scaled by b's power of two
    return multiply_add_ftz(a.power, w, sum);
  }
  int significand = a.fraction + b.bits;  // includes b's sign and exponent
  float w = from_bits<Lane>(significand);
  // The comparison reads the sum, not a's fraction, although it must then wait for the sum. The sum can lie in any
  // register, whereas an instruction loses a cycle if two of its operands come from the same of the two register banks.
  if constexpr (M.form == ONE_LEVEL) add_below_ftz(w, significand, b.threshold, b.correction);
  if constexpr (M.form == TWO_LEVELS) {
    constexpr float REST = float(M.correction - 2 * M.correction_carry) / (2 * M.correction_carry);
    add_below_ftz(w, significand, b.threshold, b.correction);
    add_below_ftz(w, significand, b.threshold - (CARRY - M.correction_carry), REST * b.correction);
  }
  if constexpr (MASKED) w = from_bits<Lane>(bits<Lane>(w) & (M.result_keep | ~FRACTION));
  return multiply_add_ftz(a.power, w, sum);
}

// The range of exponents of the normal operands in a set.
struct Exponents {
  unsigned above_subnormal = ~0u;  // smallest magnitude's bits minus CARRY; zeros and subnormals wrap around
  int highest = 0;

  MBM_MEMBER void add(float x) {
    int magnitude = bits<Lane>(x) & ~SIGN;
    // A user's function may treat subnormals in any way, so they rule out the fast form.
    if (M.form == CALL && unsigned(magnitude - 1) < CARRY - 1) magnitude = INFINITE;
    above_subnormal = min(above_subnormal, unsigned(magnitude) - CARRY);
    highest = max(highest, magnitude);
  }
  MBM_MEMBER void add(const Exponents& other) {
    above_subnormal = min(above_subnormal, other.above_subnormal);
    highest = max(highest, other.highest);
  }
  MBM_MEMBER bool empty() const { return highest < CARRY; }
  MBM_MEMBER int lowest_exponent() const { return int(above_subnormal >> FRACTION_BITS) + 1; }
  MBM_MEMBER int highest_exponent() const { return highest >> FRACTION_BITS; }
};

// Return whether the fast form is correct for all products of two sets.
MBM_FN bool in_range(const Exponents& pixels, const Exponents& weights) {
  // The IEEE form is correct for all operands, but padding must not meet an infinite weight: 0 * inf is NaN.
  if constexpr (M.form == IEEE) return weights.highest < INFINITE;
  // w's exponent is at most one above b's; a correction's is at most 6 below b's. Both must be normal and finite.
  if (pixels.highest >= INFINITE || weights.highest_exponent() > 253) return false;
  if (pixels.empty() || weights.empty()) return true;
  // Products with exponent field 24 or more are multiples of 2^-126. So are their sums, so none is subnormal.
  return weights.lowest_exponent() > 6 && pixels.lowest_exponent() + weights.lowest_exponent() - BIAS > FRACTION_BITS &&
         pixels.highest_exponent() + weights.highest_exponent() - BIAS < 254;
}

MBM_FN unsigned warp_max(unsigned x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(~0u, x);
#else
  for (int lane = 16; lane > 0; lane /= 2) x = max(x, __shfl_xor_sync(~0u, x, lane));
  return x;
#endif
}

// Combine several sets of exponents over the whole block. All threads must call this, once per kernel.
template <int SETS> MBM_FN void combine(Exponents (&sets)[SETS]) {
  __shared__ Exponents of_warp[THREADS / 32][SETS];
#pragma unroll
  for (int i = 0; i < SETS; i++) {
    Exponents warp{~warp_max(~sets[i].above_subnormal), int(warp_max(sets[i].highest))};
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][i] = warp;
  }
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++)
#pragma unroll
    for (int i = 0; i < SETS; i++) sets[i].add(of_warp[warp][i]);
}

}  // namespace mbm
