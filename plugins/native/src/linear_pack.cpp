// Plans the panels of a weight and fills them, on all threads. Compiled once: the layout does not depend on the
// instruction set, only the number of strips of a panel does.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "linear_weight.h"
#include "runtime.h"
#include "weight_memory.h"

#define IL_ISA packing  // a block's values take the same code here as in an embedding
#include "elementwise_blocks.h"

namespace interlace {
namespace {

constexpr int64_t MAX_IN = 1 << 20;  // so that some rows of activations fit the team's shared memory
constexpr int64_t PREFETCH_SLACK = 64;

struct PackedLinear : il_linear {
  std::vector<Panel> all_panels;
  std::vector<float> all_bias;
  std::vector<std::shared_ptr<uint8_t>> memory;
  int64_t bytes = 0;
};

struct PanelBytes {
  int64_t values, scales, supers;
  int64_t total() const { return (values + 63) / 64 * 64 + (scales + 63) / 64 * 64 + supers; }
};

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

PanelBytes panel_bytes(int32_t format, int64_t strips, int64_t in) {
  const int64_t rows = strips * STRIP;
  if (format == IL_FMT_F32) return {in * rows * 4, 0, 0};
  if (format == IL_FMT_BF16) return {round_up(in, 2) * rows * 2, 0, 0};
  const BlockFormat &blocks = *find_block_format(format);
  const int64_t count = round_up(in, BLOCK) / BLOCK;
  return {count * strips * strip_bytes(blocks.words, blocks.scale_bytes), format == IL_FMT_INT8 ? rows * 4 : 0,
          round_up(count, 8) / 8 * rows * blocks.super_bytes};
}

// ── floating values ─────────────────────────────────────────────────────────────────────────────────────────────

float half_to_float(uint16_t half) {
  const float magnitude = (half & 0x7c00) == 0 ? (half & 0x3ff) * 0x1p-24f : [half] {
    const uint32_t exponent = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : ((half & 0x7c00u) << 13) + (112u << 23);
    const uint32_t bits = exponent | ((half & 0x3ffu) << 13);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }();
  return half & 0x8000 ? -magnitude : magnitude;
}

uint16_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

template <int32_t FORMAT>
float value_at(const uint8_t *row, int64_t k) {
  if (FORMAT == IL_FMT_F32) {
    float value;
    std::memcpy(&value, row + 4 * k, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, row + 2 * k, 2);
  if (FORMAT == IL_FMT_F16) return half_to_float(half);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <int32_t FORMAT>
uint16_t bf16_at(const uint8_t *row, int64_t k) {
  if (FORMAT != IL_FMT_BF16) return round_to_bf16(value_at<FORMAT>(row, k));
  uint16_t half;
  std::memcpy(&half, row + 2 * k, 2);
  return half;
}

// Some inputs of a row as 32-bit words: floats, or pairs of bf16 (the partner of an odd last input is zero).
constexpr int64_t CHUNK = 64;

template <int32_t FORMAT>
void words_of(const uint8_t *row, int64_t first, int64_t count, bool pairs, uint32_t *words) {
  if (!pairs) {
    for (int64_t k = 0; k < count; ++k) {
      const float value = value_at<FORMAT>(row, first + k);
      std::memcpy(words + k, &value, 4);
    }
    return;
  }
  uint16_t *halves = reinterpret_cast<uint16_t *>(words);
  for (int64_t k = 0; k < count; ++k) halves[k] = bf16_at<FORMAT>(row, first + k);
  if (count % 2 != 0) halves[count] = 0;
}

// Words [4 rows][count] -> [count][4 rows], four at a time; rows of the result are `width` words apart.
void transpose(const uint32_t (*rows)[CHUNK], int64_t count, uint32_t *to, int64_t width) {
  typedef uint32_t four __attribute__((vector_size(16)));
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    four in[4];
    for (int row = 0; row < 4; ++row) std::memcpy(&in[row], rows[row] + k, 16);
    const four low01 = __builtin_shuffle(in[0], in[1], four{0, 4, 1, 5});
    const four low23 = __builtin_shuffle(in[2], in[3], four{0, 4, 1, 5});
    const four high01 = __builtin_shuffle(in[0], in[1], four{2, 6, 3, 7});
    const four high23 = __builtin_shuffle(in[2], in[3], four{2, 6, 3, 7});
    const four out[4] = {
        __builtin_shuffle(low01, low23, four{0, 1, 4, 5}), __builtin_shuffle(low01, low23, four{2, 3, 6, 7}),
        __builtin_shuffle(high01, high23, four{0, 1, 4, 5}), __builtin_shuffle(high01, high23, four{2, 3, 6, 7})};
    for (int at = 0; at < 4; ++at) std::memcpy(to + (k + at) * width, &out[at], 16);
  }
  for (; k < count; ++k)
    for (int row = 0; row < 4; ++row) to[k * width + row] = rows[row][k];
}

// Plain weights: a step's words of all rows of the panel side by side.
template <int32_t FORMAT>
void pack_words(const Panel &panel, const uint8_t *rows, int64_t row_bytes, int64_t in) {
  const bool pairs = panel.format == IL_FMT_BF16;
  const int64_t width = panel.strips * STRIP, inputs = pairs ? 2 * CHUNK : CHUNK;
  uint32_t words[4][CHUNK] = {};
  for (int64_t first = 0; first < in; first += inputs) {
    const int64_t count = std::min(inputs, in - first), steps = pairs ? (count + 1) / 2 : count;
    uint32_t *to = reinterpret_cast<uint32_t *>(panel.values) + (pairs ? first / 2 : first) * width;
    for (int64_t row = 0; row < panel.rows; row += 4) {
      for (int64_t at = 0; at < 4; ++at) {
        if (row + at < panel.rows)
          words_of<FORMAT>(rows + (row + at) * row_bytes, first, count, pairs, words[at]);
        else
          std::memset(words[at], 0, sizeof words[at]);
      }
      transpose(words, steps, to + row, width);
    }
  }
}

// Symmetric, 127 steps each way, per row.
template <int32_t FORMAT>
void pack_int8_row(const Panel &panel, int64_t row, const uint8_t *from, int64_t in) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  float largest = 0;
  for (int64_t k = 0; k < in; ++k) largest = std::max(largest, std::fabs(value_at<FORMAT>(from, k)));
  const float scale = largest / 127.0f;
  const float inverse = scale > std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f;
  reinterpret_cast<float *>(panel.scales)[row] = scale;
  for (int64_t k = 0; k < in; k += 4) {
    const int64_t strip = k / BLOCK * panel.strips + row / STRIP;
    uint8_t *to = panel.values + ((strip * 8 + k % BLOCK / 4) * STRIP + row % STRIP) * 4;
    for (int64_t at = 0; at < std::min<int64_t>(4, in - k); ++at) {
      const float rounded = value_at<FORMAT>(from, k + at) * inverse + (ROUND + 128.0f);
      uint32_t bits;
      std::memcpy(&bits, &rounded, 4);
      to[at] = static_cast<uint8_t>(bits & 0xff);
    }
  }
}

void clear_int8(const Panel &panel, int64_t in) {
  std::memset(panel.values, 0x80, panel_bytes(IL_FMT_INT8, panel.strips, in).values);
}

template <int32_t FORMAT>
void pack_floats(const Panel &panel, const uint8_t *rows, int64_t row_bytes, int64_t in) {
  if (panel.format != IL_FMT_INT8) return pack_words<FORMAT>(panel, rows, row_bytes, in);
  clear_int8(panel, in);
  for (int64_t row = 0; row < panel.rows; ++row) pack_int8_row<FORMAT>(panel, row, rows + row * row_bytes, in);
}

// ── blocks that are not kept ────────────────────────────────────────────────────────────────────────────────────

// `count` values of a row, from `first` on: both whole blocks.
void decode(const packing::BlockFormat &format, const uint8_t *row, int64_t first, int64_t count, float *values) {
  const uint8_t *block = row + first / format.values * format.bytes;
  for (int64_t at = 0; at < count; at += format.values, block += format.bytes) format.decode(block, values + at);
}

// Through some values in float32 at a time, that stay in the processor's cache.
void pack_decoded(const Panel &panel, int32_t format, const uint8_t *rows, int64_t row_bytes, int64_t in,
                  uint8_t *scratch) {
  static_assert(Thread::SCRATCH_BYTES >= MAX_IN * 4, "a row in float32");
  const packing::BlockFormat blocks = packing::block_format(format);
  float *values = reinterpret_cast<float *>(scratch);
  if (panel.format == IL_FMT_INT8) {
    clear_int8(panel, in);
    for (int64_t row = 0; row < panel.rows; ++row) {
      decode(blocks, rows + row * row_bytes, 0, in, values);
      pack_int8_row<IL_FMT_F32>(panel, row, scratch, in);
    }
    return;
  }
  for (int64_t first = 0; first < in; first += SUPER_BLOCK) {
    const int64_t count = std::min<int64_t>(SUPER_BLOCK, in - first);
    for (int64_t row = 0; row < panel.rows; ++row)
      decode(blocks, rows + row * row_bytes, first, count, values + row * SUPER_BLOCK);
    Panel piece = panel;
    piece.values += panel_bytes(panel.format, panel.strips, first).values;
    pack_words<IL_FMT_F32>(piece, scratch, SUPER_BLOCK * sizeof(float), count);
  }
}

bool is_float(int32_t format) { return format == IL_FMT_F32 || format == IL_FMT_F16 || format == IL_FMT_BF16; }

void pack_panel(const Panel &panel, const il_part &part, int64_t first, int64_t in, uint8_t *scratch) {
  const uint8_t *rows = static_cast<const uint8_t *>(part.data) + first * part.row_bytes;
  if (part.format == IL_FMT_F32) return pack_floats<IL_FMT_F32>(panel, rows, part.row_bytes, in);
  if (part.format == IL_FMT_F16) return pack_floats<IL_FMT_F16>(panel, rows, part.row_bytes, in);
  if (part.format == IL_FMT_BF16) return pack_floats<IL_FMT_BF16>(panel, rows, part.row_bytes, in);
  if (panel.format != part.format) return pack_decoded(panel, part.format, rows, part.row_bytes, in, scratch);
  pack_blocks(panel, *find_block_format(part.format), rows, part.row_bytes, in / BLOCK);
}

// ── planning ────────────────────────────────────────────────────────────────────────────────────────────────────

// What keeps the parts from being packed, written to `error`; false if nothing does.
bool refuse(const il_part *parts, int64_t num_parts, int64_t in, int32_t keep, bool decode_blocks, char *error,
            int64_t size) {
  if (in < 1 || in > MAX_IN) {
    std::snprintf(error, size, "%lld inputs; 1 to %lld are possible", (long long)in, (long long)MAX_IN);
    return true;
  }
  for (int64_t at = 0; at < num_parts; ++at) {
    const int32_t format = parts[at].format;
    const BlockFormat *blocks = find_block_format(format);
    const bool converts = is_float(format) || decode_blocks;
    if (converts && keep != IL_FMT_F32 && keep != IL_FMT_BF16 && keep != IL_FMT_INT8)
      std::snprintf(error, size, "floating weights cannot be kept in format %d", keep);
    else if (!is_float(format) && (blocks == nullptr || format == IL_FMT_INT8))
      std::snprintf(error, size, "format %d is not known", format);
    else if (blocks != nullptr && in % blocks->block != 0)
      std::snprintf(error, size, "%lld inputs are no multiple of a block of %d", (long long)in, blocks->block);
    else
      continue;
    return true;
  }
  return false;
}

struct Source {
  const il_part *part;
  int64_t first;  // of the panel's rows in the part
};

struct Job {
  const PackedLinear *linear;
  const std::vector<Source> *sources;
};

void pack_some(void *context, Thread &thread) {
  const Job &job = *static_cast<Job *>(context);
  for (int64_t at; (at = thread.claim()) < job.linear->num_panels;) {
    const Source &source = (*job.sources)[at];
    pack_panel(job.linear->panels[at], *source.part, source.first, job.linear->in, thread.scratch);
  }
}

bool reserve(PackedLinear &linear) {
  for (const Panel &panel : linear.all_panels)
    linear.bytes += round_up(panel_bytes(panel.format, panel.strips, linear.in).total(), 64);
  linear.memory.push_back(WeightMemory::allocate(linear.bytes + PREFETCH_SLACK));
  uint8_t *at = linear.memory.back().get();
  if (at == nullptr) return false;
  for (Panel &panel : linear.all_panels) {
    const PanelBytes bytes = panel_bytes(panel.format, panel.strips, linear.in);
    panel.values = at;
    panel.scales = panel.values + round_up(bytes.values, 64);
    panel.supers = panel.scales + round_up(bytes.scales, 64);
    at += round_up(bytes.total(), 64);
  }
  return true;
}

void plan(PackedLinear &linear, std::vector<Source> &sources, const il_part *parts, int64_t num_parts, int32_t keep,
          bool decode_blocks, int32_t float_strips) {
  for (int64_t at = 0; at < num_parts; ++at) {
    const int32_t format = is_float(parts[at].format) || decode_blocks ? keep : parts[at].format;
    const bool plain = is_float(format);
    const int64_t most = (plain ? float_strips : BLOCK_STRIPS) * STRIP;
    (plain ? (format == IL_FMT_F32 ? linear.has_f32 : linear.has_bf16) : linear.has_blocks) = true;
    for (int64_t first = 0; first < parts[at].rows; first += most) {
      const int64_t rows = std::min(most, parts[at].rows - first);
      const int64_t strips = plain ? (rows + STRIP - 1) / STRIP : BLOCK_STRIPS;
      linear.all_panels.push_back(
          {format, static_cast<int32_t>(strips), linear.out + first, rows, nullptr, nullptr, nullptr});
      sources.push_back({&parts[at], first});
    }
    linear.out += parts[at].rows;
  }
  linear.panels = linear.all_panels.data();
  linear.num_panels = static_cast<int64_t>(linear.all_panels.size());
}

}  // namespace
}  // namespace interlace

