// Ops on single values: gated activations, scaling.
//
// Here and in elementwise_*.h rows are shared among threads; a row is computed by one thread in one order, so its bits
// never depend on the others.
#pragma once

#include <algorithm>

#include "elementwise_math.h"
#include "runtime.h"

namespace IL_ISA {

using interlace::Thread;

// `body(row)` for all rows, each on one of the threads. `cost`: values per row; pieces are a few microseconds of work.
template <typename Body>
void share_rows(int64_t rows, int64_t cost, Thread &thread, Body body) {
  const int64_t per_piece = std::clamp<int64_t>(4096 / std::max<int64_t>(cost, 1), 1, 64);
  for (int64_t first; (first = thread.claim() * per_piece) < rows;)
    for (int64_t row = first; row < std::min(rows, first + per_piece); ++row) body(row);
}

// z / (1 + e^-x)
inline vfloat gated(vfloat z, vfloat x) { return z * reciprocal(broadcast(1.0f) + exp(-x)); }

struct Silu {
  static vfloat apply(vfloat x) { return gated(x, x); }
};

// The approximation with tanh: x / 2 * (1 + tanh u) = x / (1 + e^-2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
struct GeluTanh {
  static vfloat apply(vfloat x) {
    const vfloat inner = fma(x * x * x, broadcast(0.044715f), x);
    return gated(x, inner * broadcast(1.5957691216f));
  }
};

// out = activation(gate) * up
template <typename T, typename Activation>
void gate_row(const T *gate, const T *up, T *out, int64_t size) {
  over_row(size, [&](int64_t at, int64_t count) {
    const vfloat value = Activation::apply(load_some(gate + at, count));
    store_some(out + at, value * load_some(up + at, count), count);
  });
}

// i: 0 size, 1 row stride of gate_up, 2 row stride of out. p: 0 gate_up [rows, 2 * size], 1 out [rows, size].
template <typename T, typename Activation>
void gate_rows(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t size = op.i[0];
  share_rows(interlace::rows_of(op, step), size, thread, [&](int64_t row) {
    const T *gate = static_cast<const T *>(op.p[0]) + row * op.i[1];
    gate_row<T, Activation>(gate, gate + size, static_cast<T *>(op.p[1]) + row * op.i[2], size);
  });
}

inline void silu_mul(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? gate_rows<bf16, Silu>(op, step, thread) : gate_rows<float, Silu>(op, step, thread);
}

inline void gelu_mul(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? gate_rows<bf16, GeluTanh>(op, step, thread) : gate_rows<float, GeluTanh>(op, step, thread);
}

// i: 0 size, 1 row stride of x, 2 row stride of out. f: 0 factor. p: 0 x, 1 out (may be x).
template <typename T>
void scale_rows(const il_op &op, const il_step &step, Thread &thread) {
  const vfloat factor = broadcast(static_cast<float>(op.f[0]));
  share_rows(interlace::rows_of(op, step), op.i[0], thread, [&](int64_t row) {
    const T *x = static_cast<const T *>(op.p[0]) + row * op.i[1];
    T *out = static_cast<T *>(op.p[1]) + row * op.i[2];
    over_row(op.i[0], [&](int64_t at, int64_t count) { store_some(out + at, load_some(x + at, count) * factor, count); });
  });
}

inline void scale(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? scale_rows<bf16>(op, step, thread) : scale_rows<float>(op, step, thread);
}

}  // namespace IL_ISA
