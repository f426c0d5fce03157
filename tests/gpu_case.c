#include "gpu_case.h"

#include "gpu_copy.h"
#include "nccl_backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool gpu_type_adds(int32_t dataType) {
  return dataType <= ULTRAEP_FLOAT32;
}

static size_t type_bytes(int32_t type) {
  return type == ULTRAEP_FLOAT32 ? 4 : type <= ULTRAEP_FLOAT16 ? 2 : 1;
}

gpuShape_t gpu_shape_small(int nRanks) {
  gpuShape_t x = {.seed = 1, .config = ULTRAEP_CONFIG_INITIALIZER, .weighted = true};
  ultraepConfig_t *c = &x.config;
  c->nExperts = 4 * nRanks;
  c->topK = 4;
  c->maxTokens = 64;
  c->hidden = 64;
  c->alignment = 8;
  c->maxCtas = 8;
  c->timeoutMs = 20000;
  c->maxRecvRows = (int64_t)nRanks * c->maxTokens * c->topK + (int64_t)(c->nExperts + 4) * c->alignment;
  for (int r = 0; r < nRanks; r++) x.nTokens[r] = r == 1 ? 0 : r % 3 == 2 ? 37 : c->maxTokens;
  return x;
}

/* ---- data ---- */

static void *take(unsigned char **next, size_t bytes) {
  void *taken = *next;
  *next += (bytes + 255) / 256 * 256;
  return taken;
}

const char *gpu_data_make(const gpuShape_t *shape, int rank, size_t nRows, bool isQueued, gpuData_t *data) {
  const ultraepConfig_t *c = &shape->config;
  *data = (gpuData_t){.rowBytes = (size_t)c->hidden * type_bytes(c->dataType),
                      .scaleBytes = (size_t)c->scaleBytes,
                      .nRows = nRows,
                      .nTokens = (size_t)shape->nTokens[rank],
                      .topK = (size_t)c->topK,
                      .isQueued = isQueued};
  size_t n = data->nTokens + 1, entries = n * data->topK, out = n * data->rowBytes;
  size_t rows = nRows * (data->rowBytes + data->scaleBytes + sizeof(float)) + 3 * 256;
  size_t bytes = 8 * entries + out + n * data->scaleBytes + 4 * out + (isQueued ? 2 : 1) * rows + 16 * 256;
  if (isQueued)
    RANK_CUDA(cudaHostAlloc(&data->block, bytes, cudaHostAllocDefault));
  else
    RANK_CHECK(data->block = malloc(bytes), "no memory: %zu bytes", bytes);
  unsigned char *next = data->block;
  data->topk = take(&next, entries * sizeof(int32_t));
  data->weights = take(&next, entries * sizeof(float));
  data->tokens = take(&next, out);
  data->scales = take(&next, n * data->scaleBytes);
  for (int b = 0; b < 2; b++) {
    data->out[b] = take(&next, out);
    data->sum[b] = take(&next, out);
    if (b == 0 && !isQueued) continue;
    data->rows[b] = take(&next, nRows * data->rowBytes);
    data->rowScales[b] = take(&next, nRows * data->scaleBytes);
    data->rowWeights[b] = take(&next, nRows * sizeof(float));
  }
  return NULL;
}

void gpu_data_free(gpuData_t *data) {
  if (data->isQueued)
    (void)cudaFreeHost(data->block);
  else
    free(data->block);
  *data = (gpuData_t){0};
}

static int32_t draw_expert(int nExperts, gpuLoads_t loads, planner_random_t *random) {
  if (loads == GPU_LOADS_NONE) return -1;
  if (loads == GPU_LOADS_ONE_EXPERT) return nExperts - 1;
  if (loads == GPU_LOADS_UNUSED && planner_random_below(random, 9) == 0) return -1;
  if (loads != GPU_LOADS_UNIFORM && planner_random_below(random, 2))
    return planner_random_below(random, 4) ? 0 : planner_random_below(random, nExperts);
  return planner_random_below(random, nExperts);
}

