/* ultraep_perf: times and checks dispatch and combine. */
#ifndef ULTRAEP_PERF_BENCH_H_
#define ULTRAEP_PERF_BENCH_H_

#include "gate.h"
#include "options.h"
#include "ultraep.h"
#include "workload.h"

typedef enum { BENCH_BACKEND_HOST, BENCH_BACKEND_CUDA } benchBackend_t;
typedef enum { BENCH_BASELINE_NONE, BENCH_BASELINE_NCCL } benchBaseline_t;
typedef enum { BENCH_GRADS_NONE, BENCH_GRADS_FLOAT32, BENCH_GRADS_BFLOAT16 } benchGrads_t;
typedef enum { BENCH_BALANCE_OFF, BENCH_BALANCE_ON, BENCH_BALANCE_BOTH } benchBalance_t;

typedef struct {
  int32_t backend; /* benchBackend_t */
  /* nccl-tests' own */
  int32_t nRanks;             /* threads, or under mpirun the processes */
  int32_t nProcesses;         /* 1 without mpirun */
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
  int32_t replicaRows;
  int32_t dispatchMode, combineMode, timeoutMs;
  int64_t expertBytes; /* of the weights that are synchronised; 0: no such step */
  int32_t grads;       /* benchGrads_t: gradients of as many bytes, reduced */
  int64_t gateBytes;   /* of an expert, for the cost gate; 0: off */
  /* on GPUs */
  int32_t maxCtas, graph, baseline;
  const char *matrixPath;
} benchOptions_t;

typedef enum {
  BENCH_ROUTE,
  BENCH_WEIGHTS,
  BENCH_DISPATCH,
  BENCH_COMBINE,
  BENCH_GRADS,
  BENCH_COPY, /* host only: memcpy */
  /* GPUs only */
  BENCH_STEP,          /* route and dispatch, one after the other */
  BENCH_BASE_DISPATCH, /* the same rows from rank to rank with ncclSend and ncclRecv */
  BENCH_BASE_COMBINE,
  BENCH_PHASES
} benchPhase_t;

/* What the ranks run on. */
typedef struct {
  int32_t nDevices; /* GPUs used; 0: host */
  char device[64];  /* name of the first */
  int32_t ncclVersion;
  double copyRate;   /* bytes a second, read and written, of one GPU copying within its memory */
  int64_t commBytes; /* GPU memory of NCCL's communicators, all ranks */
} benchMachine_t;

typedef struct {
  double us[BENCH_PHASES]; /* medians of the iterations: the host's from the first rank's start to the last
                              rank's end, a GPU's of the slowest rank; 0: phase not run */
  double before, after;    /* imbalance */
  int32_t replicas;
  gateFigures_t gate;              /* what it weighed; planner.copyPs 0: there was none */
  int64_t rows;                    /* received by all ranks, padding not counted */
  int64_t maxRows;                 /* the most that one rank sends or receives */
  int64_t copyBytes;               /* that the copy phase copied, on all ranks together */
  int64_t wrong;                   /* faults the check found, all iterations */
  perfError_t fault;               /* the first of them */
  int64_t linkBytes[BENCH_PHASES]; /* between different ranks, in one go: dispatch, combine, weights */
  /* of it, over the link of the rank that sends or receives most: dispatch, combine; -1: not known */
  int64_t busiestBytes[BENCH_PHASES];
  size_t dispatchRowBytes, combineRowBytes;
  /* on GPUs */
  int64_t dispatchMoved, combineMoved; /* bytes read and written by all ranks at least */
  /* The same of weights and gradients, where every replica's are read and written, and every master's
   * gradients that have replicas; 0: not known, or none. */
  int64_t weightsMoved, gradsMoved;
  int64_t gpuBytes; /* memory in use for the line: communicators, groups, buffers, all ranks */
  int64_t windowBytes, privateBytes, slotBytes; /* of a group, the rank with the most */
} benchResult_t;

/* Reads the options or exits with PERF_EXIT_USAGE. */
void benchOptionsParse(benchOptions_t *options, int argc, char **argv);
extern const char *const benchDispatchModes[3];
extern const char *const benchCombineModes[2];
extern const char *const benchPhaseNames[BENCH_PHASES];

/* Calls call with each workload that the options ask for, until it fails. */
typedef int (*benchWorkloadCall_t)(void *user, const workload_t *workload, perfError_t *error);
int benchTrafficRun(const benchOptions_t *options, benchWorkloadCall_t call, void *user, perfError_t *error);

/* A line of a report's header. */
void benchTrafficPrint(const benchOptions_t *options);

/* Where the ranks live: a table of operations, see bench_run.h. */
typedef struct benchOps benchOps_t;
extern const benchOps_t benchHostOps;
extern const benchOps_t benchCudaOps;

/* Makes ready what all runs share, and frees it. Collective over the processes. */
int benchMachineOpen(const benchOps_t *ops, const benchOptions_t *options, benchMachine_t *machine,
                     perfError_t *error);
void benchMachineClose(const benchOps_t *ops);
/* Ends a program: closes machine (ops null: none) and job, says on stderr what failed (status not 0), and is
 * the exit status. */
int benchEnd(const char *program, const benchOps_t *ops, int status, bool wrong, const perfError_t *error);
/* Runs one workload with one balance setting. Fails on an error of the library or the system, on all
 * processes alike (the message may be empty where another process has it); wrong results are counted, not an
 * error. */
int benchRun(const benchOps_t *ops, const benchOptions_t *options, const workload_t *workload, bool balance,
             benchResult_t *result, perfError_t *error);

typedef struct benchReport benchReport_t;
/* All of these do nothing with a null report: processes other than the first have none. */
int benchReportOpen(benchReport_t **report, const benchOptions_t *options, const benchMachine_t *machine,
                    int argc, char **argv, perfError_t *error);
/* On a terminal, a line on stderr that says what runs. */
void benchReportProgress(benchReport_t *report, const workload_t *workload, bool balance);
int benchReportLine(benchReport_t *report, const workload_t *workload, bool balance,
                    const benchResult_t *result, perfError_t *error);
/* Prints averages. */
int benchReportFinish(benchReport_t *report, perfError_t *error);
void benchReportDestroy(benchReport_t *report);

#endif
