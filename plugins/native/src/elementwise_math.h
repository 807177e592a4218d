// Arithmetic on vectors that is the same in every place it is used: products and sums are fused where this says so and
// nowhere else by chance, so a value's bits never depend on which loop the compiler happened to put it in.
#pragma once

#include <cmath>
#include <limits>

#include "vector.h"

namespace IL_ISA {

// a * b + c, rounded once where the processor can.
inline vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(IL_AVX512)
  return reinterpret_cast<vfloat>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                  reinterpret_cast<__m512>(c)));
#elif defined(IL_AVX2)
  return reinterpret_cast<vfloat>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                                  reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline float fma(float a, float b, float c) {
#if defined(IL_AVX512) || defined(IL_AVX2)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger one; `b` where either is a NaN.
inline vfloat larger(vfloat a, vfloat b) {
#if defined(IL_AVX512)
  return reinterpret_cast<vfloat>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(IL_AVX2)
  return reinterpret_cast<vfloat>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// The smaller one; `b` where either is a NaN.
inline vfloat smaller(vfloat a, vfloat b) {
#if defined(IL_AVX512)
  return reinterpret_cast<vfloat>(
      _mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(IL_AVX2)
  return reinterpret_cast<vfloat>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// 1 / x within 1 unit in the last place; 0 where that is no normal number. x is finite or a NaN.
inline vfloat reciprocal(vfloat x) {
#if defined(IL_AVX512)
  const vfloat rough = reinterpret_cast<vfloat>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
  return fma(rough, fma(-x, rough, broadcast(1.0f)), rough);  // a step of Newton's doubles its 14 bits
#else
  return broadcast(1.0f) / x;
#endif
}

// All lanes into one, pairwise: each of the lower half with that of the upper half, and so on.
template <typename Fold>
inline float fold_lanes(vfloat value, Fold fold) {
#if defined(IL_AVX512) || defined(IL_AVX2)
#if defined(IL_AVX512)
  const __m512 all = reinterpret_cast<__m512>(value);
  const __m256 eight = fold.wide(_mm512_maskz_extractf32x8_ps(0xff, all, 0), _mm512_maskz_extractf32x8_ps(0xff, all, 1));
#else
  const __m256 eight = reinterpret_cast<__m256>(value);
#endif
  const __m128 four = fold.narrow(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = fold.narrow(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(fold.narrow(two, _mm_movehdup_ps(two)));
#else
  float part[LANES];
  store(part, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) part[lane] = fold.single(part[lane], part[lane + width]);
  return part[0];
#endif
}

struct FoldMax {
#if defined(IL_AVX512) || defined(IL_AVX2)
  static __m256 wide(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
  static __m128 narrow(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
#endif
  static float single(float a, float b) { return a > b ? a : b; }
};

struct FoldSum {
#if defined(IL_AVX512) || defined(IL_AVX2)
  static __m256 wide(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  static __m128 narrow(__m128 a, __m128 b) { return _mm_add_ps(a, b); }
#endif
  static float single(float a, float b) { return a + b; }
};

inline float max_lane(vfloat value) { return fold_lanes(value, FoldMax()); }
inline float sum_lanes(vfloat value) { return fold_lanes(value, FoldSum()); }

template <typename T>
inline vfloat load_some(const T *from, int64_t count) {
  if (count >= LANES) return load(from);
  T part[LANES] = {};
  for (int64_t at = 0; at < count; ++at) part[at] = from[at];
  return load(part);
}

template <typename T>
inline void store_some(T *to, vfloat value, int64_t count) {
  if (count >= LANES) return store(to, value);
  T part[LANES];
  store(part, value);
  for (int64_t at = 0; at < count; ++at) to[at] = part[at];
}

// What is left of `value` when it is stored as T and loaded again.
template <typename T>
inline vfloat rounded(vfloat value);
template <>
inline vfloat rounded<float>(vfloat value) {
  return value;
}
template <>
inline vfloat rounded<bf16>(vfloat value) {
#if defined(IL_AVX512)
  const __m256i half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(value)));
  return reinterpret_cast<vfloat>(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16));
#else
  bf16 narrow[LANES];
  store(narrow, value);
  return load(narrow);
#endif
}

// `body(at, count)` for every run of up to LANES values of a row.
template <typename Body>
inline void over_row(int64_t size, Body body) {
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) body(at, int64_t{LANES});
  if (at < size) body(at, size - at);
}

// A number rounded to a whole one, and 2 to that power, for -127 <= number <= 127; 2^-127 counts as 0.
struct Whole {
  vfloat number, power;

  // factor * x, rounded. Added to 1.5 * 2^23 it loses what lies behind the point; with 127 more, its last bits are the
  // exponent of the power.
  Whole(vfloat x, float factor) {
    const vfloat magic = broadcast(12582912.0f + 127.0f), shifted = fma(x, broadcast(factor), magic);
    number = shifted - magic;
    vuint bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    std::memcpy(&power, &bits, sizeof power);
  }
};

// x to the nearest whole number, for |x| < 2^22.
inline vfloat round_to_whole(vfloat x) {
  const vfloat magic = broadcast(12582912.0f);
  return (x + magic) - magic;
}

// 2^x for x <= 0, to 9e-5 with AVX-512, else 3e-6, where rounding to bfloat16 takes away up to 2e-3; 2^0 = 1 and, far
// below zero, 0 exactly. The polynomials here are minimax fits of (f(x) - 1) / x on the interval that is left without a
// whole number, weighted by x / f(x).
inline vfloat exp2_rough(vfloat x) {
#if defined(IL_AVX512)
  // What x is above the next whole number below it, which scaling by powers of two takes out of x itself.
  const __m512 whole_and_rest = reinterpret_cast<__m512>(x);
  const vfloat rest = reinterpret_cast<vfloat>(_mm512_maskz_reduce_ps(0xffff, whole_and_rest, _MM_FROUND_FLOOR));
  vfloat p = fma(rest, broadcast(0.07706704f), broadcast(0.227645f));
  p = fma(rest, p, broadcast(0.69511676f));
  p = fma(rest, p, broadcast(1.0f));
  return reinterpret_cast<vfloat>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), whole_and_rest));
#else
  x = larger(broadcast(-127.0f), x);
  const Whole whole(x, 1.0f);
  const vfloat rest = x - whole.number;
  vfloat p = fma(rest, broadcast(0.009582853f), broadcast(0.055906426f));
  p = fma(rest, p, broadcast(0.24024099f));
  p = fma(rest, p, broadcast(0.69312408f));
  return fma(rest, p, broadcast(1.0f)) * whole.power;
#endif
}

// e^x within 1 unit in the last place; e^0 = 1 exactly, exactly 0 below -87.7, where floats end, and e^88 beyond 88.
inline vfloat exp(vfloat x) {
  x = smaller(broadcast(88.0f), larger(broadcast(-88.0f), x));
  const Whole whole(x, 1.44269504f);
  // ln 2 in two parts (Cody and Waite), so that the remainder is exact to the last bit.
  vfloat rest = fma(whole.number, broadcast(-0.693145752f), x);
  rest = fma(whole.number, broadcast(-1.42860677e-6f), rest);
  vfloat p = fma(rest, broadcast(0.0013843654f), broadcast(0.0083741555f));
  p = fma(rest, p, broadcast(0.041668002f));
  p = fma(rest, p, broadcast(0.16666432f));
  p = fma(rest, p, broadcast(0.49999994f));
  p = fma(rest, p, broadcast(1.0f));
  return fma(rest, p, broadcast(1.0f)) * whole.power;
}

// 1 - 2 / (e^2x + 1), and near zero, where that cancels, the first terms of the series: a few units in the last place.
inline vfloat tanh(vfloat x) {
  const vfloat one = broadcast(1.0f), two = broadcast(2.0f), square = x * x;
  const vfloat far = fma(-two, reciprocal(exp(x * two) + one), one);
  vfloat p = fma(square, broadcast(62.0f / 2835), broadcast(-17.0f / 315));
  p = fma(square, p, broadcast(2.0f / 15));
  p = fma(square, p, broadcast(-1.0f / 3));
  return square < broadcast(0.09f) ? fma(x * square, p, x) : far;
}

}  // namespace IL_ISA
