// Ops on logits.
#pragma once

#include "elementwise.h"

namespace IL_ISA {

// Whether there was a NaN among values.
struct NanSeen {
#if defined(IL_AVX512)
  uint32_t seen = 0;
  void look_at(vfloat value) {
    seen |= _mm512_cmp_ps_mask(reinterpret_cast<__m512>(value), reinterpret_cast<__m512>(value), _CMP_UNORD_Q);
  }
  bool any() const { return seen != 0; }
#else
  vint seen = {};
  void look_at(vfloat value) { seen |= value != value; }
  bool any() const {
    int32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= seen[lane];
    return found != 0;
  }
#endif
};

// The largest of `count` values; a NaN if there is one.
inline float peak_of(const float *values, int64_t count) {
  constexpr int CHAINS = 4;
  vfloat largest[CHAINS];
  NanSeen nan;
  for (vfloat &chain : largest) chain = broadcast(-std::numeric_limits<float>::infinity());
  int64_t at = 0;
  for (; at + CHAINS * LANES <= count; at += CHAINS * LANES)
    for (int chain = 0; chain < CHAINS; ++chain) {
      const vfloat value = load(values + at + chain * LANES);
      largest[chain] = larger(value, largest[chain]);  // passes over a NaN
      nan.look_at(value);
    }
  float best = max_lane(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
  if (nan.any()) return std::numeric_limits<float>::quiet_NaN();
  for (; at < count; ++at) {
    if (values[at] != values[at]) return values[at];
    best = std::max(best, values[at]);
  }
  return best;
}

inline int64_t place_of(float peak, const float *values) {
  int64_t place = 0;
  while (values[place] != peak && !(peak != peak && values[place] != values[place])) ++place;
  return place;
}

// Index and value of the largest logit of each row; a NaN counts as the largest, and of equal ones the first wins.
// i: 0 vocabulary, 1 row stride. p: 0 logits [rows, vocabulary] float32, 1 int64 out [rows], 2 float32 out [rows].
inline void argmax(const il_op &op, const il_step &step, Thread &thread) {
  constexpr int64_t PART = 8192;
  const int64_t rows = interlace::rows_of(op, step), vocabulary = op.i[0], parts = (vocabulary + PART - 1) / PART;
  float *peaks = reinterpret_cast<float *>(thread.shared);
  const int64_t rows_at_once = std::max<int64_t>(1, Thread::SHARED_BYTES / (parts * int64_t{sizeof(float)}));
  for (int64_t start = 0; start < rows; start += rows_at_once) {
    const int64_t stop = std::min(rows, start + rows_at_once);
    const auto row_at = [&](int64_t row) { return static_cast<const float *>(op.p[0]) + row * op.i[1]; };
    for (int64_t piece; (piece = thread.claim()) < (stop - start) * parts;) {
      const int64_t first = piece % parts * PART;
      peaks[piece] = peak_of(row_at(start + piece / parts) + first, std::min(PART, vocabulary - first));
    }
    thread.barrier();
    for (int64_t row = start + thread.id; row < stop; row += thread.count()) {
      const float *found = peaks + (row - start) * parts;
      int64_t best = 0;
      for (int64_t part = 1; part < parts && found[best] == found[best]; ++part)
        if (!(found[part] <= found[best])) best = part;
      static_cast<int64_t *>(op.p[1])[row] = best * PART + place_of(found[best], row_at(row) + best * PART);
      static_cast<float *>(op.p[2])[row] = found[best];
    }
    thread.barrier();
  }
}

}  // namespace IL_ISA
