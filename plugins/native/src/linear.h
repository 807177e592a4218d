// Linear layers: x [rows, in] times a packed weight [out, in].
//
// Pieces of work are panels of the weight (times chunks of rows whose activations fit the second-level cache), so a weight
// is read from memory once per chunk, and every result is computed by one tile in one order (linear_float.h,
// linear_block.h).
#pragma once

#include <algorithm>

#include "linear_block.h"
#include "linear_float.h"

namespace IL_ISA {

using interlace::Thread;

constexpr int64_t CACHED_BYTES = 384 << 10;  // of activations, next to a panel, in the second-level cache
constexpr int64_t AHEAD_BYTES = 4096;        // how far before its use a weight is fetched
constexpr int64_t ALONE_BYTES = 16 << 10;    // of activations that each thread converts for itself: cheaper than to meet

// i: 0 row stride of x, 1 row stride of out, 2 not 0: float32 results, else of the op's type.
// p: 0 x [rows, in], 1 out [rows, out], 2 il_linear.
struct LinearCall {
  const il_linear *linear;
  const uint8_t *x;
  int64_t x_stride;  // bytes
  uint8_t *out;
  int64_t out_stride;  // bytes
  bool x_wide, out_wide;
};

// Activations of some rows in the forms that the panels' formats take.
struct Activations {
  const uint8_t *plain;  // of bf16 or float32 panels
  int64_t plain_stride;
  const uint8_t *quants;
  int64_t quants_stride;
  const ActBlock *blocks;
  int64_t blocks_stride;
};

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Which forms must be made, and how large a row of them is.
struct Forms {
  bool plain, quant;
  int64_t plain_bytes, quant_bytes, blocks, row_bytes;

  explicit Forms(const LinearCall &call) {
    const il_linear &linear = *call.linear;
    // Weights in bf16 take pairs of bf16, weights in float32 take float32; what already is that is read in place.
    plain = (linear.has_bf16 && (call.x_wide || linear.in % 2 != 0)) || (linear.has_f32 && !call.x_wide);
    quant = linear.has_blocks;
    plain_bytes = plain ? round_up(linear.in * (linear.has_f32 ? 4 : 2), 64) : 0;
    blocks = (linear.in + interlace::BLOCK - 1) / interlace::BLOCK;
    quant_bytes = quant ? blocks * interlace::BLOCK : 0;
    row_bytes = round_up(plain_bytes + quant_bytes + (quant ? blocks * int64_t{sizeof(ActBlock)} : 0), 64);
  }
};

inline void widen_row(const bf16 *from, float *to, int64_t size) {
  for (int64_t at = 0; at < size; ++at) to[at] = to_float(from[at]);
}

template <typename T>
inline void make_bf16_row(const T *from, bf16 *to, int64_t size) {
  for (int64_t at = 0; at < size; ++at) put(to + at, to_float(from[at]));
  if (size % 2 != 0) to[size] = {0};  // the partner of the last input
}

inline void make_forms(const LinearCall &call, const Forms &forms, int64_t row, uint8_t *to) {
  const int64_t in = call.linear->in;
  const uint8_t *x = call.x + row * call.x_stride;
  const float *wide = reinterpret_cast<const float *>(x);
  const bf16 *narrow = reinterpret_cast<const bf16 *>(x);
  if (forms.plain) {
    if (call.linear->has_f32)
      widen_row(narrow, reinterpret_cast<float *>(to), in);
    else if (call.x_wide)
      make_bf16_row(wide, reinterpret_cast<bf16 *>(to), in);
    else
      make_bf16_row(narrow, reinterpret_cast<bf16 *>(to), in);
  }
  if (!forms.quant) return;
  int8_t *quants = reinterpret_cast<int8_t *>(to + forms.plain_bytes);
  ActBlock *blocks = reinterpret_cast<ActBlock *>(to + forms.plain_bytes + forms.quant_bytes);
  call.x_wide ? quantize_row(wide, in, quants, blocks) : quantize_row(narrow, in, quants, blocks);
}

inline Activations view(const LinearCall &call, const Forms &forms, int64_t first, const uint8_t *made) {
  Activations all;
  all.plain = forms.plain ? made : call.x + first * call.x_stride;
  all.plain_stride = forms.plain ? forms.row_bytes : call.x_stride;
  all.quants = made + forms.plain_bytes;
  all.quants_stride = forms.row_bytes;
  all.blocks = reinterpret_cast<const ActBlock *>(made + forms.plain_bytes + forms.quant_bytes);
  all.blocks_stride = forms.row_bytes;
  return all;
}

// Convert rows [first, first + rows) if their panels want that.
inline Activations prepare(const LinearCall &call, int64_t first, int64_t rows, Thread &thread) {
  const Forms forms(call);
  if (!forms.plain && !forms.quant) return view(call, forms, first, nullptr);
  if (rows == 1 || rows * forms.row_bytes <= ALONE_BYTES || thread.count() == 1) {
    uint8_t *to = rows * forms.row_bytes <= Thread::SCRATCH_BYTES ? thread.scratch : thread.shared;
    for (int64_t row = 0; row < rows; ++row) make_forms(call, forms, first + row, to + row * forms.row_bytes);
    return view(call, forms, first, to);
  }
  for (int64_t row; (row = thread.claim()) < rows;)
    make_forms(call, forms, first + row, thread.shared + row * forms.row_bytes);
  thread.barrier();
  return view(call, forms, first, thread.shared);
}

// One panel times `rows` rows from `first` on (counted from the prepared ones), in tiles of nearly equal size.
struct PanelWork {
  const LinearCall &call;
  const Activations &all;
  int64_t prepared;  // row of x that is the first prepared one

