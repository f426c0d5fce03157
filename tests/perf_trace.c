/* The tools' inputs: trace readers and the mapping onto ranks, the zipf family, and tokens made from loads.
 */
#include "trace.h"
#include "workload.h"
#include "zipf.h"

#include "ultraep_balancer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void assert_near(double value, double wanted, double slack) {
  if (!(value >= wanted - slack && value <= wanted + slack))
    fail_msg("%g is not %g +- %g", value, wanted, slack);
}

/* ---- load traces ---- */

static FILE *stream_of(const char *text) {
  FILE *stream = tmpfile();
  assert_non_null(stream);
  assert_int_equal(fwrite(text, 1, strlen(text), stream), strlen(text));
  rewind(stream);
  return stream;
}

static void assert_load_trace_fails(const char *text, const char *message) {
  loadTrace_t *trace = NULL;
  loadRecord_t record;
  perfError_t error = {""};
  int status = loadTraceOpenStream(&trace, stream_of(text), "t.csv", &error);
  if (status == 0) {
    while ((status = loadTraceNext(trace, &record, &error)) > 0) {
    }
    loadTraceClose(trace);
  }
  assert_int_equal(status, -1);
  if (strstr(error.text, message) == NULL) fail_msg("'%s' is not in '%s'", message, error.text);
}

static void test_load_trace_reads(void **state) {
  (void)state;
  static const char text[] = "step,layer,microbatch,src,e0,e1,e2,e3\r\n"
                             "7,1,0,1,5,6,7,8\r\n"
                             "7,1,0,0,1,2,3,4\r\n"
                             "\n"
                             "7,1,1,-1,9223372036854775807,0,0,0\n"
                             "7,-2,1,-1,0,0,0,0";
  loadTrace_t *trace = NULL;
  loadRecord_t record;
  perfError_t error;
  assert_int_equal(loadTraceOpenStream(&trace, stream_of(text), "t.csv", &error), 0);

  assert_int_equal(loadTraceNext(trace, &record, &error), 1);
  assert_int_equal(record.nSources, 2);
  assert_int_equal(record.nExperts, 4);
  assert_int_equal(record.line, 2);
  for (int64_t i = 0; i < 8; i++) assert_int_equal(record.counts[i], i + 1);

  assert_int_equal(loadTraceNext(trace, &record, &error), 1);
  assert_int_equal(record.nSources, 0);
  assert_int_equal(record.microbatch, 1);
  assert_int_equal(record.line, 5);
  assert_true(record.counts[0] == INT64_MAX);

  assert_int_equal(loadTraceNext(trace, &record, &error), 1);
  assert_int_equal(record.layer, -2);
  assert_int_equal(loadTraceNext(trace, &record, &error), 0);
  assert_int_equal(loadTraceNext(trace, &record, &error), 0);
  loadTraceClose(trace);
}

#define HEAD "step,layer,microbatch,src,e0,e1\n"

