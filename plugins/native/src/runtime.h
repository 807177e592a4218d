// Threads, barriers and work sharing: what ops are given besides their arguments.
#pragma once

#include <atomic>
#include <cstdint>

#include "native.h"

namespace interlace {

// State that the threads of one runtime share while a program runs.
struct Team {
  int32_t size = 1;
  alignas(64) std::atomic<int32_t> arrived{0};
  std::atomic<int32_t> sleepers{0};  // at the barrier
  alignas(64) std::atomic<uint32_t> phase{0};
  alignas(64) std::atomic<int64_t> claimed{0};

  // Wait for all threads. The last to arrive takes back what was claimed.
  void barrier();
};

// One thread's view of a running op.
struct Thread {
  Team *team;
  int32_t id;
  uint8_t *scratch;       // private, SCRATCH_BYTES, aligned to 64
  uint8_t *shared;        // of the whole team, SHARED_BYTES, aligned to 64

  static constexpr int64_t SCRATCH_BYTES = 4 << 20;
  static constexpr int64_t SHARED_BYTES = 32 << 20;

  int32_t count() const { return team->size; }

  // The next piece of work of this op that nobody has taken: 0, 1, 2, … Use it with a loop over a fixed number of pieces;
  // which thread computes a piece must not change its result. Starts anew with each op and after each `barrier`.
  int64_t claim() { return team->claimed.fetch_add(1, std::memory_order_relaxed); }

  // All threads meet; for ops with several passes.
  void barrier() { team->barrier(); }
};

inline int64_t rows_of(const il_op &op, const il_step &step) {
  if (op.rows == IL_TOKENS) return step.num_tokens;
  if (op.rows == IL_OUTPUTS) return step.num_outputs;
  return op.rows;
}

using OpFunction = void (*)(const il_op &, const il_step &, Thread &);

// One instruction set: its own compilation of every op.
struct Isa {
  const char *name;
  bool (*supported)();
  OpFunction ops[IL_NUM_CODES];
  int32_t float_strips;  // of a panel of plain weights (linear_weight.h)
};

extern const Isa isa_avx512, isa_avx2, isa_portable;

const Isa &isa_of(const il_runtime *runtime);

// Run something that is not an op on all threads of the team.
using TeamBody = void (*)(void *context, Thread &thread);
void run_on_team(il_runtime *runtime, TeamBody body, void *context);

}  // namespace interlace
