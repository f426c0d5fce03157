/* The reference of ultraep_moe, its values and its uniform traffic, alone. */
#include "moe.h"
#include "moe_values.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* A rank as far as the reference looks at it. */
typedef struct {
  moeOptions_t options;
  benchRank_t base;
  moeRun_t run;
  moeRank_t rank;
} fixture_t;

static void fixture_open(fixture_t *fixture, int32_t hidden, int32_t inter, int64_t rows) {
  memset(fixture, 0, sizeof(*fixture));
  fixture->options.bench.hidden = hidden;
  fixture->options.inter = inter;
  fixture->run.options = &fixture->options;
  fixture->base.run = &fixture->run.base;
  fixture->rank.base = &fixture->base;
  fixture->rank.ownRows = rows;
  assert_int_equal(moeHostOps.open(&fixture->rank), 0);
}

static void fixture_close(fixture_t *fixture) {
  moeHostOps.close(&fixture->rank);
}

static uint16_t *values_make(fixture_t *fixture, int64_t count, uint64_t seed) {
  uint16_t *values = calloc((size_t)count, sizeof(*values));
  assert_non_null(values);
  assert_int_equal(moeHostOps.valuesFill(&fixture->rank, values, count, seed, 1.0f), 0);
  return values;
}

/* ---- values ---- */

static void bfloat_test(void **state) {
  (void)state;
  /* Ties go to the even neighbour, all else to the nearest. */
  assert_int_equal(moeBfloat(1.0f), 0x3f80);
  assert_int_equal(moeBfloat(1.0f + 1.0f / 256), 0x3f80);
  assert_int_equal(moeBfloat(1.0f + 3.0f / 256), 0x3f82);
  assert_int_equal(moeBfloat(1.0f + 1.0f / 256 + 1.0f / 65536), 0x3f81);
  assert_int_equal(moeBfloat(-2.0f), 0xc000);
  for (uint32_t bits = 0; bits < 0x7f80; bits++) assert_int_equal(moeBfloat(moeFloat((uint16_t)bits)), bits);
}

static void values_test(void **state) {
  (void)state;
  double sum = 0, squares = 0;
  enum { COUNT = 100000 };
  for (uint64_t i = 0; i < COUNT; i++) {
    float value = moeValue(7, i);
    assert_true(value >= -1 && value < 1);
    sum += value;
    squares += (double)value * (double)value;
  }
  assert_true(fabs(sum / COUNT) < 0.01);
  assert_true(fabs(squares / COUNT - 1.0 / 3) < 0.01);
  assert_true(moeValue(7, 1) != moeValue(8, 1));
}

/* ---- products ---- */

static double product_element(const moeGemm_t *gemm, int64_t m, int64_t n) {
  double sum = 0;
  for (int64_t k = 0; k < gemm->k; k++) {
    uint16_t a = gemm->a[gemm->aTransposed ? k * gemm->m + m : m * gemm->k + k];
    uint16_t b = gemm->b[gemm->bTransposed ? n * gemm->k + k : k * gemm->n + n];
    sum += (double)moeFloat(a) * (double)moeFloat(b);
  }
  return sum;
}

static void product_check(fixture_t *fixture, int64_t m, int64_t n, int64_t k, bool aTransposed,
                          bool bTransposed) {
  uint16_t *a = values_make(fixture, m * k, 1), *b = values_make(fixture, k * n, 2);
  static uint16_t rounded[4096];
  static float sums[4096];
  assert_true(m * n <= 4096);
  for (int64_t i = 0; i < m * n; i++) sums[i] = (float)(i % 7);
  moeGemm_t gemms[] = {{m, n, k, a, b, aTransposed, bTransposed, rounded, false, false},
                       {m, n, k, a, b, aTransposed, bTransposed, sums, true, true}};
  assert_int_equal(moeHostOps.gemms(&fixture->rank, gemms, 2), 0);
  for (int64_t i = 0; i < m * n; i++) {
    double wanted = product_element(&gemms[0], i / n, i % n);
    assert_true(fabs((double)sums[i] - wanted - (double)(i % 7)) < 1e-5 * (double)(k + 8));
    assert_true(fabs((double)moeFloat(rounded[i]) - wanted) < fabs(wanted) / 256 + 1e-5 * (double)k);
  }
  free(a);
  free(b);
}

static void products_test(void **state) {
  (void)state;
  fixture_t fixture;
  fixture_open(&fixture, 160, 96, 200);
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 64, 5}, {5, 65, 160}, {17, 130, 33}, {2, 7, 200}};
  for (size_t s = 0; s < sizeof(shapes) / sizeof(shapes[0]); s++) {
    for (int how = 0; how < 4; how++)
      product_check(&fixture, shapes[s][0], shapes[s][1], shapes[s][2], how & 1, how >> 1);
  }
  fixture_close(&fixture);
}

/* A row's result is the same to the bit alone, among others, and anywhere among them. */
static void rows_alike_test(void **state) {
  (void)state;
  enum { M = 23, N = 71, K = 96 };
  fixture_t fixture;
  fixture_open(&fixture, 96, 48, M);
  uint16_t *a = values_make(&fixture, M * K, 3), *b = values_make(&fixture, K * N, 4), all[M * N], one[N];
  moeGemm_t whole = {.m = M, .n = N, .k = K, .a = a, .b = b, .bTransposed = true, .c = all};
  assert_int_equal(moeHostOps.gemms(&fixture.rank, &whole, 1), 0);
  for (int m = 0; m < M; m++) {
    moeGemm_t single = {.m = 1, .n = N, .k = K, .a = a + m * K, .b = b, .bTransposed = true, .c = one};
    assert_int_equal(moeHostOps.gemms(&fixture.rank, &single, 1), 0);
    assert_memory_equal(one, all + m * N, sizeof(one));
  }
  free(a);
  free(b);
  fixture_close(&fixture);
}

