// Draws a token per row: temperature, min_p, top_k, top_p, and the inverse of the cumulative distribution.
//
// The rules are those of interlace.sampling.distribution: each limit is a threshold on weight, so tokens that tie with the
// least likely kept one are kept as well. What differs is the way there. No row is sorted: few tokens can matter to a
// limit, so those above a cutoff are gathered, and the threshold is found among them by selection.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "elementwise_math.h"
#include "runtime.h"
#include "vector.h"

namespace IL_ISA {

// The parameters of one row, as Python hands them over.
struct Shape {
  double temperature, top_k, top_p, min_p;
};

constexpr int64_t DRAW_BLOCK = 256;  // weights summed at a time in single precision

// Largest value; NaN if the row holds a NaN or +inf, which no distribution has.
inline float row_peak(const float *x, int64_t size) {
  vfloat best = broadcast(-std::numeric_limits<float>::infinity());
  vint bad = {};
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) {
    const vfloat value = load(x + at);
    bad |= (value != value);
    best = value > best ? value : best;
  }
  float peak = -std::numeric_limits<float>::infinity();
  bool is_bad = false;
  for (int lane = 0; lane < LANES; ++lane) {
    peak = std::max(peak, best[lane]);
    is_bad |= bad[lane] != 0;
  }
  for (; at < size; ++at) {
    is_bad |= std::isnan(x[at]);
    peak = std::max(peak, x[at]);
  }
  return is_bad || peak == std::numeric_limits<float>::infinity() ? std::nanf("") : peak;
}

// weights[i] = exp(x / temperature - its maximum), 0 below `floor` (a logarithm).
inline void weigh(const float *x, float *weights, int64_t size, float temperature, float peak, float floor) {
  const float top = peak / temperature;
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) {
    const vfloat scaled = load(x + at) / temperature - top;
    store(weights + at, scaled >= floor ? exp(scaled) : vfloat{});
  }
  for (; at < size; ++at) {
    const float scaled = x[at] / temperature - top;
    weights[at] = scaled >= floor ? std::exp(scaled) : 0.0f;
  }
}

// Sum of the weights of at least `least` in one block.
inline float block_sum(const float *weights, int64_t size, float least) {
  vfloat total = {};
  int64_t at = 0;
  for (; at + LANES <= size; at += LANES) {
    const vfloat value = load(weights + at);
    total += value >= least ? value : vfloat{};
  }
  float rest = sum(total);
  for (; at < size; ++at) rest += weights[at] >= least ? weights[at] : 0.0f;
  return rest;
}

inline double total_weight(const float *weights, int64_t size, float least) {
  double total = 0;
  for (int64_t at = 0; at < size; at += DRAW_BLOCK)
    total += block_sum(weights + at, std::min(DRAW_BLOCK, size - at), least);
  return total;
}

// Copy the weights of at least `cutoff` (> 0) to `out`; how many there are.
inline int64_t gather_above(const float *weights, int64_t size, float cutoff, float *out) {
  int64_t found = 0, at = 0;
  for (; at + LANES <= size; at += LANES) {
    const vint above = load(weights + at) >= cutoff;
    int32_t any = 0;
    for (int lane = 0; lane < LANES; ++lane) any |= above[lane];
    if (any == 0) continue;
    for (int lane = 0; lane < LANES; ++lane)
      if (above[lane]) out[found++] = weights[at + lane];
  }
  for (; at < size; ++at)
    if (weights[at] >= cutoff) out[found++] = weights[at];
  return found;
}

// The k-th largest weight (0 if fewer are positive). `room` holds `size` floats.
inline float kth_largest(const float *weights, int64_t size, int64_t k, float *room) {
  for (float cutoff = 1e-3f; cutoff > 1e-30f; cutoff *= 1e-4f) {
    const int64_t found = gather_above(weights, size, cutoff, room);
    if (found >= k) {
      std::nth_element(room, room + k - 1, room + found, [](float a, float b) { return a > b; });
      return room[k - 1];
    }
  }
  return 0.0f;
}

