// The paged cache of keys and values: its layout, and writing it.
//
// A block holds, for each KV head, first keys, then values, both in granules of 16 tokens. Words of 4 bytes are what
// the inner products of attention.h take: two bfloat16 values or one float32.
//   keys of a granule    [head size in words][16 tokens]      a word: neighbours along the head
//   values of a granule  [16 tokens in words][head size]      a word: neighbours along the tokens
// So both products of attention read whole cache lines, one after the other, and need no transposition. With 8-bit
// storage the order is the same with single bytes for values, and a block's head ends with a float32 scale per token for
// keys, then for values.
#pragma once

#include "elementwise.h"

namespace IL_ISA {

constexpr int64_t GRANULE = 16;
constexpr int64_t MAX_HEAD_SIZE = 256;

inline vuint load_words(const void *from) {
  vuint words;
  std::memcpy(&words, from, sizeof words);
  return words;
}

// Facts of one attention op; see `attention` for the fields of the op.
struct Layer {
  int64_t query_stride, key_stride, value_stride, out_stride;
  int64_t heads, kv_heads, ratio, head_size, padded, block_size, window;
  bool is_int8;
  float scale, softcap;
  const void *query, *key, *value;
  uint8_t *cache;
  void *out;
  const il_step *step;
  const il_group *group;
  int64_t element, granule_bytes, head_bytes, block_bytes;

  Layer(const il_op &op, const il_step &of)
      : query_stride(op.i[0]), key_stride(op.i[1]), value_stride(op.i[2]), out_stride(op.i[3]), heads(op.i[4]),
        kv_heads(op.i[5]), ratio(op.i[4] / op.i[5]), head_size(op.i[6]),
        padded((op.i[6] + GRANULE - 1) / GRANULE * GRANULE), block_size(op.i[7]), window(op.i[9]), is_int8(op.i[10] != 0),
        scale(static_cast<float>(op.f[0])), softcap(static_cast<float>(op.f[1])), query(op.p[0]), key(op.p[1]),
        value(op.p[2]), cache(static_cast<uint8_t *>(op.p[3])), out(op.p[4]), step(&of), group(of.groups + op.i[8]) {
    element = is_int8 ? 1 : op.dtype == IL_BF16 ? 2 : 4;
    granule_bytes = GRANULE * padded * element;
    head_bytes = 2 * block_size * padded * element + (is_int8 ? 2 * block_size * 4 : 0);
    block_bytes = kv_heads * head_bytes;
  }

  uint8_t *head_of(int64_t block, int64_t kv_head) const { return cache + block * block_bytes + kv_head * head_bytes; }
  int64_t first_seen(int64_t position) const { return window ? std::max<int64_t>(0, position - window + 1) : 0; }
};

// Where one granule of one KV head lies.
struct Granule {
  uint8_t *keys, *values;
  float *key_scales, *value_scales;

