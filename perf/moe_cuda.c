/* What the ranks compute with on GPUs: cuBLAS for the products, events for the times.
 *
 * Ranks may be threads that share a GPU, with kernels that wait for one another (see bench_cuda.c). So all
 * memory, events and handles are made before ranks meet, cuBLAS gets its workspace from here, and what the
 * host wants to know comes by a kernel that writes host memory, not by a copy that could wait behind another
 * rank's kernel. */
#include "bench_cuda.h"
#include "bench_job.h"
#include "moe.h"
#include "moe_cublas.h"
#include "moe_energy.h"
#include "moe_kernels.h"

#include <stdlib.h>
#include <string.h>

enum { CUDA_WORKSPACE_BYTES = 64 << 20 };

/* A layer's segments in host memory: the rows of all, then an array of each. */
enum {
  CUDA_TOTAL,
  CUDA_FIRST_ROW,
  CUDA_ROWS,
  CUDA_WEIGHTS,
  CUDA_GRADS = CUDA_WEIGHTS + MOE_TENSORS,
  CUDA_EXPERT = CUDA_GRADS + MOE_TENSORS,
  CUDA_ARRAYS
};
_Static_assert((int)CUDA_ARRAYS <= (int)MOE_KERNEL_ARRAYS, "one kernel copies all");

/* A call of the grouped product, an entry a group; each group is one product. */
typedef struct {
  cublasOperation_t *aOps, *bOps;
  int *m, *n, *k, *lda, *ldb, *ldc, *sizes;
  float *alpha, *beta;
} cudaGroups_t;

/* Products that run one after another. The first engine's are those of the rank's stream. */
typedef struct {
  cublasHandle_t handle;
  void *workspace;
  cudaStream_t stream;
  double work; /* of the products that it has been given */
} cudaEngine_t;

typedef struct {
  const moeCublas_t *cublas;
  cudaEngine_t engines[MOE_MAX_STREAMS];
  cudaEvent_t order; /* see cuda_follow */
  int32_t nSegments;
  cudaEvent_t *marks;        /* [moe_max_marks] */
  cudaEvent_t *segmentsIn;   /* [layers] the layer's segments are in host memory */
  uint64_t *words;           /* [layers][cuda_layer_words] host memory that the GPU writes */
  uint64_t *addresses;       /* [3][segments] of a grouped product, host memory that the GPU reads */
  uint64_t *deviceAddresses; /* the same on the GPU */
  cudaGroups_t groups;
} cudaRank_t;

#define MOE_CUBLAS(rank, call)                                                                               \
  do {                                                                                                       \
    cublasStatus_t cublasResult = (call);                                                                    \
    if (cublasResult != CUBLAS_STATUS_SUCCESS)                                                               \
      return benchRankFail((rank)->base, "%.*s: %s", (int)strcspn(#call, "("), #call,                        \
                           ((cudaRank_t *)(rank)->device)->cublas->GetStatusString(cublasResult));           \
  } while (0)

/* ---- made and freed ---- */

/* Threads that share a GPU get their part of it each, or products of several ranks would take turns.
 * Processes get theirs from MPS. */
static int cuda_share_set(moeRank_t *rank, const cudaEngine_t *engine, int32_t taken) {
  const cudaRank_t *self = rank->device;
  int sms = 0, sharing = (benchCuda.nLocal + benchCuda.nDevices - 1) / benchCuda.nDevices;
  BENCH_CUDA(rank->base, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount,
                                                benchCudaDevice(rank->base->local)));
  int share = sms / (sharing < 1 ? 1 : sharing) - taken;
  if (sharing <= 1 && taken == 0) share = 0; /* all, cuBLAS's default */
  MOE_CUBLAS(rank, self->cublas->SetSmCountTarget(engine->handle, share < 0 ? 1 : share));
  return 0;
}
/* Without the SMs that another kernel takes meanwhile: cuBLAS deals the work to all SMs beforehand, and would
 * wait for those. */
static int cuda_shares_set(moeRank_t *rank, int32_t taken) {
  const cudaRank_t *self = rank->device;
  for (int32_t i = 0; i < moe_options(rank)->nStreams; i++) {
    if (cuda_share_set(rank, &self->engines[i], taken) != 0) return -1;
  }
  return 0;
}

