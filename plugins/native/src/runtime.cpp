// The thread team and the program runner.
#include "runtime.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace interlace {
namespace {

// Spinning is for waits of a few microseconds within a step. Past that a thread sleeps, so an idle engine costs nothing. At
// a barrier, a long wait means that another thread of the team has lost its core to somebody else; the core of a sleeper
// is where the system lets it go on at once, while one that spins, or yields, would keep it waiting for a time slice.
constexpr int SPINS_AT_BARRIER = 2000;
constexpr int SPINS_BEFORE_SLEEP = 20000;

void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Denormals cost a hundred cycles each and mean nothing here. Restored on exit: a caller's thread is not ours.
class FlushDenormals {
 public:
  FlushDenormals() {
#if defined(__x86_64__)
    before_ = _mm_getcsr();
    _mm_setcsr(before_ | 0x8040);
#endif
  }
  ~FlushDenormals() {
#if defined(__x86_64__)
    _mm_setcsr(before_);
#endif
  }

 private:
  unsigned before_ = 0;
};

void futex_wait(std::atomic<uint32_t> *word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t> *word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

struct AlignedFree {
  void operator()(uint8_t *memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<uint8_t, AlignedFree>;

Buffer allocate(int64_t bytes) { return Buffer(static_cast<uint8_t *>(std::aligned_alloc(64, bytes))); }

}  // namespace

void Team::barrier() {
  if (size == 1) {
    claimed.store(0, std::memory_order_relaxed);
    return;
  }
  const uint32_t now = phase.load(std::memory_order_acquire);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived.store(0, std::memory_order_relaxed);
    claimed.store(0, std::memory_order_relaxed);
    phase.store(now + 1);
    if (sleepers.load() > 0) futex_wake_all(&phase);
    return;
  }
  for (int spins = 0; spins < SPINS_AT_BARRIER; ++spins) {
    if (phase.load(std::memory_order_acquire) != now) return;
    pause_cpu();
  }
  sleepers.fetch_add(1);
  while (phase.load() == now) futex_wait(&phase, now);
  sleepers.fetch_sub(1);
}

}  // namespace interlace

using namespace interlace;

struct il_runtime {
  const Isa *isa;
  int32_t threads;
  int32_t users = 1;
  Team team;
  std::mutex running;  // one program at a time
  // Of the program that runs:
  const il_op *ops = nullptr;
  int64_t count = 0;
  const il_step *step = nullptr;
  TeamBody body = nullptr;  // instead of ops
  void *context = nullptr;
  // Grows with each program; helpers wait on it. Bit 0 is not special: any change means work, or the end.
  std::atomic<uint32_t> ticket{0};
  std::atomic<int32_t> sleepers{0};
  std::atomic<bool> closing{false};
  std::vector<std::thread> helpers;
  std::vector<Buffer> scratch;
  Buffer shared;

  void work(int32_t id) {
    FlushDenormals flush;
    Thread thread{&team, id, scratch[id].get(), shared.get()};
    if (body != nullptr) {
      body(context, thread);
      team.barrier();
      return;
    }
    // Past the last barrier the caller may already be setting up its next program, so nothing of this one is read there.
    const il_op *const program = ops;
    const int64_t length = count;
    for (int64_t at = 0; at < length; ++at) {
      isa->ops[program[at].code](program[at], *step, thread);
      team.barrier();
    }
  }

  void help(int32_t id) {
    uint32_t seen = 0;
    for (;;) {
      wait_for_change(seen);
      seen = ticket.load(std::memory_order_acquire);
      if (closing.load(std::memory_order_acquire)) return;
      work(id);
    }
  }

  void wait_for_change(uint32_t seen) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; ++spins) {
      if (ticket.load(std::memory_order_acquire) != seen) return;
      pause_cpu();
    }
    sleepers.fetch_add(1);
    while (ticket.load() == seen) futex_wait(&ticket, seen);
    sleepers.fetch_sub(1);
  }

  void run() {
    team.claimed.store(0, std::memory_order_relaxed);
    if (threads > 1) announce();
    work(0);
  }

  void announce() {
    ticket.fetch_add(1);
    if (sleepers.load() > 0) futex_wake_all(&ticket);
  }
};

namespace {

std::mutex registry_lock;
std::vector<il_runtime *> &registry() {
  static std::vector<il_runtime *> runtimes;
  return runtimes;
}

const Isa *const all_isas[] = {&isa_avx512, &isa_avx2, &isa_portable};

}  // namespace

extern "C" {

int32_t il_abi(void) { return IL_ABI; }

const char *il_supported_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const Isa *isa : all_isas)
      if (isa->supported()) joined += (joined.empty() ? "" : " ") + std::string(isa->name);
    return joined;
  }();
  return names.c_str();
}

il_runtime *il_open(int32_t threads, const char *isa_name) {
  const Isa *chosen = nullptr;
  for (const Isa *isa : all_isas)
    if (std::strcmp(isa->name, isa_name) == 0 && isa->supported()) chosen = isa;
  if (chosen == nullptr || threads < 1) return nullptr;
  std::lock_guard<std::mutex> guard(registry_lock);
  for (il_runtime *runtime : registry())
    if (runtime->isa == chosen && runtime->threads == threads) {
      ++runtime->users;
      return runtime;
    }
  auto *runtime = new il_runtime;
  runtime->isa = chosen;
  runtime->threads = threads;
  runtime->team.size = threads;
  runtime->shared = allocate(Thread::SHARED_BYTES);
  for (int32_t id = 0; id < threads; ++id) runtime->scratch.push_back(allocate(Thread::SCRATCH_BYTES));
  for (int32_t id = 1; id < threads; ++id) runtime->helpers.emplace_back([runtime, id] { runtime->help(id); });
  registry().push_back(runtime);
  return runtime;
}

void il_close(il_runtime *runtime) {
  std::lock_guard<std::mutex> guard(registry_lock);
  if (--runtime->users > 0) return;
  std::vector<il_runtime *> &all = registry();
  all.erase(std::find(all.begin(), all.end(), runtime));
  runtime->closing.store(true, std::memory_order_release);
  runtime->announce();
  for (std::thread &helper : runtime->helpers) helper.join();
  delete runtime;
}

const char *il_isa(const il_runtime *runtime) { return runtime->isa->name; }
int32_t il_threads(const il_runtime *runtime) { return runtime->threads; }

int64_t il_run(il_runtime *runtime, const il_op *ops, int64_t count, const il_step *step) {
  for (int64_t at = 0; at < count; ++at)
    if (ops[at].code < 0 || ops[at].code >= IL_NUM_CODES || runtime->isa->ops[ops[at].code] == nullptr) return at + 1;
  std::lock_guard<std::mutex> guard(runtime->running);
  runtime->ops = ops;
  runtime->count = count;
  runtime->step = step;
  runtime->run();
  return 0;
}
}

namespace interlace {

const Isa &isa_of(const il_runtime *runtime) { return *runtime->isa; }

void run_on_team(il_runtime *runtime, TeamBody body, void *context) {
  std::lock_guard<std::mutex> guard(runtime->running);
  runtime->body = body;
  runtime->context = context;
  runtime->run();
  runtime->body = nullptr;
}

}  // namespace interlace
