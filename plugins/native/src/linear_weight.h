// How weights of linear layers lie in memory: what packing writes and the kernels read.
//
// The rows of a weight (its outputs) are taken in strips of 16 and strips in panels; a panel is the unit of work and one
// stream in memory. Along the input, a strip holds for each step of the kernels' innermost loop what one 512-bit vector
// takes, so every instruction set reads the same layout with vectors of its own width:
//   bf16    pairs of inputs: [in / 2][strip][16 rows][2]
//   float32 [in][strip][16 rows]
//   blocks  of 32 inputs: [in / 32] of words [strip][words][16 rows] of 32 bits and scales [strip][parts][16 rows], and
//           for K formats, after them, [in / 256][strip][parts][16 rows]; see linear_blocks.cpp for the words
#pragma once

#include <cstdint>

#include "native.h"

namespace interlace {

constexpr int STRIP = 16;
constexpr int BLOCK = 32;        // inputs that share a scale
constexpr int SUPER_BLOCK = 256;  // inputs that share the scale of scales in K formats
constexpr int BLOCK_STRIPS = 2;  // strips of a panel in blocks, on every instruction set

struct Panel {
  int32_t format;
  int32_t strips;
  int64_t first;  // of its rows
  int64_t rows;   // perhaps fewer than strips * STRIP; what is missing holds zeros
  uint8_t *values;
  uint8_t *scales;  // of IL_FMT_INT8: float [strips * STRIP]; other blocks have theirs among the values
  uint8_t *supers;
};

// A block format: what a row's block in a file holds, and what of it is packed.
struct BlockFormat {
  int32_t format;
  int32_t block;        // inputs
  int32_t block_bytes;  // in a file
  int32_t words;        // packed, per row and 32 inputs
  int32_t scale_bytes;  // packed, per row and 32 inputs
  int32_t super_bytes;  // packed, per row and 256 inputs
};

// Words and scales of a strip's block.
constexpr int64_t strip_bytes(int64_t words, int64_t scale_bytes) { return STRIP * (words * 4 + scale_bytes); }

// NULL if it is not a block format (IL_FMT_INT8 counts as one).
const BlockFormat *find_block_format(int32_t format);

// Pack rows of a file's blocks into strip `strip` of a panel. `blocks`: of 32 inputs per row.
void pack_blocks(const Panel &panel, const BlockFormat &format, const uint8_t *rows, int64_t row_bytes, int64_t blocks);

}  // namespace interlace

struct il_linear {
  int64_t in = 0;
  int64_t out = 0;
  int64_t num_panels = 0;
  interlace::Panel *panels = nullptr;
  const float *bias = nullptr;  // [out, padded by a panel] or NULL
  bool has_bf16 = false;        // which forms of the activations the panels need
  bool has_f32 = false;
  bool has_blocks = false;
};

// A head in bf16 or float32, and what finds the largest of its results sooner (head_screen.h).
struct il_screen {
  const il_linear *exact = nullptr;
  il_linear *copy = nullptr;      // the same rows in Q8_0
  const float *norms = nullptr;   // [out and some] of the head's rows
  const float *errors = nullptr;  // [out and some] of the head's rows minus the copy's
};