  // `at`: its number within the block.
  Granule(const Layer &layer, int64_t block, int64_t at, int64_t kv_head) {
    uint8_t *head = layer.head_of(block, kv_head);
    const int64_t half = layer.block_size * layer.padded * layer.element;
    keys = head + at * layer.granule_bytes;
    values = head + half + at * layer.granule_bytes;
    key_scales = reinterpret_cast<float *>(head + 2 * half) + at * GRANULE;
    value_scales = key_scales + layer.block_size;
  }
};

// Place of value `at` of token `token` among the elements of a granule, for words of `per_word` elements.
inline int64_t key_place(int64_t token, int64_t at, int64_t per_word) {
  return (at / per_word * GRANULE + token) * per_word + at % per_word;
}
inline int64_t value_place(int64_t token, int64_t at, int64_t per_word, int64_t padded) {
  return (token / per_word * padded + at) * per_word + token % per_word;
}

// `count` (up to LANES) elements into one half of each of as many words.
inline void store_halves(bf16 *words, const bf16 *from, int64_t half, int64_t count) {
  if (count < LANES) {
    for (int64_t at = 0; at < count; ++at) words[2 * at + half] = from[at];
    return;
  }
  vuint old;
  std::memcpy(&old, words, sizeof old);
  const vuint fresh = __builtin_convertvector(*reinterpret_cast<const vhalf *>(from), vuint);
  const vuint merged = half ? (old & 0xffffu) | fresh << 16 : (old & 0xffff0000u) | fresh;
  std::memcpy(words, &merged, sizeof merged);
}

inline void write_values(const bf16 *from, bf16 *values, int64_t token, const Layer &layer) {
  bf16 *words = values + token / 2 * layer.padded * 2;
  over_row(layer.head_size, [&](int64_t at, int64_t n) { store_halves(words + 2 * at, from + at, token % 2, n); });
}
inline void write_values(const float *from, float *values, int64_t token, const Layer &layer) {
  std::memcpy(values + token * layer.padded, from, layer.head_size * sizeof(float));
}

template <typename T>
void write_plain(const Layer &layer, const Granule &granule, int64_t token, const T *key, const T *value) {
  constexpr int64_t PER_WORD = 4 / sizeof(T);
  uint32_t *words = reinterpret_cast<uint32_t *>(granule.keys) + token;
  for (int64_t at = 0; at < layer.head_size / PER_WORD; ++at)
    std::memcpy(words + at * GRANULE, key + at * PER_WORD, sizeof(uint32_t));
  write_values(value, reinterpret_cast<T *>(granule.values), token, layer);
}

// Rows and columns of LANES x LANES words change places: blocks of 1, 2, 4, … words beside the diagonal, one size after
// the other.
inline __attribute__((always_inline)) void transpose(vuint (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int size = 1; size < LANES; size *= 2) {
    vint upper, lower;  // lane l of two rows, one after the other: l of the first, LANES + l of the second
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; ++lane) {
      upper[lane] = lane & size ? LANES + lane - size : lane;
      lower[lane] = lane & size ? LANES + lane : lane + size;
    }
#pragma GCC unroll 16
    for (int row = 0; row < LANES; ++row) {
      if (row & size) continue;
      const vuint first = rows[row], second = rows[row + size];
      rows[row] = __builtin_shuffle(first, second, upper);
      rows[row + size] = __builtin_shuffle(first, second, lower);
    }
  }
}

// Keys of a granule's 16 tokens, `stride` values apart.
template <typename T>
void write_keys(const T *keys, int64_t stride, int64_t words, uint8_t *granule) {
  constexpr int64_t PER_WORD = 4 / sizeof(T);
  uint32_t *to = reinterpret_cast<uint32_t *>(granule);
  for (int64_t token = 0; token < GRANULE; token += LANES) {
    int64_t word = 0;
    for (; word + LANES <= words; word += LANES) {
      vuint rows[LANES];
#pragma GCC unroll 16
      for (int row = 0; row < LANES; ++row) rows[row] = load_words(keys + (token + row) * stride + word * PER_WORD);
      transpose(rows);
#pragma GCC unroll 16
      for (int row = 0; row < LANES; ++row)
        std::memcpy(to + (word + row) * GRANULE + token, &rows[row], sizeof rows[row]);
    }
    for (; word < words; ++word)
      for (int row = 0; row < LANES; ++row)
        std::memcpy(to + word * GRANULE + token + row, keys + (token + row) * stride + word * PER_WORD, 4);
  }
}

// Values of a granule's 16 tokens, `stride` values apart.
inline void write_all_values(const bf16 *values, int64_t stride, uint8_t *granule, const Layer &layer) {
  for (int64_t token = 0; token < GRANULE; token += 2) {
    const bf16 *even = values + token * stride, *odd = even + stride;
    bf16 *words = reinterpret_cast<bf16 *>(granule) + token * layer.padded;
    int64_t at = 0;
    for (; at + LANES <= layer.head_size; at += LANES) {
      const vuint low = __builtin_convertvector(*reinterpret_cast<const vhalf *>(even + at), vuint);
      const vuint both = low | __builtin_convertvector(*reinterpret_cast<const vhalf *>(odd + at), vuint) << 16;
      std::memcpy(words + 2 * at, &both, sizeof both);
    }
    for (; at < layer.head_size; ++at) words[2 * at] = even[at], words[2 * at + 1] = odd[at];
  }
}
inline void write_all_values(const float *values, int64_t stride, uint8_t *granule, const Layer &layer) {
  float *words = reinterpret_cast<float *>(granule);
  for (int64_t token = 0; token < GRANULE; ++token)
    std::memcpy(words + token * layer.padded, values + token * stride, layer.head_size * sizeof(float));
}

