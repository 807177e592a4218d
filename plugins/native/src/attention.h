// Paged attention over one KV group: prefill and decode rows in one batch, GQA, sliding window, soft cap.
//
// After FlashAttention (arXiv 2205.14135) and PagedAttention (2309.06180), laid out for a CPU: the heads that share a KV
// head are rows of one small product with each tile of keys. A query row goes through the tiles of 256 positions in
// ascending order, and what happens in a tile depends on nothing but that row and the tile; so its bits do not depend on
// the rest of the batch, on how a prefill is cut into steps, or on the number of threads.
#pragma once

#include "attention_pieces.h"

namespace IL_ISA {

// Query rows of a piece into words, padded with zeros.
template <typename T>
void gather_queries(const Layer &layer, const Sequence &sequence, const Piece &piece, KeyTile<T> &tile) {
  for (int64_t row = piece.first; row < piece.last; ++row) {
    const int64_t token = sequence.start + row / layer.ratio, head = piece.kv_head * layer.ratio + row % layer.ratio;
    const T *from = static_cast<const T *>(layer.query) + token * layer.query_stride + head * layer.head_size;
    std::memcpy(tile.query[row - piece.first], from, layer.head_size * sizeof(T));
  }
}

template <typename T>
void widen(const Layer &layer, const Granule &granule, int64_t at, KeyTile<T> &tile) {
  const int8_t *from[2] = {reinterpret_cast<int8_t *>(granule.keys), reinterpret_cast<int8_t *>(granule.values)};
  const int64_t count = GRANULE * layer.padded;
  for (int part = 0; part < 2; ++part) {
    T *to = tile.wide[part] + at * count;
    for (int64_t value = 0; value < count; value += LANES) {
      typedef int8_t vbyte __attribute__((vector_size(LANES), aligned(1), may_alias));
      store(to + value, __builtin_convertvector(*reinterpret_cast<const vbyte *>(from[part] + value), vfloat));
    }
  }
  std::memcpy(tile.key_scales + at * GRANULE, granule.key_scales, GRANULE * sizeof(float));
  std::memcpy(tile.value_scales + at * GRANULE, granule.value_scales, GRANULE * sizeof(float));
  tile.keys[at] = reinterpret_cast<const uint8_t *>(tile.wide[0] + at * count);
  tile.values[at] = reinterpret_cast<const uint8_t *>(tile.wide[1] + at * count);
}

// Granules [first, last) of a sequence.
template <typename T>
void find_granules(const Layer &layer, const Piece &piece, int64_t first, int64_t last, KeyTile<T> &tile) {
  const int32_t *table = layer.group->block_table + piece.row * layer.group->table_stride;
  for (int64_t at = first; at < last; ++at) {
    const int64_t position = at * GRANULE;
    const Granule granule(layer, table[position / layer.block_size], position % layer.block_size, piece.kv_head);
    tile.keys[at - first] = granule.keys;
    tile.values[at - first] = granule.values;
    if (layer.is_int8) widen(layer, granule, at - first, tile);
  }
}

// All query rows of a piece through one tile. Granules that no row sees are left out.
template <typename T>
void do_tile(const Layer &layer, const Sequence &sequence, const Piece &piece, int64_t index, KeyTile<T> &tile) {
  const int64_t rows = piece.last - piece.first;
  const auto position_of = [&](int64_t row) { return sequence.context + row / layer.ratio; };
  const int64_t begin = std::max(index * TILE, layer.first_seen(position_of(piece.first)));
  const int64_t end = std::min((index + 1) * TILE, position_of(piece.last - 1) + 1);
  const int64_t first = begin / GRANULE, last = (end + GRANULE - 1) / GRANULE;
  const int64_t columns = (last - first) * GRANULE, origin = first * GRANULE;
  find_granules(layer, piece, first, last, tile);
  cover<ScoreKernel, T, KERNEL_ROWS>(tile, 0, rows, columns / LANES, layer.head_size * int64_t{sizeof(T)} / 4);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t position = position_of(piece.first + row);
    const int64_t from = layer.first_seen(position) - origin, to = position + 1 - origin;
    weigh(layer, tile, row, columns, finish_scores(layer, tile, row, columns, from, to));
  }
  cover<ValueKernel, T, KERNEL_ROWS>(tile, 0, rows, layer.padded / LANES, last - first, layer.padded);
}

// The weighted mean of the values, to its place in the output. Adding zero makes a negative zero a positive one: its
// sign is all that a tile in which a row sees nothing could change.
template <typename T>
void put_out(const Layer &layer, int64_t token, int64_t head, const float *sums, float total) {
  T *out = static_cast<T *>(layer.out) + token * layer.out_stride + head * layer.head_size;
  const vfloat inverse = broadcast(1.0f / total), zero = {};
  over_row(layer.head_size, [&](int64_t at, int64_t n) { store_some(out + at, load(sums + at) * inverse + zero, n); });
}

