// Makes the 8-bit copy of a head, and measures how far each of its rows is off.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "linear_weight.h"
#include "runtime.h"

namespace interlace {
namespace {

constexpr int64_t BLOCK_BYTES = 2 + BLOCK;  // of Q8_0 in a file: a scale in half precision, then the values
constexpr int64_t MOST_PADDING = 64;        // rows that the last panel of any layout adds

struct Screen : il_screen {
  std::vector<float> all_norms, all_errors;
  ~Screen() { il_linear_free(copy); }
};

// The smallest half that is no less; at least the smallest normal one, and infinity for what is too large.
uint16_t half_above(float value) {
  if (value < 0x1p-14f) return 0x0400;
  if (!(value <= 65504.0f)) return 0x7c00;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(((bits + 0x1fff) >> 13) - (112 << 10));
}

float normal_half_to_float(uint16_t half) {
  const uint32_t bits = half == 0x7c00 ? 0x7f800000u : (static_cast<uint32_t>(half) << 13) + (112u << 23);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Row `row` of a weight whose panels are alike.
void read_row(const il_linear &linear, int64_t row, float *values) {
  const int64_t width = linear.panels[0].strips * STRIP;
  const Panel &panel = linear.panels[row / width];
  const int64_t pitch = panel.strips * STRIP, at = row % width;
  for (int64_t k = 0; k < linear.in; ++k) {
    uint32_t bits;
    if (panel.format == IL_FMT_BF16) {
      uint16_t half;
      std::memcpy(&half, panel.values + ((k / 2 * pitch + at) * 2 + k % 2) * 2, 2);
      bits = static_cast<uint32_t>(half) << 16;
    } else {
      std::memcpy(&bits, panel.values + (k * pitch + at) * 4, 4);
    }
    std::memcpy(values + k, &bits, 4);
  }
}

struct Sums {
  double norm = 0, error = 0;  // squares of the values, and of what the copy lacks
};

void copy_block(const float *values, uint8_t *to, Sums *sums) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  float largest = 0;
  for (int at = 0; at < BLOCK; ++at) largest = std::max(largest, std::fabs(values[at]));
  const uint16_t half = half_above(largest / 127.0f);
  const float scale = normal_half_to_float(half);
  std::memcpy(to, &half, 2);
  float quants[BLOCK];
  for (int at = 0; at < BLOCK; ++at) {
    const float quant = (values[at] * (1.0f / scale) + ROUND) - ROUND;
    quants[at] = quant <= 127.0f ? (quant >= -127.0f ? quant : -127.0f) : 127.0f;
    to[2 + at] = static_cast<uint8_t>(static_cast<int32_t>(quants[at]));
  }
  for (int at = 0; at < BLOCK; ++at) {
    const double value = values[at], lost = value - double{quants[at]} * double{scale};
    sums->norm += value * value;
    sums->error += lost * lost;
  }
}

// A little more than the root: what follows is computed in float32.
float root_above(double sum) { return static_cast<float>(std::sqrt(sum) * 1.001); }

struct Job {
  Screen *screen;
  std::vector<uint8_t> *rows;
};

void copy_some(void *context, Thread &thread) {
  constexpr int64_t ROWS = 32;
  const Job &job = *static_cast<Job *>(context);
  const il_linear &exact = *job.screen->exact;
  float *values = reinterpret_cast<float *>(thread.scratch);
  const int64_t row_bytes = exact.in / BLOCK * BLOCK_BYTES;
  for (int64_t piece; (piece = thread.claim()) * ROWS < exact.out;)
    for (int64_t row = piece * ROWS; row < std::min(exact.out, (piece + 1) * ROWS); ++row) {
      read_row(exact, row, values);
      Sums sums;
      for (int64_t block = 0; block < exact.in / BLOCK; ++block)
        copy_block(values + block * BLOCK, job.rows->data() + row * row_bytes + block * BLOCK_BYTES, &sums);
      job.screen->all_norms[row] = root_above(sums.norm);
      job.screen->all_errors[row] = root_above(sums.error);
    }
}

// Whether the weight is one matrix in this type whose panels are alike, so that a row is easily found.
bool is_plain(const il_linear &linear, int32_t dtype) {
  if (linear.has_blocks || linear.has_bf16 != (dtype == IL_BF16) || linear.has_f32 != (dtype == IL_F32)) return false;
  if (linear.bias != nullptr || linear.in % BLOCK != 0) return false;
  for (int64_t at = 0; at < linear.num_panels; ++at)
    if (linear.panels[at].first != at * linear.panels[0].strips * STRIP) return false;
  return true;
}

}  // namespace
}  // namespace interlace

using namespace interlace;

extern "C" {

il_screen *il_screen_make(il_runtime *runtime, const il_linear *exact, int32_t dtype) {
  if (!is_plain(*exact, dtype)) return nullptr;
  auto screen = std::make_unique<Screen>();
  const int64_t row_bytes = exact->in / BLOCK * BLOCK_BYTES;
  std::vector<uint8_t> rows(exact->out * row_bytes);
  screen->exact = exact;
  // What is beyond the last row counts as perhaps the largest; it is told apart where it is looked at.
  const int64_t padded = exact->out + MOST_PADDING;
  screen->all_norms.assign(padded, std::numeric_limits<float>::infinity());
  screen->all_errors.assign(padded, std::numeric_limits<float>::infinity());
  screen->norms = screen->all_norms.data();
  screen->errors = screen->all_errors.data();
  Job job{screen.get(), &rows};
  run_on_team(runtime, copy_some, &job);
  const il_part part{IL_FMT_Q8_0, exact->out, row_bytes, rows.data()};
  char error[256];
  screen->copy = il_linear_pack(runtime, &part, 1, exact->in, IL_FMT_F32, 0, nullptr, error, sizeof error);
  return screen->copy == nullptr ? nullptr : screen.release();
}

const il_linear *il_screen_copy(const il_screen *screen) { return screen->copy; }

void il_screen_free(il_screen *screen) { delete static_cast<Screen *>(screen); }
}
