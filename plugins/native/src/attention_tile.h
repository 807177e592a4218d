// The two products of attention, on a tile of up to 256 tokens of the cache and a few query rows.
//
// Every value is one chain of fused operations over the head (scores) or over the tokens (sums), in ascending order. The
// shape of a kernel only says how many such chains run side by side, so bits do not depend on it.
#pragma once

#include "attention_cache.h"

namespace IL_ISA {

constexpr int64_t TILE = 256;                      // tokens, aligned to positions
constexpr int64_t TILE_GRANULES = TILE / GRANULE;
constexpr int64_t MAX_ROWS = 48;                   // query rows of a piece of work
constexpr int64_t PADDED_ROWS = (MAX_ROWS + LANES - 1) / LANES * LANES;
constexpr int VECTORS = GRANULE / LANES;           // of the words of a granule's 16 tokens

#if defined(IL_AVX512)
constexpr int KERNEL_ROWS = 6, KERNEL_COLUMNS = 4;  // 24 accumulators of 32 registers
#elif defined(IL_AVX2)
constexpr int KERNEL_ROWS = 4, KERNEL_COLUMNS = 2;  // 8 of 16: products of bfloat16 need some in between
#else
constexpr int KERNEL_ROWS = 3, KERNEL_COLUMNS = 2;
#endif

inline vfloat as_float(vuint bits) {
  vfloat value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// sum + a · b for words of T: one product, or two.
template <typename T>
inline vfloat dot(vfloat sum, vuint a, vuint b);
template <>
inline vfloat dot<float>(vfloat sum, vuint a, vuint b) {
  return fma(as_float(a), as_float(b), sum);
}
template <>
inline vfloat dot<bf16>(vfloat sum, vuint a, vuint b) {
#if defined(IL_AVX512)
  return reinterpret_cast<vfloat>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                   reinterpret_cast<__m512bh>(b)));
#else
  sum = fma(as_float(a << 16), as_float(b << 16), sum);
  return fma(as_float(a & 0xffff0000u), as_float(b & 0xffff0000u), sum);
#endif
}

inline vfloat load_bytes(const uint8_t *from) {
#if defined(IL_AVX512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
  return reinterpret_cast<vfloat>(_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes)));
#elif defined(IL_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
  return reinterpret_cast<vfloat>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  typedef int8_t vbyte __attribute__((vector_size(LANES), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const vbyte *>(from), vfloat);
#endif
}

// 2 * LANES of them as T.
inline void widen_some(const uint8_t *from, float *to) {
  store(to, load_bytes(from));
  store(to + LANES, load_bytes(from + LANES));
}
inline void widen_some(const uint8_t *from, bf16 *to) {
#if defined(IL_AVX512)
  const vfloat low = load_bytes(from), high = load_bytes(from + LANES);
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<const __m512 &>(high), reinterpret_cast<const __m512 &>(low));
  std::memcpy(to, &both, sizeof both);
#else
  store(to, load_bytes(from));
  store(to + LANES, load_bytes(from + LANES));
#endif
}

// Words of T at `from`, which holds single bytes if NARROW.
template <typename T, bool NARROW>
inline vuint load_cached(const uint8_t *from) {
  if constexpr (!NARROW) return load_words(from);
  alignas(64) T wide[2 * LANES];
  if constexpr (sizeof(T) == 4)
    store(wide, load_bytes(from));
  else
    widen_some(from, wide);
  return load_words(wide);
}

// The granules of one tile that a piece of work sees.
struct Span {
  int64_t first, count;  // the first one's number in the sequence
  const uint8_t *keys[TILE_GRANULES], *values[TILE_GRANULES];
  const float *key_scales[TILE_GRANULES], *value_scales[TILE_GRANULES];
};

constexpr int64_t CACHE_AHEAD = 12 << 10;  // how far reading runs ahead of computing: more than a trip to memory takes
constexpr int64_t MAX_AHEAD = 16;          // the same in granules, at most

// What the kernels read and write; scratch of one thread. T: type of the activations.
template <typename T>
struct KeyTile {
  alignas(64) uint32_t query[MAX_ROWS][MAX_HEAD_SIZE];  // words
  alignas(64) float scores[MAX_ROWS][TILE];
  alignas(64) T weights[MAX_ROWS][TILE];
  alignas(64) float sums[MAX_ROWS][MAX_HEAD_SIZE];      // of weights times values, over all tiles so far
  float largest[PADDED_ROWS], total[PADDED_ROWS];       // over all tiles so far: largest score, sum of the weights
  float keep[PADDED_ROWS], take[PADDED_ROWS];           // factors of what was there before this tile, and of this tile
  const uint8_t *keys[TILE_GRANULES], *values[TILE_GRANULES];
  const uint8_t *ahead[2 * TILE_GRANULES];  // granule to fetch when granule i, keys before values, is read
  alignas(64) float key_scales[TILE], value_scales[TILE];
  alignas(64) T wide[2][TILE * MAX_HEAD_SIZE];          // 8-bit keys and values, widened
};

