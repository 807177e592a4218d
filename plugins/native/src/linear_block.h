// Products with weights in blocks of small integers, by activations rounded to 8 bits.
//
// Activations are quantised per 32 of a row: scale = largest / 127, quant = round(value / scale). With w = d * (u - z) or
// d * u + m a result is, block after block in order and for any number of rows,
//   total += d * (scale * sum((u - z) * quant))  [+ m * (scale * sum(quant))]
// where the sums of integers are exact.
#pragma once

#include "linear_tile.h"

namespace IL_ISA {

using interlace::BLOCK;

inline vint greater(vint a, vint b) { return a > b ? a : b; }

inline vfloat as_float(vint bits) { return (vfloat)bits; }

inline int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// One block. What is not finite makes the scale so, and with it the results of the row.
inline void quantize_block(const float *x, int8_t *quants, ActBlock &block) {
  vint largest{};
  for (int at = 0; at < BLOCK; at += LANES) largest = greater((vint)load(x + at) & 0x7fffffff, largest);
  int32_t largest_bits = 0;  // not negative, so as whole numbers they are in the order of the values, NaN last
  for (int lane = 0; lane < LANES; ++lane) largest_bits = largest[lane] > largest_bits ? largest[lane] : largest_bits;
  float scale;
  std::memcpy(&scale, &largest_bits, 4);
  scale *= 1.0f / 127.0f;
  const bool tiny = scale < 1.2e-38f;  // its inverse would overflow
  const float inverse = tiny ? 0.0f : 1.0f / scale;
  int32_t sums[2] = {0, 0};
  for (int half = 0; half < 2; ++half) {
    vint sum{};
    for (int at = 16 * half; at < 16 * half + 16; at += LANES) {
      // Adding 1.5 * 2^23 rounds to a whole number, ties to even, and leaves it in the low bits.
      const vint rounded = (vint)(load(x + at) * broadcast(inverse) + broadcast(12582912.0f)) - 0x4b400000;
      sum += rounded;
      for (int lane = 0; lane < LANES; ++lane) quants[at + lane] = static_cast<int8_t>(rounded[lane]);
    }
    for (int lane = 0; lane < LANES; ++lane) sums[half] += sum[lane];
  }
  block.scale = tiny ? 0.0f : scale;
  block.scaled_sum = block.scale * static_cast<float>(sums[0] + sums[1]);
  block.offset = -128 * (sums[0] + sums[1]);
  block.halves[0] = -128 * sums[0];
  block.halves[1] = -128 * sums[1];
}

template <typename T>
inline void quantize_row(const T *x, int64_t size, int8_t *quants, ActBlock *blocks) {
  alignas(64) float values[BLOCK];
  for (int64_t first = 0; first < size; first += BLOCK) {
    const int64_t count = size - first < BLOCK ? size - first : BLOCK;
    for (int64_t at = 0; at < count; ++at) values[at] = to_float(x[first + at]);
    for (int64_t at = count; at < BLOCK; ++at) values[at] = 0;
    quantize_block(values, quants + first, blocks[first / BLOCK]);
  }
}

// ── sums of four products in each lane: unsigned weights, signed activations, exact ─────────────────────────────────

#if defined(IL_AVX512)
struct Quad {
  __m512i four;
  explicit Quad(const uint8_t *quants) {
    int32_t bits;
    std::memcpy(&bits, quants, 4);
    four = _mm512_set1_epi32(bits);
  }
};
inline vint add_products(vint sum, vuint weights, Quad quad) {
  return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, quad.four);
}
#elif defined(__SSE2__)
// By pairs of 16-bit products, which cannot overflow (255 * 127 * 2 twice would in 16 bits).
inline vint multiply_pairs(vuint weights, vint values) {
#if defined(IL_AVX2)
  return (vint)_mm256_madd_epi16((__m256i)weights, (__m256i)values);
#else
  return (vint)_mm_madd_epi16((__m128i)weights, (__m128i)values);
#endif
}
struct Quad {
  vint even, odd;
  explicit Quad(const uint8_t *quants) {
    const int8_t *q = reinterpret_cast<const int8_t *>(quants);
    even = vint{} + ((q[0] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(q[2]) << 16));
    odd = vint{} + ((q[1] & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(q[3]) << 16));
  }
};
inline vint add_products(vint sum, vuint weights, const Quad &quad) {
  sum += multiply_pairs(weights & 0x00ff00ffu, quad.even);
  return sum + multiply_pairs((weights >> 8) & 0x00ff00ffu, quad.odd);
}
#else
struct Quad {
  int32_t q[4];
  explicit Quad(const uint8_t *quants) {
    for (int at = 0; at < 4; ++at) q[at] = reinterpret_cast<const int8_t *>(quants)[at];
  }
};
inline vint add_products(vint sum, vuint weights, const Quad &quad) {
  for (int at = 0; at < 4; ++at) sum += (vint)((weights >> (8 * at)) & 0xffu) * quad.q[at];
  return sum;
}
#endif

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