static void test_load_trace_refuses(void **state) {
  (void)state;
  assert_load_trace_fails("", "t.csv:1:1: empty file");
  assert_load_trace_fails("\n\n", "empty file");
  assert_load_trace_fails("step,layer,src\n", "t.csv:1:12: header column 3 is 'src', expected 'microbatch'");
  assert_load_trace_fails("step,layer,microbatch,src\n", "names no expert");
  assert_load_trace_fails("step,layer,microbatch,src,e0,e2\n",
                          "t.csv:1:30: header column 6 is 'e2', expected 'e1'");
  assert_load_trace_fails(HEAD "1,2,3,0,4\n", "t.csv:2:9: the row ends after 5 of 6 columns");
  assert_load_trace_fails(HEAD "1,2,3,0,4,5,6\n", "more than 6 columns");
  assert_load_trace_fails(HEAD "1,2,3,0,4,5,\n", "more than 6 columns");
  assert_load_trace_fails(HEAD "1,2,3,0,4,-5\n", "t.csv:2:11: count -5 is outside");
  assert_load_trace_fails(HEAD "1,2,3,0,4,x5\n", "t.csv:2:11: 'x5' is not a whole number");
  assert_load_trace_fails(HEAD "1,2,3,0,4,5x\n", "'5x' is not a whole number");
  assert_load_trace_fails(HEAD "1,2,3,0,,5\n", "t.csv:2:9: empty cell");
  assert_load_trace_fails(HEAD "1,2,3,0,4,5.5\n", "t.csv:2:12: unexpected character '.'");
  assert_load_trace_fails(HEAD "1,2,3,0,4, 5\n", "unexpected character ' '");
  assert_load_trace_fails(HEAD "1,2,3,0,4,\xff\n", "unexpected byte 0xff");
  assert_load_trace_fails(HEAD "1,2,3,0,4,9223372036854775808\n", "outside");
  assert_load_trace_fails(HEAD "1,2,3,-1,9223372036854775807,1\n", "more than 2^63-1");
  assert_load_trace_fails(HEAD "1,2,3,0,4,00000000000000000000000000000000005\n", "32 characters or more");
  assert_load_trace_fails(HEAD "1,2,3,-2,4,5\n", "src -2 is outside -1..1023");
  assert_load_trace_fails(HEAD "1,2,3,1024,4,5\n", "src 1024 is outside");
  assert_load_trace_fails(HEAD "1,2,3,0,4,5\n1,2,3,0,4,5\n", "t.csv:3:1: source 0 occurs twice");
  assert_load_trace_fails(HEAD "1,2,3,0,4,5\n1,2,3,2,4,5\n",
                          "t.csv:2:1: the record (step 1, layer 2, microbatch 3)");
  assert_load_trace_fails(HEAD "1,2,3,1,4,5\n", "none for source 0");
  assert_load_trace_fails(HEAD "1,2,3,-1,4,5\n1,2,3,-1,4,5\n", "t.csv:3:1: a record with src -1 has one row");
  assert_load_trace_fails(HEAD "1,2,3,0,4,5\n1,2,3,-1,4,5\n", "src -1 in a record");
}

static void test_load_trace_refuses_wide_header(void **state) {
  (void)state;
  size_t room = 64 + 8 * (ULTRAEP_MAX_EXPERTS + 1);
  char *text = malloc(room);
  assert_non_null(text);
  size_t used = (size_t)snprintf(text, room, "step,layer,microbatch,src");
  for (int e = 0; e <= ULTRAEP_MAX_EXPERTS; e++)
    used += (size_t)snprintf(text + used, room - used, ",e%d", e);
  assert_load_trace_fails(text, "more than 4096 experts");
  free(text);
}

static void test_load_trace_refuses_files(void **state) {
  (void)state;
  loadTrace_t *trace = NULL;
  perfError_t error;
  assert_int_equal(loadTraceOpen(&trace, "/nonexistent/trace.csv", &error), -1);
  assert_non_null(strstr(error.text, "/nonexistent/trace.csv: cannot be opened"));
  assert_int_equal(loadTraceOpen(&trace, "/", &error), -1);
  assert_non_null(strstr(error.text, "cannot be read"));
  assert_null(trace);
}

/* ---- records on ranks ---- */

/* The mapping, said again in the plainest way: source by source into 64-bit sums. */
static void map_plainly(const loadRecord_t *record, int32_t nRanks, int64_t *loads) {
  int32_t nExperts = record->nExperts, n = record->nSources;
  memset(loads, 0, (size_t)nRanks * (size_t)nExperts * sizeof(loads[0]));
  for (int32_t s = 0; s < (n == 0 ? 1 : n); s++) {
    int32_t first = n == 0 ? 0 : s * nRanks / n, ranks = n == 0 ? nRanks : n >= nRanks ? 1 : nRanks / n;
    for (int32_t e = 0; e < nExperts; e++) {
      int64_t count = record->counts[s * nExperts + e];
      for (int32_t i = 0; i < ranks; i++) {
        loads[(first + i) * nExperts + e] += count / ranks + (i < count % ranks ? 1 : 0);
      }
    }
  }
}