void gpu_data_fill(const gpuShape_t *shape, gpuLoads_t loads, gpuData_t *data, planner_random_t *random) {
  size_t elements = data->nTokens * (size_t)shape->config.hidden;
  int32_t type = shape->config.dataType;
  for (size_t i = 0; i < data->nTokens * data->topK; i++) {
    data->topk[i] = draw_expert(shape->config.nExperts, loads, random);
    data->weights[i] = (float)planner_random_below(random, 1 << 20) / (float)(1 << 20);
  }
  for (size_t i = 0; i < elements; i++) {
    float value = (float)planner_random_below(random, 1 << 16) / 8192.0f - 4.0f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    uint16_t bf16 = (uint16_t)(bits >> 16), f16 = (uint16_t)(0x3000 + (bits >> 20 & 0xfff) % 0x1800);
    if (type == ULTRAEP_FLOAT32)
      memcpy(data->tokens + 4 * i, &value, 4);
    else if (type == ULTRAEP_BFLOAT16)
      memcpy(data->tokens + 2 * i, &bf16, 2);
    else if (type == ULTRAEP_FLOAT16)
      memcpy(data->tokens + 2 * i, &f16, 2);
    else
      data->tokens[i] = (unsigned char)bits;
  }
  for (size_t i = 0; i < data->nTokens * data->scaleBytes; i++)
    data->scales[i] = (unsigned char)planner_random_next(random);
}

/* ---- sides ---- */

static size_t row_bytes(const gpuSide_t *side) {
  return (size_t)side->shape->config.hidden * type_bytes(side->shape->config.dataType);
}

static const char *side_make_inputs(gpuSide_t *side) {
  RANK_CUDA((cudaError_t)gpu_copy_load());
  size_t n = (size_t)side->shape->nTokens[side->rank] + 1, entries = n * (size_t)side->shape->config.topK;
  RANK_CUDA(cudaMalloc((void **)&side->topk, entries * sizeof(int32_t)));
  RANK_CUDA(cudaMalloc((void **)&side->topkWeights, entries * sizeof(float)));
  RANK_CUDA(cudaMalloc((void **)&side->tokens, n * row_bytes(side)));
  RANK_CUDA(cudaMalloc((void **)&side->tokenScales, n * (size_t)side->shape->config.scaleBytes + 16));
  RANK_CUDA(cudaMalloc((void **)&side->out, n * row_bytes(side)));
  RANK_CUDA(cudaMalloc((void **)&side->sum, n * row_bytes(side)));
  RANK_CUDA(cudaEventCreateWithFlags(&side->fed, cudaEventDisableTiming));
  return NULL;
}

const char *gpu_side_make(gpuWorld_t *world, const gpuShape_t *shape, int rank, bool onDevice,
                          gpuSide_t *side) {
  gpuSide_t made = {.shape = shape, .rank = rank, .onDevice = onDevice};
  ultraepGroupProperties_t properties;
  if (onDevice)
    RANK_OK(ultraepGroupCreate(&made.group, world->comms[rank], &shape->config));
  else
    RANK_OK(ultraepGroupCreateHost(&made.group, world->host, rank, &shape->config));
  RANK_OK(ultraepGroupProperties(made.group, &properties));
  made.nRows = (size_t)properties.maxRecvRows;
  RANK_OK(ultraepRouteCreate(made.group, &made.route));
  RANK_OK(ultraepMemAlloc(made.group, (void **)&made.rows, made.nRows * row_bytes(&made)));
  RANK_OK(
      ultraepMemAlloc(made.group, (void **)&made.scales, made.nRows * (size_t)shape->config.scaleBytes + 16));
  RANK_OK(ultraepMemAlloc(made.group, (void **)&made.weights, made.nRows * sizeof(float)));
  if (onDevice) RANK_DO(side_make_inputs(&made));
  *side = made;
  return NULL;
}

const char *gpu_side_free(gpuSide_t *side) {
  gpuSide_t old = *side;
  *side = (gpuSide_t){0};
  RANK_OK(ultraepGroupDestroy(old.group));
  if (!old.onDevice) return NULL;
  RANK_CUDA(cudaFree(old.topk));
  RANK_CUDA(cudaFree(old.topkWeights));
  RANK_CUDA(cudaFree(old.tokens));
  RANK_CUDA(cudaFree(old.tokenScales));
  RANK_CUDA(cudaFree(old.out));
  RANK_CUDA(cudaFree(old.sum));
  RANK_CUDA(cudaEventDestroy(old.fed));
  return NULL;
}

/* Where stamps may lie: a region of the caller's, or (-1) the group's own window, whose loads nobody reads
 * before they are written. */
