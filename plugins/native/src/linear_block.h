// Products with weights in blocks of small integers, by activations in 8 bits (linear_quant.h).
//
// With w = d * (u - z) or d * u + m a result is, block after block in order and for any number of rows,
//   total += d * (scale * sum((u - z) * quant))  [+ m * (scale * sum(quant))]
// where the sums of integers are exact.
#pragma once

#include "linear_tile.h"

namespace IL_ISA {

inline vfloat load_half(const uint8_t *from) {
#if defined(IL_AVX512)
  return (vfloat)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#elif defined(IL_AVX2)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
#else
  const vuint half = __builtin_convertvector(*reinterpret_cast<const vhalf *>(from), vuint);
  const vuint exponent = half & 0x7c00u, mantissa = half & 0x3ffu, sign = (half & 0x8000u) << 16;
  const vuint large = ((exponent | mantissa) << 13) + (112u << 23);
  const vuint special = 0x7f800000u | (mantissa << 13);
  const vfloat small = __builtin_convertvector((vint)mantissa, vfloat) * broadcast(0x1p-24f);
  const vint is_small = exponent == 0u, is_special = exponent == 0x7c00u;
  const vuint magnitude = is_small ? (vuint)small : (is_special ? special : large);
  return (vfloat)(magnitude | sign);
#endif
}

// ── formats ─────────────────────────────────────────────────────────────────────────────────────────────────────────
// quad(words, q): inputs 4 q to 4 q + 3 of LANES rows as unsigned bytes; words are STRIP apart (see linear_blocks.cpp).

inline vuint word(const uint8_t *words, int at) {
  return *reinterpret_cast<const vuint *>(words + at * STRIP * 4);
}

inline vuint nibble(const uint8_t *words, int quad) {
  return (quad < 4 ? word(words, quad) : word(words, quad - 4) >> 4) & 0x0f0f0f0fu;
}

template <int BITS>
inline vuint quad_of(const uint8_t *words, int quad) {
  if (BITS == 8) return word(words, quad);
  const vuint low = nibble(words, quad);
  if (BITS == 4) return low;
  if (BITS == 5) return low | (((word(words, 4) >> quad) & 0x01010101u) << 4);
  return low | (((word(words, 4 + quad / 4) >> (2 * (quad % 4))) & 0x03030303u) << 4);
}

// Where the scales of LANES rows of a block are.
struct ScalePlace {
  const uint8_t *scales;  // of the strip's block, [parts][16 rows]
  const uint8_t *supers;
  int lane;  // first row of the vector in its strip
};

inline vfloat half_part(const uint8_t *parts, int part, int lane) { return load_half(parts + (part * STRIP + lane) * 2); }

template <typename T>
inline vfloat byte_part(const uint8_t *parts, int part, int lane) {
  typedef T bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
  return __builtin_convertvector(
      __builtin_convertvector(*reinterpret_cast<const bytes *>(parts + part * STRIP + lane), vint), vfloat);
}

// BITS of a value; ZERO: what is subtracted from it; HAS_MIN: a minimum is added instead; GROUPS that have own scales.
template <int BITS_, int ZERO_, bool HAS_MIN_, int GROUPS_, bool K_, int SCALE_PARTS>
struct BlockLayout {
  static constexpr int BITS = BITS_, WORDS = BITS_, ZERO = ZERO_, GROUPS = GROUPS_;
  static constexpr bool HAS_MIN = HAS_MIN_, K = K_, HAS_SCALE = SCALE_PARTS > 0;
  static constexpr int SCALE_BYTES = SCALE_PARTS * (K_ ? 1 : 2), SUPER_BYTES = K_ ? (HAS_MIN_ ? 4 : 2) : 0;
  static constexpr int64_t STRIP_BYTES = interlace::strip_bytes(WORDS, SCALE_BYTES);

