// AVX2 with FMA and F16C: x86 processors since 2013.
#define IL_ISA avx2
#define IL_TABLE isa_avx2
#define IL_ISA_NAME "avx2"

#if defined(__AVX2__)
#define IL_AVX2
namespace avx2 {
static bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace avx2
#else
namespace avx2 {
static bool supported() { return false; }
}
#endif
#include "ops.inc"