static const ncclRegion_t *stamped_region(const ncclRank_t *self, int i, size_t *offset) {
  *offset = i < 0 ? self->kernel.loadsOffset : 0;
  const ncclRegion_t *region = i < 0 ? &self->window : &self->regions[i];
  return region->base ? region : NULL;
}

const char *gpu_check_mappings(gpuWorld_t *world, const gpuSide_t *side) {
  const ncclRank_t *self = nccl_rank(side->group);
  int32_t stamps[GPU_WORLD_MAX_RANKS];
  size_t offset;
  RANK_MEET(world);
  for (int i = -1; i < self->nRegions; i++) {
    const ncclRegion_t *region = stamped_region(self, i, &offset);
    for (int r = 0; r < world->nRanks && region; r++) {
      int32_t stamp = self->rank << 16 | r << 8 | (i + 1);
      RANK_CUDA(cudaMemcpy(region->peers[r] + offset + sizeof(stamp) * (size_t)self->rank, &stamp,
                           sizeof(stamp), cudaMemcpyHostToDevice));
    }
  }
  RANK_MEET(world);
  for (int i = -1; i < self->nRegions; i++) {
    const ncclRegion_t *region = stamped_region(self, i, &offset);
    if (!region) continue;
    RANK_CUDA(cudaMemcpy(stamps, (const char *)region->base + offset, sizeof(*stamps) * (size_t)world->nRanks,
                         cudaMemcpyDeviceToHost));
    for (int r = 0; r < world->nRanks; r++)
      RANK_CHECK(stamps[r] == (r << 16 | self->rank << 8 | (i + 1)),
                 "region %d: rank %d's writes are not here (0x%08x): its mapping is another memory's", i, r,
                 (unsigned)stamps[r]);
  }
  RANK_MEET(world);
  return NULL;
}

/* The flags, and the failure mark, that are raised in a window. */
static void print_flags(const char *what, int rank, int nRanks, const uint64_t *flags) {
  printf("  %s %d:", what, rank);
  for (int kind = 0; kind < KERNEL_FLAG_KINDS; kind++)
    for (int r = 0; r < nRanks; r++, flags++)
      if (*flags != 0) printf(" %d/%d=%llx", kind, r, (unsigned long long)*flags);
  printf("%s%llx\n", *flags ? " mark " : " ", (unsigned long long)*flags);
}

/* What a rank's kernels wait for, while they do: all ranks' flags as it sees them, its calls and what has
 * come to the barrier of the kernel that runs. *hasBegun: any kernel of its group. */
static const char *side_print_waits(const gpuSide_t *side, bool *hasBegun) {
  const ncclRank_t *self = nccl_rank(side->group);
  int nRanks = self->nRanks;
  uint64_t flags[GPU_WORLD_MAX_RANKS + 1][KERNEL_FLAG_KINDS * GPU_WORLD_MAX_RANKS + 1];
  size_t bytes = (KERNEL_FLAG_KINDS * (size_t)nRanks + 1) * sizeof(uint64_t);
  kernelState_t state;
  cudaStream_t look;
  RANK_CUDA(cudaStreamCreateWithFlags(&look, cudaStreamNonBlocking));
  RANK_CUDA(cudaMemcpyAsync(&state, self->kernel.state, sizeof(state), cudaMemcpyDeviceToHost, look));
  RANK_CUDA(cudaMemcpyAsync(flags[nRanks], self->window.base, bytes, cudaMemcpyDeviceToHost, look));
  for (int r = 0; r < nRanks; r++)
    RANK_CUDA(cudaMemcpyAsync(flags[r], self->window.peers[r], bytes, cudaMemcpyDeviceToHost, look));
  RANK_CUDA(cudaStreamSynchronize(look));
  RANK_CUDA(cudaStreamDestroy(look));
  const kernelLane_t *lane = &state.lanes[KERNEL_LANE_EXCHANGE];
  *hasBegun = lane->calls > 0 || lane->arrived[0] > 0 || lane->left > 0;
  flockfile(stdout); /* ranks do this at the same time */
  printf("rank %d still waits: inputs %s, %u calls, arrived %u and %u, left %u, failed %d\n", self->rank,
         cudaEventQuery(side->fed) == cudaSuccess ? "there" : "not there", lane->calls, lane->arrived[0],
         lane->arrived[1], lane->left, state.failed);
  print_flags("own window, rank", self->rank, nRanks, flags[nRanks]);
  for (int r = 0; r < nRanks; r++) print_flags("as seen at rank", r, nRanks, flags[r]);
  (void)fflush(stdout);
  funlockfile(stdout);
  return NULL;
}

