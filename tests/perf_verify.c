/* ultraep_perf's check: it passes a right exchange, and each kind of wrong one fails. The exchange here is
 * made by hand, from the routing alone. */
#include "ultraep.h"
#include "verify.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum {
  RANKS = 2,
  EXPERTS = 4,
  TOPK = 3,
  SLOTS = 1,
  TOKENS = 6,
  HIDDEN = 32,
  ALIGN = 8,
  ROOM = 64,
  SEGMENTS = 3
};

typedef struct {
  verify_t verify;
  verifySource_t sources[RANKS];
  int32_t topk[RANKS][TOKENS * TOPK];
  float weights[RANKS][TOKENS * TOPK];
  atomic_ushort takers[RANKS][TOKENS * TOPK];
  uint8_t *tokens[RANKS], *combined[RANKS];
  /* what ranks got */
  verifyReceived_t received[RANKS];
  int32_t expert[RANKS][SEGMENTS];
  int64_t firstRow[RANKS][SEGMENTS], rows[RANKS][SEGMENTS];
  uint8_t *data[RANKS];
  float scratch[4 * HIDDEN];
} exchange_t;

/* The instance that takes an assignment: expert 0's odd tokens go to its replica on rank 1. */
static int taker_rank(int expert, int token) {
  return expert == 0 ? token % 2 : expert / (EXPERTS / RANKS);
}

static void exchange_dispatch(exchange_t *x) {
  size_t bytes = x->verify.shape.bytes;
  for (int rank = 0; rank < RANKS; rank++) {
    int64_t at = 0;
    memset(x->data[rank], VERIFY_POISON, ROOM * bytes);
    for (int s = 0; s < SEGMENTS; s++) {
      int expert = s < 2 ? 2 * rank + s : rank == 1 ? 0 : -1;
      at = (at + ALIGN - 1) / ALIGN * ALIGN;
      x->expert[rank][s] = expert;
      x->firstRow[rank][s] = at;
      for (int source = 0; source < RANKS; source++) {
        for (int i = 0; i < TOKENS * TOPK; i++) {
          int token = i / TOPK;
          if (expert < 0 || x->topk[source][i] != expert || taker_rank(expert, token) != rank) continue;
          memcpy(x->data[rank] + (size_t)at++ * bytes, x->tokens[source] + (size_t)token * bytes, bytes);
        }
      }
      x->rows[rank][s] = at - x->firstRow[rank][s];
    }
    x->received[rank] = (verifyReceived_t){.nSegments = SEGMENTS,
                                           .expert = x->expert[rank],
                                           .firstRow = x->firstRow[rank],
                                           .rows = x->rows[rank],
                                           .totalRows = at,
                                           .roomRows = ROOM,
                                           .data = x->data[rank]};
  }
}

/* y = sum over k of w * expert(x), in plain double: exact, as all values are small multiples of 1/256. */
static void exchange_combine(exchange_t *x) {
  for (int source = 0; source < RANKS; source++) {
    for (int token = 0; token < TOKENS; token++) {
      float values[HIDDEN], sums[HIDDEN];
      rowLoad(&x->verify.shape, x->tokens[source] + (size_t)token * x->verify.shape.bytes, values);
      for (int j = 0; j < HIDDEN; j++) {
        double sum = 0;
        for (int k = 0; k < TOPK; k++) {
          int expert = x->topk[source][token * TOPK + k];
          int addend = j % 2 == 0 ? expert % 64 - 32 : expert / 64 - 32;
          if (expert >= 0) sum += (double)x->weights[source][token * TOPK + k] * ((double)values[j] + addend);
        }
        sums[j] = (float)sum;
      }
      rowStore(&x->verify.combineShape, sums,
               x->combined[source] + (size_t)token * x->verify.combineShape.bytes);
    }
  }
}

