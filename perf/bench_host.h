/* One run of ultraep_perf on the host backend: shared state, and what each rank's thread holds. */
#ifndef ULTRAEP_PERF_BENCH_HOST_H_
#define ULTRAEP_PERF_BENCH_HOST_H_

#include "bench.h"
#include "verify.h"

typedef struct benchRun benchRun_t;

typedef struct {
  benchRun_t *run;
  int32_t rank;
  bool started;
  pthread_t thread;
  ultraepGroup_t group;
  ultraepRoute_t route;
  ultraepSegments_t segments;
  /* the rank's own memory */
  uint8_t *tokens;    /* [nTokens] dispatch rows */
  uint8_t *scales;    /* [nTokens][scaleBytes] */
  float *topkWeights; /* [nTokens][topK] */
  uint8_t *combined;  /* [nTokens] combine rows */
  uint8_t *copy;      /* [copyBytes], where the memcpy phase copies to */
  float *scratch;     /* for the check: 3 * hidden floats and a combine row */
  /* symmetric memory */
  uint8_t *rows;      /* [maxRows] dispatch rows */
  uint8_t *rowsOut;   /* [maxRows] combine rows; rows itself where the shapes are equal */
  uint8_t *rowScales; /* [maxRows][scaleBytes] */
  uint8_t *masters;   /* [E/R][expertBytes] */
  /* results */
  double start, end; /* seconds, of the phase that ran last */
  int64_t received;  /* rows */
  int64_t wrong;
  int32_t replicas;
  ultraepCounters_t counters;
} benchRank_t;

struct benchRun {
  const benchOptions_t *options;
  const workload_t *workload;
  bool balance;
  rowShape_t shape, combineShape;
  size_t scaleBytes;
  int64_t maxRows;  /* a rank's room */
  size_t copyBytes; /* of one rank */
  ultraepHostWorld_t world;
  verify_t verify;
  benchRank_t *ranks;            /* [R] */
  double *seconds[BENCH_PHASES]; /* [iters], over all ranks */
  /* threads begin together, or not at all */
  pthread_mutex_t lock; /* guards gate and error */
  pthread_cond_t gateMoved;
  enum { BENCH_GATE_CLOSED, BENCH_GATE_OPEN, BENCH_GATE_CANCELLED } gate;
  pthread_barrier_t barrier;
  atomic_bool failed;
  bool stopping; /* written by rank 0 between two barriers */
  perfError_t error;
};

/* The thread of one rank; argument is its benchRank_t. */
void *benchRankMain(void *argument);
/* count items of bytes each, aligned to 64 and never null for 0 bytes. */
void *benchAllocate(size_t count, size_t bytes);

#endif
