// Huge pages for memory that others have allocated.
#include <sys/mman.h>

#include "native.h"

extern "C" void il_use_huge_pages(void *start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(start) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes)) / HUGE_PAGE * HUGE_PAGE;
  if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}