template <typename T>
void attend(const Layer &layer, const Piece &piece, const Partials &partials, KeyTile<T> &tile) {
  const Sequence sequence(*layer.step, piece.row);
  const int64_t rows = piece.last - piece.first, last_tile = sequence.last_tile();
  const bool is_whole = piece.tile == ALL_TILES;
  if (!sequence.is_shared(layer) && (is_whole || piece.tile == last_tile))
    write_tokens<T>(layer, sequence.start, sequence.start + 1, piece.kv_head, true);
  gather_queries(layer, sequence, piece, tile);
  for (int64_t row = 0; row < rows; ++row) {
    std::memset(tile.sums[row], 0, layer.padded * sizeof(float));
    tile.largest[row] = LOWEST;
    tile.total[row] = 0.0f;
  }
  if (!is_whole) {
    do_tile(layer, sequence, piece, piece.tile, tile);
  } else {
    const int64_t first_seen = layer.first_seen(sequence.context + piece.first / layer.ratio);
    const int64_t end = sequence.context + (piece.last - 1) / layer.ratio;
    for (int64_t index = first_seen / TILE; index <= end / TILE; ++index) do_tile(layer, sequence, piece, index, tile);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = piece.first + row, head = piece.kv_head * layer.ratio + at % layer.ratio;
    if (is_whole) {
      put_out<T>(layer, sequence.start + at / layer.ratio, head, tile.sums[row], tile.total[row]);
      continue;
    }
    float *record = partials.at(piece.row, head, piece.tile - sequence.first_tile(layer));
    record[0] = tile.largest[row];
    record[1] = tile.total[row];
    std::memcpy(record + GRANULE, tile.sums[row], layer.padded * sizeof(float));
  }
}

// Join the tiles of the single tokens, with the arithmetic of `weigh` and `value_kernel`.
template <typename T>
void join_partials(const Layer &layer, const Partials &partials, Thread &thread) {
  for (int64_t piece; (piece = thread.claim()) < layer.step->num_rows * layer.heads;) {
    const int64_t row = piece / layer.heads, head = piece % layer.heads;
    const Sequence sequence(*layer.step, row);
    if (sequence.length != 1) continue;
    alignas(64) float sums[MAX_HEAD_SIZE] = {};
    float largest = LOWEST, total = 0.0f;
    for (int64_t tile = 0; tile <= sequence.last_tile() - sequence.first_tile(layer); ++tile) {
      const float *record = partials.at(row, head, tile);
      const float larger = std::max(largest, record[0]);
      const float keep = power_of<T>(largest - larger), take = power_of<T>(record[0] - larger);
      largest = larger;
      total = fma(total, keep, record[1] * take);
      for (int64_t at = 0; at < layer.padded; at += LANES)
        store(sums + at, joined(load(sums + at), broadcast(keep), load(record + GRANULE + at), broadcast(take)));
    }
    put_out<T>(layer, sequence.start, head, sums, total);
  }
}

// Keys and values that several pieces see; one thread writes a granule.
template <typename T>
void write_shared(const Layer &layer, Thread &thread) {
  int64_t row = 0, before = 0;
  for (int64_t piece; (piece = thread.claim()) >= 0;) {
    for (; row < layer.step->num_rows; ++row) {
      const Sequence sequence(*layer.step, row);
      const int64_t count = sequence.is_shared(layer) ? sequence.granules() : 0;
      if (piece < before + count) break;
      before += count;
    }
    if (row == layer.step->num_rows) return;
    const Sequence sequence(*layer.step, row);
    const int64_t granule = sequence.context / GRANULE + piece - before, end = sequence.context + sequence.length;
    const int64_t first = std::max(sequence.context, granule * GRANULE), last = std::min(end, (granule + 1) * GRANULE);
    const int64_t offset = sequence.start - sequence.context;
    for (int64_t kv_head = 0; kv_head < layer.kv_heads; ++kv_head)
      write_tokens<T>(layer, offset + first, offset + last, kv_head, last == end);
  }
}

template <typename T>
void attend_all(const Layer &layer, Thread &thread) {
  static_assert(sizeof(KeyTile<T>) <= Thread::SCRATCH_BYTES, "a thread's scratch is too small");
  KeyTile<T> &tile = *reinterpret_cast<KeyTile<T> *>(thread.scratch);
  bool has_shared = false;
  for (int64_t row = 0; row < layer.step->num_rows; ++row) has_shared |= Sequence(*layer.step, row).is_shared(layer);
  if (has_shared) {
    write_shared<T>(layer, thread);
    thread.barrier();
  }
  const Partials partials(layer, thread);
  Pieces pieces(layer, partials.is_needed);
  for (Piece piece; pieces.find(thread.claim(), &piece);) attend(layer, piece, partials, tile);
  if (partials.is_needed) {
    thread.barrier();
    join_partials<T>(layer, partials, thread);
  }
}

// i: 0 to 3 row strides of query, key, value and out (their heads are dense), 4 heads, 5 KV heads, 6 head size, 7 block
// size, 8 group, 9 window or 0, 10 whether the cache is 8-bit. f: 0 scale, 1 soft cap or 0. p: 0 query [tokens, heads, head
// size], 1 key and 2 value [tokens, KV heads, head size], 3 cache, 4 out like query. Rows are those of the step.
inline void attention(const il_op &op, const il_step &step, Thread &thread) {
  const Layer layer(op, step);
  op.dtype == IL_BF16 ? attend_all<bf16>(layer, thread) : attend_all<float>(layer, thread);
}

}  // namespace IL_ISA
