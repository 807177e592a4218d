// Linear layers: x [rows, in] times a packed weight [out, in].
//
// Pieces of work are panels of the weight (times chunks of rows whose activations fit the second-level cache), so a weight
// is read from memory once per chunk, and every result is computed by one tile in one order (linear_float.h,
// linear_block.h).
//
// A gate that follows (silu(first half) * second half) can be part of the product: a piece is then a panel of either half,
// whose results meet in the cache. They are rounded in between as they would be on the way through memory.
#pragma once

#include <algorithm>

#include "linear_block.h"
#include "linear_float.h"

namespace IL_ISA {

using interlace::Thread;

constexpr int64_t CACHED_BYTES = 384 << 10;  // of activations, next to a panel, in the second-level cache
constexpr int64_t AHEAD_BYTES = 4 << 10;    // how far before its use a weight is fetched
constexpr int64_t ALONE_BYTES = 4 << 10;    // of activations that each thread converts for itself: cheaper than to meet
constexpr int64_t FEW_ROWS = 64;             // up to here, reading the weights is a good part of the work
constexpr int64_t HALVES_AT = 64 << 10;     // in a thread's scratch: the results of two panels, before they are joined
constexpr int64_t HALF_BYTES = 1 << 20;

// i: 0 row stride of x, 1 row stride of out, 2 not 0: float32 results, else of the op's type, 3 not 0: the gate that follows,
// as 1 + its op's code. p: 0 x [rows, in], 1 out [rows, out; with a gate half as many], 2 il_linear.
struct LinearCall {
  const il_linear *linear;
  const uint8_t *x;
  int64_t x_stride;  // bytes
  uint8_t *out;
  int64_t out_stride;  // bytes
  bool x_wide, out_wide;
  int64_t gate;  // op code, or -1

  int64_t element() const { return out_wide ? 4 : 2; }
};

// Activations of some rows in the forms that the panels' formats take: rows of plain ones, then rows of quantised blocks.
struct Activations {
  const uint8_t *plain;
  int64_t plain_stride;
  const uint8_t *quants;
  int64_t quants_stride;  // per row
};

// Rows that are whole tiles in every form of the weights, so that none is left over at the end of a chunk.
constexpr int64_t TILES_ROWS = 24;
inline int64_t whole_tiles(int64_t rows) { return rows / TILES_ROWS * TILES_ROWS; }

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Which forms must be made, and how large a row of them is.
struct Forms {
  bool plain, quant;
  int64_t plain_bytes, quant_bytes, blocks;

  explicit Forms(const LinearCall &call) {
    const il_linear &linear = *call.linear;
    // Weights in bf16 take pairs of bf16, weights in float32 take float32; what already is that is read in place.
    plain = (linear.has_bf16 && (call.x_wide || linear.in % 2 != 0)) || (linear.has_f32 && !call.x_wide);
    quant = linear.has_blocks;
    plain_bytes = plain ? round_up(linear.in * (linear.has_f32 ? 4 : 2), 64) : 0;
    blocks = (linear.in + BLOCK - 1) / BLOCK;
    quant_bytes = quant ? blocks * int64_t{sizeof(ActBlock)} : 0;
  }
  int64_t row_bytes() const { return plain_bytes + quant_bytes; }
};

// Pieces of the conversion: some blocks of a row.
constexpr int64_t CONVERT_BLOCKS = 32;

template <typename T>
inline void convert_plain(const LinearCall &call, int64_t row, uint8_t *to) {
  const T *from = reinterpret_cast<const T *>(call.x + row * call.x_stride);
  const int64_t in = call.linear->in;
  if (call.linear->has_f32) {
    for (int64_t at = 0; at < in; ++at) put(reinterpret_cast<float *>(to) + at, to_float(from[at]));
    return;
  }
  bf16 *narrow = reinterpret_cast<bf16 *>(to);
  for (int64_t at = 0; at < in; ++at) put(narrow + at, to_float(from[at]));
  if (in % 2 != 0) narrow[in] = {0};  // the partner of the last input
}

struct Converter {
  const LinearCall &call;
  const Forms &forms;
  int64_t first, rows;  // of x
  uint8_t *to;

  int64_t parts() const { return forms.quant ? (forms.blocks + CONVERT_BLOCKS - 1) / CONVERT_BLOCKS : 1; }
  int64_t pieces() const { return rows * parts(); }
  uint8_t *quants() const { return to + rows * forms.plain_bytes; }

