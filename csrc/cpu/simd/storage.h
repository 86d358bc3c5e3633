// Storage types, their conversion one by one, and the coefficients of the exponentials and logarithms of all sets.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

// Storage of the two 16-bit formats; never computed with.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(Float16 x) {
  // Place the 15 magnitude bits where float32 has them and let a product by 2^112 fix the exponent (denormals too).
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // inf and NaN keep their exponent of all ones
  bits |= uint32_t(x.bits & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(double x, double* out) { *out = x; }
inline void from_float(double x, float* out) { *out = float(x); }
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // Round to nearest even; a NaN stays a (quiet) NaN instead of rounding up to infinity.
  out->bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // rounds to infinity
  } else if (bits < 0x38800000) {
    // A denormal: adding 0.5 makes the float unit round at the right bit.
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(half | sign);
}

// Coefficients of 2^f on [0, 1), ascending, the first exactly 1; minimax of the relative error (Remez, 60 digits).
// float: 8.2e-8 before rounding, 1.4e-7 as evaluated. double: 3.2e-18 before rounding.
constexpr float kExp2f[6] = {1.0f, 0.693151295f, 0.240164444f, 0.0557999127f, 0.00901703071f, 0.00186713005f};
constexpr double kExp2d[12] = {1.0,
                               0.69314718055994592839,
                               0.24022650695906330315,
                               0.055504108665602238723,
                               0.0096181290995508956128,
                               0.0013333558629562675936,
                               0.00015403512309733948746,
                               0.00001525317505379524616,
                               1.3208367308220049348e-6,
                               1.025321230405209001e-7,
                               6.5595298355172712178e-9,
                               6.2634652734225902742e-10};
// Coefficients of log2(1 + t) / t on [−¼, ½], ascending; minimax of the relative error, 2.8e-8 before rounding.
constexpr float kLog2f[9] = {1.44269502f,   -0.721348405f, 0.48090145f,   -0.360579163f, 0.288208306f,
                             -0.242701858f, 0.216172189f,  -0.174095377f, 0.0780967325f};
// Coefficients of (2 atanh s − 2 s) / (s³ ln 2) in s² for |s| ≤ (√2 − 1) / (√2 + 1), ascending; 1.2e-18.
constexpr double kAtanhd[7] = {0.96179669392598532, 0.57707801634714095, 0.41219858557755579, 0.32059855679144439,
                               0.26233338080258495, 0.22093504769218988, 0.21346043324523797};
constexpr double kTwoLog2E = 2.8853900817779268;
// Coefficients of 2 atanh u / u in u² for |u| ≤ ⅓, ascending, the first exactly 2; minimax of the relative error
// (Remez, 60 digits), 4.0e-9 and 1.2e-18 before rounding.
constexpr float kTwiceAtanhf[5] = {2.0f, 0.66666317f, 0.4002491f, 0.279606f, 0.28178334f};
constexpr double kTwiceAtanhd[11] = {2.0,
                                     0.66666666666666134233,
                                     0.40000000000190326437,
                                     0.2857142854492502758,
                                     0.22222224111778241296,
                                     0.18181739787590417126,
                                     0.15386635456315195694,
                                     0.13300102491798210381,
                                     0.12112249089821112226,
                                     0.083156839557900329348,
                                     0.17060062920105509553};
// To take a logarithm, a number is split where its fraction is ¾ (float) or √½ (double) instead of 1.
constexpr uint32_t kSplitF = 0x3f400000, kOneF = 0x3f800000;
constexpr uint64_t kSplitD = 0x3fe6a09e667f3bcd, kOneD = 0x3ff0000000000000;
constexpr float kNegInf = -__builtin_inff(), kNan = __builtin_nanf("");

}  // namespace