static void test_record_maps(void **state) {
  (void)state;
  enum { EXPERTS = 48, MOST = 48 };
  static const struct {
    int32_t nSources, nRanks;
  } shapes[] = {{1, 1},  {1, 8},  {16, 16}, {16, 8}, {16, 4}, {16, 1},
                {4, 16}, {2, 48}, {0, 1},   {0, 16}, {0, 48}, {6, 4}};
  static int64_t counts[MOST * EXPERTS], expected[MOST * EXPERTS];
  static int32_t loads[MOST * EXPERTS];
  perfRandom_t random;
  perfRandomSeed(&random, 5, 0, 0);
  for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
    for (int j = 0; j < MOST * EXPERTS; j++) counts[j] = (int64_t)perfRandomBelow(&random, 1000);
    loadRecord_t record = {.nSources = shapes[i].nSources, .nExperts = EXPERTS, .counts = counts};
    perfError_t error;
    assert_int_equal(loadRecordMap(&record, shapes[i].nRanks, loads, &error), 0);
    map_plainly(&record, shapes[i].nRanks, expected);
    for (int32_t j = 0; j < shapes[i].nRanks * EXPERTS; j++) assert_int_equal(loads[j], expected[j]);
  }
}

/* Where n does not divide R the ranks are still shared out whole: nothing is lost. */
static void test_record_maps_uneven(void **state) {
  (void)state;
  int64_t counts[3 * 8];
  int32_t loads[8 * 8];
  for (int j = 0; j < 24; j++) counts[j] = 7 * j + 1;
  loadRecord_t record = {.nSources = 3, .nExperts = 8, .counts = counts};
  perfError_t error;
  assert_int_equal(loadRecordMap(&record, 8, loads, &error), 0);
  for (int e = 0; e < 8; e++) {
    int64_t wanted = 0, got = 0;
    for (int s = 0; s < 3; s++) wanted += counts[s * 8 + e];
    for (int r = 0; r < 8; r++) got += loads[r * 8 + e];
    assert_int_equal(got, wanted);
  }
}

static void test_record_map_refuses(void **state) {
  (void)state;
  int64_t counts[2 * 4] = {INT32_MAX, 0, 0, 0, 1, 0, 0, 0};
  int32_t loads[4 * 4];
  perfError_t error;
  loadRecord_t record = {.step = 9, .nSources = 2, .nExperts = 4, .counts = counts, .line = 3};
  assert_int_equal(loadRecordMap(&record, 2, loads, &error), 0);
  assert_int_equal(loadRecordMap(&record, 1, loads, &error), -1);
  assert_non_null(strstr(error.text, "line 3 (step 9"));
  assert_non_null(strstr(error.text, "2^31-1"));
  counts[1] = 1; /* each count fits, the row's sum does not */
  assert_int_equal(loadRecordMap(&record, 2, loads, &error), -1);
  counts[0] = counts[4] = INT64_MAX; /* the sum over sources overflows 64 bits */
  assert_int_equal(loadRecordMap(&record, 1, loads, &error), -1);
  assert_int_equal(loadRecordMap(&record, 3, loads, &error), -1);
  assert_non_null(strstr(error.text, "no multiple of 3 ranks"));
  assert_int_equal(loadRecordMap(&record, 0, loads, &error), -1);
  assert_int_equal(loadRecordMap(&record, 1025, loads, &error), -1);
}

/* ---- routing traces ---- */

static void assert_routing_fails(const char *text, int32_t nExperts, const char *message) {
  routingTrace_t routing;
  perfError_t error = {""};
  assert_int_equal(routingTraceReadStream(&routing, stream_of(text), "r.csv", nExperts, &error), -1);
  if (strstr(error.text, message) == NULL) fail_msg("'%s' is not in '%s'", message, error.text);
}

