// Ops on logits.
#pragma once

#include "elementwise.h"

namespace IL_ISA {

struct Peak {
  float value;
  int64_t index;
  // A NaN counts as the largest; of equal values the first wins, so an earlier one is replaced by a larger one only.
  bool is_below(float other) const { return other > value || (other != other && value == value); }
};

inline Peak peak_of(const float *values, int64_t first, int64_t last) {
  Peak best{values[first], first};
  int64_t at = first;
  for (; at + 4 * LANES <= last; at += 4 * LANES) {
    const vfloat limit = broadcast(best.value);
    vint is_candidate = {};  // not (value <= best), so that a NaN is looked at, too
    for (int part = 0; part < 4; ++part) is_candidate |= ~(load(values + at + part * LANES) <= limit);
    bool any = false;
    for (int lane = 0; lane < LANES; ++lane) any |= is_candidate[lane] != 0;
    if (!any) continue;
    for (int64_t place = at; place < at + 4 * LANES; ++place)
      if (best.is_below(values[place])) best = {values[place], place};
  }
  for (; at < last; ++at)
    if (best.is_below(values[at])) best = {values[at], at};
  return best;
}

// Index and value of the largest logit of each row. i: 0 vocabulary, 1 row stride. p: 0 logits [rows, vocabulary] float32,
// 1 int64 out [rows], 2 float32 out [rows].
inline void argmax(const il_op &op, const il_step &step, Thread &thread) {
  constexpr int64_t PART = 8192;
  const int64_t rows = interlace::rows_of(op, step), vocabulary = op.i[0], parts = (vocabulary + PART - 1) / PART;
  Peak *peaks = reinterpret_cast<Peak *>(thread.shared);
  const int64_t rows_at_once = std::max<int64_t>(1, Thread::SHARED_BYTES / (parts * int64_t{sizeof(Peak)}));
  for (int64_t start = 0; start < rows; start += rows_at_once) {
    const int64_t stop = std::min(rows, start + rows_at_once);
    for (int64_t piece; (piece = thread.claim()) < (stop - start) * parts;) {
      const float *row = static_cast<const float *>(op.p[0]) + (start + piece / parts) * op.i[1];
      const int64_t first = piece % parts * PART;
      peaks[piece] = peak_of(row, first, std::min(vocabulary, first + PART));
    }
    thread.barrier();
    for (int64_t row = start + thread.id; row < stop; row += thread.count()) {
      const Peak *found = peaks + (row - start) * parts;
      Peak best = found[0];
      for (int64_t part = 1; part < parts; ++part)
        if (best.is_below(found[part].value)) best = found[part];
      static_cast<int64_t *>(op.p[1])[row] = best.index;
      static_cast<float *>(op.p[2])[row] = best.value;
    }
    thread.barrier();
  }
}

}  // namespace IL_ISA
