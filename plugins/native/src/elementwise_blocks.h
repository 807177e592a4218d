// Values of GGUF blocks, one block at a time: for the few rows of an embedding that a step needs.
//
// The formats are those of ggml (https://github.com/ggml-org/ggml, ggml-common.h); all numbers are little-endian.
#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"

namespace IL_ISA {

constexpr int64_t MAX_BLOCK = 256;

struct BlockFormat {
  int64_t values, bytes;
  void (*decode)(const uint8_t *block, float *values);
};

inline float half_at(const uint8_t *from) {
  const uint32_t bits = from[0] | static_cast<uint32_t>(from[1]) << 8;
  const uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint32_t word_at(const uint8_t *from) {
  return from[0] | from[1] << 8 | from[2] << 16 | static_cast<uint32_t>(from[3]) << 24;
}

// 32 values of 4 bits, or of 5 with the top ones in a word `high`: low halves of the bytes first.
template <bool HAS_HIGH>
void decode_nibbles(const uint8_t *packed, uint32_t high, float scale, float offset, float *values) {
  for (int at = 0; at < 16; ++at) {
    const int low = (packed[at] & 15) | (HAS_HIGH ? (high >> at & 1) << 4 : 0);
    const int top = (packed[at] >> 4) | (HAS_HIGH ? (high >> (at + 16) & 1) << 4 : 0);
    values[at] = scale * static_cast<float>(low) + offset;
    values[at + 16] = scale * static_cast<float>(top) + offset;
  }
}

inline void decode_q4_0(const uint8_t *block, float *values) {
  const float scale = half_at(block);
  decode_nibbles<false>(block + 2, 0, scale, -8.0f * scale, values);
}

inline void decode_q4_1(const uint8_t *block, float *values) {
  decode_nibbles<false>(block + 4, 0, half_at(block), half_at(block + 2), values);
}

inline void decode_q5_0(const uint8_t *block, float *values) {
  const float scale = half_at(block);
  decode_nibbles<true>(block + 6, word_at(block + 2), scale, -16.0f * scale, values);
}

inline void decode_q5_1(const uint8_t *block, float *values) {
  decode_nibbles<true>(block + 8, word_at(block + 4), half_at(block), half_at(block + 2), values);
}

inline void decode_q8_0(const uint8_t *block, float *values) {
  const float scale = half_at(block);
  for (int at = 0; at < 32; ++at) values[at] = scale * static_cast<float>(static_cast<int8_t>(block[2 + at]));
}

// Scale and minimum of sub-block `at` of a Q4_K or Q5_K block: eight of each, 6 bits, in 12 bytes.
struct SubBlock {
  float scale, minimum;
  SubBlock(const uint8_t *block, int at) {
    const uint8_t *packed = block + 4;
    int scale_bits, minimum_bits;
    if (at < 4) {
      scale_bits = packed[at] & 63;
      minimum_bits = packed[at + 4] & 63;
    } else {
      scale_bits = (packed[at + 4] & 15) | (packed[at - 4] >> 6) << 4;
      minimum_bits = (packed[at + 4] >> 4) | (packed[at] >> 6) << 4;
    }
    scale = half_at(block) * static_cast<float>(scale_bits);
    minimum = half_at(block + 2) * static_cast<float>(minimum_bits);
  }
};

// Q4_K: 8 sub-blocks of 32; Q5_K has the fifth bits in 32 bytes before the others.
template <bool HAS_HIGH>
void decode_k(const uint8_t *block, float *values) {
  const uint8_t *high = block + 16, *packed = block + (HAS_HIGH ? 48 : 16);
  for (int at = 0; at < 8; ++at) {
    const SubBlock sub(block, at);
    for (int value = 0; value < 32; ++value) {
      int bits = packed[at / 2 * 32 + value] >> (at % 2 * 4) & 15;
      if (HAS_HIGH) bits |= (high[value] >> at & 1) << 4;
      values[at * 32 + value] = sub.scale * static_cast<float>(bits) - sub.minimum;
    }
  }
}

// Q6_K: 16 sub-blocks of 16; in each half of 128 values, the low 4 bits in 64 bytes and the high 2 in 32.
inline void decode_q6_k(const uint8_t *block, float *values) {
  const float scale = half_at(block + 208);
  for (int at = 0; at < 256; ++at) {
    const int half = at / 128, quarter = at % 128 / 32, value = at % 32;
    const int low = block[half * 64 + quarter % 2 * 32 + value] >> (quarter / 2 * 4) & 15;
    const int high = block[128 + half * 32 + value] >> (quarter * 2) & 3;
    const float sub = scale * static_cast<float>(static_cast<int8_t>(block[192 + at / 16]));
    values[at] = sub * static_cast<float>((low | high << 4) - 32);
  }
}

// Values and bytes 0 for a format that is none of blocks.
inline BlockFormat block_format(int32_t format) {
  switch (format) {
    case IL_FMT_Q4_0: return {32, 18, decode_q4_0};
    case IL_FMT_Q4_1: return {32, 20, decode_q4_1};
    case IL_FMT_Q5_0: return {32, 22, decode_q5_0};
    case IL_FMT_Q5_1: return {32, 24, decode_q5_1};
    case IL_FMT_Q8_0: return {32, 34, decode_q8_0};
    case IL_FMT_Q4_K: return {256, 144, decode_k<false>};
    case IL_FMT_Q5_K: return {256, 176, decode_k<true>};
    case IL_FMT_Q6_K: return {256, 210, decode_q6_k};
    default: return {0, 0, nullptr};
  }
}

}  // namespace IL_ISA
