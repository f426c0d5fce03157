/* The CUDA backend of ultraep_perf: what its two files share. */
#ifndef ULTRAEP_PERF_BENCH_CUDA_H_
#define ULTRAEP_PERF_BENCH_CUDA_H_

#include "bench_run.h"
#include "nccl_loader.h"

#include <cuda_runtime_api.h>

/* What a rank keeps for a run, in benchRank_t.device. */
typedef struct {
  cudaEvent_t begin, end;
  cudaGraphExec_t graphs[BENCH_PHASES]; /* null: calls are enqueued one by one */
  ncclComm_t comm;
  /* baseline, room for the larger rows of dispatch and combine */
  uint8_t *packed;   /* the rows that the rank sends in dispatch, by destination */
  uint8_t *received; /* those it gets, by source */
} benchCudaRank_t;

/* What all runs share. */
typedef struct {
  ncclLoader_t nccl;
  int32_t nRanks, firstRank, nLocal; /* the ranks of this process: firstRank.. */
  int nDevices;                      /* used on this machine */
  ncclComm_t *comms;                 /* [nLocal] */
  cudaStream_t *streams;             /* [nLocal] */
  int64_t *freeBefore;               /* [nDevices] bytes, before the communicators were made */
} benchCuda_t;

extern benchCuda_t benchCuda;

static inline benchCudaRank_t *bench_cuda_rank(const benchRank_t *rank) {
  return rank->device;
}

/* The device of one of this process's ranks. */
int benchCudaDevice(int32_t local);

/* True for one rank of each GPU. */
bool benchCudaCounts(int32_t local);

/* Reports a CUDA call that fails. */
#define BENCH_CUDA(rank, call)                                                                               \
  do {                                                                                                       \
    cudaError_t cudaResult = (call);                                                                         \
    if (cudaResult != cudaSuccess)                                                                           \
      return benchRankFail(rank, "%.*s: %s", (int)strcspn(#call, "("), #call,                                \
                           cudaGetErrorString(cudaResult));                                                  \
  } while (0)

/* ---- bench_machine.c: GPUs, NCCL and communicators ---- */
int benchCudaOpen(const benchOptions_t *options, benchMachine_t *machine, perfError_t *error);
void benchCudaClose(void);
double benchCudaMemoryThere(const char **what);
int64_t benchCudaMemoryUsed(benchRank_t *rank);

/* ---- bench_baseline.c ---- */
int benchBaselineOpen(benchRank_t *rank);
int benchBaselineDispatch(benchRank_t *rank);
int benchBaselineCombine(benchRank_t *rank);

#endif
