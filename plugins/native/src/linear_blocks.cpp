// Repacks the blocks of GGUF files. Source of the formats: the published GGUF and ggml quantisation layouts.
//
// A row's block of 32 inputs becomes some 32-bit words; input 4 * quad + i is in byte i of what the kernels make of them:
//   4 bits  word j: low nibbles are quad j, high nibbles quad j + 4 (j < 4)
//   5 bits  the same, and word 4: bit `quad` of byte i is the fifth bit
//   6 bits  the same, and words 4 and 5: bits 2 * (quad % 4) and up of word 4 + quad / 4
//   8 bits  word j is quad j, each value + 128
#include <cstring>

#include "linear_weight.h"

namespace interlace {
namespace {

constexpr BlockFormat FORMATS[] = {
    {IL_FMT_INT8, 32, 0, 8, 0, 0},    {IL_FMT_Q4_0, 32, 18, 4, 2, 0},   {IL_FMT_Q4_1, 32, 20, 4, 4, 0},
    {IL_FMT_Q5_0, 32, 22, 5, 2, 0},   {IL_FMT_Q5_1, 32, 24, 5, 4, 0},   {IL_FMT_Q8_0, 32, 34, 8, 2, 0},
    {IL_FMT_Q4_K, 256, 144, 4, 2, 4}, {IL_FMT_Q5_K, 256, 176, 5, 2, 4}, {IL_FMT_Q6_K, 256, 210, 6, 2, 2},
};

struct Packed {
  uint32_t words[8];
  uint8_t scales[4];
  uint8_t supers[4];
};

uint32_t read32(const uint8_t *from) {
  uint32_t value;
  std::memcpy(&value, from, 4);
  return value;
}

// Four bits -> bit 0 of each byte.
uint32_t spread(uint32_t bits) { return (bits * 0x00204081u) & 0x01010101u; }

// Bit k of `bits` is the fifth bit of input k.
uint32_t fifth_bits(uint32_t bits) {
  uint32_t word = 0;
  for (int quad = 0; quad < 8; ++quad) word |= spread((bits >> (4 * quad)) & 15u) << quad;
  return word;
}

// Blocks of 32: scales first, then fifth bits, then nibbles.
void simple_block(const BlockFormat &format, const uint8_t *from, Packed &to) {
  std::memcpy(to.scales, from, format.scale_bytes);
  from += format.scale_bytes;
  if (format.words == 8) {
    for (int word = 0; word < 8; ++word) to.words[word] = read32(from + 4 * word) ^ 0x80808080u;
    return;
  }
  if (format.words == 5) {
    to.words[4] = fifth_bits(read32(from));
    from += 4;
  }
  for (int word = 0; word < 4; ++word) to.words[word] = read32(from + 4 * word);
}

// Sixteen bytes with a nibble each from `low`, and from `high`, at some shift -> words of 4 bits.
void nibbles(const uint8_t *from, int shift, uint32_t *words) {
  for (int word = 0; word < 4; ++word) {
    const uint32_t low = (read32(from + 4 * word) >> shift) & 0x0f0f0f0fu;
    const uint32_t high = (read32(from + 16 + 4 * word) >> shift) & 0x0f0f0f0fu;
    words[word] = low | (high << 4);
  }
}

// Q4_K and Q5_K: d, dmin, eight 6-bit scales and minima in 12 bytes, [fifth bits], nibbles.
void k_block(const BlockFormat &format, const uint8_t *from, int part, Packed &to) {
  std::memcpy(to.supers, from, 4);
  const uint8_t *packed = from + 4;
  if (part < 4) {
    to.scales[0] = packed[part] & 63;
    to.scales[1] = packed[part + 4] & 63;
  } else {
    to.scales[0] = static_cast<uint8_t>((packed[part + 4] & 15) | ((packed[part - 4] >> 6) << 4));
    to.scales[1] = static_cast<uint8_t>((packed[part + 4] >> 4) | ((packed[part] >> 6) << 4));
  }
  const uint8_t *quants = from + 16;
  if (format.words == 5) {
    uint32_t bits = 0;
    for (int k = 0; k < BLOCK; ++k) bits |= static_cast<uint32_t>((quants[k] >> part) & 1) << k;
    to.words[4] = fifth_bits(bits);
    quants += 32;
  }
  nibbles(quants + 32 * (part / 2), 4 * (part % 2), to.words);
}

// Q6_K: 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, d.
void q6_block(const uint8_t *from, int part, Packed &to) {
  const int half = part / 4, quarter = part % 4;
  nibbles(from + 64 * half + 32 * (quarter % 2), 4 * (quarter / 2), to.words);
  const uint8_t *upper = from + 128 + 32 * half;
  for (int word = 0; word < 2; ++word) {
    to.words[4 + word] = 0;
    for (int quad = 0; quad < 4; ++quad) {
      const uint32_t pairs = (read32(upper + 16 * word + 4 * quad) >> (2 * quarter)) & 0x03030303u;
      to.words[4 + word] |= pairs << (2 * quad);
    }
  }
  std::memcpy(to.scales, from + 192 + 2 * part, 2);
  std::memcpy(to.supers, from + 208, 2);
}

void one_block(const BlockFormat &format, const uint8_t *row, int64_t block, Packed &to) {
  if (format.block == BLOCK) return simple_block(format, row + block * format.block_bytes, to);
  const uint8_t *from = row + block / 8 * format.block_bytes;
  const int part = static_cast<int>(block % 8);
  format.format == IL_FMT_Q6_K ? q6_block(from, part, to) : k_block(format, from, part, to);
}

// Bytes of a row's scales go to [parts][16 rows]; a part is `size` bytes.
void scatter(const uint8_t *from, int64_t bytes, int64_t size, int64_t row, uint8_t *to) {
  for (int64_t part = 0; part < bytes / size; ++part)
    std::memcpy(to + (part * STRIP + row) * size, from + part * size, size);
}

}  // namespace

const BlockFormat *find_block_format(int32_t format) {
  for (const BlockFormat &known : FORMATS)
    if (known.format == format) return &known;
  return nullptr;
}

void pack_blocks(const Panel &panel, const BlockFormat &format, const uint8_t *rows, int64_t row_bytes, int64_t blocks) {
  const bool k_format = format.block == SUPER_BLOCK;
  Packed packed;
  for (int64_t strip = 0; strip * STRIP < panel.rows; ++strip) {
    const int64_t count = panel.rows - strip * STRIP < STRIP ? panel.rows - strip * STRIP : STRIP;
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t *first = panel.values + block * panel.strips * strip_bytes(format.words, format.scale_bytes);
      uint8_t *words = first + strip * format.words * STRIP * 4;
      uint8_t *scales = first + (panel.strips * format.words * 4 + strip * format.scale_bytes) * STRIP;
      for (int64_t row = 0; row < count; ++row) {
        one_block(format, rows + (strip * STRIP + row) * row_bytes, block, packed);
        for (int word = 0; word < format.words; ++word)
          std::memcpy(words + (word * STRIP + row) * 4, &packed.words[word], 4);
        scatter(packed.scales, format.scale_bytes, k_format ? 1 : 2, row, scales);
        if (k_format && block % 8 == 0)
          scatter(packed.supers, format.super_bytes, 2, row,
                  panel.supers + (block / 8 * panel.strips + strip) * format.super_bytes * STRIP);
      }
    }
  }
}

}  // namespace interlace