static int exchange_setup(void **state) {
  /* token 2 of each source has an unused entry, token 5 none but unused ones */
  static const int32_t routed[TOKENS * TOPK] = {0, 1, 2, 3, 2, 0, 1, -1, 3, 0, 2, 1, 2, 3, 0, -1, -1, -1};
  exchange_t *x = calloc(1, sizeof(*x));
  if (x == NULL) return -1;
  x->verify = (verify_t){.nRanks = RANKS,
                         .nExperts = EXPERTS,
                         .topK = TOPK,
                         .nSlots = SLOTS,
                         .nDomainRanks = RANKS,
                         .alignment = ALIGN,
                         .shape = rowShape(ULTRAEP_FLOAT32, HIDDEN),
                         .combineShape = rowShape(ULTRAEP_FLOAT32, HIDDEN),
                         .sources = x->sources};
  verifyInit(&x->verify);
  for (int source = 0; source < RANKS; source++) {
    x->tokens[source] = calloc(TOKENS, x->verify.shape.bytes);
    x->combined[source] = calloc(TOKENS, x->verify.shape.bytes);
    x->data[source] = calloc(ROOM, x->verify.shape.bytes);
    for (int token = 0; token < TOKENS; token++) {
      rowFill(&x->verify.shape, x->tokens[source] + (size_t)token * x->verify.shape.bytes,
              (rowId_t){.rank = source, .token = token, .iteration = 7});
    }
    memcpy(x->topk[source], routed, sizeof(routed));
    for (int i = 0; i < TOKENS * TOPK; i++) x->weights[source][i] = rowWeight(source, i / TOPK, i % TOPK);
    x->sources[source] = (verifySource_t){.nTokens = TOKENS,
                                          .topk = x->topk[source],
                                          .weights = x->weights[source],
                                          .tokens = x->tokens[source],
                                          .takers = x->takers[source]};
  }
  exchange_dispatch(x);
  exchange_combine(x);
  *state = x;
  return 0;
}

static int exchange_teardown(void **state) {
  exchange_t *x = *state;
  for (int rank = 0; rank < RANKS; rank++) {
    free(x->tokens[rank]);
    free(x->combined[rank]);
    free(x->data[rank]);
  }
  verifyDestroy(&x->verify);
  free(x);
  return 0;
}

/* All faults of the dispatch. */
static int64_t dispatch_wrong(exchange_t *x) {
  int64_t wrong = 0;
  for (int rank = 0; rank < RANKS; rank++) verifyForget(&x->verify, rank);
  for (int rank = 0; rank < RANKS; rank++) wrong += verifyRows(&x->verify, rank, &x->received[rank]);
  for (int rank = 0; rank < RANKS; rank++) wrong += verifyTaken(&x->verify, rank);
  return wrong;
}

static int64_t combine_wrong(exchange_t *x) {
  int64_t wrong = 0;
  for (int rank = 0; rank < RANKS; rank++) {
    wrong += verifyCombined(&x->verify, rank, x->combined[rank], x->scratch);
  }
  return wrong;
}

/* Row i of a segment. */
static uint8_t *row_at(exchange_t *x, int rank, int segment, int64_t i) {
  return x->data[rank] + (size_t)(x->firstRow[rank][segment] + i) * x->verify.shape.bytes;
}

static void test_right_passes(void **state) {
  exchange_t *x = *state;
  assert_int_equal(dispatch_wrong(x), 0);
  assert_int_equal(combine_wrong(x), 0);
  assert_string_equal(x->verify.fault.text, "");
}

static void test_changed_byte(void **state) {
  exchange_t *x = *state;
  row_at(x, 0, 1, 2)[HIDDEN * 4 - 3] ^= 1; /* far behind the id: same token, another byte */
  assert_int_equal(dispatch_wrong(x), 2);  /* the row, and the assignment that no right row brought */
  assert_non_null(strstr(x->verify.fault.text, "not the bytes of token"));
}

static void test_poisoned_row(void **state) {
  exchange_t *x = *state;
  memset(row_at(x, 1, 0, 0), VERIFY_POISON, x->verify.shape.bytes);
  assert_int_equal(dispatch_wrong(x), 2);
  assert_non_null(strstr(x->verify.fault.text, "no token's bytes"));
}

static void test_stale_row(void **state) {
  exchange_t *x = *state;
  rowFill(&x->verify.shape, row_at(x, 0, 0, 0), (rowId_t){.rank = 0, .token = 0, .iteration = 6});
  assert_int_equal(dispatch_wrong(x), 2);
}

