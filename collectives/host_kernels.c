/* Sums of rows. The loops are plain, for the compiler to vectorise; each is compiled for the baseline machine
 * and, on x86, for AVX2, and chosen at run time. Both give the same bits: every element is computed alone,
 * the file is compiled without contraction to fused multiply-add, and neither reorders additions. */
#include "convert.h"
#include "host.h"

#include <string.h>

#define BLOCK                                                                                                \
  256 /* elements summed at a time: their fp32 sums and two rows' parts stay in the first-level cache */
#define CACHE_LINE 64

/* Adds weight * row to sums, or rounds sums to a row; n elements, at most BLOCK. */
typedef void (*hostAdd_t)(float *restrict sums, const void *restrict row, float weight, size_t n);
typedef void (*hostRound_t)(void *restrict row, const float *restrict sums, size_t n);

typedef struct {
  size_t typeBytes;
  hostAdd_t add;
  hostRound_t round;
} hostType_t;

/* Not inlined: next to the loop over rows the compiler would interchange the loops and lose the vectors. */
#define DEFINE_TYPE(suffix, target, name, type, load, store)                                                 \
  target __attribute__((noinline)) static void add_##name##suffix(                                           \
      float *restrict sums, const void *restrict row, float weight, size_t n) {                              \
    const type *in = row;                                                                                    \
    for (size_t i = 0; i < n; i++) sums[i] += weight * load(in[i]);                                          \
  }                                                                                                          \
  target __attribute__((noinline)) static void round_##name##suffix(void *restrict row,                      \
                                                                    const float *restrict sums, size_t n) {  \
    type *out = row;                                                                                         \
    for (size_t i = 0; i < n; i++) out[i] = store(sums[i]);                                                  \
  }

#define DEFINE_TYPES(suffix, target)                                                                         \
  DEFINE_TYPE(suffix, target, bf16, uint16_t, convert_bf16_float, convert_float_bf16)                        \
  DEFINE_TYPE(suffix, target, f16, uint16_t, convert_f16_float, convert_float_f16)                           \
  DEFINE_TYPE(suffix, target, f32, float, , )                                                                \
  static const hostType_t types##suffix[] = {                                                                \
      [ULTRAEP_BFLOAT16] = {sizeof(uint16_t), add_bf16##suffix, round_bf16##suffix},                         \
      [ULTRAEP_FLOAT16] = {sizeof(uint16_t), add_f16##suffix, round_f16##suffix},                            \
      [ULTRAEP_FLOAT32] = {sizeof(float), add_f32##suffix, round_f32##suffix}}

DEFINE_TYPES(_base, );
#if defined(__x86_64__)
DEFINE_TYPES(_avx2, __attribute__((target("avx2"))));
static const hostType_t *types_choose(void) {
  return __builtin_cpu_supports("avx2") ? types_avx2 : types_base;
}
#else
static const hostType_t *types_choose(void) {
  return types_base;
}
#endif

/* Rows lie far apart, so the hardware does not see the next one coming. */
static void row_prefetch(const unsigned char *row, size_t bytes) {
  for (size_t i = 0; i < bytes; i += CACHE_LINE) __builtin_prefetch(row + i);
}

static void sum_rows(const hostType_t *type, void *dst, const void *const *rows, const float *weights,
                     int nRows, size_t nElements) {
  float sums[BLOCK];
  for (size_t first = 0; first < nElements; first += BLOCK) {
    size_t n = nElements - first < BLOCK ? nElements - first : BLOCK;
    size_t at = first * type->typeBytes, bytes = n * type->typeBytes;
    memset(sums, 0, n * sizeof(*sums)); /* +0 */
    for (int k = 0; k < nRows; k++) {
      if (k + 1 < nRows) row_prefetch((const unsigned char *)rows[k + 1] + at, bytes);
      type->add(sums, (const unsigned char *)rows[k] + at, weights[k], n);
    }
    type->round((unsigned char *)dst + at, sums, n);
  }
}

void host_sum_rows(void *dst, const void *const *rows, const float *weights, int nRows, size_t nElements,
                   int32_t dataType) {
  sum_rows(&types_choose()[dataType], dst, rows, weights, nRows, nElements);
}

void host_sum_rows_baseline(void *dst, const void *const *rows, const float *weights, int nRows,
                            size_t nElements, int32_t dataType) {
  sum_rows(&types_base[dataType], dst, rows, weights, nRows, nElements);
}