// The smallest weight in the smallest set of likeliest weights that holds `wanted`; selection as in quickselect, by mass
// instead of by rank.
inline float least_of_mass(float *values, int64_t count, double wanted) {
  float least = count ? *std::max_element(values, values + count) : 0.0f;
  float *begin = values, *end = values + count;
  while (begin < end) {
    const float pivot = begin[(end - begin) / 2];
    float *equal = std::partition(begin, end, [pivot](float value) { return value > pivot; });
    float *below = std::partition(equal, end, [pivot](float value) { return value == pivot; });
    double larger = 0;
    for (const float *at = begin; at < equal; ++at) larger += *at;
    if (larger >= wanted && equal > begin) {
      end = equal;
      continue;
    }
    least = pivot;
    wanted -= larger + static_cast<double>(pivot) * static_cast<double>(below - equal);
    if (wanted <= 0) break;
    begin = below;
  }
  return least;
}

// The smallest weight that top_p keeps of those of at least `least`, which weigh `total`.
inline float nucleus(const float *weights, int64_t size, float least, double total, double top_p, float *room) {
  // Weights below the cutoff cannot hold the share that is left over, so the threshold lies above.
  const double cutoff = (1.0 - top_p) * total / (2.0 * static_cast<double>(size));
  const float from = std::max(least, static_cast<float>(std::max(cutoff, 1e-37)));
  return least_of_mass(room, gather_above(weights, size, from, room), top_p * total);
}

// The first token whose cumulative weight exceeds `target`, of weights of at least `least`.
inline int64_t invert(const float *weights, int64_t size, float least, double target) {
  double before = 0;
  for (int64_t block = 0; block < size; block += DRAW_BLOCK) {
    const int64_t length = std::min(DRAW_BLOCK, size - block);
    const double mass = block_sum(weights + block, length, least);
    if (before + mass <= target) {
      before += mass;
      continue;
    }
    for (int64_t at = block; at < block + length; ++at) {
      if (weights[at] < least) continue;
      before += weights[at];
      if (before > target) return at;
    }
  }
  // Rounding left the target at the very end: the last token that is kept.
  for (int64_t at = size - 1; at >= 0; --at)
    if (weights[at] >= least) return at;
  return -1;
}

inline int64_t draw_row(const float *x, int64_t size, const Shape &shape, double uniform, float *weights, float *room) {
  const float peak = row_peak(x, size);
  if (!std::isfinite(peak)) return -1;
  const float temperature = static_cast<float>(std::max(shape.temperature, 1e-6));
  const float floor = shape.min_p > 0 ? static_cast<float>(std::log(shape.min_p)) : -103.0f;  // below: exp gives 0
  weigh(x, weights, size, temperature, peak, floor);
  float least = std::numeric_limits<float>::min();
  const int64_t top_k = static_cast<int64_t>(shape.top_k);
  if (top_k > 0 && top_k < size) least = std::max(least, kth_largest(weights, size, top_k, room));
  double total = total_weight(weights, size, least);
  if (shape.top_p < 1.0) {
    least = std::max(least, nucleus(weights, size, least, total, shape.top_p, room));
    total = total_weight(weights, size, least);
  }
  return invert(weights, size, least, uniform * total);
}

// i: 0 vocabulary, 1 row stride of logits. p: 0 logits float32, 1 rows to draw for [rows] int64, 2 their Shape [rows],
// 3 numbers in [0, 1) [rows] float64, 4 token ids [rows] int64, -1 where the row is no distribution. Two vocabularies of
// floats must fit the scratch memory.
inline void draw(const il_op &op, const il_step &step, interlace::Thread &thread) {
  const int64_t rows = interlace::rows_of(op, step), size = op.i[0];
  auto *weights = reinterpret_cast<float *>(thread.scratch);
  float *room = weights + (size + 15) / 16 * 16;
  for (int64_t row; (row = thread.claim()) < rows;) {
    const float *x = static_cast<const float *>(op.p[0]) + static_cast<const int64_t *>(op.p[1])[row] * op.i[1];
    const Shape &shape = static_cast<const Shape *>(op.p[2])[row];
    static_cast<int64_t *>(op.p[4])[row] =
        draw_row(x, size, shape, static_cast<const double *>(op.p[3])[row], weights, room);
  }
}

}  // namespace IL_ISA
