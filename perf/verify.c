#include "verify.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { VERIFY_GUARD_ROWS = 4 };

int verifyInit(verify_t *verify) {
  verify->fault.text[0] = '\0';
  return pthread_mutex_init(&verify->lock, NULL) == 0 ? 0 : -1;
}

void verifyDestroy(verify_t *verify) {
  pthread_mutex_destroy(&verify->lock);
}

void verifyFault(verify_t *verify, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  pthread_mutex_lock(&verify->lock);
  if (verify->fault.text[0] == '\0') {
    vsnprintf(verify->fault.text, sizeof(verify->fault.text), format, arguments);
  }
  pthread_mutex_unlock(&verify->lock);
  va_end(arguments);
}

void verifyForget(verify_t *verify, int32_t source) {
  verifySource_t *from = &verify->sources[source];
  int64_t entries = (int64_t)from->nTokens * verify->topK;
  for (int64_t i = 0; i < entries; i++) atomic_store_explicit(&from->takers[i], 0, memory_order_relaxed);
}

/* ---- segments ---- */

/* Which expert may stand in segment i of a rank: the masters in order, then replicas from the rank's domain.
 */
static bool verify_segment_expert_fits(const verify_t *verify, int32_t rank, int32_t segment,
                                       int32_t expert) {
  int32_t perRank = verify->nExperts / verify->nRanks;
  if (segment < perRank) return expert == rank * perRank + segment;
  if (expert == -1) return true;
  if (expert < 0 || expert >= verify->nExperts) return false;
  int32_t master = expert / perRank;
  return master != rank && master / verify->nDomainRanks == rank / verify->nDomainRanks;
}

static int64_t verify_segments_check(verify_t *verify, int32_t rank, const verifyReceived_t *received) {
  int64_t end = 0;
  if (received->nSegments != verify->nExperts / verify->nRanks + verify->nSlots) {
    verifyFault(verify, "rank %d has %d segments", rank, received->nSegments);
    return 1;
  }
  for (int32_t i = 0; i < received->nSegments; i++) {
    int32_t expert = received->expert[i];
    int64_t first = received->firstRow[i], rows = received->rows[i];
    if (!verify_segment_expert_fits(verify, rank, i, expert) || (expert == -1 && rows != 0)) {
      verifyFault(verify, "segment %d of rank %d is expert %d's with %lld rows", i, rank, expert,
                  (long long)rows);
      return 1;
    }
    if (first < end || rows < 0 || first > received->roomRows - rows || first % verify->alignment != 0) {
      verifyFault(verify, "segment %d of rank %d: rows %lld..+%lld", i, rank, (long long)first,
                  (long long)rows);
      return 1;
    }
    end = first + rows;
  }
  if (received->totalRows < end || received->totalRows > received->roomRows) {
    verifyFault(verify, "rank %d: %lld rows in use, the last segment ends at %lld", rank,
                (long long)received->totalRows, (long long)end);
    return 1;
  }
  return 0;
}

/* ---- rows ---- */

/* Marks one assignment of (source, token) to expert as taken by rank; false where all are taken or there is
 * none. */
static bool verify_assignment_take(verify_t *verify, rowId_t id, int32_t expert, int32_t rank) {
  verifySource_t *from = &verify->sources[id.rank];
  int64_t base = (int64_t)id.token * verify->topK;
  for (int32_t k = 0; k < verify->topK; k++) {
    unsigned short none = 0;
    if (from->topk[base + k] == expert &&
        atomic_compare_exchange_strong(&from->takers[base + k], &none, (unsigned short)(rank + 1))) {
      return true;
    }
  }
  return false;
}

