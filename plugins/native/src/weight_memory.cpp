#include "weight_memory.h"

#include <sys/mman.h>

#include <mutex>

namespace interlace {
namespace {

constexpr int64_t HUGE_PAGE = 2 << 20;
constexpr int64_t MAPPING = 32 << 20;

struct Mapping {
  void *base = nullptr;
  int64_t mapped = 0;
  uint8_t *start = nullptr;  // on a huge page
  int64_t size = 0;
  int64_t used = 0;

  ~Mapping() {
    if (base != nullptr) munmap(base, mapped);
  }
};

std::shared_ptr<Mapping> map(int64_t bytes) {
  auto mapping = std::make_shared<Mapping>();
  mapping->size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const int64_t mapped = mapping->size + HUGE_PAGE;
  void *base = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  mapping->base = base;
  mapping->mapped = mapped;
  const uintptr_t address = (reinterpret_cast<uintptr_t>(base) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  mapping->start = reinterpret_cast<uint8_t *>(address);
#if defined(MADV_HUGEPAGE)
  madvise(mapping->start, mapping->size, MADV_HUGEPAGE);  // a hint: refused, small pages serve
#endif
  return mapping;
}

}  // namespace

std::shared_ptr<uint8_t> WeightMemory::allocate(int64_t bytes) {
  static std::mutex lock;
  static std::weak_ptr<Mapping> open;  // the mapping that small pieces are cut from
  const int64_t size = (bytes + 63) / 64 * 64;
  std::lock_guard<std::mutex> guard(lock);
  std::shared_ptr<Mapping> mapping = open.lock();
  if (mapping == nullptr || mapping->used + size > mapping->size) {
    mapping = map(size > MAPPING ? size : MAPPING);
    if (mapping == nullptr) return nullptr;
    open = mapping;
  }
  uint8_t *piece = mapping->start + mapping->used;
  mapping->used += size;
  return std::shared_ptr<uint8_t>(mapping, piece);
}

}  // namespace interlace
