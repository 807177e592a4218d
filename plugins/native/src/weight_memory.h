// Memory for packed weights: large pieces on huge pages, since a decode step reads all of it and small pages would cost a
// translation miss every 4 KiB.
#pragma once

#include <cstdint>
#include <memory>

namespace interlace {

class WeightMemory {
 public:
  // Zeroed memory, aligned to 64; it lives as long as the result. Small pieces share a mapping. NULL if there is none left.
  static std::shared_ptr<uint8_t> allocate(int64_t bytes);
};

}  // namespace interlace
