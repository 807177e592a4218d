// Activations in 8 bits, and the exact products of them with unsigned weights.
//
// Per 32 inputs of a row: scale = largest / 127, quant = round(value / scale), ties to even; as llama.cpp's q8_0, but with
// the scale in float32.
#pragma once

#include "linear_weight.h"
#include "vector.h"

namespace IL_ISA {

using interlace::BLOCK;

constexpr int QUADS = BLOCK / 4;

#if defined(IL_AVX512)
constexpr int BLOCK_TILE_ROWS = 6;  // 6 x 32 results: 12 sums of integers and 12 totals in 32 registers
typedef int8_t Quant;  // vpdpbusd takes bytes
#elif defined(IL_AVX2)
constexpr int BLOCK_TILE_ROWS = 4;
typedef int16_t Quant;  // pairs of 16-bit products cannot overflow; those of bytes could: 255 * 127 * 2
#else
constexpr int BLOCK_TILE_ROWS = 2;
typedef int16_t Quant;
#endif

// One block of a row.
struct ActBlock {
  Quant quants[BLOCK];
  float scale;
  float scaled_sum;   // scale * sum of quants
  int32_t offset;     // -128 * sum of quants: what weights stored as value + 128 add too much
  int32_t halves[2];  // the same of the first and the last 16
};

// Over the lanes, by halves.
typedef int32_t vint4 __attribute__((vector_size(16), aligned(4), may_alias));

template <typename Combine>
inline int32_t over_lanes(vint values, Combine combine) {
  vint4 parts[LANES / 4];
  std::memcpy(parts, &values, sizeof values);
  for (int count = LANES / 8; count > 0; count /= 2)
    for (int at = 0; at < count; ++at) parts[at] = combine(parts[at], parts[at + count]);
  vint4 part = parts[0];
  part = combine(part, __builtin_shuffle(part, vint4{2, 3, 0, 1}));
  part = combine(part, __builtin_shuffle(part, vint4{1, 0, 3, 2}));
  return part[0];
}

constexpr int BLOCK_VECTORS = BLOCK / LANES;

// The largest magnitude. As bits they are in order as whole numbers are, NaN last.
inline float largest_of(const vfloat (&x)[BLOCK_VECTORS]) {
  vint largest{};
  for (int at = 0; at < BLOCK_VECTORS; ++at) {
    const vint bits = (vint)x[at] & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
#if defined(IL_AVX512)
  const __m256i half = _mm256_max_epi32(_mm512_maskz_extracti64x4_epi64(0xf, (__m512i)largest, 0),
                                        _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)largest, 1));
  __m128i part = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  part = _mm_max_epi32(part, _mm_shuffle_epi32(part, 0x4e));
  const int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(part, _mm_shuffle_epi32(part, 0xb1)));
#else
  const int32_t bits = over_lanes(largest, [](vint4 a, vint4 b) { return a > b ? a : b; });
#endif
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// To the nearest whole numbers, ties to even: adding 1.5 * 2^23 rounds, and leaves the number in the low bits.
inline vint rounded(vfloat x, float factor) {
  return (vint)(x * broadcast(factor) + broadcast(12582912.0f)) - 0x4b400000;
}

// Quants of a block in the order the products take them, and the sums of its halves.
inline void put_quants(const vfloat (&x)[BLOCK_VECTORS], float inverse, Quant *quants, int32_t *sums) {
#if defined(IL_AVX512)
  const __m128i first = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)rounded(x[0], inverse));
  const __m128i last = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)rounded(x[1], inverse));
  const __m256i all = _mm256_inserti128_si256(_mm256_castsi128_si256(first), last, 1);
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(quants), all);
  __m256i sum = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), all);
  sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0x4e));
  sum = _mm256_add_epi32(sum, _mm256_shuffle_epi32(sum, 0xb1));
  sums[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
  sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
#else
  constexpr int PLACES[4] = {0, 2, 1, 3};  // of four: even ones, odd ones
  alignas(32) int32_t whole[BLOCK];
  for (int half = 0; half < 2; ++half) {
    vint sum{};
    for (int at = half * BLOCK_VECTORS / 2; at < (half + 1) * BLOCK_VECTORS / 2; ++at) {
      const vint some = rounded(x[at], inverse);
      sum += some;
      *reinterpret_cast<vint *>(whole + at * LANES) = some;
    }
    sums[half] = over_lanes(sum, [](vint4 a, vint4 b) { return a + b; });
  }
  // A scale that is not finite makes quants of any size: cut to bytes, their sums cannot overflow.
  for (int at = 0; at < BLOCK; ++at) quants[at] = static_cast<int8_t>(whole[at / 4 * 4 + PLACES[at % 4]]);
#endif
}

// 0 if its inverse would overflow.
inline float scale_of(const vfloat (&x)[BLOCK_VECTORS]) {
  const float scale = largest_of(x) * (1.0f / 127.0f);
  return scale < 1.2e-38f ? 0.0f : scale;
}

// A scale that is not finite makes the results of the row so.
inline void quantize_block(const vfloat (&x)[BLOCK_VECTORS], ActBlock *to) {
  to->scale = scale_of(x);
  int32_t sums[2];
  put_quants(x, to->scale == 0.0f ? 0.0f : 1.0f / to->scale, to->quants, sums);
  to->scaled_sum = to->scale * static_cast<float>(sums[0] + sums[1]);
  to->offset = -128 * (sums[0] + sums[1]);
  to->halves[0] = -128 * sums[0];
  to->halves[1] = -128 * sums[1];
}

// Block `block` of a row of `size` inputs; what is past the end counts as zero.
template <typename T>
inline void quantize(const T *x, int64_t size, int64_t block, ActBlock *to) {
  const int64_t first = block * BLOCK;
  vfloat values[BLOCK_VECTORS];
  if (first + BLOCK <= size) {
    for (int at = 0; at < BLOCK_VECTORS; ++at) values[at] = load(x + first + at * LANES);
  } else {
    for (int at = 0; at < BLOCK; ++at) values[at / LANES][at % LANES] = first + at < size ? to_float(x[first + at]) : 0.0f;
  }
  quantize_block(values, to);
}

// ── sums of four products in each lane: unsigned weights, signed activations, exact ─────────────────────────────────

#if defined(IL_AVX512)
inline vint add_products(vint sum, vuint weights, const Quant *quad) {
  int32_t four;
  std::memcpy(&four, quad, 4);
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(four));
}
#elif defined(__SSE2__)
inline vint add_pairs(vint sum, vuint weights, const Quant *pair) {
  int32_t two;
  std::memcpy(&two, pair, 4);
#if defined(IL_AVX2)
  return sum + (vint)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(two));
#else
  return sum + (vint)_mm_madd_epi16((__m128i)weights, _mm_set1_epi32(two));
#endif
}
inline vint add_products(vint sum, vuint weights, const Quant *quad) {
  sum = add_pairs(sum, weights & 0x00ff00ffu, quad);
  return add_pairs(sum, (weights >> 8) & 0x00ff00ffu, quad + 2);
}
#else
inline vint add_products(vint sum, vuint weights, const Quant *quad) {
  constexpr int PLACES[4] = {0, 2, 1, 3};
  for (int at = 0; at < 4; ++at) sum += (vint)((weights >> (8 * at)) & 0xffu) * int32_t{quad[PLACES[at]]};
  return sum;
}
#endif

}  // namespace IL_ISA