static bool verify_row_check(verify_t *verify, int32_t rank, const verifyReceived_t *received,
                             int32_t segment, int64_t row, rowId_t *last) {
  const uint8_t *data = received->data + (size_t)row * verify->shape.bytes;
  int32_t expert = received->expert[segment];
  rowId_t id = rowIdentify(&verify->shape, data);
  if (id.rank < 0 || id.rank >= verify->nRanks || id.token >= verify->sources[id.rank].nTokens) {
    verifyFault(verify, "row %lld of rank %d, expert %d: no token's bytes", (long long)row, rank, expert);
    return false;
  }
  const verifySource_t *from = &verify->sources[id.rank];
  bool same = memcmp(data, from->tokens + (size_t)id.token * verify->shape.bytes, verify->shape.bytes) == 0;
  if (same && received->scales != NULL) {
    same = memcmp(received->scales + (size_t)row * verify->scaleBytes,
                  from->scales + (size_t)id.token * verify->scaleBytes, verify->scaleBytes) == 0;
  }
  if (!same) {
    verifyFault(verify, "row %lld of rank %d, expert %d: not the bytes of token %d of rank %d",
                (long long)row, rank, expert, id.token, id.rank);
    return false;
  }
  if (!verify_assignment_take(verify, id, expert, rank)) {
    verifyFault(verify,
                "row %lld of rank %d, expert %d: token %d of rank %d was not routed there, or came twice",
                (long long)row, rank, expert, id.token, id.rank);
    return false;
  }
  if (id.rank < last->rank || (id.rank == last->rank && id.token < last->token)) {
    verifyFault(verify, "row %lld of rank %d, expert %d: token %d of rank %d is out of order", (long long)row,
                rank, expert, id.token, id.rank);
    return false;
  }
  *last = id;
  return true;
}

static bool verify_poisoned(const uint8_t *bytes, size_t count) {
  for (size_t i = 0; i < count; i++) {
    if (bytes[i] != VERIFY_POISON) return false;
  }
  return true;
}

/* Rows [first, last) must not have been written. */
static int64_t verify_gap_check(verify_t *verify, int32_t rank, const verifyReceived_t *received,
                                int64_t first, int64_t last) {
  int64_t wrong = 0;
  for (int64_t row = first; row < last; row++) {
    bool kept = verify_poisoned(received->data + (size_t)row * verify->shape.bytes, verify->shape.bytes);
    if (kept && received->scales != NULL) {
      kept = verify_poisoned(received->scales + (size_t)row * verify->scaleBytes, verify->scaleBytes);
    }
    if (kept) continue;
    verifyFault(verify, "row %lld of rank %d is padding and was written", (long long)row, rank);
    wrong++;
  }
  return wrong;
}

int64_t verifyGuardRows(int64_t totalRows, int64_t roomRows) {
  return roomRows - totalRows < VERIFY_GUARD_ROWS ? roomRows - totalRows : VERIFY_GUARD_ROWS;
}

int64_t verifyRows(verify_t *verify, int32_t rank, const verifyReceived_t *received) {
  int64_t wrong = verify_segments_check(verify, rank, received);
  if (wrong != 0) return wrong;
  int64_t end = 0;
  for (int32_t i = 0; i < received->nSegments; i++) {
    if (received->rows[i] == 0) continue;
    rowId_t last = {.rank = -1, .token = -1};
    wrong += verify_gap_check(verify, rank, received, end, received->firstRow[i]);
    end = received->firstRow[i] + received->rows[i];
    for (int64_t row = received->firstRow[i]; row < end; row++) {
      if (!verify_row_check(verify, rank, received, i, row, &last)) wrong++;
    }
  }
  int64_t guard = verifyGuardRows(received->totalRows, received->roomRows);
  return wrong + verify_gap_check(verify, rank, received, end, received->totalRows + guard);
}

int64_t verifyTaken(verify_t *verify, int32_t source) {
  const verifySource_t *from = &verify->sources[source];
  int64_t wrong = 0, entries = (int64_t)from->nTokens * verify->topK;
  for (int64_t i = 0; i < entries; i++) {
    if (from->topk[i] < 0 || atomic_load_explicit(&from->takers[i], memory_order_relaxed) != 0) continue;
    verifyFault(verify, "token %lld of rank %d never reached expert %d", (long long)(i / verify->topK),
                source, from->topk[i]);
    wrong++;
  }
  return wrong;
}

