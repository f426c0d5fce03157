/* Ranks on GPUs: streams, events, graphs and copies.
 *
 * Several ranks may be threads of one process on one GPU, with kernels that wait for one another. So once
 * ranks have met, nothing here allocates device memory or waits for a whole device while a peer may be in a
 * phase: buffers are made before and freed after, between barriers, and all else is ordered by the rank's own
 * stream. */
#include "bench_cuda.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

/* ---- a rank ---- */

static int cuda_run_open(benchRun_t *run, perfError_t *error) {
  (void)run;
  (void)error;
  return 0;
}

static void cuda_run_close(benchRun_t *run) {
  (void)run;
}

static int cuda_rank_open(benchRank_t *rank) {
  benchCudaRank_t *self = calloc(1, sizeof(*self));
  if (self == NULL) return benchRankFail(rank, "no memory for a rank");
  rank->device = self;
  self->comm = benchCuda.comms[rank->local];
  BENCH_CUDA(rank, cudaSetDevice(benchCudaDevice(rank->local)));
  rank->stream = benchCuda.streams[rank->local];
  BENCH_CUDA(rank, cudaEventCreate(&self->begin));
  BENCH_CUDA(rank, cudaEventCreate(&self->end));
  return 0;
}

static void cuda_rank_close(benchRank_t *rank) {
  benchCudaRank_t *self = bench_cuda_rank(rank);
  if (self == NULL) return;
  for (int phase = 0; phase < BENCH_PHASES; phase++) {
    if (self->graphs[phase] != NULL) cudaGraphExecDestroy(self->graphs[phase]);
  }
  cudaFree(self->packed);
  cudaFree(self->received);
  if (self->begin != NULL) cudaEventDestroy(self->begin);
  if (self->end != NULL) cudaEventDestroy(self->end);
  free(self);
  rank->device = NULL;
}

static ultraepResult_t cuda_group_create(benchRank_t *rank, const ultraepConfig_t *config) {
  return ultraepGroupCreate(&rank->group, bench_cuda_rank(rank)->comm, config);
}

static void *cuda_allocate(benchRank_t *rank, size_t bytes) {
  void *memory = NULL;
  (void)rank;
  return cudaMalloc(&memory, bytes == 0 ? 16 : bytes) == cudaSuccess ? memory : NULL;
}

static void cuda_release(benchRank_t *rank, void *ptr) {
  (void)rank;
  cudaFree(ptr);
}

static int cuda_copy(benchRank_t *rank, void *to, const void *from, size_t bytes) {
  if (bytes == 0) return 0;
  BENCH_CUDA(rank, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, rank->stream));
  BENCH_CUDA(rank, cudaStreamSynchronize(rank->stream));
  return 0;
}

static int cuda_fill(benchRank_t *rank, void *to, int byte, size_t bytes) {
  if (bytes == 0) return 0;
  BENCH_CUDA(rank, cudaMemsetAsync(to, byte, bytes, rank->stream));
  BENCH_CUDA(rank, cudaStreamSynchronize(rank->stream));
  return 0;
}

/* ---- phases ---- */

/* Enqueues a phase. The calls before the clock starts let all ranks meet on the GPUs, so that the times do
 * not tell when each thread of the host came. */
static int cuda_calls_enqueue(benchRank_t *rank, benchCall_t call, bool captured) {
  const benchCudaRank_t *self = bench_cuda_rank(rank);
  unsigned flags = captured ? cudaEventRecordExternal : cudaEventRecordDefault;
  for (int32_t i = 0; i < rank->run->leadCalls; i++) {
    if (call(rank) != 0) return -1;
  }
  BENCH_CUDA(rank, cudaEventRecordWithFlags(self->begin, rank->stream, flags));
  for (int32_t i = 0; i < rank->run->timedCalls; i++) {
    if (call(rank) != 0) return -1;
  }
  BENCH_CUDA(rank, cudaEventRecordWithFlags(self->end, rank->stream, flags));
  return 0;
}

