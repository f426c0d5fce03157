/* One run of ultraep_perf: shared state, what each rank's thread holds, and the operations that host and CUDA
 * differ in. Ranks are the threads of this process, or, under mpirun, the processes, with one thread each. */
#ifndef ULTRAEP_PERF_BENCH_RUN_H_
#define ULTRAEP_PERF_BENCH_RUN_H_

#include "bench.h"
#include "verify.h"

typedef struct benchRun benchRun_t;

/* Memory that the library works on, where the rank lives, and its counterpart in this program's memory: the
 * same address on the host backend; null where nobody looks. */
typedef struct {
  uint8_t *own, *host;
} benchMemory_t;

typedef struct {
  benchRun_t *run;
  int32_t rank;
  int32_t local; /* index in run->ranks */
  bool started;
  pthread_t thread;
  ultraepGroup_t group;
  ultraepRoute_t route;
  ultraepSegments_t segments; /* arrays in this program's memory */
  cudaStream_t stream;        /* null: host */
  void *device;               /* what else the backend keeps */
  /* sources whose data this thread fills in: its own, and under mpirun with -c 1 all */
  int32_t firstSource, lastSource;
  /* the rank's own memory */
  benchMemory_t tokens;      /* [nTokens] dispatch rows */
  benchMemory_t scales;      /* [nTokens][scaleBytes] */
  benchMemory_t topk;        /* [nTokens][topK] */
  benchMemory_t topkWeights; /* [nTokens][topK] */
  benchMemory_t combined;    /* [nTokens] combine rows */
  uint8_t *copy;             /* [copyBytes], where the memcpy phase copies to */
  float *scratch;            /* for the check: 3 * hidden floats and a combine row */
  uint8_t *segmentMemory;    /* arrays of segments, where they are copies */
  uint8_t *slot;             /* [expertBytes], a replica's weights or gradients, where they are a copy */
  /* symmetric memory */
  benchMemory_t rows;      /* [maxRows] dispatch rows */
  benchMemory_t rowsOut;   /* [maxRows] combine rows; rows itself where the shapes are equal */
  benchMemory_t rowScales; /* [maxRows][scaleBytes] */
  benchMemory_t masters;   /* [E/R][expertBytes] */
  benchMemory_t grads;     /* [E/R][expertBytes] */
  /* results */
  double start, end; /* seconds, of the phase that ran last */
  int64_t received;  /* rows */
  int64_t wrong;
  int32_t replicas;
  int64_t gpuBytes; /* of the rank's GPU, 0 where another rank counts it */
  ultraepCounters_t counters;
  ultraepGroupProperties_t properties;
  ultraepPlannerConfig_t planner; /* what the group asked it */
} benchRank_t;

/* One call of a phase; 0, or -1 and the failure recorded. */
typedef int (*benchCall_t)(benchRank_t *rank);

struct benchOps {
  /* False: a rank's start and end are times of one clock. True: only their difference counts. */
  bool deviceTimed;
  /* False: own and host memory are the same. */
  bool mirrored;
  int (*open)(const benchOptions_t *options, benchMachine_t *machine, perfError_t *error);
  void (*close)(void);
  /* Bytes that the ranks of this process together may use, and what has them. */
  double (*memoryThere)(const char **what);
  int (*runOpen)(benchRun_t *run, perfError_t *error);
  void (*runClose)(benchRun_t *run);
  /* A rank's thread: sets device and stream; frees them. */
  int (*rankOpen)(benchRank_t *rank);
  void (*rankClose)(benchRank_t *rank);
  ultraepResult_t (*groupCreate)(benchRank_t *rank, const ultraepConfig_t *config);
  /* Null where there is no memory. Only used where mirrored. */
  void *(*allocate)(benchRank_t *rank, size_t bytes);
  void (*release)(benchRank_t *rank, void *ptr);
  /* Done when they return. */
  int (*copy)(benchRank_t *rank, void *to, const void *from, size_t bytes);
  int (*fill)(benchRank_t *rank, void *to, int byte, size_t bytes);
  /* Makes the phase ready, before any rank times it; runs nothing. Null: nothing to do. */
  int (*phasePrepare)(benchRank_t *rank, benchPhase_t phase, benchCall_t call);
  /* Runs the phase's calls, waits for their end and sets start and end. */
  int (*phaseTime)(benchRank_t *rank, benchPhase_t phase, benchCall_t call);
  /* The baseline, null: none. Runs when the group is gone. */
  int (*baselineOpen)(benchRank_t *rank);
  benchCall_t baselineDispatch, baselineCombine;
  /* GPU memory in use since open, on this rank's GPU; 0 where another rank of it counts. Null: none. */
  int64_t (*memoryUsed)(benchRank_t *rank);
};