const char *gpu_side_sync(gpuWorld_t *world, const gpuSide_t *side, cudaStream_t stream) {
  double start = gpu_world_seconds(), patience = 0.5e-3 * side->shape->config.timeoutMs;
  for (bool isSaid = false; cudaStreamQuery(stream) == cudaErrorNotReady;) {
    bool hasBegun = true;
    gpu_world_sleep_ms(1);
    if (isSaid || gpu_world_seconds() - start < patience) continue;
    isSaid = true;
    RANK_DO(side_print_waits(side, &hasBegun));
    if (!hasBegun) __atomic_store_n(&world->isStalled, true, __ATOMIC_RELAXED);
  }
  RANK_CUDA(cudaStreamSynchronize(stream));
  return NULL;
}

/* ---- calls ---- */

static ultraepTensors_t dispatch_tensors(const gpuSide_t *side, const void *tokens, const void *scales) {
  ultraepTensors_t t = ULTRAEP_TENSORS_INITIALIZER;
  bool hasScales = side->shape->config.scaleBytes > 0;
  t.sendbuff = tokens;
  t.recvbuff = side->rows;
  t.sendScales = hasScales ? scales : NULL;
  t.recvScales = hasScales ? side->scales : NULL;
  t.recvWeights = (float *)side->weights;
  return t;
}

/* Both combines: weighted where the route has weights, and the plain sum. */
static const char *combine_both(const gpuSide_t *side, ultraepRoute_t route, void *out, void *sum,
                                cudaStream_t stream) {
  if (!gpu_type_adds(side->shape->config.dataType)) return NULL;
  ultraepTensors_t t = ULTRAEP_TENSORS_INITIALIZER;
  t.sendbuff = side->rows;
  t.recvbuff = out;
  RANK_OK(ultraepAllToAllTensors(&t, ULTRAEP_COMBINE, route, stream));
  t.recvbuff = sum;
  RANK_OK(ultraepAllToAllTensors(&t, ULTRAEP_COMBINE_SUM, route, stream));
  return NULL;
}

const char *gpu_host_run(const gpuSide_t *side, gpuData_t *data) {
  size_t rows = data->nRows * data->rowBytes, scales = data->nRows * data->scaleBytes;
  bool some = data->nTokens > 0; /* a rank without tokens passes no arrays */
  memset(side->rows, GPU_POISON, rows);
  memset(side->scales, GPU_POISON, scales);
  memset(side->weights, GPU_POISON, data->nRows * sizeof(float));
  memset(data->out[0], GPU_POISON, (data->nTokens + 1) * data->rowBytes);
  memset(data->sum[0], GPU_POISON, (data->nTokens + 1) * data->rowBytes);
  RANK_OK(ultraepRouteUpdate(side->route, some ? data->topk : NULL,
                             some && side->shape->weighted ? data->weights : NULL, (int)data->nTokens, NULL));
  ultraepTensors_t t = dispatch_tensors(side, data->tokens, data->scales);
  RANK_OK(ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, side->route, NULL));
  RANK_DO(combine_both(side, side->route, data->out[0], data->sum[0], NULL));
  if (!data->isQueued) {
    data->rows[0] = side->rows;
    data->rowScales[0] = side->scales;
    data->rowWeights[0] = side->weights;
    return NULL;
  }
  memcpy(data->rows[0], side->rows, rows);
  memcpy(data->rowScales[0], side->scales, scales);
  memcpy(data->rowWeights[0], side->weights, data->nRows * sizeof(float));
  return NULL;
}

/* Queued exchanges of several ranks on one device must not wait in the queues of the copy engines. */
static const char *copy_data(const gpuData_t *data, void *to, const void *from, size_t bytes,
                             cudaStream_t stream) {
  if (data->isQueued)
    RANK_CUDA((cudaError_t)gpu_copy(to, from, bytes, stream));
  else
    RANK_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  return NULL;
}