static int cuda_phase_prepare(benchRank_t *rank, benchPhase_t phase, benchCall_t call) {
  benchCudaRank_t *self = bench_cuda_rank(rank);
  cudaGraph_t graph = NULL;
  if (!rank->run->options->graph) return 0;
  BENCH_CUDA(rank, cudaStreamBeginCapture(rank->stream, cudaStreamCaptureModeThreadLocal));
  int status = cuda_calls_enqueue(rank, call, true);
  cudaError_t ended = cudaStreamEndCapture(rank->stream, &graph);
  if (status != 0) return status;
  if (ended == cudaSuccess) ended = cudaGraphInstantiate(&self->graphs[phase], graph, 0);
  if (graph != NULL) cudaGraphDestroy(graph);
  BENCH_CUDA(rank, ended);
  BENCH_CUDA(rank, cudaGraphUpload(self->graphs[phase], rank->stream));
  BENCH_CUDA(rank, cudaStreamSynchronize(rank->stream));
  return 0;
}

/* Waits for the stream. The library's kernels end by themselves; NCCL's, in the baseline, do not where a peer
 * is gone. */
static int cuda_wait(benchRank_t *rank, bool bounded) {
  double deadline = perfSeconds() + rank->run->options->timeoutMs / 1e3;
  cudaError_t state = cudaSuccess;
  while (bounded && (state = cudaStreamQuery(rank->stream)) == cudaErrorNotReady) {
    if (atomic_load(&rank->run->failed) || perfSeconds() > deadline) {
      benchCuda.nccl.CommAbort(bench_cuda_rank(rank)->comm);
      benchCuda.comms[rank->local] = NULL;
      return benchRankFail(rank, "the baseline did not end within %d ms", rank->run->options->timeoutMs);
    }
    sched_yield();
  }
  BENCH_CUDA(rank, state);
  BENCH_CUDA(rank, cudaStreamSynchronize(rank->stream));
  return 0;
}

static int cuda_phase_time(benchRank_t *rank, benchPhase_t phase, benchCall_t call) {
  benchCudaRank_t *self = bench_cuda_rank(rank);
  bool baseline = phase == BENCH_BASE_DISPATCH || phase == BENCH_BASE_COMBINE;
  float ms = 0;
  if (self->graphs[phase] != NULL) {
    BENCH_CUDA(rank, cudaGraphLaunch(self->graphs[phase], rank->stream));
  } else if (cuda_calls_enqueue(rank, call, false) != 0) {
    return -1;
  }
  if (cuda_wait(rank, baseline) != 0) return -1;
  if (!baseline) BENCH_CALL(rank, ultraepGroupStatus(rank->group, NULL));
  BENCH_CUDA(rank, cudaEventElapsedTime(&ms, self->begin, self->end));
  rank->start = 0;
  rank->end = ms / 1e3;
  return 0;
}

const benchOps_t benchCudaOps = {.deviceTimed = true,
                                 .mirrored = true,
                                 .open = benchCudaOpen,
                                 .close = benchCudaClose,
                                 .memoryThere = benchCudaMemoryThere,
                                 .runOpen = cuda_run_open,
                                 .runClose = cuda_run_close,
                                 .rankOpen = cuda_rank_open,
                                 .rankClose = cuda_rank_close,
                                 .groupCreate = cuda_group_create,
                                 .allocate = cuda_allocate,
                                 .release = cuda_release,
                                 .copy = cuda_copy,
                                 .fill = cuda_fill,
                                 .phasePrepare = cuda_phase_prepare,
                                 .phaseTime = cuda_phase_time,
                                 .baselineOpen = benchBaselineOpen,
                                 .baselineDispatch = benchBaselineDispatch,
                                 .baselineCombine = benchBaselineCombine,
                                 .memoryUsed = benchCudaMemoryUsed};