static void test_routing_reads(void **state) {
  (void)state;
  routingTrace_t routing;
  perfError_t error;
  assert_int_equal(
      routingTraceReadStream(&routing, stream_of("token,k0,k1\n0,3,-1\n1,0,9\n"), "r.csv", 10, &error), 0);
  static const int32_t experts[] = {3, -1, 0, 9};
  assert_int_equal(routing.nTokens, 2);
  assert_int_equal(routing.topK, 2);
  assert_int_equal(routing.maxExpert, 9);
  assert_memory_equal(routing.experts, experts, sizeof(experts));
  routingTraceFree(&routing);
}

static void test_routing_refuses(void **state) {
  (void)state;
  assert_routing_fails("", 0, "empty file");
  assert_routing_fails("token\n", 0, "names no expert column");
  assert_routing_fails("token,k1\n", 0, "r.csv:1:7: header column 2 is 'k1', expected 'k0'");
  assert_routing_fails("token,k0\n", 0, "no tokens");
  assert_routing_fails("token,k0,k1\n0,1\n", 0, "r.csv:2:3: the row ends after 2 of 3 columns");
  assert_routing_fails("token,k0\n0,1,2\n", 0, "more than 2 columns");
  assert_routing_fails("token,k0\n0,4\n", 4, "expert 4 is outside -1..3");
  assert_routing_fails("token,k0\n0,4096\n", 0, "expert 4096 is outside -1..4095");
  assert_routing_fails("token,k0\n-1,1\n", 0, "token -1 is outside");
  char text[512] = "token";
  for (int k = 0; k <= ULTRAEP_MAX_TOPK; k++)
    snprintf(text + strlen(text), sizeof(text) - strlen(text), ",k%d", k);
  text[strlen(text)] = '\n';
  assert_routing_fails(text, 0, "more than 32 experts");
}

/* ---- zipf ---- */

static double zipf_imbalance(int32_t nRanks, int32_t nExperts, int32_t topK, int32_t tokens, double ratio) {
  zipf_t *zipf = NULL;
  perfError_t error;
  assert_int_equal(zipfCreate(&zipf, nRanks, nExperts, topK, ratio, &error), 0);
  static int32_t loads[64 * 256];
  int64_t ranks[64] = {0};
  assert_true(nRanks <= 64 && nExperts <= 256);
  zipfLoads(zipf, 11, 0, tokens, loads);
  for (int32_t r = 0; r < nRanks; r++) {
    int64_t sent = 0;
    for (int32_t e = 0; e < nExperts; e++) {
      ranks[e / (nExperts / nRanks)] += loads[r * nExperts + e];
      sent += loads[r * nExperts + e];
      assert_true(loads[r * nExperts + e] <= tokens); /* no token meets an expert twice */
    }
    assert_int_equal(sent, (int64_t)tokens * topK);
  }
  double imbalance = perfImbalance(ranks, nRanks);
  zipfDestroy(zipf);
  return imbalance;
}

static void test_zipf_meets_ratio(void **state) {
  (void)state;
  /* Fixed seed: these are numbers, not chances. */
  assert_near(zipf_imbalance(64, 256, 8, 4096, 2.0), 2.0, 0.02);
  assert_near(zipf_imbalance(64, 256, 8, 4096, 8.0), 8.0, 0.08);
  assert_near(zipf_imbalance(64, 128, 8, 4096, 4.0), 4.0, 0.05);
  assert_near(zipf_imbalance(8, 64, 8, 4096, 4.0), 4.0, 0.04);
  assert_near(zipf_imbalance(4, 4, 4, 100, 1.0), 1.0, 0);
  assert_near(zipf_imbalance(1, 8, 2, 100, 1.0), 1.0, 0);
}

static void test_zipf_refuses(void **state) {
  (void)state;
  zipf_t *zipf = NULL;
  perfError_t error;
  assert_int_equal(zipfCreate(&zipf, 64, 256, 8, 33, &error), -1);
  assert_non_null(strstr(error.text, "outside 1..32"));
  assert_int_equal(zipfCreate(&zipf, 64, 256, 8, 0.5, &error), -1);
  assert_int_equal(zipfCreate(&zipf, 64, 100, 8, 2, &error), -1);
  assert_int_equal(zipfCreate(&zipf, 4, 4, 5, 2, &error), -1);
  assert_int_equal(zipfCreate(&zipf, 0, 4, 2, 2, &error), -1);
  assert_null(zipf);
}

