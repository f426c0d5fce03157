/* ultraep_perf: times and checks dispatch and combine. */
#ifndef ULTRAEP_PERF_BENCH_H_
#define ULTRAEP_PERF_BENCH_H_

#include "options.h"
#include "ultraep.h"
#include "workload.h"

typedef enum { BENCH_BACKEND_HOST, BENCH_BACKEND_CUDA } benchBackend_t;
typedef enum { BENCH_BALANCE_OFF, BENCH_BALANCE_ON, BENCH_BALANCE_BOTH } benchBalance_t;

typedef struct {
  int32_t backend; /* benchBackend_t */
  /* nccl-tests' own */
  int32_t nRanks;
  int64_t minBytes, maxBytes; /* tokens of a rank */
  int32_t stepFactor;
  bool sized; /* -b or -e was given */
  int32_t iters, warmupIters, aggIters, check;
  int32_t dataType; /* ultraepDataType_t */
  const char *jsonPath;
  /* the traffic */
  int32_t nTokens;                /* of a rank; -1: from the sizes, or as the trace has them */
  int32_t hidden, topK, nExperts; /* topK, nExperts 0: not given */
  double skew;
  const char *tracePath, *routingPath;
  int64_t layer, limit; /* -1, 0: all */
  int64_t seed;
  /* the group */
  int32_t nSlots, nDomainRanks, alignment, balance;
  double tolerance;
  int32_t dispatchMode, combineMode, timeoutMs;
  int64_t expertBytes; /* of the weights that are synchronised; 0: no such step */
  int64_t gateBytes;   /* of an expert, for the cost gate; 0: off */
} benchOptions_t;

typedef enum {
  BENCH_ROUTE,
  BENCH_WEIGHTS,
  BENCH_DISPATCH,
  BENCH_COMBINE,
  BENCH_COPY,
  BENCH_PHASES
} benchPhase_t;

typedef struct {
  double us[BENCH_PHASES]; /* medians of the iterations, from the first rank's start to the last rank's end */
  double before, after;    /* imbalance */
  int32_t replicas;
  int64_t rows;                    /* received by all ranks, padding not counted */
  int64_t maxRows;                 /* the most that one rank sends or receives */
  int64_t copyBytes;               /* that the copy phase copied, on all ranks together */
  int64_t wrong;                   /* faults the check found, all iterations */
  perfError_t fault;               /* the first of them */
  int64_t linkBytes[BENCH_PHASES]; /* between different ranks, in one go: dispatch, combine, weights */
  size_t dispatchRowBytes, combineRowBytes;
} benchResult_t;

/* Reads the options or exits with PERF_EXIT_USAGE. */
void benchOptionsParse(benchOptions_t *options, int argc, char **argv);
extern const char *const benchDispatchModes[3];
extern const char *const benchCombineModes[2];
extern const char *const benchPhaseNames[BENCH_PHASES];

/* Runs one workload with one balance setting on the host backend. Fails on an error of the library or the
 * system; wrong results are counted, not an error. */
int benchHostRun(const benchOptions_t *options, const workload_t *workload, bool balance,
                 benchResult_t *result, perfError_t *error);

typedef struct benchReport benchReport_t;
int benchReportOpen(benchReport_t **report, const benchOptions_t *options, int argc, char **argv,
                    perfError_t *error);
/* On a terminal, a line on stderr that says what runs. */
void benchReportProgress(benchReport_t *report, const workload_t *workload, bool balance);
int benchReportLine(benchReport_t *report, const workload_t *workload, bool balance,
                    const benchResult_t *result, perfError_t *error);
/* Prints averages; *wrong is the sum over all lines. */
int benchReportFinish(benchReport_t *report, int64_t *wrong, perfError_t *error);
void benchReportDestroy(benchReport_t *report);

#endif
