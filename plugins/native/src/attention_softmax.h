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

// The weights of a row in this tile, and how they join those of the tiles before.
template <typename T>
void weigh(const Layer &layer, KeyTile<T> &tile, int64_t row, int64_t columns, float own_largest) {
  const vfloat limit = broadcast(own_largest);
  vfloat totals = {};
  for (int64_t at = 0; at < columns; at += LANES) {
    vfloat weight = Power<T>::of(load(tile.scores[row] + at) - limit);
    totals += weight;
    if (layer.is_int8) weight *= load(tile.value_scales + at);
    store(tile.weights[row] + at, weight);
  }
  const float largest = std::max(tile.largest[row], own_largest);
  tile.keep[row] = power_of<T>(tile.largest[row] - largest);
  tile.take[row] = power_of<T>(own_largest - largest);
  tile.largest[row] = largest;
  tile.total[row] = fma(tile.total[row], tile.keep[row], sum_lanes(totals) * tile.take[row]);
}

}  // namespace IL_ISA