struct benchRun {
  const benchOps_t *ops;
  const benchOptions_t *options;
  const workload_t *workload;
  bool balance;
  /* What a rank's thread does between the making of its device and the end of its group; frees its memory. */
  void (*work)(benchRank_t *rank);
  void (*release)(benchRank_t *rank);
  rowShape_t shape, combineShape;
  size_t scaleBytes;
  int64_t maxRows;  /* a rank's room */
  size_t copyBytes; /* of one rank */
  /* Calls of a timed phase: those before the clock starts, which let ranks meet, and those timed. */
  int32_t leadCalls, timedCalls;
  /* [R][R] from source to rank, where the plan is known beforehand, else null: rows, and tokens with a row */
  int64_t *pairRows, *pairTokens;
  /* [E], where the plan is known: the sum of benchGradsShare over the ranks with a replica */
  int32_t *replicaShares;
  void *world; /* the backend's */
  verify_t verify;
  int32_t firstRank, nLocal;     /* the ranks of this process */
  benchRank_t *ranks;            /* [nLocal] */
  double *seconds[BENCH_PHASES]; /* [iters], over all ranks */
  /* threads begin together, or not at all */
  pthread_mutex_t lock; /* guards gate and error */
  pthread_cond_t gateMoved;
  enum { BENCH_GATE_CLOSED, BENCH_GATE_OPEN, BENCH_GATE_CANCELLED } gate;
  pthread_barrier_t barrier;
  atomic_bool failed;
  bool stopping; /* written by the first thread between two barriers */
  perfError_t error;
};

/* Sets which ranks are here, shapes, and the room that a rank needs at most. */
void benchShapesSet(benchRun_t *run);
/* Runs all ranks of this process to their end. ready: false where this process cannot; then all processes
 * stop. Fails on all processes alike. */
int benchRanksRun(benchRun_t *run, bool ready, perfError_t *error);
/* The thread of one rank; argument is its benchRank_t. */
void *benchRankMain(void *argument);
/* What ultraep_perf's ranks do. */
void benchRankWork(benchRank_t *rank);
/* count items of bytes each, aligned to 64 and never null for 0 bytes. */
void *benchAllocate(size_t count, size_t bytes);

/* ---- bench_rank.c: going on together ---- */
/* Records the run's first error and makes all ranks stop; is -1. */
int benchRankFail(benchRank_t *rank, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for a call of the library that failed; what is the call's text. */
int benchRankFailCall(benchRank_t *rank, const char *what, ultraepResult_t result);
/* Waits for all ranks. False where one has failed: then all ranks get false from the same call. */
bool benchRankSync(const benchRank_t *rank);

#define BENCH_CALL(rank, call)                                                                               \
  do {                                                                                                       \
    ultraepResult_t callResult = (call);                                                                     \
    if (callResult != ultraepSuccess) return benchRankFailCall(rank, #call, callResult);                     \
  } while (0)

/* ---- bench_setup.c ---- */
/* The rank's own memory, not collective. */
int benchRankAllocate(benchRank_t *rank);
/* The config of the run's group. */
ultraepConfig_t benchConfigMake(const benchRun_t *run);
/* Group, route and symmetric memory. Collective. */
int benchRankOpenGroup(benchRank_t *rank);
/* Both kinds of memory; after the group is destroyed. */
void benchRankRelease(benchRank_t *rank);

/* ---- bench_check.c: contents ---- */
/* Copies between the library's memory and this program's, where they differ. */
int benchPush(benchRank_t *rank, const benchMemory_t *memory, size_t bytes);
int benchPull(benchRank_t *rank, const benchMemory_t *memory, size_t bytes);
int benchTokensFill(benchRank_t *rank, uint32_t iteration);
int benchMastersFill(benchRank_t *rank, uint32_t iteration);
int benchSegmentsRead(benchRank_t *rank);
/* The first segment behind `segment` (-1: of all) that holds a replica; -1: none. */
int32_t benchReplicaNext(const benchRank_t *rank, int32_t segment);
/* A slot of expertBytes in this program's memory, until the next one is read; null where there is none, or a
 * failure is recorded. slots: a tensor of the segments. */
const void *benchSlotRead(benchRank_t *rank, void *const *slots, int32_t segment);
int benchRowsPoison(benchRank_t *rank);
int benchCombinedPoison(benchRank_t *rank);
/* Faults found; a failure to look is recorded and counts none. */
int64_t benchWeightsCheck(benchRank_t *rank, uint32_t iteration);
int64_t benchRowsCheck(benchRank_t *rank);
int64_t benchTakenCheck(benchRank_t *rank);
int64_t benchCombinedCheck(benchRank_t *rank);
/* Every row of the rank through its expert. */
int benchExpertsApply(benchRank_t *rank);

/* ---- bench_grads.c ---- */
/* Part of a rank's slots in the gradients of an expert. */
int32_t benchGradsShare(int32_t rank);
/* Gradients of masters and, with the segments read, of slots. */
int benchGradsFill(benchRank_t *rank, uint32_t iteration);
/* As the other checks. */
int64_t benchGradsCheck(benchRank_t *rank, uint32_t iteration);

/* ---- bench_plan.c ---- */
/* Sets run->pairRows, run->pairTokens, run->replicaShares and, where that is less, run->maxRows, from the
 * plan that the library will make. */
int benchPlanMake(benchRun_t *run, perfError_t *error);
/* Frees them. */
void benchPlanFree(benchRun_t *run);
/* The bytes that the busiest rank sends to or gets from others, if `linkBytes` in all cross between ranks,
 * rowBytes for each row, or for each token and rank; -1 where neither gives that sum. */
int64_t benchPlanBusiest(const benchRun_t *run, int64_t linkBytes, size_t rowBytes);
/* Sets *gate where the group had a cost gate: what it weighed for the workload. */
int benchPlanGate(const benchRun_t *run, gateFigures_t *gate, perfError_t *error);
/* Writes the bytes of a dispatch from rank to rank as nccl-tests' alltoallv_perf reads them. */
int benchPlanWrite(const benchRun_t *run, const char *path, perfError_t *error);

#endif
