// Rotary position embedding, halves convention (NeoX style).
#pragma once

#include "elementwise.h"

namespace IL_ISA {

// Turn the first 2 * half values of a head by the angles of `table` [half cosines, half sines]; copy the rest.
template <typename T>
void turn_head(const T *x, T *out, const float *table, int64_t half, int64_t head_size) {
  over_row(half, [&](int64_t at, int64_t count) {
    const vfloat cosine = load_some(table + at, count), sine = load_some(table + half + at, count);
    const vfloat first = load_some(x + at, count), second = load_some(x + half + at, count);
    store_some(out + at, fma(first, cosine, -(second * sine)), count);
    store_some(out + half + at, fma(second, cosine, first * sine), count);
  });
  if (out != x && 2 * half < head_size) std::memcpy(out + 2 * half, x + 2 * half, (head_size - 2 * half) * sizeof(T));
}

// i: 0 head size, 1 rotary, 2 heads of query, 3 of key, 4 and 5 row and head stride of query, 6 and 7 of key, 8 row
// stride of the query's output, 9 of the key's (their heads are dense), 10 rows of the table. p: 0 query, 1 key, 2 query
// out, 3 key out (out may be in), 4 positions int64 or NULL for the step's, 5 table [positions, rotary] float32.
template <typename T>
void rope_rows(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t size = op.i[0], half = op.i[1] / 2;
  const int64_t *positions = op.p[4] ? static_cast<const int64_t *>(op.p[4]) : step.positions;
  share_rows(interlace::rows_of(op, step), (op.i[2] + op.i[3]) * size, thread, [&](int64_t row) {
    const int64_t position = std::clamp<int64_t>(positions[row], 0, op.i[10] - 1);
    const float *table = static_cast<const float *>(op.p[5]) + position * op.i[1];
    for (int part = 0; part < 2; ++part) {
      const T *x = static_cast<const T *>(op.p[part]) + row * op.i[4 + 2 * part];
      T *out = static_cast<T *>(op.p[2 + part]) + row * op.i[8 + part];
      for (int64_t head = 0; head < op.i[2 + part]; ++head)
        turn_head(x + head * op.i[5 + 2 * part], out + head * size, table, half, size);
    }
  });
}

inline void rope(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? rope_rows<bf16>(op, step, thread) : rope_rows<float>(op, step, thread);
}

}  // namespace IL_ISA