static int cuda_engine_make(moeRank_t *rank, cudaEngine_t *engine) {
  cudaRank_t *self = rank->device;
  bool first = engine == &self->engines[0];
  if (!first) BENCH_CUDA(rank->base, cudaStreamCreateWithFlags(&engine->stream, cudaStreamNonBlocking));
  MOE_CUBLAS(rank, self->cublas->Create(&engine->handle));
  MOE_CUBLAS(rank, self->cublas->SetStream(engine->handle, first ? rank->base->stream : engine->stream));
  BENCH_CUDA(rank->base, cudaMalloc(&engine->workspace, CUDA_WORKSPACE_BYTES));
  MOE_CUBLAS(rank, self->cublas->SetWorkspace(engine->handle, engine->workspace, CUDA_WORKSPACE_BYTES));
  return cuda_share_set(rank, engine, 0);
}

static void cuda_engine_free(const cudaRank_t *self, cudaEngine_t *engine) {
  if (engine->handle != NULL) self->cublas->Destroy(engine->handle);
  cudaFree(engine->workspace);
  if (engine->stream != NULL) cudaStreamDestroy(engine->stream);
}

static int cuda_engines_make(moeRank_t *rank) {
  cudaRank_t *self = rank->device;
  for (int32_t i = 0; i < moe_options(rank)->nStreams; i++) {
    if (cuda_engine_make(rank, &self->engines[i]) != 0) return -1;
  }
  BENCH_CUDA(rank->base, cudaStreamCreateWithFlags(&rank->side, cudaStreamNonBlocking));
  BENCH_CUDA(rank->base, cudaEventCreateWithFlags(&self->order, cudaEventDisableTiming));
  return 0;
}

static void cuda_engines_free(moeRank_t *rank) {
  cudaRank_t *self = rank->device;
  for (int i = 0; i < MOE_MAX_STREAMS; i++) cuda_engine_free(self, &self->engines[i]);
  if (self->order != NULL) cudaEventDestroy(self->order);
  if (rank->side != NULL) cudaStreamDestroy(rank->side);
}

static int cuda_events_make(moeRank_t *rank) {
  cudaRank_t *self = rank->device;
  size_t nMarks = moe_max_marks(moe_options(rank)), nLayers = (size_t)moe_options(rank)->nLayers;
  self->marks = calloc(nMarks, sizeof(cudaEvent_t));
  self->segmentsIn = calloc(nLayers, sizeof(cudaEvent_t));
  if (self->marks == NULL || self->segmentsIn == NULL)
    return benchRankFail(rank->base, "no memory for events");
  for (size_t i = 0; i < nMarks; i++) BENCH_CUDA(rank->base, cudaEventCreate(&self->marks[i]));
  for (size_t i = 0; i < nLayers; i++)
    BENCH_CUDA(rank->base, cudaEventCreateWithFlags(&self->segmentsIn[i], cudaEventDisableTiming));
  return 0;
}

static size_t cuda_layer_words(const cudaRank_t *self) {
  return 1 + (size_t)self->nSegments * (CUDA_ARRAYS - 1);
}

static int cuda_words_make(moeRank_t *rank) {
  cudaRank_t *self = rank->device;
  size_t nLayers = (size_t)moe_options(rank)->nLayers, addresses = 3 * (size_t)self->nSegments;
  size_t bytes = nLayers * cuda_layer_words(self) * sizeof(uint64_t);
  BENCH_CUDA(rank->base, cudaHostAlloc((void **)&self->words, bytes, cudaHostAllocPortable));
  BENCH_CUDA(rank->base,
             cudaHostAlloc((void **)&self->addresses, addresses * sizeof(uint64_t), cudaHostAllocPortable));
  BENCH_CUDA(rank->base, cudaMalloc((void **)&self->deviceAddresses, addresses * sizeof(uint64_t)));
  return 0;
}

static int cuda_groups_make(moeRank_t *rank) {
  cudaRank_t *self = rank->device;
  cudaGroups_t *groups = &self->groups;
  size_t n = (size_t)self->nSegments;
  int **ints[] = {&groups->m,   &groups->n,   &groups->k,    &groups->lda,
                  &groups->ldb, &groups->ldc, &groups->sizes};
  bool whole = true;
  for (size_t i = 0; i < sizeof(ints) / sizeof(ints[0]); i++) {
    *ints[i] = calloc(n, sizeof(int));
    whole = whole && *ints[i] != NULL;
  }
  groups->aOps = calloc(n, sizeof(cublasOperation_t));
  groups->bOps = calloc(n, sizeof(cublasOperation_t));
  groups->alpha = calloc(n, sizeof(float));
  groups->beta = calloc(n, sizeof(float));
  whole =
      whole && groups->aOps != NULL && groups->bOps != NULL && groups->alpha != NULL && groups->beta != NULL;
  return whole ? 0 : benchRankFail(rank->base, "no memory for %zu groups", n);
}