using namespace interlace;

extern "C" {

il_linear *il_linear_pack(il_runtime *runtime, const il_part *parts, int64_t num_parts, int64_t in, int32_t keep,
                          int32_t decode_blocks, const float *bias, char *error, int64_t error_size) {
  if (refuse(parts, num_parts, in, keep, decode_blocks, error, error_size)) return nullptr;
  auto linear = std::make_unique<PackedLinear>();
  std::vector<Source> sources;
  linear->in = in;
  plan(*linear, sources, parts, num_parts, keep, decode_blocks, isa_of(runtime).float_strips);
  if (!reserve(*linear)) {
    std::snprintf(error, error_size, "no memory for %lld bytes of weights", (long long)linear->bytes);
    return nullptr;
  }
  if (bias != nullptr) {
    linear->all_bias.assign(bias, bias + linear->out);
    linear->all_bias.resize(linear->out + 4 * STRIP);
    linear->bias = linear->all_bias.data();
  }
  Job job{linear.get(), &sources};
  run_on_team(runtime, pack_some, &job);
  return linear.release();
}

void il_linear_free(il_linear *linear) { delete static_cast<PackedLinear *>(linear); }

int64_t il_linear_bytes(const il_linear *linear) { return static_cast<const PackedLinear *>(linear)->bytes; }

int32_t il_linear_has_halves(const il_linear *linear) {
  const int64_t half = linear->num_panels / 2;
  if (linear->num_panels % 2 != 0 || linear->out % 2 != 0) return 0;
  for (int64_t at = 0; at < half; ++at) {
    const Panel &first = linear->panels[at], &second = linear->panels[at + half];
    if (second.first != first.first + linear->out / 2 || second.rows != first.rows) return 0;
  }
  return 1;
}
}