  void run(const Panel &panel, const Panel *next, int64_t first, int64_t rows) const {
    const bool is_bf16 = panel.format == IL_FMT_BF16, is_f32 = panel.format == IL_FMT_F32;
    const int64_t most = is_bf16 || is_f32 ? FLOAT_TILE_ROWS : BLOCK_TILE_ROWS;
    const int64_t tiles = (rows + most - 1) / most;
    for (int64_t at = 0, row = first; at < tiles; ++at) {
      const int64_t count = rows / tiles + (at < rows % tiles);
      Tile tile = tile_of(panel, row);
      plan_ahead(tile, next, at, tiles);
      (is_bf16 || is_f32 ? float_kernel(panel.strips, count, is_bf16, tiles <= 2) : block_kernel(panel.format, count))(tile);
      row += count;
    }
  }

  Tile tile_of(const Panel &panel, int64_t row) const {
    const il_linear &linear = *call.linear;
    const int64_t element = call.out_wide ? 4 : 2;
    Tile tile;
    tile.panel = &panel;
    tile.bias = linear.bias == nullptr ? nullptr : linear.bias + panel.first;
    tile.out = call.out + (prepared + row) * call.out_stride + panel.first * element;
    tile.out_stride = call.out_stride;
    tile.wide = call.out_wide;
    if (panel.format == IL_FMT_BF16 || panel.format == IL_FMT_F32) {
      tile.x = all.plain + row * all.plain_stride;
      tile.x_stride = all.plain_stride;
      tile.depth = panel.format == IL_FMT_F32 ? linear.in : (linear.in + 1) / 2;
    } else {
      tile.x = all.quants + row * all.quants_stride;
      tile.x_stride = all.quants_stride;
      tile.blocks = reinterpret_cast<const ActBlock *>(reinterpret_cast<const uint8_t *>(all.blocks) + row * all.blocks_stride);
      tile.blocks_stride = all.blocks_stride;
      tile.depth = (linear.in + interlace::BLOCK - 1) / interlace::BLOCK;
    }
    return tile;
  }

  // The first tile reads the panel from memory: it fetches what comes soon. Of several, each fetches a share of the next.
  static void plan_ahead(Tile &tile, const Panel *next, int64_t at, int64_t tiles) {
    const Panel &panel = *tile.panel;
    const int64_t step = step_bytes(panel);
    const uint8_t *after = (next == nullptr ? panel : *next).values;
    if (tiles == 1) {
      const int64_t turn = std::max<int64_t>(0, tile.depth - AHEAD_BYTES / step);
      tile.ahead = {panel.values + AHEAD_BYTES, after, turn, step};
      return;
    }
    const int64_t share = (step + tiles - 1) / tiles;
    tile.ahead = {after + at * share * tile.depth, after, tile.depth, share};
  }

  static int64_t step_bytes(const Panel &panel) {
    if (panel.format == IL_FMT_BF16 || panel.format == IL_FMT_F32) return panel.strips * 64;
    return block_bytes(panel.format) * panel.strips;
  }
};

inline void multiply(const LinearCall &call, const Activations &all, int64_t prepared, int64_t rows, Thread &thread) {
  const il_linear &linear = *call.linear;
  const int64_t panels = linear.num_panels;
  // Chunks depend on the shape alone, and results on no chunk.
  const int64_t chunk = std::max<int64_t>(FLOAT_TILE_ROWS, CACHED_BYTES / (linear.in * 2) / 8 * 8);
  const int64_t pieces = (rows + chunk - 1) / chunk * panels;
  const PanelWork work{call, all, prepared};
  int64_t piece = thread.claim();
  while (piece < pieces) {
    const int64_t next = thread.claim();
    const int64_t first = piece / panels * chunk;
    work.run(linear.panels[piece % panels], next < pieces ? &linear.panels[next % panels] : nullptr, first,
             std::min(chunk, rows - first));
    piece = next;
  }
}

inline void linear(const il_op &op, const il_step &step, Thread &thread) {
  LinearCall call;
  call.linear = static_cast<const il_linear *>(op.p[2]);
  call.x_wide = op.dtype == IL_F32;
  call.out_wide = call.x_wide || op.i[2] != 0;
  call.x = static_cast<const uint8_t *>(op.p[0]);
  call.x_stride = op.i[0] * (call.x_wide ? 4 : 2);
  call.out = static_cast<uint8_t *>(op.p[1]);
  call.out_stride = op.i[1] * (call.out_wide ? 4 : 2);
  const int64_t rows = interlace::rows_of(op, step);
  const int64_t most = Thread::SHARED_BYTES / std::max<int64_t>(1, Forms(call).row_bytes);
  for (int64_t first = 0; first < rows; first += most) {
    if (first > 0) thread.barrier();
    const int64_t count = std::min(most, rows - first);
    const Activations all = prepare(call, first, count, thread);
    multiply(call, all, first, count, thread);
  }
}

}  // namespace IL_ISA