  void convert(int64_t piece) const {
    const int64_t row = piece / parts(), part = piece % parts();
    if (forms.plain && part == 0) {
      uint8_t *plain = to + row * forms.plain_bytes;
      call.x_wide ? convert_plain<float>(call, first + row, plain) : convert_plain<bf16>(call, first + row, plain);
    }
    if (forms.quant) call.x_wide ? convert_blocks<float>(row, part) : convert_blocks<bf16>(row, part);
  }

  template <typename T>
  void convert_blocks(int64_t row, int64_t part) const {
    const T *x = reinterpret_cast<const T *>(call.x + (first + row) * call.x_stride);
    ActBlock *blocks = reinterpret_cast<ActBlock *>(quants() + row * forms.quant_bytes);
    for (int64_t at = part * CONVERT_BLOCKS; at < std::min(forms.blocks, (part + 1) * CONVERT_BLOCKS); ++at)
      quantize(x, call.linear->in, at, blocks + at);
  }

  Activations view() const {
    return {forms.plain ? to : call.x + first * call.x_stride, forms.plain ? forms.plain_bytes : call.x_stride, quants(),
            forms.quant_bytes};
  }
};

// Convert rows [first, first + rows) if their panels want that.
inline Activations prepare(const LinearCall &call, int64_t first, int64_t rows, Thread &thread) {
  const Forms forms(call);
  const bool alone = rows * forms.row_bytes() <= ALONE_BYTES;
  const Converter converter{call, forms, first, rows, alone ? thread.scratch : thread.shared};
  if (!forms.plain && !forms.quant) return converter.view();
  if (alone) {
    for (int64_t piece = 0; piece < converter.pieces(); ++piece) converter.convert(piece);
    return converter.view();
  }
  for (int64_t piece; (piece = thread.claim()) < converter.pieces();) converter.convert(piece);
  thread.barrier();
  return converter.view();
}

// Where a panel's results go.
struct Target {
  uint8_t *first;  // of the first row that is computed
  int64_t stride;
};

// One panel times `rows` rows from `first` on (counted from the prepared ones).
struct PanelWork {
  const LinearCall &call;
  const Activations &all;

  // In tiles of nearly equal size: one row alone would wait for its multiply-adds one by one.
  void run(const Panel &panel, const Panel *next, int64_t first, int64_t rows, const Target &target) const {
    const bool is_bf16 = panel.format == IL_FMT_BF16, is_plain = is_bf16 || panel.format == IL_FMT_F32;
    const int64_t tile_rows = is_plain ? FLOAT_TILE_ROWS : BLOCK_TILE_ROWS, tiles = (rows + tile_rows - 1) / tile_rows;
    for (int64_t at = 0, row = first; at < tiles; ++at) {
      const int64_t count = rows / tiles + (at < rows % tiles);
      Tile tile = tile_of(panel, row - first, target);
      if (is_plain) {
        tile.depth = is_bf16 ? (call.linear->in + 1) / 2 : call.linear->in;
        tile.x = all.plain + row * all.plain_stride;
        tile.x_stride = all.plain_stride;
        plan_ahead(tile, next, panel.strips * 64, at, tiles);
        float_kernel(panel.strips, count, is_bf16, tiles <= 2)(tile);
      } else {
        tile.depth = (call.linear->in + BLOCK - 1) / BLOCK;
        tile.x = all.quants + row * all.quants_stride;
        tile.x_stride = all.quants_stride;
        plan_ahead(tile, next, block_bytes(panel.format), at, tiles);
        block_kernel(panel.format, count)(tile);
      }
      row += count;
    }
  }

  // `row`: of those that are computed.
  Tile tile_of(const Panel &panel, int64_t row, const Target &target) const {
    const il_linear &linear = *call.linear;
    Tile tile{};
    tile.panel = &panel;
    tile.bias = linear.bias == nullptr ? nullptr : linear.bias + panel.first;
    tile.out = target.first + row * target.stride;
    tile.out_stride = target.stride;
    tile.wide = call.out_wide;
    return tile;
  }

