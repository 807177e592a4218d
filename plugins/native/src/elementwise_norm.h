// Root-mean-square norms.
#pragma once

#include "elementwise.h"

namespace IL_ISA {

// out = x / rms(x) * weight. As in the models' reference code, the normed value is rounded to the type of the activations
// before the product with a plain weight, and not before one with weight + 1.
template <typename T>
void norm_row(const T *x, const T *weight, T *out, int64_t size, float eps, bool unit_offset) {
  vfloat squares[4] = {};  // four chains: one alone would wait for itself
  int64_t at = 0;
  for (; at + 4 * LANES <= size; at += 4 * LANES)
    for (int64_t chain = 0; chain < 4; ++chain) {
      const vfloat value = load(x + at + chain * LANES);
      squares[chain] = fma(value, value, squares[chain]);
    }
  over_row(size - at, [&](int64_t rest, int64_t count) {
    const vfloat value = load_some(x + at + rest, count);
    squares[0] = fma(value, value, squares[0]);
  });
  const float sum = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const float mean = sum / static_cast<float>(size);
  const vfloat inverse = broadcast(1.0f / std::sqrt(mean + eps)), one = broadcast(1.0f);
  over_row(size, [&](int64_t at, int64_t count) {
    const vfloat normed = load_some(x + at, count) * inverse, factor = load_some(weight + at, count);
    store_some(out + at, unit_offset ? normed * (factor + one) : rounded<T>(normed) * factor, count);
  });
}

// i: 0 size, 1 heads (1 for plain rows), 2 and 3 row and head stride of x, 4 and 5 of out, 6 unit offset. f: 0 eps.
// p: 0 x [rows, heads, size], 1 weight [size], 2 out.
template <typename T>
void rms_norm_rows(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t size = op.i[0], heads = op.i[1];
  const T *weight = static_cast<const T *>(op.p[1]);
  share_rows(interlace::rows_of(op, step), heads * size, thread, [&](int64_t row) {
    const T *x = static_cast<const T *>(op.p[0]) + row * op.i[2];
    T *out = static_cast<T *>(op.p[2]) + row * op.i[4];
    for (int64_t head = 0; head < heads; ++head)
      norm_row(x + head * op.i[3], weight, out + head * op.i[5], size, static_cast<float>(op.f[0]), op.i[6] != 0);
  });
}

inline void rms_norm(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? rms_norm_rows<bf16>(op, step, thread) : rms_norm_rows<float>(op, step, thread);
}

// residual += x, then out = norm(residual). i: 0 size, 1 row stride of x, 2 of residual, 3 of out, 4 unit offset.
// f: 0 eps. p: 0 x, 1 residual, 2 weight, 3 out.
template <typename T>
void add_rms_norm_rows(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t size = op.i[0];
  share_rows(interlace::rows_of(op, step), size, thread, [&](int64_t row) {
    const T *x = static_cast<const T *>(op.p[0]) + row * op.i[1];
    T *residual = static_cast<T *>(op.p[1]) + row * op.i[2];
    T *out = static_cast<T *>(op.p[3]) + row * op.i[3];
    over_row(size, [&](int64_t at, int64_t count) {
      store_some(residual + at, load_some(residual + at, count) + load_some(x + at, count), count);
    });
    norm_row(residual, static_cast<const T *>(op.p[2]), out, size, static_cast<float>(op.f[0]), op.i[4] != 0);
  });
}

inline void add_rms_norm(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? add_rms_norm_rows<bf16>(op, step, thread) : add_rms_norm_rows<float>(op, step, thread);
}

}  // namespace IL_ISA