/* Tokens on their own: experts in range and different, the same for the same seed, and by weight: with one
 * expert a token, the shares follow the weights. */
static void test_zipf_tokens(void **state) {
  (void)state;
  enum { RANKS = 4, EXPERTS = 8, DRAWS = 200000 };
  zipf_t *zipf = NULL;
  perfError_t error;
  perfRandom_t random, again;
  int32_t experts[8], repeated[8];
  assert_int_equal(zipfCreate(&zipf, RANKS, EXPERTS, 8, 1, &error), 0);
  perfRandomSeed(&random, 3, 1, 2);
  perfRandomSeed(&again, 3, 1, 2);
  for (int i = 0; i < 1000; i++) {
    unsigned seen = 0;
    zipfToken(zipf, &random, experts);
    zipfToken(zipf, &again, repeated);
    assert_memory_equal(experts, repeated, sizeof(experts));
    for (int k = 0; k < 8; k++) seen |= 1u << experts[k];
    assert_int_equal(seen, 0xff);
  }
  zipfDestroy(zipf);
  assert_int_equal(zipfCreate(&zipf, RANKS, EXPERTS, 1, 2, &error), 0);
  int64_t counts[EXPERTS] = {0};
  for (int i = 0; i < DRAWS; i++) {
    zipfToken(zipf, &random, experts);
    counts[experts[0]]++;
  }
  for (int r = 0; r < RANKS; r++) {
    /* local weights 1 and 2^-4 */
    assert_near((double)counts[2 * r] / (double)counts[2 * r + 1], 16.0, 1.6);
  }
  zipfDestroy(zipf);
}

/* ---- tokens of loads ---- */

static void assert_workload_loads(const workload_t *workload, const int32_t *loads) {
  int64_t *counts = calloc((size_t)workload->nExperts, sizeof(counts[0]));
  assert_non_null(counts);
  for (int32_t r = 0; r < workload->nRanks; r++) {
    memset(counts, 0, (size_t)workload->nExperts * sizeof(counts[0]));
    for (int32_t i = 0; i < workload->nTokens[r] * workload->topK; i++) {
      if (workload->topk[r][i] >= 0) counts[workload->topk[r][i]]++;
    }
    for (int32_t e = 0; e < workload->nExperts; e++)
      assert_int_equal(counts[e], loads[r * workload->nExperts + e]);
  }
  free(counts);
}

static void test_workload_record_exact(void **state) {
  (void)state;
  enum { RANKS = 4, EXPERTS = 16, TOPK = 3 };
  int32_t loads[RANKS * EXPERTS];
  perfRandom_t random;
  perfError_t error;
  workload_t workload;
  perfRandomSeed(&random, 8, 0, 0);
  for (int j = 0; j < RANKS * EXPERTS; j++) loads[j] = (int32_t)perfRandomBelow(&random, 30);
  for (int e = 0; e < EXPERTS; e++) loads[2 * EXPERTS + e] = 0; /* a rank that sends nothing */
  assert_int_equal(workloadRecord(&workload, RANKS, EXPERTS, TOPK, loads, -1, 1, &error), 0);
  assert_workload_loads(&workload, loads);
  assert_int_equal(workload.nTokens[2], 0);
  assert_false(workload.repeats);
  workloadFree(&workload);
  /* One expert with more assignments than there are tokens must repeat. */
  loads[0] = 1000;
  assert_int_equal(workloadRecord(&workload, RANKS, EXPERTS, TOPK, loads, -1, 1, &error), 0);
  assert_workload_loads(&workload, loads);
  assert_true(workload.repeats);
  workloadFree(&workload);
}

