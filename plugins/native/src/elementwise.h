// Ops without products of matrices: gated activations (and, to come, norms, rope, embedding).
//
// Rows are shared among threads; a row is computed by one thread in one order, so its bits never depend on the others.
#pragma once

#include <algorithm>
#include <cmath>

#include "runtime.h"
#include "vector.h"

namespace IL_ISA {

using interlace::Thread;

constexpr int64_t ROWS_PER_PIECE = 4;

// i: 0 size, 1 row stride of gate_up, 2 row stride of out. p: 0 gate_up [rows, 2 * size], 1 out [rows, size].
template <typename T>
void silu_mul_rows(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t rows = interlace::rows_of(op, step), size = op.i[0];
  for (int64_t first; (first = thread.claim() * ROWS_PER_PIECE) < rows;)
    for (int64_t row = first; row < std::min(rows, first + ROWS_PER_PIECE); ++row) {
      const T *gate = static_cast<const T *>(op.p[0]) + row * op.i[1];
      T *out = static_cast<T *>(op.p[1]) + row * op.i[2];
      for (int64_t at = 0; at < size; ++at) {
        const float x = to_float(gate[at]);
        put(out + at, x / (1.0f + std::exp(-x)) * to_float(gate[size + at]));
      }
    }
}

inline void silu_mul(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? silu_mul_rows<bf16>(op, step, thread) : silu_mul_rows<float>(op, step, thread);
}

}  // namespace IL_ISA
