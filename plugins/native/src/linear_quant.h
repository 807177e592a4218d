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
constexpr int BLOCK_TILE_ROWS = 8;
typedef int8_t Quant;  // vpdpbusd takes bytes
#elif defined(IL_AVX2)
constexpr int BLOCK_TILE_ROWS = 4;
typedef int16_t Quant;  // pairs of 16-bit products cannot overflow; those of bytes could: 255 * 127 * 2
#else
constexpr int BLOCK_TILE_ROWS = 2;
typedef int16_t Quant;
#endif

// One block of the rows of a tile, side by side, so that a kernel follows one pointer.
template <int ROWS>
struct ActBlock {
  Quant quads[QUADS][ROWS][4];
  float scale[ROWS];
  float scaled_sum[ROWS];   // scale * sum of quants
  int32_t offset[ROWS];     // -128 * sum of quants: what weights stored as value + 128 add too much
  int32_t halves[2][ROWS];  // the same of the first and the last 16
};

// The same for a number of rows known at run time only: where the parts of row `row` of `rows` are.
struct ActRow {
  uint8_t *block;
  int64_t rows, row;

  uint8_t *quad(int at) const { return block + (at * rows + row) * 4 * sizeof(Quant); }
  void put(int part, const void *value) const {
    std::memcpy(block + (QUADS * sizeof(Quant) + part) * 4 * rows + 4 * row, value, 4);
  }
};
constexpr int64_t ACT_BYTES = sizeof(ActBlock<1>);  // per row and block

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
inline int32_t largest_of(vint values) {
  return over_lanes(values, [](vint4 a, vint4 b) { return a > b ? a : b; });
}
inline int32_t sum_of(vint values) {
  return over_lanes(values, [](vint4 a, vint4 b) { return a + b; });
}

// In the order the products take them.
inline void put_quads(const ActRow &to, const int8_t *quants) {
  for (int at = 0; at < QUADS; ++at) {
    if (sizeof(Quant) == 1) {
      std::memcpy(to.quad(at), quants + 4 * at, 4);
    } else {  // even ones, odd ones
      const int8_t *q = quants + 4 * at;
      const int16_t pairs[4] = {q[0], q[2], q[1], q[3]};
      std::memcpy(to.quad(at), pairs, sizeof pairs);
    }
  }
}

// One block of a row. A scale that is not finite makes the results of the row so.
inline void quantize_block(const float *x, const ActRow &to) {
  typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
  vint largest{};
  for (int at = 0; at < BLOCK; at += LANES) {
    const vint bits = (vint)load(x + at) & 0x7fffffff;  // as whole numbers these are in order, NaN last
    largest = bits > largest ? bits : largest;
  }
  const int32_t largest_bits = largest_of(largest);
  float scale;
  std::memcpy(&scale, &largest_bits, 4);
  scale *= 1.0f / 127.0f;
  const bool tiny = scale < 1.2e-38f;  // its inverse would overflow
  const float inverse = tiny ? 0.0f : 1.0f / scale;
  scale = tiny ? 0.0f : scale;
  alignas(64) int8_t quants[BLOCK];
  int32_t sums[2];
  for (int half = 0; half < 2; ++half) {
    vint sum{};
    for (int at = 16 * half; at < 16 * half + 16; at += LANES) {
      // Adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves it in the low bits.
      const vint rounded = (vint)(load(x + at) * broadcast(inverse) + broadcast(12582912.0f)) - 0x4b400000;
      sum += rounded;
      *reinterpret_cast<bytes *>(quants + at) = __builtin_convertvector(rounded, bytes);
    }
    sums[half] = sum_of(sum);
  }
  put_quads(to, quants);
  const float scaled_sum = scale * static_cast<float>(sums[0] + sums[1]);
  const int32_t offsets[3] = {-128 * (sums[0] + sums[1]), -128 * sums[0], -128 * sums[1]};
  to.put(0, &scale);
  to.put(1, &scaled_sum);
  for (int at = 0; at < 3; ++at) to.put(2 + at, &offsets[at]);
}

// Block `block` of a row of `size` inputs; what is past the end counts as zero.
template <typename T>
inline void quantize(const T *x, int64_t size, int64_t block, const ActRow &to) {
  alignas(64) float values[BLOCK];
  const int64_t first = block * BLOCK;
  if (first + BLOCK <= size) {
    for (int at = 0; at < BLOCK; at += LANES) store(values + at, load(x + first + at));
  } else {
    for (int64_t at = 0; at < BLOCK; ++at) values[at] = first + at < size ? to_float(x[first + at]) : 0.0f;
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
