// AVX-512 with BF16 and VNNI: Zen 4 and later, Cooper Lake, Sapphire Rapids and later.
#define IL_ISA avx512
#define IL_TABLE isa_avx512
#define IL_ISA_NAME "avx512"

#if defined(__AVX512BF16__)
#define IL_AVX512
namespace avx512 {
static bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
}  // namespace avx512
#else
namespace avx512 {
static bool supported() { return false; }
}
#endif
#include "ops.inc"
