/* bfloat16 and float16 to and from float: round to nearest even, NaN stays NaN, subnormals kept. Branch-free,
 * so that loops over rows vectorise, and integer work wherever a subnormal is involved, so that a thread in
 * flush-to-zero mode gets the same bits. */
#ifndef ULTRAEP_CONVERT_H_
#define ULTRAEP_CONVERT_H_

#include <stdint.h>
#include <string.h>

static inline uint32_t convert_float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float convert_bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float convert_bf16_float(uint16_t value) {
  return convert_bits_float((uint32_t)value << 16);
}

static inline uint16_t convert_float_bf16(float value) {
  uint32_t bits = convert_float_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t quiet = (bits >> 16) | 0x40u; /* rounding could carry a NaN into infinity */
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

static inline float convert_f16_float(uint16_t value) {
  uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
  uint32_t magnitude = (uint32_t)(value & 0x7fffu) << 13; /* the exponent lands 112 too low */
  uint32_t normal = magnitude + (112u << 23);
  /* Subnormal: put the fraction below a leading one at 2^-14, then take that one away. */
  uint32_t subnormal = convert_float_bits(convert_bits_float(magnitude + (113u << 23)) - 0x1p-14f);
  uint32_t special = magnitude | 0x7f800000u; /* infinity or NaN */
  uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
  bits = magnitude >= (31u << 23) ? special : bits;
  return convert_bits_float(sign | bits);
}

static inline uint16_t convert_float_f16(float value) {
  uint32_t bits = convert_float_bits(value);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  /* Below 2^-14 the unit in the last place of (value + 0.5) is that of a float16 subnormal: the adder rounds.
   */
  uint32_t subnormal = convert_float_bits(convert_bits_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half; /* 65520 and more round to infinity */
  half = magnitude > 0x7f800000u ? nan : half;
  return (uint16_t)(sign | half);
}

#endif
