// From scores to weights, one tile at a time: softmax with a running maximum.
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867). Each tile is computed on its own
// and then joined to what came before, in ascending order; so a split of a sequence among threads has the same bits.
#pragma once

#include "attention_tile.h"

namespace IL_ISA {

// Scores are kept in units in which weights are cheap: base 2 for bfloat16, base e where the last bits count.
template <typename T>
struct Power;
template <>
struct Power<float> {
  static constexpr float UNIT = 1.0f;
  static vfloat of(vfloat x) { return exp(x); }
};
template <>
struct Power<bf16> {
  static constexpr float UNIT = 1.44269504f;
  static vfloat of(vfloat x) { return exp2_rough(x); }
};
template <typename T>
float power_of(float x) {
  return Power<T>::of(broadcast(x))[0];
}

constexpr float LOWEST = -std::numeric_limits<float>::max();

// Minus infinity in columns [begin, end), which are whole vectors, but for those in [first, last).
inline void hide(float *scores, int64_t begin, int64_t end, int64_t first, int64_t last) {
  static constexpr int32_t LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vfloat hidden = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t at = begin; at < end; at += LANES) {
    vint column;
    std::memcpy(&column, LANE, sizeof column);
    column += static_cast<int32_t>(at);
    const auto is_seen = (column >= static_cast<int32_t>(first)) & (column < static_cast<int32_t>(last));
    store(scores + at, is_seen ? load(scores + at) : hidden);
  }
}

// Raw products of a row -> scores, but for the scale of all, where they are not products of plain values.
template <typename T>
void finish_products(const Layer &layer, const KeyTile<T> &tile, float *scores, int64_t columns) {
  const vfloat scale = broadcast(layer.scale / layer.softcap), cap = broadcast(layer.softcap * Power<T>::UNIT);
  for (int64_t at = 0; at < columns; at += LANES) {
    vfloat score = load(scores + at);
    if (layer.is_int8) score *= load(tile.key_scales + at);
    if (layer.softcap > 0) score = tanh(score * scale) * cap;
    store(scores + at, score);
  }
}

// What a raw product is worth in scores, where `find_largest` leaves it raw.
template <typename T>
float unit_of(const Layer &layer) {
  return layer.softcap > 0 ? 1.0f : layer.scale * Power<T>::UNIT;
}

// Columns [first, last) of a row in a tile are seen; the others get minus infinity. Returns the largest of what is seen,
// without the unit, which is left to `weigh`.
template <typename T>
float find_largest(const Layer &layer, KeyTile<T> &tile, int64_t row, int64_t columns, int64_t first, int64_t last) {
  float *scores = tile.scores[row];
  if (layer.is_int8 || layer.softcap > 0) finish_products(layer, tile, scores, columns);
  if (first > 0) hide(scores, 0, std::min(columns, (first + LANES - 1) / LANES * LANES), first, last);
  if (last < columns) hide(scores, std::max<int64_t>(0, last / LANES * LANES), columns, first, last);
  vfloat largest = broadcast(LOWEST);
  for (int64_t at = 0; at < columns; at += LANES) largest = larger(load(scores + at), largest);
  return max_lane(largest);
}

// Scores of a row, without their unit -> weights, relative to the largest of this tile. Returns their sum. The
// difference is taken before the unit: so it is exactly zero for the largest, however large that is.
template <typename T>
float weigh(const Layer &layer, KeyTile<T> &tile, int64_t row, int64_t columns, float largest) {
  const vfloat unit = broadcast(unit_of<T>(layer)), limit = broadcast(largest);
  const float *scores = tile.scores[row], *value_scales = layer.is_int8 ? tile.value_scales : nullptr;
  T *weights = tile.weights[row];
  vfloat total = {};
  for (int64_t at = 0; at < columns; at += LANES) {
    vfloat weight = Power<T>::of((load(scores + at) - limit) * unit);
    total += weight;
    if (value_scales != nullptr) weight *= load(value_scales + at);
    store(weights + at, weight);
  }
  return sum_lanes(total);
}

// Products of the rows of a piece with the tile that starts at `origin` -> weights; and the largest score and the sum of
// the weights of each row in this tile. The piece begins with row `head` of those of the token at `position`.
template <typename T>
void weigh_rows(const Layer &layer, KeyTile<T> &tile, int64_t rows, int64_t columns, int64_t position, int64_t head,
                int64_t origin, float *largest, float *total) {
  for (int64_t row = 0; row < rows; ++row) {
    largest[row] = find_largest(layer, tile, row, columns, layer.first_seen(position) - origin, position + 1 - origin);
    if (++head == layer.ratio) ++position, head = 0;
  }
  for (int64_t row = 0; row < rows; ++row) {
    total[row] = weigh(layer, tile, row, columns, largest[row]);
    largest[row] = std::max(largest[row] * unit_of<T>(layer), LOWEST);
  }
}

// How a tile joins those before it.
template <typename T>
void prepare_join(const float *own_largest, const float *own_total, int64_t rows, KeyTile<T> &tile) {
  for (int64_t row = 0; row < rows; row += LANES) {
    const vfloat before = load(tile.largest + row), largest = larger(before, load(own_largest + row));
    const vfloat keep = Power<T>::of(before - largest), take = Power<T>::of(load(own_largest + row) - largest);
    store(tile.largest + row, largest);
    store(tile.total + row, fma(load(tile.total + row), keep, load(own_total + row) * take));
    store(tile.keep + row, keep);
    store(tile.take + row, take);
  }
}

}  // namespace IL_ISA
