// The argmax of a head's logits, found with an 8-bit copy of the head and proved with the head itself.
//
// With q and x' for the 8-bit forms of a weight's row w and of the input x, Cauchy and Schwarz bound how far a logit of the
// copy is off:  |x·w - x'·q| <= |x'| |w - q| + |x - x'| |w|.  The norms of w and w - q are known from packing, those of x'
// and x - x' cost one look at x. A token whose rough logit plus this bound is below the best rough logit minus its own
// cannot win. The few that are left (some ten of 49,152, mostly) are computed with the head, by the code of every other
// product. So index and value are those of the whole product, bit by bit, ties and NaN included, for half of the memory
// and half of the work.
#pragma once

#include "linear_float.h"
#include "sampling.h"

namespace IL_ISA {

// How far a rough logit can be off: errors[token] * of_errors + norms[token] * of_norms.
struct Reach {
  float of_errors, of_norms;
};

template <typename T>
Reach reach_of(const T *x, int64_t in) {
  vfloat kept{}, lost{};
  for (int64_t block = 0; block < in; block += BLOCK) {
    vfloat values[BLOCK_VECTORS];
    for (int at = 0; at < BLOCK_VECTORS; ++at) values[at] = load(x + block + at * LANES);
    const float scale = scale_of(values);
    for (const vfloat &value : values) {
      const vfloat quant = __builtin_convertvector(rounded(value, scale > 0 ? 1.0f / scale : 0.0f), vfloat);
      const vfloat rough = quant * broadcast(scale), rest = value - rough;
      kept += rough * rough;
      lost += rest * rest;
    }
  }
  // Both ways of computing a logit round `in` times. What is too small to be squared counts as its upper bound.
  const float tiny = 1e-18f * static_cast<float>(in), rounding = static_cast<float>(in) * 0x1p-22f;
  const float of_errors = std::sqrt(sum_lanes(kept)) * 1.001f + tiny, of_norms = std::sqrt(sum_lanes(lost)) * 1.001f + tiny;
  return {of_errors, of_norms + rounding * (of_errors + of_norms)};
}

constexpr int64_t SCREEN_PART = 8192;  // tokens of a piece of work
constexpr int64_t SCREEN_GROUP = 128;  // tokens of which the best that they could be is kept
constexpr int64_t GROUPS = SCREEN_PART / SCREEN_GROUP;

// What a piece finds out.
struct Rough {
  float low;            // of all its tokens, one is at least this
  float high[GROUPS];   // of a group's tokens, none is more than this
};
struct Exact {
  int64_t token;  // -1: none of the piece can be the largest
  float value;
};

struct ScreenCall {
  const il_screen *screen;
  const uint8_t *x;
  int64_t x_stride;  // bytes
  const float *logits;
  int64_t stride;
  int64_t vocabulary, parts;
  bool is_bf16;

  explicit ScreenCall(const il_op &op)
      : screen(static_cast<const il_screen *>(op.p[4])), x(static_cast<const uint8_t *>(op.p[3])),
        x_stride(op.i[2] * (op.dtype == IL_F32 ? 4 : 2)), logits(static_cast<const float *>(op.p[0])), stride(op.i[1]),
        vocabulary(op.i[0]), parts((op.i[0] + SCREEN_PART - 1) / SCREEN_PART), is_bf16(op.dtype == IL_BF16) {}

  Reach reach(int64_t row) const {
    const uint8_t *from = x + row * x_stride;
    const int64_t in = screen->exact->in;
    return is_bf16 ? reach_of(reinterpret_cast<const bf16 *>(from), in)
                   : reach_of(reinterpret_cast<const float *>(from), in);
  }

