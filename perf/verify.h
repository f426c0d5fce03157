/* Judges dispatches and combines from the outside: from the tokens, where they were routed, and the rows and
 * segments that came back. It computes no row offsets and no plan. Counts wrong rows; the first fault is
 * described. */
#ifndef ULTRAEP_PERF_VERIFY_H_
#define ULTRAEP_PERF_VERIFY_H_

#include "options.h"
#include "rows.h"

#include <pthread.h>
#include <stdatomic.h>

#define VERIFY_POISON 0xa5 /* bytes of everything that is about to be written */

/* What one rank sends. */
typedef struct {
  int32_t nTokens;
  const int32_t *topk;   /* [nTokens][topK], -1: unused */
  const float *weights;  /* [nTokens][topK] */
  const uint8_t *tokens; /* [nTokens] rows */
  const uint8_t *scales; /* [nTokens][scaleBytes], or null */
  atomic_ushort *takers; /* [nTokens][topK] 1 + the rank that got the assignment, 0: none yet */
} verifySource_t;

/* What one rank got. */
typedef struct {
  int32_t nSegments;
  const int32_t *expert;   /* [nSegments], -1: empty slot */
  const int64_t *firstRow; /* [nSegments] */
  const int64_t *rows;     /* [nSegments] */
  int64_t totalRows;       /* end of the last segment */
  int64_t roomRows;        /* rows the buffer has room for */
  const uint8_t *data;     /* [roomRows] rows */
  const uint8_t *scales;   /* [roomRows][scaleBytes], or null */
} verifyReceived_t;

typedef struct {
  int32_t nRanks, nExperts, topK, nSlots, nDomainRanks, alignment;
  size_t scaleBytes;
  rowShape_t shape;        /* of dispatched rows */
  rowShape_t combineShape; /* of combined rows */
  bool partial;            /* combine adds partial sums made at each rank */
  verifySource_t *sources; /* [R] */
  pthread_mutex_t lock;    /* guards fault */
  perfError_t fault;       /* the first fault found; empty: none */
} verify_t;

int verifyInit(verify_t *verify);
void verifyDestroy(verify_t *verify);
/* Keeps the description of a fault, if it is the first. */
void verifyFault(verify_t *verify, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Forgets who got the assignments of a source. Before the dispatch, once all ranks are done with checking. */
void verifyForget(verify_t *verify, int32_t source);
/* Rows to poison beyond the segments' end, and to find poisoned still. */
int64_t verifyGuardRows(int64_t totalRows, int64_t roomRows);
/* Faults of the rows that `rank` got: segments out of order, place or domain; rows that are not the bytes of
 * a token routed to the segment's expert, or out of order by (source, token); an assignment that arrived
 * twice; a row written where none belongs. Ranks may be checked at the same time. */
int64_t verifyRows(verify_t *verify, int32_t rank, const verifyReceived_t *received);
/* Assignments of a source that no rank got. After every rank's verifyRows. */
int64_t verifyTaken(verify_t *verify, int32_t source);
/* Tokens of a source whose combined row is not, to the bit, the weighted sum of the experts' rows. scratch
 * has room for 3 * hidden floats and one combined row behind them. After verifyTaken. */
int64_t verifyCombined(verify_t *verify, int32_t source, const uint8_t *combined, float *scratch);

#endif
