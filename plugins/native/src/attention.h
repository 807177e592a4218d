// Paged attention over one KV group: prefill and decode rows in one batch, GQA, sliding window, soft cap.
//
// After FlashAttention (arXiv 2205.14135) and PagedAttention (2309.06180), laid out for a CPU: the heads that share a KV
// head are rows of one small product with each tile of keys. A query row goes through the tiles of 256 positions in
// ascending order, and what happens in a tile depends on nothing but that row and the tile; so its bits do not depend on
// the rest of the batch, on how a prefill is cut into steps, or on the number of threads.
#pragma once

#include "attention_pieces.h"

namespace IL_ISA {

// Where the tokens of a task lie. Granules that none of its rows sees are left out.
inline void find_granules(const Layer &layer, const Task &task, Span *span) {
  const Sequence sequence(*layer.step, task.piece.row);
  const int64_t oldest = sequence.context + task.piece.first / layer.ratio;
  const int64_t newest = sequence.context + (task.piece.last - 1) / layer.ratio;
  const int64_t begin = std::max(task.tile * TILE, layer.first_seen(oldest));
  const int64_t end = std::min((task.tile + 1) * TILE, newest + 1);
  span->first = begin / GRANULE;
  span->count = (end + GRANULE - 1) / GRANULE - span->first;
  const int64_t per_block = layer.block_size / GRANULE;
  int64_t block = span->first / per_block, inner = span->first % per_block;
  const int32_t *table = layer.group->block_table + task.piece.row * layer.group->table_stride;
  for (int64_t at = 0; at < span->count; ++at) {
    const Granule granule(layer, table[block], inner, task.piece.kv_head);
    span->keys[at] = granule.keys;
    span->values[at] = granule.values;
    span->key_scales[at] = granule.key_scales;
    span->value_scales[at] = granule.value_scales;
    if (++inner == per_block) ++block, inner = 0;
  }
}

// Where query row `at` of a KV head lies, in values, if tokens are `stride` apart; also its result.
inline int64_t place_of(const Layer &layer, const Sequence &sequence, int64_t kv_head, int64_t at, int64_t stride) {
  const int64_t token = sequence.start + at / layer.ratio, head = kv_head * layer.ratio + at % layer.ratio;
  return token * stride + head * layer.head_size;
}

// Query rows of a piece, next to each other; and nothing summed up yet.
template <typename T>
void begin_piece(const Layer &layer, const Sequence &sequence, const Piece &piece, KeyTile<T> &tile) {
  for (int64_t row = 0; row < piece.last - piece.first; ++row) {
    const int64_t from = place_of(layer, sequence, piece.kv_head, piece.first + row, layer.query_stride);
    std::memcpy(tile.query[row], static_cast<const T *>(layer.query) + from, layer.head_size * sizeof(T));
    std::memset(tile.sums[row], 0, layer.padded * sizeof(float));
    tile.largest[row] = LOWEST;
    tile.total[row] = 0.0f;
  }
}

// Query rows of the next piece, and where its results go: short runs, which no processor sees coming. Always inlined:
// see `fetch`.
template <typename T>
inline __attribute__((always_inline)) void fetch_rows(const Layer &layer, const Piece &piece) {
  const Sequence sequence(*layer.step, piece.row);
  for (int64_t at = piece.first; at < piece.last; ++at) {
    const int64_t from = place_of(layer, sequence, piece.kv_head, at, layer.query_stride);
    const int64_t to = place_of(layer, sequence, piece.kv_head, at, layer.out_stride);
    for (int64_t value = 0; value < layer.head_size; value += 64 / sizeof(T)) {
      __builtin_prefetch(static_cast<const T *>(layer.query) + from + value);
      __builtin_prefetch(static_cast<const T *>(layer.out) + to + value, 1);
    }
  }
}

// 8-bit keys and values of a tile as T, for several groups of rows: each would have to widen them anew. What the kernels
// fetch while they read them is the next tile.
template <typename T>
void widen(const Layer &layer, const Span &span, const Span &next, KeyTile<T> &tile) {
  const int64_t count = GRANULE * layer.padded;
  for (int64_t at = 0; at < span.count; ++at) {
    for (int part = 0; part < 2; ++part) {
      const uint8_t *from = part ? span.values[at] : span.keys[at];
      T *to = tile.wide[part] + at * count;
      for (int64_t value = 0; value < count; value += 2 * LANES) widen_some(from + value, to + value);
    }
    const int64_t later = std::min(at, next.count - 1);
    tile.keys[at] = reinterpret_cast<const uint8_t *>(tile.wide[0] + at * count);
    tile.values[at] = reinterpret_cast<const uint8_t *>(tile.wide[1] + at * count);
    tile.ahead[at] = later < 0 ? tile.keys[at] : next.keys[later];
    tile.ahead[span.count + at] = later < 0 ? tile.values[at] : next.values[later];
  }
}

// Whether the kernels read the cache's 8-bit values themselves.
inline bool is_narrow(const Layer &layer, const Piece &piece) {
  return layer.is_int8 && piece.last - piece.first <= KERNEL_ROWS;
}

// What the kernels read now, and what they fetch meanwhile: what will be read CACHE_AHEAD bytes later, of this and the
// next task.
template <typename T>
void set_granules(const Layer &layer, const Piece &piece, const Span &span, const Span &next, KeyTile<T> &tile) {
  for (int64_t at = 0; layer.is_int8 && at < span.count; ++at) {
    std::memcpy(tile.key_scales + at * GRANULE, span.key_scales[at], GRANULE * sizeof(float));
    std::memcpy(tile.value_scales + at * GRANULE, span.value_scales[at], GRANULE * sizeof(float));
  }
  if (layer.is_int8 && !is_narrow(layer, piece)) return widen(layer, span, next, tile);
  const int64_t distance = std::clamp<int64_t>(CACHE_AHEAD / layer.granule_bytes, 1, MAX_AHEAD);
  const uint8_t *order[4 * TILE_GRANULES];
  int64_t known = 0;
  for (const Span *each : {&span, &next}) {
    for (int64_t at = 0; at < each->count; ++at) order[known++] = each->keys[at];
    for (int64_t at = 0; at < each->count; ++at) order[known++] = each->values[at];
  }
  for (int64_t at = 0; at < 2 * span.count; ++at) tile.ahead[at] = order[std::min(at + distance, known - 1)];
  std::copy_n(span.keys, span.count, tile.keys);
  std::copy_n(span.values, span.count, tile.values);
}

// All query rows of a piece through one tile.
template <typename T>
void do_tile(const Layer &layer, const Sequence &sequence, const Piece &piece, const Span &span, KeyTile<T> &tile) {
  const int64_t rows = piece.last - piece.first, columns = span.count * GRANULE, origin = span.first * GRANULE;
  const int64_t words = layer.head_size * int64_t{sizeof(T)} / 4;
  const bool narrow = is_narrow(layer, piece);
  narrow ? cover<Scores<true>::Kernel, T, KERNEL_COLUMNS>(tile, rows, 0, columns / LANES, words)
         : cover<Scores<false>::Kernel, T, KERNEL_COLUMNS>(tile, rows, 0, columns / LANES, words);
  float largest[PADDED_ROWS] = {}, total[PADDED_ROWS] = {};
  const int64_t position = sequence.context + piece.first / layer.ratio;
  weigh_rows(layer, tile, rows, columns, position, piece.first % layer.ratio, origin, largest, total);
  prepare_join(largest, total, rows, tile);
  narrow ? cover<Values<true>::Kernel, T, KERNEL_COLUMNS>(tile, rows, 0, layer.padded / LANES, span.count, layer.padded)
         : cover<Values<false>::Kernel, T, KERNEL_COLUMNS>(tile, rows, 0, layer.padded / LANES, span.count, layer.padded);
}

// The weighted mean of the values, to its place in the output. Adding zero makes a negative zero a positive one: its
// sign is all that a tile in which a row sees nothing could change.
template <typename T>
void put_out(const Layer &layer, int64_t token, int64_t head, const float *sums, float total) {
  T *out = static_cast<T *>(layer.out) + token * layer.out_stride + head * layer.head_size;
  const vfloat inverse = broadcast(1.0f / total), zero = {};
  over_row(layer.head_size, [&](int64_t at, int64_t n) { store_some(out + at, load(sums + at) * inverse + zero, n); });
}

// Results of a piece: to the output, or for the thread that joins the tiles.
template <typename T>
void end_piece(const Layer &layer, const Sequence &sequence, const Piece &piece, const Partials &partials,
               KeyTile<T> &tile) {
  for (int64_t row = 0; row < piece.last - piece.first; ++row) {
    const int64_t at = piece.first + row, head = piece.kv_head * layer.ratio + at % layer.ratio;
    if (piece.tile == ALL_TILES) {
      put_out<T>(layer, sequence.start + at / layer.ratio, head, tile.sums[row], tile.total[row]);
      continue;
    }
    float *record = partials.at(piece.row, head, piece.tile - sequence.first_tile(layer));
    record[0] = tile.largest[row];
    record[1] = tile.total[row];
    std::memcpy(record + GRANULE, tile.sums[row], layer.padded * sizeof(float));
  }
}

// The kernels fetch keys and values while they work; scales lie apart from these. Always inlined: see `fetch`.
inline __attribute__((always_inline)) void fetch_scales(const Layer &layer, const Span &span) {
  for (int64_t at = 0; layer.is_int8 && at < span.count; ++at) {
    __builtin_prefetch(span.key_scales[at]);
    __builtin_prefetch(span.value_scales[at]);
  }
}

template <typename T>
void do_tasks(const Layer &layer, const Partials &partials, Thread &thread) {
  static_assert(sizeof(KeyTile<T>) <= Thread::SCRATCH_BYTES, "a thread's scratch is too small");
  KeyTile<T> &tile = *reinterpret_cast<KeyTile<T> *>(thread.scratch);
  Tasks tasks(layer, partials.is_needed, thread);
  Task task, following;
  Span spans[2];
  bool is_there = tasks.next(&task);
  if (is_there) find_granules(layer, task, &spans[0]);
  for (int64_t turn = 0; is_there; ++turn, task = following) {
    const Span &span = spans[turn % 2];
    Span &next = spans[(turn + 1) % 2];
    is_there = tasks.next(&following);
    next.count = 0;
    if (is_there) find_granules(layer, following, &next);
    fetch_scales(layer, next);
    if (is_there && following.is_first) fetch_rows<T>(layer, following.piece);
    const Sequence sequence(*layer.step, task.piece.row);
    if (task.is_first) begin_piece(layer, sequence, task.piece, tile);
    if (!sequence.is_shared(layer) && task.tile == sequence.last_tile())
      write_tokens<T>(layer, sequence.start, sequence.start + 1, task.piece.kv_head, true);
    set_granules(layer, task.piece, span, next, tile);
    do_tile(layer, sequence, task.piece, span, tile);
    if (task.is_last) end_piece(layer, sequence, task.piece, partials, tile);
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
void attend(const Layer &layer, Thread &thread) {
  bool has_shared = false;
  for (int64_t row = 0; row < layer.step->num_rows; ++row) has_shared |= Sequence(*layer.step, row).is_shared(layer);
  if (has_shared) {
    write_shared<T>(layer, thread);
    thread.barrier();
  }
  const Partials partials(layer, thread);
  do_tasks<T>(layer, partials, thread);
  if (partials.is_needed) {
    thread.barrier();
    join_partials<T>(layer, partials, thread);
  }
}

// i: 0 to 3 row strides of query, key, value and out (their heads are dense), 4 heads, 5 KV heads, 6 head size, 7 block
// size, 8 group, 9 window or 0, 10 whether the cache is 8-bit. f: 0 scale, above 0; 1 soft cap or 0. p: 0 query [tokens,
// heads, head size], 1 key and 2 value [tokens, KV heads, head size], 3 cache, 4 out like query. Rows are those of the step.
inline void attention(const il_op &op, const il_step &step, Thread &thread) {
  const Layer layer(op, step);
  op.dtype == IL_BF16 ? attend<bf16>(layer, thread) : attend<float>(layer, thread);
}

}  // namespace IL_ISA
