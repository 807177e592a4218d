// What tile kernels are given, and what they all end with.
#pragma once

#include "linear_quant.h"
#include "linear_weight.h"
#include "runtime.h"
#include "vector.h"

namespace IL_ISA {

using interlace::Panel;
using interlace::STRIP;

#if defined(IL_AVX512)
constexpr int FLOAT_STRIPS = 3;  // 8 x 48 results: 24 of the 32 registers, 3 for weights
constexpr int FLOAT_TILE_ROWS = 8;
#elif defined(IL_AVX2)
constexpr int FLOAT_STRIPS = 1;
constexpr int FLOAT_TILE_ROWS = 6;
#else
constexpr int FLOAT_STRIPS = 1;
constexpr int FLOAT_TILE_ROWS = 2;
#endif

// Memory that will be read soon: `step` bytes are fetched from `first` on in every step of the innermost loop until
// `turn`, from then on from `second`.
struct Ahead {
  const uint8_t *first;
  const uint8_t *second;
  int64_t turn;
  int64_t step;
};

// One panel times some rows.
struct Tile {
  const Panel *panel;
  const float *bias;  // of the panel, or NULL
  const uint8_t *x;   // activations in the form that the panel's format takes
  int64_t x_stride;   // bytes
  int64_t depth;  // steps of the innermost loop
  uint8_t *out;   // [rows, panel's rows]
  int64_t out_stride;  // bytes
  bool wide;           // float32 results, else bf16
  Ahead ahead;
};

// Always inlined, for GCC takes a call of a function that only fetches for one that does nothing, and leaves it out.
inline __attribute__((always_inline)) void fetch(const uint8_t *address) { __builtin_prefetch(address, 0, 3); }

using TileKernel = void (*)(const Tile &);

template <typename T>
inline void put_values(T *out, const vfloat *values, const float *bias, int64_t count) {
  for (int64_t at = 0; at < count; at += LANES) {
    vfloat value = values[at / LANES];
    if (bias != nullptr) value += load(bias + at);
    if (at + LANES <= count) {
      store(out + at, value);
    } else {
      alignas(64) T rest[LANES];
      store(rest, value);
      for (int64_t lane = 0; lane < count - at; ++lane) out[at + lane] = rest[lane];
    }
  }
}

// Results of row `row`, all strips.
inline void put_row(const Tile &tile, int row, const vfloat *values) {
  uint8_t *out = tile.out + row * tile.out_stride;
  if (tile.wide)
    put_values(reinterpret_cast<float *>(out), values, tile.bias, tile.panel->rows);
  else
    put_values(reinterpret_cast<bf16 *>(out), values, tile.bias, tile.panel->rows);
}

}  // namespace IL_ISA