static int cuda_open(moeRank_t *rank) {
  perfError_t error;
  cudaRank_t *self = calloc(1, sizeof(*self));
  if (self == NULL) return benchRankFail(rank->base, "no memory for a rank");
  rank->device = self;
  self->nSegments = moe_experts_per_rank(rank) + moe_options(rank)->bench.nSlots;
  if (moeCublasOpen(&self->cublas, &error) != 0) return benchRankFail(rank->base, "%s", error.text);
  BENCH_CUDA(rank->base, moeKernelsLoad());
  if (cuda_engines_make(rank) != 0 || cuda_events_make(rank) != 0 || cuda_words_make(rank) != 0) return -1;
  return cuda_groups_make(rank);
}

static void cuda_groups_free(cudaGroups_t *groups) {
  int *ints[] = {groups->m, groups->n, groups->k, groups->lda, groups->ldb, groups->ldc, groups->sizes};
  for (size_t i = 0; i < sizeof(ints) / sizeof(ints[0]); i++) free(ints[i]);
  free(groups->aOps);
  free(groups->bOps);
  free(groups->alpha);
  free(groups->beta);
}

static void cuda_close(moeRank_t *rank) {
  cudaRank_t *self = rank->device;
  if (self == NULL) return;
  for (size_t i = 0; self->marks != NULL && i < moe_max_marks(moe_options(rank)); i++) {
    if (self->marks[i] != NULL) cudaEventDestroy(self->marks[i]);
  }
  for (int32_t i = 0; self->segmentsIn != NULL && i < moe_options(rank)->nLayers; i++) {
    if (self->segmentsIn[i] != NULL) cudaEventDestroy(self->segmentsIn[i]);
  }
  cuda_engines_free(rank);
  cudaFree(self->deviceAddresses);
  cudaFreeHost(self->words);
  cudaFreeHost(self->addresses);
  cuda_groups_free(&self->groups);
  free(self->marks);
  free(self->segmentsIn);
  free(self);
  rank->device = NULL;
}

/* ---- times ---- */

static int cuda_mark(moeRank_t *rank, int32_t index) {
  const cudaRank_t *self = rank->device;
  BENCH_CUDA(rank->base, cudaEventRecord(self->marks[index], rank->base->stream));
  return 0;
}

static int cuda_marks_read(moeRank_t *rank, int32_t count) {
  const cudaRank_t *self = rank->device;
  BENCH_CUDA(rank->base, cudaStreamSynchronize(rank->base->stream));
  for (int32_t i = 0; i < count; i++) {
    float ms = 0;
    BENCH_CUDA(rank->base, cudaEventElapsedTime(&ms, self->marks[0], self->marks[i]));
    rank->markTimes[i] = ms / 1e3;
  }
  return 0;
}

/* ---- segments ---- */

static int cuda_segments_ask(moeRank_t *rank, int32_t index, cudaStream_t stream) {
  const cudaRank_t *self = rank->device;
  uint64_t *words = self->words + (size_t)index * cuda_layer_words(self);
  ultraepSegments_t segments;
  BENCH_CALL(rank->base, ultraepRouteSegments(rank->layers[index].route, &segments));
  if (segments.nSegments != self->nSegments)
    return benchRankFail(rank->base, "%d segments instead of %d", segments.nSegments, self->nSegments);
  moeKernelArrays_t arrays = {.nArrays = CUDA_ARRAYS};
  for (int a = 0; a < CUDA_ARRAYS; a++) arrays.counts[a] = 2 * self->nSegments;
  arrays.counts[CUDA_TOTAL] = 2;
  arrays.counts[CUDA_EXPERT] = self->nSegments;
  arrays.arrays[CUDA_TOTAL] = segments.totalRows;
  arrays.arrays[CUDA_FIRST_ROW] = segments.firstRow;
  arrays.arrays[CUDA_ROWS] = segments.rows;
  arrays.arrays[CUDA_EXPERT] = segments.expert;
  for (int t = 0; t < MOE_TENSORS; t++) {
    arrays.arrays[CUDA_WEIGHTS + t] = segments.weights[t];
    arrays.arrays[CUDA_GRADS + t] = segments.grads[t];
  }
  BENCH_CUDA(rank->base, moeKernelGather(&arrays, words, stream));
  BENCH_CUDA(rank->base, cudaEventRecord(self->segmentsIn[index], stream));
  return 0;
}