  // One tile reads the panel from memory: it fetches what comes soon. Of several, each fetches a share of the next panel.
  static void plan_ahead(Tile &tile, const Panel *next, int64_t step, int64_t at, int64_t tiles) {
    const uint8_t *after = (next == nullptr ? *tile.panel : *next).values;
    if (tiles == 1) {
      tile.ahead = {tile.panel->values + AHEAD_BYTES, after, std::max<int64_t>(0, tile.depth - AHEAD_BYTES / step), step};
      return;
    }
    const int64_t share = (step + tiles - 1) / tiles;
    tile.ahead = {after + at * share * tile.depth, after, tile.depth, share};
  }
};

template <typename T>
void join_halves(int64_t gate, const Target &from, int64_t apart, const Target &to, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t *first = from.first + row * from.stride;
    const T *x = reinterpret_cast<const T *>(first), *up = reinterpret_cast<const T *>(first + apart);
    T *out = reinterpret_cast<T *>(to.first + row * to.stride);
    gate == IL_SILU_MUL ? gate_row<T, Silu>(x, up, out, columns) : gate_row<T, GeluTanh>(x, up, out, columns);
  }
}

// Pieces that a thread takes: `run` neighbours at once. Claiming is a locked instruction, which waits for all weights that
// are on their way; with few rows a panel takes half a microsecond, and a claim for each would cost a quarter of the memory's
// speed. Even shares lose nothing to claims one by one: whatever holds a thread up holds up the team at the op's end.
struct PieceQueue {
  Thread &thread;
  int64_t run;
  int64_t piece = 0, left = 0;

  PieceQueue(Thread &thread, int64_t rows, int64_t pieces)
      : thread(thread), run(rows <= FEW_ROWS ? (pieces + thread.count() - 1) / thread.count() : 1) {}

  int64_t take() {
    if (left == 0) piece = thread.claim() * run, left = run;
    --left;
    return piece++;
  }
};

// `prepared`: row of x that is the first prepared one.
inline void multiply(const LinearCall &call, const Activations &all, int64_t prepared, int64_t rows, Thread &thread) {
  const il_linear &linear = *call.linear;
  const bool is_gated = call.gate >= 0;
  const int64_t panels = linear.num_panels / (is_gated ? 2 : 1);
  // Chunks depend on the shape alone, and results on no chunk.
  const int64_t chunk = std::clamp<int64_t>(whole_tiles(CACHED_BYTES / (linear.in * 2)), TILES_ROWS, 4096);
  const int64_t pieces = (rows + chunk - 1) / chunk * panels;
  const PanelWork work{call, all};
  PieceQueue queue(thread, rows, pieces);
  int64_t piece = queue.take();
  while (piece < pieces) {
    const int64_t next = queue.take();
    const int64_t first = piece / panels * chunk, count = std::min(chunk, rows - first);
    const Panel &panel = linear.panels[piece % panels], *following = next < pieces ? &linear.panels[next % panels] : nullptr;
    const Target out{call.out + (prepared + first) * call.out_stride + panel.first * call.element(), call.out_stride};
    if (is_gated) {
      const Panel &partner = linear.panels[piece % panels + panels];
      const int64_t width = panel.strips * STRIP * call.element();
      const Target half{thread.scratch + HALVES_AT, width}, other{half.first + HALF_BYTES, width};
      work.run(panel, &partner, first, count, half);
      work.run(partner, following, first, count, other);
      call.out_wide ? join_halves<float>(call.gate, half, HALF_BYTES, out, count, panel.rows)
                    : join_halves<bf16>(call.gate, half, HALF_BYTES, out, count, panel.rows);
    } else {
      work.run(panel, following, first, count, out);
    }
    piece = next;
  }
}

inline void linear(const il_op &op, const il_step &step, Thread &thread) {
  LinearCall call;
  call.linear = static_cast<const il_linear *>(op.p[2]);
  call.x_wide = op.dtype == IL_F32;
  call.out_wide = call.x_wide || op.i[2] != 0;
  call.gate = op.i[3] - 1;
  call.x = static_cast<const uint8_t *>(op.p[0]);
  call.x_stride = op.i[0] * (call.x_wide ? 4 : 2);
  call.out = static_cast<uint8_t *>(op.p[1]);
  call.out_stride = op.i[1] * call.element();
  const int64_t rows = interlace::rows_of(op, step);
  const int64_t most = whole_tiles(Thread::SHARED_BYTES / std::max<int64_t>(1, Forms(call).row_bytes()));
  for (int64_t first = 0; first < rows; first += most) {
    if (first > 0) thread.barrier();
    const int64_t count = std::min(most, rows - first);
    const Activations all = prepare(call, first, count, thread);
    multiply(call, all, first, count, thread);
  }
}

}  // namespace IL_ISA