static void test_workload_record_scaled(void **state) {
  (void)state;
  enum { RANKS = 16, EXPERTS = 64, TOPK = 8, TOKENS = 50 };
  static int32_t loads[RANKS * EXPERTS];
  perfRandom_t random;
  perfError_t error;
  workload_t workload;
  int64_t totals[EXPERTS] = {0}, got[EXPERTS] = {0}, sum = 0;
  perfRandomSeed(&random, 9, 0, 0);
  for (int e = 0; e < EXPERTS; e++) {
    int32_t count = (int32_t)perfRandomBelow(&random, 100000);
    for (int r = 0; r < RANKS; r++) loads[r * EXPERTS + e] = count;
    totals[e] = (int64_t)RANKS * count;
    sum += totals[e];
  }
  assert_int_equal(workloadRecord(&workload, RANKS, EXPERTS, TOPK, loads, TOKENS, 1, &error), 0);
  assert_int_equal(workload.assignments, RANKS * TOKENS * TOPK);
  for (int r = 0; r < RANKS; r++) {
    assert_int_equal(workload.nTokens[r], TOKENS);
    for (int i = 0; i < TOKENS * TOPK; i++) got[workload.topk[r][i]]++;
  }
  for (int e = 0; e < EXPERTS; e++) {
    double exact = (double)totals[e] * RANKS * TOKENS * TOPK / (double)sum;
    assert_true((double)got[e] > exact - 1.5 && (double)got[e] < exact + 1.5);
  }
  workloadFree(&workload);
  /* Nothing to scale, and nothing wanted. */
  memset(loads, 0, sizeof(loads));
  assert_int_equal(workloadRecord(&workload, RANKS, EXPERTS, TOPK, loads, TOKENS, 1, &error), 0);
  assert_int_equal(workload.assignments, 0);
  workloadFree(&workload);
  loads[0] = 5;
  assert_int_equal(workloadRecord(&workload, RANKS, EXPERTS, TOPK, loads, 0, 1, &error), 0);
  assert_int_equal(workload.assignments, 0);
  workloadFree(&workload);
}

static void test_workload_routing(void **state) {
  (void)state;
  int32_t experts[] = {0, 1, 2, 3, 4, 5, 6, 7, 0, 2};
  routingTrace_t routing = {.topK = 2, .nTokens = 5, .maxExpert = 7, .experts = experts};
  workload_t workload;
  perfError_t error;
  assert_int_equal(workloadRouting(&workload, &routing, 2, 8, -1, &error), 0);
  assert_int_equal(workload.nTokens[0], 3);
  assert_int_equal(workload.nTokens[1], 2);
  assert_memory_equal(workload.topk[1], experts + 6, 4 * sizeof(int32_t));
  workloadFree(&workload);
  assert_int_equal(workloadRouting(&workload, &routing, 2, 8, 4, &error), 0);
  assert_int_equal(workload.nTokens[1], 4);
  assert_memory_equal(workload.topk[1], experts + 8, 2 * sizeof(int32_t));
  assert_memory_equal(workload.topk[1] + 2, experts, 6 * sizeof(int32_t));
  assert_int_equal(workload.maxSend, 8);
  workloadFree(&workload);
  assert_int_equal(workloadRouting(&workload, &routing, 2, 6, -1, &error), -1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_load_trace_reads),
      cmocka_unit_test(test_load_trace_refuses),
      cmocka_unit_test(test_load_trace_refuses_wide_header),
      cmocka_unit_test(test_load_trace_refuses_files),
      cmocka_unit_test(test_record_maps),
      cmocka_unit_test(test_record_maps_uneven),
      cmocka_unit_test(test_record_map_refuses),
      cmocka_unit_test(test_routing_reads),
      cmocka_unit_test(test_routing_refuses),
      cmocka_unit_test(test_zipf_meets_ratio),
      cmocka_unit_test(test_zipf_refuses),
      cmocka_unit_test(test_zipf_tokens),
      cmocka_unit_test(test_workload_record_exact),
      cmocka_unit_test(test_workload_record_scaled),
      cmocka_unit_test(test_workload_routing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
