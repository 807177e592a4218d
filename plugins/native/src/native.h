// The C interface of Interlace's CPU kernels: plain C, no torch, called through ctypes.
//
// Everything is an op: a code, a few numbers, a few pointers. A single kernel call is a program of one op; a recorded
// model is a program of some hundred, run by one call per step. What changes from step to step (how many tokens, which
// cache blocks) is in `il_step`, so a program is recorded once and replayed for every batch.
#pragma once

#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// Grows when a structure or an op changes its meaning; library.py refuses another one.
#define IL_ABI 4

// Types of activations and plain weights.
enum il_dtype : int32_t { IL_F32 = 0, IL_BF16 = 1 };

// `rows` of an op: a number, or what the step says.
enum : int64_t { IL_TOKENS = -1, IL_OUTPUTS = -2 };

enum il_code : int32_t {
  IL_RMS_NORM = 0,
  IL_ADD_RMS_NORM = 1,
  IL_ROPE = 2,
  IL_SILU_MUL = 3,
  IL_GELU_MUL = 4,
  IL_EMBEDDING = 5,
  IL_LINEAR = 6,
  IL_ATTENTION = 7,
  IL_ARGMAX = 8,
  IL_COPY_ROWS = 9,
  IL_SCALE = 10,
  IL_BLOCK_EMBEDDING = 11,
  IL_DRAW = 12,
  IL_SCREENED_ARGMAX = 13,
  IL_NUM_CODES
};

// One op. What `i`, `f` and `p` hold is said at each op's implementation.
struct il_op {
  int32_t code;
  int32_t dtype;     // il_dtype of the activations
  int64_t rows;      // outer rows: a number, IL_TOKENS or IL_OUTPUTS
  int64_t i[12];     // sizes and strides, in elements
  double f[4];
  void *p[8];
};

// One KV group of a step.
struct il_group {
  const int32_t *block_table;  // [num_rows, table_stride], block ids of each sequence
  int64_t table_stride;
  const int64_t *slots;        // [num_tokens] block id * block size + offset: where a token's key and value go
};

// What one step works on.
struct il_step {
  int64_t num_tokens;
  int64_t num_rows;              // sequences
  int64_t num_outputs;           // rows that get logits
  const int64_t *token_ids;      // [num_tokens]
  const int64_t *positions;      // [num_tokens]
  const int32_t *query_start;    // [num_rows + 1] offsets of the sequences in the token dimension
  const int32_t *context_lens;   // [num_rows] tokens already in the cache before this step
  const int64_t *outputs;        // [num_outputs] places of the output rows in the token dimension
  const il_group *groups;
  int64_t num_groups;
};

struct il_runtime;

int32_t il_abi(void);

// Names of the instruction sets this processor can run, best first, separated by spaces.
const char *il_supported_isas(void);

// The runtime of this process with so many threads (the caller is one of them) and this instruction set; opened again,
// the same one is returned, so that all users of a process share threads. NULL if the name is not supported here.
il_runtime *il_open(int32_t threads, const char *isa);
void il_close(il_runtime *runtime);
const char *il_isa(const il_runtime *runtime);
int32_t il_threads(const il_runtime *runtime);

// Run ops in order; one caller at a time, others wait. Returns 0, or 1 + the index of an op whose code is unknown (then
// nothing was run).
int64_t il_run(il_runtime *runtime, const il_op *ops, int64_t count, const il_step *step);

// Advise the system to back memory that nobody has touched yet with huge pages: a cache that is read block by block costs a
// page walk per block otherwise. A hint, without effect where there are none.
void il_use_huge_pages(void *start, int64_t bytes);

// ── linear layers (linear.h) ──────────────────────────────────────────────────────────────────────────────────────

// How the values of a weight are stored. Block formats are those of GGUF: rows of blocks along the input.
enum il_format : int32_t {
  IL_FMT_F32 = 0,
  IL_FMT_F16 = 1,
  IL_FMT_BF16 = 2,
  IL_FMT_INT8 = 3,  // per output channel, symmetric, made here from floating values
  IL_FMT_Q4_0 = 10,
  IL_FMT_Q4_1 = 11,
  IL_FMT_Q5_0 = 12,
  IL_FMT_Q5_1 = 13,
  IL_FMT_Q8_0 = 14,
  IL_FMT_Q4_K = 20,
  IL_FMT_Q5_K = 21,
  IL_FMT_Q6_K = 22,
};

// Some rows of a weight [out, in], one after the other in memory.
struct il_part {
  int32_t format;
  int64_t rows;
  int64_t row_bytes;  // from one row to the next
  const void *data;
};

struct il_linear;

// Pack the parts' rows, in order, as one weight [sum of rows, in]. `keep`: il_format to keep floating parts in (IL_FMT_F32,
// IL_FMT_BF16, IL_FMT_INT8), and those in blocks as well if `decode_blocks`; else these stay blocks. `bias`: [out] float32
// or NULL. NULL if a format is not known to this instruction set or `in` is no multiple of its block; `error` then says why.
il_linear *il_linear_pack(il_runtime *runtime, const il_part *parts, int64_t num_parts, int64_t in, int32_t keep,
                          int32_t decode_blocks, const float *bias, char *error, int64_t error_size);
void il_linear_free(il_linear *linear);
int64_t il_linear_bytes(const il_linear *linear);
// Whether a gate can be part of the product: panels of the first half of the outputs lie as those of the second half do.
int32_t il_linear_has_halves(const il_linear *linear);

// ── the argmax of a head (head_screen.h) ──────────────────────────────────────────────────────────────────────────

struct il_screen;

// An 8-bit copy of a head, to find its largest results with; the head must outlive it. NULL if the weight is not kept in
// `dtype`, has a bias, or rows that are no multiple of 32 inputs; or if there is no memory.
il_screen *il_screen_make(il_runtime *runtime, const il_linear *exact, int32_t dtype);
const il_linear *il_screen_copy(const il_screen *screen);
void il_screen_free(il_screen *screen);
}
#pragma GCC visibility pop
