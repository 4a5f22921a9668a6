// The multiplier for both kinds of kernels: its parameters, its product by definition, and a fast form of that product.
//
// NVRTC compiles this file for CUDA (one lane: int and float). The C++ compiler compiles it for the CPU (GCC vector
// types), so one source serves every SIMD width. The file includes nothing because NVRTC has no headers.
//
// Source: Saadat, Bokhari, Parameswaran, "Minimally Biased Multipliers for Approximate Integer and Floating-Point
// Multiplication", IEEE TCAD 37(11), 2018 (AFMB-t). The tests compare with the model in mbm_cli/multipliers/float32.py.
#pragma once

#if defined(__CUDACC__)
#define MBM_FN static __device__ __forceinline__
#else
#define MBM_FN static inline __attribute__((always_inline))
#endif

namespace mbm {

constexpr int FRACTION_BITS = 23;
constexpr int BIAS = 127;
constexpr int ONE = BIAS << FRACTION_BITS;  // bits of 1.0f
constexpr int TWO = (BIAS + 1) << FRACTION_BITS;
constexpr int SIGN = int(0x80000000u);
constexpr int INFINITE = 0x7F800000;
constexpr int NOT_A_NUMBER = 0x7FC00000;
constexpr int CARRY = 1 << FRACTION_BITS;
constexpr int FRACTION = CARRY - 1;
// The error reduction c = 2^-4 + 2^-6.
constexpr int CORRECTION = (1 << (FRACTION_BITS - 4)) + (1 << (FRACTION_BITS - 6));

// Tables of up to this many bits fit in a GPU's shared memory, and each of their rows in the CPU's AVX-512 registers.
constexpr int TABLE_BITS = 7;

enum Family { EXACT, MITCHELL, MBM, DRUM, TABLE, FUNCTION };
#if !defined(__CUDACC__)
constexpr const char* FAMILY_NAMES[] = {"exact", "mitchell", "mbm", "drum", "table", "function"};
#endif

// How the fast form computes a product. Every kernel has a compile-time variant for each form.
enum Form {
  IEEE,        // family exact: a * b
  PLAIN,       // sum of the fractions, no correction (mitchell, and mbm with t > 19)
  ONE_LEVEL,   // PLAIN plus one constant below a threshold
  TWO_LEVELS,  // mbm with t = 17, where halving c and clearing its low bits do not commute
  TRUNCATED,   // drum: a * b, rounded toward zero, of operands with few bits
  LOOKUP,      // the product's fraction from a table of up to TABLE_BITS bits
  LOOKUP_WIDE, // the product's fraction from a larger table
  CALL,        // MBM_FUNCTION, a user's function of the bit patterns
};

// An entry of a table, which is indexed [fraction of b][fraction of a].
#if defined(__CUDACC__)
typedef unsigned short TableEntry;  // fraction bits of the product, with the carry above them
#else
typedef float TableEntry;  // product of the significands
#endif

struct Multiplier {
  Form form;
  int operand_keep;      // mask of the fraction bits kept in an operand
  int operand_set;       // mask of the fraction bits set in an operand (bit t, for mbm and drum with t > 0)
  int correction;        // c without a carry
  int correction_carry;  // c with a carry
  int result_keep;       // mask of the fraction bits kept in the product
  int table_bits;        // fraction bits of a table's operands and products
  const TableEntry* table;
};

constexpr bool is_lookup(const Multiplier& m) { return m.form == LOOKUP || m.form == LOOKUP_WIDE; }

// Return whether drum's product of two operands can have more bits than a float.
constexpr bool is_rounded(const Multiplier& m) { return m.form == TRUNCATED && m.operand_set < 1 << 12; }

constexpr int keep_from(int bit) { return FRACTION & ~((1 << bit) - 1); }

// `bits` is the number of fraction bits that each operand loses; for a table, the number that each operand has.
constexpr Multiplier make_multiplier(Family family, int bits, int result_bits) {
  int truncate = family == TABLE ? FRACTION_BITS - bits : bits;
  int c0 = family == MBM ? CORRECTION & keep_from(truncate) : 0;
  int c1 = family == MBM ? (CORRECTION >> 1) & keep_from(truncate) : 0;
  Form form = PLAIN;
  if (c0 != 0) form = c1 == 0 || c0 == 2 * c1 ? ONE_LEVEL : TWO_LEVELS;
  if (family == EXACT) form = IEEE;
  if (family == DRUM) form = TRUNCATED;
  if (family == TABLE) form = bits <= TABLE_BITS ? LOOKUP : LOOKUP_WIDE;
  if (family == FUNCTION) form = CALL;
  int set = (family == MBM || family == DRUM) && truncate > 0 ? 1 << truncate : 0;
  return {form, keep_from(truncate), set, c0, c1, keep_from(FRACTION_BITS - result_bits), FRACTION_BITS - truncate,
          nullptr};
}

// Return whether low bits of the fast form's product must be cleared. In the published forms (mbm-t16-r7 and the like)
// these bits are zero already.
constexpr bool result_is_masked(const Multiplier& m) {
  if (is_lookup(m) || m.form == CALL) return false;
  int lowest_kept = m.result_keep & -m.result_keep;
  // Every sum of two fractions is a multiple of this.
  int operand = m.operand_set ? 2 * m.operand_set : m.operand_keep & -m.operand_keep;
  if (m.form == TRUNCATED) {
    // In units of 2^-23, both operands are multiples of operand_set, so their product is a multiple of its square. A
    // carry shifts the product right by one more bit. A product without a mask is exact and can be fused with the
    // addition that follows.
    long long square = (long long)m.operand_set * m.operand_set;
    return square < (2LL * lowest_kept << FRACTION_BITS);
  }
  int shifted = operand | m.correction;  // the sum without a carry, which renormalisation may halve
  int result = operand | m.correction_carry | (m.correction == 0 ? 0 : (shifted >> 1) | (shifted & 1));
  return (result & -result) < lowest_kept;
}

// The operations that differ between one lane on the GPU and a vector of lanes on the CPU. L::I holds 32-bit integers,
// L::F floats.
#if defined(__CUDACC__)
template <class L> MBM_FN int bits(float x) { return __float_as_int(x); }
template <class L> MBM_FN float from_bits(int x) { return __int_as_float(x); }
// In PTX, so that the compiler cannot contract the product into an FMA, and subnormals survive CuPy's option -ftz=true.
MBM_FN float multiply_to_nearest(float a, float b) {
  float p;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(p) : "f"(a), "f"(b));
  return p;
}
MBM_FN float multiply_toward_zero(float a, float b) {
  float p;
  asm("mul.rz.f32 %0, %1, %2;" : "=f"(p) : "f"(a), "f"(b));
  return p;
}
// Return the bits of the product of two significands.
template <class L> MBM_FN int look_up(int index, const Multiplier& m) {
  return ONE + (int(m.table[index]) << (FRACTION_BITS - m.table_bits));
}
template <class L> MBM_FN int call(int a, int b) {
#if defined(MBM_FUNCTION)
  return int(MBM_FUNCTION((unsigned)a, (unsigned)b));
#else
  return a ^ b;  // not reached
#endif
}
#else
template <class L> MBM_FN typename L::I bits(typename L::F x) { return __builtin_bit_cast(typename L::I, x); }
template <class L> MBM_FN typename L::F from_bits(typename L::I x) { return __builtin_bit_cast(typename L::F, x); }
template <class F> MBM_FN F multiply_to_nearest(F a, F b) { return a * b; }
// The caller sets the rounding mode, because setting it here would cost more than the product.
template <class F> MBM_FN F multiply_toward_zero(F a, F b) { return a * b; }
template <class L> MBM_FN typename L::I look_up(typename L::I index, const Multiplier& m) {
  return bits<L>(L::gather(m.table, index));
}
template <class L> MBM_FN typename L::I call(typename L::I a, typename L::I b) { return L::call(a, b); }
// Return w + c where the condition holds, else w.
template <class L> MBM_FN typename L::F add_where(typename L::F w, typename L::I where, float c) {
#if defined(__AVX512F__)
  return where ? w + c : w;  // one masked addition
#else
  return w + from_bits<L>(where & __builtin_bit_cast(int, c));
#endif
}
#endif