const char *gpu_device_inputs(const gpuSide_t *side, const gpuData_t *data, cudaStream_t stream) {
  size_t entries = data->nTokens * data->topK, outBytes = (data->nTokens + 1) * data->rowBytes;
  RANK_DO(copy_data(data, side->topk, data->topk, entries * sizeof(int32_t), stream));
  RANK_DO(copy_data(data, side->topkWeights, data->weights, entries * sizeof(float), stream));
  RANK_DO(copy_data(data, side->tokens, data->tokens, data->nTokens * data->rowBytes, stream));
  RANK_DO(copy_data(data, side->tokenScales, data->scales, data->nTokens * data->scaleBytes, stream));
  RANK_CUDA(cudaMemsetAsync(side->out, GPU_POISON, outBytes, stream));
  RANK_CUDA(cudaMemsetAsync(side->sum, GPU_POISON, outBytes, stream));
  RANK_CUDA(cudaMemsetAsync(side->rows, GPU_POISON, data->nRows * data->rowBytes, stream));
  RANK_CUDA(cudaMemsetAsync(side->scales, GPU_POISON, data->nRows * data->scaleBytes, stream));
  RANK_CUDA(cudaMemsetAsync(side->weights, GPU_POISON, data->nRows * sizeof(float), stream));
  return NULL;
}

const char *gpu_device_update(const gpuSide_t *side, ultraepRoute_t route, cudaStream_t stream) {
  int nTokens = side->shape->nTokens[side->rank];
  bool some = nTokens > 0;
  RANK_OK(ultraepRouteUpdate(route, some ? side->topk : NULL,
                             some && side->shape->weighted ? side->topkWeights : NULL, nTokens, stream));
  return NULL;
}

const char *gpu_device_exchange(const gpuSide_t *side, ultraepRoute_t route, cudaStream_t stream) {
  ultraepTensors_t t = dispatch_tensors(side, side->tokens, side->tokenScales);
  RANK_OK(ultraepAllToAllTensors(&t, ULTRAEP_DISPATCH, route, stream));
  return combine_both(side, route, side->out, side->sum, stream);
}

const char *gpu_device_fused(const gpuSide_t *side, ultraepRoute_t route, cudaStream_t stream) {
  ultraepTensors_t t = dispatch_tensors(side, side->tokens, side->tokenScales);
  int nTokens = side->shape->nTokens[side->rank];
  bool some = nTokens > 0;
  RANK_OK(ultraepRouteDispatch(route, some ? side->topk : NULL,
                               some && side->shape->weighted ? side->topkWeights : NULL, nTokens, &t,
                               stream));
  return combine_both(side, route, side->out, side->sum, stream);
}

const char *gpu_device_outputs(const gpuSide_t *side, gpuData_t *data, cudaStream_t stream) {
  size_t outBytes = (data->nTokens + 1) * data->rowBytes;
  RANK_DO(copy_data(data, data->rows[1], side->rows, data->nRows * data->rowBytes, stream));
  RANK_DO(copy_data(data, data->rowScales[1], side->scales, data->nRows * data->scaleBytes, stream));
  RANK_DO(copy_data(data, data->rowWeights[1], side->weights, data->nRows * sizeof(float), stream));
  RANK_DO(copy_data(data, data->out[1], side->out, outBytes, stream));
  return copy_data(data, data->sum[1], side->sum, outBytes, stream);
}

const char *gpu_device_run(const gpuSide_t *side, bool fused, cudaStream_t stream) {
  if (fused) return gpu_device_fused(side, side->route, stream);
  RANK_DO(gpu_device_update(side, side->route, stream));
  return gpu_device_exchange(side, side->route, stream);
}

const char *gpu_device_enqueue(const gpuSide_t *side, gpuData_t *data, bool fused, cudaStream_t stream) {
  RANK_DO(gpu_device_inputs(side, data, stream));
  RANK_CUDA(cudaEventRecord(side->fed, stream));
  RANK_DO(gpu_device_run(side, fused, stream));
  return gpu_device_outputs(side, data, stream);
}

/* ---- comparisons ---- */

static const char *compare_bytes(const char *what, unsigned char *const bytes[2], size_t n, size_t rowBytes) {
  if (n == 0 || memcmp(bytes[0], bytes[1], n) == 0) return NULL;
  size_t i = 0;
  while (bytes[0][i] == bytes[1][i]) i++;
  return gpu_world_say("%s: row %zu byte %zu is 0x%02x, host 0x%02x", what, i / rowBytes, i % rowBytes,
                       bytes[1][i], bytes[0][i]);
}