static void test_rows_swapped(void **state) {
  exchange_t *x = *state;
  uint8_t kept[HIDDEN * 4];
  memcpy(kept, row_at(x, 0, 1, 0), sizeof(kept));
  memcpy(row_at(x, 0, 1, 0), row_at(x, 0, 1, 1), sizeof(kept));
  memcpy(row_at(x, 0, 1, 1), kept, sizeof(kept));
  assert_int_equal(dispatch_wrong(x), 1);
  assert_non_null(strstr(x->verify.fault.text, "out of order"));
}

static void test_sources_swapped(void **state) {
  exchange_t *x = *state;
  int64_t half = x->rows[0][1] / 2;
  for (int64_t i = 0; i < half; i++) {
    uint8_t kept[HIDDEN * 4];
    memcpy(kept, row_at(x, 0, 1, i), sizeof(kept));
    memcpy(row_at(x, 0, 1, i), row_at(x, 0, 1, half + i), sizeof(kept));
    memcpy(row_at(x, 0, 1, half + i), kept, sizeof(kept));
  }
  assert_true(dispatch_wrong(x) >= 1);
}

static void test_row_twice(void **state) {
  exchange_t *x = *state;
  memcpy(row_at(x, 0, 1, 1), row_at(x, 0, 1, 0), x->verify.shape.bytes);
  assert_int_equal(dispatch_wrong(x), 2); /* one came twice, one never */
}

static void test_wrong_expert(void **state) {
  exchange_t *x = *state;
  /* Token 2 is routed to 1 and 3: in expert 2's segment it is wrong. */
  memcpy(row_at(x, 1, 0, 1), x->tokens[0] + 2 * x->verify.shape.bytes, x->verify.shape.bytes);
  assert_int_equal(dispatch_wrong(x), 2);
  assert_non_null(strstr(x->verify.fault.text, "not routed there"));
}

static void test_row_missing(void **state) {
  exchange_t *x = *state;
  memset(row_at(x, 1, 2, x->rows[1][2] - 1), VERIFY_POISON, x->verify.shape.bytes);
  x->rows[1][2]--;
  x->received[1].totalRows--;
  assert_int_equal(dispatch_wrong(x), 1);
  assert_non_null(strstr(x->verify.fault.text, "never reached expert 0"));
}

static void test_padding_written(void **state) {
  exchange_t *x = *state;
  assert_true(x->firstRow[0][1] > x->firstRow[0][0] + x->rows[0][0]);
  row_at(x, 0, 1, -1)[5] = 0;
  assert_int_equal(dispatch_wrong(x), 1);
  assert_non_null(strstr(x->verify.fault.text, "padding"));
}

static void test_end_overrun(void **state) {
  exchange_t *x = *state;
  x->data[0][(size_t)x->received[0].totalRows * x->verify.shape.bytes] = 0;
  assert_int_equal(dispatch_wrong(x), 1);
}

static void test_segments_wrong(void **state) {
  exchange_t *x = *state;
  static const struct {
    int what, value;
  } changes[] = {{0, 3},  {0, 9},    {1, 1}, {1, -4},       {1, ROOM},
                 {2, -1}, {2, ROOM}, {3, 2}, {3, ROOM + 1}, {4, 2}};
  for (size_t i = 0; i < sizeof(changes) / sizeof(changes[0]); i++) {
    exchange_dispatch(x);
    int64_t value = changes[i].value;
    switch (changes[i].what) {
    case 0:
      x->expert[0][0] = (int32_t)value;
      break;
    case 1:
      x->firstRow[1][0] = value;
      break;
    case 2:
      x->rows[1][1] = value;
      break;
    case 3:
      x->received[0].totalRows = value;
      break;
    default:
      x->received[0].nSegments = (int32_t)value;
      break;
    }
    assert_true(dispatch_wrong(x) >= 1);
  }
  /* A replica on its master's own rank, and one from another domain. */
  exchange_dispatch(x);
  x->expert[1][2] = 2;
  assert_true(dispatch_wrong(x) >= 1);
  exchange_dispatch(x);
  x->verify.nDomainRanks = 1;
  assert_true(dispatch_wrong(x) >= 1);
}