// Clear the dropped fraction bits of a finite number, and leave infinities and NaN unchanged (family exact).
template <class L> MBM_FN typename L::F truncate_finite(typename L::F a, int keep) {
  typename L::I i = bits<L>(a);
  return from_bits<L>((i & INFINITE) == INFINITE ? i : i & (keep | ~FRACTION));
}

// Return the IEEE product of operands truncated by truncate_finite. The mask preserves infinities, and it preserves NaN
// because a computed NaN has its first fraction bit set. It also keeps the compiler from fusing the product with the
// addition that follows.
template <class L> MBM_FN typename L::F ieee_product(typename L::F a, typename L::F b, const Multiplier& m) {
  return from_bits<L>(bits<L>(multiply_to_nearest(a, b)) & (m.result_keep | ~FRACTION));
}

// A product's index in the table is table_row | table_column. The weight b selects the row, because a kernel looks up
// many pixels for one weight.
template <class T> MBM_FN T table_row(T fraction_of_b, const Multiplier& m) {
  return (fraction_of_b >> (FRACTION_BITS - m.table_bits)) << m.table_bits;
}
template <class T> MBM_FN T table_column(T fraction_of_a, const Multiplier& m) {
  return fraction_of_a >> (FRACTION_BITS - m.table_bits);
}