template <typename F, int ROWS>
void block_tile(const Tile &tile) {
  constexpr int STRIPS = interlace::BLOCK_STRIPS, PER_STRIP = STRIP / LANES, VECTORS = STRIPS * PER_STRIP;
  constexpr int QUADS = 8 / F::GROUPS;
  const Panel &panel = *tile.panel;
  vfloat total[ROWS][VECTORS] = {};
  const uint8_t *ahead = tile.ahead.first;
  for (int64_t block = 0; block < tile.depth; ++block) {
    if (block == tile.ahead.turn) ahead = tile.ahead.second;
    for (int64_t at = 0; at < tile.ahead.step; at += 64) __builtin_prefetch(ahead + at, 0, 3);
    ahead += tile.ahead.step;
    const ActBlock *acts[ROWS];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row)
      acts[row] = reinterpret_cast<const ActBlock *>(reinterpret_cast<const uint8_t *>(tile.blocks) +
                                                     row * tile.blocks_stride) + block;
    const uint8_t *x = tile.x + block * BLOCK;
#pragma GCC unroll 8
    for (int vector = 0; vector < VECTORS; ++vector) {
      const int64_t strip = block * STRIPS + vector / PER_STRIP;
      const int lane = vector % PER_STRIP * LANES;
      const uint8_t *words = panel.values + (strip * F::WORDS * STRIP + lane) * 4;
      const ScalePlace place{panel.scales + strip * F::SCALE_BYTES * STRIP,
                             panel.supers + (block / 8 * STRIPS + vector / PER_STRIP) * F::SUPER_BYTES * STRIP, lane};
#pragma GCC unroll 2
      for (int group = 0; group < F::GROUPS; ++group) {
        vint sum[ROWS];
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row)
          sum[row] = vint{} + (F::HAS_MIN ? 0 : F::GROUPS == 1 ? acts[row]->offset : acts[row]->halves[group]);
#pragma GCC unroll 8
        for (int quad = group * QUADS; quad < group * QUADS + QUADS; ++quad) {
          const vuint weights = weights_of<F>(words, quad);
#pragma GCC unroll 8
          for (int row = 0; row < ROWS; ++row)
            sum[row] = add_products(sum[row], weights, Quad(x + row * tile.x_stride + 4 * quad));
        }
        vfloat scale{};
        if constexpr (F::HAS_SCALE) scale = F::scale(place, group);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
          const vfloat exact = __builtin_convertvector(sum[row], vfloat);
          if constexpr (F::HAS_SCALE)
            total[row][vector] += exact * acts[row]->scale * scale;
          else
            total[row][vector] += exact * acts[row]->scale;
        }
      }
      if constexpr (F::HAS_MIN) {
        const vfloat minimum = F::minimum(place);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) total[row][vector] += minimum * acts[row]->scaled_sum;
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    if constexpr (!F::HAS_SCALE)  // one scale per output
      for (int vector = 0; vector < VECTORS; ++vector)
        total[row][vector] *= load(reinterpret_cast<const float *>(panel.scales) + vector * LANES);
    put_row(tile, row, total[row]);
  }
}

template <typename F, int ROWS = BLOCK_TILE_ROWS>
inline TileKernel block_kernel_of(int64_t rows) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return block_kernel_of<F, ROWS - 1>(rows);
  }
  return block_tile<F, ROWS>;
}

inline TileKernel block_kernel(int32_t format, int64_t rows) {
  switch (format) {
    case IL_FMT_INT8: return block_kernel_of<Int8>(rows);
    case IL_FMT_Q4_0: return block_kernel_of<Q4_0>(rows);
    case IL_FMT_Q4_1: return block_kernel_of<Q4_1>(rows);
    case IL_FMT_Q5_0: return block_kernel_of<Q5_0>(rows);
    case IL_FMT_Q5_1: return block_kernel_of<Q5_1>(rows);
    case IL_FMT_Q8_0: return block_kernel_of<Q8_0>(rows);
    case IL_FMT_Q4_K: return block_kernel_of<Q4_K>(rows);
    case IL_FMT_Q5_K: return block_kernel_of<Q5_K>(rows);
    default: return block_kernel_of<Q6_K>(rows);
  }
}

inline int64_t block_bytes(int32_t format) {
  switch (format) {
    case IL_FMT_INT8: case IL_FMT_Q8_0: return 512;
    case IL_FMT_Q5_0: case IL_FMT_Q5_1: case IL_FMT_Q5_K: return 320;
    case IL_FMT_Q6_K: return 384;
    default: return 256;
  }
}

}  // namespace IL_ISA