static void test_scales_wrong(void **state) {
  exchange_t *x = *state;
  uint8_t sent[RANKS][TOKENS * 4], got[RANKS][ROOM * 4];
  x->verify.scaleBytes = 4;
  for (int rank = 0; rank < RANKS; rank++) {
    for (int token = 0; token < TOKENS; token++) {
      rowScalesFill(sent[rank] + 4 * token, 4, (rowId_t){.rank = rank, .token = token});
    }
    x->sources[rank].scales = sent[rank];
    memset(got[rank], VERIFY_POISON, sizeof(got[rank]));
    x->received[rank].scales = got[rank];
  }
  for (int rank = 0; rank < RANKS; rank++) {
    for (int s = 0; s < SEGMENTS; s++) {
      for (int64_t i = 0; i < x->rows[rank][s]; i++) {
        rowId_t id = rowIdentify(&x->verify.shape, row_at(x, rank, s, i));
        memcpy(got[rank] + 4 * (x->firstRow[rank][s] + i), sent[id.rank] + 4 * id.token, 4);
      }
    }
  }
  assert_int_equal(dispatch_wrong(x), 0);
  got[1][4 * x->firstRow[1][1] + 2] ^= 1;
  assert_int_equal(dispatch_wrong(x), 2);
}

static void test_combined_wrong(void **state) {
  exchange_t *x = *state;
  assert_int_equal(dispatch_wrong(x), 0);
  x->combined[1][3 * HIDDEN * 4 + 8] ^= 1; /* the last bit of one value */
  assert_int_equal(combine_wrong(x), 1);
  assert_non_null(strstr(x->verify.fault.text, "combined token 3 of rank 1"));
  exchange_combine(x);
  memset(x->combined[0] + 5 * HIDDEN * 4, VERIFY_POISON,
         HIDDEN * 4); /* a token without experts must be zeros */
  assert_int_equal(combine_wrong(x), 1);
  exchange_combine(x);
  x->weights[0][0] = 0.5f + rowWeight(0, 0, 0); /* a wrong weight */
  assert_int_equal(combine_wrong(x), 1);
}

/* In bfloat16, a sum made of rounded partial sums differs from the exact one in places, and each passes as
 * what it is and fails as the other. */
static void test_partial_differs(void **state) {
  exchange_t *x = *state;
  assert_int_equal(dispatch_wrong(x), 0); /* tells who took what */
  x->verify.combineShape = rowShape(ULTRAEP_BFLOAT16, HIDDEN);
  exchange_combine(x);
  assert_int_equal(combine_wrong(x), 0);
  x->verify.partial = true;
  assert_true(combine_wrong(x) > 0);
  for (int source = 0; source < RANKS; source++) {
    for (int token = 0; token < TOKENS; token++) {
      float values[HIDDEN], sums[HIDDEN] = {0}, part[HIDDEN];
      uint16_t rounded[HIDDEN];
      rowLoad(&x->verify.shape, x->tokens[source] + (size_t)token * x->verify.shape.bytes, values);
      for (int k = 0; k < TOPK; k++) {
        int expert = x->topk[source][token * TOPK + k], parts = 0;
        int rank = expert < 0 ? -1 : taker_rank(expert, token);
        bool own = rank == source, summed = false; /* rows of the token's own rank are not put together */
        for (int i = 0; i < k && !own; i++) {
          int other = x->topk[source][token * TOPK + i];
          summed = summed || (other >= 0 && taker_rank(other, token) == rank);
        }
        if (rank < 0 || summed) continue;
        memset(part, 0, sizeof(part));
        for (int i = k; i < (own ? k + 1 : TOPK); i++) {
          int other = x->topk[source][token * TOPK + i];
          if (other < 0 || taker_rank(other, token) != rank) continue;
          parts++;
          for (int j = 0; j < HIDDEN; j++) {
            part[j] +=
                x->weights[source][token * TOPK + i] * (values[j] + (float)(j % 2 == 0 ? other - 32 : -32));
          }
        }
        if (parts > 1)
          rowStore(&x->verify.combineShape, part, rounded), rowLoad(&x->verify.combineShape, rounded, part);
        for (int j = 0; j < HIDDEN; j++) sums[j] += part[j];
      }
      rowStore(&x->verify.combineShape, sums,
               x->combined[source] + (size_t)token * x->verify.combineShape.bytes);
    }
  }
  assert_int_equal(combine_wrong(x), 0);
}