  static vfloat scale(const ScalePlace &at, int group) {
    if constexpr (!K) return half_part(at.scales, 0, at.lane);
    else if constexpr (HAS_MIN) return half_part(at.supers, 0, at.lane) * byte_part<uint8_t>(at.scales, 0, at.lane);
    else return half_part(at.supers, 0, at.lane) * byte_part<int8_t>(at.scales, group, at.lane);
  }
  static vfloat minimum(const ScalePlace &at) {
    if constexpr (K) return -half_part(at.supers, 1, at.lane) * byte_part<uint8_t>(at.scales, 1, at.lane);
    else return half_part(at.scales, 1, at.lane);
  }
};

using Int8 = BlockLayout<8, 128, false, 1, false, 0>;
using Q4_0 = BlockLayout<4, 8, false, 1, false, 1>;
using Q4_1 = BlockLayout<4, 0, true, 1, false, 2>;
using Q5_0 = BlockLayout<5, 16, false, 1, false, 1>;
using Q5_1 = BlockLayout<5, 0, true, 1, false, 2>;
using Q8_0 = BlockLayout<8, 128, false, 1, false, 1>;
using Q4_K = BlockLayout<4, 0, true, 1, true, 2>;
using Q5_K = BlockLayout<5, 0, true, 1, true, 2>;
using Q6_K = BlockLayout<6, 32, false, 2, true, 2>;

// Stored with a zero of 128, whatever the format's: one offset of the activations serves all.
template <typename F>
inline vuint weights_of(const uint8_t *words, int quad) {
  const vuint stored = quad_of<F::BITS>(words, quad);
  if constexpr (F::HAS_MIN || F::ZERO == 128) return stored;
  return stored + (128 - F::ZERO) * 0x01010101u;
}

// Vectors of outputs that share a loaded activation. Loads are what limits these products (two in a cycle, as many as
// vpdpbusd), so it takes more than one.
constexpr int SHARING = 2;
constexpr int TOTAL_VECTORS = interlace::BLOCK_STRIPS * STRIP / LANES;

// total += one block of SHARING vectors; `words` and `places` are theirs.
template <typename F, int ROWS>
inline __attribute__((always_inline)) void add_block(const uint8_t *const (&words)[SHARING],
                                                     const ScalePlace (&places)[SHARING], const ActBlock *const (&x)[ROWS],
                                                     vfloat (&total)[ROWS][SHARING]) {
  constexpr int GROUP_QUADS = QUADS / F::GROUPS;
#pragma GCC unroll 2
  for (int group = 0; group < F::GROUPS; ++group) {
    vint sum[ROWS][SHARING];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      const int32_t offset = F::HAS_MIN ? 0 : F::GROUPS == 1 ? x[row]->offset : x[row]->halves[group];
#pragma GCC unroll 2
      for (int at = 0; at < SHARING; ++at) sum[row][at] = vint{} + offset;
    }
#pragma GCC unroll 8
    for (int quad = group * GROUP_QUADS; quad < group * GROUP_QUADS + GROUP_QUADS; ++quad) {
      const vuint weights[SHARING] = {weights_of<F>(words[0], quad), weights_of<F>(words[1], quad)};
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int at = 0; at < SHARING; ++at)
          sum[row][at] = add_products(sum[row][at], weights[at], x[row]->quants + 4 * quad);
    }
#pragma GCC unroll 2
    for (int at = 0; at < SHARING; ++at) {
      vfloat scale{};
      if constexpr (F::HAS_SCALE) scale = F::scale(places[at], group);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const vfloat scaled = __builtin_convertvector(sum[row][at], vfloat);
        if constexpr (F::HAS_SCALE)
          total[row][at] += scaled * x[row]->scale * scale;
        else
          total[row][at] += scaled * x[row]->scale;
      }
    }
  }
  if constexpr (F::HAS_MIN) {
#pragma GCC unroll 2
    for (int at = 0; at < SHARING; ++at) {
      const vfloat minimum = F::minimum(places[at]);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) total[row][at] += minimum * x[row]->scaled_sum;
    }
  }
}

template <typename F, int ROWS>
void block_tile(const Tile &tile) {
  constexpr int STRIPS = interlace::BLOCK_STRIPS, PER_STRIP = STRIP / LANES;
  const Panel &panel = *tile.panel;
  vfloat results[ROWS][TOTAL_VECTORS];
  for (int vector = 0; vector < TOTAL_VECTORS; vector += SHARING) {
    vfloat total[ROWS][SHARING] = {};
    const ActBlock *x[ROWS];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) x[row] = reinterpret_cast<const ActBlock *>(tile.x + row * tile.x_stride);
    const uint8_t *ahead = tile.ahead.first;
    for (int64_t block = 0; block < tile.depth; ++block) {
      if (block == tile.ahead.turn) ahead = tile.ahead.second;
      for (int64_t at = 0; vector == 0 && at < tile.ahead.step; at += 64) fetch(ahead + at);
      ahead += tile.ahead.step;
      const uint8_t *const first = panel.values + block * STRIPS * F::STRIP_BYTES, *words[SHARING];
      ScalePlace places[SHARING];
#pragma GCC unroll 2
      for (int at = 0; at < SHARING; ++at) {
        const int64_t strip = (vector + at) / PER_STRIP;
        const int lane = (vector + at) % PER_STRIP * LANES;
        words[at] = first + (strip * F::WORDS * STRIP + lane) * 4;
        places[at] = {first + (STRIPS * F::WORDS * 4 + strip * F::SCALE_BYTES) * STRIP,
                      panel.supers + (block / 8 * STRIPS + strip) * F::SUPER_BYTES * STRIP, lane};
      }
      add_block<F, ROWS>(words, places, x, total);
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) ++x[row];
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
      for (int at = 0; at < SHARING; ++at) results[row][vector + at] = total[row][at];
  }
  for (int row = 0; row < ROWS; ++row) {
    if constexpr (!F::HAS_SCALE)  // one scale per output
      for (int vector = 0; vector < TOTAL_VECTORS; ++vector)
        results[row][vector] *= load(reinterpret_cast<const float *>(panel.scales) + vector * LANES);
    put_row(tile, row, results[row]);
  }
}

template <typename F, int ROWS = BLOCK_TILE_ROWS>
inline TileKernel block_kernel_of(int64_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return block_kernel_of<F, ROWS - 1>(rows);
  }
  return block_tile<F, ROWS>;
}

// `visit(layout)` of a format in blocks.
template <typename Visit>
inline auto with_layout(int32_t format, Visit visit) {
  switch (format) {
    case IL_FMT_INT8: return visit(Int8{});
    case IL_FMT_Q4_0: return visit(Q4_0{});
    case IL_FMT_Q4_1: return visit(Q4_1{});
    case IL_FMT_Q5_0: return visit(Q5_0{});
    case IL_FMT_Q5_1: return visit(Q5_1{});
    case IL_FMT_Q8_0: return visit(Q8_0{});
    case IL_FMT_Q4_K: return visit(Q4_K{});
    case IL_FMT_Q5_K: return visit(Q5_K{});
    default: return visit(Q6_K{});
  }
}

inline TileKernel block_kernel(int32_t format, int64_t rows) {
  return with_layout(format, [&](auto layout) { return block_kernel_of<decltype(layout)>(rows); });
}

// Of a panel's block.
inline int64_t block_bytes(int32_t format) {
  return with_layout(format, [](auto layout) { return interlace::BLOCK_STRIPS * decltype(layout)::STRIP_BYTES; });
}

}  // namespace IL_ISA
