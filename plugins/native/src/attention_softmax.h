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

// Raw products of a row -> scores: scaled, capped, minus infinity outside of columns [first, last). Returns the largest.
template <typename T>
float finish_scores(const Layer &layer, KeyTile<T> &tile, int64_t row, int64_t columns, int64_t first, int64_t last) {
  float *scores = tile.scores[row];
  const vfloat scale = broadcast(layer.scale * (layer.softcap > 0 ? 1.0f / layer.softcap : Power<T>::UNIT));
  const vfloat cap = broadcast(layer.softcap * Power<T>::UNIT);
  const vfloat hidden = broadcast(-std::numeric_limits<float>::infinity());
  vint lane;
  for (int at = 0; at < LANES; ++at) lane[at] = at;
  vfloat largest = broadcast(LOWEST);
  for (int64_t at = 0; at < columns; at += LANES) {
    vfloat score = load(scores + at) * scale;
    if (layer.is_int8) score *= load(tile.key_scales + at);
    if (layer.softcap > 0) score = tanh(score) * cap;
    if (at < first || at + LANES > last) {
      const vint column = lane + static_cast<int32_t>(at);
      score = ((column >= static_cast<int32_t>(first)) & (column < static_cast<int32_t>(last))) ? score : hidden;
    }
    store(scores + at, score);
    largest = larger(score, largest);
  }
  return max_lane(largest);
}

// Scores of a row -> weights, relative to the largest of this tile. Returns their sum.
template <typename T>
float weigh(const Layer &layer, KeyTile<T> &tile, int64_t row, int64_t columns, float largest) {
  const vfloat limit = broadcast(largest);
  vfloat totals = {};
  for (int64_t at = 0; at < columns; at += LANES) {
    vfloat weight = Power<T>::of(load(tile.scores[row] + at) - limit);
    totals += weight;
    if (layer.is_int8) weight *= load(tile.value_scales + at);
    store(tile.weights[row] + at, weight);
  }
  return sum_lanes(totals);
}

// Largest score and sum of the weights of each row in a tile.
struct RowSums {
  alignas(64) float largest[PADDED_ROWS] = {}, total[PADDED_ROWS] = {};
};

// How a tile joins those before it.
template <typename T>
void prepare_join(const RowSums &own, int64_t rows, KeyTile<T> &tile) {
  for (int64_t row = 0; row < rows; row += LANES) {
    const vfloat before = load(tile.largest + row), largest = larger(before, load(own.largest + row));
    const vfloat keep = Power<T>::of(before - largest), take = Power<T>::of(load(own.largest + row) - largest);
    store(tile.largest + row, largest);
    store(tile.total + row, fma(load(tile.total + row), keep, load(own.total + row) * take));
    store(tile.keep + row, keep);
    store(tile.take + row, take);
  }
}

}  // namespace IL_ISA