// Multiply the significands 1 + x and 1 + y by the family's definition. Return the carry into the exponent above the
// product's 23 fraction bits, as in a float; the result is below 2^24.
template <class L> MBM_FN typename L::I carry_and_fraction(typename L::I x, typename L::I y, const Multiplier& m) {
  using I = typename L::I;
  const I zero = {};
  if (is_lookup(m)) return look_up<L>(table_row(y, m) | table_column(x, m), m) - ONE;
  x = (x & m.operand_keep) | m.operand_set, y = (y & m.operand_keep) | m.operand_set;
  if (m.form == TRUNCATED)
    return bits<L>(multiply_toward_zero(from_bits<L>(x | ONE), from_bits<L>(y | ONE))) - ONE;
  I sum = x + y;
  I f = sum & FRACTION;
  I g = f + (sum >= CARRY ? zero + m.correction_carry : zero + m.correction);
  g = (sum >= CARRY) & (g >= CARRY) ? f : g;  // after a carry, skip a correction that would overflow
  I carry = (sum >> FRACTION_BITS) + (g >> FRACTION_BITS);
  return (carry << FRACTION_BITS) | (g >= CARRY ? (g - CARRY) >> 1 : g);
}

// Multiply any operands by the definition, special values included. On the CPU the caller sets the rounding mode to
// rounding_of_products.
template <class L> MBM_FN typename L::F product(typename L::F fa, typename L::F fb, const Multiplier& m) {
  using I = typename L::I;
  if (m.form == CALL) return from_bits<L>(call<L>(bits<L>(fa), bits<L>(fb)));
  if (m.form == IEEE) {
    I p = bits<L>(ieee_product<L>(truncate_finite<L>(fa, m.operand_keep), truncate_finite<L>(fb, m.operand_keep), m));
    return from_bits<L>((p & ~SIGN) > INFINITE ? I{} + NOT_A_NUMBER : p);
  }
  const I zero = {};
  I a = bits<L>(fa), b = bits<L>(fb);
  I sign = (a ^ b) & SIGN;
  I ea = (a & INFINITE) >> FRACTION_BITS, eb = (b & INFINITE) >> FRACTION_BITS;
  I w = carry_and_fraction<L>(a & FRACTION, b & FRACTION, m);
  I e = ea + eb - BIAS + (w >> FRACTION_BITS);
  I p = sign | (e << FRACTION_BITS) | (w & m.result_keep);
  p = e <= 0 ? sign : p;
  p = e >= 255 ? sign | INFINITE : p;
  p = (ea == 0) | (eb == 0) ? sign : p;  // subnormal operands count as zero
  p = (ea == 255) | (eb == 255) ? sign | INFINITE : p;
  I nan = ((a & ~SIGN) > INFINITE) | ((b & ~SIGN) > INFINITE);
  nan = nan | ((ea == 255) & (eb == 0)) | ((ea == 0) & (eb == 255));
  return from_bits<L>(nan != 0 ? zero + NOT_A_NUMBER : p);
}