typedef int8_t vbyte __attribute__((vector_size(LANES)));

// A row of values in 8 bits, symmetric: its largest becomes 127. Returns the scale, which is NaN if a value is not finite.
template <typename T>
float to_int8(const T *from, int64_t size, int8_t *narrow) {
  vfloat largest = {}, poison = {};
  over_row(size, [&](int64_t at, int64_t count) {
    const vfloat value = load_some(from + at, count);
    largest = larger(value, larger(-value, largest));
    poison += value * broadcast(0.0f);
  });
  const float scale = max_lane(largest) / 127.0f + sum_lanes(poison);
  const vfloat inverse = broadcast(scale > 0 ? 1.0f / scale : 0.0f), limit = broadcast(127.0f);
  over_row(size, [&](int64_t at, int64_t count) {
    vfloat value = load_some(from + at, count) * inverse;
    value = value > limit ? limit : value;  // the smallest scales have no finite inverse
    value = round_to_whole(value < -limit ? -limit : value);
    value = value == value ? value : vfloat{};
    const vbyte bytes = __builtin_convertvector(__builtin_convertvector(value, vint), vbyte);
    std::memcpy(narrow + at, &bytes, count);
  });
  return scale;
}

template <typename T>
void write_int8(const Layer &layer, const Granule &granule, int64_t token, const T *key, const T *value) {
  constexpr int64_t PER_WORD = 4 / sizeof(T);
  int8_t narrow[MAX_HEAD_SIZE];
  granule.key_scales[token] = to_int8(key, layer.head_size, narrow);
  for (int64_t at = 0; at < layer.head_size; at += PER_WORD)
    std::memcpy(granule.keys + key_place(token, at, PER_WORD), narrow + at, PER_WORD);
  granule.value_scales[token] = to_int8(value, layer.head_size, narrow);
  for (int64_t at = 0; at < layer.head_size; ++at)
    granule.values[value_place(token, at, PER_WORD, layer.padded)] = static_cast<uint8_t>(narrow[at]);
}

// The places after the last token of a sequence are read together with it, times a weight of zero: what was there must
// not be a NaN.
template <typename T>
void clear_values_after(const Layer &layer, const Granule &granule, int64_t token) {
  constexpr int64_t PER_WORD = 4 / sizeof(T);
  int64_t next = token + 1;
  for (; next % PER_WORD != 0; ++next)
    for (int64_t at = 0; at < layer.padded; ++at)
      std::memset(granule.values + value_place(next, at, PER_WORD, layer.padded) * layer.element, 0, layer.element);
  std::memset(granule.values + next * layer.padded * layer.element, 0, (GRANULE - next) * layer.padded * layer.element);
  if (layer.is_int8) std::fill(granule.value_scales + token + 1, granule.value_scales + GRANULE, 0.0f);
}

// Write tokens [first, last) of the step, whose slots lie in one granule, for one KV head; `ends`: the sequence has no
// more tokens in this step. One thread writes a granule.
template <typename T>
void write_tokens(const Layer &layer, int64_t first, int64_t last, int64_t kv_head, bool ends) {
  const int64_t slot = layer.group->slots[first], offset = slot % layer.block_size;
  const Granule granule(layer, slot / layer.block_size, offset / GRANULE, kv_head);
  const T *keys = static_cast<const T *>(layer.key) + first * layer.key_stride + kv_head * layer.head_size;
  const T *values = static_cast<const T *>(layer.value) + first * layer.value_stride + kv_head * layer.head_size;
  if (last - first == GRANULE && !layer.is_int8) {
    write_keys(keys, layer.key_stride, layer.head_size * int64_t{sizeof(T)} / 4, granule.keys);
    return write_all_values(values, layer.value_stride, granule.values, layer);
  }
  for (int64_t at = first; at < last; ++at) {
    const int64_t token = offset % GRANULE + at - first;
    const T *key = keys + (at - first) * layer.key_stride, *value = values + (at - first) * layer.value_stride;
    layer.is_int8 ? write_int8(layer, granule, token, key, value) : write_plain(layer, granule, token, key, value);
  }
  const int64_t newest = offset % GRANULE + last - 1 - first;
  if (ends && newest + 1 < GRANULE) clear_values_after<T>(layer, granule, newest);
}

}  // namespace IL_ISA