const char *gpu_compare_data(const gpuShape_t *shape, const gpuData_t *data) {
  size_t outBytes = (data->nTokens + 1) * data->rowBytes;
  RANK_DO(compare_bytes("rows", data->rows, data->nRows * data->rowBytes, data->rowBytes));
  RANK_DO(compare_bytes("scales", data->rowScales, data->nRows * data->scaleBytes, data->scaleBytes));
  RANK_DO(compare_bytes("weights", data->rowWeights, data->nRows * sizeof(float), sizeof(float)));
  if (!gpu_type_adds(shape->config.dataType)) return NULL;
  RANK_DO(compare_bytes("combined tokens", data->out, outBytes, data->rowBytes));
  return compare_bytes("summed tokens", data->sum, outBytes, data->rowBytes);
}

const char *gpu_compare_segments(ultraepRoute_t host, ultraepRoute_t device, cudaStream_t stream) {
  enum { MOST = ULTRAEP_MAX_EXPERTS + ULTRAEP_MAX_SLOTS };
  static _Thread_local int32_t expert[MOST];
  static _Thread_local int64_t first[MOST], rows[MOST], total;
  ultraepSegments_t a, b;
  RANK_OK(ultraepRouteSegments(host, &a));
  RANK_OK(ultraepRouteSegments(device, &b));
  RANK_CHECK(a.nSegments == b.nSegments, "segments: %d, host %d", b.nSegments, a.nSegments);
  size_t n = (size_t)a.nSegments;
  RANK_CUDA(cudaMemcpyAsync(expert, b.expert, n * sizeof(*expert), cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaMemcpyAsync(first, b.firstRow, n * sizeof(*first), cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaMemcpyAsync(rows, b.rows, n * sizeof(*rows), cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaMemcpyAsync(&total, b.totalRows, sizeof(total), cudaMemcpyDeviceToHost, stream));
  RANK_CUDA(cudaStreamSynchronize(stream));
  for (size_t i = 0; i < n; i++)
    RANK_CHECK(expert[i] == a.expert[i] && first[i] == a.firstRow[i] && rows[i] == a.rows[i],
               "segment %zu: expert %d first %lld rows %lld, host %d %lld %lld", i, expert[i],
               (long long)first[i], (long long)rows[i], a.expert[i], (long long)a.firstRow[i],
               (long long)a.rows[i]);
  RANK_CHECK(total == *a.totalRows, "totalRows %lld, host %lld", (long long)total, (long long)*a.totalRows);
  return NULL;
}

const char *gpu_compare_plans(ultraepRoute_t host, ultraepRoute_t device) {
  ultraepPlan_t a, b;
  RANK_OK(ultraepRoutePlan(host, &a));
  RANK_OK(ultraepRoutePlan(device, &b));
  RANK_CHECK(a.nInstances == b.nInstances && a.maxPlanned == b.maxPlanned && a.target == b.target &&
                 a.bound == b.bound && a.total == b.total && a.localAssignments == b.localAssignments,
             "plan: %d instances, most %lld of %lld; host %d, %lld of %lld", b.nInstances,
             (long long)b.maxPlanned, (long long)b.total, a.nInstances, (long long)a.maxPlanned,
             (long long)a.total);
  size_t nInstances = (size_t)a.nInstances, nExperts = (size_t)a.nExperts;
  RANK_CHECK(memcmp(a.instances, b.instances, nInstances * sizeof(*a.instances)) == 0, "other instances");
  RANK_CHECK(memcmp(a.expertLoad, b.expertLoad, nExperts * sizeof(*a.expertLoad)) == 0, "other loads");
  RANK_CHECK(memcmp(a.pieceFirst, b.pieceFirst, (nExperts + 1) * sizeof(*a.pieceFirst)) == 0 &&
                 memcmp(a.pieces, b.pieces, (size_t)a.pieceFirst[nExperts] * sizeof(*a.pieces)) == 0,
             "other pieces");
  return NULL;
}

const char *gpu_compare_counters(ultraepGroup_t host, ultraepGroup_t device) {
  ultraepCounters_t a, b;
  RANK_OK(ultraepGroupCounters(host, &a));
  RANK_OK(ultraepGroupCounters(device, &b));
  RANK_CHECK(a.dispatchBytes == b.dispatchBytes, "dispatch crossed %lld bytes, host %lld",
             (long long)b.dispatchBytes, (long long)a.dispatchBytes);
  RANK_CHECK(a.combineBytes == b.combineBytes, "combine crossed %lld bytes, host %lld",
             (long long)b.combineBytes, (long long)a.combineBytes);
  return NULL;
}