static int cuda_segments_take(moeRank_t *rank, int32_t index) {
  const cudaRank_t *self = rank->device;
  const uint64_t *words = self->words + (size_t)index * cuda_layer_words(self);
  const uint64_t *arrays[CUDA_ARRAYS];
  ultraepSegments_t *segments = &rank->layers[index].segments;
  BENCH_CUDA(rank->base, cudaEventSynchronize(self->segmentsIn[index]));
  /* A route that has failed leaves no segments. */
  BENCH_CALL(rank->base, ultraepGroupStatus(rank->base->group, NULL));
  for (int a = 0; a < CUDA_ARRAYS; a++) arrays[a] = a == 0 ? words : words + 1 + (a - 1) * self->nSegments;
  *segments = (ultraepSegments_t){.nSegments = self->nSegments,
                                  .expert = (const int32_t *)arrays[CUDA_EXPERT],
                                  .firstRow = (const int64_t *)arrays[CUDA_FIRST_ROW],
                                  .rows = (const int64_t *)arrays[CUDA_ROWS],
                                  .totalRows = (const int64_t *)arrays[CUDA_TOTAL]};
  for (int t = 0; t < MOE_TENSORS; t++) {
    segments->weights[t] = (void *const *)arrays[CUDA_WEIGHTS + t];
    segments->grads[t] = (void *const *)arrays[CUDA_GRADS + t];
  }
  return 0;
}

/* ---- products ---- */

/* cuBLAS stores by columns: to it, C is n x m, and the product B^T A^T. */
static cublasOperation_t cuda_b_op(const moeGemm_t *gemm) {
  return gemm->bTransposed ? CUBLAS_OP_T : CUBLAS_OP_N;
}
static cublasOperation_t cuda_a_op(const moeGemm_t *gemm) {
  return gemm->aTransposed ? CUBLAS_OP_T : CUBLAS_OP_N;
}
static int cuda_b_stride(const moeGemm_t *gemm) {
  return (int)(gemm->bTransposed ? gemm->k : gemm->n);
}
static int cuda_a_stride(const moeGemm_t *gemm) {
  return (int)(gemm->aTransposed ? gemm->m : gemm->k);
}