  // Bounds of the logits of LANES tokens. What is not a number counts as perhaps the largest.
  void bounds(int64_t row, int64_t token, const Reach &reach, vfloat *low, vfloat *high) const {
    const vfloat logit = load_some(logits + row * stride + token, vocabulary - token);
    const vfloat off = load(screen->errors + token) * broadcast(reach.of_errors) +
                       load(screen->norms + token) * broadcast(reach.of_norms);
    *low = logit - off;
    *high = logit + off;
    *high = *high == *high ? *high : broadcast(std::numeric_limits<float>::infinity());
  }
};

inline void look_roughly(const ScreenCall &call, int64_t row, int64_t part, Rough *rough) {
  const Reach reach = call.reach(row);
  vfloat lowest = broadcast(-std::numeric_limits<float>::infinity());
  const int64_t first = part * SCREEN_PART, last = std::min(call.vocabulary, first + SCREEN_PART);
  for (int64_t group = 0; first + group * SCREEN_GROUP < last; ++group) {
    vfloat highest = broadcast(-std::numeric_limits<float>::infinity());
    const int64_t begin = first + group * SCREEN_GROUP, end = std::min(last, begin + SCREEN_GROUP);
    for (int64_t token = begin; token < end; token += LANES) {
      vfloat low, high;
      call.bounds(row, token, reach, &low, &high);
      lowest = larger(low, lowest);  // passes over a NaN
      highest = larger(high, highest);
    }
    rough->high[group] = max_lane(highest);
  }
  rough->low = max_lane(lowest);
}

// Strips of the head with a token that could be the largest, in order.
inline int64_t find_strips(const ScreenCall &call, int64_t row, int64_t part, const Rough &rough, float low,
                           int32_t *strips) {
  const Reach reach = call.reach(row);
  const int64_t first = part * SCREEN_PART, last = std::min(call.vocabulary, first + SCREEN_PART);
  int64_t count = 0;
  for (int64_t group = 0; first + group * SCREEN_GROUP < last; ++group) {
    if (rough.high[group] < low) continue;
    const int64_t begin = first + group * SCREEN_GROUP, end = std::min(last, begin + SCREEN_GROUP);
    for (int64_t strip = begin; strip < end; strip += STRIP) {
      bool is_open = false;
      for (int64_t token = strip; token < std::min(end, strip + STRIP); token += LANES) {
        vfloat lows, highs;
        call.bounds(row, token, reach, &lows, &highs);
        is_open |= !(max_lane(highs) < low);
      }
      if (is_open) strips[count++] = static_cast<int32_t>(strip / STRIP);
    }
  }
  return count;
}

// The logits of one strip, by the tile kernel that computes whole panels; the next strip is fetched meanwhile.
inline void compute_strip(const ScreenCall &call, int64_t row, int64_t strip, int64_t next, float *logits) {
  const il_linear &head = *call.screen->exact;
  const int64_t per_panel = head.panels[0].strips;
  const auto panel_of = [&](int64_t at) { return head.panels[at / per_panel]; };
  const auto values_of = [&](int64_t at) { return panel_of(at).values + at % per_panel * 64; };
  Panel alone = panel_of(strip);
  alone.values = const_cast<uint8_t *>(values_of(strip));
  alone.rows = STRIP;
  Tile tile{};
  tile.panel = &alone;
  tile.x = call.x + row * call.x_stride;
  tile.depth = call.is_bf16 ? head.in / 2 : head.in;
  tile.out = reinterpret_cast<uint8_t *>(logits);
  tile.wide = true;
  tile.ahead = {values_of(next), nullptr, tile.depth, panel_of(next).strips * 64};
  strip_kernel(alone.strips, call.is_bf16)(tile);
}

inline bool is_better(float value, float best) { return best == best && !(value <= best); }

// The largest exact logit of those that could be the largest of the row; of equal ones the first.
inline Exact look_closely(const ScreenCall &call, int64_t row, int64_t part, const Rough &rough, float low,
                          int32_t *strips) {
  const int64_t count = find_strips(call, row, part, rough, low, strips);
  Exact best{-1, 0.0f};
  for (int64_t at = 0; at < count; ++at) {
    alignas(64) float logits[STRIP];
    compute_strip(call, row, strips[at], strips[std::min(at + 1, count - 1)], logits);
    const int64_t first = int64_t{strips[at]} * STRIP;
    for (int64_t lane = 0; lane < std::min<int64_t>(STRIP, call.vocabulary - first); ++lane)
      if (best.token < 0 || is_better(logits[lane], best.value)) best = {first + lane, logits[lane]};
  }
  return best;
}

// Index and value of the largest logit of each row, as `argmax` of the whole product gives them.
// i: 0 vocabulary, 1 row stride of the logits, 2 row stride of x. p: 0 logits of the copy [rows, vocabulary] float32, 1 int64
// out [rows], 2 float32 out [rows], 3 x [rows, in] in the type of the head, 4 il_screen.
inline void screened_argmax(const il_op &op, const il_step &step, Thread &thread) {
  const ScreenCall call(op);
  const int64_t rows = interlace::rows_of(op, step), parts = call.parts;
  const int64_t at_once = std::max<int64_t>(1, Thread::SHARED_BYTES / (parts * int64_t{sizeof(Rough) + sizeof(Exact)}));
  Exact *const exact = reinterpret_cast<Exact *>(thread.shared);
  Rough *const rough = reinterpret_cast<Rough *>(exact + at_once * parts);
  for (int64_t start = 0; start < rows; start += at_once) {
    const int64_t count = std::min(at_once, rows - start);
    // Rows of one part after the other: its norms stay in the cache.
    for (int64_t piece; (piece = thread.claim()) < count * parts;)
      look_roughly(call, start + piece % count, piece / count, rough + piece % count * parts + piece / count);
    thread.barrier();
    for (int64_t piece; (piece = thread.claim()) < count * parts;) {
      const Rough *const own = rough + piece % count * parts;
      float low = -std::numeric_limits<float>::infinity();
      for (int64_t part = 0; part < parts; ++part) low = std::max(low, own[part].low);
      exact[piece % count * parts + piece / count] = look_closely(
          call, start + piece % count, piece / count, own[piece / count], low, reinterpret_cast<int32_t *>(thread.scratch));
    }
    thread.barrier();
    for (int64_t row = thread.id; row < count; row += thread.count()) {
      Exact best{-1, 0.0f};
      for (int64_t part = 0; part < parts; ++part) {
        const Exact &found = exact[row * parts + part];
        if (found.token >= 0 && (best.token < 0 || is_better(found.value, best.value))) best = found;
      }
      static_cast<int64_t *>(op.p[1])[start + row] = best.token;
      static_cast<float *>(op.p[2])[start + row] = best.value;
    }
    thread.barrier();
  }
}

}  // namespace IL_ISA
