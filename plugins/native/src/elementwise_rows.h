// Ops that move rows: the token embedding, plain and in GGUF blocks, and the gather of output rows.
#pragma once

#include "elementwise.h"
#include "elementwise_blocks.h"

namespace IL_ISA {

inline const int64_t *token_ids_of(const il_op &op, const il_step &step) {
  return op.p[0] ? static_cast<const int64_t *>(op.p[0]) : step.token_ids;
}

// A token outside the vocabulary gets NaN, which the sampler reports for its row, instead of memory that is not ours.
template <typename T>
void fill_with_nan(T *out, int64_t size) {
  for (int64_t at = 0; at < size; ++at) put(out + at, std::numeric_limits<float>::quiet_NaN());
}

// i: 0 size, 1 vocabulary, 2 row stride of weight, 3 of out. p: 0 token ids int64 or NULL for the step's, 1 weight
// [vocabulary, size], 2 out [rows, size].
template <typename T>
void embedding_rows(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t size = op.i[0], *ids = token_ids_of(op, step);
  share_rows(interlace::rows_of(op, step), size, thread, [&](int64_t row) {
    T *out = static_cast<T *>(op.p[2]) + row * op.i[3];
    if (ids[row] < 0 || ids[row] >= op.i[1]) return fill_with_nan(out, size);
    std::memcpy(out, static_cast<const T *>(op.p[1]) + ids[row] * op.i[2], size * sizeof(T));
  });
}

inline void embedding(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? embedding_rows<bf16>(op, step, thread) : embedding_rows<float>(op, step, thread);
}

// i: 0 size, 1 vocabulary, 2 bytes from row to row, 3 row stride of out, 4 il_format. p: as embedding, 1 being blocks.
template <typename T>
void block_embedding_rows(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t size = op.i[0], *ids = token_ids_of(op, step);
  const BlockFormat format = block_format(static_cast<int32_t>(op.i[4]));
  float values[MAX_BLOCK];
  share_rows(interlace::rows_of(op, step), size, thread, [&](int64_t row) {
    T *out = static_cast<T *>(op.p[2]) + row * op.i[3];
    if (ids[row] < 0 || ids[row] >= op.i[1]) return fill_with_nan(out, size);
    const uint8_t *block = static_cast<const uint8_t *>(op.p[1]) + ids[row] * op.i[2];
    for (int64_t at = 0; at < size; at += format.values, block += format.bytes) {
      format.decode(block, values);
      for (int64_t value = 0; value < format.values; ++value) put(out + at + value, values[value]);
    }
  });
}

inline void block_embedding(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? block_embedding_rows<bf16>(op, step, thread) : block_embedding_rows<float>(op, step, thread);
}

// out[r] = x[the step's output r]. i: 0 size, 1 row stride of x, 2 of out. p: 0 x, 1 out, 2 int64 places or NULL for the
// step's outputs.
template <typename T>
void copy_rows_of(const il_op &op, const il_step &step, Thread &thread) {
  const int64_t *places = op.p[2] ? static_cast<const int64_t *>(op.p[2]) : step.outputs;
  share_rows(interlace::rows_of(op, step), op.i[0], thread, [&](int64_t row) {
    const T *x = static_cast<const T *>(op.p[0]) + places[row] * op.i[1];
    std::memcpy(static_cast<T *>(op.p[1]) + row * op.i[2], x, op.i[0] * sizeof(T));
  });
}

inline void copy_rows(const il_op &op, const il_step &step, Thread &thread) {
  op.dtype == IL_BF16 ? copy_rows_of<bf16>(op, step, thread) : copy_rows_of<float>(op, step, thread);
}

}  // namespace IL_ISA