/* Every type spells and reads back ids, and rounds as it should. */
static void test_rows(void **state) {
  (void)state;
  static const int32_t types[] = {ULTRAEP_BFLOAT16, ULTRAEP_FLOAT16, ULTRAEP_FLOAT32, ULTRAEP_FLOAT8};
  static const rowId_t ids[] = {{0, 0, 0}, {1, 2, 3}, {1023, (1 << 24) - 1, 0x3fff}, {512, 99999, 0x1000}};
  uint8_t row[4 * HIDDEN];
  for (size_t t = 0; t < 4; t++) {
    rowShape_t shape = rowShape(types[t], HIDDEN);
    for (size_t i = 0; i < 4; i++) {
      rowFill(&shape, row, ids[i]);
      rowId_t read = rowIdentify(&shape, row);
      assert_int_equal(read.rank, ids[i].rank);
      assert_int_equal(read.token, ids[i].token);
      assert_int_equal(read.iteration, ids[i].iteration);
    }
  }
  memset(row, VERIFY_POISON, sizeof(row));
  for (size_t t = 0; t < 4; t++) {
    rowShape_t shape = rowShape(types[t], HIDDEN);
    assert_int_equal(rowIdentify(&shape, row).rank, -1);
  }
  static const struct {
    float value;
    uint16_t half, brain;
  } numbers[] = {{1.0f, 0x3c00, 0x3f80},       {-2.5f, 0xc100, 0xc020},    {65519.0f, 0x7bff, 0x4780},
                 {65520.0f, 0x7c00, 0x4780},   {0x1p-24f, 0x0001, 0x3380}, {0x1p-25f, 0x0000, 0x3300},
                 {0x1.8p-24f, 0x0002, 0x33c0}, {2049.0f, 0x6800, 0x4500},  {257.0f, 0x5c04, 0x4380},
                 {259.0f, 0x5c0c, 0x4382},     {-0.0f, 0x8000, 0x8000},    {0x1.ffep-15f, 0x0400, 0x3880}};
  for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
    rowShape_t half = rowShape(ULTRAEP_FLOAT16, 1), brain = rowShape(ULTRAEP_BFLOAT16, 1);
    uint16_t stored;
    float back;
    rowStore(&half, &numbers[i].value, &stored);
    assert_int_equal(stored, numbers[i].half);
    rowLoad(&half, &stored, &back);
    rowStore(&half, &back, &stored);
    assert_int_equal(stored, numbers[i].half);
    rowStore(&brain, &numbers[i].value, &stored);
    assert_int_equal(stored, numbers[i].brain);
  }
}

#define EXCHANGE_TEST(name) cmocka_unit_test_setup_teardown(name, exchange_setup, exchange_teardown)

int main(void) {
  const struct CMUnitTest tests[] = {
      EXCHANGE_TEST(test_right_passes),    EXCHANGE_TEST(test_changed_byte),
      EXCHANGE_TEST(test_poisoned_row),    EXCHANGE_TEST(test_stale_row),
      EXCHANGE_TEST(test_rows_swapped),    EXCHANGE_TEST(test_sources_swapped),
      EXCHANGE_TEST(test_row_twice),       EXCHANGE_TEST(test_wrong_expert),
      EXCHANGE_TEST(test_row_missing),     EXCHANGE_TEST(test_padding_written),
      EXCHANGE_TEST(test_end_overrun),     EXCHANGE_TEST(test_segments_wrong),
      EXCHANGE_TEST(test_scales_wrong),    EXCHANGE_TEST(test_combined_wrong),
      EXCHANGE_TEST(test_partial_differs), cmocka_unit_test(test_rows),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
