// Products with weights in bf16 and float32.
//
// A result is one chain of multiply-adds in float32 over all inputs in order, whatever the number of rows of the tile: its
// bits depend on its own row only. With AVX-512 a link of the chain is vdpbf16ps (two bf16 products); the other
// instruction sets widen to float32.
#pragma once

#include "linear_tile.h"

namespace IL_ISA {

// A kernel's STRIPS are neighbours of PITCH that a panel has.

// Calls body(step) for all steps and fetches ahead; LINES cache lines a step.
template <int LINES, typename Body>
inline __attribute__((always_inline)) void walk(const Tile &tile, Body body) {
  const uint8_t *ahead = tile.ahead.first;
  int64_t step = 0;
  for (int64_t end : {tile.ahead.turn, tile.depth}) {
#pragma GCC unroll 2
    for (; step < end; ++step) {
#pragma GCC unroll 4
      for (int line = 0; line < LINES; ++line) fetch(ahead + 64 * line);
      ahead += tile.ahead.step;
      body(step);
    }
    ahead = tile.ahead.second;
  }
}

#if defined(IL_AVX512)

template <int ROWS, int STRIPS, int LINES, int PITCH = STRIPS>
void bf16_tile(const Tile &tile) {
  const uint8_t *x[ROWS];
  __m512 total[ROWS][STRIPS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
    x[row] = tile.x + row * tile.x_stride;
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; ++strip) total[row][strip] = _mm512_setzero_ps();
  }
  const uint8_t *const weights = tile.panel->values;
  walk<LINES>(tile, [&](int64_t pair) __attribute__((always_inline)) {
    __m512bh weight[STRIPS];
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; ++strip)
      weight[strip] = (__m512bh)_mm512_load_si512(weights + (pair * PITCH + strip) * 64);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      int32_t two;
      std::memcpy(&two, x[row] + 4 * pair, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int strip = 0; strip < STRIPS; ++strip)
        total[row][strip] = _mm512_dpbf16_ps(total[row][strip], weight[strip], value);
    }
  });
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
    vfloat values[STRIPS];
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; ++strip) values[strip] = (vfloat)total[row][strip];
    put_row(tile, row, values);
  }
}

#else

template <int ROWS, int STRIPS, int LINES, int PITCH = STRIPS>
void bf16_tile(const Tile &tile) {
  constexpr int VECTORS = STRIPS * STRIP / LANES;
  vfloat total[ROWS][VECTORS] = {};
  walk<LINES>(tile, [&](int64_t pair) __attribute__((always_inline)) {
    const uint8_t *weights = tile.panel->values + pair * PITCH * 64;
#pragma GCC unroll 8
    for (int at = 0; at < VECTORS; ++at) {
      const vuint both = *reinterpret_cast<const vuint *>(weights + at * LANES * 4);
      const vuint even = both << 16, odd = both & 0xffff0000u;
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
        const bf16 *x = reinterpret_cast<const bf16 *>(tile.x + row * tile.x_stride) + 2 * pair;
        total[row][at] += (vfloat)even * broadcast(to_float(x[0]));
        total[row][at] += (vfloat)odd * broadcast(to_float(x[1]));
      }
    }
  });
  for (int row = 0; row < ROWS; ++row) put_row(tile, row, total[row]);
}

#endif

template <int ROWS, int STRIPS, int LINES, int PITCH = STRIPS>
void f32_tile(const Tile &tile) {
  constexpr int VECTORS = STRIPS * STRIP / LANES;
  const uint8_t *x[ROWS];
  vfloat total[ROWS][VECTORS] = {};
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) x[row] = tile.x + row * tile.x_stride;
  walk<LINES>(tile, [&](int64_t k) __attribute__((always_inline)) {
    const float *weights = reinterpret_cast<const float *>(tile.panel->values) + k * PITCH * STRIP;
    vfloat weight[VECTORS];
#pragma GCC unroll 8
    for (int at = 0; at < VECTORS; ++at) weight[at] = load(weights + at * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      float value;
      std::memcpy(&value, x[row] + 4 * k, 4);
#pragma GCC unroll 8
      for (int at = 0; at < VECTORS; ++at) total[row][at] += weight[at] * broadcast(value);
    }
  });
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) put_row(tile, row, total[row]);
}

// ── choosing ────────────────────────────────────────────────────────────────────────────────────────────────────

// A tile that alone reads its panel fetches a line per strip and step; of several, each fetches a share of the next panel.
template <int STRIPS>
struct FloatKernels {
  template <int ROWS>
  static TileKernel of(bool is_bf16, bool alone) {
    if (alone) return is_bf16 ? bf16_tile<ROWS, STRIPS, STRIPS> : f32_tile<ROWS, STRIPS, STRIPS>;
    return is_bf16 ? bf16_tile<ROWS, STRIPS, 1> : f32_tile<ROWS, STRIPS, 1>;
  }

  static TileKernel choose(int64_t rows, bool is_bf16, bool alone) {
    return pick<FLOAT_TILE_ROWS>(rows, is_bf16, alone);
  }

  template <int ROWS>
  static TileKernel pick(int64_t rows, bool is_bf16, bool alone) {
    if constexpr (ROWS > 1) {
      if (rows < ROWS) return pick<ROWS - 1>(rows, is_bf16, alone);
    }
    return of<ROWS>(is_bf16, alone);
  }
};

// One strip of a panel times one row; fetches a line a step.
inline TileKernel strip_kernel(int64_t pitch, bool is_bf16) {
  if (pitch == 1) return is_bf16 ? bf16_tile<1, 1, 1> : f32_tile<1, 1, 1>;
#if defined(IL_AVX512)
  if (pitch == 2) return is_bf16 ? bf16_tile<1, 1, 1, 2> : f32_tile<1, 1, 1, 2>;
  return is_bf16 ? bf16_tile<1, 1, 1, 3> : f32_tile<1, 1, 1, 3>;
#else
  return nullptr;
#endif
}

inline TileKernel float_kernel(int64_t strips, int64_t rows, bool is_bf16, bool alone) {
  if (strips == 1) return FloatKernels<1>::choose(rows, is_bf16, alone);
#if defined(IL_AVX512)
  if (strips == 2) return FloatKernels<2>::choose(rows, is_bf16, alone);
  return FloatKernels<3>::choose(rows, is_bf16, alone);
#else
  return nullptr;
#endif
}

}  // namespace IL_ISA