/* ---- combine ---- */

/* sum[j] += weight * (token value j + the expert's addend), in fp32. */
static void verify_product_add(const verify_t *verify, const float *token, int32_t expert, float weight,
                               float *sum) {
  float even = rowAddend(expert, 0), odd = rowAddend(expert, 1);
  for (int32_t j = 0; j < verify->shape.hidden; j++)
    sum[j] += weight * (token[j] + (j % 2 == 0 ? even : odd));
}

/* 1 + the rank that got an assignment. */
static int32_t verify_taker(const verifySource_t *from, int64_t at) {
  return atomic_load_explicit(&from->takers[at], memory_order_relaxed);
}

/* One rank's partial sum of a token, from the assignment at k on, added to sum. */
static void verify_partial_add(const verify_t *verify, const verifySource_t *from, int64_t base, int32_t k,
                               const float *token, float *partial, float *sum) {
  int32_t hidden = verify->shape.hidden, parts = 0;
  int32_t taker = verify_taker(from, base + k);
  memset(partial, 0, (size_t)hidden * sizeof(float));
  for (int32_t i = k; i < verify->topK; i++) {
    if (from->topk[base + i] < 0) continue;
    if (verify_taker(from, base + i) != taker) continue;
    verify_product_add(verify, token, from->topk[base + i], from->weights[base + i], partial);
    parts++;
  }
  if (parts > 1) {
    uint8_t *rounded = (uint8_t *)(partial + hidden);
    rowStore(&verify->combineShape, partial, rounded);
    rowLoad(&verify->combineShape, rounded, partial);
  }
  for (int32_t j = 0; j < hidden; j++) sum[j] += partial[j];
}

/* True where no earlier entry of the token went to the same rank as entry k. */
static bool verify_taker_first(const verify_t *verify, const verifySource_t *from, int64_t base, int32_t k) {
  int32_t taker = verify_taker(from, base + k);
  for (int32_t i = 0; i < k && i < verify->topK; i++) {
    if (from->topk[base + i] < 0) continue;
    if (verify_taker(from, base + i) == taker) return false;
  }
  return true;
}

/* scratch: token values, sum, partial sum, [hidden] floats each, then one row. */
int64_t verifyCombined(verify_t *verify, int32_t source, const uint8_t *combined, float *scratch) {
  const verifySource_t *from = &verify->sources[source];
  size_t hidden = (size_t)verify->shape.hidden, rowBytes = verify->combineShape.bytes;
  float *token = scratch, *sum = scratch + hidden, *partial = scratch + 2 * hidden;
  uint8_t *expected = (uint8_t *)(scratch + 3 * hidden);
  int64_t wrong = 0;
  for (int32_t t = 0; t < from->nTokens; t++) {
    int64_t base = (int64_t)t * verify->topK;
    rowLoad(&verify->shape, from->tokens + (size_t)t * verify->shape.bytes, token);
    memset(sum, 0, hidden * sizeof(float));
    for (int32_t k = 0; k < verify->topK; k++) {
      if (from->topk[base + k] < 0) continue;
      /* Rows on the token's own rank are added as they are. */
      if (!verify->partial || verify_taker(from, base + k) == source + 1) {
        verify_product_add(verify, token, from->topk[base + k], from->weights[base + k], sum);
      } else if (verify_taker_first(verify, from, base, k)) {
        verify_partial_add(verify, from, base, k, token, partial, sum);
      }
    }
    rowStore(&verify->combineShape, sum, expected);
    if (memcmp(expected, combined + (size_t)t * rowBytes, rowBytes) == 0) continue;
    verifyFault(verify, "combined token %d of rank %d is not the sum of its experts' rows", t, source);
    wrong++;
  }
  return wrong;
}
