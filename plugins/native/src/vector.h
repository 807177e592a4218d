// Vectors of the compiler: one notation that becomes AVX-512, AVX2 or plain SSE/NEON code, by the flags of the file that
// includes this. Everything here lives in the namespace of the instruction set, so that variants never mix at link time.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace IL_ISA {

#if defined(IL_AVX512)
constexpr int LANES = 16;
#elif defined(IL_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vfloat __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t vuint __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vhalf __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

inline vfloat broadcast(float value) { return vfloat{} + value; }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// Round to nearest, ties to even; a NaN stays a NaN.
inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline void put(float *to, float value) { *to = value; }
inline void put(bf16 *to, float value) { *to = to_bf16(value); }

inline vfloat load(const float *from) { return *reinterpret_cast<const vfloat *>(from); }
inline void store(float *to, vfloat value) { *reinterpret_cast<vfloat *>(to) = value; }
inline vfloat load(const bf16 *from) {
  const vhalf half = *reinterpret_cast<const vhalf *>(from);
  const vuint bits = __builtin_convertvector(half, vuint) << 16;
  vfloat wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline void store(bf16 *to, vfloat value) {
#if defined(IL_AVX512)
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512 &>(value));
  std::memcpy(to, &half, sizeof half);
#else
  vuint bits;
  std::memcpy(&bits, &value, sizeof bits);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet = (bits >> 16) | 0x40;
  const vint is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  vuint mask;
  std::memcpy(&mask, &is_nan, sizeof mask);
  *reinterpret_cast<vhalf *>(to) = __builtin_convertvector((rounded & ~mask) | (quiet & mask), vhalf);
#endif
}

inline float sum(vfloat value) {
  float total = 0;
  for (int lane = 0; lane < LANES; ++lane) total += value[lane];
  return total;
}

}  // namespace IL_ISA