/* ---- SwiGLU ---- */

static double swiglu_value(double gate, double up) {
  return gate / (1 + exp(-gate)) * up;
}

static void swiglu_test(void **state) {
  (void)state;
  enum { ROWS = 5, INTER = 32 };
  fixture_t fixture;
  fixture_open(&fixture, 32, INTER, ROWS);
  uint16_t *gateUp = values_make(&fixture, ROWS * 2 * INTER, 5),
           *grads = values_make(&fixture, ROWS * INTER, 6);
  uint16_t back[ROWS * 2 * INTER], act[ROWS * INTER];
  memcpy(back, gateUp, sizeof(back));
  assert_int_equal(moeHostOps.swiglu(&fixture.rank, gateUp, act, ROWS), 0);
  assert_int_equal(moeHostOps.swigluBack(&fixture.rank, back, grads, ROWS), 0);
  for (int i = 0; i < ROWS * INTER; i++) {
    int at = i / INTER * 2 * INTER + i % INTER;
    double gate = moeFloat(gateUp[at]), up = moeFloat(gateUp[at + INTER]), grad = moeFloat(grads[i]),
           step = 1e-5;
    double byGate = (swiglu_value(gate + step, up) - swiglu_value(gate - step, up)) / (2 * step) * grad;
    double byUp = swiglu_value(gate, 1) * grad;
    assert_true(fabs((double)moeFloat(act[i]) - swiglu_value(gate, up)) < 0.005);
    assert_true(fabs((double)moeFloat(back[at]) - byGate) < 0.005);
    assert_true(fabs((double)moeFloat(back[at + INTER]) - byUp) < 0.005);
  }
  free(gateUp);
  free(grads);
  fixture_close(&fixture);
}

static void scale_test(void **state) {
  (void)state;
  enum { ROWS = 3, HIDDEN = 16 };
  fixture_t fixture;
  fixture_open(&fixture, HIDDEN, 16, ROWS);
  uint16_t *rows = values_make(&fixture, ROWS * HIDDEN, 8), *before = values_make(&fixture, ROWS * HIDDEN, 8);
  const float weights[ROWS] = {0.5f, 0, -2};
  assert_int_equal(moeHostOps.rowsScale(&fixture.rank, rows, weights, ROWS), 0);
  for (int i = 0; i < ROWS * HIDDEN; i++)
    assert_true(moeFloat(rows[i]) == moeFloat(before[i]) * weights[i / HIDDEN]);
  free(rows);
  free(before);
  fixture_close(&fixture);
}

/* ---- uniform traffic ---- */

static void uniform_check(int32_t nRanks, int32_t nExperts, int32_t topK, int32_t tokens, double ratio,
                          workloadIdeal_t ideal) {
  perfError_t error;
  zipf_t *zipf = NULL;
  workload_t skewed, even;
  int64_t loads[64] = {0}, least = INT64_MAX, most = 0;
  assert_int_equal(zipfCreate(&zipf, nRanks, nExperts, topK, ratio, &error), 0);
  assert_int_equal(workloadZipf(&skewed, zipf, nRanks, nExperts, topK, tokens, 1, 0, &error), 0);
  for (int32_t r = 0; r < nRanks && tokens > 0; r++) skewed.topk[r][r % topK] = -1;
  assert_int_equal(workloadUniform(&even, &skewed, ideal, 9, &error), 0);
  for (int32_t r = 0; r < nRanks; r++) {
    assert_int_equal(even.nTokens[r], tokens);
    for (int32_t i = 0; i < tokens * topK; i++) {
      assert_int_equal(even.topk[r][i] < 0, skewed.topk[r][i] < 0);
      assert_true(even.topk[r][i] < nExperts);
      if (even.topk[r][i] >= 0) loads[even.topk[r][i]]++;
    }
  }
  for (int32_t e = 0; e < nExperts; e++) {
    if (loads[e] < least) least = loads[e];
    if (loads[e] > most) most = loads[e];
  }
  if (ideal == WORKLOAD_IDEAL_EVEN)
    assert_true(most - least <= 1);
  else if (tokens >= 200) /* chance: each within 30 % of the mean */
    assert_true(most - least > 1 && 10 * most * nExperts < (int64_t)13 * tokens * nRanks * topK);
  assert_false(even.repeats);
  assert_int_equal(even.maxTokens, skewed.maxTokens);
  workloadFree(&skewed);
  workloadFree(&even);
  zipfDestroy(zipf);
}

static void uniform_test(void **state) {
  (void)state;
  for (int ideal = 0; ideal < 2; ideal++) {
    uniform_check(4, 16, 3, 50, 2, (workloadIdeal_t)ideal);
    uniform_check(4, 16, 8, 33, 1.3, (workloadIdeal_t)ideal);
    uniform_check(2, 8, 8, 20, 1, (workloadIdeal_t)ideal);
    uniform_check(8, 64, 5, 7, 4, (workloadIdeal_t)ideal);
    uniform_check(4, 16, 4, 500, 2, (workloadIdeal_t)ideal);
    uniform_check(1, 4, 2, 0, 1, (workloadIdeal_t)ideal);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(bfloat_test),   cmocka_unit_test(values_test),
                                     cmocka_unit_test(products_test), cmocka_unit_test(rows_alike_test),
                                     cmocka_unit_test(swiglu_test),   cmocka_unit_test(scale_test),
                                     cmocka_unit_test(uniform_test)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
