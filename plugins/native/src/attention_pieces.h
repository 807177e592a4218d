// How attention is cut into pieces of work. No cut changes a bit of the result.
#pragma once

#include "attention_softmax.h"

namespace IL_ISA {

// A sequence of the step.
struct Sequence {
  int64_t row, start, length, context;  // row of the batch, its first token, tokens of this step, tokens before

  Sequence(const il_step &step, int64_t at)
      : row(at), start(step.query_start[at]), length(step.query_start[at + 1] - step.query_start[at]),
        context(step.context_lens[at]) {}

  int64_t first_tile(const Layer &layer) const { return layer.first_seen(context) / TILE; }
  int64_t last_tile() const { return (context + length - 1) / TILE; }
  // Whether more than one piece sees the new keys and values, so that they must be written before any of them starts.
  bool is_shared(const Layer &layer) const { return length > 1 || (length == 1 && layer.ratio > MAX_ROWS); }
  int64_t granules() const { return (context + length - 1) / GRANULE - context / GRANULE + 1; }
};

constexpr int64_t ALL_TILES = -1;

// Some query rows of one KV head: row r is token r / ratio of the step, and head r % ratio of those of the KV head.
struct Piece {
  int64_t row, kv_head, first, last;  // row of the batch; query rows
  int64_t tile;                       // the only one to do, or ALL_TILES
};

// Hands out the pieces of one op: claims come in ascending order, so a cursor finds each. Sequences with several tokens
// come first, of these the tokens that see most, and single tokens fill up the end.
class Pieces {
 public:
  // `splits`: single tokens are also cut by tiles.
  Pieces(const Layer &layer, bool splits) : layer_(layer), splits_(splits) {}

  bool find(int64_t claim, Piece *piece) {
    for (; pass_ < 2; ++pass_, row_ = 0)
      for (; row_ < layer_.step->num_rows; ++row_) {
        const Sequence sequence(*layer_.step, row_);
        const int64_t count = count_of(sequence);
        if (claim < before_ + count) {
          *piece = make(sequence, claim - before_);
          return true;
        }
        before_ += count;
      }
    return false;
  }

 private:
  bool is_split() const { return pass_ == 1 && splits_; }
  int64_t blocks_of(const Sequence &sequence) const {
    return (sequence.length * layer_.ratio + MAX_ROWS - 1) / MAX_ROWS;
  }

  int64_t count_of(const Sequence &sequence) const {
    if (sequence.length == 0 || (sequence.length > 1) != (pass_ == 0)) return 0;
    const int64_t tiles = is_split() ? sequence.last_tile() - sequence.first_tile(layer_) + 1 : 1;
    return blocks_of(sequence) * layer_.kv_heads * tiles;
  }

  Piece make(const Sequence &sequence, int64_t index) const {
    const int64_t blocks = blocks_of(sequence), kv_head = index % layer_.kv_heads;
    const int64_t first = (blocks - 1 - index / layer_.kv_heads % blocks) * MAX_ROWS;
    const int64_t last = std::min(sequence.length * layer_.ratio, first + MAX_ROWS);
    const int64_t tile = sequence.first_tile(layer_) + index / layer_.kv_heads / blocks;
    return {sequence.row, kv_head, first, last, is_split() ? tile : ALL_TILES};
  }

  const Layer &layer_;
  const bool splits_;
  int pass_ = 0;
  int64_t row_ = 0, before_ = 0;
};

// One tile of a piece: what a thread does at a time.
struct Task {
  Piece piece;
  int64_t tile;
  bool is_first, is_last;  // of the piece's tiles
};

// A thread's tasks, in order; it asks for one more than it has begun, to fetch memory ahead.
class Tasks {
 public:
  Tasks(const Layer &layer, bool splits, Thread &thread) : layer_(layer), thread_(thread), pieces_(layer, splits) {}

  // False if there are no more.
  bool next(Task *task) {
    if (tile_ > last_ && !claim()) return false;
    *task = {piece_, tile_, tile_ == first_, tile_ == last_};
    ++tile_;
    return true;
  }

 private:
  bool claim() {
    if (!pieces_.find(thread_.claim(), &piece_)) return false;
    const Sequence sequence(*layer_.step, piece_.row);
    first_ = last_ = piece_.tile;
    if (piece_.tile == ALL_TILES) {
      first_ = layer_.first_seen(sequence.context + piece_.first / layer_.ratio) / TILE;
      last_ = (sequence.context + (piece_.last - 1) / layer_.ratio) / TILE;
    }
    tile_ = first_;
    return true;
  }

  const Layer &layer_;
  Thread &thread_;
  Pieces pieces_;
  Piece piece_ = {};
  int64_t tile_ = 0, first_ = 0, last_ = -1;
};

// What a piece of one tile leaves for the thread that joins them: one record per query head and tile.
class Partials {
 public:
  Partials(const Layer &layer, Thread &thread) : layer_(layer), memory_(reinterpret_cast<float *>(thread.shared)) {
    int64_t pieces = 0, most = 0;
    for (int64_t row = 0; row < layer.step->num_rows; ++row) {
      const Sequence sequence(*layer.step, row);
      if (sequence.length == 0) continue;
      pieces += (sequence.length * layer.ratio + MAX_ROWS - 1) / MAX_ROWS * layer.kv_heads;
      if (sequence.length == 1) most = std::max(most, sequence.last_tile() - sequence.first_tile(layer) + 1);
    }
    tiles_ = most;
    const int64_t bytes = layer.step->num_rows * layer.heads * most * record() * int64_t{sizeof(float)};
    is_needed = most > 1 && thread.count() > 1 && pieces < 4 * thread.count() && bytes <= Thread::SHARED_BYTES;
  }

  // Whether there are so few pieces of work that long sequences of single tokens must be cut by tiles.
  bool is_needed;

  // [largest score, sum of the weights, sums of the values]; `tile` counts from the first one that is seen.
  float *at(int64_t row, int64_t head, int64_t tile) const {
    return memory_ + ((row * layer_.heads + head) * tiles_ + tile) * record();
  }

 private:
  int64_t record() const { return layer_.padded + GRANULE; }

  const Layer &layer_;
  float *memory_;
  int64_t tiles_;
};

}  // namespace IL_ISA