static int cuda_gemm_run(moeRank_t *rank, const cudaEngine_t *engine, const moeGemm_t *gemm) {
  const cudaRank_t *self = rank->device;
  float alpha = 1, beta = gemm->accumulate ? 1 : 0;
  MOE_CUBLAS(rank, self->cublas->GemmEx(engine->handle, cuda_b_op(gemm), cuda_a_op(gemm), (int)gemm->n,
                                        (int)gemm->m, (int)gemm->k, &alpha, gemm->b, CUDA_R_16BF,
                                        cuda_b_stride(gemm), gemm->a, CUDA_R_16BF, cuda_a_stride(gemm), &beta,
                                        gemm->c, gemm->isWide ? CUDA_R_32F : CUDA_R_16BF, (int)gemm->n,
                                        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  return 0;
}

static int cuda_groups_run(moeRank_t *rank, const moeGemm_t *gemms, int32_t count) {
  cudaRank_t *self = rank->device;
  cudaGroups_t *groups = &self->groups;
  uint64_t *addresses = self->addresses, *to = self->deviceAddresses;
  moeKernelArrays_t arrays = {.nArrays = 1, .counts = {2 * 3 * count}, .arrays = {addresses}};
  /* The call before may still read the addresses; and cuBLAS's own copies must not stand behind a kernel of
   * ours that waits for another rank, whose copies stand behind them. */
  BENCH_CUDA(rank->base, cudaStreamSynchronize(rank->base->stream));
  for (int32_t i = 0; i < count; i++) {
    const moeGemm_t *gemm = &gemms[i];
    groups->aOps[i] = cuda_a_op(gemm);
    groups->bOps[i] = cuda_b_op(gemm);
    groups->m[i] = (int)gemm->m;
    groups->n[i] = groups->ldc[i] = (int)gemm->n;
    groups->k[i] = (int)gemm->k;
    groups->lda[i] = cuda_a_stride(gemm);
    groups->ldb[i] = cuda_b_stride(gemm);
    groups->sizes[i] = 1;
    groups->alpha[i] = 1;
    addresses[i] = (uintptr_t)gemm->b;
    addresses[count + i] = (uintptr_t)gemm->a;
    addresses[2 * count + i] = (uintptr_t)gemm->c;
  }
  BENCH_CUDA(rank->base, moeKernelGather(&arrays, to, rank->base->stream));
  MOE_CUBLAS(rank, self->cublas->GemmGroupedBatchedEx(
                       self->engines[0].handle, groups->bOps, groups->aOps, groups->n, groups->m, groups->k,
                       groups->alpha, (const void *const *)to, CUDA_R_16BF, groups->ldb,
                       (const void *const *)(to + count), CUDA_R_16BF, groups->lda, groups->beta,
                       (void *const *)(to + 2 * count), CUDA_R_16BF, groups->ldc, count, groups->sizes,
                       CUBLAS_COMPUTE_32F));
  return 0;
}

/* What is enqueued on one stream from now on follows what has been on the other. A wait that is enqueued
 * keeps what the event stood for, so one event serves all. */
static int cuda_follow(moeRank_t *rank, cudaStream_t after, cudaStream_t before) {
  const cudaRank_t *self = rank->device;
  BENCH_CUDA(rank->base, cudaEventRecord(self->order, before));
  BENCH_CUDA(rank->base, cudaStreamWaitEvent(after, self->order, 0));
  return 0;
}

/* Products one by one, each on the stream that has least to do so far. */
static int cuda_gemms_spread(moeRank_t *rank, const moeGemm_t *gemms, int32_t count, int32_t nStreams) {
  cudaRank_t *self = rank->device;
  if (nStreams > count) nStreams = count;
  for (int32_t i = 0; i < nStreams; i++) {
    self->engines[i].work = 0;
    if (i > 0 && cuda_follow(rank, self->engines[i].stream, rank->base->stream) != 0) return -1;
  }
  for (int32_t i = 0; i < count; i++) {
    cudaEngine_t *engine = &self->engines[0];
    for (int32_t j = 1; j < nStreams; j++) {
      if (self->engines[j].work < engine->work) engine = &self->engines[j];
    }
    engine->work += (double)gemms[i].m * (double)gemms[i].n * (double)gemms[i].k;
    if (cuda_gemm_run(rank, engine, &gemms[i]) != 0) return -1;
  }
  for (int32_t i = 1; i < nStreams; i++) {
    if (cuda_follow(rank, rank->base->stream, self->engines[i].stream) != 0) return -1;
  }
  return 0;
}

static int cuda_gemms(moeRank_t *rank, const moeGemm_t *gemms, int32_t count) {
  if (moe_options(rank)->gemm == MOE_GEMM_GROUPED && !gemms[0].isWide)
    return cuda_groups_run(rank, gemms, count);
  return cuda_gemms_spread(rank, gemms, count, moe_options(rank)->nStreams);
}

static int cuda_side_begin(moeRank_t *rank) {
  if (cuda_follow(rank, rank->side, rank->base->stream) != 0) return -1;
  return cuda_shares_set(rank, moe_options(rank)->expertCtas);
}

static int cuda_side_end(moeRank_t *rank) {
  if (cuda_follow(rank, rank->base->stream, rank->side) != 0) return -1;
  return cuda_shares_set(rank, 0);
}

/* ---- between them ---- */

static int cuda_values_fill(moeRank_t *rank, uint16_t *to, int64_t count, uint64_t seed, float scale) {
  BENCH_CUDA(rank->base, moeKernelFill(to, count, seed, scale, rank->base->stream));
  BENCH_CUDA(rank->base, cudaStreamSynchronize(rank->base->stream));
  return 0;
}

static int cuda_rows_scale(moeRank_t *rank, uint16_t *rows, const float *weights, int64_t count) {
  BENCH_CUDA(rank->base,
             moeKernelScale(rows, weights, count, moe_options(rank)->bench.hidden, rank->base->stream));
  return 0;
}

static int cuda_swiglu(moeRank_t *rank, const uint16_t *gateUp, uint16_t *act, int64_t count) {
  BENCH_CUDA(rank->base, moeKernelSwiglu(gateUp, act, count, moe_options(rank)->inter, rank->base->stream));
  return 0;
}

static int cuda_swiglu_back(moeRank_t *rank, uint16_t *gateUp, const uint16_t *actGrad, int64_t count) {
  BENCH_CUDA(rank->base,
             moeKernelSwigluBack(gateUp, actGrad, count, moe_options(rank)->inter, rank->base->stream));
  return 0;
}

static int64_t cuda_energy(moeRank_t *rank) {
  int32_t local = rank->base->local;
  return benchCudaCounts(local) ? moeEnergyRead(benchCudaDevice(local)) : 0;
}

const moeOps_t moeCudaOps = {.open = cuda_open,
                             .close = cuda_close,
                             .valuesFill = cuda_values_fill,
                             .mark = cuda_mark,
                             .marksRead = cuda_marks_read,
                             .segmentsAsk = cuda_segments_ask,
                             .segmentsTake = cuda_segments_take,
                             .gemms = cuda_gemms,
                             .sideBegin = cuda_side_begin,
                             .sideEnd = cuda_side_end,
                             .rowsScale = cuda_rows_scale,
                             .swiglu = cuda_swiglu,
                             .swigluBack = cuda_swiglu_back,
                             .energy = cuda_energy};