// Bytes of the cache for one word of T.
template <typename T, bool NARROW>
constexpr int64_t WORD_BYTES = NARROW ? 4 / sizeof(T) : 4;

// Unrolled, as every loop over the results of a kernel: GCC keeps an array in registers only if all its indices are
// constants, and clears it in memory otherwise.
template <int R, int C>
inline __attribute__((always_inline)) void clear(vfloat (&sums)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[r][c] = vfloat{};
}

// scores[row + r][column * LANES ..] = query · key, for R rows and C vectors of tokens.
template <typename T, int R, int C, bool NARROW>
void score_kernel(KeyTile<T> &tile, int64_t row, int64_t column, int64_t words) {
  constexpr int64_t WORD = WORD_BYTES<T, NARROW>;
  const uint8_t *keys[C], *ahead[C];
  for (int c = 0; c < C; ++c) {
    const int64_t granule = (column + c) / VECTORS, offset = (column + c) % VECTORS * LANES * WORD;
    keys[c] = tile.keys[granule] + offset;
    ahead[c] = tile.ahead[granule] + offset;
  }
  vfloat sums[R][C];
  clear(sums);
  for (int64_t word = 0; word < words; ++word) {
    vuint key[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      key[c] = load_cached<T, NARROW>(keys[c] + word * GRANULE * WORD);
      if (row == 0) __builtin_prefetch(ahead[c] + word * GRANULE * WORD);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vuint query = vuint{} + tile.query[row + r][word];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sums[r][c] = dot<T>(sums[r][c], query, key[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(tile.scores[row + r] + (column + c) * LANES, sums[r][c]);
}

// What is kept of the sums so far, plus a tile's own: the one place that joins tiles.
inline vfloat joined(vfloat before, vfloat keep, vfloat own, vfloat take) { return fma(before, keep, own * take); }

// sums[row + r][column * LANES ..] joined with weights · values, for R rows and C vectors along the head.
template <typename T, int R, int C, bool NARROW>
void value_kernel(KeyTile<T> &tile, int64_t row, int64_t column, int64_t granules, int64_t padded) {
  constexpr int64_t WORDS = GRANULE * sizeof(T) / 4, WORD = WORD_BYTES<T, NARROW>;
  vfloat sums[R][C];
  clear(sums);
  for (int64_t granule = 0; granule < granules; ++granule) {
    const int64_t offset = column * LANES * WORD;
    const uint8_t *values = tile.values[granule] + offset, *ahead = tile.ahead[granules + granule] + offset;
    for (int64_t word = 0; word < WORDS; ++word) {
      vuint value[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        value[c] = load_cached<T, NARROW>(values + (word * padded + c * LANES) * WORD);
        if (row == 0) __builtin_prefetch(ahead + (word * padded + c * LANES) * WORD);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        uint32_t bits;
        std::memcpy(&bits, reinterpret_cast<const uint8_t *>(tile.weights[row + r]) + (granule * WORDS + word) * 4, 4);
        const vuint weight = vuint{} + bits;
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sums[r][c] = dot<T>(sums[r][c], weight, value[c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float *to = tile.sums[row + r] + (column + c) * LANES;
      store(to, joined(load(to), broadcast(tile.keep[row + r]), sums[r][c], broadcast(tile.take[row + r])));
    }
}

// Cover rows × columns with kernels: as large as fit, then what is left. All rows use some columns before the next ones are
// read, so these come from the first-level cache.
template <template <typename, int, int> class Kernel, typename T, int R, int C, typename... Arguments>
void cover_rows(KeyTile<T> &tile, int64_t row, int64_t rows, int64_t column, Arguments... arguments) {
  for (; row + R <= rows; row += R) Kernel<T, R, C>::run(tile, row, column, arguments...);
  if constexpr (R > 1) {
    if (row < rows) cover_rows<Kernel, T, R - 1, C>(tile, row, rows, column, arguments...);
  }
}
template <template <typename, int, int> class Kernel, typename T, int C, typename... Arguments>
void cover(KeyTile<T> &tile, int64_t rows, int64_t column, int64_t columns, Arguments... arguments) {
  for (; column + C <= columns; column += C) cover_rows<Kernel, T, KERNEL_ROWS, C>(tile, 0, rows, column, arguments...);
  if constexpr (C > 1) {
    if (column < columns) cover<Kernel, T, C - 1>(tile, rows, column, columns, arguments...);
  }
}

template <bool NARROW>
struct Scores {
  template <typename T, int R, int C>
  struct Kernel {
    static void run(KeyTile<T> &tile, int64_t row, int64_t column, int64_t words) {
      score_kernel<T, R, C, NARROW>(tile, row, column, words);
    }
  };
};
template <bool NARROW>
struct Values {
  template <typename T, int R, int C>
  struct Kernel {
    static void run(KeyTile<T> &tile, int64_t row, int64_t column, int64_t granules, int64_t padded) {
      value_kernel<T, R, C, NARROW>(tile, row, column, granules, padded);
    }
  };
};

}  // namespace IL_ISA