// Decode an operand of the fast form into its signed power of two (a signed zero for zero and subnormals) and its
// fraction bits.
template <class L> MBM_FN typename L::F decode_power(typename L::F a) { return from_bits<L>(bits<L>(a) & ~FRACTION); }
template <class L> MBM_FN typename L::I decode_fraction(typename L::F a, const Multiplier& m) {
  return (bits<L>(a) & m.operand_keep) | m.operand_set;
}
// Decode an operand of the form TRUNCATED: clear the dropped bits and set the lowest kept one. Zero and subnormals
// become a signed zero.
template <class L> MBM_FN typename L::F decode_truncated(typename L::F a, const Multiplier& m) {
  typename L::I i = bits<L>(a), kept = (i & ~FRACTION) | (i & m.operand_keep) | m.operand_set;
  return from_bits<L>((i & INFINITE) == 0 ? i & SIGN : kept);
}

#if !defined(__CUDACC__)
// Return the significand of the product, in [1, 4), from one operand's fraction and ONE plus the other's fraction.
// - The integer addition puts the sum of the fractions into a float's fraction and its carry into the exponent. This is
//   Mitchell's product.
// - A float addition adds the correction. It renormalises where the definition shifts right and truncates. The shift
//   drops a nonzero bit only for t = 0, and that bit is half a unit in the last place. Making the constant smaller by
//   2^-25 rounds such a sum down, although the mode is to nearest, and changes no other sum.
// - After a carry the same constant counts half, as c does in the definition.
// - A threshold on the sum's bits decides where the correction is skipped.
// With the operands' powers of two A and B, the product is (A * B) * significand. That is exact as long as no power of
// two leaves the normal range.
template <class L, Form FORM, bool MASKED>
MBM_FN typename L::F significand(typename L::I x, typename L::I one_plus_y, const Multiplier& m) {
  using F = typename L::F;
  typename L::I sum = x + one_plus_y;
  F w = from_bits<L>(sum);
  if constexpr (FORM == ONE_LEVEL || FORM == TWO_LEVELS) {
    constexpr float UNIT = 1.0f / CARRY;
    // With c1 = 0 (t >= 19), a sum with a carry gets no correction.
    int threshold = m.correction_carry == 0 ? TWO : ONE + 2 * CARRY - m.correction_carry;
    float c = UNIT * m.correction - (m.operand_set == 0 ? 0x1p-25f : 0.0f);
    if constexpr (FORM == TWO_LEVELS) {
      float twice_c1 = UNIT * 2 * m.correction_carry;
      w = add_where<L>(w, sum < threshold, twice_c1);
      w = add_where<L>(w, sum < TWO, c - twice_c1);
    } else {
      w = add_where<L>(w, sum < threshold, c);
    }
  }
  if constexpr (MASKED) w = from_bits<L>(bits<L>(w) & (m.result_keep | ~FRACTION));
  return w;
}
#endif

}  // namespace mbm
